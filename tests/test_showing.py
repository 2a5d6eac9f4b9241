"""What `show` says of a trial, against the tables it is read from."""

from pathlib import Path

import pytest

from jobs.errors import SpecError
from orchestrator.printing import print_trial
from orchestrator.showing import describe_trial
from search_spaces.base import Grid
from storage.query import open_sweep
from storage.store import Store
from tests import fake_job
from tests.fakes import StoredTrial, write_sweep
from tests.sweeps import drive, make_space


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Trials 0 to 3 of two sources at a depth of one; trial 4 has the same work as trial 1."""
    place = tmp_path_factory.mktemp("shown") / "sweep"
    space = make_space({"x": Grid([1, 2]), "source": Grid([5, 7])}, fixed={"source_depth": 1})
    drive(place, space, trials=4)
    return place


def test_parameters_state_and_metrics_are_those_of_the_tables(folder: Path) -> None:
    sweep = open_sweep(folder)
    for row in sweep.rows("SELECT * FROM trials"):
        found = describe_trial(folder, row["trial"], texts=0)
        assert found["params"] == {"x": row["x"], "source": row["source"]}
        assert found["state"] == "completed"
        shown = {(each["split"], each["name"]): each["value"] for each in found["metrics"]}
        stored = sweep.rows(f"SELECT * FROM metrics WHERE trial = {row['trial']}")
        assert shown == {(each["split"], each["name"]): each["value"] for each in stored}
        assert found["metrics"][0]["name"] == "total", "objectives come first"
        others = [describe_trial(folder, other, texts=0)["metrics"] for other in range(4)]
        points = [{each["name"]: each["value"] for each in other} for other in others]
        own = points[row["trial"]]
        beaten = any(
            other["total"] >= own["total"] and other["square"] <= own["square"] and other != own
            for other in points
        )
        assert found["is_on_front"] == (not beaten)


def test_what_a_result_was_made_of_is_told_down_to_the_last_artifact(folder: Path) -> None:
    for trial in range(4):
        found = describe_trial(folder, trial, texts=0)
        own, *taken = found["made_of"]
        assert own["params"]["x"] == found["params"]["x"]
        assert [(each["job"], each["params"]["depth"]) for each in taken] == [
            ("tests.fake_source", 1),
            ("tests.fake_source", 0),
        ]
        assert {each["params"]["value"] for each in taken} == {found["params"]["source"]}
        assert own["requires"] == [taken[0]["spec"]]
        assert taken[0]["requires"] == [taken[1]["spec"]]
        for each in taken:
            assert (folder / each["artifact"]["path"]).stat().st_size == each["artifact"]["bytes"]
        assert own["model"]["id"] == taken[-1]["model"]["id"]


def test_a_trial_that_shares_a_result_says_whose_and_has_its_metrics(tmp_path: Path) -> None:
    trials = [
        StoredTrial({"x": 1}, {"select": {"total": 1.0, "total_low": 0.5, "total_high": 1.5}}, spec="same"),
        StoredTrial({"x": 2}, {}, spec="same"),
        StoredTrial({"x": 3}, {"select": {"total": None}}, state="infeasible"),
    ]
    write_sweep(tmp_path, trials, objectives={"total": "maximize"}, parameters={"x": "BIGINT"})
    found = describe_trial(tmp_path, 1, texts=3)
    assert (found["reused_from"], found["is_on_front"]) == (0, True)
    [metric] = found["metrics"]
    assert (metric["value"], metric["low"], metric["high"]) == (1.0, 0.5, 1.5)
    other = describe_trial(tmp_path, 2, texts=3)
    assert (other["state"], other["reason"], other["is_on_front"]) == ("infeasible", "was infeasible", False)
    assert other["metrics"][0]["value"] is None


def test_texts_cannot_command_a_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_sweep(tmp_path, [StoredTrial({}, {"select": {"total": 1.0}})], objectives={"total": "maximize"})
    rows = [
        {"spec": "spec0", "split": split, "item": item, "prompt": "Say it.", "text": fake_job.NASTY}
        for split in ("select", "report")
        for item in range(5)
    ]
    baseline = [{**row, "spec": "base", "text": "plain"} for row in rows]
    Store(tmp_path).commit(
        [], completions=[*rows, *baseline], attempts=[{"spec": "base", "job": "tests.fake_job"}]
    )
    found = describe_trial(tmp_path, 0, texts=2)
    assert [(each["split"], each["item"]) for each in found["texts"]] == [
        ("select", 0),
        ("select", 1),
        ("report", 0),
        ("report", 1),
    ]
    assert all((each["text"], each["control"]) == (fake_job.NASTY, "plain") for each in found["texts"])
    print_trial(found)
    said = capsys.readouterr().out
    assert "emoji 👩" in said
    assert not {"\x1b", "\x00", "\x07", "\x9b", "\u202e"} & set(said)


def test_a_trial_that_does_not_exist_is_refused_with_those_that_do(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(SpecError, match=r"there is no trial 9; .* has trials 0 to 3"):
        describe_trial(folder, 9, texts=1)
    write_sweep(tmp_path / "empty", [], objectives={"total": "maximize"})
    with pytest.raises(SpecError, match="none yet"):
        describe_trial(tmp_path / "empty", 0, texts=1)

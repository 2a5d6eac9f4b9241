"""What the report's page holds for its script: every result, its settings, and as many replies as fit."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from orchestrator.report import scatter, writing
from orchestrator.report.findings import read_findings
from orchestrator.report.training import Curve, read_training, training_figure
from storage.artifacts import write_artifact
from storage.parquet import write_table
from storage.query import open_sweep
from storage.store import Part, Store
from tests.test_report import GRID, NASTY, OBJECTIVES, PROMPTS, Page, Trial, make_sweep, tone_trials
from tests.test_report import report as page_of

BASELINE = ("Fine.", "The first day of the week.", "Water that falls.")


@pytest.fixture(autouse=True)
def _unpainted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("orchestrator.report.writing.to_png", lambda figure: b"PNG")


def points_of(folder: Path) -> Any:
    sweep = open_sweep(folder)
    return scatter.scatter(sweep, read_findings(sweep))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    trials = tone_trials()
    trials[3] = Trial(trials[3].params, {}, "failed", "why")
    trials[4] = Trial(
        trials[4].params, {**trials[4].metrics, "select": {"effect": float("nan"), "damage": 1.0}}
    )
    trials[9] = trials[9]._replace(texts=NASTY)
    return make_sweep(tmp_path / "sweep", trials, parameters=GRID, baseline=BASELINE)


def test_every_result_is_there_once_with_its_settings_and_measures(folder: Path) -> None:
    found, sweep = points_of(folder), open_sweep(folder)
    rows = sweep.rows("SELECT * FROM trials WHERE state = 'completed' AND reused_from IS NULL ORDER BY trial")
    assert found["trials"] == [row["trial"] for row in rows]
    for name in GRID:
        assert found["settings"][name] == [row[name] for row in rows]
    columns = {column["name"]: column for column in found["columns"]}
    assert list(columns)[:2] == [objective["metric"] for objective in OBJECTIVES]
    assert [columns[name]["is_objective"] for name in ("effect", "damage", "nll", "dose")] == [
        True,
        True,
        False,
        False,
    ]
    assert found["axes"] == [0, 1]
    for name in ("effect", "damage", "nll", "log_odds"):
        values = {
            row["trial"]: row["value"]
            for row in sweep.rows(
                f"SELECT trial, value FROM metrics WHERE name = '{name}' AND split = 'select'"
            )
        }
        expected = [values.get(trial) for trial in found["trials"]]
        assert [value is None for value in columns[name]["values"]] == [value is None for value in expected]
        pairs = zip(columns[name]["values"], expected, strict=True)
        assert all(one == pytest.approx(other, rel=1e-5) for one, other in pairs if other is not None)
    assert columns["effect"]["values"][found["trials"].index(4)] is None
    front = {row["trial"] for row in sweep.pareto().to_pylist()}
    assert {found["trials"][index] for index in found["front"]} == front


def test_replies_stand_beside_their_control(folder: Path) -> None:
    found = points_of(folder)
    assert (found["beside"], found["tried"], found["has_replies"]) == (["unsteered"], "steered", True)
    rows = [[split, *(found["texts"][place] for place in texts)] for split, *texts in found["replies"][9]]
    assert [row[:3] for row in rows] == [
        [*prompt, text] for prompt, text in zip(PROMPTS, BASELINE, strict=True)
    ]
    assert rows[0][3] == NASTY[0]
    assert "␛[31mred␀" in rows[1][3]
    assert len(set(found["texts"])) == len(found["texts"])


def test_the_page_holds_it_and_no_text_ends_its_element(folder: Path) -> None:
    page = page_of(folder)
    assert json.loads(page.inline["script"][0]) == json.loads(json.dumps(points_of(folder)))
    assert NASTY[0] in page.inline["script"][0].encode().decode("unicode_escape", "ignore")


def test_of_too_many_replies_those_of_the_front_are_kept(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scatter, "MOST_CHARACTERS", 400)
    found = points_of(folder)
    front = [found["trials"][index] for index in found["front"]]
    kept = found["replies"]
    assert list(kept)[:2] == front[:2]
    listed = ", ".join(map(str, kept))
    [taken] = open_sweep(folder).rows(
        f"SELECT sum(length(text)) AS characters FROM completions WHERE trial IN ({listed})"
    )
    assert taken["characters"] <= 400
    assert len(kept) < len(found["trials"])


def test_a_reply_that_is_too_long_leaves_room_for_the_others(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sweep, before = open_sweep(folder), set(points_of(folder)["replies"])
    best = sweep.pareto()["trial"].to_pylist()[0]
    [row] = sweep.rows(f"SELECT spec FROM trials WHERE trial = {best}")
    long = {"spec": row["spec"], "split": "select", "item": 9, "prompt": "?", "text": "x" * 2_000_000}
    monkeypatch.setattr(scatter, "MOST_CHARACTERS", 1_000_000)
    Store(folder).commit([Part((write_table(folder, "completions", [long]),), ())])
    found = points_of(folder)
    assert set(found["replies"]) == before - {best} != before


def test_a_single_objective_stands_over_the_trials_number(tmp_path: Path) -> None:
    trials = [Trial({"x": x}, {"select": {"effect": float(x)}}) for x in (3, 1, 2)]
    folder = make_sweep(tmp_path / "one", trials, parameters={"x": "BIGINT"}, objectives=OBJECTIVES[:1])
    found = points_of(folder)
    assert [found["columns"][index]["name"] for index in found["axes"]] == ["trial", "effect"]
    assert found["replies"] == {}
    assert not found["has_replies"]


def test_without_a_result_there_is_no_scatter(tmp_path: Path) -> None:
    folder = make_sweep(
        tmp_path / "none", [Trial({"layer": 1, "dose": 0.1}, {}, "failed", "why")], parameters=GRID
    )
    assert points_of(folder) is None
    assert "explorer" not in page_of(folder).attributes("id")


def test_of_many_trials_the_table_shows_the_best_and_says_so(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writing, "MOST_LISTED", 6)
    page, sweep = page_of(folder), open_sweep(folder)
    listed = {int(each.removeprefix("trial-")) for each in page.attributes("id") if each.startswith("trial-")}
    front = {row["trial"] for row in sweep.pareto().to_pylist()}
    best = sweep.rows("SELECT trial FROM points WHERE effect IS NOT NULL ORDER BY effect DESC")
    rest = [row["trial"] for row in best if row["trial"] not in front]
    assert listed == {*front, *rest[: 6 - len(front)]}
    assert "6 of 15 trials: those on the front and the best by effect" in page.text


def test_what_a_sweep_has_cost_is_shown_by_job(folder: Path) -> None:
    lost = {
        "attempt": "l",
        "pack": "q",
        "job": "jobs.steer",
        "state": "lost",
        "started": 1.0,
        "finished": 5.0,
    }
    Store(folder).commit([], attempts=[lost])
    [row] = [row for row in page_of(folder).rows if row[:1] == ["jobs.steer"]]
    packs = open_sweep(folder).rows("SELECT count(DISTINCT (pack, worker, started)) AS number FROM attempts")
    assert row[1] == str(packs[0]["number"])
    assert row[3] == "4.000"


def test_replies_say_what_they_were_made_of(folder: Path) -> None:
    need = {
        "spec": "direction",
        "job": "jobs.extract",
        "code": "c" * 64,
        "params": "{}",
        "model": "{}",
        "data": "{}",
        "requires": "[]",
    }
    kept = write_artifact(folder, {"a": np.zeros(2)})
    artifact = {
        "spec": "direction",
        "job": "jobs.extract",
        "hash": kept.sha256,
        "path": kept.path,
        "bytes": kept.bytes,
    }
    specs = [
        {
            **need,
            "spec": f"spec{number}",
            "job": "jobs.steer",
            "requires": '["direction"]',
            "data": '{"jobs.steer:pairs": "abc"}',
        }
        for number in range(15)
    ]
    Store(folder).commit([], specs=[need, *specs], artifacts=[artifact])
    text = " ".join(page_of(folder).text.split())
    assert (
        f"jobs.extract direction, artifact {kept.sha256[:12]}. Data: jobs.steer:pairs abc. Code: cccccccccccc"
        in text
    )


def test_curves_of_training_end_where_their_trial_does(tmp_path: Path) -> None:
    trials = [Trial({"x": x}, {"select": {"effect": float(x), "damage": float(x)}}) for x in range(3)]
    folder = make_sweep(tmp_path / "sweep", trials, parameters={"x": "BIGINT"})
    history = np.array([[1.0, 3.0], [2.0, np.nan], [4.0, np.nan], [np.nan, np.nan]], np.float32)
    rows = []
    for number, tensors in enumerate(
        ({"history": history}, {"history": history[:2, 0] * 9}, {"history": np.zeros((0, 3), np.float32)})
    ):
        kept = write_artifact(folder, tensors)
        rows.append(
            {"spec": f"spec{number}", "job": "j", "hash": kept.sha256, "path": kept.path, "bytes": kept.bytes}
        )
    Store(folder).commit([], artifacts=rows)
    sweep = open_sweep(folder)
    alt, paint = read_training(sweep, read_findings(sweep))["training"]
    # The second vector stands still at 3 when it has ended; nobody took the last step.
    assert "trial 0: 2 to 3.5" in alt
    assert "trial 1: 9 to 18" in alt
    assert "trial 2" not in alt
    lines = paint(writing.LIGHT).axes[0].get_lines()
    assert {tuple(line.get_ydata()) for line in lines} == {(2.0, 2.5, 3.5), (9.0, 18.0)}
    assert training_figure([Curve(0, np.ones(2))], "loss", writing.DARK).axes[0].get_ylabel() == "loss"
    assert "What each step found" in Page(writing.write_report(folder)).text

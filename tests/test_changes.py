"""A sweep that goes on with another space: what has ended counts, what has not is meant anew."""

import json
from pathlib import Path
from typing import Any

import pytest

from jobs.errors import SpecError
from orchestrator.changes import accept_changes
from orchestrator.config import RunConfig
from orchestrator.folder import check_free, claimed
from orchestrator.planning import Planner, check_unchanged
from orchestrator.reopening import load_kept, open_sampler, withdraw_failed
from orchestrator.space_file import SpaceFile, load_space
from orchestrator.sweep import Sweep
from storage.donors import Donors
from storage.ledger import read_asked, read_comparable
from storage.lock import driving
from storage.query import read_identity
from tests import fake_job
from tests.fakes import InlinePool, SilentProgress, Stopped
from tests.sweeps import study_of, trials_of

SOURCE = """
from search_spaces.base import Grid, Objective, Space

SPACE = Space(
    description="numbers",
    job="tests.fake_job",
    parameters={"x": Grid([1, 2, 3, 4, 5, 6, 7, 8])},
    fixed={"y": 1.0},
    objectives=[Objective(metric="total", direction="maximize")],
    sampler="grid",
)
"""
CONFIG = RunConfig(model="no-model", workers=1, max_pack=1)


@pytest.fixture(autouse=True)
def _no_git(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("orchestrator.folder.provenance", dict)


def space_file(place: Path, old: str = "", new: str = "") -> SpaceFile:
    assert old in SOURCE
    path = place / "numbers.py"
    path.write_text(SOURCE.replace(old, new) if old else SOURCE)
    return load_space(path)


def drive(folder: Path, file: SpaceFile, config: RunConfig = CONFIG, **pool_options: Any) -> None:
    with claimed(folder, file, config):
        check_unchanged(Planner(file.space, config), read_comparable(folder))
        Sweep(
            folder,
            space=file.space,
            config=config,
            trials=8,
            sampler=open_sampler(folder, file.space, config),
            pool=InlinePool(folder, workers=1, **pool_options),
            donors=Donors(()),
            progress=SilentProgress(),
            on_result=lambda: None,
            is_asked_to_stop=lambda: False,
        ).run()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A sweep that was stopped when some of its trials had ended."""
    with pytest.raises(Stopped):
        drive(tmp_path / "sweep", space_file(tmp_path), stop_at=12)
    fake_job.RAN.clear()
    return tmp_path / "sweep"


def test_what_has_ended_counts_and_what_has_not_is_meant_anew(folder: Path, tmp_path: Path) -> None:
    ended = trials_of(folder)
    assert 0 < len(ended) < len(read_asked(folder)) <= 8
    changed = space_file(tmp_path, '"y": 1.0', '"y": 2.0')
    with pytest.raises(SpecError, match=r"fixed=.*1\.0.*2\.0.*--accept-changes"):
        check_free(folder, changed, CONFIG)
    accept_changes(folder, changed, CONFIG)
    drive(folder, changed)
    rows = trials_of(folder)
    assert rows[: len(ended)] == ended
    assert [row["x"] for row in rows] == [1, 2, 3, 4, 5, 6, 7, 8]
    expected = [row["x"] + (1.0 if row in ended else 2.0) for row in rows]
    assert [trial.values for trial in study_of(folder)] == [[value] for value in expected]
    assert {params.y for params in fake_job.RAN} == {2.0}
    identity = read_identity(folder)
    assert identity["fixed"] == {"y": 2.0}
    assert len(identity["changes"]) == 1
    assert load_kept(folder)[0].space == changed.space


def test_objectives_may_change_and_the_study_is_of_the_new_ones(folder: Path, tmp_path: Path) -> None:
    both = 'Objective(metric="total", direction="maximize"), Objective(metric="square", direction="minimize")'
    changed = space_file(tmp_path, 'Objective(metric="total", direction="maximize")', both)
    accept_changes(folder, changed, CONFIG)
    drive(folder, changed)
    assert [trial.values for trial in study_of(folder)] == [[x + 1, x * x] for x in range(1, 9)]


def test_code_that_changed_is_accepted_once(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("jobs.resolve.code_version", lambda job: "other")
    file = space_file(tmp_path)
    with pytest.raises(SpecError, match="--accept-changes"):
        drive(folder, file)
    accept_changes(folder, file, CONFIG)
    drive(folder, file)
    assert read_identity(folder)["changes"] == ["code or data"]
    monkeypatch.setattr("jobs.resolve.code_version", lambda job: "yet another")
    with pytest.raises(SpecError, match="--accept-changes"):
        drive(folder, file)


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("5, 6, 7, 8", "5, 6, 7, 9", "parameter x changed"),
        ('"x": Grid([1, 2, 3, 4, 5, 6, 7, 8])', '"layer": Grid([1])', "parameter layer, parameter x changed"),
        ('"tests.fake_job"', '"tests.fake_source"', "the job"),
        ('sampler="grid"', 'sampler="random", trials=8', "the sampler changed"),
    ],
)
def test_another_study_is_refused_and_nothing_is_touched(
    folder: Path, tmp_path: Path, old: str, new: str, said: str
) -> None:
    def content() -> dict[str, bytes]:
        return {
            str(path): path.read_bytes()
            for path in folder.rglob("*")
            if path.is_file() and path.name != "lock"
        }

    before = content()
    with pytest.raises(SpecError, match=said):
        accept_changes(folder, space_file(tmp_path, old, new), CONFIG)
    assert content() == before


def test_a_sweep_that_is_driven_is_left_alone(folder: Path, tmp_path: Path) -> None:
    with driving(folder), pytest.raises(SpecError, match="is being run by"):
        accept_changes(folder, space_file(tmp_path), CONFIG)


def test_without_a_sweep_there_is_nothing_to_accept(tmp_path: Path) -> None:
    accept_changes(tmp_path / "new", space_file(tmp_path), CONFIG)
    assert not (tmp_path / "new").exists()


def test_the_ledger_reads_as_the_changes_left_it(folder: Path, tmp_path: Path) -> None:
    before = {asked.trial: asked for asked in read_asked(folder)}
    ended = {row["trial"] for row in trials_of(folder)}
    accept_changes(folder, space_file(tmp_path, '"y": 1.0', '"y": 3.0'), CONFIG)
    after = {asked.trial: asked for asked in read_asked(folder)}
    assert list(after) == list(before)
    for trial, asked in after.items():
        assert asked.params == before[trial].params
        assert (asked.spec == before[trial].spec) == (trial in ended)
    assert {asked.trial for asked in read_comparable(folder)} == before.keys() - ended
    last = json.loads((folder / "ledger.jsonl").read_text().splitlines()[-1])
    assert (last["event"], len(last["trials"])) == ("changes accepted", len(before) - len(ended))


def test_a_trial_that_failed_before_runs_again_as_it_is_meant_now(tmp_path: Path) -> None:
    failing = space_file(tmp_path, '"y": 1.0', '"y": 1.0, "mode": "fail"')
    with pytest.raises(Stopped):
        drive(tmp_path / "sweep", failing, stop_at=12)
    failed = len(trials_of(tmp_path / "sweep"))
    assert failed > 0
    mended = space_file(tmp_path)
    accept_changes(tmp_path / "sweep", mended, CONFIG)
    withdraw_failed(tmp_path / "sweep", mended.space, CONFIG, None)
    drive(tmp_path / "sweep", mended)
    rows = trials_of(tmp_path / "sweep")
    assert {row["state"] for row in rows} == {"completed"}
    assert [row["spec"] for row in rows] == [
        Planner(mended.space, CONFIG).spec({"x": row["x"]}).id for row in rows
    ]


def test_fewer_trials_than_were_asked_for_are_refused(folder: Path, tmp_path: Path) -> None:
    config = RunConfig(**CONFIG.model_dump() | {"trials": 2})
    with pytest.raises(SpecError, match="were asked for already"):
        accept_changes(folder, space_file(tmp_path), config)


def test_without_a_change_nothing_is_accepted(folder: Path, tmp_path: Path) -> None:
    before = (folder / "ledger.jsonl").read_bytes()
    accept_changes(folder, space_file(tmp_path), CONFIG)
    assert (folder / "ledger.jsonl").read_bytes() == before

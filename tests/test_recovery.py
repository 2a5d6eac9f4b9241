"""What a stopped sweep has kept: compared, mended, tried again, extended. Real study and MLflow; no model."""

import shutil
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.trial import TrialState

from jobs.errors import SpecError
from jobs.spec import Outcome
from orchestrator.config import RunConfig
from orchestrator.doctor import examine
from orchestrator.folder import claimed, extend
from orchestrator.reopening import journal_path, load_kept, open_sampler, withdraw_failed
from orchestrator.space_file import load_space
from orchestrator.sweep import Sweep
from orchestrator.worker import attempt_line
from orchestrator.worker_logs import attempts_of, worker_log
from storage.donors import Donors
from storage.ledger import ledger_path
from storage.lock import driving
from storage.manifest import StoredResult
from storage.mlflow_log import Mirror, tracking_uri
from storage.query import open_sweep
from storage.store import Part, Store
from tests import fake_job, fake_source
from tests.fakes import InlinePool, SilentProgress, Stopped

SPACE = """
from search_spaces.base import Grid, Objective, Space

SPACE = Space(
    description="numbers",
    job="tests.fake_job",
    parameters={"x": Grid([1, 2, 3, 4]), "mode": Grid(["ok", "fail"])},
    fixed={"source": 7},
    objectives=[Objective(metric="total", direction="maximize")],
    sampler="grid",
)
"""
TRIALS = 8


def drive(
    folder: Path, *, trials: int | None = None, is_mirrored: bool = True, **pool_options: Any
) -> Counter[str]:
    """Run or go on with the sweep of a folder; gives how its trials stand."""
    if (folder / "sweep.json").exists():
        file, config = load_kept(folder)
    else:
        folder.mkdir(parents=True, exist_ok=True)
        path = folder.with_suffix(".py")
        path.write_text(SPACE)
        file, config = load_space(path), RunConfig(model="no-model", workers=2, max_pack=2, trials=trials)
    mirror = Mirror(folder)
    with claimed(folder, file, config):
        try:
            Sweep(
                folder,
                space=file.space,
                config=config,
                trials=config.trials or TRIALS,
                sampler=open_sampler(folder, file.space, config),
                pool=InlinePool(folder, **pool_options),
                donors=Donors(()),
                progress=SilentProgress(),
                on_result=lambda: None,
                is_asked_to_stop=lambda: False,
            ).run()
        finally:
            if is_mirrored:
                mirror.sync()
                mirror.finish()
    return Counter({state: n for state, n in open_sweep(folder).counts().items() if n})


def withdraw(folder: Path, trials: Sequence[int] | None) -> None:
    file, config = load_kept(folder)
    withdraw_failed(folder, file.space, config, trials)


@pytest.fixture(scope="module")
def ended(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sweep that has ended: four trials completed, four failed."""
    folder = tmp_path_factory.mktemp("recovery") / "ended"
    assert drive(folder) == {"completed": 4, "failed": 4}
    return folder


@pytest.fixture
def folder(ended: Path, tmp_path: Path) -> Path:
    """A copy to do things to."""
    return Path(shutil.copytree(ended, tmp_path / "sweep"))


@pytest.fixture(autouse=True)
def _nothing_ran() -> None:
    fake_job.RAN.clear()
    fake_source.RAN.clear()


def study(folder: Path) -> list[optuna.trial.FrozenTrial]:
    backend = optuna.storages.journal.JournalFileBackend(str(journal_path(folder)))
    name = open_sweep(folder).identity["sweep"]
    return optuna.load_study(study_name=name, storage=optuna.storages.JournalStorage(backend)).trials


def runs(folder: Path) -> dict[int, Any]:
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=tracking_uri(folder))
    found = client.search_runs([each.experiment_id for each in client.search_experiments()])
    return {
        int(run.data.tags["steersweep.trial"]): run for run in found if "steersweep.trial" in run.data.tags
    }


def cut(path: Path, share: float) -> None:
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[: int(len(lines) * share)]))


def tear(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b'{"half": ')


def flip_a_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(bytes(content))


def reopen_run(folder: Path) -> None:
    from mlflow import MlflowClient

    MlflowClient(tracking_uri=tracking_uri(folder)).update_run(runs(folder)[3].info.run_id, status="RUNNING")


def delete_run(folder: Path) -> None:
    from mlflow import MlflowClient

    MlflowClient(tracking_uri=tracking_uri(folder)).delete_run(runs(folder)[5].info.run_id)


DAMAGE: dict[str, tuple[str, Callable[[Path], object]]] = {
    "torn ledger": ("logs", lambda folder: tear(ledger_path(folder))),
    "torn study": ("logs", lambda folder: tear(journal_path(folder))),
    "study cut short": ("study", lambda folder: cut(journal_path(folder), 0.6)),
    "study nearly whole": ("study", lambda folder: cut(journal_path(folder), 0.98)),
    "study that Optuna cannot read": (
        "study",
        lambda folder: journal_path(folder).write_bytes(
            journal_path(folder).read_bytes().replace(b'"trial_id"', b'"trial_iX"', 1)
        ),
    ),
    "no study": ("study", lambda folder: journal_path(folder).unlink()),
    "artifact": ("artifacts", lambda folder: flip_a_byte(next(folder.glob("artifacts/*.safetensors")))),
    "run left open": ("mlflow", reopen_run),
    "run deleted": ("mlflow", delete_run),
    "no MLflow": ("mlflow", lambda folder: (folder / "mlflow.db").unlink()),
}


class TestDoctor:
    def test_a_sweep_that_has_ended_is_consistent(self, ended: Path) -> None:
        assert examine(ended, repair=False) == {"consistent": True, "findings": []}

    @pytest.mark.parametrize("stop_at", [3, 7])
    def test_a_sweep_that_was_stopped_is_mended_and_goes_on(self, tmp_path: Path, stop_at: int) -> None:
        folder = tmp_path / "stopped"
        with pytest.raises(Stopped):
            drive(folder, stop_at=stop_at)
        assert examine(folder, repair=True)["consistent"]
        assert examine(folder, repair=False)["consistent"]
        assert drive(folder) == {"completed": 4, "failed": 4}
        assert examine(folder, repair=False) == {"consistent": True, "findings": []}

    @pytest.mark.parametrize("name", DAMAGE)
    def test_damage_is_found_where_it_is_and_mended(self, folder: Path, name: str) -> None:
        where, do_damage = DAMAGE[name]
        do_damage(folder)
        before = {path: path.stat().st_mtime_ns for path in folder.rglob("*.*") if "mlflow" not in path.name}
        found = examine(folder, repair=False)
        assert not found["consistent"]
        assert [finding["where"] for finding in found["findings"]] == [where]
        after = {path: path.stat().st_mtime_ns for path in folder.rglob("*.*") if "mlflow" not in path.name}
        assert after == before, "it was only to look"
        mended = examine(folder, repair=True)
        assert mended["consistent"]
        assert [finding["is_mended"] for finding in mended["findings"]] == [True]
        assert examine(folder, repair=False)["consistent"]
        assert drive(folder) == {"completed": 4, "failed": 4}
        assert [trial.state.name for trial in study(folder)] == ["COMPLETE", "FAIL"] * 4

    def test_files_of_writers_that_died_are_leftovers(self, folder: Path) -> None:
        orphan = next(folder.glob("tables/metrics/*.parquet")).with_name("orphan.parquet")
        orphan.write_bytes(b"nobody lists this")
        half = folder / "tables" / "metrics" / ".x.parquet.0123abcd"
        half.write_bytes(b"half")
        found = examine(folder, repair=False)
        assert found["consistent"]
        assert [(each["where"], each["count"]) for each in found["findings"]] == [("leftovers", 2)]
        examine(folder, repair=True)
        assert not orphan.exists()
        assert not half.exists()
        assert open_sweep(folder).counts()["completed"] == 4

    def test_results_that_only_the_study_knows_of_are_left_to_be_computed_again(self, folder: Path) -> None:
        shutil.rmtree(folder / "manifest")
        tables = len(list(folder.rglob("*.parquet")))
        found = examine(folder, repair=True)
        assert not found["consistent"]
        assert [(each["where"], each["count"]) for each in found["findings"][:2]] == [
            ("trials", TRIALS), ("study", TRIALS)
        ]  # fmt: skip
        assert len(list((folder / "set_aside").rglob("*.parquet"))) == tables, "nothing is deleted"
        assert [trial.state.name for trial in study(folder)] == ["COMPLETE", "FAIL"] * 4
        assert drive(folder) == {"completed": 4, "failed": 4}
        assert examine(folder, repair=True)["consistent"]

    def test_a_ledger_that_is_gone_takes_nothing_else_along(self, folder: Path) -> None:
        ledger_path(folder).unlink()
        before = study(folder)
        assert not examine(folder, repair=True)["consistent"]
        assert study(folder) == before

    def test_a_table_with_another_content_is_found(self, folder: Path) -> None:
        flip_a_byte(next(folder.glob("tables/attempts/*.parquet")))
        found = examine(folder, repair=True)
        assert not found["consistent"]
        assert (found["findings"][0]["where"], found["findings"][0]["count"]) == ("tables", 1)

    def test_a_table_that_is_gone_is_found_and_said_with_what_to_do(self, folder: Path) -> None:
        next(folder.glob("tables/metrics/*.parquet")).unlink()
        found = examine(folder, repair=True)
        assert not found["consistent"]
        [one] = found["findings"]
        assert (one["where"], one["count"], one["is_mended"]) == ("tables", 1, False)
        assert "run the sweep into another folder" in one["what"]

    def test_two_results_of_one_trial_cannot_be_mended(self, folder: Path) -> None:
        [row] = [row for row in Store(folder).rows("trials") if row["trial"] == 2]
        Store(folder).commit(
            [Part((), (StoredResult("other", "completed", None),))], trials=[{**row, "spec": "other"}]
        )
        found = examine(folder, repair=True)
        assert not found["consistent"]
        assert {each["where"] for each in found["findings"]} >= {"trials"}

    def test_a_sweep_that_is_driven_is_left_alone(self, folder: Path) -> None:
        with driving(folder), pytest.raises(SpecError, match="is being run by"):
            examine(folder, repair=True)


class TestRetry:
    def test_what_has_failed_runs_again_and_everyone_hears_of_it(
        self, folder: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        withdraw(folder, None)
        assert open_sweep(folder).counts() == {
            **dict.fromkeys(("running", "infeasible", "failed"), 0),
            "waiting": 4,
            "completed": 4,
        }
        monkeypatch.setattr(
            fake_job, "_outcomes", lambda params: [Outcome(metrics=fake_job.expected(params))]
        )
        assert drive(folder) == {"completed": TRIALS}
        assert [params.mode for params in fake_job.RAN] == ["fail"] * 4
        assert {trial.state for trial in study(folder)} == {TrialState.COMPLETE}
        assert [trial.number for trial in study(folder)] == list(range(TRIALS))
        assert {run.info.status for run in runs(folder).values()} == {"FINISHED"}
        assert {run.data.tags["state"] for run in runs(folder).values()} == {"completed"}
        assert not any("reason" in run.data.tags for run in runs(folder).values())
        tries = open_sweep(folder).rows("SELECT state, count(*) AS times FROM attempts GROUP BY state")
        assert {row["state"]: row["times"] for row in tries} == {"ok": 9, "failed": 4}
        assert examine(folder, repair=False) == {"consistent": True, "findings": []}

    def test_what_fails_again_has_failed(self, folder: Path) -> None:
        withdraw(folder, None)
        assert drive(folder) == {"completed": 4, "failed": 4}
        assert len(open_sweep(folder).rows("SELECT * FROM trials")) == TRIALS
        assert examine(folder, repair=False)["consistent"]

    def test_one_trial_runs_again_and_the_others_do_not(self, folder: Path) -> None:
        withdraw(folder, [3])
        assert open_sweep(folder).counts()["waiting"] == 1
        assert drive(folder) == {"completed": 4, "failed": 4}
        assert len(fake_job.RAN) == 1

    def test_a_prerequisite_that_failed_runs_again_too(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        with monkeypatch.context() as broken:
            broken.setattr(fake_source, "run", lambda *_: (_ for _ in ()).throw(RuntimeError("broken")))
            assert drive(tmp_path / "sweep", is_mirrored=False) == {"failed": TRIALS}
        withdraw(tmp_path / "sweep", None)
        assert drive(tmp_path / "sweep", is_mirrored=False) == {"completed": 4, "failed": 4}

    @pytest.mark.parametrize("stop_at", range(2, 8, 2))
    def test_a_driver_that_is_stopped_while_it_tries_again_goes_on(self, folder: Path, stop_at: int) -> None:
        withdraw(folder, None)
        try:
            drive(folder, stop_at=stop_at)
        except Stopped:
            assert drive(folder) == {"completed": 4, "failed": 4}
        assert examine(folder, repair=False)["consistent"]

    def test_a_trial_that_has_not_failed_is_refused(self, folder: Path) -> None:
        with pytest.raises(SpecError, match=r"trials \[2, 99\] have not failed"):
            withdraw(folder, [2, 3, 99])
        assert open_sweep(folder).counts()["failed"] == 4


class TestExtension:
    @pytest.mark.parametrize("more", ["+3", "8"])
    def test_a_sweep_has_more_trials_if_it_is_told_to(self, tmp_path: Path, more: str) -> None:
        folder = tmp_path / "sweep"
        assert drive(folder, trials=5, is_mirrored=False) == {"completed": 3, "failed": 2}
        file, config = load_kept(folder)
        assert extend(folder, file.space, config, more).trials == 8
        assert drive(folder, is_mirrored=False) == {"completed": 4, "failed": 4}
        assert open_sweep(folder).identity["trials"] == 8
        assert len(study(folder)) == 8

    @pytest.mark.parametrize(
        ("given", "message"),
        [
            ("4", "5 trials were asked for already"),
            ("+4", "the grid has 8 cells"),
            ("many", "give a number such as 100"),
            ("-3", "give a number such as 100"),
        ],
    )
    def test_a_number_that_makes_no_sense_is_refused(self, tmp_path: Path, given: str, message: str) -> None:
        folder = tmp_path / "sweep"
        drive(folder, trials=5, is_mirrored=False)
        file, config = load_kept(folder)
        before = (folder / "sweep.json").read_bytes()
        with pytest.raises(SpecError, match=message):
            extend(folder, file.space, config, given)
        assert (folder / "sweep.json").read_bytes() == before


class TestLogs:
    def test_every_try_at_a_trial_is_there_with_its_reason(self, folder: Path) -> None:
        [attempt] = attempts_of(folder, "1", lines=5)
        assert (attempt["state"], attempt["reason"], attempt["lines"]) == ("failed", "told to fail", [])
        withdraw(folder, [1])
        drive(folder)
        assert len(attempts_of(folder, "1", lines=5)) == 2

    def test_the_last_lines_of_the_attempt_are_there_and_no_others(self, folder: Path) -> None:
        [attempt] = attempts_of(folder, "1", lines=0)
        path = worker_log(folder, attempt["worker"])
        path.parent.mkdir()
        said = ["before", attempt_line("other"), "x", attempt_line(attempt["attempt"]), "a", "b", "c"]
        path.write_text("\n".join([*said, attempt_line("later"), "z"]) + "\n")
        assert attempts_of(folder, "1", lines=2)[0]["lines"] == ["b", "c"]
        assert attempts_of(folder, "1", lines=9)[0]["lines"] == ["a", "b", "c"]

    def test_a_prerequisite_is_found_by_its_spec(self, folder: Path) -> None:
        [row] = open_sweep(folder).rows("SELECT DISTINCT spec FROM attempts WHERE job = 'tests.fake_source'")
        [attempt] = attempts_of(folder, row["spec"][:8], lines=0)
        assert (attempt["job"], attempt["trial"]) == ("tests.fake_source", None)

    @pytest.mark.parametrize("what", ["99", "zzzz", "'; DROP TABLE trials"])
    def test_what_is_not_there_is_refused(self, folder: Path, what: str) -> None:
        with pytest.raises(SpecError, match=r"nothing was tried yet under|neither the number of a trial"):
            attempts_of(folder, what, lines=0)

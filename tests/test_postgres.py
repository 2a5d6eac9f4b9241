"""Study and MLflow in PostgreSQL, on a real server."""

import json
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import Any

import optuna
import psycopg
import pytest
from mlflow import MlflowClient
from optuna.storages._cached_storage import _CachedStorage
from optuna.trial import TrialState

from jobs.errors import SpecError
from jobs.spec import Status
from orchestrator.config import make_config
from orchestrator.sampler import OptunaSampler
from orchestrator.study import Ended
from search_spaces.base import Float, Int, Space
from storage.durable import StoreError
from storage.query import open_sweep
from tests.command import refused, results, run_arguments, steersweep
from tests.fakes import Stopped
from tests.mirrored import free_port
from tests.postgres import postgresql
from tests.sweeps import SCENARIOS, check_ended, drive, make_space, outcome_of

NAME = "random with duplicates"


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    with postgresql() as address:
        yield address


@pytest.fixture
def database(server: str, tmp_path: Path) -> str:
    """URL of a database of its own."""
    name = f"db_{abs(hash(tmp_path)):x}"
    execute(server, f"CREATE DATABASE {name}")
    return f"{server}/{name}"


def execute(server: str, statement: str) -> None:
    connection = psycopg.connect(f"{server}/postgres")
    connection.autocommit = True
    with connection.cursor() as cursor:
        cursor.execute(statement)
    connection.close()


def open_sampler(folder: Path, space: Space, database: str, **changes: Any) -> OptunaSampler:
    options: dict[str, Any] = {"name": space.sampler, "seed": 0, "study": "study"}
    return OptunaSampler(space, journal=folder / "optuna.journal", storage=database, **options | changes)


@pytest.fixture(autouse=True)
def _no_git(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("orchestrator.folder.provenance", dict)


def in_database(monkeypatch: pytest.MonkeyPatch, database: str) -> None:
    """Have `tests.sweeps` keep and read the study in a database."""
    monkeypatch.setattr(
        "tests.sweeps.open_sampler",
        lambda folder, space, name=None: open_sampler(folder, space, database, name=name or space.sampler),
    )
    monkeypatch.setattr(
        "tests.sweeps.study_of",
        lambda folder: optuna.load_study(study_name="study", storage=database).trials,
    )


def test_a_sweep_with_its_study_there_is_the_same_sweep_also_after_stops(
    tmp_path: Path, database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    space, trials = SCENARIOS[NAME].space, SCENARIOS[NAME].trials
    drive(tmp_path / "file", space, trials=trials)
    in_database(monkeypatch, database)
    for stop_at in (3, 5, 7, None):
        try:
            drive(tmp_path / "database", space, trials=trials, stop_at=stop_at)
        except Stopped:
            assert stop_at
    check_ended(tmp_path / "database", space, trials=trials)
    assert outcome_of(tmp_path / "database") == outcome_of(tmp_path / "file")
    assert not (tmp_path / "database" / "optuna.journal").exists()


def test_a_study_that_was_cut_short_while_it_was_written_anew_is_written_again(
    tmp_path: Path, database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def told() -> list[Any]:
        trials = optuna.load_study(study_name="study", storage=database).trials
        return [(trial.params, trial.values, trial.state) for trial in trials]

    space, trials = SCENARIOS[NAME].space, SCENARIOS[NAME].trials
    in_database(monkeypatch, database)
    drive(tmp_path, space, trials=trials)
    before = told()
    open_sampler(tmp_path, space, database).forget()
    real = optuna.Study.add_trial
    calls = iter(range(100))

    def cut_short(self: optuna.Study, trial: Any) -> None:
        if next(calls) == 4:
            raise Stopped
        real(self, trial)

    monkeypatch.setattr(optuna.Study, "add_trial", cut_short)
    with pytest.raises(Stopped):
        drive(tmp_path, space, trials=trials)
    monkeypatch.setattr(optuna.Study, "add_trial", real)
    assert len(told()) == 4
    drive(tmp_path, space, trials=trials)
    assert told() == before


@pytest.mark.parametrize("last", ["a trial", "the parents"])
def test_nsga2_proposes_the_same_after_its_study_was_written_anew_twice(
    tmp_path: Path, database: str, monkeypatch: pytest.MonkeyPatch, last: str
) -> None:
    space = make_space({"x": Int(low=0, high=99), "y": Float(low=0, high=1)}, sampler="nsga2", trials=130)
    ended: dict[int, Ended] = {}

    def proposed(sampler: OptunaSampler, trials: int) -> list[dict[str, Any]]:
        found = []
        for _ in range(trials):
            trial, params, *_ = sampler.ask()
            found.append(params)
            ended[trial] = Ended(Status.COMPLETED, [params["x"] * params["y"], params["x"] - params["y"]])
            sampler.tell(trial, *ended[trial])
        return found

    study = {"name": "nsga2", "seed": 0, "study": "study"}
    whole = proposed(OptunaSampler(space, journal=tmp_path / "journal", **study), 120)
    ended.clear()
    parts = proposed(open_sampler(tmp_path, space, database), 110)
    sampler = open_sampler(tmp_path, space, database)
    with monkeypatch.context() as patch:
        cut_short(patch, last)
        with pytest.raises(Stopped):
            sampler.restate(dict(enumerate(parts)), ended)
    again = open_sampler(tmp_path, space, database)
    assert again.was_cut_short
    again.restate(dict(enumerate(parts)), ended)
    assert not again.was_cut_short
    assert parts + proposed(again, 10) == whole


def cut_short(patch: pytest.MonkeyPatch, last: str) -> None:
    """Stop whoever writes a study anew, at its 60th trial or when it comes to the parents of NSGA-II."""
    add, note, calls = optuna.Study.add_trial, _CachedStorage.set_study_system_attr, count()

    def add_trial(self: optuna.Study, trial: Any) -> None:
        if last == "a trial" and next(calls) == 60:
            raise Stopped
        add(self, trial)

    def set_study_system_attr(self: _CachedStorage, study: int, key: str, value: Any) -> None:
        if last == "the parents" and "parent" in key:
            raise Stopped
        note(self, study, key, value)

    patch.setattr(optuna.Study, "add_trial", add_trial)
    patch.setattr(_CachedStorage, "set_study_system_attr", set_study_system_attr)


def test_a_server_that_goes_away_is_one_line(tmp_path: Path) -> None:
    with postgresql() as address:
        sampler = open_sampler(tmp_path, SCENARIOS[NAME].space, f"{address}/postgres")
        sampler.ask()
    with pytest.raises(StoreError, match="the study cannot be kept"):
        sampler.ask()


def test_two_sweeps_share_a_database(tmp_path: Path, database: str) -> None:
    space = SCENARIOS[NAME].space
    first = open_sampler(tmp_path, space, database, study="first")
    second = open_sampler(tmp_path, space, database, study="second", seed=1)
    assert [first.ask().trial, second.ask().trial, first.ask().trial] == [0, 0, 1]
    assert len(optuna.get_all_study_summaries(database)) == 2


def test_an_address_without_a_server_or_without_rights_is_said_in_a_line(
    tmp_path: Path, server: str, database: str
) -> None:
    space = SCENARIOS[NAME].space
    with pytest.raises(SpecError, match=r"cannot be used: .*refused.*give postgresql://"):
        open_sampler(tmp_path, space, f"postgresql://me@127.0.0.1:{free_port()}/none")
    execute(server, "CREATE ROLE guest LOGIN")
    with pytest.raises(SpecError, match=r"cannot be used: .*permission denied"):
        open_sampler(tmp_path, space, database.replace("tester", "guest"))
    for wrong, said in {
        "mysql://me@host/x": "postgresql://me@host:5432/studies",
        "postgresql://me:secret@host/x": "PGPASSWORD",
        "postgresql://host/x?password=secret": "PGPASSWORD",
    }.items():
        with pytest.raises(SpecError, match=said) as error:
            make_config(storage=wrong)
        assert "secret" not in str(error.value)
    with pytest.raises(SpecError, match=r"storage and mlflow: .* a database each"):
        make_config(storage=database, mlflow=database)


@pytest.mark.ray
def test_the_command_keeps_study_and_mlflow_on_one_server(
    place: Path, finished: dict[str, Any], server: str, database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PGPASSWORD", "open sesame")
    execute(server, "CREATE DATABASE runs")
    runs_in = f"{server}/runs"
    address = ["--storage", database, "--set", f"mlflow={runs_in}"]
    done = steersweep(*run_arguments(place, "shared"), *address)
    assert done.returncode == 0, done.stderr
    folder = place / "shared"
    assert results(folder) == results(place / "finished")
    study = optuna.load_study(study_name=open_sweep(folder).identity["sweep"], storage=database)
    assert [trial.state for trial in study.trials] == [TrialState.COMPLETE] * 9
    client = MlflowClient(tracking_uri=runs_in)
    [experiment] = [each for each in client.search_experiments() if each.name == "space"]
    runs = client.search_runs([experiment.experiment_id])
    assert len(runs) == 10
    assert {run.info.status for run in runs} == {"FINISHED"}
    assert not (folder / "mlflow.db").exists()
    doctor = steersweep("doctor", folder, "--json")
    assert json.loads(doctor.stdout)["consistent"], doctor.stdout
    assert b"sesame" not in b"".join(path.read_bytes() for path in folder.rglob("*") if path.is_file())
    assert "cannot be used" in refused(
        *run_arguments(place, "unstored"), "--storage", f"postgresql://me@127.0.0.1:{free_port()}/x"
    )
    assert not (place / "unstored").exists()

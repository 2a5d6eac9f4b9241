"""The mirror in its thread: when it says what of a sweep, and what happens when MLflow fails."""

import logging
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient

from storage.background_mirror import BackgroundMirror
from storage.mlflow_log import Mirror, tracking_uri
from tests.mirrored import SECRET, SECRET_URI, commit, make_database, make_sweep, runs_of


@pytest.fixture(scope="module")
def empty_database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_database(tmp_path_factory.mktemp("mlflow"))


@pytest.fixture
def folder(tmp_path: Path, empty_database: Path) -> Path:
    sweep = make_sweep(tmp_path / "sweep")
    shutil.copy(empty_database, sweep / "mlflow.db")
    return sweep


def status_of(folder: Path) -> str | None:
    """Status of the sweep's run; None while MLflow knows no such run."""
    client = MlflowClient(tracking_uri=tracking_uri(folder))
    if client.get_experiment_by_name("tone_grid") is None:
        return None
    runs = client.search_runs(["1"], "tags.`mlflow.source.name` = 'steersweep'")
    return str(runs[0].info.status) if runs else None


def wait_for(holds: Callable[[], bool], patience_seconds: float = 60) -> None:
    deadline = time.monotonic() + patience_seconds
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_the_background_mirror_follows_the_sweep_and_ends_it(folder: Path) -> None:
    mirror = BackgroundMirror(folder)
    commit(folder, 0, effect=1.0)
    for _ in range(100):
        mirror.notify()
    commit(folder, 1, effect=1.0)
    report = folder / "report.html"
    report.write_text("<p></p>")
    assert mirror.close([report], timeout_seconds=30, is_complete=True)
    parent, children = runs_of(folder)
    assert set(children) == {0, 1}
    assert parent.info.status == "FINISHED"
    assert list((folder / "mlartifacts").rglob("report.html"))


def test_the_sweeps_run_says_whether_the_sweep_runs_was_stopped_or_has_ended(folder: Path) -> None:
    mirror = BackgroundMirror(folder)
    wait_for(lambda: status_of(folder) == "RUNNING")
    commit(folder, 0, effect=1.0)
    assert mirror.close([], timeout_seconds=30, is_complete=False)
    assert status_of(folder) == "KILLED"
    mirror = BackgroundMirror(folder)
    wait_for(lambda: status_of(folder) == "RUNNING")
    commit(folder, 1, effect=1.0)
    assert mirror.close([], timeout_seconds=30, is_complete=True)
    parent, children = runs_of(folder)
    assert parent.info.status == "FINISHED"
    assert {trial: run.info.status for trial, run in children.items()} == {0: "FINISHED", 1: "FINISHED"}


@pytest.mark.slow
def test_what_a_killed_driver_left_is_mended_by_the_next(folder: Path) -> None:
    for trial in range(60):
        commit(folder, trial, effect=1.0)
    code = (
        "import pathlib, sys, time; from storage.background_mirror import BackgroundMirror; "
        "mirror = BackgroundMirror(pathlib.Path(sys.argv[1])); time.sleep(600)"
    )
    with subprocess.Popen([sys.executable, "-c", code, str(folder)]) as driver:
        wait_for(lambda: status_of(folder) == "RUNNING" and len(runs_of(folder)[1]) > 2)
        driver.send_signal(signal.SIGKILL)
    parent, children = runs_of(folder)
    assert parent.info.status == "RUNNING"
    assert len(children) < 60
    assert BackgroundMirror(folder).close([], timeout_seconds=60, is_complete=True)
    parent, children = runs_of(folder)
    assert parent.info.status == "FINISHED"
    assert {run.info.status for run in children.values()} == {"FINISHED"}
    assert set(children) == set(range(60))


def test_an_unreachable_server_is_one_warning_without_the_password(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    commit(folder, 0, effect=1.0)
    started = time.monotonic()
    mirror = BackgroundMirror(folder, SECRET_URI)
    mirror.notify()
    assert not mirror.close([], timeout_seconds=20, is_complete=True)
    assert time.monotonic() - started < 15
    [record] = [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert "the tables have everything" in record.getMessage()
    assert "\n" not in record.getMessage()
    assert "://***@127.0.0.1:1/" in record.getMessage()
    assert SECRET not in caplog.text
    assert "reader" not in caplog.text


@pytest.mark.parametrize(
    "uri",
    ["http://reader:s3/c@ret@[::1", "ftp://reader:s3cret@host", "mysql://reader:s3cret@127.0.0.1:1/x"],
)
def test_an_address_that_mlflow_refuses_is_told_without_its_password(
    folder: Path, caplog: pytest.LogCaptureFixture, uri: str
) -> None:
    mirror = BackgroundMirror(folder, uri)
    assert not mirror.close([], timeout_seconds=5, is_complete=False)
    assert caplog.records
    assert not [part for part in ("reader", "s3", "ret@") if part in caplog.text]


def test_an_act_that_fails_once_is_tried_again_without_a_warning(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    commit(folder, 0, effect=1.0)
    real, failures = MlflowClient.log_batch, [ConnectionError("gone")]

    def failing(*args: object, **more: object) -> None:
        if failures:
            raise failures.pop()
        real(*args, **more)

    monkeypatch.setattr(MlflowClient, "log_batch", failing)
    mirror = BackgroundMirror(folder)
    wait_for(lambda: not failures)
    assert mirror.close([], timeout_seconds=30, is_complete=True)
    assert not caplog.records


@pytest.mark.parametrize(("is_complete", "status"), [(True, "FINISHED"), (False, "KILLED")])
def test_close_returns_when_its_time_is_up_says_so_and_leaves_whole_runs(
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    is_complete: bool,
    status: str,
) -> None:
    for trial in range(4):
        commit(folder, trial, effect=1.0)
    real, held, release = MlflowClient.log_batch, threading.Event(), threading.Event()

    def holding(*args: Any, **more: Any) -> None:
        real(*args, **more)
        if more["params"] and more["metrics"]:  # a trial's
            held.set()
            release.wait()

    monkeypatch.setattr(MlflowClient, "log_batch", holding)
    mirror = BackgroundMirror(folder)
    assert held.wait(60)
    threading.Timer(1.0, release.set).start()
    started = time.monotonic()
    assert not mirror.close([], timeout_seconds=0.5, is_complete=is_complete)
    assert time.monotonic() - started < 10
    assert "not done within 0.5 s" in caplog.text
    wait_for(lambda: "mlflow-mirror" not in {thread.name for thread in threading.enumerate()})
    parent, children = runs_of(folder)
    assert parent.info.status == status
    assert {trial: run.info.status for trial, run in children.items()} == {0: "FINISHED"}
    assert Mirror(folder).sync() == 3


def test_the_machine_is_watched_from_the_first_run_until_the_sweep_ends(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    happened: list[str] = []

    def watch(mirror: Mirror) -> Callable[[], None]:
        happened.append("begun")
        return lambda: happened.append("ended")

    monkeypatch.setattr(Mirror, "watch", watch)
    assert BackgroundMirror(folder, watches_machine=True).close([], timeout_seconds=60, is_complete=True)
    assert happened == ["begun", "ended"]
    assert BackgroundMirror(folder).close([], timeout_seconds=60, is_complete=True)
    assert happened == ["begun", "ended"]

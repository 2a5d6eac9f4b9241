"""The MLflow mirror, against MLflow itself on SQLite."""

import json
import logging
import math
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from pathlib import Path

import pytest
from mlflow import MlflowClient
from mlflow.entities import Run

from jobs.errors import SpecError
from storage.mlflow_log import BackgroundMirror, Mirror, serve_ui, tracking_uri
from storage.parquet import write_table
from storage.store import Part, Store, StoredResult

UNREACHABLE = "http://127.0.0.1:1"
STARTED = 1_700_000_000.0
IDENTITY = {
    "sweep": "5eed0123",
    "space": "tone_grid",
    "description": "Which layer changes the tone?",
    "job": "jobs.steer",
    "parameters": {"layer": "BIGINT", "dose": "DOUBLE", "template": "VARCHAR"},
    "objectives": [
        {"metric": "effect", "direction": "maximize"},
        {"metric": "damage", "direction": "minimize"},
    ],
    "metrics": {"effect": {"unit": "nats", "meaning": "shift of the log-odds"}},
    "model": {"id": "tiny", "revision": None, "dtype": "float32", "trust_remote_code": False},
    "seed": 3,
    "config": {"workers": 2, "sampler": "grid", "trials": 4, "model": "tiny", "dtype": "float32"},
    "provenance": {"git_revision": "abc123", "packages": {"torch": "2.13.0", "ray": "2.60.0"}},
}


@pytest.fixture(scope="module")
def empty_database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An MLflow database with its schema; creating one takes seconds, copying it nothing."""
    folder = tmp_path_factory.mktemp("mlflow")
    MlflowClient(tracking_uri=tracking_uri(folder)).get_experiment_by_name("none")
    return folder / "mlflow.db"


@pytest.fixture
def folder(tmp_path: Path, empty_database: Path) -> Path:
    sweep = tmp_path / "sweep"
    sweep.mkdir()
    (sweep / "sweep.json").write_text(json.dumps(IDENTITY))
    shutil.copy(empty_database, sweep / "mlflow.db")
    return sweep


def commit(folder: Path, trial: int, state: str = "completed", **metrics: float) -> None:
    """Store one trial as the driver does; a metric's name may end in the split, as in `effect__report`."""
    spec = f"spec{trial}"
    reason = None if state == "completed" else "text collapsed"
    rows = []
    for name, value in metrics.items():
        metric, _, split = name.partition("__")
        rows.append({"spec": spec, "split": split or "select", "name": metric, "value": value})
    params = {"layer": 10 + trial, "dose": 0.1 * trial, "template": "a|b"}
    started = STARTED + 10 * trial
    Store(folder).commit(
        [Part(files=(write_table(folder, "metrics", rows),), results=(StoredResult(spec, state, reason),))],
        trials=[
            {
                "trial": trial,
                "spec": spec,
                "state": state,
                "reason": reason,
                "seconds": 4.0,
                "finished": started + 5,
                "params": json.dumps(params),
            }
        ],
        attempts=[
            {
                "attempt": f"{trial}a",
                "trial": trial,
                "spec": spec,
                "state": "lost",
                "worker": "w0",
                "started": started - 9,
            },
            {
                "attempt": f"{trial}b",
                "trial": trial,
                "spec": spec,
                "state": "ok",
                "worker": "w1",
                "started": started,
                "finished": started + 4,
            },
        ],
    )


def runs_of(folder: Path, uri: str | None = None) -> tuple[Run, dict[int, Run]]:
    """The sweep's run and the trials' runs; fails if a trial has two."""
    client = MlflowClient(tracking_uri=uri or tracking_uri(folder))
    experiment = client.get_experiment_by_name("tone_grid")
    assert experiment is not None
    runs = client.search_runs([experiment.experiment_id])
    [parent] = [run for run in runs if "steersweep.trial" not in run.data.tags]
    children = {int(run.data.tags["steersweep.trial"]): run for run in runs if run is not parent}
    assert len(children) == len(runs) - 1
    return parent, children


def content(run: Run) -> tuple[object, ...]:
    tags = {
        name: value for name, value in run.data.tags.items() if name not in ("mlflow.parentRunId", "folder")
    }
    return run.info.status, run.info.start_time, run.info.end_time, run.data.params, run.data.metrics, tags


def test_a_trial_becomes_a_run_with_its_parameters_metrics_tags_and_times(folder: Path) -> None:
    commit(folder, 2, effect=1.5, effect__report=1.25, margin__extract=7.0)
    assert Mirror(folder).sync() == 1
    parent, children = runs_of(folder)
    run = children[2]
    assert run.info.run_name == "trial 2: layer=12 dose=0.2 template=a|b"
    assert run.data.params == {"layer": "12", "dose": "0.2", "template": "a|b"}
    assert run.data.metrics == {"effect": 1.5, "effect_report": 1.25, "margin_extract": 7.0}
    assert run.data.tags["mlflow.parentRunId"] == parent.info.run_id
    assert run.data.tags["spec"] == "spec2"
    assert (run.data.tags["attempts"], run.data.tags["worker"]) == ("2", "w1")
    assert run.info.start_time == round((STARTED + 20) * 1000)
    assert run.info.end_time == round((STARTED + 24) * 1000)


@pytest.mark.parametrize(
    ("state", "status"), [("completed", "FINISHED"), ("infeasible", "FINISHED"), ("failed", "FAILED")]
)
def test_only_a_failed_trial_is_a_failed_run(folder: Path, state: str, status: str) -> None:
    commit(folder, 0, state, effect=1.0)
    Mirror(folder).sync()
    [run] = runs_of(folder)[1].values()
    assert run.info.status == status
    assert run.data.tags["state"] == state
    assert run.data.tags.get("reason") == (None if state == "completed" else "text collapsed")


def test_undefined_metrics_are_left_out(folder: Path) -> None:
    commit(folder, 0, effect=math.nan, damage=math.inf, fluency=2.0)
    Mirror(folder).sync()
    assert runs_of(folder)[1][0].data.metrics == {"fluency": 2.0}


def test_a_run_shows_at_most_thirty_metrics_and_all_objectives(folder: Path) -> None:
    others = {f"a{number}__{split}": 1.0 for number in range(20) for split in ("select", "extract")}
    commit(folder, 0, **others, effect=1.0, effect__report=1.0, damage=2.0)
    Mirror(folder).sync()
    metrics = runs_of(folder)[1][0].data.metrics
    assert len(metrics) == 30
    assert {"effect", "effect_report", "damage", *(f"a{number}" for number in range(20))} <= set(metrics)


def test_names_that_mlflow_refuses_are_mended(folder: Path) -> None:
    commit(folder, 0, **{"hits@1 (%)": 1.0})
    Mirror(folder).sync()
    assert runs_of(folder)[1][0].data.metrics == {"hits_1 ___": 1.0}


def test_a_reused_result_is_shown_under_every_trial_that_shares_it(folder: Path) -> None:
    commit(folder, 0, effect=1.0)
    again = {
        "trial": 1,
        "spec": "spec0",
        "state": "completed",
        "reused_from": 0,
        "finished": STARTED,
        "params": "{}",
    }
    Store(folder).commit([], trials=[again])
    assert Mirror(folder).sync() == 2
    run = runs_of(folder)[1][1]
    assert run.data.metrics == {"effect": 1.0}
    assert run.data.tags["reused_from"] == "0"
    assert run.info.start_time == run.info.end_time == round(STARTED * 1000)


def test_a_sync_logs_only_what_is_new(folder: Path) -> None:
    mirror = Mirror(folder)
    assert mirror.sync() == 0
    commit(folder, 0, effect=1.0)
    assert mirror.sync() == 1
    assert mirror.sync() == 0
    commit(folder, 1, effect=1.0)
    assert mirror.sync() == 1
    before = {trial: content(run) for trial, run in runs_of(folder)[1].items()}
    assert Mirror(folder).sync() == 0
    assert {trial: content(run) for trial, run in runs_of(folder)[1].items()} == before
    assert set(before) == {0, 1}


def test_the_sweeps_run_holds_its_settings_counts_and_description(folder: Path) -> None:
    commit(folder, 0, effect=1.0, damage=0.5, effect__report=0.9)
    commit(folder, 1, effect=2.0, damage=1.0)
    commit(folder, 2, effect=1.5, damage=3.0)
    commit(folder, 3, "failed")
    Mirror(folder).sync()
    parent, _ = runs_of(folder)
    assert parent.info.run_name == "5eed0123"
    assert parent.info.status == "RUNNING"
    assert parent.data.params == {
        "job": "jobs.steer",
        "model": "tiny",
        "dtype": "float32",
        "trust_remote_code": "False",
        "seed": "3",
        "workers": "2",
        "sampler": "grid",
        "trials": "4",
    }
    assert parent.data.metrics == {"trials": 4, "completed": 3, "failed": 1, "infeasible": 0}
    assert parent.data.tags["mlflow.source.git.commit"] == "abc123"
    assert parent.data.tags["packages"] == "torch==2.13.0 ray==2.60.0"
    assert parent.data.tags["mlflow.note.content"].splitlines() == [
        "Which layer changes the tone?",
        "",
        "Trials that no other trial beats: 2",
        "",
        "| trial | layer | dose | template | effect (maximize) | damage (minimize) "
        "| effect on report | damage on report |",
        "|---|---|---|---|---|---|---|---|",
        r"| 1 | 11 | 0.1 | a\|b | 2 | 1 |  |  |",
        r"| 0 | 10 | 0 | a\|b | 1 | 0.5 | 0.9 |  |",
    ]


def test_a_long_front_is_cut_at_a_whole_row(folder: Path) -> None:
    for trial in range(3):
        commit(folder, trial, effect=float(trial), damage=float(trial))
    identity = {
        **IDENTITY,
        "parameters": {"layer": "BIGINT", "template": "VARCHAR"},
        "description": "x" * 9000,
    }
    (folder / "sweep.json").write_text(json.dumps(identity))
    Mirror(folder).sync()
    note = runs_of(folder)[0].data.tags["mlflow.note.content"]
    assert len(note) <= 5000
    assert note.endswith("|")


def test_finish_adds_the_files_and_ends_the_sweeps_run(folder: Path) -> None:
    commit(folder, 0, effect=1.0)
    report = folder / "report.html"
    report.write_text("<p>all is well</p>")
    mirror = Mirror(folder)
    mirror.sync()
    mirror.finish([report])
    mirror.finish([report])
    parent, _ = runs_of(folder)
    assert parent.info.status == "FINISHED"
    assert parent.info.end_time == round((STARTED + 5) * 1000)
    [stored] = (folder / "mlartifacts").rglob("report.html")
    assert stored.read_text() == report.read_text()


def test_a_finished_sweep_runs_again_while_new_trials_come(folder: Path) -> None:
    commit(folder, 0, effect=1.0)
    mirror = Mirror(folder)
    mirror.sync()
    mirror.finish()
    assert mirror.sync() == 0
    assert runs_of(folder)[0].info.status == "FINISHED"
    commit(folder, 1, effect=1.0)
    assert mirror.sync() == 1
    assert runs_of(folder)[0].info.status == "RUNNING"
    mirror.finish()
    assert runs_of(folder)[0].info.status == "FINISHED"


@pytest.mark.parametrize("failing", ["create_run", "log_batch", "set_terminated"])
@pytest.mark.parametrize("after", [True, False])
def test_a_death_at_any_call_leaves_nothing_double_or_open(
    folder: Path, monkeypatch: pytest.MonkeyPatch, failing: str, after: bool
) -> None:
    for trial in range(3):
        commit(folder, trial, effect=1.0, damage=2.0)
    real = getattr(MlflowClient, failing)
    calls = []

    def dying(client: MlflowClient, *args: object, **kwargs: object) -> object:
        calls.append(1)
        if len(calls) != 3:
            return real(client, *args, **kwargs)
        if after:
            real(client, *args, **kwargs)
        raise ConnectionError("the server is gone")

    monkeypatch.setattr(MlflowClient, failing, dying)
    mirror = Mirror(folder)
    with pytest.raises(ConnectionError):
        mirror.sync()
    mirror.sync()
    assert Mirror(folder).sync() == 0
    children = runs_of(folder)[1]
    assert set(children) == {0, 1, 2}
    assert {run.info.status for run in children.values()} == {"FINISHED"}
    for run in children.values():
        assert run.data.metrics == {"effect": 1.0, "damage": 2.0}
        assert set(run.data.params) == {"layer", "dose", "template"}


def test_a_deleted_mirror_is_written_again_with_the_same_content(
    folder: Path, tmp_path: Path, empty_database: Path
) -> None:
    commit(folder, 0, effect=1.0)
    commit(folder, 1, "infeasible", effect=0.5)
    mirror = Mirror(folder)
    mirror.sync()
    mirror.finish()
    parent, children = runs_of(folder)
    # A copy, because MLflow keeps a deleted database open for as long as this process lives.
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy, ignore=shutil.ignore_patterns("mlflow.db*", "mlartifacts"))
    shutil.copy(empty_database, copy)
    rebuilt = Mirror(copy)
    assert rebuilt.sync() == 2
    rebuilt.finish()
    new_parent, new_children = runs_of(copy)
    assert content(new_parent) == content(parent)
    assert {trial: content(run) for trial, run in new_children.items()} == {
        trial: content(run) for trial, run in children.items()
    }


def test_a_run_deleted_in_mlflow_comes_back(folder: Path) -> None:
    commit(folder, 0, effect=1.0)
    Mirror(folder).sync()
    MlflowClient(tracking_uri=tracking_uri(folder)).delete_run(runs_of(folder)[1][0].info.run_id)
    assert Mirror(folder).sync() == 1
    assert set(runs_of(folder)[1]) == {0}


def test_an_experiment_deleted_in_mlflow_comes_back(folder: Path) -> None:
    commit(folder, 0, effect=1.0)
    Mirror(folder).sync()
    client = MlflowClient(tracking_uri=tracking_uri(folder))
    client.delete_experiment(runs_of(folder)[0].info.experiment_id)
    Mirror(folder).sync()
    assert set(runs_of(folder)[1]) == {0}


def test_two_sweeps_of_a_space_share_an_experiment_and_nothing_else(folder: Path, tmp_path: Path) -> None:
    commit(folder, 0, effect=1.0)
    other = tmp_path / "other"
    shutil.copytree(folder, other, ignore=shutil.ignore_patterns("mlflow.db*"))
    (other / "sweep.json").write_text(json.dumps({**IDENTITY, "sweep": "another"}))
    assert Mirror(folder).sync() == 1
    assert Mirror(other, tracking_uri(folder)).sync() == 1
    assert Mirror(folder).sync() == 0
    client = MlflowClient(tracking_uri=tracking_uri(folder))
    [experiment] = [one for one in client.search_experiments() if one.name == "tone_grid"]
    assert len(client.search_runs([experiment.experiment_id])) == 4


def test_many_runs_are_found_again_page_by_page(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for trial in range(3):
        commit(folder, trial, effect=1.0)
    Mirror(folder).sync()
    search = MlflowClient.search_runs
    monkeypatch.setattr(
        MlflowClient, "search_runs", lambda *args, **kwargs: search(*args, **{**kwargs, "max_results": 2})
    )
    assert Mirror(folder).sync() == 0


def test_the_background_mirror_follows_the_sweep_and_ends_it(folder: Path) -> None:
    mirror = BackgroundMirror(folder)
    commit(folder, 0, effect=1.0)
    for _ in range(100):
        mirror.notify()
    commit(folder, 1, effect=1.0)
    report = folder / "report.html"
    report.write_text("<p></p>")
    assert mirror.close([report], timeout_seconds=30)
    parent, children = runs_of(folder)
    assert set(children) == {0, 1}
    assert parent.info.status == "FINISHED"


def test_an_unreachable_server_is_one_warning(
    folder: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit(folder, 0, effect=1.0)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    started = time.monotonic()
    mirror = BackgroundMirror(folder, UNREACHABLE)
    mirror.notify()
    with caplog.at_level(logging.WARNING, logger="storage.mlflow_log"):
        assert not mirror.close([], timeout_seconds=20)
    assert time.monotonic() - started < 10
    [record] = [record for record in caplog.records if record.name == "storage.mlflow_log"]
    assert "the sweep goes on" in record.getMessage()
    assert "\n" not in record.getMessage()


def test_the_default_number_of_retries_ends_within_seconds(folder: Path) -> None:
    started = time.monotonic()
    with pytest.raises(Exception, match=r"127\.0\.0\.1"):
        Mirror(folder, UNREACHABLE).sync()
    assert time.monotonic() - started < 10


def test_close_returns_when_its_time_is_up_and_leaves_whole_runs(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for trial in range(4):
        commit(folder, trial, effect=1.0)
    mirror = BackgroundMirror(folder)
    with monkeypatch.context() as slow:
        real = MlflowClient.log_batch
        slow.setattr(
            MlflowClient, "log_batch", lambda *args, **more: (time.sleep(0.5), real(*args, **more))[1]
        )
        started = time.monotonic()
        assert not mirror.close([], timeout_seconds=1.5)
        assert time.monotonic() - started < 4
    assert "mlflow-mirror" not in {thread.name for thread in threading.enumerate()}
    parent, children = runs_of(folder)
    assert parent.info.status == "RUNNING"
    assert {run.info.status for run in children.values()} == {"FINISHED"}
    assert Mirror(folder).sync() == 4 - len(children)


def test_importing_the_mirror_does_not_import_mlflow() -> None:
    code = "import sys, storage.mlflow_log; sys.exit('mlflow' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def test_a_port_in_use_is_refused_in_one_line(folder: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(
            SpecError, match=rf"^port {port} cannot be used \(Address already in use\); choose another$"
        ):
            serve_ui(folder, port)


def test_a_folder_without_a_mirror_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match=r"has no mlflow\.db"):
        serve_ui(tmp_path, free_port())


@pytest.mark.slow
def test_the_user_interface_is_served_until_it_is_interrupted(folder: Path) -> None:
    commit(folder, 0, effect=1.0)
    Mirror(folder).sync()
    port = free_port()
    code = f"import pathlib, storage.mlflow_log as m; exit(m.serve_ui(pathlib.Path({str(folder)!r}), {port}))"
    with subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE) as server:
        try:
            assert b'"tone_grid"' in search_experiments(port, patience_seconds=60)
            server.send_signal(signal.SIGINT)
            server.communicate(timeout=30)
        finally:
            server.terminate()
    assert server.returncode == 0
    with pytest.raises(OSError, match="refused"):
        search_experiments(port, patience_seconds=0)


def search_experiments(port: int, patience_seconds: float) -> bytes:
    url = f"http://127.0.0.1:{port}/api/2.0/mlflow/experiments/search?max_results=9"
    deadline = time.monotonic() + patience_seconds
    while True:
        try:
            with urllib.request.urlopen(url, timeout=30) as answer:
                return bytes(answer.read())
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.2)

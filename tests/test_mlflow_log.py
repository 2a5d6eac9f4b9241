"""The MLflow mirror, against MLflow itself on SQLite and behind its server."""

import json
import math
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from mlflow import MlflowClient
from mlflow.entities import Run
from mlflow.exceptions import MlflowException
from urllib3 import HTTPConnectionPool

from storage.mlflow_log import Mirror, tracking_uri
from storage.store import Store
from tests.mirrored import (
    IDENTITY,
    SECRET,
    STARTED,
    commit,
    guarded,
    make_database,
    make_sweep,
    runs_of,
    served,
)


@pytest.fixture(scope="module")
def empty_database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_database(tmp_path_factory.mktemp("mlflow"))


@pytest.fixture
def folder(tmp_path: Path, empty_database: Path) -> Path:
    sweep = make_sweep(tmp_path / "sweep")
    shutil.copy(empty_database, sweep / "mlflow.db")
    return sweep


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
    assert run.info.run_name == "2: layer=12 dose=0.2 template=a|b"
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


def test_a_sweep_that_was_stopped_or_finished_runs_again_until_the_next_finish(folder: Path) -> None:
    commit(folder, 0, effect=1.0)
    mirror = Mirror(folder)
    mirror.sync()
    mirror.finish(is_complete=False)
    assert runs_of(folder)[0].info.status == "KILLED"
    assert mirror.sync() == 0
    assert runs_of(folder)[0].info.status == "RUNNING"
    mirror.finish()
    Mirror(folder).finish()
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


def test_an_unreachable_server_is_given_up_within_seconds(folder: Path) -> None:
    started = time.monotonic()
    with pytest.raises(Exception, match=r"127\.0\.0\.1"):
        Mirror(folder, "http://127.0.0.1:1").sync()
    assert time.monotonic() - started < 10


def test_a_new_store_keeps_everything_in_its_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sweep, elsewhere = make_sweep(tmp_path / "50%20of a?b#c"), tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    commit(sweep, 0, effect=1.0)
    mirror = Mirror(sweep)
    mirror.sync()
    mirror.finish([sweep / "sweep.json"])
    experiments = MlflowClient(tracking_uri=tracking_uri(sweep)).search_experiments()
    assert {experiment.name for experiment in experiments} == {"Default", "tone_grid"}
    inside = (sweep / "mlartifacts").as_uri()
    assert all(experiment.artifact_location.startswith(inside) for experiment in experiments)
    assert (sweep / "mlflow.db").is_file()
    assert list((sweep / "mlartifacts").rglob("sweep.json"))
    assert not list(elsewhere.iterdir())


@pytest.mark.parametrize("is_copied", [True, False])
def test_a_sweep_that_is_copied_or_moved_keeps_its_files_beside_it(
    folder: Path, tmp_path: Path, is_copied: bool
) -> None:
    commit(folder, 0, effect=1.0)
    (folder / "mlflow.db").unlink()
    first = Mirror(folder)
    first.sync()
    first.finish([folder / "sweep.json"])
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("mlartifacts/**/*")}
    other = tmp_path / "other"
    shutil.copytree(folder, other) if is_copied else folder.rename(other)
    (other / "later.txt").write_text("later")
    # MLflow remembers in a process where the files of a run lie.
    code = (
        "import pathlib, sys; from storage.mlflow_log import Mirror; folder = pathlib.Path(sys.argv[1]); "
        "mirror = Mirror(folder); assert mirror.sync() == 0; mirror.finish([folder / 'later.txt'])"
    )
    subprocess.run([sys.executable, "-c", code, str(other)], check=True, cwd=Path(__file__).parents[1])
    assert list((other / "mlartifacts").rglob("later.txt"))
    if is_copied:
        assert {path: path.stat().st_mtime_ns for path in folder.rglob("mlartifacts/**/*")} == before
    else:
        assert not folder.exists()
    [run] = runs_of(other)[1].values()
    assert run.info.artifact_uri.startswith((other / "mlartifacts").as_uri())


def test_another_sqlite_store_can_be_named(folder: Path, tmp_path: Path) -> None:
    shared = tmp_path / "shared"
    shared.mkdir()
    (folder / "mlflow.db").rename(shared / "runs.db")
    commit(folder, 0, effect=1.0)
    uri = f"sqlite:///{shared}/runs.db?timeout=9"
    mirror = Mirror(folder, uri)
    mirror.sync()
    mirror.finish([folder / "sweep.json"])
    parent, children = runs_of(folder, uri)
    assert (parent.info.status, set(children)) == ("FINISHED", {0})
    assert list((shared / "mlartifacts").rglob("sweep.json"))
    assert not list(folder.glob("ml*"))


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, empty_database: Path) -> Iterator[str]:
    """Address of a real server that lets nobody in but with the user and password that are part of it."""
    folder = make_sweep(tmp_path_factory.mktemp("server") / "sweep")
    shutil.copy(empty_database, folder / "mlflow.db")
    with served(folder) as (_, address), guarded(address, "reader", SECRET) as guard:
        yield guard.replace("://", f"://reader:{SECRET}@")


@pytest.mark.slow
def test_a_server_gets_the_same_runs_and_no_password(
    folder: Path, server: str, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    commit(folder, 0, effect=1.0)
    commit(folder, 1, "failed")
    for uri in (None, server):
        mirror = Mirror(folder, uri)
        mirror.sync()
        mirror.finish([folder / "sweep.json"])
    parent, children = runs_of(folder, server)
    local_parent, local_children = runs_of(folder)
    assert content(parent) == content(local_parent)
    assert {trial: content(run) for trial, run in children.items()} == {
        trial: content(run) for trial, run in local_children.items()
    }
    client = MlflowClient(tracking_uri=server)
    assert [file.path for file in client.list_artifacts(parent.info.run_id)] == ["sweep.json"]
    stored = [client.get_experiment(parent.info.experiment_id), parent, *children.values()]
    told = "".join([*(str(dict(one)) for one in stored), caplog.text, *capfd.readouterr()])
    assert SECRET not in told
    assert "reader" not in told


@pytest.mark.slow
def test_a_server_that_asks_for_a_password_takes_it_from_the_environment_and_no_other(
    folder: Path, server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit(folder, 0, effect=1.0)
    (folder / "sweep.json").write_text(json.dumps({**IDENTITY, "sweep": "guarded", "space": "guarded_grid"}))
    address = server.replace(f"reader:{SECRET}@", "")
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "reader")
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "wrong")
    with pytest.raises(MlflowException, match="401"):
        Mirror(folder, address).sync()
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", SECRET)
    assert Mirror(folder, address).sync() == 1


@pytest.mark.slow
def test_an_answer_that_is_lost_makes_no_second_run(
    folder: Path, server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit(folder, 0, effect=1.0)
    (folder / "sweep.json").write_text(json.dumps({**IDENTITY, "sweep": "lossy", "space": "lossy_grid"}))
    real, created = HTTPConnectionPool._make_request, []

    def losing(
        pool: object, connection: object, method: str, url: str, *args: object, **more: object
    ) -> object:
        answer = real(pool, connection, method, url, *args, **more)
        if url.endswith("/runs/create"):
            created.append(url)
            if len(created) in (1, 2):
                raise ConnectionResetError("the answer is lost")
        return answer

    monkeypatch.setattr(HTTPConnectionPool, "_make_request", losing)
    mirror = Mirror(folder, server)
    for _ in range(2):
        with pytest.raises(Exception, match="the answer is lost"):
            mirror.sync()
    mirror.sync()
    mirror.finish()
    client = MlflowClient(tracking_uri=server)
    experiment = client.get_experiment_by_name("lossy_grid")
    assert [run.info.status for run in client.search_runs([experiment.experiment_id])] == ["FINISHED"] * 2


def test_importing_the_mirror_does_not_import_mlflow() -> None:
    code = "import sys, storage.background_mirror, storage.mlflow_ui; sys.exit('mlflow' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_datasets_that_jobs_have_read_are_inputs_of_the_sweeps_run_once(folder: Path) -> None:
    commit(folder, 0, effect=1.0)
    read = [
        ("a", {"pairs": "tone_pairs", "dose": 1}, {"jobs.extract:pairs": "ab" * 32}),
        ("b", {"pairs": "tone_pairs", "dose": 2}, {"jobs.extract:pairs": "ab" * 32}),
        ("c", {"prompts": "mine/asked.jsonl"}, {"jobs.generate:prompts": "cd" * 32}),
        ("d", {}, {}),
    ]
    rows = [
        {"spec": spec, "params": json.dumps(params), "data": json.dumps(data)} for spec, params, data in read
    ]
    Store(folder).commit([], specs=rows)
    mirror = Mirror(folder)
    mirror.sync()
    mirror.finish()
    mirror.finish()
    [found] = [runs_of(folder)[0].inputs.dataset_inputs]
    assert sorted((each.dataset.name, each.dataset.digest, each.dataset.source) for each in found) == [
        ("asked", ("cd" * 32)[:36], '{"uri": "mine/asked.jsonl"}'),
        ("tone_pairs", ("ab" * 32)[:36], '{"uri": "tone_pairs"}'),
    ]
    assert {tag.value for each in found for tag in each.tags} == {"pairs", "prompts"}


def test_what_the_machine_does_is_logged_while_it_is_watched(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL", "0.2")
    commit(folder, 0, effect=1.0)
    mirror = Mirror(folder)
    mirror.sync()
    end = mirror.watch()
    time.sleep(1.5)
    end()
    names = runs_of(folder)[0].data.metrics
    assert {"system/cpu_utilization_percentage", "system/system_memory_usage_percentage"} <= names.keys()

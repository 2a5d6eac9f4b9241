"""The command as a user meets it: a real process, real Ray, Optuna, MLflow and Parquet, a tiny model."""

import json
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from safetensors.numpy import load_file
from typer.testing import CliRunner

from jobs import steer
from jobs.directions.vector_files import read_vectors
from orchestrator import launch
from orchestrator.cli import app
from storage.query import open_sweep
from tests.command import ROOT, refused, results, run_arguments, steersweep, steersweep_beside_other_code

pytestmark = pytest.mark.ray


def test_a_run_says_in_json_how_it_ended(finished: dict[str, Any], place: Path) -> None:
    assert finished.keys() == {
        "sweep",
        "trials",
        "completed",
        "infeasible",
        "failed",
        "stopped",
        "seconds",
        "pareto",
        "reasons",
    }
    assert finished["reasons"] == []
    assert (finished["trials"], finished["completed"], finished["failed"]) == (9, 9, 0)
    assert finished["pareto"]
    assert finished["pareto"][0]["objectives"].keys() == {"effect", "damage"}


def test_every_trial_has_every_metric_on_both_splits(finished: dict[str, Any], place: Path) -> None:
    counted = open_sweep(place / "finished").rows(
        "SELECT trial, split, count(value) AS n FROM metrics WHERE trial IS NOT NULL GROUP BY ALL"
    )
    assert len(counted) == 18
    whole = len(steer.METRICS)
    # How sure damage on one or two prompts is nobody knows, but where there is no dose.
    for split in ("select", "report"):
        assert {row["n"] for row in counted if row["split"] == split} == {whole, whole - 2}


def test_a_dose_of_zero_is_computed_once(finished: dict[str, Any], place: Path) -> None:
    rows = open_sweep(place / "finished").rows(
        "SELECT trial, spec, reused_from FROM trials WHERE dose = 0 ORDER BY trial"
    )
    assert len({row["spec"] for row in rows}) == 1
    assert [row["reused_from"] for row in rows] == [None, rows[0]["trial"], rows[0]["trial"]]


def test_the_same_seed_gives_the_same_tables(finished: dict[str, Any], place: Path) -> None:
    done = steersweep(*run_arguments(place, "again", workers=2))
    assert done.returncode == 0, done.stderr
    assert results(place / "again") == results(place / "finished")


def test_running_a_finished_sweep_again_computes_nothing(finished: dict[str, Any], place: Path) -> None:
    before = open_sweep(place / "finished").rows("SELECT * FROM attempts")
    done = steersweep(*run_arguments(place, "finished"))
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["pareto"] == finished["pareto"]
    assert open_sweep(place / "finished").rows("SELECT * FROM attempts") == before


def test_what_a_driver_did_not_live_to_remove_goes_when_its_sweep_is_run_again(
    finished: dict[str, Any], place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[Any, ...]] = []
    monkeypatch.setattr(launch, "_collect", lambda space, sweep, trials: asked.append((sweep.folder, trials)))
    done = CliRunner().invoke(app, list(map(str, run_arguments(place, "finished"))))
    assert done.exit_code == 0, done.output
    assert asked == [(place / "finished", 9)]


def test_another_seed_in_the_same_folder_is_refused(finished: dict[str, Any], place: Path) -> None:
    done = steersweep(*run_arguments(place, "finished"), "--seed", "7")
    assert done.returncode == 2
    assert "seed=0 (now 7)" in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_the_optuna_study_opens_with_optunas_own_tools(finished: dict[str, Any], place: Path) -> None:
    import optuna

    storage = optuna.storages.JournalStorage(
        optuna.storages.journal.JournalFileBackend(str(place / "finished" / "optuna.journal"))
    )
    study = optuna.load_study(study_name=finished["sweep"], storage=storage)
    assert {trial.state.name for trial in study.trials} == {"COMPLETE"}
    front = {trial.number for trial in study.best_trials}
    assert {point["trial"] for point in finished["pareto"]} <= front


def test_mlflow_holds_a_parent_and_a_child_for_each_trial(finished: dict[str, Any], place: Path) -> None:
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{place / 'finished' / 'mlflow.db'}")
    [experiment] = [found for found in client.search_experiments() if found.name == "space"]
    runs = client.search_runs([experiment.experiment_id])
    children = [run for run in runs if "mlflow.parentRunId" in run.data.tags]
    assert len(children) == 9
    assert len(runs) == 10
    assert {run.info.status for run in runs} == {"FINISHED"}
    assert all("effect" in run.data.metrics for run in children)


def test_another_store_gets_the_runs_and_the_vectors_of_the_front(
    finished: dict[str, Any], place: Path, tmp_path: Path
) -> None:
    from mlflow import MlflowClient

    uri = f"sqlite:///{tmp_path / 'runs.db'}"
    for written in (9, 0):
        done = steersweep("mirror", place / "finished", "--to", uri, "--json")
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout) == {"written": written}
    client = MlflowClient(uri)
    [experiment] = [found for found in client.search_experiments() if found.name == "space"]
    runs = client.search_runs([experiment.experiment_id])
    assert {run.info.status for run in runs} == {"FINISHED"}
    [file] = (tmp_path / "mlartifacts").rglob("vectors.safetensors")
    tensors = load_file(file)
    rows = open_sweep(place / "finished").rows("SELECT * FROM vectors SEMI JOIN pareto USING (trial)")
    assert len(tensors) == len(rows) > 0
    for row in rows:
        name = f"trial.{row['trial']}.{row['name']}.layer.{row['layer']}"
        np.testing.assert_array_equal(tensors[name], np.array(row["vector"], np.float32))


def test_a_server_that_is_not_there_is_one_line_without_its_password(
    finished: dict[str, Any], place: Path
) -> None:
    said = refused("mirror", place / "finished", "--to", "http://reader:hush@127.0.0.1:1")
    assert "MLflow refuses" in said
    assert "hush" not in said


@pytest.mark.parametrize("command", ["status", "pareto", "report"])
def test_looking_commands_print_json(finished: dict[str, Any], place: Path, command: str) -> None:
    done = steersweep(command, place / "finished", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)


@pytest.mark.parametrize("form", ["table", "csv", "json"])
def test_query_prints_every_format(finished: dict[str, Any], place: Path, form: str) -> None:
    sql = "SELECT trial, layer, dose, state FROM trials ORDER BY trial"
    done = steersweep("query", place / "finished", sql, "--format", form)
    assert done.returncode == 0, done.stderr
    assert "completed" in done.stdout
    if form == "json":
        assert json.loads(done.stdout)[0] == {"trial": 0, "layer": 0, "dose": -0.4, "state": "completed"}


def test_completions_are_scored_again_without_the_model_and_scores_queried(
    finished: dict[str, Any], place: Path
) -> None:
    before = results(place / "finished")
    arguments = ["score", place / "finished", "--scorer", "refusal", "--scorer", 'contains{"sought": "e"}']
    done = steersweep(*arguments, "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert {row["trial"] for row in found["trials"]} == set(range(9))
    assert [used["version"] for used in found["scorers"]] == [1, 1]
    sql = "SELECT count(*) AS n FROM scores WHERE scorer = 'contains' AND options LIKE '%\"e\"%'"
    done = steersweep("query", place / "finished", sql, "--format", "json")
    assert json.loads(done.stdout)[0]["n"] == len(before["completions"])
    again = steersweep(*arguments)
    assert again.returncode == 0, again.stderr
    assert again.stdout.splitlines()[-1].startswith("nothing to do")
    assert results(place / "finished") == before


def test_a_direction_is_listed_and_exported_with_the_models_architecture(
    finished: dict[str, Any], place: Path
) -> None:
    done = steersweep("vectors", place / "finished", "--json")
    [listed] = json.loads(done.stdout)["directions"]
    assert listed["params"]["pairs"] == "tone_pairs"
    out = place / "tone.gguf"
    done = steersweep("vectors", place / "finished", "--out", out)
    assert done.returncode == 0, done.stderr
    file = read_vectors(out, hidden=listed["hidden"])
    assert (list(file.directions), file.metadata["model_hint"]) == (listed["layers"][1:], "llama")
    assert "--force" in refused("vectors", place / "finished", "--out", out)
    assert ".safetensors or .gguf" in refused("vectors", place / "finished", "--out", place / "tone.pt")


def test_wrong_scorers_are_one_clear_line(finished: dict[str, Any], place: Path) -> None:
    assert "'refusal'" in refused("score", place / "finished", "--scorer", "sentiment")
    assert "'refusal'" in refused("score", place / "finished", "--scorer", "exact")
    assert "--scorer" in refused("score", place / "finished")


@pytest.fixture
def busy_port() -> Iterator[int]:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        yield taken.getsockname()[1]


def test_a_port_in_use_is_one_clear_line(finished: dict[str, Any], place: Path, busy_port: int) -> None:
    assert str(busy_port) in refused("ui", place / "finished", "--port", str(busy_port))


@pytest.fixture
def ray_head() -> Iterator[str]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    start = [
        "start",
        "--head",
        "--port",
        str(port),
        "--num-cpus",
        "2",
        "--include-dashboard",
        "false",
        "--block",
    ]
    head = subprocess.Popen(
        [Path(sys.executable).with_name("ray"), *start],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert head.stdout is not None
    assert any("Ray runtime started" in line for line in head.stdout)
    children = psutil.Process(head.pid).children(recursive=True)
    yield f"127.0.0.1:{port}"
    for process in (head, *children):
        with suppress(psutil.NoSuchProcess):
            process.kill()
    head.wait()


def test_a_sweep_runs_on_a_cluster_that_is_there_already_with_what_another_has_stored(
    finished: dict[str, Any], place: Path, ray_head: str
) -> None:
    # Workers take the driver's code, whatever lies on their machine where it was started.
    arguments = [
        *run_arguments(place, "cluster", workers=2),
        "--address",
        ray_head,
        "--reuse",
        place / "finished",
    ]
    done = steersweep_beside_other_code(place / "elsewhere", *arguments)
    assert done.returncode == 0, done.stderr
    found, expected = (
        {
            table: [row for row in rows if row["trial"] is not None]
            for table, rows in results(place / name).items()
        }
        for name in ("cluster", "finished")
    )
    assert found == expected
    taken = open_sweep(place / "cluster").rows(
        "SELECT job FROM attempts WHERE reason LIKE 'taken over from %'"
    )
    assert taken == [{"job": "jobs.extract"}]


def test_the_notebook_of_results_runs_on_any_sweep_of_a_grid(
    finished: dict[str, Any], place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SWEEP", str(place / "finished"))
    monkeypatch.setenv("MPLBACKEND", "agg")
    cells = json.loads((ROOT / "examples" / "results.ipynb").read_text())["cells"]
    assert all(not cell.get("outputs") for cell in cells), "results of somebody's sweep are not committed"
    names: dict[str, Any] = {}
    for cell in cells:
        if cell["cell_type"] == "code":
            exec("".join(cell["source"]), names)
    assert names["front"]["trial"].tolist() == [row["trial"] for row in finished["pareto"]]
    assert names["table"].shape == (3, 3)
    assert len(names["points"]) == 7

"""The command as a user meets it: a real process, real Ray, Optuna, MLflow and Parquet, a tiny model."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import psutil
import pytest

from jobs.directions.vector_files import read_vectors
from storage.query import open_sweep
from tests.models import save_tiny

pytestmark = pytest.mark.ray
ROOT = Path(__file__).parents[1]
SPACE = '''
"""A tiny tone grid."""
from search_spaces.base import Grid, Objective, Space

SPACE = Space(
    description="A tiny tone grid.",
    job="jobs.steer",
    parameters={"layer": Grid([0, 1, 2]), "dose": Grid([-0.4, 0.0, 0.4])},
    fixed={"choices_select": 6, "choices_report": 4, "prompts_select": 2, "prompts_report": 1,
        "max_new_tokens": 6},
    objectives=[
        Objective(metric="effect", direction="maximize"),
        Objective(metric="damage", direction="minimize"),
    ],
    sampler="grid",
)
'''


def steersweep(*arguments: str | Path, timeout: float = 240) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "orchestrator.cli", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=timeout, check=False)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cli")
    save_tiny(folder / "model")
    (folder / "space.py").write_text(SPACE)
    return folder


def run_arguments(place: Path, out: str) -> list[str | Path]:
    return ["run", place / "space.py", "--out", place / out, "--set", f"model={place / 'model'}", "--json"]


@pytest.fixture(scope="module")
def finished(place: Path) -> dict[str, Any]:
    done = steersweep(*run_arguments(place, "finished"))
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def results(folder: Path) -> dict[str, list[dict[str, Any]]]:
    """All that does not depend on time or on who ran it."""
    sweep = open_sweep(folder)
    return {
        "trials": sweep.rows("SELECT trial, spec, state, layer, dose FROM trials ORDER BY trial"),
        "metrics": sweep.rows("SELECT * FROM metrics ORDER BY ALL"),
        "items": sweep.rows("SELECT * FROM items ORDER BY ALL"),
        "completions": sweep.rows("SELECT * FROM completions ORDER BY ALL"),
        "vectors": sweep.rows("SELECT * FROM vectors ORDER BY trial"),
    }


def test_a_run_says_in_json_how_it_ended(finished: dict[str, Any], place: Path) -> None:
    assert finished.keys() == {"sweep", "trials", "completed", "infeasible", "failed", "seconds", "pareto"}
    assert (finished["trials"], finished["completed"], finished["failed"]) == (9, 9, 0)
    assert finished["pareto"]
    assert finished["pareto"][0]["objectives"].keys() == {"effect", "damage"}


def test_every_trial_has_every_metric_on_both_splits(finished: dict[str, Any], place: Path) -> None:
    counted = open_sweep(place / "finished").rows(
        "SELECT trial, split, count(value) AS n FROM metrics WHERE trial IS NOT NULL GROUP BY ALL"
    )
    assert len(counted) == 18
    assert {row["n"] for row in counted} == {7}


def test_a_dose_of_zero_is_computed_once(finished: dict[str, Any], place: Path) -> None:
    rows = open_sweep(place / "finished").rows(
        "SELECT trial, spec, reused_from FROM trials WHERE dose = 0 ORDER BY trial"
    )
    assert len({row["spec"] for row in rows}) == 1
    assert [row["reused_from"] for row in rows] == [None, rows[0]["trial"], rows[0]["trial"]]


def test_the_same_seed_gives_the_same_tables(finished: dict[str, Any], place: Path) -> None:
    done = steersweep(*run_arguments(place, "again"))
    assert done.returncode == 0, done.stderr
    assert results(place / "again") == results(place / "finished")


def test_running_a_finished_sweep_again_computes_nothing(finished: dict[str, Any], place: Path) -> None:
    before = open_sweep(place / "finished").rows("SELECT * FROM attempts")
    done = steersweep(*run_arguments(place, "finished"))
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["pareto"] == finished["pareto"]
    assert open_sweep(place / "finished").rows("SELECT * FROM attempts") == before


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


def test_a_driver_killed_at_any_moment_goes_on_to_the_same_tables(
    finished: dict[str, Any], place: Path
) -> None:
    expected = results(place / "finished")
    folder = place / "killed"
    command = [sys.executable, "-m", "orchestrator.cli", *map(str, run_arguments(place, "killed"))]
    for wanted in ("ledger.jsonl", "tables/metrics", "tables/trials"):
        driver = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        wait_until(
            lambda path=folder / wanted: path.exists() and (path.is_file() or any(path.iterdir())), driver
        )
        kill_tree(driver)
    done = steersweep("resume", folder, "--json")
    assert done.returncode == 0, done.stderr
    assert results(folder) == expected


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_driver_that_is_asked_to_stop_says_how_to_go_on_and_leaves_no_process(
    finished: dict[str, Any], place: Path, number: signal.Signals
) -> None:
    out = f"stopped-{number}"
    command = [sys.executable, "-m", "orchestrator.cli", *map(str, run_arguments(place, out))]
    driver = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    wait_until(lambda: "dispatched" in ledger(place / out), driver)
    children = psutil.Process(driver.pid).children(recursive=True)
    driver.send_signal(number)
    output, errors = driver.communicate(timeout=120)
    assert driver.returncode == 130, errors
    assert (
        errors.splitlines()[-1] == f"steersweep: stopped; `steersweep resume {place / out}` goes on from here"
    )
    assert "Traceback" not in errors
    assert output == ""
    _, alive = psutil.wait_procs(children, timeout=30)
    assert not alive
    done = steersweep("status", place / out, "--json")
    assert json.loads(done.stdout)["driver"] is None
    assert json.loads(done.stdout)["running"] == 0


def test_a_killed_worker_is_replaced_and_its_pack_runs_again(finished: dict[str, Any], place: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "orchestrator.cli",
        *map(str, run_arguments(place, "wounded")),
        "--workers",
        "1",
    ]
    driver = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    wait_until(lambda: "dispatched" in ledger(place / "wounded"), driver)
    for process in psutil.Process(driver.pid).children(recursive=True):
        if "WorkerActor" in " ".join(process.cmdline()):
            process.send_signal(signal.SIGKILL)
    output, errors = driver.communicate(timeout=240)
    assert driver.returncode == 0, errors
    assert json.loads(output.splitlines()[-1])["completed"] == 9
    states = open_sweep(place / "wounded").rows("SELECT DISTINCT state FROM attempts ORDER BY state")
    assert [row["state"] for row in states] == ["lost", "ok"]


def ledger(folder: Path) -> str:
    path = folder / "ledger.jsonl"
    return path.read_text() if path.exists() else ""


def wait_until(happened: Any, driver: "subprocess.Popen[Any]") -> None:
    deadline = time.monotonic() + 120
    while not happened():
        assert time.monotonic() < deadline, "the sweep did not get that far"
        if driver.poll() is not None:
            return
        time.sleep(0.01)


def kill_tree(driver: "subprocess.Popen[Any]") -> None:
    """Kill the driver first, as a machine's out-of-memory killer would, then what it left behind."""
    children = psutil.Process(driver.pid).children(recursive=True) if driver.poll() is None else []
    driver.send_signal(signal.SIGKILL)
    driver.wait()
    for child in children:
        child.kill()
    psutil.wait_procs(children, timeout=30)


@pytest.fixture
def busy_port() -> Iterator[int]:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        yield taken.getsockname()[1]


def refused(*arguments: str | Path) -> str:
    done = steersweep(*arguments, timeout=120)
    assert done.returncode == 2, (done.returncode, done.stdout, done.stderr)
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith("steersweep: ")
    return lines[0]


def test_a_port_in_use_is_one_clear_line(finished: dict[str, Any], place: Path, busy_port: int) -> None:
    assert str(busy_port) in refused("ui", place / "finished", "--port", str(busy_port))


def test_a_ray_address_that_does_not_answer_is_one_clear_line(place: Path, busy_port: int) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    line = refused(*run_arguments(place, "nowhere"), "--address", f"127.0.0.1:{port}")
    assert f"127.0.0.1:{port}" in line
    assert not (place / "nowhere").exists()


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


def test_a_sweep_runs_on_a_cluster_that_is_there_already(
    finished: dict[str, Any], place: Path, ray_head: str
) -> None:
    done = steersweep(*run_arguments(place, "cluster"), "--address", ray_head)
    assert done.returncode == 0, done.stderr
    assert results(place / "cluster") == results(place / "finished")


def test_another_program_at_a_ray_address_is_one_clear_line(place: Path) -> None:
    with ThreadingHTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"127.0.0.1:{server.server_port}"
        line = refused(*run_arguments(place, "nowhere"), "--address", address)
        server.shutdown()
    assert f"'{address}' is no Ray head" in line
    assert not (place / "nowhere").exists()


def test_more_gpus_than_there_are_is_one_clear_line(place: Path) -> None:
    line = refused(*run_arguments(place, "nowhere"), "--set", "gpus_per_worker=64")
    assert "gpus_per_worker=64" in line
    assert not (place / "nowhere").exists()


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (('job="jobs.steer"', 'job="jobs.stear"'), "jobs.stear"),
        (('metric="effect"', 'metric="efect"'), "efect"),
        (("Grid([0, 1, 2])", "Grid([0, 1, 99])"), "layer=99"),
        (("SPACE = Space(", "OTHER = Space("), "SPACE"),
        (('sampler="grid",', 'sampler="grid",,'), "line"),
        (("fixed={", 'fixed={"pears": "x", '), "pears"),
        (("fixed={", 'fixed={"pairs": "nowhere.csv", '), "nowhere.csv"),
    ],
)
def test_a_wrong_space_is_one_clear_line_and_leaves_nothing(
    place: Path, change: tuple[str, str], named: str
) -> None:
    assert change[0] in SPACE
    path = place / "wrong.py"
    path.write_text(SPACE.replace(*change))
    line = refused("run", path, "--out", place / "wrong", "--set", f"model={place / 'model'}")
    assert named in line
    assert not (place / "wrong").exists()


def test_an_unknown_model_is_one_clear_line_and_leaves_nothing(place: Path) -> None:
    line = refused("run", place / "space.py", "--out", place / "unknown", "--set", "model=/nowhere/at/all")
    assert "/nowhere/at/all" in line
    assert not (place / "unknown").exists()


@pytest.mark.parametrize("text", ["", "statement\nWater is wet.\n", "statement,label\nWater is wet.,\n"])
def test_an_empty_or_unlabelled_csv_is_one_clear_line(place: Path, text: str) -> None:
    path = place / "claims.csv"
    path.write_text(text)
    space = SPACE.replace("jobs.steer", "jobs.honesty").replace("effect", "accuracy").replace("damage", "kl")
    space = (
        space[: space.index("    fixed=")]
        + f"    fixed={{'claims': {str(path)!r}}},\n"
        + space[space.index("    objectives=") :]
    )
    (place / "csv.py").write_text(space)
    line = refused("run", place / "csv.py", "--out", place / "csv", "--set", f"model={place / 'model'}")
    assert "claims.csv" in line
    assert not (place / "csv").exists()


def test_a_folder_that_is_no_sweep_is_one_clear_line(place: Path) -> None:
    assert "sweep.json" in refused("status", place)


def test_a_full_disk_is_one_clear_line_and_leaves_no_half_sweep(place: Path) -> None:
    mount = place / "small"
    mount.mkdir()
    if (
        os.geteuid() != 0
        or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4k", "tmpfs", mount], check=False).returncode
    ):
        pytest.skip("mounting a small file system needs root")
    try:
        line = refused("run", place / "space.py", "--out", mount / "out", "--set", f"model={place / 'model'}")
        assert "space" in line
        assert not (mount / "out" / "sweep.json").exists()
    finally:
        subprocess.run(["umount", mount], check=True)


def test_a_model_whose_weights_cannot_be_read_is_one_clear_line(place: Path) -> None:
    broken = place / "broken"
    shutil.copytree(place / "model", broken)
    [weights] = broken.glob("*.safetensors")
    weights.write_bytes(weights.read_bytes()[:100])
    done = steersweep("run", place / "space.py", "--out", place / "unread", "--set", f"model={broken}")
    assert done.returncode == 2
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("steersweep: a worker cannot start: ")
    assert str(broken) in last


def test_a_killed_driver_that_had_only_the_report_left_to_write_is_finished_by_resume(
    finished: dict[str, Any], place: Path
) -> None:
    report = place / "finished" / "report" / "index.html"
    report.unlink()
    done = steersweep("resume", place / "finished", "--json")
    assert done.returncode == 0, done.stderr
    assert report.exists()

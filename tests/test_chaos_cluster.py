"""Sweeps of the real command whose workers, drivers and machines are killed at random."""

import json
import random
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
from ray.cluster_utils import Cluster

from orchestrator.space_file import load_space
from storage.query import open_sweep
from tests.chaos import toll
from tests.command import ROOT, check_close, results, run_arguments, steersweep
from tests.sweeps import check_ended

pytestmark = [pytest.mark.ray, pytest.mark.timeout(1800)]

NUMBERS = """
from search_spaces.base import Grid, Int, Objective, Space

SPACE = Space(
    description="Whole numbers of a job that needs no model.",
    job="tests.fake_job",
    parameters={"x": Int(low=1, high=10**6), "group": Grid(["a", "b"])},
    fixed={"seconds": SECONDS},
    objectives=[
        Objective(metric="total", direction="maximize"),
        Objective(metric="square", direction="minimize"),
    ],
    sampler="random",
    trials=TRIALS,
)
"""
FAULTS = """
from pathlib import Path
from search_spaces.base import Grid, Objective, Space

FLAGS = Path("PLACE")
SPACE = Space(
    description="Rows that break, hang, stand still, die, or do not fit.",
    job="tests.fake_job",
    parameters={
        "mode": Grid(["ok", "kill once", "hang once", "freeze once", "raise", "silent", "twice", "bad cell",
            "oom"]),
        "x": Grid([1, 2, 3]),
    },
    fixed={"group": str(FLAGS / "flag")},
    objectives=[
        Objective(metric="total", direction="maximize"),
        Objective(metric="square", direction="minimize"),
    ],
    sampler="grid",
)
"""
Driver = subprocess.Popen[str]
Record = Callable[[str, int], None]


def arguments(place: Path, folder: Path, *more: str) -> list[str]:
    """Of a run without a model to speak of, and with more patience than luck."""
    patience = ["--set", "max_attempts=1000", "--workers", "3"]
    model = ["--set", f"model={place / 'model'}"]
    space = str(folder.with_suffix(".py"))
    return ["run", space, "--out", str(folder), *model, "--json", *patience, *more]


def write_numbers(folder: Path, *, trials: int, seconds: float) -> None:
    source = NUMBERS.replace("TRIALS", str(trials)).replace("SECONDS", str(seconds))
    folder.with_suffix(".py").write_text(source)


def start(command: list[str]) -> Driver:
    everything = [sys.executable, "-m", "orchestrator.cli", *command]
    return subprocess.Popen(everything, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def workers_of(driver: Driver) -> list[psutil.Process]:
    """Processes of the workers that a driver has on its own machine."""
    with suppress(psutil.NoSuchProcess):
        children = psutil.Process(driver.pid).children(recursive=True)
        return [child for child in children if _is_worker(child)]
    return []


def _is_worker(process: psutil.Process) -> bool:
    with suppress(psutil.NoSuchProcess, psutil.ZombieProcess):
        return "WorkerActor" in " ".join(process.cmdline())
    return False


def kill_all_workers(driver: Driver, folder: Path) -> int:
    """Kill all workers of a driver once one of them was given a pack; how many those were."""
    wait_until(lambda: "dispatched" in ledger(folder), driver)
    workers = workers_of(driver)
    for worker in workers:
        with suppress(psutil.NoSuchProcess):
            worker.kill()
    return len(workers)


def kill_workers(driver: Driver, chance: random.Random, *, kills: int, seconds: float) -> int:
    """Kill workers of a driver, one after the other, until enough have died or it has ended.

    Args:
        driver: Whose workers.
        chance: Decides when, and which.
        kills: How many.
        seconds: Mean time between two.
    """
    killed = 0
    while killed < kills and driver.poll() is None:
        time.sleep(chance.expovariate(1 / seconds))
        if workers := workers_of(driver):
            with suppress(psutil.NoSuchProcess):
                chance.choice(workers).kill()
                killed += 1
    return killed


def kill_tree(driver: Driver) -> bool:
    """Kill a driver, and then what it has left behind; whether it was still there."""
    children = psutil.Process(driver.pid).children(recursive=True) if driver.poll() is None else []
    was_there = driver.poll() is None
    driver.kill()
    driver.wait()
    for child in children:
        with suppress(psutil.NoSuchProcess):
            child.kill()
    psutil.wait_procs(children, timeout=60)
    return was_there


def see_to_the_end(driver: Driver, folder: Path, *options: str) -> None:
    """Wait for a driver, and let others go on for as long as there is something to do."""
    _, errors = driver.communicate(timeout=900)
    times = 0
    while driver.returncode != 0:
        assert times < 3, errors
        times += 1
        driver = start(["resume", str(folder), "--json", *options])
        _, errors = driver.communicate(timeout=900)


def check_whole(folder: Path, record: Record, *, trials: int) -> None:
    """Nothing is lost, nothing is there twice, nobody runs; and all records say the same."""
    for what, number in toll(folder, trials=trials).items():
        record(what, number)
    check_ended(folder, load_space(folder.with_suffix(".py")).space, trials=trials)
    check_consistent(folder)


def check_consistent(folder: Path) -> None:
    doctor = steersweep("doctor", folder, "--json")
    assert doctor.returncode == 0, doctor.stdout
    assert json.loads(doctor.stdout)["consistent"]


@pytest.mark.chaos
@pytest.mark.parametrize(("seed", "kills"), [(0, 3), *((seed, 54) for seed in range(1, 5))])
def test_workers_that_are_killed_at_random_cost_time_and_nothing_else(
    place: Path, seed: int, kills: int, record_property: Record
) -> None:
    folder, trials = place / f"kills-{seed}", 60 + 4 * kills
    write_numbers(folder, trials=trials, seconds=1.0 if kills > 10 else 0.1)
    driver, chance = start(arguments(place, folder)), random.Random(seed)
    killed = kill_all_workers(driver, folder)
    while killed < kills:
        killed += kill_workers(driver, chance, kills=kills - killed, seconds=3.0)
        if not driver.poll():
            break
        # So many died in a row, before they could start or do anything, that it gave up: somebody goes on.
        assert "mend that, then `steersweep resume`" in driver.communicate()[1]
        driver = start(["resume", str(folder), "--json"])
    see_to_the_end(driver, folder)
    record_property("worker_kills", killed)
    assert killed >= kills, "the sweep ended too early to be a test"
    check_whole(folder, record_property, trials=trials)
    states = {row["state"] for row in open_sweep(folder).rows("SELECT state FROM attempts")}
    assert states == {"ok", "lost"}


@pytest.mark.chaos
@pytest.mark.parametrize("seed", range(3))
def test_drivers_and_workers_that_are_killed_at_random_lose_nothing(
    place: Path, seed: int, record_property: Record
) -> None:
    folder, trials, drivers = place / f"drivers-{seed}", 100, 5
    chance = random.Random(100 + seed)
    write_numbers(folder, trials=trials, seconds=0.5)
    killed = 0
    driver = start(arguments(place, folder))
    for _ in range(drivers):
        wait_for_workers(driver)
        until = time.monotonic() + chance.uniform(0, 12)
        while time.monotonic() < until:
            killed += kill_workers(driver, chance, kills=1, seconds=2.0)
        record_property("driver_kills", int(kill_tree(driver)))
        if (folder / "sweep.json").exists():
            driver = start(["resume", str(folder), "--json"])
        else:
            driver = start(arguments(place, folder))
    see_to_the_end(driver, folder)
    record_property("worker_kills", killed)
    check_whole(folder, record_property, trials=trials)


def wait_for_workers(driver: Driver) -> None:
    wait_until(lambda: bool(workers_of(driver)), driver)


def wait_until(happened: Callable[[], bool], driver: Driver) -> None:
    deadline = time.monotonic() + 240
    while not happened() and driver.poll() is None:
        assert time.monotonic() < deadline, "the sweep did not get that far"
        time.sleep(0.05)


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[Cluster]:
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")  # unlike `ray start`, it looks for no token
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
    yield cluster
    cluster.shutdown()


@pytest.mark.chaos
def test_machines_that_go_away_and_come_back_cost_time_and_nothing_else(
    place: Path, cluster: Cluster, record_property: Record
) -> None:
    folder, trials, losses = place / "machines", 200, 4
    write_numbers(folder, trials=trials, seconds=0.5)
    chance = random.Random(7)
    nodes = [cluster.add_node(num_cpus=2) for _ in range(2)]
    address = ["--address", cluster.address]
    driver = start(arguments(place, folder, *address))
    for _ in range(losses):
        done = ended_trials(folder)
        wait_until(lambda done=done: ended_trials(folder) > done, driver)
        time.sleep(chance.uniform(0, 3))
        lost = nodes.pop(chance.randrange(2))
        cluster.remove_node(lost, allow_graceful=False)
        record_property("node_kills", int(driver.poll() is None))
        nodes.append(cluster.add_node(num_cpus=2))
    see_to_the_end(driver, folder, *address)
    check_whole(folder, record_property, trials=trials)
    reasons = open_sweep(folder).rows("SELECT reason FROM attempts WHERE state = 'lost'")
    assert reasons, "no pack was on a machine that went away"


def ended_trials(folder: Path) -> int:
    return len(list((folder / "tables" / "trials").glob("*.parquet")))


@pytest.mark.chaos
def test_rows_that_break_hang_or_kill_their_workers_take_no_other_along(
    place: Path, tmp_path: Path, record_property: Record
) -> None:
    folder = place / "faults"
    folder.with_suffix(".py").write_text(FAULTS.replace("PLACE", str(tmp_path)))
    patience = ["--set", "answer_seconds=8", "--set", "pack_seconds=8"]
    driver = start(arguments(place, folder, *patience))
    output, errors = driver.communicate(timeout=900)
    assert driver.returncode == 1, errors
    check_whole(folder, record_property, trials=27)
    found = {row["mode"]: row["state"] for row in open_sweep(folder).rows("SELECT mode, state FROM trials")}
    completed = {"ok", "kill once", "hang once", "freeze once", "twice"}
    assert {mode for mode, state in found.items() if state == "completed"} == completed
    assert found["oom"] == "infeasible"
    assert json.loads(output.splitlines()[-1])["failed"] == 9


@pytest.mark.chaos
def test_steering_ends_in_the_same_tables_whoever_was_killed(
    finished: dict[str, Any], place: Path, record_property: Record
) -> None:
    expected = results(place / "finished")
    folder = place / "steered"
    chance = random.Random(3)
    driver = start([*map(str, run_arguments(place, "steered", workers=2)), "--set", "max_attempts=1000"])
    for _ in range(3):
        wait_for_workers(driver)
        record_property("worker_kills", kill_workers(driver, chance, kills=2, seconds=3.0))
        record_property("driver_kills", int(kill_tree(driver)))
        driver = start(["resume", str(folder), "--json"])
    see_to_the_end(driver, folder)
    for what, number in toll(folder, trials=9).items():
        record_property(what, number)
    assert results(folder) == expected
    check_consistent(folder)


@pytest.mark.chaos
def test_a_real_model_says_the_same_whoever_was_killed(tmp_path: Path, record_property: Record) -> None:
    space = str(ROOT / "search_spaces" / "tone_grid.py")
    few = {"choices_select": 8, "choices_report": 4, "prompts_select": 2, "prompts_report": 1}
    settings = [text for name, number in few.items() for text in ("--set", f"space.{name}={number}")]
    command = ["run", space, *settings, "--trials", "6", "--json"]
    undisturbed = start([*command, "--out", str(tmp_path / "undisturbed")])
    see_to_the_end(undisturbed, tmp_path / "undisturbed")
    folder = tmp_path / "disturbed"
    driver = start([*command, "--out", str(folder), "--set", "max_attempts=1000"])
    wait_until(lambda: "dispatched" in ledger(folder), driver)
    record_property("worker_kills", kill_workers(driver, random.Random(5), kills=2, seconds=4.0))
    record_property("driver_kills", int(kill_tree(driver)))
    see_to_the_end(start(["resume", str(folder), "--json"]), folder)
    for what, number in toll(folder, trials=6).items():
        record_property(what, number)
    check_consistent(folder)
    query = "SELECT trial, spec, split, name, value FROM metrics ORDER BY ALL"
    expected, found = (open_sweep(tmp_path / name).rows(query) for name in ("undisturbed", "disturbed"))
    check_close(found, expected)


def ledger(folder: Path) -> str:
    path = folder / "ledger.jsonl"
    return path.read_text() if path.exists() else ""

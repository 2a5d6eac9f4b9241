"""Drivers that are killed at every boundary and between: what they leave is taken up, and nothing is lost."""

import multiprocessing
import os
import random
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from orchestrator import folder as folder_module
from orchestrator import worker as worker_module
from storage import compaction, manifest
from storage.mlflow_log import Mirror
from tests.chaos import BOUNDARIES, MLFLOW_BOUNDARIES, When, count_lines, kill_at, kill_at_line, toll
from tests.mirrored import commit, make_database, make_sweep, runs_of
from tests.sweeps import SCENARIOS, check_ended, drive_scenario, outcome_of, prepare

_MOST_KILLS = 12
"""Of one sweep."""


def seeds(quick: int, slow: int) -> list[Any]:
    """Seeds of `make test`, and more of `make chaos`."""
    return [*range(quick), *(pytest.param(seed, marks=pytest.mark.chaos) for seed in range(quick, slow))]


def killed(target: Callable[..., None], *arguments: Any) -> bool:
    """Run a function in a process of its own; whether it was killed before its end."""
    processes = multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload([__name__])
    process = processes.Process(target=target, args=arguments)
    process.start()
    process.join()
    assert process.exitcode in (0, -signal.SIGKILL)
    return process.exitcode != 0


def quick_start(folder: Path, name: str) -> None:
    """What dies here is a process, not a machine; a worker delivers row by row; few files are many."""
    os.fsync = lambda file: None
    worker_module._FLUSH_SECONDS = -1.0
    compaction.MANY = 3
    manifest.READ_SECONDS = -1.0
    folder_module.provenance = dict
    prepare(folder, SCENARIOS[name].space, workers=SCENARIOS[name].workers)


def drive_to_line(folder: Path, name: str, seed: int, line: int) -> None:
    quick_start(folder, name)
    kill_at_line(line)
    drive_scenario(folder, name, seed=seed)


def drive_to_boundary(folder: Path, name: str, boundary: str, call: int, when: When) -> None:
    quick_start(folder, name)
    kill_at(BOUNDARIES[boundary], call, when)
    drive_scenario(folder, name)


@pytest.fixture(autouse=True)
def _no_machine_dies(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda file: None)
    monkeypatch.setattr(folder_module, "provenance", dict)
    monkeypatch.setattr(worker_module, "_FLUSH_SECONDS", -1.0)
    monkeypatch.setattr(compaction, "MANY", 3)
    monkeypatch.setattr(manifest, "READ_SECONDS", -1.0)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[dict[str, Any], int]]:
    """Outcome of a scenario that nobody disturbs, and the lines that it takes."""
    kept: dict[str, tuple[dict[str, Any], int]] = {}

    def of(name: str) -> tuple[dict[str, Any], int]:
        if name not in kept:
            folder = tmp_path_factory.mktemp("undisturbed")
            lines = count_lines(lambda: drive_scenario(folder, name))
            kept[name] = outcome_of(folder), lines
        return kept[name]

    return of


def check_taken_up(folder: Path, name: str, expected: dict[str, Any], record: Callable[..., None]) -> None:
    """Take the sweep up, see it to its end, and compare."""
    drive_scenario(folder, name, seed=99)
    for what, number in toll(folder, trials=SCENARIOS[name].trials).items():
        record(what, number)
    check_ended(folder, SCENARIOS[name].space, trials=SCENARIOS[name].trials)
    assert outcome_of(folder) == expected


@pytest.mark.parametrize("seed", seeds(1, 10))
@pytest.mark.parametrize("name", SCENARIOS)
def test_a_driver_killed_at_any_line_again_and_again_ends_as_if_it_had_not_been(
    tmp_path: Path,
    name: str,
    seed: int,
    undisturbed: Callable[[str], tuple[dict[str, Any], int]],
    record_property: Callable[..., None],
) -> None:
    expected, lines = undisturbed(name)
    chance = random.Random(f"{name} {seed}")
    kills = 0
    # Less than half of the lines are run in every process: some make what is kept for the next.
    while kills < _MOST_KILLS and killed(
        drive_to_line, tmp_path, name, kills, chance.randrange(1, lines if kills else lines // 2)
    ):
        kills += 1
    record_property("driver_kills", kills)
    assert kills
    check_taken_up(tmp_path, name, expected, record_property)


@pytest.mark.parametrize("call", [1, *(pytest.param(call, marks=pytest.mark.chaos) for call in (2, 3, 5, 9))])
@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("boundary", BOUNDARIES)
def test_a_driver_killed_at_a_boundary_ends_as_if_it_had_not_been(
    tmp_path: Path,
    boundary: str,
    when: When,
    call: int,
    undisturbed: Callable[[str], tuple[dict[str, Any], int]],
    record_property: Callable[..., None],
) -> None:
    name = "prerequisites and failures"
    expected, _ = undisturbed(name)
    was_killed = killed(drive_to_boundary, tmp_path, name, boundary, call, when)
    assert was_killed or call > 1, "no sweep passes this boundary"
    record_property("driver_kills", int(was_killed))
    check_taken_up(tmp_path, name, expected, record_property)


@pytest.fixture(scope="module")
def database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_database(tmp_path_factory.mktemp("mlflow"))


def sweep_with_results(folder: Path, database: Path) -> Path:
    make_sweep(folder)
    shutil.copy(database, folder / "mlflow.db")
    for trial, state in enumerate(("completed", "infeasible", "failed", "completed")):
        commit(folder, trial, state, effect=1.0 + trial, effect__report=2.0 + trial)
    (folder / "report.html").write_text("a report")
    return folder


def mirror(folder: Path) -> None:
    writer = Mirror(folder)
    writer.sync()
    writer.finish([folder / "report.html"])


def mirror_to_boundary(folder: Path, boundary: str, call: int, when: When) -> None:
    kill_at(MLFLOW_BOUNDARIES[boundary], call, when)
    mirror(folder)


def shown_by_mlflow(folder: Path) -> dict[int | str, Any]:
    """What MLflow says of a sweep and its trials; fails if one is there twice."""
    parent, children = runs_of(folder)
    runs = {"sweep": parent, **children}
    varying = {"mlflow.parentRunId", "folder"}
    return {
        name: (
            run.info.status,
            run.data.params,
            run.data.metrics,
            {tag: text for tag, text in run.data.tags.items() if tag not in varying},
        )
        for name, run in runs.items()
    }


@pytest.fixture(scope="module")
def mirrored(tmp_path_factory: pytest.TempPathFactory, database: Path) -> dict[int | str, Any]:
    folder = sweep_with_results(tmp_path_factory.mktemp("mirrored") / "sweep", database)
    mirror(folder)
    return shown_by_mlflow(folder)


@pytest.mark.parametrize("call", [1, *(pytest.param(call, marks=pytest.mark.chaos) for call in (2, 3))])
@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("boundary", MLFLOW_BOUNDARIES)
def test_a_driver_killed_while_it_writes_to_mlflow_leaves_runs_that_the_next_one_completes(
    tmp_path: Path,
    boundary: str,
    when: When,
    call: int,
    database: Path,
    mirrored: dict[int | str, Any],
    record_property: Callable[..., None],
) -> None:
    folder = sweep_with_results(tmp_path / "sweep", database)
    was_killed = killed(mirror_to_boundary, folder, boundary, call, when)
    assert was_killed or call > 1, "no mirror passes this boundary"
    record_property("driver_kills", int(was_killed))
    mirror(folder)
    found = shown_by_mlflow(folder)
    record_property("zombies", sum(run[0] == "RUNNING" for run in found.values()))
    assert found == mirrored
    assert Mirror(folder).differences() == {}

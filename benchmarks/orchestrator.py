"""What a trial costs besides its job, here and in Ray Tune with the same sampler.

Run by `make bench-orchestrator`; writes `benchmarks/results/orchestrator.json`. Workload: a job that does
nothing, five parameters, two objectives, TPE of one seed, two workers on this machine, from the first
dispatch to the last result, everything kept: here study, Parquet and the MLflow mirror, in Ray Tune what it
keeps by itself. The scheduler is also run at a million trials, with simulated workers, and the fronts that
packs of proposals find are compared with Optuna's.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from typing import Any, TypeVar, cast

import numpy as np
import optuna
from optuna.distributions import FloatDistribution
from optuna.storages import JournalStorage
from optuna.storages.journal import BaseJournalBackend

from benchmarks import fronts
from benchmarks.machine import describe
from benchmarks.simulation import Simulation
from orchestrator.journal import Journal
from orchestrator.sampler import OptunaSampler
from orchestrator.space_file import load_space
from storage.query import open_sweep

Found = TypeVar("Found")
RESULTS = Path(__file__).parent / "results" / "orchestrator.json"
SPACE = Path(__file__).parent / "nothing_space.py"
UNEVEN = Path(__file__).parent / "uneven_space.py"
TRIALS = 300
ASKED = 10
POPULATION = 50
"""Of NSGA-II, as in Optuna."""
SAMPLED = (100, 1_000, 10_000, 100_000)
SWEEPS: dict[str, tuple[str, ...]] = {
    "tpe": (),
    "tpe, one by one": ("--set", "max_pack=1"),
    "nsga2": ("--set", "sampler=nsga2"),
    "random": ("--set", "sampler=random"),
}
SIMULATED = ((1_000, 1_000_000), (10_000, 1_000_000), (1_000, 100_000))


def bench_steersweep(place: Path, name: str, *settings: str) -> dict[str, float]:
    """Seconds a trial of a sweep, by its own tables, and until MLflow and the report had everything too."""
    folder = place / name
    _run(SPACE, folder, *settings)
    ended = time.time()
    sweep = open_sweep(folder)
    [times] = sweep.rows(
        "SELECT (SELECT min(started) FROM attempts) AS began, max(finished) AS ended, count(*) AS trials, "
        "(SELECT count(DISTINCT attempt) FROM attempts) AS packs FROM trials WHERE state = 'completed'"
    )
    assert times["trials"] == TRIALS, times
    seconds = times["ended"] - times["began"]
    return {
        "seconds_per_trial": seconds / TRIALS,
        "packs": times["packs"],
        "seconds_behind": ended - times["ended"],
    }


def _run(space: Path, folder: Path, *settings: str) -> None:
    command = [sys.executable, "-m", "orchestrator.cli", "run", str(space), "--out", str(folder), "--json"]
    subprocess.run([*command, *settings], check=True, capture_output=True, text=True)


def bench_busy(place: Path, name: str, *settings: str) -> dict[str, float]:
    """Share of their time that two workers are busy with trials of 0.05 to 1 s, until the queue is empty."""
    folder = place / name
    _run(UNEVEN, folder, *settings)
    packs = open_sweep(folder).rows(
        "SELECT min(started) AS began, max(finished) AS ended FROM attempts GROUP BY attempt"
    )
    first, last = min(pack["began"] for pack in packs), max(pack["began"] for pack in packs)
    end = max(pack["ended"] for pack in packs)
    before = sum(min(pack["ended"], last) - pack["began"] for pack in packs)
    whole = sum(pack["ended"] - pack["began"] for pack in packs)
    return {
        "to the last start": before / (2 * (last - first)),
        "to the last result": whole / (2 * (end - first)),
    }


def bench_sampler(trials: int) -> dict[str, float]:
    """Milliseconds that a proposal takes once so many trials have ended, alone or in packs of 16."""
    with tempfile.TemporaryDirectory() as folder:
        found = {}
        for name in ("tpe", "nsga2"):
            sampler = _long_study(Path(folder) / name, name, trials)
            found[f"{name}, 1"] = _per_proposal(sampler, 1)
            found[f"{name}, 16"] = _per_proposal(sampler, 16)
            found[f"{name}, 16 that share one"] = _per_proposal(sampler, 16, shared=("a",))
    return found


def _per_proposal(sampler: OptunaSampler, count: int, *, shared: Sequence[str] = ()) -> float:
    sampler.ask_together(count, shared)
    began = time.perf_counter()
    for _ in range(ASKED):
        sampler.ask_together(count, shared)
    return 1e3 * (time.perf_counter() - began) / (ASKED * count)


def _long_study(path: Path, name: str, trials: int) -> OptunaSampler:
    """A sampler whose study has so many trials, in generations as NSGA-II makes them."""
    space = load_space(SPACE).space
    journal = Journal(path)
    directions = [objective.direction for objective in space.objectives]
    storage = JournalStorage(cast(BaseJournalBackend, journal))
    study = optuna.create_study(storage=storage, study_name="study", directions=directions)
    points = np.random.default_rng(0).uniform(size=(trials, 5))
    for number, point in enumerate(points):
        generation = number // POPULATION
        study.add_trial(
            optuna.trial.create_trial(
                params=dict(zip("abcde", point.tolist(), strict=True)),
                distributions={name: FloatDistribution(0.0, 1.0) for name in "abcde"},
                values=[float(point[:3].sum()), float(point[3] - point[4])],
                system_attrs={"NSGAIISampler:generation": generation},
            )
        )
        if number % POPULATION == POPULATION - 1:
            parents = list(range(number + 1 - POPULATION, number + 1))
            key = f"NSGAIISampler:parent:{generation + 1}"
            study._storage.set_study_system_attr(study._study_id, key, parents)
    journal.flush()
    return OptunaSampler(space, name=name, seed=0, journal=path, study="study")


def bench_memory() -> dict[str, float]:
    """What a driver keeps for each trial, from a process of its own."""
    command = [sys.executable, "-m", "benchmarks.driver_memory"]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    found: dict[str, float] = json.loads(done.stdout)
    return found


def bench_ray_tune(place: Path, name: str, *, reuse: bool) -> float:
    """Seconds a trial of Ray Tune, in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.ray_tune", str(place / name), str(TRIALS)]
    command += ["--reuse"] if reuse else []
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return float(done.stdout.splitlines()[-1]) / TRIALS


def shown(name: str, found: Found) -> Found:
    """Print what was measured, and give it back."""
    sys.stdout.write(f"{name}: {json.dumps(found)}\n")
    sys.stdout.flush()
    return found


def main(arguments: Sequence[str]) -> None:
    """Time everything, print it and write it."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.orchestrator", description=__doc__)
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument(
        "--only-simulated", action="store_true", help="print the simulations and write nothing"
    )
    options = parser.parse_args(arguments)
    simulated = [
        shown("simulated", Simulation(workers=workers, trials=trials).run()._asdict())
        for workers, trials in SIMULATED
    ]
    if options.only_simulated:
        return
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        ours = {
            name: shown(name, bench_steersweep(place, name, *settings)) for name, settings in SWEEPS.items()
        }
        busy = {
            "packs of up to 16": shown("busy", bench_busy(place, "packed-uneven")),
            "one by one": shown("busy, one by one", bench_busy(place, "uneven", "--set", "max_pack=1")),
        }
        reuse = shown("Ray Tune, reuse", bench_ray_tune(place, "reuse", reuse=True))
        fresh = shown("Ray Tune", bench_ray_tune(place, "fresh", reuse=False))
    result: dict[str, Any] = {
        "machine": describe(),
        "date": date.today().isoformat(),
        "trials": TRIALS,
        "seconds_per_trial": ours["tpe"]["seconds_per_trial"],
        "steersweep": ours,
        "ray_tune_seconds_per_trial": fresh,
        "ray_tune_reuse_seconds_per_trial": reuse,
        "ratio_reuse": reuse / ours["tpe"]["seconds_per_trial"],
        **shown("memory", bench_memory()),
        "busy": busy,
        "milliseconds_per_proposal": {
            str(trials): shown(f"proposals after {trials}", bench_sampler(trials)) for trials in SAMPLED
        },
        "hypervolume": shown("hypervolume", fronts.measure()),
        "simulated": simulated,
        "simulated_trials": max(each["trials"] for each in simulated),
        "simulated_utilisation": min(each["utilisation"] for each in simulated),
        "decisions_per_second": min(each["decisions_per_second"] for each in simulated),
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])

"""What a sweep would take: counted on its proposals, timed on its model, refused if it cannot fit."""

import importlib
import math
import os
import shutil
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from jobs.errors import DoesNotFit
from jobs.spec import ModelRef
from orchestrator.config import RunConfig
from orchestrator.models import varied_models
from orchestrator.planning import Planner, planned_trials
from orchestrator.probe import Measured, Pace, measure
from orchestrator.space_file import check_space
from orchestrator.workload import Work, workload
from search_spaces.base import Space

_GIB = 2**30


def make_plan(
    space: Space,
    config: RunConfig,
    *,
    out: Path,
    seconds: float,
    elsewhere: Callable[[Callable[[], Any]], Any] | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Count what a sweep would compute, time a little of it, and say what all of it would take.

    Args:
        space: What would be tried.
        config: How it would be run.
        out: Where its folder would be.
        seconds: How long to measure, if one trial takes no longer.
        elsewhere: Calls a function on a machine like those of the workers; None calls it here.
        say: Called with a line on what is about to be run.

    Returns:
        trials; packs; prerequisites, job -> number of specs; tokens, as the jobs' `size` counts them;
        workers; hours, with all workers at work, and worker_hours; trials_in_budget, how many `budget_hours`
        and `budget_disk_gib` are enough for (None without both); weights_gib and peak_gib of a worker;
        disk_gib, tables and artifacts, and free_disk_gib; device; loading_seconds; measured, job -> `Pace`;
        retention, whose artifacts and activations stay at the end.

    Raises:
        DoesNotFit: If a worker's weights, or one trial, do not fit into memory, or the results on the disk.
        SteersweepError: If the space or the model is wrong, or the trial that was measured fails.
    """
    config = config.pinned()
    models = varied_models(space, config)
    for model in models:
        check_space(space, model)
    trials = planned_trials(space, config)
    works, packs = workload(space, config, trials)
    workers = config.workers if elsewhere is None else 1
    first = [job for job, work in works.items() if work.first]
    say(f"measuring one trial{', and before it ' if first else ''}{', '.join(first)}")
    act = partial(measure_if_it_fits, Planner(space, config), packs, config, models, seconds, workers=workers)
    weights, measured = act() if elsewhere is None else elsewhere(act)
    found = _plan(config, trials, works, weights, measured, _free_disk(out))
    return {**found, "retention": space.retention}


def measure_if_it_fits(
    planner: Planner,
    packs: Sequence[Any],
    config: RunConfig,
    models: Sequence[ModelRef],
    seconds: float,
    *,
    workers: int,
) -> tuple[int, Measured]:
    """The most that a model's weights take on a worker, bytes, and what `measure` says.

    Args:
        planner: As for `measure`; so are packs, config and seconds.
        packs: See there.
        config: See there.
        models: All weights that trials run on.
        seconds: See there.
        workers: How many share this machine.

    Raises:
        DoesNotFit: If the weights and what a worker keeps are more than the machine has.
        SteersweepError: As `measure`.
    """
    loading = importlib.import_module("jobs.engine.loading")
    weights = max(loading.weight_bytes(model) for model in models)
    if config.gpus_per_worker == 0:
        kept = config.memory or loading.cpu_memory()
        has = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        _check_memory("this machine has", weights, kept, has, workers)
    elif (cuda := importlib.import_module("torch").cuda).is_available():
        total = cuda.get_device_properties(0).total_memory
        _check_memory("its GPUs have", weights, config.memory or 0, int(total * config.gpus_per_worker), 1)
    return weights, measure(planner, packs, config, seconds)


def _check_memory(where: str, weights: int, kept: int, has: int, workers: int) -> None:
    if workers * (weights + kept) > has:
        raise DoesNotFit(
            f"{workers} workers with weights of {weights / _GIB:.2f} GiB and {kept / _GIB:.2f} GiB for what "
            f"they keep need {workers * (weights + kept) / _GIB:.2f} GiB, and {where} {has / _GIB:.2f}; give "
            "fewer workers, less memory_gib, a smaller dtype or a smaller model"
        )


def _free_disk(out: Path) -> int:
    place = out.absolute()
    while not place.exists():
        place = place.parent
    return shutil.disk_usage(place).free


def _plan(
    config: RunConfig,
    trials: int,
    works: dict[str, Work],
    weights: int,
    measured: Measured,
    free_disk: int,
) -> dict[str, Any]:
    seconds = sum(_seconds(work, _pace(job, measured)) for job, work in works.items())
    disk = sum(work.specs * _pace(job, measured).row_bytes for job, work in works.items())
    if min(disk, (config.budget_disk_gib or math.inf) * _GIB) > free_disk:
        raise DoesNotFit(
            f"tables and artifacts of {trials} trials take about {disk / _GIB:.1f} GiB, and "
            f"{free_disk / _GIB:.1f} are free; give another --out, fewer trials, or a job that keeps less"
        )
    worker_hours = seconds / 3600
    hours = measured.loading_seconds / 3600 + worker_hours / config.workers
    shares = [
        limit / needed
        for limit, needed in ((config.budget_hours, hours), (config.budget_disk_gib, disk / _GIB))
        if limit is not None and needed
    ]
    return {
        "trials": trials,
        "packs": round(sum(work.packs for work in works.values())),
        "prerequisites": {job: round(work.first) for job, work in works.items() if work.first},
        "tokens": round(sum(work.tokens for work in works.values())),
        "workers": config.workers,
        "hours": hours,
        "worker_hours": worker_hours,
        "trials_in_budget": int(trials * min(1.0, *shares)) if shares else None,
        "weights_gib": weights / _GIB,
        "peak_gib": measured.peak_bytes / _GIB,
        "disk_gib": disk / _GIB,
        "free_disk_gib": free_disk / _GIB,
        "device": measured.device,
        "loading_seconds": measured.loading_seconds,
        "measured": {job: pace._asdict() for job, pace in measured.paces.items()},
    }


def _pace(job: str, measured: Measured) -> Pace:
    """What was measured of a job, or else the mean of what was."""
    paces = list(measured.paces.values())
    mean = Pace(
        0,
        sum(pace.pack_seconds for pace in paces) / len(paces),
        sum(pace.token_seconds for pace in paces) / len(paces),
        sum(pace.row_bytes for pace in paces) / len(paces),
    )
    return measured.paces.get(job, mean)


def _seconds(work: Work, pace: Pace) -> float:
    return work.packs * pace.pack_seconds + work.tokens * pace.token_seconds

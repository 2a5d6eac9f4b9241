"""Put a sweep together and see it through: folder, study, pool, mirror, report."""

import dataclasses
import time
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from rich.console import Console

from jobs.errors import SpecError
from orchestrator.config import RunConfig, make_config
from orchestrator.folder import check_free, claimed
from orchestrator.interrupts import Interrupts, stoppable
from orchestrator.planning import Planner, check_unchanged
from orchestrator.progress import ConsoleProgress
from orchestrator.ray_pool import RayPool, connected
from orchestrator.report import write_report
from orchestrator.sampler import OptunaSampler
from orchestrator.space_file import SpaceFile, check_space, grid_size, load_space, with_absolute_data
from orchestrator.sweep import Sweep
from search_spaces.base import Space
from storage.background_mirror import BackgroundMirror
from storage.ledger import read_asked
from storage.pareto import pareto
from storage.query import StoredSweep, open_sweep, read_identity


def run_sweep(
    file: SpaceFile, folder: Path, config: RunConfig, *, address: str | None, console: Console
) -> dict[str, Any]:
    """Run a sweep in its folder, from the beginning or from where it was left.

    Returns:
        sweep, trials, completed, infeasible, failed, seconds and pareto.

    Raises:
        SteersweepError: If the space, the folder, the model or the address is wrong.
    """
    started = time.monotonic()
    check_space(file.space, config.model_ref)
    trials = planned_trials(file.space, config)
    folder = folder.resolve()
    check_free(folder, file, config)
    with ExitStack() as stack:
        if address is not None:
            stack.enter_context(connected(config, address))
        stack.enter_context(claimed(folder, file, config))
        sweep = open_sweep(folder)
        if _ended(sweep.counts()) < trials or not (folder / "report" / "index.html").is_file():
            check_unchanged(Planner(file.space, config), read_asked(folder))
            if address is None:
                stack.enter_context(connected(config, None))
            interrupts = stack.enter_context(stoppable())
            _drive(file.space, sweep, config, trials, console, interrupts)
    counts = sweep.counts()
    return {
        "sweep": sweep.identity["sweep"],
        "trials": trials,
        **{state: counts[state] for state in _ENDS},
        "seconds": round(time.monotonic() - started, 1),
        "pareto": pareto(sweep),
    }


_ENDS = ("completed", "infeasible", "failed")


def _ended(counts: Mapping[str, int]) -> int:
    return sum(counts[state] for state in _ENDS)


def _drive(
    space: Space,
    stored: StoredSweep,
    config: RunConfig,
    trials: int,
    console: Console,
    interrupts: Interrupts,
) -> None:
    folder = stored.folder
    sampler = OptunaSampler(
        space,
        name=config.sampler or space.sampler,
        seed=config.seed,
        journal=folder / "optuna.journal",
        study=stored.identity["sweep"],
    )
    pool = RayPool(folder, config)
    mirror = BackgroundMirror(folder, config.mlflow)
    kept: list[Path] = []
    is_complete = False
    try:
        with ConsoleProgress(console) as progress:
            sweep = Sweep(
                folder,
                space=space,
                config=config,
                trials=trials,
                sampler=sampler,
                pool=pool,
                progress=progress,
                on_result=mirror.notify,
                check_stop=interrupts.check,
            )
            sweep.run()
        is_complete = True
        pool.close()
        report = write_report(folder)
        kept = [report, *sorted(report.parent.glob("*.png"))]
    finally:
        pool.close()
        mirror.close(kept, timeout_seconds=120 if is_complete else 5, is_complete=is_complete)


def planned_trials(space: Space, config: RunConfig) -> int:
    """Number of trials that the sweep will have had in the end.

    Raises:
        SpecError: If a sampler that never ends was given no number.
    """
    wanted = config.trials or space.trials
    if (config.sampler or space.sampler) == "grid":
        size = grid_size(space)
        return size if wanted is None else min(size, wanted)
    if wanted is None:
        raise SpecError(f"sampler {config.sampler!r} needs a number of trials; give --trials N")
    return wanted


def load_kept(folder: Path) -> tuple[SpaceFile, RunConfig]:
    """The space and configuration that a folder's sweep was started with. Raises SpecError if it has none."""
    identity = read_identity(folder)
    file = load_space(folder / "space.py", origin=Path(identity["space_file"]))
    space = dataclasses.replace(file.space, fixed=identity["fixed"])
    space = with_absolute_data(space, Path(identity["directory"]))
    return file._replace(space=space), make_config(**identity["config"])

"""Put a sweep together and see it through: folder, study, pool, mirror, report."""

import dataclasses
import time
from pathlib import Path
from typing import Any

from rich.console import Console

from jobs.errors import SpecError
from orchestrator.config import RunConfig, make_config
from orchestrator.folder import claim, driving
from orchestrator.progress import ConsoleProgress, Tally
from orchestrator.ray_pool import RayPool
from orchestrator.report import write_report
from orchestrator.sampler import OptunaSampler
from orchestrator.space_file import SpaceFile, check_space, grid_size, load_space
from orchestrator.sweep import Sweep
from search_spaces.base import Space
from storage.mlflow_log import BackgroundMirror
from storage.pareto import pareto
from storage.query import open_sweep

def run_sweep(file: SpaceFile, folder: Path, config: RunConfig, *, address: str | None, console: Console) -> dict[str, Any]:
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
    identity = claim(folder, file, config)
    with driving(folder):
        tally = _drive(file.space, folder, config, identity, trials, address, console)
    found = pareto(open_sweep(folder))
    return {
        "sweep": identity["sweep"],
        "trials": trials,
        "completed": tally.completed,
        "infeasible": tally.infeasible,
        "failed": tally.failed,
        "seconds": round(time.monotonic() - started, 1),
        "pareto": found,
    }


def _drive(
    space: Space,
    folder: Path,
    config: RunConfig,
    identity: dict[str, Any],
    trials: int,
    address: str | None,
    console: Console,
) -> Tally:
    sampler = OptunaSampler(
        space,
        name=config.sampler or space.sampler,
        seed=config.seed,
        journal=folder / "optuna.journal",
        study=identity["sweep"],
    )
    pool = RayPool(folder, config, address=address)
    mirror = BackgroundMirror(folder)
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
            )
            tally = sweep.run()
    finally:
        pool.close()
    report = write_report(folder)
    mirror.close([report, *sorted(report.parent.glob("*.png"))], timeout_seconds=120)
    return tally


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
    """The space and the configuration that a folder's sweep was started with. Raises SpecError if it has none."""
    identity = open_sweep(folder).identity
    file = load_space(folder / "space.py")
    space = dataclasses.replace(file.space, fixed=identity["fixed"])
    return file._replace(space=space, name=identity["space"]), make_config(**identity["config"])

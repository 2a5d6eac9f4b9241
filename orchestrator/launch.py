"""Put a sweep together and see it through: folder, study, pool, mirror, report."""

import dataclasses
import time
from pathlib import Path
from typing import Any

from rich.console import Console

from jobs.errors import SpecError
from orchestrator.config import RunConfig, make_config
from orchestrator.folder import claim, driving
from orchestrator.progress import ConsoleProgress
from orchestrator.ray_pool import RayPool, check_address
from orchestrator.report import write_report
from orchestrator.sampler import OptunaSampler
from orchestrator.space_file import SpaceFile, check_space, grid_size, load_space
from orchestrator.sweep import Sweep
from search_spaces.base import Space
from storage.mlflow_log import BackgroundMirror
from storage.pareto import pareto
from storage.query import Sweep as StoredSweep
from storage.query import open_sweep


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
    if address is not None:
        check_address(address)
    folder = folder.resolve()
    claim(folder, file, config)
    with driving(folder):
        sweep = open_sweep(folder)
        if sum(_ended(sweep).values()) < trials or not (folder / "report" / "index.html").is_file():
            _drive(file.space, sweep, config, trials, address, console)
    ended = _ended(sweep)
    return {
        "sweep": sweep.identity["sweep"],
        "trials": trials,
        **{state: ended.get(state, 0) for state in ("completed", "infeasible", "failed")},
        "seconds": round(time.monotonic() - started, 1),
        "pareto": pareto(sweep),
    }


def _ended(sweep: StoredSweep) -> dict[str, int]:
    """State -> number of trials that have ended in it."""
    counted = sweep.rows("SELECT state, count(*) AS trials FROM trials GROUP BY state")
    return {row["state"]: row["trials"] for row in counted if row["state"] not in ("waiting", "running")}


def _drive(
    space: Space, stored: StoredSweep, config: RunConfig, trials: int, address: str | None, console: Console
) -> None:
    folder = stored.folder
    sampler = OptunaSampler(
        space,
        name=config.sampler or space.sampler,
        seed=config.seed,
        journal=folder / "optuna.journal",
        study=stored.identity["sweep"],
    )
    pool = RayPool(folder, config, address=address)
    mirror = BackgroundMirror(folder)
    kept: list[Path] = []
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
            sweep.run()
        pool.close()
        report = write_report(folder)
        kept = [report, *sorted(report.parent.glob("*.png"))]
    finally:
        pool.close()
        mirror.close(kept, timeout_seconds=120 if kept else 5)


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
    identity = open_sweep(folder).identity
    file = load_space(folder / "space.py")
    space = dataclasses.replace(file.space, fixed=identity["fixed"])
    return file._replace(space=space, name=identity["space"]), make_config(**identity["config"])

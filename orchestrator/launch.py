"""Put a sweep together and see it through: folder, study, pool, mirror, report."""

import time
from collections.abc import Sequence
from contextlib import ExitStack, closing
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

from jobs.resolve import shipped_packages
from jobs.spec import ModelRef
from orchestrator.config import RunConfig
from orchestrator.folder import check_free, claimed
from orchestrator.garbage import collect_garbage
from orchestrator.interrupts import Interrupts, stoppable
from orchestrator.mirroring import write_pages
from orchestrator.models import varied_models
from orchestrator.planning import Planner, check_unchanged, planned_trials
from orchestrator.progress import ConsoleProgress
from orchestrator.ray_cluster import connected
from orchestrator.ray_pool import RayPool
from orchestrator.reopening import open_sampler
from orchestrator.space_file import SpaceFile, check_space
from orchestrator.study import open_database
from orchestrator.sweep import Sweep
from search_spaces.base import Space
from storage.background_mirror import BackgroundMirror
from storage.backup import Backup
from storage.donors import Donors
from storage.ledger import read_comparable
from storage.pareto import pareto
from storage.parquet import warm_up
from storage.query import StoredSweep, open_sweep
from storage.remote import Remote, sweep_uri


def run_sweep(
    file: SpaceFile,
    folder: Path,
    config: RunConfig,
    *,
    reuse: Sequence[Path],
    address: str | None,
    console: Console,
) -> dict[str, Any]:
    """Run a sweep in its folder, from the beginning or from where it was left.

    Args:
        file: What to try.
        folder: The sweep's folder.
        config: How to run it.
        reuse: Folders of other sweeps, whose artifacts are taken where this one requires the same work.
        address: Of a running Ray head; None starts one.
        console: For progress.

    Returns:
        sweep, trials, completed, infeasible, failed, seconds and pareto; stopped, why not all trials ran, or
        None; reasons, one row for each distinct state and reason of trials that were infeasible or failed,
        with their number, most frequent first.

    Raises:
        SteersweepError: If the space, the folder, the model or the address is wrong.
    """
    started = time.monotonic()
    config = config.pinned()
    models = varied_models(file.space, config)
    for model in models:
        check_space(file.space, model)
    trials = planned_trials(file.space, config)
    folder = folder.resolve()
    check_free(folder, file, config)
    is_over = _is_over(folder, trials)
    donors = Donors(
        () if is_over else reuse,
        say=partial(console.print, "reuse:", markup=False, highlight=False, soft_wrap=True),
    )
    if not is_over:
        if config.storage is not None:
            open_database(config.storage)  # before the folder is made
        check_unchanged(Planner(file.space, config), read_comparable(folder))
    stopped = ""
    with ExitStack() as stack:
        if not is_over:
            stack.enter_context(connected(config, address, shipped_packages(file.space.job)))
        stack.enter_context(claimed(folder, file, config))
        sweep = open_sweep(folder)
        if is_over:  # the last driver may have died before this
            _collect(file.space, sweep, trials)
        if is_over and config.results:  # the last copy may have failed
            Backup(folder, Remote(sweep_uri(config.results, sweep.identity["sweep"]))).close()
        if not is_over:
            interrupts = stack.enter_context(stoppable())
            loaded = models[0] if len(models) == 1 else None
            stopped = _drive(file.space, sweep, config, trials, donors, loaded, console, interrupts)
    counts = sweep.counts()
    return {
        "sweep": sweep.identity["sweep"],
        "trials": trials,
        **{state: counts[state] for state in _ENDS},
        "stopped": stopped or None,
        "seconds": round(time.monotonic() - started, 1),
        "pareto": pareto(sweep),
        "reasons": sweep.rows(
            "SELECT state, reason, count(*) AS trials FROM trials WHERE state IN ('infeasible', 'failed') "
            "GROUP BY ALL ORDER BY trials DESC, min(trial)"
        ),
    }


_ENDS = ("completed", "infeasible", "failed")


def _is_over(folder: Path, trials: int) -> bool:
    """Whether all trials of a folder's sweep have ended and its report is there."""
    if not (folder / "report" / "index.html").is_file():
        return False
    return open_sweep(folder).has_ended(trials)


def _drive(
    space: Space,
    stored: StoredSweep,
    config: RunConfig,
    trials: int,
    donors: Donors,
    loaded: ModelRef | None,
    console: Console,
    interrupts: Interrupts,
) -> str:
    """Drive a sweep; gives why it was stopped before its end, "" if it was not."""
    folder = stored.folder
    sampler = open_sampler(folder, space, config)
    remote_uri = config.results and sweep_uri(config.results, stored.identity["sweep"])
    remote = Remote(remote_uri) if remote_uri else None
    pages: list[Path] = []
    with ExitStack() as stack:
        if remote is not None:
            stack.enter_context(closing(Backup(folder, remote)))
        pool = stack.enter_context(closing(RayPool(folder, config, loaded, remote_uri)))
        warm_up()
        mirror = BackgroundMirror(folder, config.mlflow, watches_machine=config.system_metrics)
        try:
            with ConsoleProgress(console) as progress:
                sweep = Sweep(
                    folder,
                    space=space,
                    config=config,
                    trials=trials,
                    sampler=sampler,
                    pool=pool,
                    donors=donors,
                    progress=progress,
                    on_result=mirror.notify,
                    is_asked_to_stop=interrupts.is_asked_to_stop,
                    remote=remote,
                )
                tally = sweep.run()
            if interrupts.is_asked_to_stop() and tally.done < trials:
                raise KeyboardInterrupt
            pool.close()
            pages = write_pages(folder)
        finally:
            pool.close()
            mirror.close(
                pages,
                timeout_seconds=120 if pages else 5,
                is_complete=bool(pages) and stored.has_ended(trials),
            )
        _collect(space, stored, trials)
    return "" if tally.done == trials else tally.stopping


def _collect(space: Space, sweep: StoredSweep, trials: int) -> None:
    """Remove what the space's retention does not keep, once all trials have ended."""
    if space.retention != "all" and sweep.has_ended(trials):
        collect_garbage(sweep.folder, space.retention)

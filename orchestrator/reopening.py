"""A sweep's folder, opened to go on with: what it was started with, its sampler, what runs again."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jobs.errors import SpecError
from jobs.spec import Status
from orchestrator.config import RunConfig, make_config
from orchestrator.planning import Planner
from orchestrator.results import event_row
from orchestrator.sampler import OptunaSampler
from orchestrator.space_file import SpaceFile, load_space
from search_spaces.base import Grid, Space
from storage.durable import StoreError
from storage.ledger import Ledger, read_asked, read_comparable
from storage.lock import driving
from storage.query import read_identity
from storage.store import Store


def open_sampler(folder: Path, space: Space, config: RunConfig) -> OptunaSampler:
    """The sampler of a folder's sweep, with what it was asked and told."""
    return OptunaSampler(
        space,
        name=config.sampler or space.sampler,
        seed=config.seed,
        journal=journal_path(folder),
        study=read_identity(folder)["sweep"],
        storage=config.storage,
    )


def journal_path(folder: Path) -> Path:
    """File of a sweep's study."""
    return folder / "optuna.journal"


def withdraw_failed(folder: Path, space: Space, config: RunConfig, trials: Sequence[int] | None) -> int:
    """Let failed results of a sweep not count any more: `run_sweep` computes them again.

    Args:
        folder: The sweep's folder.
        space: What is tried.
        config: How it is run.
        trials: Which ones; None = all. What other specs such as prerequisites have failed goes with them.

    Returns:
        How many results that is, those of prerequisites included.

    Raises:
        SpecError: If one of the trials has not failed, or somebody drives the sweep.
    """
    with driving(folder):
        store = Store(folder)
        specs = {row["trial"]: row["spec"] for row in store.rows("trials")}
        failed = {spec for spec, result in store.results.items() if result.status == Status.FAILED}
        if wrong := [trial for trial in trials or () if specs.get(trial) not in failed]:
            raise SpecError(
                f"trials {wrong} have not failed; `steersweep status {folder}` names those that have"
            )
        kept = set() if trials is None else set(specs.values()) - {specs[trial] for trial in trials}
        if again := sorted(failed - kept):
            # Those from before changes were accepted are meant as all others are now.
            comparable = {asked.trial for asked in read_comparable(folder)}
            planner = Planner(space, config)
            older = [each for each in read_asked(folder) if each.spec.id in again]
            if meant := [planner.meant(each) for each in older if each.trial not in comparable]:
                Ledger(folder).asked_again(meant)
            store.withdraw(again)
            store.commit([], events=[event_row("tried again", f"{len(again)} results that failed")])
            (folder / "report" / "index.html").unlink(missing_ok=True)
    return len(again)


def load_kept(folder: Path, **changes: Any) -> tuple[SpaceFile, RunConfig]:
    """The space and configuration that a folder's sweep was started with.

    Args:
        folder: The sweep's folder.
        changes: Fields of the configuration to take instead.

    Raises:
        SpecError: If the folder holds no sweep, or a change is no field.
        StoreError: If its `sweep.json` is not what was written.
    """
    identity = read_identity(folder)
    if missing := {"space_file", "fixed", "config"} - identity.keys():
        raise StoreError(f"{folder / 'sweep.json'} is not what was written: it lacks {sorted(missing)}")
    file = load_space(folder / "space.py", origin=Path(identity["space_file"]))
    # The paths of datasets as they were found then, whatever files there are now.
    grids = {name: Grid(values) for name, values in identity.get("data_grids", {}).items()}
    parameters = {**file.space.parameters, **grids}
    space = dataclasses.replace(file.space, fixed=identity["fixed"], parameters=parameters)
    return file._replace(space=space), make_config(**identity["config"] | changes)

"""A sweep that goes on with another space, configuration or code than it was started with."""

import json
from pathlib import Path

from jobs.errors import SpecError
from orchestrator.config import RunConfig
from orchestrator.folder import differences, identify
from orchestrator.planning import Planner, check_unchanged, planned_trials
from orchestrator.reopening import load_kept, open_sampler
from orchestrator.space_file import SpaceFile
from storage.durable import publish
from storage.ledger import Ledger, read_asked, read_comparable
from storage.lock import driving
from storage.query import read_identity
from storage.store import Store


def accept_changes(folder: Path, file: SpaceFile, config: RunConfig) -> None:
    """Let a sweep be what its space, its configuration and the code say now.

    Trials that have ended count as they are. Those that have not are computed as they are meant now. What has
    changed is added to `changes` in `sweep.json`.

    Args:
        folder: The sweep's folder; nothing happens if it holds no sweep yet.
        file: What to try from now on.
        config: How to run it from now on.

    Raises:
        SpecError: If the job, the parameters' values or the sampler are others: old and new trials would not
            be of one study. Or if another process drives the sweep.
    """
    if not (folder / "sweep.json").is_file():
        return
    config = config.pinned()
    with driving(folder):
        identity, wanted = read_identity(folder), identify(file, config)
        old, old_config = load_kept(folder)
        _check_same_study(old, old_config, file, config)
        planner, asked = Planner(file.space, config), read_asked(folder)
        changes = differences(identity, wanted) or _changed_work(planner, folder)
        if not changes:
            return
        if (fewer := planned_trials(file.space, config)) < len(asked):
            raise SpecError(f"{fewer} trials: {len(asked)} were asked for already; give more")
        ended = {row["trial"] for row in Store(folder).rows("trials")}
        meant = [planner.meant(trial) for trial in asked if trial.trial not in ended]
        # In this order: a death in between leaves a sweep that asks for the changes to be accepted again.
        Ledger(folder).changes_accepted(changes, meant)
        open_sampler(folder, old.space, old_config).forget()  # it is written anew, with the objectives of now
        kept = {**wanted, "sweep": identity["sweep"], "changes": [*identity.get("changes", ()), changes]}
        (folder / "report" / "index.html").unlink(missing_ok=True)  # it says what the objectives were
        publish(folder / "space.py", file.source.encode())
        publish(folder / "sweep.json", json.dumps(kept, indent=1).encode())


def _changed_work(planner: Planner, folder: Path) -> str:
    try:
        check_unchanged(planner, read_comparable(folder))
    except SpecError:
        return "code or data"
    return ""


def _check_same_study(old: SpaceFile, old_config: RunConfig, new: SpaceFile, config: RunConfig) -> None:
    was, now = old.space, new.space
    samplers = [(each.sampler or space.sampler) for each, space in ((old_config, was), (config, now))]
    changed = [
        *(["the job"] if was.job != now.job else []),
        *(
            f"parameter {name}"
            for name in sorted({*was.parameters, *now.parameters})
            if was.parameters.get(name) != now.parameters.get(name)
        ),
        *(["the sampler"] if samplers[0] != samplers[1] else []),
    ]
    if changed:
        raise SpecError(
            f"{', '.join(changed)} changed: old and new trials would not be of one study; start another "
            "sweep with --out, and give --reuse for what this one has stored"
        )

"""A sweep's folder: who it belongs to and what it was started with."""

import dataclasses
import hashlib
import itertools
import json
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from jobs.errors import SpecError
from jobs.resolve import load_job
from jobs.spec import UNSTEERED
from orchestrator.config import RunConfig, make_config
from orchestrator.planning import planned_trials
from orchestrator.provenance import provenance
from orchestrator.space_file import SpaceFile, column_types, data_grids
from search_spaces.base import Space
from storage.durable import StoreError, publish
from storage.ledger import read_asked
from storage.lock import driver, driving
from storage.query import read_identity

_STARTED_WITH = ("space", "source", "fixed", "config")
_MAY_CHANGE = (
    *("workers", "cpus_per_worker", "gpus_per_worker", "memory_gib", "max_attempts"),
    *("resources", "labels", "loads_at_once", "wait_seconds", "answer_seconds", "pack_seconds"),
    *("budget_hours", "budget_device_hours", "budget_disk_gib", "least_gain", "results", "system_metrics"),
)
"""Fields of the configuration that say who computes, and nothing of what."""


def identify(file: SpaceFile, config: RunConfig) -> dict[str, Any]:
    """What `sweep.json` says of a sweep, as plain JSON."""
    space = file.space
    identity = {
        "sweep": f"{file.name}-{uuid.uuid4().hex[:8]}",
        "space": file.name,
        "source": hashlib.sha256(file.source.encode()).hexdigest(),
        "fixed": dict(space.fixed),
        "config": config.model_dump(),
        "space_file": str(file.path.resolve()),
        "data_grids": data_grids(space),
        "description": space.description,
        "job": space.job,
        "parameters": column_types(space),
        "objectives": [dataclasses.asdict(objective) for objective in space.objectives],
        "metrics": {name: metric._asdict() for name, metric in load_job(space.job).METRICS.items()},
        "control": getattr(load_job(space.job), "CONTROL", UNSTEERED),
        "trials": planned_trials(space, config),
        "model": dataclasses.asdict(config.model_ref),
        "seed": config.seed,
        "provenance": provenance(),
    }
    plain: dict[str, Any] = json.loads(json.dumps(identity))
    return plain


def check_free(folder: Path, file: SpaceFile, config: RunConfig) -> None:
    """Raises SpecError if the folder holds another sweep or anything else; writes nothing."""
    _recognise(folder, file, identify(file, config))


@contextmanager
def claimed(folder: Path, file: SpaceFile, config: RunConfig) -> Iterator[None]:
    """Inside the block the folder is the sweep's, made or found, and this process its only driver.

    Raises:
        SpecError: If the folder holds another sweep or anything else, is driven by another process,
            or cannot be written; what was made on the way is removed.
    """
    absent = [path for path in (folder, *folder.parents) if not path.exists()]
    before = set(folder.iterdir()) if folder.is_dir() else set()
    with ExitStack() as stack:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            stack.enter_context(driving(folder))
            _claim(folder, file, identify(file, config))
        except BaseException as error:
            stack.close()
            _withdraw(folder, file, before, absent)
            if isinstance(error, (OSError, StoreError)):
                why = error.strerror if isinstance(error, OSError) else error
                raise SpecError(f"{folder} cannot be made: {why}; mend that or give another --out") from error
            raise
        yield


def extend(folder: Path, space: Space, config: RunConfig, trials: str) -> RunConfig:
    """Let a sweep have another number of trials in the end; gives the configuration that says so.

    Args:
        folder: The sweep's folder.
        space: What is tried.
        config: How it is run.
        trials: The number, or +N for so many more.

    Raises:
        SpecError: If it is no number, fewer than were asked for already, or more than the grid has.
    """
    with driving(folder):
        identity = read_identity(folder)
        if not trials.removeprefix("+").isdecimal():
            raise SpecError(f"--trials {trials!r}; give a number such as 100, or +50 for so many more")
        wanted = int(trials) + (identity["trials"] if trials.startswith("+") else 0)
        if wanted < (asked := len(read_asked(folder))):
            raise SpecError(f"--trials {trials}: {asked} trials were asked for already; give more")
        config = make_config(**config.model_dump() | {"trials": wanted})
        if (most := planned_trials(space, config)) < wanted:
            raise SpecError(f"--trials {trials}: the grid has {most} cells, and no more trials than that")
        kept = {**identity, "config": {**identity["config"], "trials": wanted}, "trials": wanted}
        publish(folder / "sweep.json", json.dumps(kept, indent=1).encode())
    return config


def _claim(folder: Path, file: SpaceFile, wanted: Mapping[str, Any]) -> None:
    if not _recognise(folder, file, wanted):
        publish(folder / "space.py", file.source.encode())
        publish(folder / "sweep.json", json.dumps(wanted, indent=1).encode())


def _recognise(folder: Path, file: SpaceFile, wanted: Mapping[str, Any]) -> bool:
    """Whether the folder is this sweep's already. Raises SpecError if it is not free either."""
    path = folder / "sweep.json"
    if path.is_file():
        found = read_identity(folder)
        if changed := differences(found, wanted):
            kept = folder / "space.py"
            where = _first_change(kept.read_text(encoding="utf-8"), file.source) if kept.is_file() else ""
            raise SpecError(
                f"{folder} holds the sweep {found['sweep']}, started with {changed}{where}; give another "
                "--out, or --accept-changes to go on with what you have now"
            )
        return True
    if folder.exists() and not folder.is_dir():
        raise SpecError(f"{folder} is a file; give a new folder with --out")
    if folder.is_dir() and not all(_is_leftover(inside, file) for inside in folder.iterdir()):
        raise SpecError(f"{folder} is not empty and holds no sweep; give a new folder with --out")
    return False


def _first_change(before: str, now: str) -> str:
    """In words, which line of a space file is the first that has changed; "" if none has."""
    lines = itertools.zip_longest(before.splitlines(), now.splitlines(), fillvalue="")
    for number, (old, new) in enumerate(lines, start=1):
        if old != new:
            return f" (its line {number} was {old.strip()!r}, now {new.strip()!r})"
    return ""


def _is_leftover(path: Path, file: SpaceFile) -> bool:
    """Whether a driver that was killed while it made the folder left this."""
    if path.name == "space.py":
        return path.read_bytes() == file.source.encode()
    return path.name == "lock" or path.name.startswith((".space.py.", ".sweep.json."))


def _withdraw(folder: Path, file: SpaceFile, before: set[Path], absent: Sequence[Path]) -> None:
    """Remove what a claim that failed has left, unless somebody else has the folder by now."""
    if folder.is_dir() and not (folder / "sweep.json").exists() and not driver(folder):
        for path in set(folder.iterdir()) - before:
            if _is_leftover(path, file):
                path.unlink()
    for path in absent:
        with suppress(OSError):
            path.rmdir()


def differences(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> str:
    """What one sweep was started with and the other was not, in words; "" if they are the same."""
    parts = []
    for name in _STARTED_WITH:
        if name == "config":
            old, new = found["config"], wanted["config"]
            parts += [
                f"{key}={old.get(key)!r} (now {new[key]!r})"
                for key in new
                if old.get(key) != new[key] and key not in _MAY_CHANGE
            ]
        elif found[name] != wanted[name]:
            parts.append(
                "another space file" if name == "source" else f"{name}={found[name]!r} (now {wanted[name]!r})"
            )
    return ", ".join(parts)

"""A sweep's folder: who it belongs to, what it was started with, who drives it now."""

import fcntl
import getpass
import hashlib
import json
import os
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from jobs.errors import SpecError
from jobs.resolve import load_job
from orchestrator.config import RunConfig
from orchestrator.provenance import provenance
from orchestrator.space_file import SpaceFile, column_types
from storage.durable import publish

_STARTED_WITH = ("space", "source", "fixed", "config")


def identify(file: SpaceFile, config: RunConfig) -> dict[str, Any]:
    """What `sweep.json` says of a sweep."""
    space = file.space
    started = {
        "space": file.name,
        "source": hashlib.sha256(file.source.encode()).hexdigest(),
        "fixed": dict(space.fixed),
        "config": config.model_dump(),
    }
    digest = hashlib.sha256(json.dumps(started, sort_keys=True).encode()).hexdigest()
    return {
        "sweep": f"{file.name}-{digest[:8]}",
        **started,
        "description": space.description,
        "job": space.job,
        "parameters": column_types(space),
        "objectives": [
            {"metric": objective.metric, "direction": objective.direction} for objective in space.objectives
        ],
        "metrics": {name: metric._asdict() for name, metric in load_job(space.job).METRICS.items()},
        "model": {
            "id": config.model_ref.id,
            "revision": config.model_ref.revision,
            "dtype": config.dtype,
            "trust_remote_code": config.trust_remote_code,
        },
        "seed": config.seed,
        "provenance": provenance(),
    }


def claim(folder: Path, file: SpaceFile, config: RunConfig) -> dict[str, Any]:
    """Make a folder the sweep's, or recognise it as the same sweep's.

    Returns:
        The identity that the folder was made with.

    Raises:
        SpecError: If the folder holds another sweep or anything else, or cannot be written.
    """
    wanted: dict[str, Any] = json.loads(json.dumps(identify(file, config)))
    path = folder / "sweep.json"
    if path.is_file():
        found: dict[str, Any] = json.loads(path.read_bytes())
        if changed := differences(found, wanted):
            raise SpecError(
                f"{folder} holds the sweep {found['sweep']}, started with {changed}; give another --out"
            )
        return found
    if folder.is_dir() and not all(_is_leftover(inside, file) for inside in folder.iterdir()):
        raise SpecError(f"{folder} is not empty and holds no sweep; give a new folder with --out")
    try:
        publish(folder / "space.py", file.source.encode())
        publish(path, json.dumps(wanted, indent=1).encode())
    except OSError as error:
        _forget(folder)
        raise SpecError(
            f"{folder} cannot be written: {error.strerror}; free the disk or give another --out"
        ) from error
    return wanted


def _is_leftover(path: Path, file: SpaceFile) -> bool:
    """Whether a driver that was killed while it made the folder left this."""
    if path.name == "space.py":
        return path.read_bytes() == file.source.encode()
    return path.name.startswith((".space.py.", ".sweep.json."))


def _forget(folder: Path) -> None:
    if folder.is_dir():
        (folder / "space.py").unlink(missing_ok=True)
        if not any(folder.iterdir()):
            folder.rmdir()


def differences(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> str:
    """What one sweep was started with and the other was not, in words; "" if they are the same."""
    parts = []
    for name in _STARTED_WITH:
        if name == "config":
            old, new = found["config"], wanted["config"]
            parts += [f"{key}={old.get(key)!r} (now {new[key]!r})" for key in new if old.get(key) != new[key]]
        elif found[name] != wanted[name]:
            parts.append(
                "another space file" if name == "source" else f"{name}={found[name]!r} (now {wanted[name]!r})"
            )
    return ", ".join(parts)


@contextmanager
def driving(folder: Path) -> Iterator[None]:
    """Inside the block this process is the sweep's only driver.

    Raises:
        SpecError: If another process drives it; its owner is named.
    """
    path = folder / "lock"
    with path.open("a+", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            file.seek(0)
            raise SpecError(
                f"{folder} is being run by {file.read().strip()}; wait for it or stop it"
            ) from error
        file.truncate(0)
        file.write(f"{getpass.getuser()} on {socket.gethostname()}, process {os.getpid()}")
        file.flush()
        yield

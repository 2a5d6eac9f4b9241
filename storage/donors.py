"""Artifacts that other sweeps have stored, for one that needs the same work."""

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from jobs.spec import Spec, spec_differences
from storage.artifacts import Artifact, artifact_bytes
from storage.durable import StoreError, publish
from storage.query import open_sweep
from storage.store import Store


class Donated(NamedTuple):
    """An artifact of another sweep, with the name of that sweep and of the job that made it."""

    sweep: str
    job: str
    folder: Path
    artifact: Artifact


class Donors:
    """Other sweeps, read once.

    Args:
        folders: Those of the sweeps; the first that has an artifact whole gives it.
        say: Called with a line about each job that an artifact was asked of in vain: what is other there.

    Raises:
        SpecError: If a folder holds no sweep.
        StoreError: If its tables are not what was written.
    """

    def __init__(self, folders: Iterable[Path], say: Callable[[str], None] = lambda line: None) -> None:
        self._donated: dict[str, list[Donated]] = {}
        self._specs: dict[str, list[tuple[str, dict[str, Any]]]] = {}
        self._say: Callable[[str], None] = say
        self._said_of: set[str] = set()
        for folder in folders:
            name = open_sweep(folder).identity["sweep"]
            # The latest of a spec, if one was lost.
            store = Store(folder)
            rows = {row["spec"]: row for row in store.rows("artifacts")}
            for made in store.rows("specs"):
                if made["spec"] in rows:
                    self._specs.setdefault(made["job"], []).append((name, _told(made)))
            for spec, row in rows.items():
                artifact = Artifact(row["hash"], row["path"], row["bytes"])
                self._donated.setdefault(spec, []).append(Donated(name, row["job"], folder, artifact))

    def give(self, spec: Spec, folder: Path) -> Donated | None:
        """Copy a spec's artifact into a sweep's folder.

        Args:
            spec: Equal ids are equal work: the same code, parameters, weights, data and seed.
            folder: Of the sweep that takes it.

        Returns:
            What was copied; None if no sweep has it whole.
        """
        for found in self._donated.get(spec.id, ()):
            try:
                content = artifact_bytes(found.folder, found.artifact)
            except (StoreError, OSError):
                continue
            publish(folder / found.artifact.path, content)
            return found
        if spec.job not in self._said_of and (why := self._why_not(spec)):
            self._said_of.add(spec.job)
            self._say(why)
        return None

    def _why_not(self, spec: Spec) -> str | None:
        """What the nearest result of the same job has other; None without such a result."""
        if found := self._donated.get(spec.id):
            return f"{found[0].sweep} has lost a result of {spec.job}, which is computed again"
        wanted = spec.to_json()
        others = [(sweep, spec_differences(has, wanted)) for sweep, has in self._specs.get(spec.job, ())]
        if not others:
            return None
        sweep, other = min(others, key=lambda each: len(each[1]))
        told = [f"{name} ({there!r} there, {here!r} here)" for name, (there, here) in other.items()]
        more = f" and {len(told) - _MOST_TOLD} more" if len(told) > _MOST_TOLD else ""
        return (
            f"nothing of {spec.job} is taken from {sweep}: the nearest of its results differs in "
            f"{', '.join(told[:_MOST_TOLD])}{more}"
        )


_MOST_TOLD = 3


def _told(row: Mapping[str, Any]) -> dict[str, Any]:
    """A spec as JSON, of a row of the table `specs`."""
    read = {name: json.loads(row[name]) for name in ("params", "model", "data")}
    return {"job": row["job"], "code": row["code"], "seed": row["seed"], **read}

"""Artifacts that other sweeps have stored, for one that needs the same work."""

from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

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

    Raises:
        SpecError: If a folder holds no sweep.
        StoreError: If its tables are not what was written.
    """

    def __init__(self, folders: Iterable[Path]) -> None:
        self._donated: dict[str, list[Donated]] = {}
        for folder in folders:
            name = open_sweep(folder).identity["sweep"]
            # The latest of a spec, if one was lost.
            rows = {row["spec"]: row for row in Store(folder).rows("artifacts")}
            for spec, row in rows.items():
                artifact = Artifact(row["hash"], row["path"], row["bytes"])
                self._donated.setdefault(spec, []).append(Donated(name, row["job"], folder, artifact))

    def give(self, spec: str, folder: Path) -> Donated | None:
        """Copy a spec's artifact into a sweep's folder.

        Args:
            spec: Equal ids are equal work: the same code, parameters, weights, data and seed.
            folder: Of the sweep that takes it.

        Returns:
            What was copied; None if no sweep has it whole.
        """
        for found in self._donated.get(spec, ()):
            try:
                content = artifact_bytes(found.folder, found.artifact)
            except (StoreError, OSError):
                continue
            publish(folder / found.artifact.path, content)
            return found
        return None

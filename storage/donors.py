"""Artifacts that other sweeps have stored, for one that needs the same work."""

from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from storage.artifacts import Artifact, read_artifact
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
        folders: Those of the sweeps; the first that has an artifact gives it.

    Raises:
        SpecError: If a folder holds no sweep.
        StoreError: If its tables are not what was written.
    """

    def __init__(self, folders: Iterable[str | Path]) -> None:
        self._donated: dict[str, Donated] = {}
        for folder in map(Path, folders):
            name = open_sweep(folder).identity["sweep"]
            for row in Store(folder).rows("artifacts"):
                found = Donated(name, row["job"], folder, Artifact(row["hash"], row["path"], row["bytes"]))
                self._donated.setdefault(row["spec"], found)

    def give(self, spec: str, folder: Path) -> Donated | None:
        """Copy a spec's artifact into a sweep's folder.

        Args:
            spec: Equal ids are equal work: the same code, parameters, weights, data and seed.
            folder: Of the sweep that takes it.

        Returns:
            What was copied; None if no sweep has it whole.
        """
        found = self._donated.get(spec)
        if found is None:
            return None
        try:
            read_artifact(found.folder, found.artifact)  # checks the hash
        except StoreError:
            return None
        path = folder / found.artifact.path
        if not path.exists():
            publish(path, (found.folder / found.artifact.path).read_bytes())
        return found

"""Scores that were added to a sweep's completions after they were written.

They have a manifest and a lock of their own, so that a sweep may be scored while its driver runs: neither
writes what the other does. What the driver has written is never touched.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from storage.durable import remove_staging
from storage.lock import driving
from storage.store import Store

_FOLDER = "scores"


class Scored(NamedTuple):
    """That all completions of a spec have been scored: by which scorer, version and options (as JSON)."""

    spec: str
    scorer: str
    version: int
    options: str


class Scores:
    """The scores of one sweep; one writer at a time.

    Attributes:
        done: What has been scored.
    """

    def __init__(self, folder: Path) -> None:
        self._store = scores_of(folder)
        self.done = {_scored(row) for row in self._store.rows("scores")}

    def add(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Make rows of the table `scores` visible, all at once.

        Args:
            rows: For each spec, scorer, version and options in them, the scores of all its completions.

        Raises:
            StoreError: If the disk refuses; nothing becomes visible then.
            ValueError: If some of this was scored before.
        """
        new = {_scored(row) for row in rows}
        if doubled := sorted(new & self.done):
            raise ValueError(f"was scored before: {doubled[0]}")
        self._store.commit([], scores=rows)
        self.done |= new


def _scored(row: Mapping[str, Any]) -> Scored:
    return Scored(row["spec"], row["scorer"], row["version"], row["options"])


@contextmanager
def scoring(folder: Path) -> Iterator[Scores]:
    """Inside the block this process is the only one that adds scores to the sweep.

    Raises:
        SpecError: If another process does; its owner is named.
        OSError: If the folder cannot be written.
    """
    own = folder / _FOLDER
    own.mkdir(exist_ok=True)
    with driving(own):
        remove_staging(own)
        remove_staging(folder / "tables" / "scores")
        yield Scores(folder)


def scores_of(folder: Path) -> Store:
    """The store of a sweep's added scores, for reading. Raises StoreError as `Store` does."""
    return Store(folder, _FOLDER)

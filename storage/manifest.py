"""Which files of a sweep are visible, and how its specs have ended: one small file a commit.

`00000041.json` is an entry: it adds to what stands before it. `00000064.checkpoint.json` says what all
entries up to that number come to, so that a long sweep is opened as fast as a short one; entries that it has
taken in are deleted when nobody reads them any more.
"""

import json
import os
import re
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from storage.durable import StoreError, publish
from storage.parquet import TableFile, read_rows
from storage.schema import SCHEMA_VERSION

_OLDEST_VERSION = 4
_ENTRY_KEYS = {"schema", "files", "results", "withdrawn", "replaced"}
_CHECKPOINT_KEYS = {"schema", "files", "void", "replaced"}
READ_SECONDS = 600.0
"""So long a file that was replaced stays for those who had begun to read it."""


class StoredResult(NamedTuple):
    """That a spec has a result: its status and why it is not completed."""

    spec: str
    status: str
    reason: str | None


class Entry(NamedTuple):
    """What one commit has changed.

    Attributes:
        files: Made visible.
        results: Of the specs that ended.
        withdrawn: Specs whose results before it do not count any more.
        replaced: Paths of files before it whose rows are in `files` now.
    """

    files: tuple[TableFile, ...] = ()
    results: tuple[StoredResult, ...] = ()
    withdrawn: tuple[str, ...] = ()
    replaced: tuple[str, ...] = ()


class Manifest:
    """The entries of one store, read once; one writer.

    Args:
        folder: The sweep's folder.
        name: The manifest's own folder inside it.

    Attributes:
        files: Path -> visible file, in the order of the entries.
        void: Rows of the table `trials` that count no more: number, and when they ended, s since 1970.
        replaced: Path of a file whose rows are in another now, and which may still be there -> since when, s
            since 1970.
        recent: Entries since the latest checkpoint.
        bytes: What the visible files take.

    Raises:
        StoreError: If an entry is gone, is not what was written, or was written by a newer version.
    """

    def __init__(self, folder: Path, name: str) -> None:
        self._folder = folder
        self._place = folder / name
        self.files: dict[str, TableFile] = {}
        self.void: list[tuple[int, float]] = []
        self.replaced: dict[str, float] = {}
        self.recent: list[Entry] = []
        entries, checkpoints = _numbers(self._place)
        self._next = max((*entries, *checkpoints), default=-1) + 1
        self._oldest = min(entries, default=self._next)
        self._checkpoints = checkpoints
        self._removable: dict[str, float] = {}
        if checkpoints:
            self._take_checkpoint(checkpoints[-1])
        self.bytes = sum(file.bytes for file in self.files.values())
        for number in range(checkpoints[-1] + 1 if checkpoints else 0, self._next):
            self._apply(_read_entry(_entry_path(self._place, number)))

    def add(self, entry: Entry) -> None:
        """Make an entry visible. Raises StoreError if the disk refuses; nothing becomes visible then."""
        content = {
            "schema": SCHEMA_VERSION,
            "files": [file._asdict() for file in entry.files],
            "results": [result._asdict() for result in entry.results],
            "withdrawn": list(entry.withdrawn),
            "replaced": list(entry.replaced),
        }
        publish(_entry_path(self._place, self._next), _json(content))
        self._next += 1
        self._apply(entry)

    def _apply(self, entry: Entry) -> None:
        if entry.withdrawn:
            self.void += self._rows_of(entry.withdrawn)
        for path in entry.replaced:
            if (gone := self.files.pop(path, None)) is not None:
                self.bytes -= gone.bytes
            self.replaced[path] = time.time()
        self.files.update((file.path, file) for file in entry.files)
        self.bytes += sum(file.bytes for file in entry.files)
        self.recent.append(entry)

    def _rows_of(self, specs: Iterable[str]) -> list[tuple[int, float]]:
        """Rows of the table `trials` that the specs have so far."""
        known, voided = set(specs), set(self.void)
        rows = read_rows(self._folder, "trials", self.files.values())
        keys = ((row["trial"], row["finished"]) for row in rows if row["spec"] in known)
        return [key for key in keys if key not in voided]

    def checkpoint(self, *, keeps_entries: bool = False) -> None:
        """Say in one file what all entries come to; every result must be in a file of the table `results`.

        Args:
            keeps_entries: Whether entries that it takes in stay for ever.

        Raises:
            StoreError: If the disk refuses; what was visible stays.
        """
        with _complaints(self._place):
            self._remove_old(keeps_entries)
        content = {
            "schema": SCHEMA_VERSION,
            "files": [file._asdict() for file in self.files.values()],
            "void": self.void,
            "replaced": self.replaced,
        }
        number = self._next - 1
        publish(_checkpoint_path(self._place, number), _json(content))
        self._checkpoints.append(number)
        self._removable = dict(self.replaced)
        self.recent.clear()

    def _remove_old(self, keeps_entries: bool) -> None:
        """Delete what was replaced so long ago that nobody reads it any more."""
        long_ago = time.time() - READ_SECONDS
        for path, since in self._removable.items():  # no entry behind the checkpoint needs these
            if since < long_ago:
                (self._folder / path).unlink(missing_ok=True)
                self.replaced.pop(path, None)
        if keeps_entries:
            return
        # Only who writes asks for their age: readers may find that an old one has just gone.
        old = [
            number
            for number in self._checkpoints
            if _checkpoint_path(self._place, number).stat().st_mtime < long_ago
        ]
        if not old:
            return
        for number in range(self._oldest, old[-1]):
            _entry_path(self._place, number).unlink(missing_ok=True)
        for number in old[:-1]:
            _checkpoint_path(self._place, number).unlink(missing_ok=True)
        self._oldest = old[-1]
        self._checkpoints = [number for number in self._checkpoints if number >= old[-1]]

    def _take_checkpoint(self, number: int) -> None:
        path = _checkpoint_path(self._place, number)
        content = _read(path, _CHECKPOINT_KEYS)
        with _complaints(path):
            self.files = {file.path: file for file in (TableFile(**each) for each in content["files"])}
            self.void = [(trial, finished) for trial, finished in content["void"]]
            self.replaced = dict(content["replaced"])
        self._removable = dict(self.replaced)


def _read_entry(path: Path) -> Entry:
    content = _read(path, _ENTRY_KEYS)
    with _complaints(path):
        return Entry(
            tuple(TableFile(**file) for file in content["files"]),
            tuple(StoredResult(**result) for result in content["results"]),
            tuple(content.get("withdrawn", ())),
            tuple(content.get("replaced", ())),
        )


def _read(path: Path, keys: set[str]) -> dict[str, Any]:
    """A file of the manifest. Raises StoreError if it is not what was written, or by a newer version."""
    with _complaints(path):
        content: dict[str, Any] = json.loads(path.read_bytes())
        version = int(content["schema"])
        if version <= SCHEMA_VERSION and (unknown := content.keys() - keys):
            raise ValueError(f"unknown keys {sorted(unknown)}")
    if not _OLDEST_VERSION <= version <= SCHEMA_VERSION:
        other = "newer" if version > SCHEMA_VERSION else "older"
        raise StoreError(
            f"{path} was written by a {other} version of steersweep, schema {version}; this one reads "
            f"{_OLDEST_VERSION} to {SCHEMA_VERSION}: use that version"
        )
    return content


@contextmanager
def _complaints(path: Path) -> Iterator[None]:
    """Inside the block an error becomes a StoreError that names the file."""
    try:
        yield
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise StoreError(f"{path} is gone or not what was written: {error!r}") from error


def _json(content: Mapping[str, Any]) -> bytes:
    return json.dumps(content, indent=1).encode()


def _numbers(place: Path) -> tuple[list[int], list[int]]:
    """Numbers of the entries and of the checkpoints that are there, each in order."""
    found = sorted(_NAME.findall("\n".join(os.listdir(place)))) if place.is_dir() else []
    entries = [int(number) for number, kind in found if not kind]
    return entries, [int(number) for number, kind in found if kind]


_NAME = re.compile(r"^([0-9]+)(\.checkpoint)?\.json$", re.MULTILINE)


def _entry_path(place: Path, number: int) -> Path:
    return place / f"{number:08d}.json"


def _checkpoint_path(place: Path, number: int) -> Path:
    return place / f"{number:08d}.checkpoint.json"

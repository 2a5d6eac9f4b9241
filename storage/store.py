"""What a sweep has kept: files that a manifest lists, and nothing else.

A result is visible once its manifest entry is written. Readers never see a file that no entry
lists, so a death between writing a table and listing it leaves no half result.
"""

import json
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from storage import compaction
from storage.durable import StoreError, publish
from storage.parquet import TableFile, read_rows, write_table
from storage.schema import SCHEMA_VERSION

_KEYS = {"schema", "files", "results", "withdrawn", "replaced"}
_READ_SECONDS = 600.0
"""So long a replaced file stays for those who had begun to read it."""


class StoredResult(NamedTuple):
    """That a spec has a result: its status and why it is not completed."""

    spec: str
    status: str
    reason: str | None


class Part(NamedTuple):
    """What a worker has written of some results, not visible before it is committed."""

    files: tuple[TableFile, ...]
    results: tuple[StoredResult, ...]


class _Entry(NamedTuple):
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


class Store:
    """Tables and manifest of one sweep; one writer, the driver.

    Args:
        folder: The sweep's folder.
        manifest: Folder of the entries inside it. Whoever adds scores keeps a manifest of its own, so that it
            and the driver may write at the same time.

    Attributes:
        folder: The sweep's folder.
        results: Spec -> its result.
        replaced: Paths of files whose rows are in others now; they may still be there.

    Raises:
        StoreError: If an entry of the manifest, or a file that one lists, is gone or not what was written.
    """

    def __init__(self, folder: Path, manifest: str = "manifest") -> None:
        self.folder = folder
        self._manifest = folder / manifest
        self._entries = [_read_entry(path) for path in _entry_paths(self._manifest)]
        self.replaced: set[str] = set()
        self._looked_at = 0
        self.results: dict[str, StoredResult] = {}
        for entry in self._entries:
            self._count(entry)
        for file in self.files():
            _check_there(folder, file)

    def commit(self, parts: Iterable[Part], **tables: Sequence[Mapping[str, Any]]) -> None:
        """Make parts and the driver's own rows visible, all at once.

        Args:
            parts: What workers wrote.
            tables: Table name -> rows that the driver adds, such as `trials` and `attempts`.

        Raises:
            StoreError: If the disk refuses; nothing becomes visible then.
            ValueError: If a spec already has a result, or is given two.
        """
        parts = list(parts)
        results = [result for part in parts for result in part.results]
        times = Counter(result.spec for result in results)
        if doubled := sorted(spec for spec, number in times.items() if number > 1 or spec in self.results):
            raise ValueError(f"results were already accepted for the specs {doubled}")
        files = [file for part in parts for file in part.files]
        if not files and not results and not any(tables.values()):
            return
        with self._written() as own:
            own += (write_table(self.folder, table, rows) for table, rows in tables.items() if rows)
            self._add(_Entry((*files, *own), tuple(results)))

    @contextmanager
    def _written(self) -> Iterator[list[TableFile]]:
        """Files that the block writes and lists; they are gone if it cannot."""
        own: list[TableFile] = []
        try:
            yield own
        except StoreError:
            for file in own:
                (self.folder / file.path).unlink(missing_ok=True)
            raise

    def withdraw(self, specs: Iterable[str]) -> None:
        """Let the results of specs not count any more, so that they may be had anew.

        Only what has failed is withdrawn: of that nothing but its trials stands in the tables.

        Raises:
            StoreError: If the disk refuses.
            ValueError: If one has no result, or did not fail.
        """
        withdrawn = tuple(specs)
        if wrong := [spec for spec in withdrawn if self._status(spec) != "failed"]:
            raise ValueError(f"only results that failed can be withdrawn, not those of {wrong}")
        self._add(_Entry(withdrawn=withdrawn))

    def compact(self) -> None:
        """Put small files together where there are many; who reads sees every row once, at any moment.

        It looks only now and then, so that it may be called after every commit. Files that were replaced stay
        for those who are reading them, and go at a later call. Rows from before results were withdrawn are
        left alone, since which of them count follows from their place.

        Raises:
            StoreError: If the disk refuses, or a file is not what was written; nothing has changed then.
        """
        if len(self._entries) < self._looked_at + compaction.MANY:
            return
        self._looked_at = len(self._entries)
        self._remove_replaced()
        last = max((number for number, entry in enumerate(self._entries) if entry.withdrawn), default=-1)
        runs = compaction.scattered(self._visible(self._entries[last + 1 :]))
        with self._written() as own:
            own += (compaction.put_together(self.folder, run) for run in runs)
            if own:
                self._add(_Entry(tuple(own), replaced=tuple(file.path for run in runs for file in run)))

    def _remove_replaced(self) -> None:
        """Delete what was replaced so long ago that nobody reads it any more."""
        for number, entry in enumerate(self._entries):
            if entry.replaced:
                written = _entry_path(self._manifest, number).stat().st_mtime
                for path in entry.replaced if time.time() - written > _READ_SECONDS else ():
                    (self.folder / path).unlink(missing_ok=True)

    def _status(self, spec: str) -> str | None:
        result = self.results.get(spec)
        return None if result is None else result.status

    def _add(self, entry: _Entry) -> None:
        content = {
            "schema": SCHEMA_VERSION,
            "files": [file._asdict() for file in entry.files],
            "results": [result._asdict() for result in entry.results],
            "withdrawn": list(entry.withdrawn),
            "replaced": list(entry.replaced),
        }
        publish(_entry_path(self._manifest, len(self._entries)), json.dumps(content, indent=1).encode())
        self._entries.append(entry)
        self._count(entry)

    def _count(self, entry: _Entry) -> None:
        if unknown := set(entry.withdrawn) - self.results.keys():
            raise StoreError(
                f"{self._manifest} is not what was written: {sorted(unknown)[:3]} have no result"
            )
        for spec in entry.withdrawn:
            del self.results[spec]
        self.results.update({result.spec: result for result in entry.results})
        self.replaced.update(entry.replaced)

    def files(self, table: str | None = None) -> list[TableFile]:
        """The listed files of one table, or of all."""
        return [file for file in self._visible(self._entries) if table in (None, file.table)]

    def _visible(self, entries: Iterable[_Entry]) -> list[TableFile]:
        return [file for entry in entries for file in entry.files if file.path not in self.replaced]

    def rows(self, table: str) -> list[dict[str, Any]]:
        """All visible rows of one table; of trials those whose result still counts."""
        kept: list[dict[str, Any]] = []
        for entry in self._entries:
            if table == "trials" and entry.withdrawn:
                kept = [row for row in kept if row["spec"] not in entry.withdrawn]
            kept += read_rows(self.folder, table, self._visible([entry]))
        return kept

    def withdrawn_trials(self) -> list[tuple[int, float]]:
        """Rows of the table trials that count no more: number, and when they ended, s since 1970."""
        if not any(entry.withdrawn for entry in self._entries):
            return []
        counting = {(row["trial"], row["finished"]) for row in self.rows("trials")}
        rows = read_rows(self.folder, "trials", self.files("trials"))
        return [key for row in rows if (key := (row["trial"], row["finished"])) not in counting]


def _read_entry(path: Path) -> _Entry:
    try:
        entry = json.loads(path.read_bytes())
        if unknown := entry.keys() - _KEYS:
            raise ValueError(f"unknown keys {sorted(unknown)}")
        files = tuple(TableFile(**file) for file in entry["files"])
        results = tuple(StoredResult(**result) for result in entry["results"])
        withdrawn, replaced = tuple(entry.get("withdrawn", ())), tuple(entry.get("replaced", ()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise StoreError(f"{path} is gone or not what was written: {error!r}") from error
    return _Entry(files, results, withdrawn, replaced)


def _check_there(folder: Path, file: TableFile) -> None:
    found = folder / file.path
    if not found.is_file() or found.stat().st_size != file.bytes:
        raise StoreError(f"{found} is gone or not what was written, {file.bytes} bytes")


def _entry_paths(manifest: Path) -> list[Path]:
    """Files of a manifest's entries, oldest first; up to the newest there is, none is left out."""
    newest = max((int(path.stem) for path in manifest.glob("[0-9]*.json")), default=-1)
    return [_entry_path(manifest, number) for number in range(newest + 1)]


def _entry_path(manifest: Path, number: int) -> Path:
    return manifest / f"{number:08d}.json"

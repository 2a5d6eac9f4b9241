"""What a sweep has kept: files that a manifest lists, and nothing else.

A result is visible once its manifest entry is written. Readers never see a file that no entry
lists, so a death between writing a table and listing it leaves no half result.
"""

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from storage.durable import StoreError, publish
from storage.parquet import TableFile, read_rows, write_table
from storage.schema import SCHEMA_VERSION


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
    """What one commit made visible, and the specs whose results before it do not count any more."""

    files: tuple[TableFile, ...]
    results: tuple[StoredResult, ...]
    withdrawn: tuple[str, ...] = ()


class Store:
    """Tables and manifest of one sweep; one writer, the driver.

    Args:
        folder: The sweep's folder.
        manifest: Folder of the entries inside it. Whoever adds scores keeps a manifest of its own, so that it
            and the driver may write at the same time.

    Attributes:
        folder: The sweep's folder.
        results: Spec -> its result.

    Raises:
        StoreError: If an entry of the manifest, or a file that one lists, is gone or not what was written.
    """

    def __init__(self, folder: Path, manifest: str = "manifest") -> None:
        self.folder = folder
        self._manifest = folder / manifest
        self._entries = [_read_entry(folder, path) for path in _entry_paths(self._manifest)]
        self.results: dict[str, StoredResult] = {}
        for entry in self._entries:
            self._count(entry)

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
        own: list[TableFile] = []
        try:
            own += (write_table(self.folder, table, rows) for table, rows in tables.items() if rows)
            self._add(_Entry((*files, *own), tuple(results)))
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
        self._add(_Entry((), (), withdrawn))

    def _status(self, spec: str) -> str | None:
        result = self.results.get(spec)
        return None if result is None else result.status

    def _add(self, entry: _Entry) -> None:
        content = {
            "schema": SCHEMA_VERSION,
            "files": [file._asdict() for file in entry.files],
            "results": [result._asdict() for result in entry.results],
            "withdrawn": list(entry.withdrawn),
        }
        publish(_entry_path(self._manifest, len(self._entries)), json.dumps(content, indent=1).encode())
        self._entries.append(entry)
        self._count(entry)

    def _count(self, entry: _Entry) -> None:
        for spec in entry.withdrawn:
            del self.results[spec]
        self.results.update({result.spec: result for result in entry.results})

    def files(self, table: str | None = None) -> list[TableFile]:
        """The listed files of one table, or of all."""
        return [file for entry in self._entries for file in entry.files if table in (None, file.table)]

    def rows(self, table: str) -> list[dict[str, Any]]:
        """All visible rows of one table; of trials those whose result still counts."""
        kept: list[dict[str, Any]] = []
        for entry in self._entries:
            if table == "trials" and entry.withdrawn:
                kept = [row for row in kept if row["spec"] not in entry.withdrawn]
            kept += read_rows(self.folder, table, entry.files)
        return kept

    def withdrawn_trials(self) -> list[tuple[int, float]]:
        """Rows of the table trials that count no more: number, and when they ended, s since 1970."""
        if not any(entry.withdrawn for entry in self._entries):
            return []
        counting = {(row["trial"], row["finished"]) for row in self.rows("trials")}
        rows = read_rows(self.folder, "trials", self.files("trials"))
        return [key for row in rows if (key := (row["trial"], row["finished"])) not in counting]


def _read_entry(folder: Path, path: Path) -> _Entry:
    try:
        entry = json.loads(path.read_bytes())
        files = tuple(TableFile(**file) for file in entry["files"])
        results = tuple(StoredResult(**result) for result in entry["results"])
        withdrawn = tuple(entry.get("withdrawn", ()))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise StoreError(f"{path} is gone or not what was written: {error!r}") from error
    for file in files:
        found = folder / file.path
        if not found.is_file() or found.stat().st_size != file.bytes:
            raise StoreError(f"{found} is gone or not what was written, {file.bytes} bytes")
    return _Entry(files, results, withdrawn)


def _entry_paths(manifest: Path) -> list[Path]:
    """Files of a manifest's entries, oldest first; up to the newest there is, none is left out."""
    newest = max((int(path.stem) for path in manifest.glob("[0-9]*.json")), default=-1)
    return [_entry_path(manifest, number) for number in range(newest + 1)]


def _entry_path(manifest: Path, number: int) -> Path:
    return manifest / f"{number:08d}.json"

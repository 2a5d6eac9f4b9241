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
        self._parts = [_read_entry(folder, path) for path in _entries(self._manifest)]
        self.results = {result.spec: result for part in self._parts for result in part.results}

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
        own = [write_table(self.folder, table, rows) for table, rows in tables.items() if rows]
        files = [file for part in parts for file in part.files] + own
        if not files and not results:
            return
        entry = {
            "schema": SCHEMA_VERSION,
            "files": [file._asdict() for file in files],
            "results": [result._asdict() for result in results],
        }
        publish(_entry_path(self._manifest, len(self._parts)), json.dumps(entry, indent=1).encode())
        self._parts.append(Part(tuple(files), tuple(results)))
        self.results.update({result.spec: result for result in results})

    def files(self, table: str) -> list[TableFile]:
        """The listed files of one table."""
        return [file for part in self._parts for file in part.files if file.table == table]

    def rows(self, table: str) -> list[dict[str, Any]]:
        """All visible rows of one table."""
        return read_rows(self.folder, table, self.files(table))


def _read_entry(folder: Path, path: Path) -> Part:
    try:
        entry = json.loads(path.read_bytes())
        files = tuple(TableFile(**file) for file in entry["files"])
        results = tuple(StoredResult(**result) for result in entry["results"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise StoreError(f"{path} is gone or not what was written: {error!r}") from error
    for file in files:
        found = folder / file.path
        if not found.is_file() or found.stat().st_size != file.bytes:
            raise StoreError(f"{found} is gone or not what was written, {file.bytes} bytes")
    return Part(files, results)


def _entries(manifest: Path) -> list[Path]:
    """Files of a manifest's entries, oldest first; up to the newest there is, none is left out."""
    newest = max((int(path.stem) for path in manifest.glob("[0-9]*.json")), default=-1)
    return [_entry_path(manifest, number) for number in range(newest + 1)]


def _entry_path(manifest: Path, number: int) -> Path:
    return manifest / f"{number:08d}.json"

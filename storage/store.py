"""What a sweep has kept: files that a manifest lists, and nothing else.

A result is visible once its manifest entry is written. Readers never see a file that no entry
lists, so a death between writing a table and listing it leaves no half result.
"""

from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from storage import compaction
from storage.artifacts import Artifact
from storage.durable import StoreError
from storage.manifest import Entry, Manifest, StoredResult
from storage.parquet import TableFile, holds_any, read_rows, write_table

_WITHDRAWN = "withdrawn"
"""In the place of a status in the table `results`: what stands before it does not count any more."""


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

    Raises:
        StoreError: If an entry of the manifest, or a file that one lists, is gone or not what was written.
    """

    def __init__(self, folder: Path, manifest: str = "manifest") -> None:
        self.folder = folder
        self._manifest = Manifest(folder, manifest)
        self._due = compaction.MANY
        for file in self.files():
            _check_there(folder, file)

    @cached_property
    def results(self) -> dict[str, StoredResult]:
        """Spec -> its result. Raises StoreError if a file is not what was written."""
        found: dict[str, StoredResult] = {}
        listed = read_rows(self.folder, "results", self.files("results"))
        for result in (*(StoredResult(**row) for row in listed), *_told(self._manifest.recent)):
            # A death between an entry and its checkpoint leaves what both say in both, in the same order.
            if result.status == _WITHDRAWN:
                found.pop(result.spec, None)
            else:
                found[result.spec] = result
        return found

    @property
    def bytes(self) -> int:
        """What the listed files take."""
        return self._manifest.bytes

    @property
    def replaced(self) -> set[str]:
        """Paths of files whose rows are in others now; they may still be there."""
        return set(self._manifest.replaced)

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
            self._add(Entry((*files, *own), tuple(results)))

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
        self._add(Entry(withdrawn=withdrawn))

    def compact(self, *, keeps_entries: bool = False) -> None:
        """Put small files together where there are many; who reads sees every row once, at any moment.

        It looks only now and then, so that it may be called after every commit. Files that were replaced stay
        for those who are reading them, and go at a later call.

        Args:
            keeps_entries: Whether every entry of the manifest stays; see `storage.remote`.

        Raises:
            StoreError: If the disk refuses, or a file is not what was written; what is visible is the same.
        """
        if len(self._manifest.recent) >= self._due:
            self.tidy(keeps_entries=keeps_entries)

    def tidy(self, *, keeps_entries: bool = False) -> None:
        """What `compact` does, whether or not it is time. Takes and raises what that does."""
        self._due += compaction.MANY
        told = [result._asdict() for result in _told(self._manifest.recent)]
        with self._written() as own:
            if told:
                own.append(write_table(self.folder, "results", told))
            runs = compaction.scattered([*self.files(), *own])
            own += (compaction.put_together(self.folder, run) for run in runs)
            if own:
                replaced = tuple(file.path for run in runs for file in run)
                self._add(Entry(tuple(file for file in own if file.path not in replaced), replaced=replaced))
        self._manifest.checkpoint(keeps_entries=keeps_entries)
        self._due = compaction.MANY

    def remove(self, table: str, specs: Collection[str]) -> None:
        """Take the rows of specs out of a table; their files stay for a while, as `compact` leaves them.

        Raises:
            StoreError: If a file is not what was written, or the disk refuses.
        """
        for file in self.files(table):
            if not holds_any(self.folder, file, specs):
                continue
            with self._written() as own:
                if (rest := compaction.rest_of(self.folder, file, specs)) is not None:
                    own.append(rest)
                self._add(Entry(tuple(own), replaced=(file.path,)))

    def _status(self, spec: str) -> str | None:
        result = self.results.get(spec)
        return None if result is None else result.status

    def _add(self, entry: Entry) -> None:
        results = self.results  # as it was
        self._manifest.add(entry)
        for spec in entry.withdrawn:
            del results[spec]
        results.update({result.spec: result for result in entry.results})

    def files(self, table: str | None = None) -> list[TableFile]:
        """The listed files of one table, or of all."""
        return [file for file in self._manifest.files.values() if table in (None, file.table)]

    def rows(self, table: str) -> list[dict[str, Any]]:
        """All visible rows of one table; of trials those whose result still counts."""
        rows = read_rows(self.folder, table, self.files(table))
        if table != "trials" or not self._manifest.void:
            return rows
        void = set(self._manifest.void)
        return [row for row in rows if (row["trial"], row["finished"]) not in void]

    def artifacts(self) -> dict[str, Artifact]:
        """The artifact of each spec that has one; the latest, if one was lost and made again."""
        return {
            row["spec"]: Artifact(row["hash"], row["path"], row["bytes"]) for row in self.rows("artifacts")
        }

    def withdrawn_trials(self) -> list[tuple[int, float]]:
        """Rows of the table trials that count no more: number, and when they ended, s since 1970."""
        return list(self._manifest.void)


def _told(entries: Iterable[Entry]) -> Iterator[StoredResult]:
    """What entries say of results, in order; the table `results` keeps it so."""
    for entry in entries:
        yield from (StoredResult(spec, _WITHDRAWN, None) for spec in entry.withdrawn)
        yield from entry.results


def _check_there(folder: Path, file: TableFile) -> None:
    found = folder / file.path
    if not found.is_file() or found.stat().st_size != file.bytes:
        raise StoreError(f"{found} is gone or not what was written, {file.bytes} bytes")

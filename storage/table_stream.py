"""A file of one table that is written while its rows come."""

import hashlib
import os
import uuid
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from storage.durable import cannot_write
from storage.parquet import TableFile, array_columns, arrow_schema, columns_of, columns_to_arrow, new_path
from storage.schema import ROW_GROUPS_BY, SCHEMA_VERSION

ROW_GROUP_BYTES = 16 * 2**20
_GROUPED = 4
"""A stream holds less than a row group between two writes; than so many where values have their own ones."""


class TableStream:
    """A file of one table whose rows come in chunks and are written as they come.

    What is there so far stands under another name, which readers pass by and `remove_staging` removes, until
    the stream is finished. What has been gathered is compressed and written by a thread while more comes, and
    another takes the hash behind it, so twice the rows of `buffered_bytes` are held at the most.

    Args:
        folder: The sweep's folder.
        table: Name in `TABLES`.

    Attributes:
        rows: Number of rows so far.
        buffered_bytes: Bytes of the rows that are not written yet.

    Raises:
        KeyError: If there is no such table.
        StoreError: If the disk refuses.
    """

    def __init__(self, folder: Path, table: str) -> None:
        self.rows = 0
        self.buffered_bytes = 0
        self._folder = folder
        self._table = table
        self._buffered: dict[Any, list[pa.Table]] = {}
        self._most_bytes = ROW_GROUP_BYTES * (_GROUPED if table in ROW_GROUPS_BY else 1)
        text = [column.name for column in columns_of(table) if column.kind == "text"]
        self._path = new_path(folder, table)
        self._staging = self._path.with_name(f".{self._path.name}.{uuid.uuid4().hex[:8]}")
        with _refusals(self._path):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            # Not a file of Python's: its thread would wait for this one at every page.
            self._file = pa.OSFile(str(self._staging), "wb")
            self._hash = _FollowingHash(self._staging)
        # Compressing is most of the time; it goes on while the next rows come.
        self._compressing = ThreadPoolExecutor(1)
        self._pending: Future[None] | None = None
        self._writer = pq.ParquetWriter(
            self._file,
            arrow_schema(table),
            compression="zstd",
            # Halves hardly shrink; level 1 tries at a third of the speed, for 7 % (decision 64).
            compression_level=-1 if array_columns(table) else None,
            use_dictionary=text,
            write_statistics=[name for name in arrow_schema(table).names if name not in array_columns(table)],
            write_page_checksum=True,
        )

    def write(self, columns: Mapping[str, Any]) -> None:
        """Add a chunk of rows.

        Args:
            columns: As `columns_to_arrow` takes them.

        Raises:
            StoreError: If the disk refuses.
            KeyError, TypeError, ValueError: As `columns_to_arrow` does; nothing is added then.
        """
        self.append(columns_to_arrow(self._table, columns))

    def append(self, chunk: pa.Table) -> None:
        """Add rows that have the table's schema. Raises StoreError if the disk refuses."""
        self.rows += chunk.num_rows
        self.buffered_bytes += chunk.nbytes
        for key, part in _runs(chunk, ROW_GROUPS_BY.get(self._table)):
            self._buffered.setdefault(key, []).append(part)
        if self.buffered_bytes >= self._most_bytes:
            self._write_out()

    def _write_out(self) -> None:
        self._await()
        self._pending = self._compressing.submit(self._write_groups, list(self._buffered.values()))
        self._buffered, self.buffered_bytes = {}, 0

    def _write_groups(self, groups: list[list[pa.Table]]) -> None:
        for parts in groups:
            together = pa.concat_tables(parts).combine_chunks()
            bytes_per_row = max(1, together.nbytes // max(1, together.num_rows))
            with _refusals(self._path):
                self._writer.write_table(together, row_group_size=max(1, ROW_GROUP_BYTES // bytes_per_row))
            self._hash.follow()

    def _await(self) -> None:
        """Rows that were handed over are written; raises what became of them."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def finish(self) -> TableFile:
        """Write what is left and put the file in its place, whole. Raises StoreError if the disk refuses."""
        if self._buffered:
            self._write_out()
        self._await()
        self._compressing.shutdown()
        with _refusals(self._path):
            self._writer.close()
            self._file.close()
            digest = self._hash.finish()
            self._hash.close()
            with self._staging.open("rb") as written:
                os.fsync(written.fileno())
                size = os.fstat(written.fileno()).st_size
            self._staging.replace(self._path)
        path = str(self._path.relative_to(self._folder))
        return TableFile(self._table, path, self.rows, size, digest, SCHEMA_VERSION)

    def abandon(self) -> None:
        """Leave nothing behind; after `finish` it does nothing."""
        self._buffered, self.buffered_bytes = {}, 0
        with suppress(Exception):  # why it is abandoned has been said
            self._await()
        self._compressing.shutdown()
        with suppress(OSError, pa.ArrowException):
            self._writer.close()
        with suppress(OSError):
            self._file.close()
        self._hash.close()
        with suppress(OSError):
            self._staging.unlink()


class _FollowingHash:
    """The hash of a file that is only added to, taken while more is added."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("rb", buffering=0)
        self._hash = hashlib.sha256()
        self._thread = ThreadPoolExecutor(1)

    def follow(self) -> None:
        """Go on, elsewhere, to where the file ends then."""
        self._thread.submit(self._take)

    def _take(self) -> None:
        while content := self._file.read(2**20):
            self._hash.update(content)

    def finish(self) -> str:
        """The hash of all of it."""
        self._thread.submit(self._take).result()
        return self._hash.hexdigest()

    def close(self) -> None:
        self._thread.shutdown()
        self._file.close()


def _runs(chunk: pa.Table, column: str | None) -> Iterator[tuple[Any, pa.Table]]:
    """Neighbouring rows of equal values in a column, with the value; all rows with None without a column."""
    if column is None:
        yield None, chunk
        return
    values = chunk[column].fill_null(-1).to_numpy()
    ends = [*np.flatnonzero(values[1:] != values[:-1]) + 1, len(values)]
    first = 0
    for end in ends if len(values) else []:
        yield values[first], chunk.slice(first, end - first)
        first = end


@contextmanager
def _refusals(path: Path) -> Iterator[None]:
    """Inside the block an OSError becomes a StoreError that names the file."""
    try:
        yield
    except OSError as error:
        raise cannot_write(path, error) from error

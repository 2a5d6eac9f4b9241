"""Rows to and from Parquet files."""

import hashlib
import math
import os
import uuid
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from storage.durable import StoreError, cannot_write, publish
from storage.schema import ROW_GROUPS_BY, SCHEMA_VERSION, TABLES, Column

_TYPES = {
    "text": pa.string(),
    "json": pa.string(),
    "integer": pa.int64(),
    "real": pa.float64(),
    "real32[]": pa.list_(pa.float32()),
    "array": pa.binary(),  # lists of numbers are written at a sixth of the speed (decision 64)
}
ROW_GROUP_BYTES = 16 * 2**20
_GROUPED = 4
"""A stream holds less than a row group between two writes; than so many where values have their own ones."""


class TableFile(NamedTuple):
    """A file of one table, as the manifest lists it.

    Attributes:
        table: Name in `TABLES`.
        path: Relative to the sweep's folder.
        rows: Number of rows.
        bytes: Size.
        sha256: Of its content.
        schema: Version of the schema that it has; the manifest notes it since version 6.
    """

    table: str
    path: str
    rows: int
    bytes: int
    sha256: str
    schema: int = 5


def warm_up() -> None:
    """Have Arrow import pandas, as it does at its first conversion, at a time when nobody waits for it."""
    pa.array([0])


@cache
def arrow_schema(table: str) -> pa.Schema:
    """The table's Arrow schema, with unit and meaning as column metadata."""
    fields = [
        pa.field(column.name, _TYPES[column.kind], metadata={"unit": column.unit, "meaning": column.meaning})
        for column in TABLES[table]
    ]
    return pa.schema(fields, metadata={"steersweep_schema": str(SCHEMA_VERSION), "table": table})


def write_table(folder: Path, table: str, rows: Sequence[Mapping[str, Any]]) -> TableFile:
    """Write rows to a new file of the table; it appears whole or not at all.

    Args:
        folder: The sweep's folder.
        table: Name in `TABLES`.
        rows: One mapping a row; absent columns are null, NaN and infinities become null.

    Returns:
        The file, its path relative to `folder`.

    Raises:
        StoreError: If the disk refuses; nothing is left behind then.
        KeyError, TypeError, ValueError: As `to_arrow` does.
    """
    sink = pa.BufferOutputStream()
    pq.write_table(to_arrow(table, rows), sink, compression="zstd", write_page_checksum=True)
    content = sink.getvalue().to_pybytes()
    path = _new_path(folder, table)
    publish(path, content)
    digest = hashlib.sha256(content).hexdigest()
    return TableFile(table, str(path.relative_to(folder)), len(rows), len(content), digest, SCHEMA_VERSION)


def _new_path(folder: Path, table: str) -> Path:
    return folder / "tables" / table / f"{uuid.uuid4().hex}.parquet"


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
        text = [column.name for column in _columns(table) if column.kind == "text"]
        self._path = _new_path(folder, table)
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
            compression_level=-1 if _arrays(table) else None,
            use_dictionary=text,
            write_statistics=[name for name in arrow_schema(table).names if name not in _arrays(table)],
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
        with suppress(StoreError):
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


def _arrays(table: str) -> list[str]:
    """Columns that hold arrays as bytes."""
    return [column.name for column in _columns(table) if column.kind == "array"]


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


def _columns(table: str) -> tuple[Column, ...]:
    if table not in TABLES:
        raise KeyError(f"no table {table!r}; there are {sorted(TABLES)}")
    return TABLES[table]


def _check_known(table: str, names: Iterable[str]) -> None:
    known = {column.name for column in TABLES[table]}
    if unknown := set(names) - known:
        raise KeyError(f"table {table} has no columns {sorted(unknown)}; it has {sorted(known)}")


def columns_to_arrow(table: str, columns: Mapping[str, Any]) -> pa.Table:
    """Columns as they will be stored.

    Args:
        table: Name in `TABLES`.
        columns: Column -> an array or list with one entry a row, for vectors an array of shape (rows,
            width), or one text, number or None that all rows share; absent columns are null, and so are
            NaN and infinities outside vectors. Vectors of kind `array` are kept in float16 if they are that,
            and in float32 otherwise; `dtype` says so.

    Raises:
        KeyError: If there is no such table or column.
        TypeError, ValueError: If a value does not fit its column, or columns differ in length.
    """
    stored = _columns(table)
    _check_known(table, columns)
    columns = {**columns, **_dtypes(table, columns)}
    lengths = {name: len(values) for name, values in columns.items() if _is_column(values)}
    if len(set(lengths.values())) != 1:
        raise ValueError(f"columns of table {table} of lengths {lengths}; give one entry a row in each")
    rows = next(iter(lengths.values()))
    arrays = [_array(columns.get(column.name), column, rows) for column in stored]
    return pa.table(arrays, schema=arrow_schema(table))


def _dtypes(table: str, columns: Mapping[str, Any]) -> dict[str, str]:
    """`dtype` of a table with arrays."""
    return {"dtype": _kept_dtype(columns[name]) for name in _arrays(table)[:1] if name in columns}  # noqa: B035


def _kept_dtype(values: np.ndarray) -> str:
    return "float16" if values.dtype == np.float16 else "float32"


def _is_column(values: Any) -> bool:
    return isinstance(values, (np.ndarray, list, tuple))


def _array(values: Any, column: Column, rows: int) -> pa.Array:
    if not _is_column(values):
        return pa.repeat(pa.scalar(_cell(values, column), _TYPES[column.kind]), rows)
    if column.kind == "real":
        numbers = np.asarray(values, dtype=np.float64)
        return pa.array(numbers, pa.float64(), mask=~np.isfinite(numbers))
    if column.kind == "real32[]" and isinstance(values, np.ndarray):
        return _vectors(values, column)
    if column.kind == "array":
        return _packed(values, column)
    # Arrow would go on looking at the caller's memory.
    return pa.array(values.copy() if isinstance(values, np.ndarray) else values, _TYPES[column.kind])


def _vectors(values: np.ndarray, column: Column) -> pa.Array:
    if values.ndim != 2:
        raise ValueError(f"column {column.name} of shape {values.shape}; it takes (rows, width)")
    rows, width = values.shape
    flat = pa.array(np.array(values, dtype=np.float32).reshape(-1))
    return pa.ListArray.from_arrays(pa.array(np.arange(rows + 1) * width, pa.int32()), flat)


def _packed(values: np.ndarray, column: Column) -> pa.Array:
    if values.ndim != 2:
        raise ValueError(f"column {column.name} of shape {values.shape}; it takes (rows, width)")
    rows, width = values.shape
    content = np.array(values, dtype=np.dtype(_kept_dtype(values)).newbyteorder("<"), order="C")
    ends = np.arange(rows + 1, dtype=np.int32) * np.int32(width * content.itemsize)
    return pa.Array.from_buffers(pa.binary(), rows, [None, pa.py_buffer(ends), pa.py_buffer(content)])


def unpacked(content: bytes, dtype: str) -> np.ndarray:
    """The numbers of an array that a file holds as bytes, shape (width,), float32."""
    return np.frombuffer(content, np.dtype(dtype).newbyteorder("<")).astype(np.float32)


def numbers(column: pa.ChunkedArray) -> np.ndarray:
    """A column without nulls; Arrow's own way imports pandas first, which takes a quarter of a second."""
    return np.from_dlpack(column.combine_chunks())


def to_arrow(table: str, rows: Sequence[Mapping[str, Any]]) -> pa.Table:
    """The rows as they will be stored.

    Raises:
        KeyError: If there is no such table, or a row has a column that the schema does not know.
        TypeError, ValueError: If a value does not fit its column.
    """
    columns = _columns(table)
    _check_known(table, {name for row in rows for name in row})
    arrays = [[_cell(row.get(column.name), column) for row in rows] for column in columns]
    return pa.table(
        dict(zip([column.name for column in columns], arrays, strict=True)), schema=arrow_schema(table)
    )


def _cell(value: Any, column: Column) -> Any:
    if column.kind == "real" and value is not None:
        return float(value) if math.isfinite(value) else None
    return value


def read_rows(folder: Path, table: str, files: Iterable[TableFile]) -> list[dict[str, Any]]:
    """All rows of a table's listed files, arrays as lists. Raises StoreError if one is not as written."""
    rows = [row for file in files if file.table == table for row in read_table(folder, file).to_pylist()]
    for name in _arrays(table):
        for row in rows:
            row[name] = unpacked(row[name], row["dtype"]).tolist()
    return rows


def read_table(folder: Path, file: TableFile) -> pa.Table:
    """A listed file. Raises StoreError if it is not what was written."""
    with _complaints(folder / file.path):
        content = (folder / file.path).read_bytes()
        if hashlib.sha256(content).hexdigest() != file.sha256:
            raise StoreError(f"{folder / file.path} is not what was written: it has another content")
        if _arrays(file.table) and file.schema < PACKED_SINCE:
            return _repacked(file.table, pq.read_table(pa.BufferReader(content)))
        return pq.read_table(pa.BufferReader(content), schema=arrow_schema(file.table))


@contextmanager
def _complaints(path: Path) -> Iterator[None]:
    """Whatever goes wrong in reading a file, as a StoreError."""
    try:
        yield
    except (OSError, pa.ArrowException) as error:
        why = " ".join(str(error).split())
        raise StoreError(f"{path} is not what was written: {why}") from error


def holds_any(folder: Path, file: TableFile, specs: Collection[str]) -> bool:
    """Whether a listed file has rows of any of some specs. Raises StoreError if it cannot be read."""
    with _complaints(folder / file.path):
        column = pq.read_table(folder / file.path, columns=["spec"])["spec"]
    return not set(column.unique().to_pylist()).isdisjoint(specs)


def rest_of(folder: Path, file: TableFile, specs: Collection[str]) -> TableFile | None:
    """Write the rows of a listed file that are of none of some specs to a new one, a row group at a time.

    Returns:
        The new file; None if no rows are left.

    Raises:
        StoreError: If the file is not what was written, or the disk refuses; nothing is left behind then.
    """
    stream = TableStream(folder, file.table)
    try:
        with (
            _complaints(folder / file.path),
            pq.ParquetFile(folder / file.path, page_checksum_verification=True) as kept,
        ):
            for group in range(kept.num_row_groups):
                rows = kept.read_row_group(group)
                if _arrays(file.table) and file.schema < PACKED_SINCE:
                    rows = _repacked(file.table, rows)
                others = pc.invert(pc.is_in(rows["spec"], pa.array(sorted(specs), pa.string())))
                if (left := rows.filter(others)).num_rows:
                    stream.append(left.cast(arrow_schema(file.table)))
        return stream.finish() if stream.rows else None
    finally:
        stream.abandon()


PACKED_SINCE = 6
"""Version of the schema in which arrays became bytes; they were lists before."""


def _repacked(table: str, older: pa.Table) -> pa.Table:
    """A table of an older version, whose arrays are lists of float32."""
    columns: dict[str, Any] = {name: older[name].to_pylist() for name in older.column_names}
    for name in _arrays(table):
        lists = [np.asarray(each, np.float32) for each in columns[name]]
        columns |= {name: [each.tobytes() for each in lists], "dtype": ["float32"] * len(lists)}
    schema = arrow_schema(table)
    nothing = [None] * older.num_rows
    return pa.table(
        [pa.array(columns.get(field.name, nothing), field.type) for field in schema], schema=schema
    )


def is_as_written(folder: Path, file: TableFile) -> bool:
    """Whether a listed file has the content that it had; it may be large."""
    with (folder / file.path).open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest() == file.sha256

"""Rows to and from Parquet files, whole ones; `table_stream` writes those that do not fit into memory."""

import hashlib
import math
import uuid
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from storage.durable import StoreError, publish
from storage.schema import SCHEMA_VERSION, TABLES, Column

_TYPES = {
    "text": pa.string(),
    "json": pa.string(),
    "integer": pa.int64(),
    "real": pa.float64(),
    "real32[]": pa.list_(pa.float32()),
    "array": pa.binary(),  # lists of numbers are written at a sixth of the speed (decision 64)
}


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
    path = new_path(folder, table)
    publish(path, content)
    digest = hashlib.sha256(content).hexdigest()
    return TableFile(table, str(path.relative_to(folder)), len(rows), len(content), digest, SCHEMA_VERSION)


def new_path(folder: Path, table: str) -> Path:
    """Where a new file of a table goes."""
    return folder / "tables" / table / f"{uuid.uuid4().hex}.parquet"


def array_columns(table: str) -> list[str]:
    """Columns that hold arrays as bytes."""
    return [column.name for column in columns_of(table) if column.kind == "array"]


def columns_of(table: str) -> tuple[Column, ...]:
    """What the schema says of a table. Raises KeyError if there is none of that name."""
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
    stored = columns_of(table)
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
    return {"dtype": _kept_dtype(columns[name]) for name in array_columns(table)[:1] if name in columns}  # noqa: B035


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
    columns = columns_of(table)
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
    for name in array_columns(table):
        for row in rows:
            row[name] = unpacked(row[name], row["dtype"]).tolist()
    return rows


def read_table(folder: Path, file: TableFile) -> pa.Table:
    """A listed file. Raises StoreError if it is not what was written."""
    with _complaints(folder / file.path):
        content = (folder / file.path).read_bytes()
        if hashlib.sha256(content).hexdigest() != file.sha256:
            raise StoreError(f"{folder / file.path} is not what was written: it has another content")
        if array_columns(file.table) and file.schema < PACKED_SINCE:
            return _repacked(file.table, pq.read_table(pa.BufferReader(content)))
        return pq.read_table(pa.BufferReader(content), schema=arrow_schema(file.table))


def read_groups(folder: Path, file: TableFile) -> Iterator[pa.Table]:
    """A listed file a row group at a time. Raises StoreError if it cannot be read or a page has changed."""
    with (
        _complaints(folder / file.path),
        pq.ParquetFile(folder / file.path, page_checksum_verification=True) as kept,
    ):
        for number in range(kept.num_row_groups):
            rows = kept.read_row_group(number)
            if array_columns(file.table) and file.schema < PACKED_SINCE:
                rows = _repacked(file.table, rows)
            yield rows.cast(arrow_schema(file.table))


def without_specs(rows: pa.Table, specs: Collection[str]) -> pa.Table:
    """The rows that are of none of some specs."""
    return rows.filter(pc.invert(pc.is_in(rows["spec"], pa.array(sorted(specs), pa.string()))))


def holds_any(folder: Path, file: TableFile, specs: Collection[str]) -> bool:
    """Whether a listed file has rows of any of some specs. Raises StoreError if it cannot be read."""
    with _complaints(folder / file.path):
        column = pq.read_table(folder / file.path, columns=["spec"])["spec"]
    return not set(column.unique().to_pylist()).isdisjoint(specs)


@contextmanager
def _complaints(path: Path) -> Iterator[None]:
    """Whatever goes wrong in reading a file, as a StoreError."""
    try:
        yield
    except (OSError, pa.ArrowException) as error:
        why = " ".join(str(error).split())
        raise StoreError(f"{path} is not what was written: {why}") from error


PACKED_SINCE = 6
"""Version of the schema in which arrays became bytes; they were lists before."""


def _repacked(table: str, older: pa.Table) -> pa.Table:
    """A table of an older version, whose arrays are lists of float32."""
    columns: dict[str, Any] = {name: older[name].to_pylist() for name in older.column_names}
    for name in array_columns(table):
        lists = [np.asarray(each, np.float32) for each in columns[name]]
        columns |= {name: [each.tobytes() for each in lists], "dtype": ["float32"] * len(lists)}
    schema = arrow_schema(table)
    nothing = [None] * older.num_rows
    return pa.table(
        [pa.array(columns.get(field.name, nothing), field.type) for field in schema], schema=schema
    )


def is_as_written(folder: Path, file: TableFile) -> bool:
    """Whether a listed file is there with the content that it had; it may be large."""
    if not (folder / file.path).is_file():
        return False
    with (folder / file.path).open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest() == file.sha256

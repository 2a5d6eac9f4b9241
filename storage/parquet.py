"""Rows to and from Parquet files. The only importer of pyarrow."""

import hashlib
import math
import uuid
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from storage.durable import StoreError, publish
from storage.schema import SCHEMA_VERSION, TABLES, Column

_TYPES = {
    "text": pa.string(),
    "json": pa.string(),
    "integer": pa.int64(),
    "real": pa.float64(),
    "real32[]": pa.list_(pa.float32()),
}


class TableFile(NamedTuple):
    """A file of one table, as the manifest lists it."""

    table: str
    path: str
    rows: int
    bytes: int
    sha256: str


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
    path = folder / "tables" / table / f"{uuid.uuid4().hex}.parquet"
    publish(path, content)
    return TableFile(
        table, str(path.relative_to(folder)), len(rows), len(content), hashlib.sha256(content).hexdigest()
    )


def to_arrow(table: str, rows: Sequence[Mapping[str, Any]]) -> pa.Table:
    """The rows as they will be stored.

    Raises:
        KeyError: If there is no such table, or a row has a column that the schema does not know.
        TypeError, ValueError: If a value does not fit its column.
    """
    if table not in TABLES:
        raise KeyError(f"no table {table!r}; there are {sorted(TABLES)}")
    columns = TABLES[table]
    known = {column.name for column in columns}
    for row in rows:
        if unknown := set(row) - known:
            raise KeyError(f"table {table} has no columns {sorted(unknown)}; it has {sorted(known)}")
    arrays = [[_cell(row.get(column.name), column) for row in rows] for column in columns]
    return pa.table(
        dict(zip([column.name for column in columns], arrays, strict=True)), schema=arrow_schema(table)
    )


def _cell(value: Any, column: Column) -> Any:
    if column.kind == "real" and value is not None:
        return float(value) if math.isfinite(value) else None
    return value


def read_rows(folder: Path, table: str, files: Iterable[TableFile]) -> list[dict[str, Any]]:
    """All rows of the listed files of one table. Raises StoreError if one is not what was written."""
    rows: list[dict[str, Any]] = []
    for file in files:
        if file.table == table:
            try:
                rows += pq.read_table(folder / file.path, schema=arrow_schema(table)).to_pylist()
            except (OSError, pa.ArrowException) as error:
                why = " ".join(str(error).split())
                raise StoreError(f"{folder / file.path} is not what was written: {why}") from error
    return rows

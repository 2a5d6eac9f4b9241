"""Files of a table into new ones: many small ones into one, or one without the rows of some results."""

from collections.abc import Collection, Iterable, Sequence
from pathlib import Path

from storage.parquet import TableFile, read_groups, read_table, without_specs
from storage.table_stream import TableStream

SMALL_BYTES = 4 * 2**20
"""A file that is larger stays as it is."""
MANY = 64
"""So many small files of a table are worth putting together."""


def scattered(files: Iterable[TableFile]) -> list[list[TableFile]]:
    """Files that should be put together, table by table: all small ones behind the last large one, in order.

    Args:
        files: The listed files, in the order of their entries.
    """
    runs: dict[str, list[TableFile]] = {}
    for file in files:
        run = runs.setdefault(file.table, [])
        if file.bytes < SMALL_BYTES:
            run.append(file)
        else:
            run.clear()
    return [run for run in runs.values() if len(run) >= MANY]


def put_together(folder: Path, files: Sequence[TableFile]) -> TableFile:
    """Write the rows of files of one table to a new one, in order.

    Args:
        folder: The sweep's folder.
        files: Of one table.

    Raises:
        StoreError: If a file is not what was written, or the disk refuses; nothing is left behind then.
    """
    stream = TableStream(folder, files[0].table)
    try:
        for file in files:
            stream.append(read_table(folder, file))
        return stream.finish()
    finally:
        stream.abandon()


def rest_of(folder: Path, file: TableFile, specs: Collection[str]) -> TableFile | None:
    """Write the rows of a listed file that are of none of some specs to a new one, a row group at a time.

    Returns:
        The new file; None if no rows are left.

    Raises:
        StoreError: If the file is not what was written, or the disk refuses; nothing is left behind then.
    """
    stream = TableStream(folder, file.table)
    try:
        for rows in read_groups(folder, file):
            if (left := without_specs(rows, specs)).num_rows:
                stream.append(left)
        return stream.finish() if stream.rows else None
    finally:
        stream.abandon()

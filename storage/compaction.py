"""Many small files of a table into one, so that a long sweep is read as fast as a short one."""

from collections.abc import Iterable, Sequence
from pathlib import Path

from storage.parquet import TableFile, TableStream, read_table

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

"""Files that appear whole or not at all, and logs that survive a torn last line."""

import json
import os
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any


def publish(path: Path, content: bytes) -> None:
    """Write a file under another name, sync it, rename it into place.

    Raises:
        OSError: If the disk refuses; no file is left behind then.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    staging = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}")
    try:
        with staging.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        staging.replace(path)
    except BaseException:
        staging.unlink(missing_ok=True)
        raise


class Log:
    """An append-only file of JSON lines, synced at every append."""

    def __init__(self, path: Path) -> None:
        self._path = path
        drop_torn_line(path)

    def append(self, *events: Mapping[str, Any]) -> None:
        """Add events and sync once. Raises OSError if the disk refuses."""
        text = "".join(json.dumps(event, ensure_ascii=False) + "\n" for event in events)
        with self._path.open("ab") as file:
            file.write(text.encode())
            file.flush()
            os.fsync(file.fileno())


def read_log(path: Path) -> Iterator[dict[str, Any]]:
    """Events of a log, oldest first; a torn last line is left out."""
    if not path.exists():
        return
    with path.open("rb") as file:
        for line in file:
            if line.endswith(b"\n"):
                yield json.loads(line)


def drop_torn_line(path: Path) -> None:
    """Cut a file of lines back to its last line end; a writer that died may have left half a line."""
    if not path.exists():
        return
    with path.open("r+b") as file:
        content = file.read()
        whole = content.rfind(b"\n") + 1
        if whole < len(content):
            file.truncate(whole)
            file.flush()
            os.fsync(file.fileno())

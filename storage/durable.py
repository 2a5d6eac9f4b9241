"""Files that appear whole or not at all, and logs that survive a torn last line."""

import errno
import json
import os
import uuid
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from jobs.errors import SteersweepError


class StoreError(SteersweepError):
    """A sweep's folder cannot be written, or is not what was stored; what was accepted before stays."""


class DiskFull(StoreError):
    """There is no room for a file; once there is, the same write succeeds."""


def cannot_write(path: Path, error: OSError) -> StoreError:
    """The error of a write that the system has refused."""
    kind = DiskFull if error.errno in (errno.ENOSPC, errno.EDQUOT) else StoreError
    return kind(f"cannot write {path}: {error.strerror or error}")


def publish(path: Path, content: bytes) -> None:
    """Write a file under another name, sync it, rename it into place.

    Raises:
        StoreError: If the disk refuses; no file is left behind then.
    """
    staging = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with staging.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        staging.replace(path)
    except BaseException as error:
        with suppress(OSError):
            staging.unlink()
        if isinstance(error, OSError):
            raise cannot_write(path, error) from error
        raise


class Log:
    """An append-only file of JSON lines, synced at every append."""

    def __init__(self, path: Path) -> None:
        self._path = path
        drop_torn_line(path)

    def append(self, *events: Mapping[str, Any]) -> None:
        """Add events and sync once. Raises StoreError if the disk refuses; nothing is added then."""
        text = "".join(json.dumps(event, ensure_ascii=False) + "\n" for event in events)
        before = self._path.stat().st_size if self._path.exists() else 0
        try:
            with self._path.open("ab") as file:
                file.write(text.encode())
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            with suppress(OSError):
                os.truncate(self._path, before)
            raise cannot_write(self._path, error) from error


def read_log(path: Path) -> Iterator[dict[str, Any]]:
    """Events of a log, oldest first; a torn last line is left out.

    Raises:
        StoreError: If any other line is no JSON.
    """
    if not path.exists():
        return
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if line.endswith(b"\n"):
                try:
                    yield json.loads(line)
                except ValueError as error:
                    raise StoreError(f"{path}, line {number} is not what was written: {error}") from error


def read_log_backwards(path: Path) -> Iterator[dict[str, Any]]:
    """Events of a log, newest first; a torn last line is left out. Raises as `read_log` does."""
    for line in _lines_backwards(path) if path.exists() else ():
        try:
            yield json.loads(line)
        except ValueError as error:
            raise StoreError(f"{path} is not what was written: {error}") from error


def _lines_backwards(path: Path) -> Iterator[bytes]:
    """Lines of a file that end in a line end, last first."""
    with path.open("rb") as file:
        place = file.seek(0, os.SEEK_END)
        begun, is_last = b"", True
        while place > 0:
            size = min(_BLOCK_BYTES, place)
            place -= size
            file.seek(place)
            begun, *lines = (file.read(size) + begun).split(b"\n")
            if lines and is_last:
                del lines[-1]
                is_last = False
            yield from reversed(lines)
        if not is_last:
            yield begun


_BLOCK_BYTES = 2**20


def is_torn(path: Path) -> bool:
    """Whether a file of lines ends within one."""
    if not path.exists() or path.stat().st_size == 0:
        return False
    with path.open("rb") as file:
        file.seek(-1, os.SEEK_END)
        return file.read() != b"\n"


def drop_torn_line(path: Path) -> None:
    """Cut a file of lines back to its last line end; a writer that died may have left half a line."""
    if not is_torn(path):
        return
    with path.open("r+b") as file:
        file.truncate(file.read().rfind(b"\n") + 1)
        file.flush()
        os.fsync(file.fileno())


def staging_files(folder: Path) -> list[Path]:
    """What writers that died have left half-written anywhere in a folder."""
    return sorted(path for path in folder.rglob(".*.????????") if path.is_file())


def remove_staging(folder: Path) -> None:
    """Remove what writers that died have left half-written anywhere in a folder."""
    for path in staging_files(folder):
        path.unlink(missing_ok=True)

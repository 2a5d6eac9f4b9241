"""Who drives a sweep: one process at a time holds the lock in its folder, and lets go when it dies."""

import fcntl
import getpass
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from jobs.errors import SpecError

_LOOKS, _LOOK_SECONDS = 5, 0.02


@contextmanager
def driving(folder: Path) -> Iterator[None]:
    """Inside the block this process is the sweep's only driver.

    Raises:
        SpecError: If another process drives it; its owner is named.
        OSError: If the folder cannot be written.
    """
    with _locked(folder) as file:
        file.truncate(0)
        file.write(f"{getpass.getuser()} on {socket.gethostname()}, process {os.getpid()}")
        file.flush()
        yield


def driver(folder: Path) -> str | None:
    """User, machine and process that drive the sweep now; None if nobody does."""
    path = folder / "lock"
    if not path.is_file():
        return None
    with path.open(encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return file.read().strip()
    return None


def _lock(file: IO[str]) -> None:
    """Who only looks whether somebody drives holds it for a moment; a driver does for long."""
    for _ in range(_LOOKS):
        with suppress(BlockingIOError):
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        time.sleep(_LOOK_SECONDS)
    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def _locked(folder: Path) -> IO[str]:
    """The locked file. One that was removed before it was locked protects nothing: it is made again."""
    path = folder / "lock"
    while True:
        file = path.open("a+", encoding="utf-8")
        try:
            _lock(file)
        except BlockingIOError as error:
            with file:
                file.seek(0)
                owner = file.read().strip()
            raise SpecError(f"{folder} is being run by {owner}; wait for it or stop it") from error
        if path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat()):
            return file
        file.close()

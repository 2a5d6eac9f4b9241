"""A sweep's own records copied to its remote place in a thread of their own, by one driver at a time."""

import logging
import threading
from pathlib import Path

from storage.durable import StoreError
from storage.lease import Lease
from storage.remote import Remote

logger = logging.getLogger(__name__)

_SECONDS = 30.0
_BEHIND = "copies of the sweep are behind, its folder has everything"
_TAKEN = "another driver has taken the sweep: stop this one, of which nothing is copied now"


class Backup:
    """Copies what is new in a sweep's folder now and then, until it is closed.

    Args:
        folder: The sweep's folder, which this process drives.
        remote: Where to.

    Raises:
        SpecError: If another driver copies the sweep there, or has gone on with it.
        StoreError: If the first copy fails; later failures are one warning.
    """

    def __init__(self, folder: Path, remote: Remote) -> None:
        self._folder = folder
        self._remote = remote
        self._closing = threading.Event()
        self._warned: set[str] = set()
        self._lease = Lease(folder, remote)
        try:
            remote.check_behind(folder)
            remote.put_new(folder, self._lease.holds)
        except BaseException:
            self._lease.end()
            raise
        self._thread = threading.Thread(target=self._work, name="backup", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Copy what is left, and let others drive the sweep."""
        self._closing.set()
        self._thread.join()
        self._lease.end()

    def _work(self) -> None:
        while not self._closing.wait(_SECONDS):
            self._copy()
        self._copy()

    def _copy(self) -> None:
        try:
            if self._lease.holds() and self._remote.put_new(self._folder, self._lease.holds):
                self._warned.discard(_BEHIND)
            else:
                self._warn(_TAKEN)
        except (StoreError, OSError) as error:
            self._warn(_BEHIND, f": {error}")

    def _warn(self, text: str, why: str = "") -> None:
        if text not in self._warned:
            logger.warning("%s%s", text, why)
        self._warned.add(text)

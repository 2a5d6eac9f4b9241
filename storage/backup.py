"""A sweep's own records copied to its remote place in a thread of their own."""

import logging
import threading
from pathlib import Path

from storage.durable import StoreError
from storage.remote import Remote

logger = logging.getLogger(__name__)

_SECONDS = 30.0


class Backup:
    """Copies what is new in a sweep's folder now and then, until it is closed.

    Args:
        folder: The sweep's folder.
        remote: Where to.

    Raises:
        StoreError: If the first copy fails; later failures are one warning.
    """

    def __init__(self, folder: Path, remote: Remote) -> None:
        self._folder = folder
        self._remote = remote
        self._closing = threading.Event()
        self._has_warned = False
        remote.put_new(folder)
        self._thread = threading.Thread(target=self._work, name="backup", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Copy what is left."""
        self._closing.set()
        self._thread.join()

    def _work(self) -> None:
        while not self._closing.wait(_SECONDS):
            self._copy()
        self._copy()

    def _copy(self) -> None:
        try:
            self._remote.put_new(self._folder)
            self._has_warned = False
        except (StoreError, OSError) as error:
            if not self._has_warned:
                logger.warning("copies of the sweep are behind, its folder has everything: %s", error)
            self._has_warned = True

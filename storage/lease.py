"""Who drives a sweep whose files are in a bucket: drivers that share no disk see each other there."""

import hashlib
import time
import uuid
from contextlib import suppress
from pathlib import Path

from jobs.errors import SpecError
from storage.durable import StoreError, publish
from storage.remote import DRIVERS, Remote

_FRESH_SECONDS = 120.0
_RENEW_SECONDS = 30.0


class Lease:
    """A file of this driver's own among those of its sweep, renewed when it is asked whether it holds.

    Times are those of the clock over there. Who starts at the same moment as another is refused with it.

    Args:
        folder: The sweep's folder, with the `lock` that this process holds.
        remote: Where the sweep's files are exchanged.

    Raises:
        SpecError: If another driver has renewed its own lease a short time ago.
        StoreError: If that cannot be found out.
    """

    def __init__(self, folder: Path, remote: Remote) -> None:
        self._folder = folder
        self._remote = remote
        self._path = DRIVERS + _name(folder)
        self._is_lost = False
        if (other := self._claim()) is not None:
            raise SpecError(f"the sweep is being run by {other}")

    def _claim(self) -> str | None:
        """Show that this driver runs, unless another one does: that one in words then."""
        self._put()
        leases = {path: lease for path, lease in self._remote.files(DRIVERS).items() if "." not in path}
        now = leases.pop(self._path).changed
        for path, lease in leases.items():
            age = max(0.0, now - lease.changed)
            if age < _FRESH_SECONDS and (owner := self._remote.text(path)):
                self.end()
                return (
                    f"{owner}, which was there {age:.0f} s ago; wait for it or stop it; if it has died, try "
                    f"again in {_FRESH_SECONDS - age:.0f} s"
                )
            self._remote.remove(path)
        return None

    def holds(self) -> bool:
        """Whether the sweep is still this driver's; what is lost stays lost. To be asked before each write.

        Raises:
            StoreError: If that cannot be found out.
        """
        age = _clock() - self._renewed
        if not self._is_lost and age > _RENEW_SECONDS:
            # Who takes a sweep removes the lease of the one before. After so long others may just be at it.
            is_there = self._path in self._remote.files(DRIVERS) or not self._remote.has_sweep()
            self._is_lost = not is_there or (age > _FRESH_SECONDS and self._claim() is not None)
            if not self._is_lost:
                self._put()
        return not self._is_lost

    def _put(self) -> None:
        self._remote.put(self._folder, "lock", to=self._path)
        self._renewed = _clock()

    def end(self) -> None:
        """Give it back; one that cannot be is old soon."""
        with suppress(StoreError):
            self._remote.remove(self._path)


def _clock() -> float:
    """Seconds that no setting of the clock changes; where possible, those of a suspended machine count."""
    return time.clock_gettime(getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC))


def _name(folder: Path) -> str:
    """What tells a folder from every other, also from a copy of it.

    Who goes on in the same folder holds its lock: nobody else runs there, whatever its machine is called.
    """
    path = folder / "driver"
    if not path.is_file():
        publish(path, uuid.uuid4().hex.encode())
    return hashlib.sha256(f"{path.read_text()} {path.stat().st_ino}".encode()).hexdigest()[:16]

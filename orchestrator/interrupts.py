"""Stop on Ctrl-C or SIGTERM, also where a library swallows the exception."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class Interrupts:
    """Whether somebody has asked this process to stop."""

    def __init__(self) -> None:
        self._requested = False

    def check(self) -> None:
        """Raises KeyboardInterrupt if somebody has: an exception that came up inside a callback is lost."""
        if self._requested:
            raise KeyboardInterrupt

    def take(self, number: int, frame: FrameType | None) -> None:
        """Handle a signal."""
        self._requested = True
        raise KeyboardInterrupt


@contextmanager
def stoppable() -> Iterator[Interrupts]:
    """Inside the block SIGINT and SIGTERM raise KeyboardInterrupt; begin it after Ray, which sets its own."""
    interrupts = Interrupts()
    before = {number: signal.signal(number, interrupts.take) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield interrupts
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)

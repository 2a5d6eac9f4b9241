"""Stop on Ctrl-C or SIGTERM: the first lets what runs end, the second ends at once."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


class Interrupts:
    """How often somebody has asked this process to stop."""

    def __init__(self) -> None:
        self._asked = 0

    def is_asked_to_stop(self) -> bool:
        """Whether somebody has.

        Raises:
            KeyboardInterrupt: If twice: an exception that came up inside a callback is lost.
        """
        if self._asked > 1:
            raise KeyboardInterrupt
        return self._asked == 1

    def take(self, number: int, frame: FrameType | None) -> None:
        """Handle a signal."""
        self._asked += 1
        if self._asked > 1:
            raise KeyboardInterrupt


@contextmanager
def stoppable() -> Iterator[Interrupts]:
    """Inside the block SIGINT, SIGTERM and SIGUSR1 count; begin it after Ray, which sets its own handlers."""
    interrupts = Interrupts()
    before = {number: signal.signal(number, interrupts.take) for number in _SIGNALS}
    try:
        yield interrupts
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)

"""What a running sweep shows: a live line on a terminal, a line now and then elsewhere."""

import time
from dataclasses import dataclass
from typing import Protocol

from rich.console import Console
from rich.live import Live
from rich.text import Text

from jobs.spec import Status

_LINE_SECONDS = 10.0


@dataclass(slots=True)
class Tally:
    """Counts of a sweep at one moment.

    Attributes:
        total: Trials that the sweep will have had in the end.
        running: Trials on a worker.
        preparing: Jobs on a worker that trials wait for, in words.
        completed: Trials with a result.
        infeasible: Trials that a constraint refused.
        failed: Trials that failed.
        best: The best first objective so far, in words.
        workers_ready: Workers whose replica is loaded.
        packs_ended: Packs of trials that this driver has seen to their end.
        stopping: Why only what runs is seen to its end; empty if more is started.
        paused: Why everything waits; empty if nothing does.
    """

    total: int
    running: int = 0
    preparing: str = ""
    completed: int = 0
    infeasible: int = 0
    failed: int = 0
    best: str = ""
    workers_ready: int = 0
    packs_ended: int = 0
    stopping: str = ""
    paused: str = ""

    def count(self, status: str) -> None:
        """One more trial has ended as completed, infeasible or failed."""
        match Status(status):
            case Status.COMPLETED:
                self.completed += 1
            case Status.INFEASIBLE:
                self.infeasible += 1
            case Status.FAILED:
                self.failed += 1

    @property
    def done(self) -> int:
        """Trials that have ended."""
        return self.completed + self.infeasible + self.failed


class Progress(Protocol):
    """Anything that wants to hear of progress."""

    def update(self, tally: Tally) -> None:
        """The sweep stands like this now."""


class ConsoleProgress:
    """Progress on a console; the rate counts from when the first worker was ready."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._live = Live(console=console, auto_refresh=False) if console.is_terminal else None
        self._printed = 0.0
        self._said_of_pause = ""
        self._first: tuple[float, int] | None = None
        self._started = time.monotonic()

    def __enter__(self) -> "ConsoleProgress":
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(self, *exception: object) -> None:
        if self._live is not None:
            self._live.stop()

    def update(self, tally: Tally) -> None:
        """Show the tally."""
        now = time.monotonic()
        text = describe(tally, self._rate(tally, now))
        if self._live is not None:
            self._live.update(Text(text), refresh=True)
        elif (
            now - self._printed >= _LINE_SECONDS
            or tally.done == tally.total
            or tally.paused != self._said_of_pause
        ):
            self._printed, self._said_of_pause = now, tally.paused
            self._console.print(text, highlight=False, soft_wrap=True)

    def _rate(self, tally: Tally, now: float) -> float | None:
        if self._first is None and tally.workers_ready:
            self._first = (now, tally.done)
        if self._first is None:
            return None
        since, before = self._first
        gained = tally.done - before
        return gained / (now - since) if gained > 0 and now > since else None


def describe(tally: Tally, rate: float | None) -> str:
    """One line: done, running, failed, rate in trials a minute, time left, best so far.

    The time left waits for a pack to end: the first rows come late, and then many at once.
    """
    parts = [f"{tally.done}/{tally.total} done", f"{tally.running} running", f"{tally.failed} failed"]
    if tally.preparing:
        parts.append(f"preparing: {tally.preparing}")
    if tally.infeasible:
        parts.append(f"{tally.infeasible} infeasible")
    if tally.paused:
        parts.append(f"paused: {tally.paused}")
    elif tally.stopping:
        parts.append(f"stopping when these have ended: {tally.stopping}")
    elif tally.workers_ready == 0:
        parts.append("loading the model")
    elif rate is not None:
        parts.append(f"{60 * rate:.1f} trials/min")
        if tally.packs_ended:
            left = (tally.total - tally.done) / rate
            parts.append(f"ETA {int(left // 60)}:{int(left % 60):02d}")
    if tally.best:
        parts.append(f"best {tally.best}")
    return " | ".join(parts)

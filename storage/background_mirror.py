"""The MLflow mirror in a thread of its own, so that no sweep waits for MLflow or fails with it."""

import logging
import re
import textwrap
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from storage.mlflow_log import Mirror

logger = logging.getLogger(__name__)


class BackgroundMirror:
    """A `Mirror` in a thread of its own, until it is closed; whatever goes wrong there is one warning.

    Args:
        folder: The sweep's folder.
        uri: MLflow store or server; None for the store in the folder.
        watches_machine: Whether what this machine's processors and memory do is logged too.
    """

    def __init__(self, folder: Path, uri: str | None = None, *, watches_machine: bool = False) -> None:
        self._mirror = Mirror(folder, uri)
        self._watches_machine = watches_machine
        self._end_watch: Callable[[], None] | None = None
        self._wanted = threading.Event()
        self._wanted.set()  # MLflow shows from the beginning that the sweep runs
        self._closing = threading.Event()
        self._stopped = threading.Event()
        self._artifacts: tuple[Path, ...] = ()
        self._is_sweep_complete = False
        self._has_warned = False
        self._has_everything = False
        self._thread = threading.Thread(target=self._work, name="mlflow-mirror", daemon=True)
        self._thread.start()

    def notify(self) -> None:
        """Say that there are new results; returns at once."""
        self._wanted.set()

    def close(self, artifacts: Sequence[Path], timeout_seconds: float, *, is_complete: bool) -> bool:
        """Mirror what is left, add files to the sweep's run and end it.

        Args:
            artifacts: Files to add.
            timeout_seconds: How long to wait, give or take one run.
            is_complete: Whether all of the sweep's trials have ended: FINISHED if so, else KILLED.

        Returns:
            Whether MLflow has everything. False, and a warning, after a failure or when the time is
            up; a later `Mirror` writes what is missing.
        """
        self._artifacts, self._is_sweep_complete = tuple(artifacts), is_complete
        self._closing.set()
        self._wanted.set()
        self._thread.join(timeout_seconds)
        # A thread that is still alive when the interpreter ends keeps duckdb loaded, which then prints
        # page-long complaints.
        self._stopped.set()
        self._thread.join(3.0)
        if not self._has_everything:
            self._warn(f"not done within {timeout_seconds:g} s")
        return self._has_everything

    def _work(self) -> None:
        while not self._closing.is_set():
            self._wanted.wait()
            self._wanted.clear()
            if not self._closing.is_set():
                started = time.monotonic()
                has_succeeded = self._try(self._sync)
                # The driver needs the interpreter too, so the thread rests longer than it works.
                self._closing.wait(max(1.0, 2 * (time.monotonic() - started)) if has_succeeded else 60.0)
        self._try(self._finish)

    def _sync(self) -> None:
        self._mirror.sync(self._stopped.is_set)
        if self._watches_machine and self._end_watch is None:
            self._end_watch = self._mirror.watch()

    def _finish(self) -> None:
        self._sync()
        if self._end_watch is not None:
            self._end_watch()
        is_behind = self._stopped.is_set()
        self._mirror.finish(() if is_behind else self._artifacts, is_complete=self._is_sweep_complete)
        self._has_everything = not is_behind

    def _try(self, act: Callable[[], object]) -> bool:
        """Whether an act succeeded, the first or the second time."""
        error = _failure(act)
        if error and not self._stopped.wait(1.0):
            error = _failure(act)
        if error:
            self._warn(without_credentials(str(error)))
        return error is None

    def _warn(self, reason: str) -> None:
        if not self._has_warned:
            reason = textwrap.shorten(reason, 300, placeholder="…")
            logger.warning("the MLflow mirror is behind, the tables have everything: %s", reason)
        self._has_warned = True


def _failure(act: Callable[[], object]) -> Exception | None:
    try:
        act()
    except Exception as error:  # noqa: BLE001 - nothing that MLflow does may end a sweep
        return error
    return None


def without_credentials(text: str) -> str:
    """The text with `***` for the user and password of every URI in it."""
    return re.sub(r"://\S*@", "://***@", text)

"""Optuna's record of a study, synced when the driver says so."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from storage.durable import Log, read_log


class Journal:
    """A journal backend for Optuna with one writer: a line of JSON for each operation on the study.

    Optuna's own file backend, which reads this file too, syncs the disk at every operation, eight or so for
    a trial. Here they wait for `flush`; what a killed driver had not flushed is told or asked again.

    Args:
        path: The file; it need not be there. Nothing is written before the first `flush`, which cuts a torn
            last line off.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._log: Log | None = None
        self._unread: list[Mapping[str, Any]] = list(read_log(path))
        self._first_unread = 0
        self._unwritten: list[Mapping[str, Any]] = []

    def read_logs(self, log_number_from: int) -> Sequence[Mapping[str, Any]]:
        """Operations from a number on. Optuna replays them in order and keeps what they come to."""
        assert log_number_from == self._first_unread, "one study reads a journal, and reads it once"
        logs, self._unread = self._unread, []
        self._first_unread += len(logs)
        return logs

    def append_logs(self, logs: Sequence[Mapping[str, Any]]) -> None:
        """Take operations; they are on disk after the next `flush`."""
        self._unread.extend(logs)
        self._unwritten.extend(logs)

    def flush(self) -> None:
        """Write what waits, and sync once. Raises StoreError if the disk refuses; it waits on then."""
        if self._unwritten:
            self._log = self._log or Log(self._path)
            self._log.append(*self._unwritten)
            self._unwritten.clear()

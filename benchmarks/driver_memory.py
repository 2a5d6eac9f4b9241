"""What a driver keeps in memory for each trial that has ended. Prints one line of JSON.

Run in a process of its own by `python -m benchmarks.orchestrator`. Traced are allocations of Python, by the
file that made them: what Optuna's files made is its study; what others made for it counts as the driver's. A
small sweep comes first, for all that is imported and cached once.
"""

import gc
import json
import sys
import tempfile
import tracemalloc
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from orchestrator.config import make_config
from orchestrator.folder import claimed
from orchestrator.pool import Delivery, Event, Order
from orchestrator.progress import Tally
from orchestrator.reopening import open_sampler
from orchestrator.space_file import load_space
from orchestrator.sweep import Sweep
from orchestrator.worker import Worker
from storage.donors import Donors
from storage.mlflow_log import Mirror

SPACE = Path(__file__).parent / "nothing_space.py"
FIRST, LAST = 300, 1300
"""Trials between whose ends memory is compared."""


class _Here:
    """`orchestrator.pool.Pool` with one worker, in this process."""

    def __init__(self, folder: Path) -> None:
        self._worker = Worker(folder, None, device="cpu", token_budget=1, load=lambda ref, **options: None)
        self._deliveries: Iterator[Delivery] | None = None
        self._is_ready = False

    def start(self, worker: str, order: Order) -> None:
        self._deliveries = self._worker.run(order)

    def events(self, timeout_seconds: float) -> list[Event]:
        if not self._is_ready:
            self._is_ready = True
            return [Event("here", "ready")]
        assert self._deliveries is not None
        delivery = next(self._deliveries, None)
        return [Event("here", "done")] if delivery is None else [Event("here", "delivery", delivery)]

    def drain(self) -> None:
        """Nobody is ever replaced."""

    def close(self) -> None:
        """Nothing is open."""


class _Watch:
    """`orchestrator.progress.Progress` that mirrors and takes a snapshot when so many trials have ended."""

    def __init__(self, folder: Path, at: Sequence[int]) -> None:
        self._mirror = Mirror(folder)
        self._at = at
        self.bytes: list[tuple[int, int]] = []

    def update(self, tally: Tally) -> None:
        if len(self.bytes) < len(self._at) and tally.done >= self._at[len(self.bytes)]:
            self._mirror.sync()
            self.bytes.append(_traced())


def _traced() -> tuple[int, int]:
    """Bytes that Optuna holds, and that all others do."""
    gc.collect()
    sizes = [
        (each.traceback[0].filename, each.size) for each in tracemalloc.take_snapshot().statistics("filename")
    ]
    study = sum(size for name, size in sizes if "/optuna/" in name)
    return study, sum(size for _, size in sizes) - study


def drive(place: Path, *, trials: int, at: Sequence[int]) -> list[tuple[int, int]]:
    """What is held when so many trials of a sweep have ended."""
    file = load_space(SPACE)
    config = make_config(model="nothing", workers=1, trials=trials, sampler="random")
    with claimed(place, file, config):
        watch = _Watch(place, at)
        Sweep(
            place,
            space=file.space,
            config=config,
            trials=trials,
            sampler=open_sampler(place, file.space, config),
            pool=_Here(place),
            donors=Donors(()),
            progress=watch,
            on_result=lambda: None,
            is_asked_to_stop=lambda: False,
        ).run()
    return watch.bytes


def measure() -> dict[str, Any]:
    """Bytes a trial, of the driver and of the study."""
    with tempfile.TemporaryDirectory() as name:
        tracemalloc.start()
        drive(Path(name) / "first", trials=20, at=[20])
        (study, own), (last_study, last_own) = drive(Path(name) / "second", trials=LAST, at=[FIRST, LAST])
    return {
        "bytes_per_trial": (last_own - own) / (LAST - FIRST),
        "study_bytes_per_trial": (last_study - study) / (LAST - FIRST),
    }


if __name__ == "__main__":
    json.dump(measure(), sys.stdout)

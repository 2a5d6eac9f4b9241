"""What a driver keeps in memory for each trial that has ended. Prints one line of JSON.

Run in a process of its own by `python -m benchmarks.orchestrator`. Traced are allocations of Python, by the
file that made them: what Optuna's files made is its study.
"""

import gc
import json
import sys
import tempfile
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import optuna

from orchestrator.config import make_config
from orchestrator.folder import claimed
from orchestrator.pool import Delivery, Event, Order
from orchestrator.progress import Tally
from orchestrator.reopening import open_sampler
from orchestrator.space_file import load_space
from orchestrator.sweep import Sweep
from orchestrator.worker import Worker
from storage.background_mirror import BackgroundMirror
from storage.donors import Donors

SPACE = Path(__file__).parent / "nothing_space.py"
FIRST, LAST = 500, 2500
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
    """`orchestrator.progress.Progress` that takes a snapshot when so many trials have ended."""

    def __init__(self) -> None:
        self.bytes: dict[int, tuple[int, int]] = {}

    def update(self, tally: Tally) -> None:
        for number in (FIRST, LAST):
            if tally.done >= number and number not in self.bytes:
                self.bytes[number] = _traced()


def _traced() -> tuple[int, int]:
    """Bytes that Optuna's files hold, and that all others do."""
    gc.collect()
    own = str(Path(optuna.__file__).parent)
    sizes = [
        (each.traceback[0].filename, each.size) for each in tracemalloc.take_snapshot().statistics("filename")
    ]
    study = sum(size for name, size in sizes if name.startswith(own))
    return study, sum(size for _, size in sizes) - study


def measure() -> dict[str, Any]:
    """Bytes a trial, of the driver and of the study."""
    file = load_space(SPACE)
    config = make_config(model="nothing", workers=1, trials=LAST, sampler="random")
    watch = _Watch()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "sweep"
        with claimed(folder, file, config):
            mirror = BackgroundMirror(folder)
            tracemalloc.start()
            Sweep(
                folder,
                space=file.space,
                config=config,
                trials=LAST,
                sampler=open_sampler(folder, file.space, config),
                pool=_Here(folder),
                donors=Donors(()),
                progress=watch,
                on_result=mirror.notify,
                is_asked_to_stop=lambda: False,
            ).run()
            mirror.close((), 5.0, is_complete=False)
    (study, own), (last_study, last_own) = watch.bytes[FIRST], watch.bytes[LAST]
    return {
        "bytes_per_trial": (last_own - own) / (LAST - FIRST),
        "study_bytes_per_trial": (last_study - study) / (LAST - FIRST),
    }


if __name__ == "__main__":
    json.dump(measure(), sys.stdout)

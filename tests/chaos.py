"""Ways for a process to be killed at a place that a test chooses, and what a sweep has lost by it."""

import os
import signal
import sys
from collections import Counter
from collections.abc import Callable, Iterable
from itertools import count
from pathlib import Path
from types import FrameType
from typing import Any, Literal

from mlflow import MlflowClient
from optuna.trial import TrialState

from orchestrator import worker as worker_module
from orchestrator.journal import Journal
from orchestrator.sampler import OptunaSampler
from storage import compaction
from storage import store as store_module
from storage.durable import Log
from storage.manifest import Manifest
from storage.store import Store
from tests.fakes import InlinePool
from tests.sweeps import study_of

ROOT = Path(__file__).parents[1]
_WATCHED = tuple(str(ROOT / package) for package in ("orchestrator", "storage"))

BOUNDARIES: dict[str, tuple[Any, str]] = {
    "ask": (OptunaSampler, "ask"),
    "write of the study": (Journal, "flush"),
    "write of the ledger": (Log, "append"),
    "dispatch": (InlinePool, "start"),
    "write of an artifact": (worker_module, "write_artifact"),
    "write of a worker's table": (worker_module, "write_table"),
    "write of the driver's table": (store_module, "write_table"),
    "commit": (Store, "commit"),
    "write of a compacted table": (compaction, "put_together"),
    "compaction": (Store, "compact"),
    "checkpoint": (Manifest, "checkpoint"),
    "sync": (os, "fsync"),
    "rename": (Path, "replace"),
    "tell": (OptunaSampler, "tell"),
}
MLFLOW_BOUNDARIES: dict[str, tuple[Any, str]] = {
    f"MLflow {name}": (MlflowClient, name)
    for name in ("create_run", "log_batch", "set_tag", "set_terminated", "log_artifact")
}
When = Literal["before", "after"]


def kill_self() -> None:
    """No handler runs and nothing is closed."""
    os.kill(os.getpid(), signal.SIGKILL)


def kill_at(boundary: tuple[Any, str], call: int, when: When) -> None:
    """Have this process killed before or after a certain call, from 1, of a function."""
    owner, name = boundary
    real, calls = getattr(owner, name), count(1)

    def fatal(*arguments: Any, **named: Any) -> Any:
        is_last = next(calls) == call
        if is_last and when == "before":
            kill_self()
        result = real(*arguments, **named)
        if is_last:
            kill_self()
        return result

    setattr(owner, name, fatal)


def kill_at_line(number: int) -> None:
    """Have this process killed at a certain line, from 1, that it runs of orchestrator/ and storage/."""
    lines = count(1)
    _trace(lambda: kill_self() if next(lines) == number else None)


def count_lines(act: Callable[[], object]) -> int:
    """How many lines of orchestrator/ and storage/ this thread runs in an act."""
    lines = count()
    before = sys.gettrace()
    _trace(lambda: next(lines))
    try:
        act()
    finally:
        sys.settrace(before)
    return next(lines)


def _trace(at_line: Callable[[], object]) -> None:
    def trace(frame: FrameType, event: str, argument: Any) -> Any:
        if not frame.f_code.co_filename.startswith(_WATCHED):
            return None
        if event == "line":
            at_line()
        return trace

    sys.settrace(trace)


def toll(folder: Path, *, trials: int) -> dict[str, int]:
    """What is wrong with a sweep that should have ended.

    Args:
        folder: The sweep's folder.
        trials: How many it should have.

    Returns:
        lost, trials without a result; duplicated, trials and specs with more than one; zombies, trials that
        the study has as running.
    """
    store = Store(folder)
    times = Counter(row["trial"] for row in store.rows("trials"))
    measured = Counter((row["spec"], row["split"], row["name"]) for row in store.rows("metrics"))
    return {
        "lost": len(set(range(trials)) - times.keys()),
        "duplicated": _doubled(times.values()) + _doubled(measured.values()),
        "zombies": sum(trial.state == TrialState.RUNNING for trial in study_of(folder)),
    }


def _doubled(numbers: Iterable[int]) -> int:
    return sum(number > 1 for number in numbers)

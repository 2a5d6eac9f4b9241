"""Fakes that obey the contracts of pool and progress, without Ray and without a model."""

import json
import random
from collections.abc import Iterator, Mapping, Sequence
from itertools import count
from pathlib import Path
from typing import Any, Literal, NamedTuple

from jobs.spec import ModelRef
from orchestrator.pool import Delivery, Event, Order
from orchestrator.progress import Tally
from orchestrator.worker import LoadReplica, Worker
from storage.durable import DiskFull
from storage.manifest import StoredResult
from storage.parquet import write_table
from storage.query import StoredSweep, open_sweep
from storage.store import Part, Store
from tests.fake_job import Died

MODEL = ModelRef(id="no-model")


class Stopped(Exception):
    """What a pool raises that was told to stop its driver."""


def load_nothing(ref: ModelRef, *, device: str, token_budget: int, memory: int | None) -> Any:
    """A replica for jobs that need none."""
    return None


class StoredTrial(NamedTuple):
    """A trial that has ended, for `write_sweep`."""

    params: dict[str, Any]
    metrics: dict[str, dict[str, float | None]]
    state: str = "completed"
    spec: str | None = None


def write_sweep(
    folder: Path,
    trials: Sequence[StoredTrial],
    *,
    objectives: Mapping[str, str],
    parameters: Mapping[str, str] | None = None,
) -> StoredSweep:
    """Store trials as a driver and its workers would; trials of one spec share the first one's result.

    Args:
        folder: A new sweep's folder.
        trials: What has ended, in order.
        objectives: Metric -> direction.
        parameters: Parameter -> SQL type.
    """
    folder.mkdir(exist_ok=True)
    identity = {
        "sweep": "numbers-12345678",
        "job": "tests.fake_job",
        "parameters": dict(parameters or {}),
        "objectives": [
            {"metric": metric, "direction": direction} for metric, direction in objectives.items()
        ],
    }
    (folder / "sweep.json").write_text(json.dumps(identity))
    first: dict[str, int] = {}
    metrics: list[dict[str, Any]] = []
    rows: list[dict[str, Any]] = []
    results: list[StoredResult] = []
    for number, trial in enumerate(trials):
        spec = trial.spec or f"spec{number}"
        earlier = first.setdefault(spec, number)
        reason = None if trial.state == "completed" else f"was {trial.state}"
        rows.append(
            {
                "trial": number,
                "spec": spec,
                "state": trial.state,
                "reason": reason,
                "reused_from": None if earlier == number else earlier,
                "params": json.dumps(trial.params),
            }
        )
        if earlier == number:
            results.append(StoredResult(spec, trial.state, reason))
            metrics += [
                {"spec": spec, "split": split, "name": name, "value": value}
                for split, values in trial.metrics.items()
                for name, value in values.items()
            ]
    files = (write_table(folder, "metrics", metrics),) if metrics else ()
    Store(folder).commit([Part(files, tuple(results))], trials=rows)
    return open_sweep(folder)


class InlinePool:
    """`orchestrator.pool.Pool` with real workers in this process, one step of one order per `events`.

    Which worker goes on is drawn from a seed. A job that raises `Died` loses its worker.

    Args:
        folder: The sweep's folder.
        workers: How many.
        losses: Number of an order, from 1 -> when its worker is lost: `before` its first delivery is
            heard (its files are written already) or `after`.
        stop_at: Number of the call of `events`, from 1, that raises `Stopped`; None = never.
        seed: Order of events.
        load: Loads each worker's replica.
    """

    def __init__(
        self,
        folder: Path,
        *,
        workers: int = 2,
        losses: Mapping[int, Literal["before", "after"]] | None = None,
        stop_at: int | None = None,
        seed: int = 0,
        load: LoadReplica = load_nothing,
    ) -> None:
        self._folder = folder
        self._load = load
        self._losses = losses or {}
        self._stop_at = stop_at
        self._random = random.Random(seed)
        self._names = (f"worker-{number}" for number in count())
        self._idle: dict[str, Worker] = {}
        self._busy: dict[str, tuple[int, Iterator[Delivery], Worker]] = {}
        self._news: list[Event] = []
        self._empty = 0
        self.orders: list[Order] = []
        self.calls = 0
        self.closed = False
        self.draining = False
        for _ in range(workers):
            self._spawn()

    def _spawn(self) -> None:
        name = next(self._names)
        self._idle[name] = self.make_worker()
        self._news.append(Event(name, "ready"))

    def make_worker(self) -> Worker:
        return Worker(self._folder, MODEL, device="cpu", token_budget=1, load=self._load)

    def start(self, worker: str, order: Order) -> None:
        assert worker in self._idle, f"{worker} was given an order while it was busy, dead or unknown"
        self.orders.append(order)
        replica = self._idle.pop(worker)
        self._busy[worker] = (len(self.orders), replica.run(order), replica)

    def events(self, timeout_seconds: float) -> list[Event]:
        self.calls += 1
        if self.calls == self._stop_at:
            raise Stopped(f"call {self.calls}")
        if self._news:
            events, self._news = self._news, []
        else:
            events = [self._advance(self._random.choice(sorted(self._busy)))] if self._busy else []
        self._empty = 0 if events else self._empty + 1
        assert self._empty < 5, "the sweep waits, but no worker has anything to do"
        return events

    def _advance(self, worker: str) -> Event:
        number, deliveries, replica = self._busy[worker]
        try:
            delivery = next(deliveries)
        except StopIteration:
            del self._busy[worker]
            self._idle[worker] = replica
            return Event(worker, "done")
        except Died as error:
            return self._lose(worker, str(error))
        except DiskFull as error:
            return self._lose(worker, str(error))._replace(is_fault=False, is_disk_full=True)
        match self._losses.get(number):
            case "before":
                return self._lose(worker, f"order {number} took its worker along, before its first delivery")
            case "after":
                deliveries.close()
                self._busy[worker] = (number, self._dying(number), replica)
        return Event(worker, "delivery", delivery)

    @staticmethod
    def _dying(number: int) -> Iterator[Delivery]:
        raise Died(f"order {number} took its worker along, after its first delivery")
        yield

    def _lose(self, worker: str, reason: str) -> Event:
        del self._busy[worker]
        if not self.draining:
            self._spawn()
        return Event(worker, "lost", reason=reason)

    def drain(self) -> None:
        self.draining = True

    def close(self) -> None:
        self.closed = True


class SilentProgress:
    """`orchestrator.progress.Progress` that remembers the last tally and checks each."""

    def __init__(self) -> None:
        self.last: Tally | None = None

    def update(self, tally: Tally) -> None:
        assert 0 <= tally.done <= tally.total
        assert 0 <= tally.running <= tally.total - tally.done
        self.last = tally

"""One warm replica that runs orders and writes what comes out. No Ray, no Optuna, no driver state."""

import gc
import importlib
import socket
import sys
import time
import traceback
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from jobs.errors import OutOfMemory, SteersweepError
from jobs.resolve import load_job, make_params
from jobs.spec import ModelRef, Outcome, Requirement, Row, choosing_split
from orchestrator.pool import Delivery, Finished, Order, written
from storage.artifacts import Artifact, read_artifact, write_artifact
from storage.durable import StoreError
from storage.manifest import StoredResult
from storage.parquet import TableFile, to_arrow, write_table
from storage.remote import Remote
from storage.store import Part
from storage.table_stream import TableStream

_FLUSH_SECONDS = 1.0
_CACHED_ARTIFACTS = 16
_SHARE_IN_PIECES = 0.3


class LoadReplica(Protocol):
    """How a worker gets its model."""

    def __call__(self, ref: ModelRef, *, device: str, token_budget: int, memory: int | None) -> Any:
        """Load it; the job knows what it is."""


class Worker:
    """Runs orders on one replica.

    Args:
        folder: The sweep's folder.
        model: The weights to load at once; None waits for the first order. An order that runs on others has
            them loaded in their place.
        device: Where to load them.
        token_budget: Most tokens of one forward pass.
        memory: Bytes for keys, values and activations that are kept; None leaves it to the loader.
        load: Loads the replica.
        remote: Where the files of machines are exchanged that do not share the folder.
    """

    def __init__(
        self,
        folder: Path,
        model: ModelRef | None,
        *,
        device: str,
        token_budget: int,
        memory: int | None = None,
        load: LoadReplica | None = None,
        remote: Remote | None = None,
    ) -> None:
        self._folder = folder
        self._remote = remote
        self._load = load or importlib.import_module("jobs.engine.loading").load_replica
        self._options: dict[str, Any] = {"device": device, "token_budget": token_budget, "memory": memory}
        self._cache: dict[str, Mapping[str, np.ndarray]] = {}
        self._weights = ExitStack()
        self._tuned: Artifact | None = None
        self._model: ModelRef | None = None
        self._replica: Any = None
        self.stop_requested = False
        if model is not None:
            self.hold(model)

    def hold(self, model: ModelRef) -> bool:
        """Have a model loaded; returns whether that took loading. Its tuning comes with the order."""
        model = replace(model, tuned="")
        if model == self._model:
            return False
        self._weights.close()
        self._model = self._tuned = None
        if self._replica is not None:
            self._replica = None
            gc.collect()
        self._replica = self._load(model, **self._options)
        self._model = model
        return True

    def run(self, order: Order) -> Iterator[Delivery]:
        """Run an order; a delivery follows whenever outcomes have waited a second, and at the end.

        Raises:
            StoreError: If the folder cannot be written or an artifact is not what was stored.
        """
        started = time.time()
        batch = _Batch(self._folder, started, self._remote)
        try:
            rows = [Row(make_params(order.job, row.params), row.seed) for row in order.rows]
            unanswered = {index: row.spec for index, row in enumerate(order.rows)}
            context = _Context(self, order.artifacts, batch, unanswered)
            batch.has_loaded = self.hold(order.model)
            batch.device = str(getattr(self._replica, "device", ""))
            self._change_weights(order.tuned)
            for index, outcome in load_job(order.job).run(self._replica, rows, context):
                if index not in unanswered:
                    raise SteersweepError(
                        f"{order.job} gave an outcome for row {index} twice, or for no row of its own"
                    )
                batch.add(unanswered.pop(index), order.job, outcome)
                if batch.is_due():
                    yield batch.flush()
            if unanswered:
                raise SteersweepError(
                    f"{order.job} ended without an outcome for the rows {sorted(unanswered)}"
                )
        except StoreError:
            raise
        except Exception as error:  # noqa: BLE001 - any failure of a job becomes data
            yield batch.flush(error=_describe(error), out_of_memory=_is_out_of_memory(error))
        else:
            yield batch.flush()
        finally:
            batch.abandon()

    def _change_weights(self, tuned: Artifact | None) -> None:
        """Let the replica have these weights, and keep them for the next order: most orders have the same."""
        if tuned == self._tuned:
            return
        self._weights.close()
        self._tuned = None
        if tuned is not None:
            changed = importlib.import_module("jobs.engine.tuned").tuned
            self._weights.enter_context(changed(self._replica, self.artifact(tuned)))
            self._tuned = tuned

    def artifact(self, artifact: Artifact) -> Mapping[str, np.ndarray]:
        """Arrays of an artifact; the latest few stay in memory."""
        arrays = self._cache.pop(artifact.sha256, None)
        if arrays is None:
            if self._remote is not None:
                self._remote.fetch(self._folder, artifact.path)
            arrays = read_artifact(self._folder, artifact)
        self._cache[artifact.sha256] = arrays
        if len(self._cache) > _CACHED_ARTIFACTS:
            del self._cache[next(iter(self._cache))]
        return arrays


def device_of(gpus: float) -> str:
    """Where a worker with so many GPUs loads its replica."""
    return "auto" if gpus > 1 else "cuda" if gpus > 0 else "cpu"


def attempt_line(attempt: str) -> str:
    """The line of a worker's log behind which what an attempt has said begins."""
    return f"=== attempt {attempt}"


class _Context:
    """What a running job may ask for (`jobs.spec.Context`)."""

    def __init__(
        self,
        worker: Worker,
        artifacts: Mapping[str, Artifact],
        batch: "_Batch",
        unanswered: Mapping[int, str],
    ) -> None:
        self._worker = worker
        self._artifacts = artifacts
        self._batch = batch
        self._unanswered = unanswered

    @property
    def stop_requested(self) -> bool:
        return self._worker.stop_requested

    def artifact(self, requirement: Requirement) -> Mapping[str, np.ndarray]:
        if requirement.key not in self._artifacts:
            raise SteersweepError(f"{requirement} was not among what the job's requires() named")
        return self._worker.artifact(self._artifacts[requirement.key])

    def write(self, row: int, name: str, chunk: Mapping[str, Any]) -> None:
        if row not in self._unanswered:
            raise SteersweepError(
                f"a chunk of {name} for row {row}; the rows without an outcome are {sorted(self._unanswered)}"
            )
        self._batch.write(self._unanswered[row], name, chunk)


class _Batch:
    """Outcomes that wait to be written together."""

    def __init__(self, folder: Path, started: float, remote: Remote | None) -> None:
        self._folder = folder
        self._remote = remote
        self._started = started
        self.has_loaded = False
        self.device = ""
        self._streams: dict[str, dict[str, TableStream]] = {}
        self._clear()

    def _clear(self) -> None:
        self._streamed: list[TableFile] = []
        self._tables: dict[str, list[dict[str, Any]]] = {}
        self._results: list[StoredResult] = []
        self._finished: list[Finished] = []
        self._since = time.monotonic()

    def write(self, spec: str, table: str, chunk: Mapping[str, Any]) -> None:
        """Write a chunk of a table of a spec whose outcome is still to come."""
        streams = self._streams.setdefault(spec, {})
        if table not in streams:
            streams[table] = TableStream(self._folder, table)
        streams[table].write({**chunk, "spec": spec})

    def add(self, spec: str, job: str, outcome: Outcome) -> None:
        """Take all of an outcome, or raise and take nothing if it cannot be stored.

        Of a row that failed only the reason is kept.
        """
        now = time.time()
        result = StoredResult(spec, str(outcome.status), outcome.reason)
        if outcome.status == "failed":
            self._abandon(spec)
            self._results.append(result)
            self._finished.append(Finished(spec, "failed", outcome.reason, now))
            return
        tables = {table: [{"spec": spec, **row} for row in rows] for table, rows in outcome.tables.items()}
        tables["metrics"] = [
            {"spec": spec, "split": split, "name": name, "value": value}
            for split, metrics in outcome.metrics.items()
            for name, value in metrics.items()
        ]
        for table, rows in tables.items():
            to_arrow(table, rows)
        artifact = write_artifact(self._folder, outcome.tensors) if outcome.tensors else None
        if artifact is not None:
            tables["artifacts"] = [
                {
                    "spec": spec,
                    "job": job,
                    "hash": artifact.sha256,
                    "path": artifact.path,
                    "bytes": artifact.bytes,
                }
            ]
        self._streamed += [stream.finish() for stream in self._streams.get(spec, {}).values()]
        for table, rows in tables.items():
            self._tables.setdefault(table, []).extend(rows)
        self._results.append(result)
        metrics = dict(outcome.metrics.get(choosing_split(outcome.metrics), {}))
        self._finished.append(Finished(spec, "ok", outcome.reason, now, metrics, artifact))

    def is_due(self) -> bool:
        return time.monotonic() - self._since > _FLUSH_SECONDS

    def flush(self, *, error: str | None = None, out_of_memory: bool = False) -> Delivery:
        files = [write_table(self._folder, table, rows) for table, rows in self._tables.items() if rows]
        part = Part((*files, *self._streamed), tuple(self._results))
        finished = tuple(self._finished)
        if self._remote is not None:
            for path in written(part, finished):
                self._remote.put(self._folder, path)
            for file in part.files:  # what a worker needs again are artifacts
                (self._folder / file.path).unlink()
        self._clear()
        return Delivery(
            part,
            finished,
            self._started,
            socket.gethostname(),
            device=self.device,
            error=error,
            out_of_memory=out_of_memory,
            has_loaded=self.has_loaded,
            is_worn=out_of_memory and _is_fragmented(),
        )

    def abandon(self) -> None:
        """Drop what was streamed for specs without an outcome."""
        for spec in list(self._streams):
            self._abandon(spec)

    def _abandon(self, spec: str) -> None:
        for stream in self._streams.pop(spec, {}).values():
            stream.abandon()


def _is_fragmented() -> bool:
    """Whether much of the GPUs' memory is held and not used: it is in pieces that are too small."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return False
    devices = range(torch.cuda.device_count())
    held = sum(torch.cuda.memory_reserved(device) for device in devices)
    used = sum(torch.cuda.memory_allocated(device) for device in devices)
    return bool(held - used > _SHARE_IN_PIECES * held)


def _is_out_of_memory(error: Exception) -> bool:
    """Whether a job did not fit: the engine says so, or torch, whose names for it differ by device."""
    if isinstance(error, (OutOfMemory, MemoryError)) or type(error).__name__ == "OutOfMemoryError":
        return True
    return isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error)


def _describe(error: Exception) -> str:
    if isinstance(error, SteersweepError):
        return str(error)
    return f"{type(error).__name__}: {error}\n{''.join(traceback.format_exception(error))}"

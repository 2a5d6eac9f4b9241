"""A worker inside a Ray actor."""

import logging
import os
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ray

from jobs.errors import SpecError
from jobs.spec import ModelRef
from orchestrator.pool import Delivery, Order
from orchestrator.worker import Worker, attempt_line, device_of
from orchestrator.worker_logs import worker_log
from storage.parquet import warm_up
from storage.remote import Remote


class WorkerActor:
    """A `Worker`, and whether it lives."""

    def __init__(
        self,
        folder: str,
        model: ModelRef | None,
        *,
        name: str,
        cpus: int,
        gpus: float,
        token_budget: int,
        memory: int | None,
        results: str | None = None,
    ) -> None:
        _check_folder(Path(folder), results)
        _write_output_to(worker_log(Path(folder), name))
        logging.basicConfig(level=logging.WARNING)
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        import torch

        torch.set_num_threads(cpus)
        self._model = model
        self._worker = Worker(
            Path(folder),
            None,
            device=device_of(gpus),
            token_budget=token_budget,
            memory=memory,
            remote=None if results is None else Remote(results),
        )

    @ray.method(concurrency_group="control")
    def alive(self) -> str:
        """Id of its node, whenever it is asked."""
        return ray.get_runtime_context().get_node_id()

    def load(self) -> None:
        """Load the replica, unless that is left to the orders."""
        warm_up()
        if self._model is not None:
            self._worker.hold(self._model)

    def run(self, order: Order) -> Iterator[Delivery]:
        """Deliveries of an order, each as soon as it is written."""
        print(attempt_line(order.attempt), file=sys.stderr, flush=True)  # noqa: T201 - parts the worker's log
        yield from self._worker.run(order)


def _check_folder(folder: Path, results: str | None) -> None:
    if results is not None:
        folder.mkdir(parents=True, exist_ok=True)
    elif not folder.is_dir():
        raise SpecError(
            f"the machine {socket.gethostname()} has no {folder}: give an --out on a file system that all "
            "machines share, or --set results=s3://bucket/sweeps"
        )


def _write_output_to(path: Path) -> None:
    """Send what this process says to a file, also what libraries in other languages say."""
    path.parent.mkdir(exist_ok=True)
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(file, 1)
    os.dup2(file, 2)
    os.close(file)


_remote: Any = ray.remote  # its types do not know of concurrency groups
RAY_WORKER = _remote(concurrency_groups={"control": 1})(WorkerActor)

"""Workers as Ray actors, one replica each. The only importer of ray.

Ray restarts and retries nothing: the driver owns both, so that no pack runs twice unseen.
"""

import logging
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ray
from ray._private.authentication.authentication_token_setup import (
    maybe_enable_token_auth_if_token_available,
)
from ray.exceptions import ActorDiedError, ActorUnavailableError, RayActorError, RayTaskError

from jobs.errors import ModelError, SpecError, SteersweepError
from jobs.spec import ModelRef
from orchestrator.config import RunConfig
from orchestrator.pool import Delivery, Event, Order
from orchestrator.worker import Worker

_CONNECT_SECONDS = 5.0
_MAX_DEATHS = 20


class WorkerActor:
    """A `Worker` inside a Ray actor."""

    def __init__(
        self,
        folder: str,
        model: ModelRef,
        *,
        cpus: int,
        gpus: float,
        token_budget: int,
        memory: int | None,
    ) -> None:
        logging.basicConfig(level=logging.WARNING)
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        import torch

        torch.set_num_threads(cpus)
        device = "auto" if gpus > 1 else "cuda" if gpus > 0 else "cpu"
        self._worker = Worker(Path(folder), model, device=device, token_budget=token_budget, memory=memory)

    @ray.method(concurrency_group="control")
    def ready(self) -> bool:
        """True as soon as the replica is loaded."""
        return True

    def run(self, order: Order) -> Iterator[Delivery]:
        """Deliveries of an order, each as soon as it is written."""
        yield from self._worker.run(order)


_remote: Any = ray.remote  # its types do not know of concurrency groups
_ACTOR = _remote(concurrency_groups={"control": 1})(WorkerActor)


class RayPool:
    """`orchestrator.pool.Pool` on a local Ray or on a running cluster.

    Args:
        folder: The sweep's folder, at the same path on every node.
        config: Number and size of the workers, and the model.

    To be used inside `connected`.
    """

    def __init__(self, folder: Path, config: RunConfig) -> None:
        self._folder = folder
        self._config = config
        self._actors: dict[str, Any] = {}
        self._waiting: dict[Any, str] = {}
        self._deaths = 0
        self._numbers = iter(range(1_000_000))
        for _ in range(config.workers):
            self._spawn()

    def _spawn(self) -> None:
        config = self._config
        actor_type = _ACTOR.options(
            num_cpus=config.cpus_per_worker,
            num_gpus=config.gpus_per_worker,
            max_restarts=0,
            max_task_retries=0,
        )
        name = f"worker-{next(self._numbers)}"
        actor = actor_type.remote(
            str(self._folder),
            config.model_ref,
            cpus=config.cpus_per_worker,
            gpus=config.gpus_per_worker,
            token_budget=config.token_budget,
            memory=None if config.memory_gib is None else int(config.memory_gib * 2**30),
        )
        self._actors[name] = actor
        self._waiting[actor.ready.remote()] = name

    def start(self, worker: str, order: Order) -> None:
        """Hand an order to an idle worker."""
        stream = self._actors[worker].run.options(num_returns="streaming").remote(order)
        self._waiting[stream] = worker

    def events(self, timeout_seconds: float) -> list[Event]:
        """What has happened since the last call. Dead workers are replaced.

        Raises:
            ModelError: If a worker cannot load the model.
            SteersweepError: If workers die one after the other and none gives a delivery.
        """
        if not self._waiting:
            time.sleep(timeout_seconds)
            return []
        ready, _ = ray.wait(list(self._waiting), num_returns=1, timeout=timeout_seconds)
        return [self._event(waited, self._waiting.pop(waited)) for waited in ready]

    def _event(self, waited: Any, worker: str) -> Event:
        try:
            if isinstance(waited, ray.ObjectRefGenerator):
                return self._next_delivery(waited, worker)
            ray.get(waited)
            return Event(worker, "ready")
        except ActorDiedError as error:
            if error.actor_init_failed:
                raise ModelError(f"a worker cannot start: {_last_line(error)}") from error
            return self._lost(worker, error)
        except (ActorUnavailableError, RayActorError) as error:
            return self._lost(worker, error)
        except RayTaskError as error:
            if isinstance(error.cause, SteersweepError):
                raise error.cause from error
            return self._lost(worker, error)

    def _next_delivery(self, stream: Any, worker: str) -> Event:
        try:
            delivery = ray.get(next(stream))
        except StopIteration:
            return Event(worker, "done")
        self._waiting[stream] = worker
        self._deaths = 0
        return Event(worker, "delivery", delivery)

    def _lost(self, worker: str, error: Exception) -> Event:
        ray.kill(self._actors.pop(worker))
        self._deaths += 1
        reason = str(error).strip()
        if self._deaths > _MAX_DEATHS:
            raise SteersweepError(
                f"{self._deaths} workers died and none gave a delivery in between; the last one said: "
                f"{_last_line(error)}; mend that, then `steersweep resume`"
            )
        self._spawn()
        return Event(worker, "lost", reason=reason)

    def close(self) -> None:
        """Let the actors go. Closing again does nothing."""
        while self._actors:
            ray.kill(self._actors.popitem()[1])


def _last_line(error: Exception) -> str:
    """What an actor's own exception says, without the traceback that Ray wraps around it."""
    return str(error).strip().splitlines()[-1]


@contextmanager
def connected(config: RunConfig, address: str | None) -> Iterator[None]:
    """Inside the block there is a Ray: a running cluster, or one of its own as large as the workers need.

    Args:
        config: Number and size of the workers.
        address: host:port of a running head, or `auto`; None starts a local Ray.

    Raises:
        SpecError: If there is no cluster at the address, or this machine has too few GPUs.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    common: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    if address is None:
        cpus = max(os.cpu_count() or 1, config.workers * config.cpus_per_worker)
        common |= {"num_cpus": cpus, "include_dashboard": False}
    else:
        if address != "auto":
            _check_listening(address)
        # A head takes tokens wherever one exists, and Ray's client does not look for it by itself.
        logging.getLogger("ray._private.authentication").setLevel(logging.ERROR)
        maybe_enable_token_auth_if_token_available(warn_if_disabled=False)
    try:
        ray.init(address=address or "local", **common)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise SpecError(f"no Ray cluster at {address!r}: {_first_line(error)}; {_ADDRESS_HINT}") from error
    try:
        if address is None:
            _check_gpus(config)
        yield
    finally:
        ray.shutdown()


def _check_gpus(config: RunConfig) -> None:
    """Ray would wait for a GPU for ever; a cluster may still grow one, this machine will not."""
    resources: dict[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call]
    wanted, found = config.workers * config.gpus_per_worker, resources.get("GPU", 0)
    if wanted > found:
        raise SpecError(
            f"workers={config.workers} with gpus_per_worker={config.gpus_per_worker:g}: this machine has "
            f"{found:g} GPUs; give fewer, or the --address of a cluster"
        )


_ADDRESS_HINT = (
    "give host:port of a running head, such as 127.0.0.1:6379, or leave --address out to use this machine"
)


def _check_listening(address: str) -> None:
    """Ray itself would wait for minutes where nothing listens, or another program does."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    try:
        with socket.create_connection((host, int(port)), timeout=_CONNECT_SECONDS) as connection:
            connection.settimeout(_CONNECT_SECONDS)
            connection.sendall(_HTTP2_GREETING)
            answer = connection.recv(_HTTP2_FRAME_HEADER_BYTES)
    except (OSError, ValueError) as error:
        raise SpecError(f"no Ray cluster answers at {address!r} ({error}); {_ADDRESS_HINT}") from error
    if len(answer) < _HTTP2_FRAME_HEADER_BYTES or answer[3] != _HTTP2_SETTINGS:
        raise SpecError(f"what answers at {address!r} is no Ray head; {_ADDRESS_HINT}")


# A Ray head speaks gRPC, and a gRPC server answers this greeting with a frame of settings (RFC 9113, 3.4).
_HTTP2_GREETING = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes([0, 0, 0, 4, 0, 0, 0, 0, 0])
_HTTP2_FRAME_HEADER_BYTES = 9
_HTTP2_SETTINGS = 4


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)

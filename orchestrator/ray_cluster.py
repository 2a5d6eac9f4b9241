"""Inside a block there is a Ray: a running cluster, or one of its own."""

import logging
import os
import socket
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import chdir, contextmanager
from pathlib import Path
from typing import Any, TypeVar

import ray
from ray._private.authentication.authentication_token_setup import (
    maybe_enable_token_auth_if_token_available,
)
from ray.exceptions import GetTimeoutError, RayError, RayTaskError

from jobs.errors import SpecError, SteersweepError, first_line
from orchestrator.config import RunConfig

Found = TypeVar("Found")
_CONNECT_SECONDS = 5.0


@contextmanager
def connected(config: RunConfig, address: str | None, packages: Sequence[Path] = ()) -> Iterator[None]:
    """Inside the block there is a Ray: a running cluster, or one of its own as large as the workers need.

    Args:
        config: Number and size of the workers.
        address: host:port of a running head, or `auto`; None starts a local Ray.
        packages: Folders of the packages that workers on other machines get from this one.

    Raises:
        SpecError: If there is no cluster at the address, or this machine has too few GPUs.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    common: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    if address is None:
        cpus = max(os.cpu_count() or 1, config.workers * config.cpus_per_worker)
        common |= {"num_cpus": cpus, "include_dashboard": False}
    else:
        common |= {"runtime_env": {"py_modules": list(map(str, packages))}} if packages else {}
        if address != "auto":
            _check_listening(address)
        # A head takes tokens wherever one exists, and Ray's client does not look for it by itself.
        logging.getLogger("ray._private.authentication").setLevel(logging.ERROR)
        maybe_enable_token_auth_if_token_available(warn_if_disabled=False)
    try:
        with _imports_as_here():
            ray.init(address=address or "local", **common)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise SpecError(f"no Ray cluster at {address!r}: {first_line(error)}; {_ADDRESS_HINT}") from error
    try:
        if address is None:
            _check_gpus(config)
        yield
    finally:
        ray.shutdown()


@contextmanager
def _imports_as_here() -> Iterator[None]:
    """Workers of a Ray that is started or joined inside the block import what this process does.

    Ray lets them import first from the folder where it is called, and from the same path on other machines,
    whatever lies there.
    """
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join(os.path.abspath(path) for path in sys.path)
    try:
        with chdir("/"):
            yield
    finally:
        del os.environ["PYTHONPATH"]
        if before is not None:
            os.environ["PYTHONPATH"] = before


def placement(config: RunConfig, **labels: str) -> dict[str, Any]:
    """What Ray has to find on a machine for a worker, and further labels that it has to have."""
    return {
        "num_cpus": config.cpus_per_worker,
        "num_gpus": config.gpus_per_worker,
        "resources": config.resources or None,
        "label_selector": {**config.labels, **labels} or None,
    }


def check_fits(config: RunConfig) -> None:
    """Refuse workers that no machine of the cluster could hold, be it busy or not.

    Raises:
        SteersweepError: If there is none, with what is missing.
    """
    asked = {"CPU": config.cpus_per_worker, "GPU": config.gpus_per_worker, **config.resources}
    wanted = {name: amount for name, amount in asked.items() if amount}
    nodes = [node for node in ray.nodes() if node["Alive"]]  # type: ignore[no-untyped-call]
    if any(
        all(node["Resources"].get(name, 0) >= amount for name, amount in wanted.items())
        and config.labels.items() <= node.get("Labels", {}).items()
        for node in nodes
    ):
        return
    most = {name: max((node["Resources"].get(name, 0) for node in nodes), default=0) for name in wanted}
    labels = f" and the labels {config.labels}" if config.labels else ""
    raise SteersweepError(
        f"no worker could start for {config.wait_seconds:g} s: each asks for {wanted}{labels}, and the "
        f"{len(nodes)} machines of the cluster have {most} at most; add one, or give smaller workers or "
        "more wait_seconds, then `steersweep resume`"
    )


def on_a_machine(config: RunConfig, act: Callable[[], Found]) -> Found:
    """What a function gives on a machine of the cluster that could hold a worker.

    Args:
        config: Size of a worker.
        act: The function.

    Raises:
        SteersweepError: If the function raises one, or there is no such machine for `wait_seconds`.
    """
    options = {**placement(config), "max_retries": 0}
    try:
        ray.get(ray.remote(lambda: None).options(**options).remote(), timeout=config.wait_seconds)
        found: Found = ray.get(ray.remote(act).options(**options).remote())
    except GetTimeoutError as error:
        raise SteersweepError(
            f"no machine of the cluster was free for a worker for {config.wait_seconds:g} s; give smaller "
            "workers or more wait_seconds"
        ) from error
    except RayTaskError as error:
        raise (error.cause if isinstance(error.cause, SteersweepError) else _failed(error)) from error
    except RayError as error:
        raise _failed(error) from error
    return found


def _failed(error: Exception) -> SteersweepError:
    return SteersweepError(f"Ray: {str(error).strip().splitlines()[-1]}")


def has_died() -> bool:
    """Whether a Ray that this process has started is gone; every call of Ray's would wait for it then."""
    node = ray._private.worker._global_node
    return node is not None and any(kind in ("gcs_server", "raylet") for kind, _ in node.dead_processes())


def draining_nodes() -> set[str]:
    """Nodes of a running cluster that are about to be taken away. Ray tells only its own libraries."""
    node = ray._private.worker._global_node
    is_own = node is not None and node.head
    return set() if is_own else set(ray._private.state.state.get_draining_nodes())


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

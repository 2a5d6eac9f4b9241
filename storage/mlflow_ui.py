"""MLflow's pages for one sweep, served to this machine. Starts MLflow as a process, does not import it."""

import http.client
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from jobs.errors import SpecError
from storage.mlflow_log import ENVIRONMENT, tracking_uri
from storage.places import mlflow_place


def serve_ui(folder: Path, port: int, announce: Callable[[str], object]) -> None:
    """Serve MLflow's pages for a sweep on 127.0.0.1 until Ctrl-C, SIGTERM or SIGHUP.

    Args:
        folder: The sweep's folder.
        port: Port to serve on.
        announce: Called once, with the address, when the pages are there.

    Raises:
        SpecError: If the folder has no MLflow store, the port cannot be had, or the server ends by itself.
    """
    if not (mlflow_place(folder) / "mlflow.db").is_file():
        raise SpecError(
            f"{folder} has no mlflow.db; give the folder of a sweep that has begun and keeps its runs there"
        )
    _check_port(port)
    # A script's background processes ignore SIGINT, and `nohup` ignores SIGHUP: only the latter is meant.
    hangup = [] if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN else [signal.SIGHUP]
    signals = [signal.SIGINT, signal.SIGTERM, *hangup]
    handlers = [signal.signal(number, signal.default_int_handler) for number in signals]
    # In a session of its own the server is spared the terminal's Ctrl-C, and can be ended with its children.
    server = subprocess.Popen(
        _command(folder, port), env={**ENVIRONMENT, **os.environ}, start_new_session=True
    )
    try:
        while server.poll() is None and not _answers(port):
            time.sleep(0.2)
        if server.poll() is None:
            announce(f"http://127.0.0.1:{port}")
        code = server.wait()
    except KeyboardInterrupt:
        return
    finally:
        _stop(server)
        for number, handler in zip(signals, handlers, strict=True):
            signal.signal(number, handler)
    raise SpecError(f"MLflow's server ended with exit code {code}; what it wrote above says why")


def _check_port(port: int) -> None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError as error:
            raise SpecError(f"port {port} cannot be used ({error.strerror}); choose another") from error


def _command(folder: Path, port: int) -> list[str]:
    store, artifacts = tracking_uri(folder), (mlflow_place(folder) / "mlartifacts").as_uri()
    return [
        *(sys.executable, "-m", "mlflow", "ui"),
        *("--backend-store-uri", store, "--registry-store-uri", store, "--artifacts-destination", artifacts),
        *("--host", "127.0.0.1", "--port", str(port), "--workers", "1"),
        *("--uvicorn-opts", "--log-level warning"),
    ]


def _answers(port: int) -> bool:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    try:
        connection.request("GET", "/health")
        return connection.getresponse().status == http.HTTPStatus.OK
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


def _stop(server: subprocess.Popen[bytes]) -> None:
    for number, patience_seconds in ((signal.SIGTERM, 10), (signal.SIGKILL, None)):
        with suppress(ProcessLookupError):
            os.killpg(server.pid, number)
        with suppress(subprocess.TimeoutExpired):
            server.wait(patience_seconds)

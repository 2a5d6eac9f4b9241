"""Sweeps for the tests of the MLflow mirror, and what MLflow says of them."""

import base64
import http.client
import json
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from mlflow import MlflowClient
from mlflow.entities import Run

from storage.manifest import StoredResult
from storage.mlflow_log import tracking_uri
from storage.parquet import write_table
from storage.store import Part, Store

SECRET = "s3cret"
SECRET_URI = f"http://reader:{SECRET}@127.0.0.1:1"
STARTED = 1_700_000_000.0
IDENTITY = {
    "sweep": "5eed0123",
    "space": "tone_grid",
    "description": "Which layer changes the tone?",
    "job": "jobs.steer",
    "parameters": {"layer": "BIGINT", "dose": "DOUBLE", "template": "VARCHAR"},
    "objectives": [
        {"metric": "effect", "direction": "maximize"},
        {"metric": "damage", "direction": "minimize"},
    ],
    "metrics": {"effect": {"unit": "nats", "meaning": "shift of the log-odds"}},
    "model": {"id": "tiny", "revision": None, "dtype": "float32", "trust_remote_code": False},
    "seed": 3,
    "config": {"workers": 2, "sampler": "grid", "trials": 4, "model": "tiny", "mlflow": SECRET_URI},
    "provenance": {"git_revision": "abc123", "packages": {"torch": "2.13.0", "ray": "2.60.0"}},
}


def make_sweep(folder: Path) -> Path:
    """The folder of a sweep that has begun."""
    folder.mkdir(parents=True)
    (folder / "sweep.json").write_text(json.dumps(IDENTITY))
    return folder


def make_database(folder: Path) -> Path:
    """An MLflow database with its schema; creating one takes seconds, copying it nothing."""
    MlflowClient(tracking_uri=tracking_uri(folder)).get_experiment_by_name("none")
    return folder / "mlflow.db"


def commit(folder: Path, trial: int, state: str = "completed", **metrics: float) -> None:
    """Store one trial as the driver does; a metric's name may end in the split, as in `effect__report`."""
    spec = f"spec{trial}"
    reason = None if state == "completed" else "text collapsed"
    rows = []
    for name, value in metrics.items():
        metric, _, split = name.partition("__")
        rows.append({"spec": spec, "split": split or "select", "name": metric, "value": value})
    params = {"layer": 10 + trial, "dose": 0.1 * trial, "template": "a|b"}
    started = STARTED + 10 * trial
    Store(folder).commit(
        [Part(files=(write_table(folder, "metrics", rows),), results=(StoredResult(spec, state, reason),))],
        trials=[
            {
                "trial": trial,
                "spec": spec,
                "state": state,
                "reason": reason,
                "seconds": 4.0,
                "finished": started + 5,
                "params": json.dumps(params),
            }
        ],
        attempts=[
            {
                "attempt": f"{trial}a",
                "trial": trial,
                "spec": spec,
                "state": "lost",
                "worker": "w0",
                "started": started - 9,
            },
            {
                "attempt": f"{trial}b",
                "trial": trial,
                "spec": spec,
                "state": "ok",
                "worker": "w1",
                "started": started,
                "finished": started + 4,
            },
        ],
    )


def runs_of(folder: Path, uri: str | None = None) -> tuple[Run, dict[int, Run]]:
    """The sweep's run and the trials' runs; fails if a trial has two."""
    client = MlflowClient(tracking_uri=uri or tracking_uri(folder))
    experiment = client.get_experiment_by_name("tone_grid")
    assert experiment is not None
    runs = client.search_runs([experiment.experiment_id])
    [parent] = [run for run in runs if "steersweep.trial" not in run.data.tags]
    children = {int(run.data.tags["steersweep.trial"]): run for run in runs if run is not parent}
    assert len(children) == len(runs) - 1
    return parent, children


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@contextmanager
def served(folder: Path) -> Iterator[tuple["subprocess.Popen[str]", str]]:
    """A process that serves the pages of a sweep's store, and the address that it has announced."""
    code = (
        "import pathlib, sys, storage.mlflow_ui as ui; "
        "ui.serve_ui(pathlib.Path(sys.argv[1]), int(sys.argv[2]), lambda address: print(address, flush=True))"
    )
    command = [sys.executable, "-c", code, str(folder), str(free_port())]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as server:
        assert server.stdout
        try:
            yield server, server.stdout.readline().strip()
        finally:
            server.terminate()


@contextmanager
def guarded(address: str, user: str, password: str) -> Iterator[str]:
    """A server that passes requests on to another one for whoever knows user and password."""
    host, _, port = address.removeprefix("http://").partition(":")
    expected = "Basic " + base64.b64encode(f"{user}:{password}".encode()).decode()

    class Guard(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def handle_one(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            if self.headers.get("Authorization") != expected:
                status, kind, content = 401, "text/plain", b"who are you?"
            else:
                connection = http.client.HTTPConnection(host, int(port), timeout=60)
                # The server answers those alone that call it by its own name.
                headers = {**self.headers, "Host": f"{host}:{port}"}
                connection.request(self.command, self.path, body, headers)
                answer = connection.getresponse()
                status, kind, content = answer.status, answer.getheader("Content-Type", ""), answer.read()
            self.send_response(status)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = handle_one

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Guard) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()

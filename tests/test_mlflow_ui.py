"""MLflow's pages, served for one sweep."""

import shutil
import signal
import socket
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest

from jobs.errors import SpecError
from storage.mlflow_log import Mirror
from storage.mlflow_ui import serve_ui
from tests.mirrored import commit, free_port, make_sweep, served


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    sweep = make_sweep(tmp_path_factory.mktemp("served") / "sweep")
    commit(sweep, 0, effect=1.0)
    Mirror(sweep).sync()
    return sweep


def must_not_announce(address: str) -> None:
    pytest.fail(f"announced {address}")


def test_a_port_in_use_is_refused_in_one_line(folder: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(
            SpecError, match=rf"^port {port} cannot be used \(Address already in use\); choose another$"
        ):
            serve_ui(folder, port, must_not_announce)


def test_a_folder_without_a_mirror_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match=r"has no mlflow\.db"):
        serve_ui(tmp_path, free_port(), must_not_announce)


def test_a_server_that_ends_by_itself_is_an_error(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", shutil.which("false"))
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SpecError, match="ended with exit code 1"):
        serve_ui(folder, free_port(), must_not_announce)
    assert signal.getsignal(signal.SIGTERM) == before


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_pages_are_there_when_announced_and_gone_when_interrupted(
    folder: Path, number: signal.Signals
) -> None:
    with served(folder) as (server, address):
        children = processes(of=server.pid)
        assert len(children) >= 2
        with urllib.request.urlopen(f"{address}/api/2.0/mlflow/experiments/search?max_results=9") as answer:
            assert b'"tone_grid"' in answer.read()
        server.send_signal(number)
        assert server.communicate(timeout=30)[0] == ""
    assert server.returncode == 0
    assert not children & processes()
    with pytest.raises(OSError, match="refused"):
        urllib.request.urlopen(address)


def processes(of: int | None = None) -> set[int]:
    """Ids of all processes, or of those that stem from one."""
    listed = subprocess.run(["ps", "-Ao", "pid=,ppid="], capture_output=True, text=True, check=True).stdout
    parents = dict(map(int, line.split()) for line in listed.splitlines())
    if of is None:
        return set(parents)
    found = {of}
    while more := {child for child, parent in parents.items() if parent in found} - found:
        found |= more
    return found - {of}

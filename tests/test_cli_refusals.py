"""What the real command refuses: one clear line, and nothing is left behind."""

import os
import shutil
import socket
import subprocess
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from tests.command import SPACE, refused, run_arguments, steersweep

pytestmark = pytest.mark.ray


def test_a_ray_address_that_does_not_answer_is_one_clear_line(place: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    line = refused(*run_arguments(place, "nowhere"), "--address", f"127.0.0.1:{port}")
    assert f"127.0.0.1:{port}" in line
    assert not (place / "nowhere").exists()


def test_another_program_at_a_ray_address_is_one_clear_line(place: Path) -> None:
    with ThreadingHTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"127.0.0.1:{server.server_port}"
        line = refused(*run_arguments(place, "nowhere"), "--address", address)
        server.shutdown()
    assert f"'{address}' is no Ray head" in line
    assert not (place / "nowhere").exists()


def test_more_gpus_than_there_are_is_one_clear_line(place: Path) -> None:
    line = refused(*run_arguments(place, "nowhere"), "--set", "gpus_per_worker=64")
    assert "gpus_per_worker=64" in line
    assert not (place / "nowhere").exists()


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (('job="jobs.steer"', 'job="jobs.stear"'), "jobs.stear"),
        (('metric="effect"', 'metric="efect"'), "efect"),
        (("Grid([0, 1, 2])", "Grid([0, 1, 99])"), "layer=99"),
        (("SPACE = Space(", "OTHER = Space("), "SPACE"),
        (('sampler="grid",', 'sampler="grid",,'), "line"),
        (("fixed={", 'fixed={"pears": "x", '), "pears"),
        (("fixed={", 'fixed={"pairs": "nowhere.csv", '), "nowhere.csv"),
        (("fixed={", 'fixed={"vectors": "nowhere.gguf", '), "no vector file 'nowhere.gguf'"),
    ],
)
def test_a_wrong_space_is_one_clear_line_and_leaves_nothing(
    place: Path, change: tuple[str, str], named: str
) -> None:
    assert change[0] in SPACE
    path = place / "wrong.py"
    path.write_text(SPACE.replace(*change))
    line = refused("run", path, "--out", place / "wrong", "--set", f"model={place / 'model'}")
    assert named in line
    assert not (place / "wrong").exists()


def test_an_unknown_model_is_one_clear_line_and_leaves_nothing(place: Path) -> None:
    line = refused("run", place / "space.py", "--out", place / "unknown", "--set", "model=/nowhere/at/all")
    assert "/nowhere/at/all" in line
    assert not (place / "unknown").exists()


@pytest.mark.parametrize("text", ["", "statement\nWater is wet.\n", "statement,label\nWater is wet.,\n"])
def test_an_empty_or_unlabelled_csv_is_one_clear_line(place: Path, text: str) -> None:
    path = place / "claims.csv"
    path.write_text(text)
    space = SPACE.replace("jobs.steer", "jobs.honesty").replace("effect", "accuracy").replace("damage", "kl")
    space = (
        space[: space.index("    fixed=")]
        + f"    fixed={{'claims': {str(path)!r}}},\n"
        + space[space.index("    objectives=") :]
    )
    (place / "csv.py").write_text(space)
    line = refused("run", place / "csv.py", "--out", place / "csv", "--set", f"model={place / 'model'}")
    assert "claims.csv" in line
    assert not (place / "csv").exists()


def test_a_folder_that_is_no_sweep_is_one_clear_line(place: Path) -> None:
    assert "sweep.json" in refused("status", place)


def test_a_full_disk_is_one_clear_line_and_leaves_no_half_sweep(place: Path) -> None:
    mount = place / "small"
    mount.mkdir()
    if (
        os.geteuid() != 0
        or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4k", "tmpfs", mount], check=False).returncode
    ):
        pytest.skip("mounting a small file system needs root")
    try:
        line = refused("run", place / "space.py", "--out", mount / "out", "--set", f"model={place / 'model'}")
        assert "space" in line
        assert not (mount / "out" / "sweep.json").exists()
    finally:
        subprocess.run(["umount", mount], check=True)


def test_a_model_whose_weights_cannot_be_read_is_one_clear_line(place: Path) -> None:
    broken = place / "broken"
    shutil.copytree(place / "model", broken)
    [weights] = broken.glob("*.safetensors")
    weights.write_bytes(weights.read_bytes()[:100])
    done = steersweep("run", place / "space.py", "--out", place / "unread", "--set", f"model={broken}")
    assert done.returncode == 2
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("steersweep: a worker cannot start: ")
    assert str(broken) in last

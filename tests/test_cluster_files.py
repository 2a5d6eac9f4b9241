"""The files for clusters: what Ray's launcher reads, and a Slurm job that drains, requeues and goes on."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

from jobs.resolve import shipped_packages
from storage import places
from storage.mlflow_log import Mirror, tracking_uri
from storage.query import open_sweep
from tests.command import ROOT, check_close, results
from tests.mirrored import commit, free_port, make_sweep, runs_of


def test_ray_takes_the_cluster_file_and_all_that_it_mounts_is_there() -> None:
    config = yaml.safe_load((ROOT / "cluster.yaml").read_text())
    validate_config(prepare_config(config))
    mounted = {Path(source) for source in config["file_mounts"].values()}
    assert all((ROOT / source).exists() for source in mounted)
    assert {package.relative_to(ROOT) for package in shipped_packages("jobs.steer")} <= mounted
    with pytest.raises(Exception, match="max_workers"):
        validate_config(prepare_config({**config, "max_workers": "many"}))


SRUN = """#!/bin/bash
while [[ $1 == --* ]]; do shift; done
exec "$@"
"""
SCONTROL = """#!/bin/bash
case $1 in
  show) printf 'here\\nthere\\n' ;;
  requeue) touch "$REQUEUED" ;;
esac
"""
HOSTNAME = """#!/bin/bash
echo 127.0.0.1
"""


@pytest.fixture
def slurm(tmp_path: Path) -> dict[str, str]:
    """An environment with commands in the place of Slurm's, which run everything on this machine."""
    programs = tmp_path / "bin"
    programs.mkdir()
    for name, text in {"srun": SRUN, "scontrol": SCONTROL, "hostname": HOSTNAME}.items():
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)
    return {
        **os.environ,
        "PATH": f"{programs}:{os.environ['PATH']}",
        "STEERSWEEP_BIN": str(Path(sys.executable).parent),
        "STEERSWEEP_PORT": str(free_port()),
        "SLURM_SUBMIT_DIR": str(ROOT),
        "SLURM_JOB_NODELIST": "two",
        "SLURM_JOB_ID": "7",
        "REQUEUED": str(tmp_path / "requeued"),
    }


def renamed(name: str) -> list[str]:
    """A command before another that has that one run under another host name, where this is allowed."""
    code = "import os, socket, sys; socket.sethostname(sys.argv[1]); os.execvp(sys.argv[2], sys.argv[2:])"
    command = ["unshare", "--uts", sys.executable, "-c", code, name]
    can = shutil.which("unshare") and subprocess.run([*command, "true"], check=False, capture_output=True)
    return command if can and can.returncode == 0 else []


@pytest.mark.ray
@pytest.mark.chaos
def test_a_slurm_job_drains_before_its_limit_and_goes_on_elsewhere(
    place: Path, finished: dict[str, Any], slurm: dict[str, str]
) -> None:
    folder = place / "slurm"
    sweep = [place / "space.py", "--out", folder, "--set", f"model={place / 'model'}", "--set", "max_pack=1"]
    job = ["bash", "examples/slurm/sweep.sbatch", *map(str, sweep)]
    first = subprocess.Popen(job, cwd=ROOT, env=slurm, start_new_session=True)
    deadline = time.monotonic() + 240
    while not list((folder / "tables" / "trials").glob("*.parquet")):
        assert first.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    first.send_signal(signal.SIGUSR1)
    assert first.wait(240) == 130
    assert Path(slurm["REQUEUED"]).exists()
    ended = len(open_sweep(folder).rows("SELECT trial FROM trials WHERE state = 'completed'"))
    assert 0 < ended < 9
    Path(slurm["REQUEUED"]).unlink()
    elsewhere = renamed("elsewhere")
    again = subprocess.run([*elsewhere, *job], cwd=ROOT, env=slurm, timeout=300, check=False)
    assert again.returncode == 0
    assert not Path(slurm["REQUEUED"]).exists()
    found, expected = results(folder), results(place / "finished")
    assert found["trials"] == expected["trials"]
    check_close(found["metrics"], expected["metrics"])  # packs of another size round otherwise
    hosts = {row["host"] for row in open_sweep(folder).rows("SELECT DISTINCT host FROM attempts")}
    assert hosts == ({socket.gethostname(), "elsewhere"} if elsewhere else {socket.gethostname()})


MOUNTS = r"""overlay / overlay rw 0 0
server:/export /shared nfs4 rw 0 0
tmpfs /shared/fast tmpfs rw 0 0
scratch /with\040space lustre rw 0 0
"""


@pytest.mark.parametrize(
    ("path", "is_remote"),
    [
        ("/home/me/runs", False),
        ("/shared", True),
        ("/shared/runs/new", True),
        ("/shared/fast/runs", False),
        ("/sharedness", False),
        ("/with space/runs", True),
    ],
)
def test_a_path_is_on_the_network_if_its_nearest_mount_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str, is_remote: bool
) -> None:
    (tmp_path / "mounts").write_text(MOUNTS)
    monkeypatch.setattr(places, "_MOUNTS", tmp_path / "mounts")
    assert places.is_on_network(Path(path)) == is_remote


def test_without_a_list_of_mounts_nothing_is_on_the_network(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(places, "_MOUNTS", tmp_path / "absent")
    assert not places.is_on_network(Path("/shared"))


def test_the_database_of_a_sweep_on_the_network_lies_on_this_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_sweep(tmp_path / "shared" / "sweep")
    commit(folder, 0, effect=1.0)
    monkeypatch.setattr(places, "is_on_network", lambda path: True)
    for machine in ("one", "two"):
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / machine))
        assert str(tmp_path / machine) in tracking_uri(folder)
        mirror = Mirror(folder)
        mirror.sync()
        mirror.finish()
        assert len(runs_of(folder)[1]) == 1
        assert Mirror(folder).differences() == {}
    assert not list(folder.rglob("mlflow.db"))

"""Drivers and workers of the real command that are stopped or killed."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.command import ROOT, results, run_arguments, steersweep

pytestmark = pytest.mark.ray


@pytest.mark.parametrize(
    "moments",
    [
        ("tables/metrics",),
        pytest.param(("ledger.jsonl", "tables/metrics", "tables/trials"), marks=pytest.mark.chaos),
    ],
    ids=["once", "again and again"],
)
def test_a_driver_killed_at_any_moment_goes_on_to_the_same_tables(
    finished: dict[str, Any], place: Path, moments: tuple[str, ...]
) -> None:
    expected = results(place / "finished")
    folder = place / f"killed-{len(moments)}"
    command = [sys.executable, "-m", "orchestrator.cli", *map(str, run_arguments(place, folder.name))]
    for wanted in moments:
        driver = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        wait_until(
            lambda path=folder / wanted: path.exists() and (path.is_file() or any(path.iterdir())), driver
        )
        kill_tree(driver)
    done = steersweep("resume", folder, "--json")
    assert done.returncode == 0, done.stderr
    assert results(folder) == expected


@pytest.mark.parametrize(
    ("number", "send"),
    [
        (signal.SIGINT, os.kill),
        pytest.param(signal.SIGTERM, os.kill, marks=pytest.mark.chaos),
        pytest.param(signal.SIGTERM, os.killpg, marks=pytest.mark.chaos),
    ],
    ids=["ctrl-c", "terminate", "terminate-group"],
)
def test_a_driver_that_is_asked_to_stop_says_how_to_go_on_and_leaves_no_process(
    finished: dict[str, Any], place: Path, number: signal.Signals, send: Any
) -> None:
    out = f"stopped-{number}-{send.__name__}"
    command = [sys.executable, "-m", "orchestrator.cli", *map(str, run_arguments(place, out))]
    driver = subprocess.Popen(
        command,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    wait_until(lambda: "dispatched" in ledger(place / out), driver)
    children = psutil.Process(driver.pid).children(recursive=True)
    send(driver.pid, number)
    output, errors = driver.communicate(timeout=120)
    assert driver.returncode == 130, errors
    assert (
        errors.splitlines()[-1] == f"steersweep: stopped; `steersweep resume {place / out}` goes on from here"
    )
    assert "Traceback" not in errors
    assert output == ""
    _, alive = psutil.wait_procs(children, timeout=30)
    assert not alive
    done = steersweep("status", place / out, "--json")
    assert json.loads(done.stdout)["driver"] is None
    assert json.loads(done.stdout)["running"] == 0


def test_a_killed_driver_that_had_only_the_report_left_to_write_is_finished_by_resume(
    finished: dict[str, Any], place: Path
) -> None:
    report = place / "finished" / "report" / "index.html"
    report.unlink()
    done = steersweep("resume", place / "finished", "--json")
    assert done.returncode == 0, done.stderr
    assert report.exists()


def ledger(folder: Path) -> str:
    path = folder / "ledger.jsonl"
    return path.read_text() if path.exists() else ""


def wait_until(happened: Any, driver: "subprocess.Popen[Any]") -> None:
    deadline = time.monotonic() + 120
    while not happened():
        assert time.monotonic() < deadline, "the sweep did not get that far"
        if driver.poll() is not None:
            return
        time.sleep(0.01)


def kill_tree(driver: "subprocess.Popen[Any]") -> None:
    """Kill the driver first, as a machine's out-of-memory killer would, then what it left behind."""
    children = psutil.Process(driver.pid).children(recursive=True) if driver.poll() is None else []
    driver.send_signal(signal.SIGKILL)
    driver.wait()
    for child in children:
        child.kill()
    psutil.wait_procs(children, timeout=30)

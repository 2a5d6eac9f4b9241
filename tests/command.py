"""The command as a user calls it, and a tiny sweep to call it on."""

import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from storage.query import open_sweep

ROOT = Path(__file__).parents[1]
SPACE = '''
"""A tiny tone grid."""
from search_spaces.base import Grid, Objective, Space

SPACE = Space(
    description="A tiny tone grid.",
    job="jobs.steer",
    parameters={"layer": Grid([0, 1, 2]), "dose": Grid([-0.4, 0.0, 0.4])},
    fixed={"choices_select": 6, "choices_report": 4, "prompts_select": 2, "prompts_report": 1,
        "max_new_tokens": 6},
    objectives=[
        Objective(metric="effect", direction="maximize"),
        Objective(metric="damage", direction="minimize"),
    ],
    sampler="grid",
)
'''


def steersweep(
    *arguments: str | Path, timeout: float = 240, cwd: Path = ROOT
) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "orchestrator.cli", *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=timeout, check=False)


def steersweep_beside_other_code(folder: Path, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """The command as it is installed, called in a folder with a package of the same name as one of ours."""
    (folder / "jobs").mkdir(parents=True, exist_ok=True)
    (folder / "jobs" / "__init__.py").write_text("raise RuntimeError('other code')")
    command = [Path(sys.executable).with_name("steersweep"), *map(str, arguments)]
    return subprocess.run(
        command,
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )


def run_arguments(place: Path, out: str, *, workers: int = 1) -> list[str | Path]:
    settings = ["--set", f"model={place / 'model'}", "--set", f"workers={workers}"]
    return ["run", place / "space.py", "--out", place / out, *settings, "--json"]


def results(folder: Path) -> dict[str, list[dict[str, Any]]]:
    """All that does not depend on time or on who ran it."""
    sweep = open_sweep(folder)
    return {
        "trials": sweep.rows("SELECT trial, spec, state, layer, dose FROM trials ORDER BY trial"),
        "metrics": sweep.rows("SELECT * FROM metrics ORDER BY ALL"),
        "items": sweep.rows("SELECT * FROM items ORDER BY ALL"),
        "completions": sweep.rows("SELECT * FROM completions ORDER BY ALL"),
        "vectors": sweep.rows("SELECT * FROM vectors ORDER BY trial"),
    }


def refused(*arguments: str | Path) -> str:
    done = steersweep(*arguments, timeout=120)
    assert done.returncode == 2, (done.returncode, done.stdout, done.stderr)
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith("steersweep: ")
    return lines[0]


def check_close(found: Sequence[Mapping[str, Any]], expected: Sequence[Mapping[str, Any]]) -> None:
    """The same rows, but for what their column `value` loses by rounding."""
    for row, other in zip(found, expected, strict=True):
        assert {**row, "value": None} == {**other, "value": None}
        value = None if other["value"] is None else pytest.approx(other["value"], rel=1e-4, abs=1e-4)
        assert row["value"] == value, row

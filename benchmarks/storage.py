"""How long a large sweep takes to be kept and to be asked, here and in MLflow alone.

Run by `make bench-storage`; writes `benchmarks/results/storage.json`. A million made-up trials are kept
(`benchmarks.filling`); each question is asked in a process of its own, from opening the folder to the answer,
imports aside.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from datetime import date
from pathlib import Path
from typing import Any

from benchmarks import activations
from benchmarks.filling import OBJECTIVES
from benchmarks.machine import describe
from orchestrator.report.writing import write_report
from storage.front import front
from storage.mlflow_log import Mirror, tracking_uri
from storage.pareto import pareto
from storage.query import StoredSweep, open_sweep

RESULTS = Path(__file__).parent / "results" / "storage.json"
TRIALS = 1_000_000
MIRRORED = 10_000
COMPARED = 5_000
"""Trials of the sweep that MLflow is asked about too."""
REPORTED = 20_000


def _pareto(sweep: StoredSweep, folder: Path) -> Any:
    return [row["trial"] for row in pareto(sweep)]


def _best_per_layer(sweep: StoredSweep, folder: Path) -> Any:
    return sweep.rows("SELECT * FROM best_per_layer")


def _completions(sweep: StoredSweep, folder: Path) -> Any:
    middle = sweep.identity["trials"] // 2
    return sweep.rows(f"SELECT * FROM completions WHERE trial = {middle}")


def _dose_response(sweep: StoredSweep, folder: Path) -> Any:
    return sweep.rows("SELECT * FROM dose_response WHERE name = 'm0'")


def _mirror(sweep: StoredSweep, folder: Path) -> Any:
    return Mirror(folder).sync()


def _report(sweep: StoredSweep, folder: Path) -> Any:
    return write_report(folder).stat().st_size / 1e6


def _pareto_in_mlflow(sweep: StoredSweep, folder: Path) -> Any:
    """The front from what MLflow has, as its own client gives it."""
    import numpy as np
    from mlflow import MlflowClient
    from mlflow.entities import Run

    client = MlflowClient(tracking_uri=tracking_uri(folder))
    experiments = [each.experiment_id for each in client.search_experiments()]
    runs: list[Run] = []
    token = None
    while token != "":
        page = client.search_runs(experiments, "tags.state = 'completed'", max_results=1000, page_token=token)
        runs += page
        token = page.token or ""
    points = np.array([[run.data.metrics[metric] for metric, _ in OBJECTIVES] for run in runs])
    kept = front(points, [direction for _, direction in OBJECTIVES])
    return sorted(int(run.data.tags["steersweep.trial"]) for run, on in zip(runs, kept, strict=True) if on)


QUESTIONS: dict[str, Callable[[StoredSweep, Path], Any]] = {
    "pareto": _pareto,
    "best_per_layer": _best_per_layer,
    "completions": _completions,
    "dose_response": _dose_response,
    "mirror": _mirror,
    "report": _report,
    "pareto_in_mlflow": _pareto_in_mlflow,
}


def answer(folder: Path, question: str) -> dict[str, Any]:
    """Seconds from opening the folder to the answer, peak memory of this process, and the answer."""
    began = time.perf_counter()
    found = QUESTIONS[question](open_sweep(folder), folder)
    seconds = time.perf_counter() - began
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    return {"seconds": seconds, "peak_gib": peak, "answer": found}


def _ask(folder: Path, question: str, *, times: int = 3) -> dict[str, Any]:
    """The fastest of several processes that answer a question, with the highest peak of memory."""
    command = [sys.executable, "-m", "benchmarks.storage", "--folder", str(folder), "--question", question]
    runs = [_run(command) for _ in range(times)]
    best = min(runs, key=lambda run: float(run["seconds"]))
    return {**best, "peak_gib": max(run["peak_gib"] for run in runs)}


def _fill(folder: Path, trials: int) -> dict[str, Any]:
    return _run([sys.executable, "-m", "benchmarks.filling", str(folder), str(trials)])


def _run(command: Sequence[str]) -> dict[str, Any]:
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def measure(place: Path, trials: int) -> dict[str, Any]:
    """Every figure."""
    found: dict[str, Any] = {"trials": trials, **_fill(place / "large", trials)}
    asked = {
        question: _ask(place / "large", question)
        for question in ("pareto", "best_per_layer", "completions", "dose_response")
    }
    found |= {f"{question}_seconds": each["seconds"] for question, each in asked.items()}
    found["peak_gib"] = max(found["write_peak_gib"], *(each["peak_gib"] for each in asked.values()))
    _fill(place / "small", COMPARED)
    _ask(place / "small", "mirror", times=1)
    here, there = (_ask(place / "small", question) for question in ("pareto", "pareto_in_mlflow"))
    assert sorted(here["answer"]) == there["answer"], "the fronts differ"
    found["mlflow_seconds"] = there["seconds"]
    found["mlflow_ratio"] = there["seconds"] / here["seconds"]
    _fill(place / "mirrored", MIRRORED)
    found["mirror_minutes"] = _ask(place / "mirrored", "mirror", times=1)["seconds"] / 60
    _fill(place / "reported", REPORTED)
    report = _ask(place / "reported", "report", times=1)
    found |= {"report_seconds": report["seconds"], "report_mb": report["answer"]}
    return found | activations.measure(place / "states", activations.states())


def main(arguments: Sequence[str]) -> None:
    """Measure and write, or answer one question of one folder."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.storage", description=__doc__)
    parser.add_argument("--trials", type=int, default=TRIALS)
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--folder", type=Path, help="ask this one")
    parser.add_argument("--question", choices=QUESTIONS)
    options = parser.parse_args(arguments)
    if options.folder is not None:
        sys.stdout.write(json.dumps(answer(options.folder, options.question)) + "\n")
        return
    with tempfile.TemporaryDirectory() as place:
        found = measure(Path(place), options.trials)
    found |= {"machine": describe(), "date": date.today().isoformat()}
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(found, indent=2) + "\n")
    sys.stdout.write(options.out.read_text())


if __name__ == "__main__":
    main(sys.argv[1:])

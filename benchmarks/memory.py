"""Peak memory of a grid and of one with ten times the rows, each in a process of its own.

Run by `make bench-steering`; writes `benchmarks/results/memory.json`.
"""

import argparse
import json
import resource
import subprocess
import sys
from collections.abc import Iterator, Sequence
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.machine import describe
from jobs.engine.decoding import Decoding, Work, generate
from jobs.engine.interventions import Add
from jobs.engine.loading import load_replica
from jobs.engine.replica import Replica
from jobs.engine.tables import row_tables
from jobs.spec import ModelRef

RESULTS = Path(__file__).parent / "results" / "memory.json"
SIZES = {"grid": (24, 8), "10 x the prompts": (240, 8), "10 x the configurations": (24, 80)}
"""Prompts and configurations."""
NEW_TOKENS = 4
MEMORY_MIB = 256


def measure(model: str, prompts: int, configurations: int, memory_mib: int) -> dict[str, float]:
    """Peak memory of this process after loading and after the grid, MiB."""
    replica = load_replica(ModelRef(id=model), memory=memory_mib * 2**20)
    list(_completions(replica, 1, 1))
    loaded = _peak_mib()
    rows = sum(1 for _ in _completions(replica, prompts, configurations))
    return {"rows": rows, "loaded_mib": loaded, "peak_mib": _peak_mib()}


def _completions(replica: Replica, prompts: int, configurations: int) -> Iterator[int]:
    random = np.random.default_rng(0)
    texts = [random.integers(100, 1000, 60 + number % 20).tolist() for number in range(prompts)]
    rows = [
        [Add(layer=number % replica.layers, vector=random.normal(size=replica.hidden_size))]
        for number in range(configurations)
    ]
    work = [Work(prompt, row) for row in range(configurations) for prompt in range(prompts)]
    decoding = Decoding(max_new_tokens=NEW_TOKENS, stops=False)
    return (index for index, _ in generate(replica, texts, row_tables(replica, rows), work, decoding))


def _peak_mib() -> float:
    # Linux counts kibibytes.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


def main(arguments: Sequence[str]) -> None:
    """Measure every size in a new process, print and write what was found."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.memory", description=__doc__)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--memory-mib", type=int, default=MEMORY_MIB, help="the replica's setting")
    parser.add_argument("--size", choices=[*SIZES], help="measure this one alone, in this process")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args(arguments)
    if options.size is not None:
        print(json.dumps(measure(options.model, *SIZES[options.size], options.memory_mib)))
        return
    result: dict[str, Any] = {
        "machine": describe(),
        "date": date.today().isoformat(),
        "memory_mib": options.memory_mib,
    }
    for size in SIZES:
        command = [sys.executable, "-m", "benchmarks.memory", "--size", size]
        command += ["--model", options.model, "--memory-mib", str(options.memory_mib)]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        result[size] = json.loads(done.stdout)
        print(size, result[size], flush=True)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])

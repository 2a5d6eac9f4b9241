"""Fill a sweep's folder with made-up results, through the code that keeps real ones. Prints one line of JSON.

Run in a process of its own by `python -m benchmarks.storage`. A trial has 12 metrics on the split select and
two on report, 10 items and two completions; packs have 64 trials and are committed one by one. Only keeping
is timed: the rows are made before.
"""

import json
import resource
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jobs.spec import ModelRef, Spec
from storage.durable import publish
from storage.ledger import Asked, Ledger
from storage.manifest import StoredResult
from storage.parquet import write_table
from storage.store import Part, Store

PACK = 64
OBJECTIVES = (("m0", "maximize"), ("m1", "minimize"))
METRICS = tuple(f"m{number}" for number in range(12))
LAYERS, DOSES = 30, 21
_ITEMS, _COMPLETIONS = 10, 2
_WORDS = ["a", "bird", "sings", "over", "green", "hills", "while", "rain", "falls", "at", "dusk"]


def fill(folder: Path, trials: int) -> dict[str, Any]:
    """Keep so many trials; milliseconds a trial of the first and the last twentieth, and of each tenth."""
    identity = {
        "sweep": "filled",
        "space": "filled",
        "description": "Made-up results.",
        "job": "made.up",
        "model": {"id": "none", "revision": None, "dtype": "float32"},
        "seed": 0,
        "config": {"workers": 1},
        "provenance": {"git_revision": None},
        "trials": trials,
        "metrics": {metric: {"unit": "", "meaning": "made up"} for metric in METRICS},
        "parameters": {"layer": "BIGINT", "dose": "DOUBLE"},
        "objectives": [{"metric": metric, "direction": direction} for metric, direction in OBJECTIVES],
    }
    publish(folder / "sweep.json", json.dumps(identity).encode())
    store, ledger, random = Store(folder), Ledger(folder), np.random.default_rng(0)
    seconds = []
    for first in range(0, trials, PACK):
        asked = _asked(range(first, min(trials, first + PACK)), random)
        rows = {name: make(asked, random) for name, make in _TABLES.items()}
        began = time.perf_counter()
        _keep(folder, store, ledger, asked, rows)
        seconds.append((time.perf_counter() - began) / len(asked))
    milliseconds = 1000 * np.array(seconds)
    tenths = [float(part.mean()) for part in np.array_split(milliseconds, 10)]
    some = max(1, len(milliseconds) // 20)
    return {
        "write_ms_first": float(milliseconds[:some].mean()),
        "write_ms_last": float(milliseconds[-some:].mean()),
        "write_ms_tenths": tenths,
        "write_ms_longest_pack": float(PACK * milliseconds.max()),
        "write_peak_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
    }


def _keep(
    folder: Path, store: Store, ledger: Ledger, asked: Sequence[Asked], rows: dict[str, list[dict[str, Any]]]
) -> None:
    """What worker and driver do of a pack."""
    ledger.asked(asked)
    files = tuple(write_table(folder, name, rows[name]) for name in ("metrics", "items", "completions"))
    results = tuple(StoredResult(each.spec.id, "completed", None) for each in asked)
    store.commit([Part(files, results)], trials=rows["trials"], attempts=rows["attempts"])
    store.compact()


def _asked(numbers: range, random: np.random.Generator) -> list[Asked]:
    model = ModelRef(id="org/model", revision="main")
    found = []
    for number in numbers:
        params = {"layer": int(random.integers(LAYERS)), "dose": float(random.integers(DOSES)) / 20}
        spec = Spec(
            job="jobs.steer",
            code="0" * 16,
            params={**params, "number": number},
            model=model,
            data={"pairs": "0" * 16},
            seed=0,
        )
        found.append(Asked(trial=number, params=params, spec=spec, seen=numbers.start, group=numbers.start))
    return found


def _trials(asked: Sequence[Asked], random: np.random.Generator) -> list[dict[str, Any]]:
    return [
        {
            "trial": each.trial,
            "spec": each.spec.id,
            "state": "completed",
            "seconds": 1.0,
            "finished": 1.8e9 + each.trial,
            "params": json.dumps(dict(each.params)),
        }
        for each in asked
    ]


def _attempts(asked: Sequence[Asked], random: np.random.Generator) -> list[dict[str, Any]]:
    pack = f"{asked[0].trial:012x}"
    return [
        {
            "attempt": pack,
            "pack": pack,
            "trial": each.trial,
            "spec": each.spec.id,
            "job": each.spec.job,
            "state": "ok",
            "worker": "worker-0",
            "loaded": 0,
            "started": 1.8e9,
            "finished": 1.8e9 + each.trial,
        }
        for each in asked
    ]


def _metrics(asked: Sequence[Asked], random: np.random.Generator) -> list[dict[str, Any]]:
    names = [("select", name) for name in METRICS] + [("report", name) for name, _ in OBJECTIVES]
    values = random.normal(size=(len(asked), len(names)))
    return [
        {"spec": each.spec.id, "split": split, "name": name, "value": value}
        for each, row in zip(asked, values.tolist(), strict=True)
        for (split, name), value in zip(names, row, strict=True)
    ]


def _items(asked: Sequence[Asked], random: np.random.Generator) -> list[dict[str, Any]]:
    values = random.normal(size=(len(asked), _ITEMS)).tolist()
    return [
        {
            "spec": each.spec.id,
            "split": "select" if item % 2 else "report",
            "item": item,
            "prompt": f"Tell me about the weather in place {item}.",
            "name": "log_odds",
            "value": values[place][item],
        }
        for place, each in enumerate(asked)
        for item in range(_ITEMS)
    ]


def _completions(asked: Sequence[Asked], random: np.random.Generator) -> list[dict[str, Any]]:
    return [
        {
            "spec": each.spec.id,
            "split": "select",
            "item": item,
            "prompt": f"Tell me about the weather in place {item}.",
            "text": " ".join(random.choice(_WORDS, 20)),
            "tokens": 20,
            "nll": 1.5,
            "repetition": 0.0,
        }
        for each in asked
        for item in range(_COMPLETIONS)
    ]


_TABLES = {
    "trials": _trials,
    "attempts": _attempts,
    "metrics": _metrics,
    "items": _items,
    "completions": _completions,
}


if __name__ == "__main__":
    sys.stdout.write(json.dumps(fill(Path(sys.argv[1]), int(sys.argv[2]))) + "\n")

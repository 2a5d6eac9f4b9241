"""The report of hand-made sweeps: what it says, what it escapes, what it leaves out."""

import json
import math
import random
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

from jobs.errors import SpecError
from orchestrator import figures
from orchestrator.figures import DARK, LIGHT, Measure, Panel
from orchestrator.report import write_report
from storage.parquet import write_table
from storage.store import Part, Store, StoredResult

LAYERS = (10, 14, 18)
DOSES = (-0.3, -0.15, 0.0, 0.15, 0.3)
METRICS = {
    "log_odds": {"unit": "nats", "meaning": "log-odds of kind over grim words"},
    "effect": {"unit": "nats", "meaning": "shift of log_odds in the dose's direction"},
    "nll": {"unit": "nats/token", "meaning": "surprise of the unsteered model"},
    "repetition": {"unit": "share", "meaning": "share of repeated trigrams"},
    "damage": {"unit": "nats/token", "meaning": "rise of nll plus rise of repetition"},
}
OBJECTIVES = ({"metric": "effect", "direction": "maximize"}, {"metric": "damage", "direction": "minimize"})
PROMPTS = (("select", "How was your day?"), ("select", "Describe <b>Monday</b>."), ("report", "Tell me about rain."))
NASTY = (
    '<script>alert("owned")</script><img src=x onerror=alert(1)>',
    "emoji 👩‍🔬🎉 & \x1b[31mred\x00 \x9b bell\x07\r\n\u202egnirts",
    '"><style>@import url(https://evil.example/x.css)</style>{{ 7 * 7 }} <a href="http://evil.example">',
)


class Trial(NamedTuple):
    params: dict[str, Any]
    metrics: dict[str, dict[str, float | None]]
    state: str = "completed"
    reason: str | None = None
    texts: tuple[str, ...] = ()


def make_sweep(
    folder: Path,
    trials: list[Trial],
    *,
    parameters: dict[str, str],
    objectives: tuple[dict[str, str], ...] = OBJECTIVES,
    metrics: dict[str, dict[str, str]] = METRICS,
    baseline: tuple[str, ...] = (),
    asked: int = 0,
) -> Path:
    """Write a sweep as the orchestrator would; `asked` further trials wait in the ledger."""
    identity = {
        "sweep": "tone_grid-12345678",
        "space": "tone_grid",
        "description": "Which layer and which dose change the tone?",
        "job": "jobs.steer",
        "parameters": parameters,
        "objectives": list(objectives),
        "metrics": metrics,
        "model": {"id": "smollm2-135m", "revision": None, "dtype": "float32", "trust_remote_code": False},
        "seed": 7,
        "config": {"workers": 2, "sampler": None, "trials": None},
        "provenance": {"git_revision": "0a1b2c3d", "packages": {"torch": "2.13.0"}, "note": "</pre><script>x</script>"},
    }
    folder.mkdir(exist_ok=True)
    (folder / "sweep.json").write_text(json.dumps(identity))
    seen: dict[str, int] = {}
    tables: dict[str, list[dict[str, Any]]] = {"metrics": [], "completions": [], "trials": [], "attempts": []}
    if baseline:
        tables["completions"] += _completions("base", baseline)
        tables["metrics"] += _metric_rows("base", {"select": {"log_odds": 0.3, "nll": 1.1}, "report": {"log_odds": 0.2}})
        tables["attempts"].append(_attempt("base", None, "jobs.baseline", 0))
    for number, trial in enumerate(trials):
        spec = "unsteered" if trial.params.get("dose") == 0 else f"spec{number}"
        first = seen.setdefault(spec, number)
        if first == number:
            tables["metrics"] += _metric_rows(spec, trial.metrics)
            tables["completions"] += _completions(spec, trial.texts)
            tables["attempts"].append(_attempt(spec, number, "jobs.steer", number))
        tables["trials"].append(
            {
                "trial": number,
                "spec": spec,
                "state": trial.state,
                "reason": trial.reason,
                "reused_from": None if first == number else first,
                "seconds": 1.5 if first == number else None,
                "finished": 1.7e9 + number,
                "params": json.dumps(trial.params),
            }
        )
    files = tuple(write_table(folder, table, tables[table]) for table in ("metrics", "completions") if tables[table])
    results = tuple(StoredResult(spec, "completed", None) for spec in seen)
    Store(folder).commit([Part(files, results)], trials=tables["trials"], attempts=tables["attempts"])
    _ask(folder, range(len(trials), len(trials) + asked))
    return folder


def _metric_rows(spec: str, metrics: dict[str, dict[str, float | None]]) -> list[dict[str, Any]]:
    return [
        {"spec": spec, "split": split, "name": name, "value": value}
        for split, values in metrics.items()
        for name, value in values.items()
    ]


def _completions(spec: str, texts: tuple[str, ...]) -> list[dict[str, Any]]:
    return [
        {"spec": spec, "split": split, "item": item, "prompt": prompt, "text": text, "tokens": 9, "nll": 1.2, "repetition": 0.05}
        for item, ((split, prompt), text) in enumerate(zip(PROMPTS, texts, strict=False))
    ]


def _attempt(spec: str, trial: int | None, job: str, number: int) -> dict[str, Any]:
    return {
        "attempt": f"a{number}",
        "pack": "p",
        "trial": trial,
        "spec": spec,
        "job": job,
        "state": "ok",
        "worker": "w0",
        "host": "h",
        "started": 1.7e9 + number,
        "finished": 1.7e9 + number + 1.5,
    }


def _ask(folder: Path, numbers: range) -> None:
    spec = {"job": "jobs.steer", "code": "c", "params": {}, "model": {"id": "m"}, "data": {}, "seed": 0}
    events = [
        {"event": "asked", "trial": number, "params": {}, "spec": {**spec, "seed": number}, "seen": 0, "fixed": []}
        for number in numbers
    ]
    (folder / "ledger.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))


def tone_trials(layers: tuple[int, ...] = LAYERS, doses: tuple[float, ...] = DOSES) -> list[Trial]:
    """A grid whose middle layers steer best and whose large doses break the text."""
    noise = random.Random(0)
    trials = []
    for layer in layers:
        gain = 9 * math.exp(-(((layer - 16) / 5) ** 2))
        for dose in doses:
            metrics = {}
            for split in ("select", "report"):
                shift = math.tanh(gain * dose / 2) * 4 + (noise.gauss(0, 0.08) if dose else 0.0)
                damage = max(0.0, 14 * abs(dose) ** 2 + noise.gauss(0, 0.05)) if dose else 0.0
                metrics[split] = {
                    "log_odds": 0.3 + shift,
                    "effect": math.copysign(1, dose) * shift if dose else 0.0,
                    "nll": 1.1 + damage,
                    "repetition": min(1.0, 0.02 + abs(dose) / 3),
                    "damage": damage,
                }
            texts = tuple(f"{'A grim' if dose < 0 else 'A lovely'} reply, layer {layer}, dose {dose}." for _ in PROMPTS)
            trials.append(Trial({"layer": layer, "dose": dose}, metrics, texts=texts))
    return trials

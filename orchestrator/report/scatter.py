"""What the page's scatter is drawn from: a point for each result, its settings, and what is said there."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from jobs.spec import UNSTEERED
from orchestrator.report.canvas import Measure
from orchestrator.report.comparisons import Reply, replies_of
from orchestrator.report.findings import Findings, Record, is_number, parameter
from orchestrator.report.page import visible
from storage.query import StoredSweep

MOST_CHARACTERS = 4_000_000
"""Of replies in a page: those of results on the front come first, then those of the first trials that fit."""


def scatter(sweep: StoredSweep, found: Findings) -> dict[str, Any] | None:
    """All that the page's script shows of the results, as JSON takes it; None where there are none.

    Returns:
        trials, the number of each result's trial; columns, what can stand along an axis, with a value or None
        for each result; axes, which columns are shown first; settings, parameter -> values; front and near,
        indices of results; texts, each once; replies, trial -> rows of split, prompt, what stands beside it
        and its own text, as indices of `texts`; beside and tried, their headings; has_replies, whether any
        are stored.
    """
    # Trials that share a result are one point.
    rows = [row for row in found.scored.values() if found.trials[row["trial"]]["reused_from"] is None]
    if not rows:
        return None
    place = {row["trial"]: index for index, row in enumerate(rows)}
    settings = {name: [row["params"][name] for row in rows] for name in found.identity["parameters"]}
    columns = _columns(found, rows, settings)
    front = [row["trial"] for row in found.front]
    return {
        "trials": list(place),
        "columns": columns,
        "axes": [0, 1] if len(found.identity["objectives"]) > 1 else [len(columns) - 1, 0],
        "settings": {name: [visible(value) for value in values] for name, values in settings.items()},
        "front": [place[trial] for trial in front],
        "near": [place[row["trial"]] for row in found.near],
        **_said(sweep, found, list(dict.fromkeys([*front, *place]))),
    }


def _columns(
    found: Findings, rows: Sequence[Record], settings: Mapping[str, Sequence[Any]]
) -> list[dict[str, Any]]:
    """Measures, objectives first, then numeric parameters and the trial's number."""
    objectives = [objective["metric"] for objective in found.identity["objectives"]]
    measured = {name: [_short(row["chosen"].get(name)) for row in rows] for name in found.measures}
    measured = {
        name: values for name, values in measured.items() if set(values) != {None} or name in objectives
    }
    numeric = {name: values for name, values in settings.items() if all(map(is_number, values))}
    shown = [
        *((found.measures[name], values) for name, values in measured.items()),
        *((parameter(name), values) for name, values in numeric.items()),
        (Measure("trial"), [row["trial"] for row in rows]),
    ]
    return [
        {
            "name": measure.name,
            "label": measure.label,
            "is_objective": measure.name in objectives,
            "is_measure": measure.name in measured,
            "values": values,
        }
        for measure, values in shown
    ]


def _short(value: float | None) -> float | None:
    """Six digits, which is more than a screen shows; None for what is no number."""
    return None if value is None or not math.isfinite(value) else float(f"{value:.6g}")


def _said(sweep: StoredSweep, found: Findings, trials: Sequence[int]) -> dict[str, Any]:
    """Replies of the first of some trials, as many as fit into the page."""
    specs = {trial: found.trials[trial]["spec"] for trial in trials}
    # A text stands there once for each trial that shares the result.
    once = "SELECT DISTINCT * EXCLUDE (trial) FROM completions"
    sizes = sweep.rows(f"SELECT spec, sum(length(text)) AS characters FROM ({once}) GROUP BY spec")
    characters = {row["spec"]: row["characters"] or 0 for row in sizes}
    chosen, room = {}, MOST_CHARACTERS
    for trial, spec in specs.items():
        if characters.get(spec, 0) <= room:
            chosen[trial] = spec
            room -= characters.get(spec, 0)
    replies = replies_of(sweep, list(chosen.values()))
    has_usual = any(reply.unsteered for of_spec in replies.values() for reply in of_spec)
    texts: dict[str, int] = {}

    def known(text: str) -> int:
        return texts.setdefault(visible(text), len(texts))

    def row_of(reply: Reply) -> list[Any]:
        beside = [*([reply.unsteered] if has_usual else []), *([reply.control] if found.control else [])]
        split = ", ".join(filter(None, (reply.own["split"], reply.own["variant"])))
        shown = [None if row is None else known(row["text"]) for row in beside]
        return [split, known(reply.own["prompt"]), *shown, known(reply.own["text"])]

    kept = {
        trial: [row_of(reply) for reply in replies[spec]] for trial, spec in chosen.items() if replies[spec]
    }
    return {
        "replies": kept,
        "texts": list(texts),
        "beside": [*([UNSTEERED] if has_usual else []), *([found.control] if found.control else [])],
        "tried": found.tried,
        "has_replies": not characters.keys().isdisjoint(specs.values()),
    }

"""One trial in full: what was tried, what came of it, what it says, and what it was made of."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from orchestrator.lineage import lineage
from orchestrator.report.comparisons import Reply, replies_of
from orchestrator.report.findings import Record, control_of
from storage.pareto import pareto
from storage.query import StoredSweep, open_sweep


def describe_trial(folder: Path, trial: int, *, texts: int) -> dict[str, Any]:
    """All that is stored of a trial.

    Args:
        folder: The sweep's folder.
        trial: Its number.
        texts: Most completions of each split.

    Returns:
        trial, state, reason, reused_from, params; is_on_front; metrics, one for each split, with its unit,
        value and the ends of its interval (None where there is none); control, what texts are compared with;
        texts, each with its control's and the unsteered model's; made_of, the trial's spec and all that it
        took, nearest first; provenance, of code, packages and machine.

    Raises:
        SpecError: If the folder holds no sweep, or the sweep has no such trial.
    """
    with open_sweep(folder).moment() as sweep:
        return _shown(sweep, trial, texts)


def _shown(sweep: StoredSweep, trial: int, texts: int) -> dict[str, Any]:
    sweep.check_trial(trial)
    [row] = sweep.rows(f"SELECT * FROM trials WHERE trial = {trial:d}")
    own = row["trial"] if row["reused_from"] is None else row["reused_from"]
    return {
        **{name: row[name] for name in ("trial", "state", "reason", "reused_from")},
        "params": {name: row[name] for name in sweep.identity["parameters"]},
        "is_on_front": own in {point["trial"] for point in pareto(sweep)},
        "metrics": trial_metrics(sweep, trial),
        "control": control_of(sweep.identity),
        "texts": _first_of_each_split(replies_of(sweep, [row["spec"]])[row["spec"]], texts),
        "made_of": lineage(sweep, row["spec"]),
        "provenance": sweep.identity.get("provenance", {}),
    }


def trial_metrics(sweep: StoredSweep, trial: int) -> list[dict[str, Any]]:
    """Metrics of a trial by name and split, with the ends of their intervals, objectives first."""
    rows = sweep.rows(f"SELECT split, name, value FROM metrics WHERE trial = {trial:d}")
    values = {(row["split"], row["name"]): row["value"] for row in rows}
    told = sweep.identity.get("metrics", {})
    names = dict.fromkeys([objective["metric"] for objective in sweep.identity["objectives"]])
    names |= dict.fromkeys(sorted(name for _, name in values if not name.endswith(("_low", "_high"))))
    splits = sorted({split for split, _ in values}, key=_SPLITS.index)
    return [
        {
            "name": name,
            "unit": told.get(name, {}).get("unit", ""),
            "split": split,
            **{end: values.get((split, name + tail)) for end, tail in _ENDS.items()},
        }
        for name in names
        for split in splits
        if (split, name) in values
    ]


_SPLITS = ("select", "report", "extract")
_ENDS = {"value": "", "low": "_low", "high": "_high"}


def _first_of_each_split(replies: Sequence[Reply], most: int) -> list[dict[str, Any]]:
    shown: Counter[str] = Counter()
    found = []
    for own, control, unsteered in replies:
        if shown[own["split"]] < most:
            shown[own["split"]] += 1
            head = {name: own[name] for name in ("split", "item", "variant", "prompt", "text")}
            found.append({**head, "control": _text(control), "unsteered": _text(unsteered)})
    return found


def _text(reply: Record | None) -> str | None:
    return None if reply is None else reply["text"]

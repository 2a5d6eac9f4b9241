"""Two trials of a sweep side by side: what was tried, what came of it, what they say."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jobs.scoring.statistics import paired_bootstrap
from orchestrator.showing import trial_metrics
from storage.query import StoredSweep, open_sweep


def compare_trials(folder: Path, first: int, second: int, *, texts: int) -> dict[str, Any]:
    """What two trials have in common and what not.

    Args:
        folder: The sweep's folder.
        first: Number of one trial.
        second: Number of the other.
        texts: Most completions of each split.

    Returns:
        trials, both numbers; same, the parameters that they share; params, those that they do not, with both
        values; metrics, for each metric and split its unit, both values, and their difference, second minus
        first, with the ends of its interval of 95 % by a bootstrap over the items that both have (None where
        a metric is no mean of items); texts, what both say in the same place.

    Raises:
        SpecError: If the folder holds no sweep, or the sweep has no such trial.
    """
    sweep = open_sweep(folder)
    for trial in (first, second):
        sweep.check_trial(trial)
    rows = {
        row["trial"]: row for row in sweep.rows(f"SELECT * FROM trials WHERE trial IN ({first}, {second})")
    }
    names = list(sweep.identity["parameters"])
    values = {name: [rows[trial][name] for trial in (first, second)] for name in names}
    return {
        "trials": [first, second],
        "states": [rows[trial]["state"] for trial in (first, second)],
        "same": {name: one for name, (one, other) in values.items() if one == other},
        "params": [{"name": name, "values": both} for name, both in values.items() if both[0] != both[1]],
        "metrics": _metrics(sweep, first, second),
        "texts": _texts(sweep, first, second, texts),
    }


def _metrics(sweep: StoredSweep, first: int, second: int) -> list[dict[str, Any]]:
    ones, others = (
        {(row["name"], row["split"]): row for row in trial_metrics(sweep, trial)} for trial in (first, second)
    )
    found = []
    for (name, split), row in ones.items():
        other = others.get((name, split), {"value": None})
        values = [row["value"], other["value"]]
        known = None not in values
        low, high = _interval(sweep, name, split, [first, second], values) if known else (None, None)
        found.append(
            {
                **{key: row[key] for key in ("name", "unit", "split")},
                "values": values,
                "difference": values[1] - values[0] if known else None,
                "low": low,
                "high": high,
            }
        )
    return found


def _interval(
    sweep: StoredSweep, name: str, split: str, trials: Sequence[int], values: Sequence[float]
) -> tuple[float | None, float | None]:
    """Ends of the interval of a difference, where both values are the means of the same items."""
    ones, others = (_items(sweep, trial, name, split) for trial in trials)
    both = sorted(ones.keys() & others.keys())
    if len(both) < 2 or len(both) < max(len(ones), len(others)):
        return None, None
    scores = [[of[item] for item in both] for of in (ones, others)]
    if not np.allclose([np.mean(each) for each in scores], values, rtol=1e-5, atol=1e-8):
        return None, None
    found = paired_bootstrap(scores[1], scores[0], seed=0).interval
    return found.low, found.high


def _items(sweep: StoredSweep, trial: int, name: str, split: str) -> dict[int, float]:
    found = sweep.items(trial)
    rows = zip(*(found[column].to_pylist() for column in ("name", "split", "item", "value")), strict=True)
    return {
        item: value
        for its_name, its_split, item, value in rows
        if (its_name, its_split) == (name, split) and value is not None
    }


def _texts(sweep: StoredSweep, first: int, second: int, most: int) -> list[dict[str, Any]]:
    """What both say to the same prompt in the same place."""
    return sweep.rows(
        "SELECT one.split, one.item, one.variant, one.prompt, [one.text, other.text] AS texts "
        "FROM completions AS one JOIN completions AS other USING (split, item, prompt) "
        f"WHERE one.trial = {first:d} AND other.trial = {second:d} "
        f"QUALIFY row_number() OVER (PARTITION BY split ORDER BY item) <= {most:d} "
        "ORDER BY split DESC, item"
    )

"""Two trials of a sweep side by side: what was tried, what came of it, what they say."""

from collections.abc import Mapping, Sequence
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
    with open_sweep(folder).moment() as sweep:
        return _compared(sweep, first, second, texts)


def _compared(sweep: StoredSweep, first: int, second: int, texts: int) -> dict[str, Any]:
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
    trials = (first, second)
    measured = [{(row["name"], row["split"]): row for row in trial_metrics(sweep, trial)} for trial in trials]
    items = _items(sweep, trials)
    found = []
    for name, split in dict.fromkeys([*measured[0], *measured[1]]):
        rows = [of.get((name, split)) for of in measured]
        one, other = (None if row is None else row["value"] for row in rows)
        difference, low, high = None, None, None
        if one is not None and other is not None:
            difference = other - one
            low, high = _interval([items.get((trial, name, split), {}) for trial in trials], [one, other])
        unit = next(row["unit"] for row in rows if row is not None)
        head = {"name": name, "unit": unit, "split": split, "values": [one, other]}
        found.append({**head, "difference": difference, "low": low, "high": high})
    return found


def _interval(
    scored: Sequence[Mapping[int, float]], values: Sequence[float]
) -> tuple[float | None, float | None]:
    """Ends of the interval of a difference, where both values are the means of the same items."""
    ones, others = scored
    if len(ones) < 2 or ones.keys() != others.keys():
        return None, None
    scores = [[of[item] for item in ones] for of in scored]
    if not np.allclose([np.mean(each) for each in scores], values, rtol=1e-5, atol=1e-8):
        return None, None
    found = paired_bootstrap(scores[1], scores[0], seed=0).interval
    return found.low, found.high


def _items(sweep: StoredSweep, trials: Sequence[int]) -> dict[tuple[int, str, str], dict[int, float]]:
    """Scores of prompts by trial, name and split."""
    listed = ", ".join(map(str, trials))
    found: dict[tuple[int, str, str], dict[int, float]] = {}
    for row in sweep.rows(f"SELECT * FROM items WHERE trial IN ({listed}) AND value IS NOT NULL"):
        found.setdefault((row["trial"], row["name"], row["split"]), {})[row["item"]] = row["value"]
    return found


def _texts(sweep: StoredSweep, first: int, second: int, most: int) -> list[dict[str, Any]]:
    """What both say to the same prompt in the same place."""
    return sweep.rows(
        "SELECT one.split, one.item, one.variant, one.prompt, [one.text, other.text] AS texts "
        "FROM completions AS one JOIN completions AS other USING (split, item, prompt) "
        f"WHERE one.trial = {first:d} AND other.trial = {second:d} "
        f"QUALIFY row_number() OVER (PARTITION BY split ORDER BY item) <= {most:d} "
        "ORDER BY split DESC, item"
    )

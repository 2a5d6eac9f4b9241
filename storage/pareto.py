"""The non-dominated trials of a sweep."""

from collections.abc import Sequence
from typing import Any

import moocore
import numpy as np

from jobs.spec import choosing_split
from storage.query import StoredSweep


def front(points: np.ndarray, directions: Sequence[str]) -> np.ndarray:
    """Which points no other point dominates; equal points are all kept.

    Args:
        points: Shape (points, objectives), finite.
        directions: `minimize` or `maximize` for each objective.

    Returns:
        Boolean array of shape (points,).
    """
    if len(points) == 0:
        return np.zeros(0, dtype=bool)
    maximise = [direction == "maximize" for direction in directions]
    mask: np.ndarray = moocore.is_nondominated(points, maximise=maximise, keep_weakly=True)
    return mask


def hypervolume(points: np.ndarray, directions: Sequence[str], *, among: np.ndarray) -> float:
    """Volume that points dominate, up to the worst values of a set that they are among, each scaled to 0..1.

    Args:
        points: Shape (points, objectives), finite.
        directions: `minimize` or `maximize` for each objective.
        among: All points, for the reference and the scale.
    """
    signs = np.where([direction == "maximize" for direction in directions], -1.0, 1.0)
    low, high = (among * signs).min(axis=0), (among * signs).max(axis=0)
    scaled = (points * signs - low) / np.where(high > low, high - low, 1.0)
    return float(moocore.hypervolume(scaled, ref=np.ones(scaled.shape[1])))


def best_first(points: np.ndarray, directions: Sequence[str]) -> list[int]:
    """Indices of points in the order of NSGA-II: by front, and inside one the lonelier first.

    Args:
        points: Shape (points, objectives), finite.
        directions: `minimize` or `maximize` for each objective.

    Sources: Deb et al. 2002, sections III.A and III.B. Of equal ones the earlier comes first.
    """
    maximise = [direction == "maximize" for direction in directions]
    ranks = moocore.pareto_rank(points, maximise=maximise)
    lonely = np.zeros(len(points))
    for rank in np.unique(ranks):
        members = np.flatnonzero(ranks == rank)
        lonely[members] = _crowding(points[members])
    return [int(index) for index in np.lexsort((np.arange(len(points)), -lonely, ranks))]


def _crowding(points: np.ndarray) -> np.ndarray:
    """How far the neighbours of each point lie apart, summed over the objectives; infinite at their ends."""
    distance = np.zeros(len(points))
    for values in points.T:
        order = np.argsort(values, kind="stable")
        span = values[order[-1]] - values[order[0]]
        distance[order[[0, -1]]] = np.inf
        if span > 0:
            distance[order[1:-1]] += (values[order[2:]] - values[order[:-2]]) / span
    return distance


def pareto(sweep: StoredSweep) -> list[dict[str, Any]]:
    """Completed trials of the front, best first objective first.

    Each row holds `trial`, `params`, the objectives (`objectives`) on the split that trials are chosen on
    (`split`) and the same metrics on the split report (`report`).
    """
    names = [objective["metric"] for objective in sweep.identity["objectives"]]
    directions = [objective["direction"] for objective in sweep.identity["objectives"]]
    found = sweep.query("SELECT * FROM points")
    points = np.column_stack([found[name].to_numpy() for name in names]).astype(float)
    whole = np.flatnonzero(np.isfinite(points).all(axis=1))
    kept = whole[front(points[whole], directions)]
    sign = -1 if directions[0] == "maximize" else 1
    # Rows are in the order of trials, and the sort is stable.
    rows = found.take(kept[np.argsort(sign * points[kept, 0], kind="stable")]).to_pylist()
    params = _params(sweep, [row["trial"] for row in rows])
    return [
        {
            "trial": row["trial"],
            "params": params[row["trial"]],
            "split": row["chosen_on"],
            "objectives": {name: row[name] for name in names},
            "report": {name: row[f"{name}_report"] for name in names},
        }
        for row in rows
    ]


def _params(sweep: StoredSweep, trials: Sequence[int]) -> dict[int, dict[str, Any]]:
    names = list(sweep.identity["parameters"])
    listed = ", ".join(map(str, trials)) or "NULL"
    rows = sweep.rows(f"SELECT * FROM trials WHERE trial IN ({listed})")
    return {row["trial"]: {name: row[name] for name in names} for row in rows}


def scored_trials(sweep: StoredSweep) -> list[dict[str, Any]]:
    """Completed trials with their parameters and metrics: `trial`, `params`, `split`, `chosen`, `report`.

    `chosen` are the metrics on the split that trials are chosen on, which `split` names.
    A trial that shares an earlier trial's result is that trial's point, not one more.
    """
    parameters = list(sweep.identity["parameters"])
    trials = sweep.rows(
        "SELECT * FROM trials WHERE state = 'completed' AND reused_from IS NULL ORDER BY trial"
    )
    measured: dict[int, dict[str, dict[str, float | None]]] = {row["trial"]: {} for row in trials}
    for row in sweep.rows("SELECT trial, split, name, value FROM metrics"):
        if row["trial"] in measured:
            measured[row["trial"]].setdefault(row["split"], {})[row["name"]] = row["value"]
    scored = []
    for trial in trials:
        splits = measured[trial["trial"]]
        split = choosing_split(splits)
        scored.append(
            {
                "trial": trial["trial"],
                "params": {name: trial[name] for name in parameters},
                "split": split,
                "chosen": splits.get(split, {}),
                "report": splits.get("report", {}),
            }
        )
    return scored

"""The non-dominated trials of a sweep."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from jobs.spec import choosing_split
from storage.front import front
from storage.parquet import numbers
from storage.query import StoredSweep
from storage.views import identifier


class Points(NamedTuple):
    """What the completed trials have reached, T trials and O objectives.

    Attributes:
        names: Metrics of the objectives.
        directions: `minimize` or `maximize` for each.
        trials_T: Their numbers, in any order.
        values_TO: On the split that they are chosen on, float64, NaN where an objective is not defined.
        report_TO: The same on the split report.
        splits_T: The split that each is chosen on, as Arrow has it: a million Python texts take long.
    """

    names: list[str]
    directions: list[str]
    trials_T: np.ndarray
    values_TO: np.ndarray
    report_TO: np.ndarray
    splits_T: pa.ChunkedArray

    @property
    def whole(self) -> np.ndarray:
        """Indices of the trials that have all objectives."""
        return np.flatnonzero(np.isfinite(self.values_TO).all(axis=1))


def read_points(sweep: StoredSweep) -> Points:
    """The view `points` as arrays."""
    names = [objective["metric"] for objective in sweep.identity["objectives"]]
    values = ", ".join(
        f"coalesce({identifier(name + tail)}, 'nan') AS {identifier(name + tail)}"
        for name in names
        for tail in ("", "_report")
    )
    found = sweep.query(f"SELECT trial, chosen_on, {values} FROM points ORDER BY trial")

    def columns(tail: str) -> np.ndarray:
        return np.column_stack([numbers(found[name + tail]) for name in names])

    return Points(
        names,
        [objective["direction"] for objective in sweep.identity["objectives"]],
        numbers(found["trial"]),
        columns(""),
        columns("_report"),
        found["chosen_on"],
    )


def pareto(sweep: StoredSweep) -> list[dict[str, Any]]:
    """Completed trials of the front, best first objective first, as `described` has them."""
    with sweep.moment() as now:
        points = read_points(now)
        return described(now, points, front_of(points))


def front_of(points: Points) -> np.ndarray:
    """Indices of the points on the front, best first objective first."""
    kept = points.whole[front(points.values_TO[points.whole], points.directions)]
    sign = -1 if points.directions[0] == "maximize" else 1
    order: np.ndarray = kept[np.lexsort((points.trials_T[kept], sign * points.values_TO[kept, 0]))]
    return order


def described(sweep: StoredSweep, points: Points, places: np.ndarray) -> list[dict[str, Any]]:
    """Some of the points as rows.

    Each holds `trial`, `params`, the objectives (`objectives`) on the split that trials are chosen on
    (`split`) and the same metrics on the split report (`report`), None where not defined.
    """
    trials = points.trials_T[places].tolist()
    params = _params(sweep, trials)
    return [
        {
            "trial": trial,
            "params": params[trial],
            "split": points.splits_T[place].as_py(),
            "objectives": _named(points.names, points.values_TO[place]),
            "report": _named(points.names, points.report_TO[place]),
        }
        for trial, place in zip(trials, places.tolist(), strict=True)
    ]


def _named(names: Sequence[str], values_O: np.ndarray) -> dict[str, float | None]:
    return {
        name: value if np.isfinite(value) else None
        for name, value in zip(names, values_O.tolist(), strict=True)
    }


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

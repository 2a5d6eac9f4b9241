"""How sure a Pareto front is: objectives drawn again as other prompts would have given them.

T trials, N items, O objectives, R draws.
"""

from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np

from storage.front import best_first, front, knee
from storage.pareto import Points, described, front_of, read_points
from storage.query import StoredSweep
from storage.views import listed, quoted

DRAWS = 1000
MOST_TRIALS = 500
"""So many of the best trials, by Pareto rank, are drawn again: others hardly reach the front."""
_LEAST_PROBABILITY = 0.1
_LEVEL = (0.025, 0.975)
_WIDTH = 2 * 1.959964  # standard errors between the ends of an interval of 95 %


def doubted_front(sweep: StoredSweep, *, draws: int = DRAWS, seed: int = 0) -> dict[str, Any]:
    """The Pareto front, and what is known of how sure it is.

    An objective whose items carry its own name and average to it is drawn again by a bootstrap over the
    items, the same ones for all trials and objectives. One that has the ends of an interval, as set metrics
    such as diversity do, is drawn from a normal distribution of that width. Anything else stays as it is.

    Args:
        sweep: An opened sweep.
        draws: How many.
        seed: Of the draws.

    Returns:
        pareto: the points of the front, as `storage.pareto.described` has them, each with `probability`, the
        share of the draws in which no other trial dominates it, `intervals`, the ends of each objective's
        interval of 95 %: those that its job has measured, or else of the draws (None where nothing says how
        sure it is), and `is_knee`; near: those of other trials
        that are on the front in at least a tenth of the draws, likeliest first; optimism: for each objective,
        how much better than it is the best trial looks because it was chosen, in the metric's unit: by the
        best of each draw; None where nothing says how sure the objective is.
    """
    points = read_points(sweep)
    on_front = front_of(points)
    places = _best(points, len(on_front))
    drawn_RTO = _draws(sweep, points, places, draws, np.random.default_rng(seed))
    on_RT = np.array([front(values_TO, points.directions) for values_TO in drawn_RTO])
    shares = dict(zip(places.tolist(), on_RT.mean(axis=0).tolist(), strict=True))
    column = {place: index for index, place in enumerate(places.tolist())}
    near = sorted((set(shares) - set(on_front.tolist())), key=lambda place: -shares[place])
    near = [place for place in near if shares[place] >= _LEAST_PROBABILITY]
    best = knee(points.values_TO[on_front], points.directions)
    stored = _stored_intervals(sweep, points, places)

    def rows(chosen: Sequence[int]) -> list[dict[str, Any]]:
        return [
            {
                **row,
                "probability": shares[place],
                "intervals": _intervals(points.names, drawn_RTO[:, column[place]])
                | stored.get(row["trial"], {}),
                "is_knee": best is not None and place == on_front[best],
            }
            for place, row in zip(chosen, described(sweep, points, np.array(chosen, dtype=int)), strict=True)
        ]

    return {
        "pareto": rows(on_front.tolist()),
        "near": rows(near),
        "optimism": _optimism(points, places, drawn_RTO),
    }


def _best(points: Points, least: int) -> np.ndarray:
    """Indices of the best points by Pareto rank: so many at least, since the whole front is among them."""
    order = best_first(points.values_TO[points.whole], points.directions)
    best: np.ndarray = points.whole[order[: max(MOST_TRIALS, least)]]
    return best


def _optimism(points: Points, places: np.ndarray, drawn_RTO: np.ndarray) -> dict[str, float | None]:
    """How much too good the best of a draw looks there, on average over the draws."""
    found: dict[str, float | None] = {}
    for column, (name, direction) in enumerate(zip(points.names, points.directions, strict=True)):
        sign = 1.0 if direction == "maximize" else -1.0
        drawn_RT, values_T = sign * drawn_RTO[:, :, column], sign * points.values_TO[places, column]
        if drawn_RT.size == 0 or (drawn_RT == values_T).all():
            found[name] = None
            continue
        best_R = drawn_RT.argmax(axis=1)
        found[name] = float((drawn_RT[np.arange(len(best_R)), best_R] - values_T[best_R]).mean())
    return found


def _intervals(names: Sequence[str], drawn_RO: np.ndarray) -> dict[str, tuple[float, float] | None]:
    ends = zip(*np.quantile(drawn_RO, _LEVEL, axis=0).tolist(), strict=True)
    return {name: (low, high) if high > low else None for name, (low, high) in zip(names, ends, strict=True)}


def _stored_intervals(
    sweep: StoredSweep, points: Points, places: np.ndarray
) -> dict[int, dict[str, tuple[float, float]]]:
    """Trial -> objective -> the ends of an interval that its job has measured: those are the ones to show."""
    found: dict[int, dict[str, tuple[float, float]]] = {}
    split = points.splits_T[int(places[0])].as_py() if len(places) else "select"
    for name in points.names:
        for row in _ends(sweep, name, split, points.trials_T[places].tolist()):
            found.setdefault(row["trial"], {})[name] = (row["low"], row["high"])
    return found


def _ends(sweep: StoredSweep, name: str, split: str, trials: Sequence[int]) -> list[dict[str, Any]]:
    """Trials whose metric has both ends of an interval: `trial`, `low`, `high`."""
    return sweep.rows(
        f"SELECT trial, min(value) AS low, max(value) AS high FROM metrics "
        f"WHERE name IN ({quoted(name + '_low')}, {quoted(name + '_high')}) AND split = '{split}' "
        f"AND trial IN ({listed(trials)}) GROUP BY trial HAVING count(value) = 2"
    )


def _draws(
    sweep: StoredSweep, points: Points, places: np.ndarray, draws: int, random: np.random.Generator
) -> np.ndarray:
    """The objectives of some points, drawn again, shape (R, T, O)."""
    trials = points.trials_T[places].tolist()
    split = points.splits_T[int(places[0])].as_py() if len(places) else "select"
    times = cache(lambda items: _times(items, draws, random))
    drawn = []
    for column, name in enumerate(points.names):
        values_T = points.values_TO[places, column]
        items_TN = _items(sweep, name, split, trials)
        if _average_to(items_TN, values_T):
            drawn.append(_resampled(items_TN, times(items_TN.shape[1])))
        else:
            errors_T = _errors(sweep, name, split, trials)
            drawn.append(values_T + errors_T * random.standard_normal((draws, len(trials))))
    return np.stack(drawn, axis=2)


def _average_to(items_TN: np.ndarray, values_T: np.ndarray) -> bool:
    """Whether every trial has items, and they average to its value."""
    known_TN = np.isfinite(items_TN)
    if items_TN.shape[1] < 2 or not known_TN.any(axis=1).all():
        return False
    return bool(np.allclose(np.nanmean(items_TN, axis=1), values_T, rtol=1e-5, atol=1e-8))


def _times(items: int, draws: int, random: np.random.Generator) -> np.ndarray:
    """How often each item comes up in each draw with replacement, shape (R, N)."""
    return random.multinomial(items, np.full(items, 1 / items), size=draws).astype(float)


def _resampled(items_TN: np.ndarray, times_RN: np.ndarray) -> np.ndarray:
    """Means of the items of each draw, shape (R, T); the plain mean where a draw has none of a trial's."""
    known_TN = np.isfinite(items_TN)
    totals_RT = times_RN @ np.where(known_TN, items_TN, 0.0).T
    counts_RT = times_RN @ known_TN.T.astype(float)
    plain_T = np.nanmean(items_TN, axis=1)
    means_RT: np.ndarray = np.where(counts_RT > 0, totals_RT / np.maximum(counts_RT, 1), plain_T)
    return means_RT


def _items(sweep: StoredSweep, name: str, split: str, trials: Sequence[int]) -> np.ndarray:
    """Values of the items that carry an objective's name, shape (T, N), NaN where a trial has none."""
    rows = sweep.rows(
        f"SELECT trial, item, value FROM items WHERE name = {quoted(name)} AND split = '{split}' "
        f"AND trial IN ({listed(trials)}) AND value IS NOT NULL"
    )
    places = {trial: place for place, trial in enumerate(trials)}
    columns = {item: column for column, item in enumerate(sorted({row["item"] for row in rows}))}
    items_TN = np.full((len(trials), len(columns)), np.nan)
    for row in rows:
        items_TN[places[row["trial"]], columns[row["item"]]] = row["value"]
    return items_TN


def _errors(sweep: StoredSweep, name: str, split: str, trials: Sequence[int]) -> np.ndarray:
    """Standard errors by the stored intervals, shape (T,), 0 where there is none."""
    widths = {row["trial"]: row["high"] - row["low"] for row in _ends(sweep, name, split, trials)}
    return np.array([widths.get(trial, 0.0) for trial in trials]) / _WIDTH

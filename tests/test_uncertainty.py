"""Probabilities of belonging to a front, against plain loops and cases whose answer is known."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from storage.front import knee
from storage.query import StoredSweep
from storage.store import Store
from storage.uncertainty import doubted_front
from tests.fakes import StoredTrial, write_sweep

BOTH = {"gain": "maximize", "cost": "minimize"}


def stored(
    folder: Path, items: Mapping[str, Sequence[Sequence[float]]], objectives: Mapping[str, str] = BOTH
) -> StoredSweep:
    """A sweep whose metrics are the means of items: metric -> trial -> values."""
    number = len(next(iter(items.values())))
    metrics = [
        {name: float(np.mean(values[trial])) for name, values in items.items()} for trial in range(number)
    ]
    trials = [StoredTrial({}, {"select": each, "report": each}) for each in metrics]
    sweep = write_sweep(folder, trials, objectives=objectives)
    rows = [
        {"spec": f"spec{trial}", "split": "select", "item": item, "name": name, "value": value}
        for name, values in items.items()
        for trial, of_trial in enumerate(values)
        for item, value in enumerate(of_trial)
    ]
    Store(folder).commit([], items=rows)
    return sweep


def likely(sweep: StoredSweep, **options: Any) -> dict[int, dict[str, Any]]:
    """Trial -> its row, on the front or near it."""
    found = doubted_front(sweep, **options)
    return {row["trial"]: row for row in (*found["pareto"], *found["near"])}


def probability(sweep: StoredSweep, trials: int, **options: Any) -> list[float]:
    found = likely(sweep, **options)
    return [found[trial]["probability"] if trial in found else 0.0 for trial in range(trials)]


def by_loops(gain_TN: np.ndarray, cost_TN: np.ndarray, draws: int) -> list[float]:
    random = np.random.default_rng(1)
    trials, items = gain_TN.shape
    times = np.zeros(trials)
    for _ in range(draws):
        chosen = random.integers(items, size=items)
        gain, cost = gain_TN[:, chosen].mean(axis=1), cost_TN[:, chosen].mean(axis=1)
        for one in range(trials):
            beaten = any(
                gain[other] >= gain[one]
                and cost[other] <= cost[one]
                and (gain[other], cost[other]) != (gain[one], cost[one])
                for other in range(trials)
            )
            times[one] += not beaten
    return (times / draws).tolist()


def test_probabilities_are_those_of_a_plain_bootstrap_over_the_same_items(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    random = np.random.default_rng(0)
    gain = random.normal(size=(6, 20)) + np.array([[0.0, 0.1, 0.3, 0.5, 0.2, -0.5]]).T
    cost = random.normal(size=(6, 20)) + np.array([[0.0, 0.1, 0.2, 0.4, 0.5, 0.5]]).T
    cost += 0.9 * gain  # an easy prompt is easy for both
    sweep = stored(tmp_path, {"gain": gain.tolist(), "cost": cost.tolist()})
    monkeypatch.setattr("storage.uncertainty._LEAST_PROBABILITY", 0.0)
    expected = by_loops(gain, cost, 4000)
    assert probability(sweep, 6, draws=4000) == pytest.approx(expected, abs=0.04)
    assert any(0.1 < each < 0.9 for each in expected)


def test_intervals_of_means_are_those_of_the_standard_error(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    gain = random.normal(size=(3, 400))
    sweep = stored(tmp_path, {"gain": gain.tolist()}, {"gain": "maximize"})
    for trial, row in likely(sweep, draws=4000).items():
        values = gain[trial]
        half = 1.96 * values.std() / 20
        assert row["intervals"]["gain"] == pytest.approx(
            (values.mean() - half, values.mean() + half), abs=0.15 * half
        )


def test_without_anything_that_says_how_sure_it_is_the_front_is_certain(tmp_path: Path) -> None:
    trials = [
        StoredTrial({}, {"select": {"gain": gain, "cost": cost}}) for gain, cost in ((1, 1), (2, 2), (1, 2))
    ]
    sweep = write_sweep(tmp_path, trials, objectives=BOTH)
    assert probability(sweep, 3) == [1.0, 1.0, 0.0]
    assert all(row["intervals"] == {"gain": None, "cost": None} for row in likely(sweep).values())


def test_items_that_do_not_average_to_the_metric_are_left_aside(tmp_path: Path) -> None:
    trials = [StoredTrial({}, {"select": {"gain": 5.0}}), StoredTrial({}, {"select": {"gain": 4.0}})]
    sweep = write_sweep(tmp_path, trials, objectives={"gain": "maximize"})
    rows = [
        {"spec": f"spec{trial}", "split": "select", "item": item, "name": "gain", "value": 1.0 * item}
        for trial in range(2)
        for item in range(9)
    ]
    Store(tmp_path).commit([], items=rows)
    assert probability(sweep, 2) == [1.0, 0.0]


def test_a_metric_with_an_interval_is_drawn_from_its_width(tmp_path: Path) -> None:
    ends = {"gain_low": -1.96, "gain_high": 1.96}
    trials = [
        StoredTrial({}, {"select": {"gain": 0.0, **ends}}),
        StoredTrial({}, {"select": {"gain": 1.0, "gain_low": -0.96, "gain_high": 2.96}}),
    ]
    sweep = write_sweep(tmp_path, trials, objectives={"gain": "maximize"})
    found = likely(sweep, draws=20_000)
    # P(N(0, 1) > N(1, 1)) = P(N(0, 1) > 1 / sqrt(2))
    assert found[0]["probability"] == pytest.approx(0.2398, abs=0.01)
    assert found[1]["intervals"]["gain"] == (-0.96, 2.96), "what the job has measured is shown as it is"


def test_nothing_that_has_completed_is_no_front(tmp_path: Path) -> None:
    trials = [StoredTrial({}, {"select": {"gain": None}}, state="infeasible")]
    found = doubted_front(write_sweep(tmp_path, trials, objectives={"gain": "maximize"}))
    assert found == {"pareto": [], "near": [], "optimism": {"gain": None}}


def test_optimism_is_what_the_best_of_many_equals_gains_by_chance(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    loss = random.normal(size=(200, 25))
    loss -= loss.mean(axis=1, keepdims=True)  # all are worth the same
    sweep = stored(tmp_path, {"loss": loss.tolist()}, {"loss": "minimize"})
    # The largest of 200 standard normal values is 2.75 on average.
    assert doubted_front(sweep)["optimism"]["loss"] == pytest.approx(2.75 / 5, rel=0.1)


@pytest.mark.parametrize("seed", range(20))
def test_the_knee_is_the_point_farthest_from_the_line_between_the_ends(seed: int) -> None:
    random = np.random.default_rng(seed)
    x = np.sort(random.uniform(0, 10, 12))
    y = 100 * np.exp(-x) + random.uniform(0, 0.01)
    points = np.column_stack([x, -y])
    start, end = np.array([0.0, 1.0]), np.array([1.0, 0.0])
    scaled = np.column_stack([(x - x[0]) / np.ptp(x), (y - y[-1]) / np.ptp(y)])
    line = (end - start) / np.linalg.norm(end - start)
    away = [abs(line[0] * (each - start)[1] - line[1] * (each - start)[0]) for each in scaled]
    assert knee(points, ("minimize", "maximize")) == int(np.argmax(away))


def test_a_straight_or_tiny_front_has_no_knee() -> None:
    assert knee(np.array([[0.0, 1.0], [1.0, 0.0]]), ("minimize", "minimize")) is None
    assert knee(np.array([[0.0, 1.0], [0.5, 0.5], [1.0, 0.0]]), ("minimize", "minimize")) is None
    assert knee(np.array([[1.0], [1.0], [1.0]]), ("minimize",)) is None

"""The front of non-dominated trials, against counting dominated ones pair by pair."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from storage.front import front
from storage.pareto import pareto
from tests.fakes import StoredTrial, write_sweep

DIRECTIONS = st.lists(st.sampled_from(["minimize", "maximize"]), min_size=1, max_size=4)


def dominates(one: Sequence[float], other: Sequence[float], directions: Sequence[str]) -> bool:
    """Whether `one` is nowhere worse than `other` and somewhere better."""
    gains = [
        (b - a) if direction == "minimize" else (a - b)
        for a, b, direction in zip(one, other, directions, strict=True)
    ]
    return all(gain >= 0 for gain in gains) and any(gain > 0 for gain in gains)


def brute_force(points: Sequence[Sequence[float]], directions: Sequence[str]) -> list[bool]:
    return [not any(dominates(other, point, directions) for other in points) for point in points]


@st.composite
def clouds(draw: st.DrawFn) -> tuple[list[list[float]], list[str]]:
    """Points with many ties and their directions; a coarse grid makes equal and dominated ones common."""
    directions = draw(DIRECTIONS)
    value = draw(st.sampled_from([st.integers(-2, 2), st.floats(-1e12, 1e12)]))
    points = draw(st.lists(st.lists(value, min_size=len(directions), max_size=len(directions)), max_size=12))
    return [[float(coordinate) for coordinate in point] for point in points], directions


@settings(max_examples=300)
@given(cloud=clouds())
def test_the_front_is_what_no_other_point_dominates(cloud: tuple[list[list[float]], list[str]]) -> None:
    points, directions = cloud
    mask = front(np.array(points).reshape(len(points), len(directions)), directions)
    assert mask.dtype == np.bool_
    assert mask.tolist() == brute_force(points, directions)


@given(cloud=clouds(), order=st.randoms(use_true_random=False))
def test_the_front_depends_neither_on_order_nor_on_the_sign_of_a_mirrored_objective(
    cloud: tuple[list[list[float]], list[str]], order: Any
) -> None:
    points, directions = cloud
    array = np.array(points).reshape(len(points), len(directions))
    mask = front(array, directions)
    shuffled = order.sample(range(len(points)), len(points))
    assert front(array[shuffled], directions).tolist() == mask[shuffled].tolist()
    mirror = {"minimize": "maximize", "maximize": "minimize"}
    assert front(-array, [mirror[direction] for direction in directions]).tolist() == mask.tolist()


@settings(max_examples=15)
@given(cloud=clouds())
def test_the_front_of_stored_trials_is_that_of_their_values(
    tmp_path_factory: pytest.TempPathFactory, cloud: tuple[list[list[float]], list[str]]
) -> None:
    points, directions = cloud
    names = [f"metric {index}" for index in range(len(directions))]
    trials = [
        StoredTrial({"x": number}, {"select": dict(zip(names, point, strict=True))})
        for number, point in enumerate(points)
    ]
    sweep = write_sweep(
        tmp_path_factory.mktemp("sweep"),
        trials,
        objectives=dict(zip(names, directions, strict=True)),
        parameters={"x": "BIGINT"},
    )
    found = pareto(sweep)
    wanted = [number for number, kept in enumerate(brute_force(points, directions)) if kept]
    assert sorted(row["trial"] for row in found) == wanted
    for row in found:
        assert [row["objectives"][name] for name in names] == points[row["trial"]]
        assert row["params"] == {"x": row["trial"]}
    sign = -1 if directions[0] == "maximize" else 1
    keys = [(sign * row["objectives"][names[0]], row["trial"]) for row in found]
    assert keys == sorted(keys), "the best first objective comes first"


def test_trials_without_every_objective_or_that_have_not_completed_are_left_out(tmp_path: Path) -> None:
    whole = {"gain": 1.0, "harm": 1.0}
    better = {"gain": 9.0, "harm": 0.0}
    sweep = write_sweep(
        tmp_path,
        [
            StoredTrial({}, {"select": {"gain": 9.0}}),
            StoredTrial({}, {"select": {**better, "harm": None}}),
            StoredTrial({}, {"select": {**better, "harm": float("nan")}}),
            StoredTrial({}, {"select": {**better, "harm": float("-inf")}}),
            StoredTrial({}, {"report": better, "extract": better}),
            StoredTrial({}, {"select": better}, state="infeasible"),
            StoredTrial({}, {"select": better}, state="failed"),
            StoredTrial({}, {"select": whole}),
        ],
        objectives={"gain": "maximize", "harm": "minimize"},
    )
    assert [row["trial"] for row in pareto(sweep)] == [7]


def test_equal_points_of_different_trials_are_all_kept_but_a_reused_result_is_one_point(
    tmp_path: Path,
) -> None:
    sweep = write_sweep(
        tmp_path,
        [
            StoredTrial({"x": 1}, {"select": {"gain": 1.0}}),
            StoredTrial({"x": 2}, {"select": {"gain": 1.0}}, spec="shared"),
            StoredTrial({"x": 3}, {}, spec="shared"),
            StoredTrial({"x": 4}, {"select": {"gain": 0.5}}),
        ],
        objectives={"gain": "maximize"},
        parameters={"x": "BIGINT"},
    )
    assert [(row["trial"], row["params"]) for row in pareto(sweep)] == [(0, {"x": 1}), (1, {"x": 2})]


def test_the_report_split_stands_beside_the_select_split_and_does_not_choose(tmp_path: Path) -> None:
    sweep = write_sweep(
        tmp_path,
        [
            StoredTrial({}, {"select": {"gain": 2.0, "other": 5.0}, "report": {"gain": -7.0}}),
            StoredTrial({}, {"select": {"gain": 1.0, "other": 6.0}, "report": {"gain": 99.0}}),
        ],
        objectives={"gain": "maximize"},
    )
    assert pareto(sweep) == [
        {"trial": 0, "params": {}, "split": "select", "objectives": {"gain": 2.0}, "report": {"gain": -7.0}}
    ]


def test_a_job_that_only_extracts_is_chosen_on_the_split_extract(tmp_path: Path) -> None:
    trials = [
        StoredTrial({}, {"extract": {"gain": 2.0}}),
        StoredTrial({}, {"extract": {"gain": 3.0}}),
        StoredTrial({}, {"extract": {"gain": 9.0}, "report": {"gain": 9.0}}),
        StoredTrial({}, {"extract": {"gain": 9.0}, "select": {"other": 9.0}}),
    ]
    sweep = write_sweep(tmp_path, trials, objectives={"gain": "maximize"})
    assert pareto(sweep) == [
        {"trial": 1, "params": {}, "split": "extract", "objectives": {"gain": 3.0}, "report": {"gain": None}}
    ]


def test_a_report_value_that_is_not_defined_is_none(tmp_path: Path) -> None:
    trials = [
        StoredTrial({}, {"select": {"gain": 1.0}}),
        StoredTrial({}, {"select": {"gain": 1.0}, "report": {"gain": None}}),
    ]
    sweep = write_sweep(tmp_path, trials, objectives={"gain": "minimize"})
    assert [row["report"] for row in pareto(sweep)] == [{"gain": None}, {"gain": None}]


def test_a_sweep_without_completed_trials_has_an_empty_front(tmp_path: Path) -> None:
    objectives = {"gain": "maximize", "harm": "minimize"}
    assert pareto(write_sweep(tmp_path / "none", [], objectives=objectives)) == []
    failed = [StoredTrial({}, {}, state="failed")]
    assert pareto(write_sweep(tmp_path / "failed", failed, objectives=objectives)) == []

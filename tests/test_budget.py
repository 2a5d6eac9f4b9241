"""When a sweep stops because it has cost enough, by a clock of the test's own."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from optuna._hypervolume import compute_hypervolume

from jobs.errors import SpecError
from orchestrator.budget import Budget, busy_seconds
from orchestrator.config import RunConfig, make_config
from orchestrator.progress import Tally
from search_spaces.base import Grid, Objective
from storage.front import hypervolume
from storage.store import Store
from tests import sweeps
from tests.sweeps import drive, make_space, prepare, trials_of

OBJECTIVES = [Objective(metric="a", direction="maximize"), Objective(metric="b", direction="minimize")]


class Clock:
    """Stands still until it is moved."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def budget(**limits: Any) -> tuple[Budget, Clock]:
    clock = Clock()
    return Budget(RunConfig(**limits), OBJECTIVES, clock=clock), clock


def test_without_limits_a_sweep_may_go_on_for_ever() -> None:
    found, clock = budget()
    clock.now += 1e9
    found.spend(1e9)
    assert found.spent() is None


def test_hours_count_from_the_beginning_of_the_run() -> None:
    found, clock = budget(budget_hours=2)
    clock.now += 7199
    assert found.spent() is None
    clock.now += 1
    assert found.spent() == "2 hours are over (budget_hours)"


@pytest.mark.parametrize(("gpus", "seconds"), [(0, 3600), (1, 3600), (4, 900), (0.5, 3600)])
def test_device_hours_count_every_device_and_earlier_runs(gpus: float, seconds: float) -> None:
    config = RunConfig(budget_device_hours=3, gpus_per_worker=gpus)
    found = Budget(config, OBJECTIVES, spent_seconds=seconds)
    found.spend(seconds)
    assert found.spent() is None
    found.spend(seconds)
    assert found.spent() == "3 device hours are spent (budget_device_hours)"


def feed(found: Budget, values: list[tuple[float, float]], *, hours: float) -> None:
    for each in values:
        found.spend(3600 * hours / len(values))
        found.observe(each)


def test_a_front_that_grows_goes_on_and_one_that_does_not_stops() -> None:
    growing = [(float(number), float(number % 7)) for number in range(200)]
    found, clock = budget(least_gain=0.05)
    feed(found, growing, hours=2)
    clock.now += 60
    assert found.spent() is None
    feed(found, [(50.0, 3.0)] * 200, hours=2)
    assert found.spent() is None, "it looks now and then only"
    clock.now += 60
    assert str(found.spent()).endswith("a device hour (least_gain)")


def test_too_few_trials_say_nothing() -> None:
    found, clock = budget(least_gain=10)
    feed(found, [(1.0, 1.0)] * 60, hours=1)
    clock.now += 60
    assert found.gain() is None


def test_the_gain_is_that_of_its_definition() -> None:
    generator = np.random.default_rng(0)
    values = [tuple(map(float, row)) for row in generator.normal(size=(100, 2))]
    found, _ = budget(least_gain=0.01)
    feed(found, values, hours=4)
    points = np.array(values) * [-1, 1]
    scaled = (points - points.min(axis=0)) / np.ptp(points, axis=0)
    # The last of four hours: what had completed when it began, against all.
    now = compute_hypervolume(scaled, np.ones(2))
    then = compute_hypervolume(scaled[:74], np.ones(2))
    assert found.gain() == pytest.approx((now - then) / now / 1.0)


@given(
    points=st.lists(st.tuples(st.integers(-9, 9), st.integers(-9, 9)), min_size=2, max_size=12),
    kept=st.integers(1, 12),
)
def test_hypervolumes_are_those_of_another_package(points: list[tuple[int, int]], kept: int) -> None:
    among = np.array(points, dtype=float)
    flipped = among * [-1, 1]
    span = np.where(np.ptp(flipped, axis=0) > 0, np.ptp(flipped, axis=0), 1.0)
    scaled = (flipped - flipped.min(axis=0)) / span
    expected = compute_hypervolume(scaled[:kept], np.ones(2))
    assert hypervolume(among[:kept], ["maximize", "minimize"], among=among) == pytest.approx(expected)


def test_a_pack_is_busy_once_however_many_rows_it_has() -> None:
    rows = [
        {"attempt": "a", "started": 10.0, "finished": 12.0},
        {"attempt": "a", "started": 10.0, "finished": 15.0},
        {"attempt": "b", "started": 11.0, "finished": 12.0},
    ]
    assert busy_seconds(rows) == 6.0


def test_disk_may_be_taken_up_to_its_budget() -> None:
    config = RunConfig(budget_disk_gib=0.5)
    found = Budget(config, [], clock=Clock())
    assert found.spent(2**29 - 1) is None
    assert found.spent(2**29) == "0.5 GiB of disk are taken (budget_disk_gib)"


def test_a_sweep_stops_where_its_files_take_as_much_as_they_may(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    space = make_space({"x": Grid(list(range(1, 21)))})

    def driven(limit: int) -> Tally:
        with monkeypatch.context() as limited:
            limits = {"budget_disk_gib": limit / 2**30}
            limited.setattr(sweeps, "prepare", lambda *a, **k: prepare(*a, **k).model_copy(update=limits))
            return drive(tmp_path, space, trials=20, workers=1, max_pack=2).tally

    first = driven(60_000)
    assert 0 < first.done < 20
    assert "budget_disk_gib" in first.stopping
    files = sum(file.bytes for file in Store(tmp_path).files())
    assert 60_000 <= files < 80_000
    again = driven(60_000)
    assert again.done == first.done, "it is spent before anything runs"
    assert "budget_disk_gib" in again.stopping
    assert driven(2**30).done == 20


def test_a_sweep_whose_budget_is_spent_sees_what_runs_to_its_end_and_goes_on_with_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    space = make_space({"x": Grid(list(range(1, 41)))})
    with monkeypatch.context() as spent:
        spent.setattr(Budget, "spent", lambda self, kept_bytes: "enough" if self._seen else None)
        driven = drive(tmp_path, space, trials=40)
        assert driven.tally.stopping == "enough"
        ended = len(trials_of(tmp_path))
        assert 0 < ended < 40
        assert driven.pool.draining
    assert drive(tmp_path, space, trials=40).tally.done == 40


@pytest.mark.parametrize("value", [0, -1, math.inf, math.nan])
def test_a_budget_that_makes_no_sense_is_refused(value: float) -> None:
    with pytest.raises(SpecError, match="budget_hours"):
        make_config(budget_hours=value)

"""Spaces that vary the model: who loads what, how often, and what is refused."""

from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from jobs.errors import ModelError, SpecError
from jobs.spec import ModelRef
from orchestrator.config import RunConfig
from orchestrator.models import Models, job_values, varied_models
from search_spaces.base import Float, Grid, Space
from storage.query import open_sweep
from tests.fakes import InlinePool
from tests.sweeps import drive, make_space, trials_of

XS = {"x": Grid([1, 2, 3, 4, 5, 6])}


def space(models: list[str], **changes: Any) -> Space:
    return make_space({"model": Grid(models), **XS}, **changes)


class CountingPool(InlinePool):
    """Notes which model each worker loads, and when a load has to fail."""

    def __init__(self, folder: Path, *, broken: str = "", **options: Any) -> None:
        self.loads: list[str] = []

        def load(ref: ModelRef, **_: Any) -> None:
            self.loads.append(ref.id)
            if ref.id == broken:
                raise ModelError(f"model {ref.id!r} is not there")

        super().__init__(folder, load=load, **options)


def test_packs_go_to_workers_that_hold_the_model_and_loads_are_counted(tmp_path: Path) -> None:
    pool = CountingPool(tmp_path, workers=2, seed=1)
    wanted = space(["m1", "m2"])
    drive(tmp_path, wanted, trials=12, max_pack=2, pool=pool)
    assert Counter(row["state"] for row in trials_of(tmp_path)) == {"completed": 12}
    asked = [load for load in pool.loads if load != "no-model"]
    assert set(asked) == {"m1", "m2"}
    assert len(asked) <= 4, "workers change their model only when there is nothing for the one they hold"
    counted = open_sweep(tmp_path).rows(
        "SELECT count(DISTINCT attempt) AS loads FROM attempts WHERE loaded = 1"
    )
    assert counted == [{"loads": len(asked)}]
    packs = [{order.model.id for _ in order.rows} for order in pool.orders]
    assert all(len(models) == 1 for models in packs)


def test_rows_of_a_pack_run_on_one_model(tmp_path: Path) -> None:
    driven = drive(tmp_path, space(["m1", "m2"], sampler="random", trials=24), trials=24, max_pack=4)
    by_spec = {row["spec"]: row["model"] for row in trials_of(tmp_path)}
    for order in driven.pool.orders:
        assert {by_spec[row.spec] for row in order.rows} == {order.model.id}


def test_equal_parameters_on_two_models_are_two_results(tmp_path: Path) -> None:
    drive(tmp_path, space(["m1", "m2"]), trials=12)
    assert len({row["spec"] for row in trials_of(tmp_path)}) == 12
    [row] = open_sweep(tmp_path).rows("SELECT count(*) AS trials FROM trials WHERE model = 'm1'")
    assert row["trials"] == 6


def test_a_model_that_is_not_there_fails_its_own_trials(tmp_path: Path) -> None:
    pool = CountingPool(tmp_path, broken="m2", workers=2)
    drive(tmp_path, space(["m1", "m2"]), trials=12, pool=pool)
    states = {(row["model"], row["state"], row["reason"]) for row in trials_of(tmp_path)}
    assert states == {("m1", "completed", None), ("m2", "failed", "model 'm2' is not there")}


def test_types_and_tunings_can_be_varied_too() -> None:
    wanted = make_space({"dtype": Grid(["float32", "bfloat16"]), **XS}, fixed={"model": "m1"})
    assert varied_models(wanted, RunConfig(model="other")) == [
        ModelRef(id="m1", dtype="float32"),
        ModelRef(id="m1", dtype="bfloat16"),
    ]
    assert job_values({"x": 1, "dtype": "float32", "model": "m1", "tuned": ""}) == {"x": 1}
    assert varied_models(make_space(XS), RunConfig(model="m1@abc")) == [ModelRef(id="m1", revision="abc")]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"dtype": "float12"}, "dtype='float12'"),
        ({"tuned": "jobs.nothing"}, "no job 'jobs.nothing'"),
        ({"model": 3}, "are named by texts"),
    ],
)
def test_values_that_make_no_sense_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(SpecError, match=message):
        Models(RunConfig()).of(values)


def test_a_model_between_two_bounds_is_refused() -> None:
    with pytest.raises(SpecError, match=r"parameter dtype: list its values as Grid"):
        varied_models(make_space({"dtype": Float(low=0, high=1)}, sampler="random", trials=1), RunConfig())

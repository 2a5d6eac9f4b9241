"""Constraints on metrics, stages that cheaper trials have to pass, and sweeps on tuned weights."""

import math
from collections import Counter
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pytest
from hypothesis import given
from hypothesis import strategies as st
from optuna.study._multi_objective import _fast_non_domination_rank
from optuna.trial import TrialState

from jobs.engine import tuned as tuned_module
from jobs.errors import SpecError
from jobs.spec import ModelRef
from orchestrator.config import make_config
from orchestrator.pool import Order, OrderRow
from orchestrator.promotion import held_back
from orchestrator.space_file import check_space
from orchestrator.worker import Worker
from search_spaces.base import Constraint, Grid, Objective, Space, Stage
from storage.artifacts import write_artifact
from storage.front import best_first
from storage.pareto import pareto
from storage.query import open_sweep
from tests import fake_job, fake_source
from tests.fakes import MODEL, Stopped, load_nothing
from tests.sweeps import drive, make_space, study_of, trials_of

XS = Grid([1, 2, 3, 4, 5, 6])


def space(**changes: Any) -> Space:
    return make_space({"x": XS}, **changes)


@pytest.fixture(autouse=True)
def none_ran() -> None:
    fake_job.RAN.clear()
    fake_source.RAN.clear()


class TestConstraints:
    def test_a_trial_beyond_a_bound_is_infeasible_and_says_why(self, tmp_path: Path) -> None:
        bounds = [Constraint(metric="square", most=16), Constraint(metric="total", least=2)]
        drive(tmp_path, space(constraints=bounds), trials=6)
        found = {row["x"]: (row["state"], row["reason"]) for row in trials_of(tmp_path)}
        assert found[1] == ("infeasible", "total 1 is below 2")
        assert [found[x] for x in (2, 3, 4)] == [("completed", None)] * 3
        assert found[5] == ("infeasible", "square 25 is above 16")
        front = {trial["params"]["x"] for trial in pareto(open_sweep(tmp_path))}
        assert front == {2, 3, 4}

    def test_the_sampler_learns_objectives_and_infeasibility(self, tmp_path: Path) -> None:
        drive(tmp_path, space(constraints=[Constraint(metric="square", most=16)]), trials=6)
        backend = optuna.storages.journal.JournalFileBackend(str(tmp_path / "optuna.journal"))
        storage = optuna.storages.JournalStorage(backend)
        trials = optuna.load_study(study_name="study", storage=storage).trials
        by_x = {trial.params["x"]: trial for trial in trials}
        assert {trial.state for trial in trials} == {TrialState.COMPLETE}
        assert by_x[5].values == [5.0, 25.0]
        assert by_x[5].constraints
        assert not by_x[2].constraints

    def test_a_metric_that_is_not_defined_breaks_its_constraint(self, tmp_path: Path) -> None:
        objective = [Objective(metric="square", direction="minimize")]
        bound = [Constraint(metric="total", most=99)]
        drive(tmp_path, space(constraints=bound, objectives=objective, fixed={"mode": "nan"}), trials=6)
        assert {row["reason"] for row in trials_of(tmp_path)} == {"total is not defined"}

    @pytest.mark.parametrize("stop_at", [2, 5, 9])
    def test_a_driver_that_goes_on_judges_alike(self, tmp_path: Path, stop_at: int) -> None:
        wanted = space(constraints=[Constraint(metric="square", most=16)])
        with pytest.raises(Stopped):
            drive(tmp_path, wanted, trials=6, stop_at=stop_at)
        drive(tmp_path, wanted, trials=6)
        states = Counter(row["state"] for row in trials_of(tmp_path))
        assert states == {"completed": 4, "infeasible": 2}

    def test_a_bound_that_bounds_nothing_is_refused(self) -> None:
        with pytest.raises(ValueError, match="bounds nothing"):
            Constraint(metric="total")

    def test_a_constraint_on_no_metric_is_refused(self) -> None:
        with pytest.raises(SpecError, match=r"constraint 'totl' is no metric.*did you mean 'total'"):
            check_space(space(constraints=[Constraint(metric="totl", most=1)]), ModelRef(id="smollm2-135m"))


CHEAPER = {"y": 0.5}
SMALL_SQUARE = Stage(overrides=CHEAPER, constraints=[Constraint(metric="square", most=16)])


def gated(**changes: Any) -> Space:
    """The stage runs x as it is at y = 0.5 and lets those through whose square is at most 16."""
    return space(stages=[SMALL_SQUARE], **changes)


def ran() -> Counter[tuple[int, float]]:
    return Counter((params.x, params.y) for params in fake_job.RAN)


def states(folder: Path) -> Counter[str]:
    return Counter(row["state"] for row in trials_of(folder))


class TestStages:
    def test_only_what_keeps_the_constraints_of_a_stage_goes_on(self, tmp_path: Path) -> None:
        drive(tmp_path, gated(), trials=6)
        assert ran() == {**{(x, 0.5): 1 for x in range(1, 7)}, **{(x, 0.0): 1 for x in range(1, 5)}}
        rows = {row["x"]: row for row in trials_of(tmp_path)}
        assert [rows[x]["state"] for x in range(1, 7)] == ["completed"] * 4 + ["infeasible"] * 2
        assert rows[6]["reason"] == "stage 1 of 2: square 36 is above 16"

    @pytest.mark.parametrize("stop_at", range(2, 16, 3))
    def test_a_driver_that_goes_on_runs_no_stage_twice(self, tmp_path: Path, stop_at: int) -> None:
        with pytest.raises(Stopped):
            drive(tmp_path, gated(), trials=6, stop_at=stop_at)
        drive(tmp_path, gated(), trials=6)
        assert states(tmp_path) == {"completed": 4, "infeasible": 2}
        drive(tmp_path, gated(), trials=6)
        assert states(tmp_path) == {"completed": 4, "infeasible": 2}

    @pytest.mark.parametrize("when", ["before", "after"])
    def test_lost_workers_change_nothing(self, tmp_path: Path, when: Any) -> None:
        drive(tmp_path, gated(), trials=6, losses={1: when, 3: when, 6: when})
        assert states(tmp_path) == {"completed": 4, "infeasible": 2}

    @pytest.mark.parametrize(("mode", "state"), [("fail", "failed"), ("infeasible", "infeasible")])
    def test_a_stage_that_does_not_complete_ends_its_trial_alike(
        self, tmp_path: Path, mode: str, state: str
    ) -> None:
        bad = Stage(overrides={"mode": mode}, constraints=SMALL_SQUARE.constraints)
        drive(tmp_path, space(stages=[bad]), trials=6)
        assert {(row["state"], row["reason"]) for row in trials_of(tmp_path)} == {
            (state, f"stage 1 of 2: told to {'fail' if mode == 'fail' else 'be infeasible'}")
        }

    def test_a_stage_whose_prerequisite_fails_ends_its_trials(self, tmp_path: Path) -> None:
        wanted = gated(fixed={"source": 7, "source_mode": "fail"})
        drive(tmp_path, wanted, trials=6)
        assert states(tmp_path) == {"failed": 6}
        assert all("its prerequisite" in row["reason"] for row in trials_of(tmp_path))

    def test_what_is_its_own_stage_runs_once(self, tmp_path: Path) -> None:
        same = Stage(overrides={"y": 0.0}, constraints=SMALL_SQUARE.constraints)
        drive(tmp_path, space(stages=[same]), trials=6)
        assert set(ran().values()) == {1}
        assert states(tmp_path) == {"completed": 6}

    def test_prerequisites_of_all_stages_are_computed_once(self, tmp_path: Path) -> None:
        drive(tmp_path, gated(fixed={"source": 7}), trials=6)
        assert states(tmp_path) == {"completed": 4, "infeasible": 2}
        assert len(fake_source.RAN) == 1

    def test_stages_follow_each_other(self, tmp_path: Path) -> None:
        second = Stage(overrides={"y": 0.25}, constraints=[Constraint(metric="total", least=2)])
        drive(tmp_path, space(stages=[SMALL_SQUARE, second]), trials=6)
        assert ran() == {
            **{(x, 0.5): 1 for x in range(1, 7)},
            **{(x, 0.25): 1 for x in range(1, 5)},
            **{(x, 0.0): 1 for x in range(2, 5)},
        }
        rows = {row["x"]: row for row in trials_of(tmp_path)}
        assert rows[1]["reason"] == "stage 2 of 3: total 1.25 is below 2"
        assert rows[5]["reason"] == "stage 1 of 3: square 25 is above 16"

    def test_attempts_at_a_stage_name_the_trial(self, tmp_path: Path) -> None:
        drive(tmp_path, gated(), trials=6)
        attempts = open_sweep(tmp_path).rows("SELECT trial, count(*) AS times FROM attempts GROUP BY trial")
        assert {row["trial"]: row["times"] for row in attempts} == {0: 2, 1: 2, 2: 2, 3: 2, 4: 1, 5: 1}

    def test_overrides_that_the_job_refuses_are_refused_at_once(self) -> None:
        wrong = Stage(overrides={"z": 1}, keep=0.5)
        with pytest.raises(SpecError, match="no parameter"):
            check_space(space(stages=[wrong]), ModelRef(id="smollm2-135m"))

    @pytest.mark.parametrize(
        ("values", "message"),
        [
            ({"overrides": {}, "keep": 0.5}, "needs overrides"),
            ({"overrides": CHEAPER}, "in vain"),
            ({"overrides": CHEAPER, "keep": 0.0}, r"keep=0.0; it takes a share above 0"),
            ({"overrides": CHEAPER, "keep": 1.5}, r"keep=1.5; it takes a share above 0"),
        ],
    )
    def test_a_stage_that_makes_no_sense_is_refused(self, values: dict[str, Any], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            Stage(**values)


HALVING = [Stage(overrides={"y": 0.5}, keep=0.5), Stage(overrides={"y": 0.25}, keep=0.5)]
LARGE = Grid(list(range(1, 25)))


def halved(**changes: Any) -> Space:
    """Brackets of eight by the largest total alone: four of them, then two are left."""
    best = [Objective(metric="total", direction="maximize")]
    usual = {"parameters": {"x": LARGE}, "stages": HALVING, "bracket": 8, "objectives": best}
    return make_space(**usual | changes)


def completed(folder: Path) -> list[int]:
    return sorted(row["x"] for row in trials_of(folder) if row["state"] == "completed")


class TestHalving:
    @pytest.mark.parametrize("max_pack", [1, 3, 16])
    def test_the_best_of_each_bracket_go_on(self, tmp_path: Path, max_pack: int) -> None:
        drive(tmp_path, halved(), trials=24, max_pack=max_pack)
        assert completed(tmp_path) == [7, 8, 15, 16, 23, 24]
        assert Counter(params.y for params in fake_job.RAN) == {0.5: 24, 0.25: 12, 0.0: 6}
        rows = {row["x"]: row["reason"] for row in trials_of(tmp_path)}
        assert rows[4] == "stage 1 of 3: rank 5 of 8, and the best 4 go on"
        assert rows[5] == "stage 2 of 3: rank 4 of 4, and the best 2 go on"

    def test_the_last_bracket_may_be_smaller(self, tmp_path: Path) -> None:
        drive(tmp_path, halved(), trials=19)
        assert completed(tmp_path) == [7, 8, 15, 16, 19]

    def test_what_runs_together_has_come_together(self, tmp_path: Path) -> None:
        driven = drive(tmp_path, halved(), trials=24, max_pack=16)
        full = [order for order in driven.pool.orders if order.rows[0].params["y"] == 0.0]
        assert sorted(sorted(row.params["x"] for row in order.rows) for order in full) == [
            [7, 8],
            [15, 16],
            [23, 24],
        ]

    @pytest.mark.parametrize("stop_at", range(2, 40, 5))
    def test_a_driver_that_goes_on_keeps_the_same_ones(self, tmp_path: Path, stop_at: int) -> None:
        with suppress(Stopped):
            drive(tmp_path, halved(), trials=24, stop_at=stop_at)
        drive(tmp_path, halved(), trials=24)
        assert completed(tmp_path) == [7, 8, 15, 16, 23, 24]
        assert set(ran().values()) == {1}

    @pytest.mark.parametrize("seed", range(4))
    def test_of_several_objectives_those_stay_that_sorting_by_fronts_keeps(
        self, tmp_path: Path, seed: int
    ) -> None:
        two = [
            Objective(metric="total", direction="maximize"),
            Objective(metric="square", direction="minimize"),
        ]
        drive(tmp_path, halved(objectives=two, stages=HALVING[:1]), trials=24, seed=seed)
        for start in range(1, 25, 8):
            kept = [x for x in completed(tmp_path) if start <= x < start + 8]
            # All of a bracket are on its front: the ends stay, then those with the widest gaps around them.
            assert {start, start + 7} <= set(kept)
            assert len(kept) == 4

    def test_equal_configurations_in_two_brackets_share_what_becomes_of_them(self, tmp_path: Path) -> None:
        few = halved(parameters={"x": Grid([1, 2, 3])}, sampler="random", trials=32)
        drive(tmp_path, few, trials=32)
        by_spec: dict[str, set[str]] = {}
        for row in trials_of(tmp_path):
            by_spec.setdefault(row["spec"], set()).add(row["state"])
        assert all(len(states) == 1 for states in by_spec.values())
        assert set(ran().values()) == {1}

    def test_the_sampler_hears_of_those_held_back_as_infeasible(self, tmp_path: Path) -> None:
        drive(tmp_path, halved(sampler="tpe", trials=24), trials=24)
        told = Counter(trial.state for trial in study_of(tmp_path))
        assert told[TrialState.COMPLETE] + told[TrialState.PRUNED] == 24
        held = [trial for trial in study_of(tmp_path) if trial.state == TrialState.PRUNED]
        assert held
        assert all(trial.constraints for trial in held)


class TestHeldBack:
    @given(
        points=st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), min_size=1, max_size=9),
        keep=st.floats(0.01, 0.99),
    )
    def test_nobody_goes_on_whom_somebody_held_back_dominates(
        self, points: list[tuple[int, int]], keep: float
    ) -> None:
        stage = Stage(overrides=CHEAPER, keep=keep)
        objectives = [
            Objective(metric="a", direction="maximize"),
            Objective(metric="b", direction="minimize"),
        ]
        found = [{"a": float(a), "b": float(b)} for a, b in points]
        held = held_back(stage, objectives, found, of=len(points))
        kept = [point for index, point in enumerate(points) if index not in held]
        assert len(kept) == max(1, math.ceil(keep * len(points)))
        for index in held:
            a, b = points[index]
            assert not any(a >= c and b <= d and (a, b) != (c, d) for c, d in kept)

    def test_what_breaks_a_constraint_or_is_not_defined_goes_first(self) -> None:
        stage = Stage(overrides=CHEAPER, keep=0.5, constraints=[Constraint(metric="b", most=9)])
        objectives = [Objective(metric="a", direction="maximize")]
        found = [{"a": 1.0, "b": 10.0}, {"b": 1.0}, {"a": 2.0, "b": 1.0}, {"a": math.nan, "b": 1.0}]
        assert held_back(stage, objectives, found, of=4) == {
            0: "b 10 is above 9",
            1: "not all objectives are defined",
            3: "not all objectives are defined",
        }

    @given(
        st.lists(
            st.tuples(st.floats(-5, 5), st.floats(-5, 5), st.floats(-5, 5)),
            min_size=2,
            max_size=12,
            unique=True,
        )
    )
    def test_the_order_is_that_of_optunas_own_sorting(self, rows: list[tuple[float, float, float]]) -> None:
        points = np.array(rows)
        ranks = _fast_non_domination_rank(points)
        order = best_first(points, ["minimize"] * 3)
        assert sorted(order) == list(range(len(rows)))
        assert [ranks[index] for index in order] == sorted(ranks)


class TestTunedWeights:
    def order(self, tuned: Any, x: int) -> Order:
        row = OrderRow(f"spec{x}", {"x": x}, 0)
        return Order(attempt="a", job="tests.fake_job", model=MODEL, rows=(row,), artifacts={}, tuned=tuned)

    def test_a_worker_changes_weights_only_when_an_order_has_others(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        said: list[str] = []

        @contextmanager
        def tuned(replica: Any, changes: Any) -> Any:
            said.append(f"on {int(changes['value'][0])}")
            yield
            said.append(f"off {int(changes['value'][0])}")

        monkeypatch.setattr(tuned_module, "tuned", tuned)
        one, two = (write_artifact(tmp_path, {"value": np.array([float(n)])}) for n in (1, 2))
        worker = Worker(tmp_path, MODEL, device="cpu", token_budget=1, load=load_nothing)
        for number, weights in enumerate([None, one, one, two, None, one]):
            [delivery] = worker.run(self.order(weights, number + 1))
            assert delivery.error is None
        assert said == ["on 1", "off 1", "on 2", "off 2", "on 1"]

    def test_a_configuration_names_its_tuning(self) -> None:
        config = make_config(model="smollm2-135m", tuned='jobs.finetune{"epochs": 2}')
        assert config.model_ref.tuned == 'jobs.finetune{"epochs": 2}'
        with pytest.raises(SpecError, match="did you mean 'epochs'"):
            make_config(tuned='jobs.finetune{"epoch": 2}')

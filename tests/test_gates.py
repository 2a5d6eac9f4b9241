"""Constraints on metrics, gates that cheaper trials have to pass, and sweeps on tuned weights."""

from collections import Counter
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pytest
from optuna.trial import TrialState

from jobs.engine import tuned as tuned_module
from jobs.errors import SpecError
from jobs.spec import ModelRef
from orchestrator.config import make_config
from orchestrator.pool import Order, OrderRow
from orchestrator.space_file import check_space
from orchestrator.worker import Worker
from search_spaces.base import Constraint, Gate, Grid, Objective, Space
from storage.artifacts import write_artifact
from storage.pareto import pareto
from storage.query import open_sweep
from tests import fake_job
from tests.fakes import MODEL, Stopped, load_nothing
from tests.test_sweep import drive, make_space, trials_of

XS = Grid([1, 2, 3, 4, 5, 6])


def space(**changes: Any) -> Space:
    return make_space({"x": XS}, **changes)


@pytest.fixture(autouse=True)
def none_ran() -> None:
    fake_job.RAN.clear()


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


def gated(**changes: Any) -> Space:
    """The gate runs x as it is at y = 0.5 and lets those through whose square is at most 16."""
    gate = Gate(overrides={"y": 0.5}, constraints=[Constraint(metric="square", most=16)])
    return space(gate=gate, **changes)


def ran() -> Counter[tuple[int, float]]:
    return Counter((params.x, params.y) for params in fake_job.RAN)


class TestGates:
    def test_only_what_passes_the_gate_runs(self, tmp_path: Path) -> None:
        drive(tmp_path, gated(), trials=6)
        assert ran() == {**{(x, 0.5): 1 for x in range(1, 7)}, **{(x, 0.0): 1 for x in range(1, 5)}}
        rows = {row["x"]: row for row in trials_of(tmp_path)}
        assert [rows[x]["state"] for x in range(1, 7)] == ["completed"] * 4 + ["infeasible"] * 2
        assert rows[6]["reason"] == "its cheaper form did not pass the gate: square 36 is above 16"

    @pytest.mark.parametrize("stop_at", range(2, 16, 3))
    def test_a_driver_that_goes_on_asks_no_gate_twice(self, tmp_path: Path, stop_at: int) -> None:
        with pytest.raises(Stopped):
            drive(tmp_path, gated(), trials=6, stop_at=stop_at)
        drive(tmp_path, gated(), trials=6)
        states = Counter(row["state"] for row in trials_of(tmp_path))
        assert states == {"completed": 4, "infeasible": 2}
        drive(tmp_path, gated(), trials=6)
        assert Counter(row["state"] for row in trials_of(tmp_path)) == states

    @pytest.mark.parametrize("when", ["before", "after"])
    def test_lost_workers_change_nothing(self, tmp_path: Path, when: Any) -> None:
        drive(tmp_path, gated(), trials=6, losses={1: when, 3: when, 6: when})
        assert Counter(row["state"] for row in trials_of(tmp_path)) == {"completed": 4, "infeasible": 2}

    def test_a_gate_that_fails_fails_its_trial_by_name(self, tmp_path: Path) -> None:
        gate = Gate(overrides={"mode": "fail"}, constraints=[Constraint(metric="square", most=16)])
        drive(tmp_path, space(gate=gate), trials=6)
        for row in trials_of(tmp_path):
            assert row["state"] == "failed"
            assert "tests.fake_job" in row["reason"]
            assert "told to fail" in row["reason"]

    def test_what_is_its_own_gate_runs_once(self, tmp_path: Path) -> None:
        gate = Gate(overrides={"y": 0.0}, constraints=[Constraint(metric="square", most=16)])
        drive(tmp_path, space(gate=gate), trials=6)
        assert set(ran().values()) == {1}

    def test_prerequisites_of_both_are_computed_once(self, tmp_path: Path) -> None:
        drive(tmp_path, gated(fixed={"source": 7}), trials=6)
        assert Counter(row["state"] for row in trials_of(tmp_path)) == {"completed": 4, "infeasible": 2}

    def test_overrides_that_the_job_refuses_are_refused_at_once(self) -> None:
        gate = Gate(overrides={"z": 1}, constraints=[Constraint(metric="square", most=16)])
        with pytest.raises(SpecError, match="no parameter"):
            check_space(space(gate=gate), ModelRef(id="smollm2-135m"))

    def test_an_empty_gate_is_refused(self) -> None:
        with pytest.raises(ValueError, match="needs overrides"):
            Gate(overrides={}, constraints=[Constraint(metric="square", most=16)])


class TestTunedWeights:
    def order(self, tuned: Any, x: int) -> Order:
        row = OrderRow(f"spec{x}", {"x": x}, 0)
        return Order(attempt="a", job="tests.fake_job", rows=(row,), artifacts={}, tuned=tuned)

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

"""The whole loop with real workers, a real study and no model: what is kept, whatever goes wrong."""

import dataclasses
import errno
import json
import multiprocessing
import os
import random
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from jobs.errors import SpecError
from jobs.spec import Status
from orchestrator import worker as worker_module
from orchestrator.budget import busy_seconds
from orchestrator.cli import app
from orchestrator.interrupts import stoppable
from orchestrator.lineage import stored_specs
from orchestrator.progress import Tally, describe
from orchestrator.sampler import OptunaSampler
from search_spaces.base import Float, Grid, Int, Objective, Space
from storage import compaction, durable
from storage.artifacts import read_artifact, write_artifact
from storage.donors import Donors
from storage.durable import DiskFull, StoreError
from storage.ledger import ledger_path, read_asked
from storage.pareto import pareto
from storage.query import open_sweep
from storage.store import Store
from tests import fake_job, fake_source
from tests.fakes import InlinePool, SilentProgress, Stopped
from tests.sweeps import (
    NUMBERS,
    OBJECTIVES,
    SCENARIOS,
    check_ended,
    drive,
    drive_scenario,
    make_space,
    metrics_of,
    outcome_of,
    prepare,
    study_of,
    trials_of,
)


@pytest.fixture(autouse=True)
def _a_clean_and_quick_start(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_job.RAN.clear()
    fake_source.RAN.clear()
    # These tests survive the death of a process, not of a machine.
    monkeypatch.setattr(os, "fsync", lambda file: None)
    monkeypatch.setattr("orchestrator.folder.provenance", dict)


@pytest.fixture(params=["a delivery for each row", "a delivery for each pack"])
def deliveries(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "a delivery for each row":
        monkeypatch.setattr(worker_module, "_FLUSH_SECONDS", -1.0)
    return str(request.param)


@pytest.fixture
def row_by_row(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker_module, "_FLUSH_SECONDS", -1.0)


@pytest.mark.usefixtures("deliveries")
@pytest.mark.parametrize("workers", [1, 3])
def test_every_trial_ends_once_with_the_metrics_of_its_parameters(tmp_path: Path, workers: int) -> None:
    space = make_space()
    tally, pool = drive(tmp_path, space, trials=12, workers=workers)
    assert (tally.completed, tally.infeasible, tally.failed, tally.running) == (12, 0, 0, 0)
    assert all(row["state"] == "completed" for row in trials_of(tmp_path))
    check_ended(tmp_path, space, trials=12)
    assert len(fake_job.RAN) == len(set(fake_job.RAN)) == 12
    assert sum(len(order.rows) for order in pool.orders) == 12
    attempts = open_sweep(tmp_path).rows("SELECT * FROM attempts")
    assert Counter(row["state"] for row in attempts) == {"ok": 12}
    assert {row["attempt"] for row in attempts} == {order.attempt for order in pool.orders}
    assert sorted(row["trial"] for row in attempts) == list(range(12))


def test_rows_of_a_pack_share_what_the_job_packs_by(tmp_path: Path) -> None:
    _, pool = drive(tmp_path, make_space({**NUMBERS, "y": Grid([1, 2])}), trials=24, workers=1)
    assert max(len(order.rows) for order in pool.orders) > 1
    assert all(len({row.params["group"] for row in order.rows}) == 1 for order in pool.orders)
    assert max(len(order.rows) for order in pool.orders) <= 4


def test_later_proposals_of_a_pack_hold_what_the_job_packs_by_and_the_ledger_says_so(tmp_path: Path) -> None:
    space = make_space({**NUMBERS, "y": Float(low=0, high=1)}, sampler="random", trials=16)
    drive(tmp_path, space, trials=16, workers=1)
    asked = read_asked(tmp_path)
    free = [trial for trial in asked if not trial.fixed]
    assert 1 < len(free) < 16
    for trial in asked:
        if trial.fixed:
            leader = max(
                (other for other in free if other.trial < trial.trial), key=lambda other: other.trial
            )
            assert trial.fixed == ("group",)
            assert trial.params["group"] == leader.params["group"]


@pytest.mark.usefixtures("deliveries")
def test_a_failing_row_does_not_fail_the_other_rows_of_its_pack(tmp_path: Path) -> None:
    space = make_space({"x": Grid(list(range(8))), "mode": Grid(["ok", "fail"])})
    tally, pool = drive(tmp_path, space, trials=16, workers=1)
    assert (tally.completed, tally.failed) == (8, 8)
    check_ended(tmp_path, space, trials=16)
    for row in trials_of(tmp_path):
        assert (row["state"], row["reason"]) == (
            ("completed", None) if row["mode"] == "ok" else ("failed", "told to fail")
        )
    assert len(fake_job.RAN) == 16, "a failure that the job reported itself is not tried again"
    assert len(pool.orders[0].rows) == 4
    states = open_sweep(tmp_path).rows("SELECT state, count(*) AS n FROM attempts GROUP BY state")
    assert {row["state"]: row["n"] for row in states} == {"ok": 8, "failed": 8}


@pytest.mark.usefixtures("deliveries")
@pytest.mark.parametrize("mode", fake_job.FAULTY)
def test_a_row_that_breaks_its_pack_fails_alone_and_the_others_run_again(tmp_path: Path, mode: str) -> None:
    space = make_space({"mode": Grid(["ok", mode]), "x": Grid(list(range(1, 9)))}, fixed={"y": 2.0})
    tally, pool = drive(tmp_path, space, trials=16, workers=1)
    assert (tally.completed, tally.failed) == (8, 8)
    check_ended(tmp_path, space, trials=16)
    for row in trials_of(tmp_path):
        assert row["state"] == ("completed" if row["mode"] == "ok" else "failed")
        assert row["reason"] is None or ("lost" not in row["reason"] and "\n" not in row["reason"])
    broken = [
        order
        for order in pool.orders
        if len(order.rows) > 1 and any(row.params["mode"] == mode for row in order.rows)
    ]
    assert broken
    alone = Counter(order.rows[0].spec for order in pool.orders if len(order.rows) == 1)
    assert set(alone.values()) == {1}, "a job's own fault is not retried"
    states = {row["state"] for row in open_sweep(tmp_path).rows("SELECT state FROM attempts")}
    assert states == {"ok", "failed"}


@pytest.mark.usefixtures("deliveries")
def test_of_two_outcomes_for_one_row_the_first_stands(tmp_path: Path) -> None:
    space = make_space({"mode": Grid(["twice", "ok"]), "x": Grid(list(range(1, 9)))})
    tally, _ = drive(tmp_path, space, trials=16, workers=1)
    assert tally.completed == 16
    check_ended(tmp_path, space, trials=16)
    reasons = open_sweep(tmp_path).rows("SELECT DISTINCT reason FROM attempts WHERE state = 'failed'")
    assert reasons
    assert all("twice" in row["reason"] for row in reasons)


def test_the_reason_of_a_failed_trial_is_one_line_and_its_attempt_keeps_the_traceback(tmp_path: Path) -> None:
    drive(tmp_path, make_space({"x": Grid([1])}, fixed={"mode": "raise"}), trials=1)
    [trial] = trials_of(tmp_path)
    assert trial["reason"] == "RuntimeError: told to raise"
    [attempt] = open_sweep(tmp_path).rows("SELECT * FROM attempts")
    assert "Traceback" in attempt["reason"]
    assert "fake_job.py" in attempt["reason"]


@pytest.mark.usefixtures("deliveries")
def test_a_row_that_does_not_fit_alone_is_infeasible_and_the_others_complete(tmp_path: Path) -> None:
    space = make_space({"x": Grid(list(range(1, 9))), "mode": Grid(["ok", "oom"])})
    tally, _ = drive(tmp_path, space, trials=16, workers=1)
    assert (tally.completed, tally.infeasible, tally.failed) == (8, 8, 0)
    check_ended(tmp_path, space, trials=16)
    states = {row["state"] for row in open_sweep(tmp_path).rows("SELECT state FROM attempts")}
    assert states == {"ok", "oom"}


@pytest.mark.usefixtures("deliveries")
@pytest.mark.parametrize("mode", ["nan", "inf", "missing"])
def test_a_trial_with_an_undefined_objective_is_infeasible_and_says_which(tmp_path: Path, mode: str) -> None:
    space = make_space({"x": Grid([1, 2]), "mode": Grid(["ok", mode])})
    tally, _ = drive(tmp_path, space, trials=4, workers=1)
    assert (tally.completed, tally.infeasible, tally.failed) == (2, 2, 0)
    check_ended(tmp_path, space, trials=4)
    undefined = [row for row in trials_of(tmp_path) if row["mode"] == mode]
    assert all(row["state"] == "infeasible" and "total" in row["reason"] for row in undefined)
    metrics = metrics_of(tmp_path)
    assert all(metrics.get((row["spec"], "select", "total")) is None for row in undefined)
    assert all(metrics[row["spec"], "select", "square"] is not None for row in undefined)
    assert {point["params"]["mode"] for point in pareto(open_sweep(tmp_path))} == {"ok"}


def test_a_job_that_measures_on_extract_alone_is_chosen_on_it_also_after_a_stop(tmp_path: Path) -> None:
    space = make_space({"x": Grid([2, 3, 1])}, fixed={"mode": "extract"})
    with pytest.raises(Stopped):
        drive(tmp_path, space, trials=3, workers=1, max_pack=1, stop_at=4)
    assert 0 < len(trials_of(tmp_path)) < 3
    driven = drive(tmp_path, space, trials=3)
    assert [trial.values for trial in study_of(tmp_path)] == [[x, x * x] for x in (2, 3, 1)]
    assert driven.tally.completed == 3
    assert driven.tally.best == "total 3 (trial 1)"


def test_a_trial_that_the_job_calls_infeasible_keeps_its_reason(tmp_path: Path) -> None:
    space = make_space({"x": Grid([1])}, fixed={"mode": "infeasible"})
    drive(tmp_path, space, trials=1)
    [row] = trials_of(tmp_path)
    assert (row["state"], row["reason"]) == ("infeasible", "told to be infeasible")
    check_ended(tmp_path, space, trials=1)


def test_tables_and_tensors_of_a_row_come_back_under_its_trial(tmp_path: Path) -> None:
    drive(tmp_path, make_space({"x": Grid([1, 2])}, fixed={"mode": "tables"}), trials=2)
    sweep = open_sweep(tmp_path)
    completions = sweep.rows("SELECT * FROM completions ORDER BY trial")
    assert [(row["trial"], row["text"], row["nll"]) for row in completions] == [
        (0, fake_job.NASTY, None),
        (1, fake_job.NASTY, None),
    ]
    [vector] = sweep.rows("SELECT * FROM vectors WHERE trial = 1")
    assert (vector["vector"], vector["layer"]) == ([3.0, 4.0], 2)
    assert sweep.rows("SELECT DISTINCT prompt, value FROM items") == [
        {"prompt": fake_job.NASTY, "value": None}
    ]
    hashes = sweep.rows("SELECT trial, hash FROM artifacts ORDER BY trial")
    assert [row["trial"] for row in hashes] == [0, 1]
    assert hashes[0]["hash"] == hashes[1]["hash"], "equal tensors are one artifact"


def test_prerequisites_run_once_and_first_and_are_no_trials(tmp_path: Path) -> None:
    space = make_space({"x": Grid([1, 2, 3, 4]), "source": Grid([5, 7])}, fixed={"source_depth": 1})
    tally, _ = drive(tmp_path, space, trials=8)
    assert tally.completed == 8
    check_ended(tmp_path, space, trials=8)
    assert Counter((params.value, params.depth) for params in fake_source.RAN) == {
        (5, 0): 1, (5, 1): 1, (7, 0): 1, (7, 1): 1
    }  # fmt: skip
    sweep = open_sweep(tmp_path)
    attempts = sweep.rows("SELECT * FROM attempts WHERE job = 'tests.fake_source'")
    assert len(attempts) == 4
    assert all(row["trial"] is None and row["state"] == "ok" for row in attempts)
    assert sweep.rows(
        "SELECT count(*) AS n FROM artifacts WHERE trial IS NULL AND job = 'tests.fake_source'"
    ) == [{"n": 4}]
    assert len(study_of(tmp_path)) == 8


def test_prerequisites_of_trials_that_were_asked_together_are_shared_out_in_packs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fake_source, "PACK_BY", ("mode",))
    space = make_space({"source": Grid(list(range(1, 41)))}, fixed={"x": 1, "source_depth": 1})
    tally, _ = drive(tmp_path, space, trials=40, workers=2, max_pack=4)
    assert tally.completed == 40
    check_ended(tmp_path, space, trials=40)
    assert Counter(params.depth for params in fake_source.RAN) == {0: 40, 1: 40}
    packs = open_sweep(tmp_path).rows(
        "SELECT count(*) AS tasks FROM attempts WHERE job = 'tests.fake_source' GROUP BY pack"
    )
    sizes = Counter(row["tasks"] for row in packs)
    assert max(sizes) == 4, "the upper ones ride together"
    assert sizes[1] >= 40, "the lower ones, which others need, go ahead alone"


@pytest.mark.parametrize("mode", ["raise", "fail", "empty"])
def test_a_prerequisite_that_fails_fails_all_that_need_it_by_name_and_nothing_else(
    tmp_path: Path, mode: str
) -> None:
    space = make_space(
        {"x": Grid([1, 2]), "source": Grid([0, 5]), "source_mode": Grid(["ok", mode])},
        fixed={"source_depth": 2},
    )
    tally, _ = drive(tmp_path, space, trials=8, workers=1)
    check_ended(tmp_path, space, trials=8)
    assert (tally.completed, tally.failed) == (6, 2)
    for row in trials_of(tmp_path):
        if row["source"] and row["source_mode"] == mode:
            assert row["state"] == "failed"
            assert "prerequisite tests.fake_source" in row["reason"]
        else:
            assert row["state"] == "completed"


def test_a_prerequisite_that_breaks_says_why_in_its_dependents(tmp_path: Path) -> None:
    drive(tmp_path, make_space({"x": Grid([1])}, fixed={"source": 5, "source_mode": "fail"}), trials=1)
    [row] = trials_of(tmp_path)
    assert "the source was told to fail" in row["reason"]


@pytest.mark.parametrize("depths", [[0, 1, 2], [2, 1, 0], [1, 2, 0]])
@pytest.mark.parametrize(("mode", "state"), [("ok", "completed"), ("unmeasured", "infeasible")])
def test_a_trial_that_others_require_is_computed_once_in_any_order(
    tmp_path: Path, depths: list[int], mode: str, state: str
) -> None:
    objectives = [Objective(metric="value", direction="maximize")]
    space = make_space({"depth": Grid(depths)}, fixed={"value": 3, "mode": mode}, objectives=objectives)
    space = dataclasses.replace(space, job="tests.fake_source")
    drive(tmp_path, space, trials=3, workers=1)
    assert sorted(params.depth for params in fake_source.RAN) == [0, 1, 2]
    assert [(row["depth"], row["state"]) for row in trials_of(tmp_path)] == [
        (depth, state) for depth in depths
    ]
    if mode == "ok":
        assert [trial.values for trial in study_of(tmp_path)] == [[3.0 * (depth + 1)] for depth in depths]


def test_while_a_prerequisite_runs_no_more_is_asked_than_idle_workers_could_take(tmp_path: Path) -> None:
    # What is asked before a result is known is asked blindly: a sampler learns nothing from waiting.
    space = make_space({"x": Int(low=1, high=1000)}, fixed={"source": 5}, sampler="tpe", trials=40)
    pool = _SlowPool(tmp_path, rounds=12)
    drive(tmp_path, space, trials=40, pool=pool)
    assert pool.asked_meanwhile
    assert max(pool.asked_meanwhile) <= 2 * 4


@pytest.mark.parametrize("seed", range(3))
def test_a_worker_is_not_left_idle_while_the_prerequisites_of_others_run(tmp_path: Path, seed: int) -> None:
    space = make_space({"source": Grid(list(range(1, 25)))}, fixed={"x": 1})
    pool = _WatchfulPool(tmp_path, trials=24, workers=3, seed=seed)
    drive(tmp_path, space, trials=24, workers=3, pool=pool)
    check_ended(tmp_path, space, trials=24)
    assert pool.most_idle == 0


def test_no_idle_worker_waits_for_the_sampler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    for owner, name in ((OptunaSampler, "ask_together"), (InlinePool, "start")):
        real = getattr(owner, name)

        def noted(*arguments: Any, name: str = name, real: Callable[..., Any] = real) -> Any:
            calls.append(name)
            return real(*arguments)

        monkeypatch.setattr(owner, name, noted)
    space = make_space({"x": Int(low=0, high=99)}, sampler="random", trials=12)
    drive(tmp_path, space, trials=12, workers=1, max_pack=1)
    assert calls == ["ask_together", *["start", "ask_together"] * 11, "start"]


def test_a_sweep_goes_on_where_its_files_cannot_be_put_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tries: list[Path] = []

    def refuse(folder: Path, files: object) -> None:
        tries.append(folder)
        raise StoreError("one is not what was written")

    monkeypatch.setattr(compaction, "MANY", 2)
    monkeypatch.setattr(compaction, "put_together", refuse)
    space = make_space({"x": Grid([1, 2, 3, 4, 5, 6])})
    drive(tmp_path, space, trials=6, workers=1, max_pack=1)
    check_ended(tmp_path, space, trials=6)
    assert len(tries) > 1


class _WatchfulPool(InlinePool):
    """Notes how many workers have nothing to do although not everything was asked for."""

    def __init__(self, folder: Path, *, trials: int, **options: Any) -> None:
        super().__init__(folder, **options)
        self._folder = folder
        self._trials = trials
        self.most_idle = 0

    def events(self, timeout_seconds: float) -> list[Any]:
        if not self._news and len(read_asked(self._folder)) < self._trials:
            self.most_idle = max(self.most_idle, len(self._idle))
        return super().events(timeout_seconds)


class _SlowPool(InlinePool):
    """For the first rounds nothing happens but that a source is being computed."""

    def __init__(self, folder: Path, *, rounds: int) -> None:
        super().__init__(folder, workers=2)
        self._folder = folder
        self._rounds = rounds
        self.asked_meanwhile: list[int] = []

    def events(self, timeout_seconds: float) -> list[Any]:
        if self._rounds and self.orders and not self._news:
            self._rounds -= 1
            self.asked_meanwhile.append(len(read_asked(self._folder)))
            return []
        return super().events(timeout_seconds)


def test_equal_configurations_run_once_and_name_the_first(tmp_path: Path) -> None:
    space = make_space({"x": Grid([1, 2]), "mode": Grid(["ok", "fail", "nan"])}, sampler="random", trials=24)
    tally, _ = drive(tmp_path, space, trials=24)
    assert tally.done == 24
    check_ended(tmp_path, space, trials=24)
    assert len(fake_job.RAN) == len(set(fake_job.RAN)) <= 6
    reused = [row for row in trials_of(tmp_path) if row["reused_from"] is not None]
    assert len(reused) == 24 - len(fake_job.RAN)
    by_number = {row["trial"]: row for row in trials_of(tmp_path)}
    for row in reused:
        first = by_number[row["reused_from"]]
        assert first["reused_from"] is None
        assert (first["state"], first["reason"], first["params"]) == (
            row["state"],
            row["reason"],
            row["params"],
        )


def test_configurations_that_mean_the_same_work_share_one_result(tmp_path: Path) -> None:
    space = make_space({"x": Grid([0, 1]), "y": Grid([1.0, 2.0, 3.0])})
    drive(tmp_path, space, trials=6)
    check_ended(tmp_path, space, trials=6)
    assert sorted((params.x, params.y) for params in fake_job.RAN) == [(0, 0.0), (1, 1.0), (1, 2.0), (1, 3.0)]
    sweep = open_sweep(tmp_path)
    totals = sweep.rows(
        "SELECT trial, value FROM metrics WHERE name = 'total' AND split = 'select' ORDER BY trial"
    )
    assert [(row["trial"], row["value"]) for row in totals] == [
        (0, 0),
        (1, 0),
        (2, 0),
        (3, 2),
        (4, 3),
        (5, 4),
    ]


@pytest.mark.usefixtures("deliveries")
@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("order", [1, 2, 4])
def test_a_worker_that_dies_costs_an_attempt_and_nothing_else(tmp_path: Path, when: str, order: int) -> None:
    space = make_space({**NUMBERS, "source": Grid([5])})
    tally, pool = drive(tmp_path, space, trials=12, losses={order: when})
    assert tally.completed == 12
    check_ended(tmp_path, space, trials=12)
    sweep = open_sweep(tmp_path)
    oks = sweep.rows("SELECT spec, count(*) AS n FROM attempts WHERE state = 'ok' GROUP BY spec")
    assert len(oks) == 13
    assert all(row["n"] == 1 for row in oks), "an accepted result is accepted once"
    lost = sweep.rows("SELECT * FROM attempts WHERE state = 'lost'")
    assert {row["attempt"] for row in lost} <= {pool.orders[order - 1].attempt}
    assert lost or when == "after"
    assert all("took its worker along" in row["reason"] for row in lost)


@pytest.mark.usefixtures("deliveries")
def test_a_pack_that_keeps_killing_its_workers_is_given_up_with_the_reason(tmp_path: Path) -> None:
    space = make_space({"x": Grid([1, 2, 3, 4]), "group": Grid(["a", "b"]), "mode": Grid(["ok"])})
    space = dataclasses.replace(space, parameters={**space.parameters, "mode": Grid(["ok", "die"])})
    tally, pool = drive(tmp_path, space, trials=16)
    check_ended(tmp_path, space, trials=16)
    rows = trials_of(tmp_path)
    assert {row["state"] for row in rows if row["mode"] == "die"} == {"failed"}
    assert {row["state"] for row in rows if row["mode"] == "ok"} == {"completed"}, "they rode with killers"
    assert tally.failed == 8
    tries = Counter(row.spec for order in pool.orders for row in order.rows)
    for row in rows:
        assert tries[row["spec"]] <= 3
        if row["state"] == "failed":
            assert row["reason"].startswith("quarantined: 3 workers died")
            assert "told to die" in row["reason"]
            assert tries[row["spec"]] == 3
    states = open_sweep(tmp_path).rows(
        "SELECT spec, count(*) AS n FROM attempts WHERE state = 'lost' GROUP BY spec"
    )
    assert {row["n"] for row in states if row["spec"] in {r["spec"] for r in rows if r["mode"] == "die"}} == {
        3
    }


def test_a_prerequisite_that_kills_its_workers_fails_its_dependents(tmp_path: Path) -> None:
    space = make_space({"x": Grid([1, 2])}, fixed={"source": 5})
    tally, pool = drive(tmp_path, space, trials=2, workers=1, losses={1: "before", 2: "before", 3: "before"})
    assert tally.failed == 2
    check_ended(tmp_path, space, trials=2)
    assert all("prerequisite tests.fake_source" in row["reason"] for row in trials_of(tmp_path))
    assert len(pool.orders) == 3


def test_a_result_is_stored_before_the_sampler_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tell = OptunaSampler.tell
    told = []

    def checked(self: OptunaSampler, trial: int, status: Status, values: Sequence[float] | None) -> None:
        assert trial in {row["trial"] for row in Store(tmp_path).rows("trials")}
        told.append(trial)
        tell(self, trial, status, values)

    monkeypatch.setattr(OptunaSampler, "tell", checked)
    drive(tmp_path, make_space({"x": Grid([1, 2]), "mode": Grid(["ok", "fail", "nan"])}), trials=6)
    assert sorted(told) == list(range(6))


def test_everyone_who_listens_hears_of_every_trial(tmp_path: Path) -> None:
    heard: list[int] = []
    drive(
        tmp_path,
        make_space(),
        trials=12,
        on_result=lambda: heard.append(len(Store(tmp_path).rows("trials"))),
    )
    assert len(heard) == 12
    assert heard == sorted(heard)


def test_the_best_so_far_is_the_best_of_the_first_objective(tmp_path: Path) -> None:
    tally, _ = drive(tmp_path / "max", make_space({"x": Grid([3, 9, 1])}), trials=3)
    assert tally.best == "total 9 (trial 1)"
    tally, _ = drive(
        tmp_path / "min", make_space({"x": Grid([3, 9, -2])}, objectives=OBJECTIVES[1:]), trials=3
    )
    assert tally.best == "square 4 (trial 2)"


def test_the_time_left_is_told_when_a_pack_of_trials_has_ended(tmp_path: Path) -> None:
    space = make_space({"x": Grid([1, 2, 3, 4])}, fixed={"source": 5})
    driven = drive(tmp_path, space, trials=4, workers=1, max_pack=2)
    jobs = [order.job for order in driven.pool.orders]
    # Neither the prerequisite counts, nor the last pack, whose end nobody waits for.
    assert driven.tally.packs_ended == jobs.count("tests.fake_job") - 1 == len(jobs) - 2
    early = Tally(total=4, completed=1, workers_ready=1)
    assert describe(early, rate=0.5).endswith("| 30.0 trials/min")
    assert "| preparing: jobs.finetune |" in describe(
        dataclasses.replace(early, preparing="jobs.finetune"), rate=0.5
    )
    assert describe(dataclasses.replace(early, packs_ended=1), rate=0.5).endswith("| ETA 0:06")


def test_a_sweep_that_has_ended_computes_nothing_again_and_tells_the_same(tmp_path: Path) -> None:
    space = make_space({"x": Grid([0, 1, 2]), "y": Grid([1.0, 2.0]), "mode": Grid(["ok", "fail", "nan"])})
    first, _ = drive(tmp_path, space, trials=18)
    listed = sorted((tmp_path / "manifest").iterdir())
    second, pool = drive(tmp_path, space, trials=18)
    assert pool.orders == []
    of_this_driver = {"workers_ready": 0, "packs_ended": 0}
    assert dataclasses.replace(first, **of_this_driver) == dataclasses.replace(second, **of_this_driver)
    assert sorted((tmp_path / "manifest").iterdir()) == listed


def test_an_artifact_that_was_deleted_is_computed_again_without_a_second_result(tmp_path: Path) -> None:
    space = make_space({"x": Grid(list(range(1, 13)))}, fixed={"source": 5, "source_depth": 1})
    with pytest.raises(Stopped):
        drive(tmp_path, space, trials=12, workers=1, max_pack=1, stop_at=12)
    done = len(trials_of(tmp_path))
    assert 0 < done < 12
    for path in (tmp_path / "artifacts").iterdir():
        path.unlink()
    drive(tmp_path, space, trials=12, workers=1, max_pack=1)
    check_ended(tmp_path, space, trials=12)
    assert Counter(params.depth for params in fake_source.RAN) == {0: 2, 1: 2}
    assert all(row["state"] == "completed" for row in trials_of(tmp_path))


class TestEvents:
    def test_what_happens_to_driver_and_workers_is_kept(self, tmp_path: Path) -> None:
        space = make_space({"x": Grid(list(range(1, 13)))})
        with pytest.raises(Stopped):
            drive(tmp_path, space, trials=12, workers=1, max_pack=2, stop_at=6)
        done = len(trials_of(tmp_path))
        drive(tmp_path, space, trials=12, workers=2, max_pack=2, losses={1: "before"})
        events = open_sweep(tmp_path).rows("SELECT * FROM events")
        kinds = Counter(row["kind"] for row in events)
        assert (kinds["driver started"], kinds["driver ended"], kinds["worker lost"]) == (2, 2, 1)
        assert kinds["worker ready"] >= 1 + 2
        times = [row["time"] for row in events]
        assert times == sorted(times)
        starts = [row["detail"] for row in events if row["kind"] == "driver started"]
        assert starts[0].endswith("0 of 12 trials have ended; 1 workers")
        assert starts[1].endswith(f"{done} of 12 trials have ended; 2 workers")
        ends = [row["detail"] for row in events if row["kind"] == "driver ended"]
        assert (ends[0].split(":")[0], ends[1]) == ("Stopped", "all trials have ended")
        said = json.loads(CliRunner().invoke(app, ["status", str(tmp_path), "--json"]).stdout)
        assert (said["driver"], said["ended"]) == (None, "all trials have ended")
        [lost] = [row for row in events if row["kind"] == "worker lost"]
        assert lost["worker"] in {row["worker"] for row in events if row["kind"] == "worker ready"}

    def test_a_disk_that_was_full_is_noted_once_a_wait(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        real, waits = durable.publish, iter([False, False, True, True, True, False])

        def refuse(path: Path, content: bytes) -> None:
            if next(waits, False):
                raise DiskFull(f"cannot write {path}: No space left on device")
            real(path, content)

        monkeypatch.setattr("storage.manifest.publish", refuse)
        monkeypatch.setattr("orchestrator.sweep._FULL_DISK_SECONDS", 0.0)
        drive(tmp_path, make_space({"x": Grid([1, 2, 3])}), trials=3, max_pack=1)
        paused = open_sweep(tmp_path).rows("SELECT * FROM events WHERE kind = 'paused'")
        assert len(paused) == 1
        assert "No space left" in paused[0]["detail"]


class TestReuse:
    def space(self) -> Space:
        return make_space({"x": Grid([1, 2]), "source": Grid([5, 7])}, fixed={"source_depth": 1})

    def test_what_another_sweep_has_stored_is_taken_and_not_computed(self, tmp_path: Path) -> None:
        drive(
            tmp_path / "first", make_space({"x": Grid([9])}, fixed={"source": 5, "source_depth": 1}), trials=1
        )
        fake_source.RAN.clear()
        drive(tmp_path / "second", self.space(), trials=4, reuse=[tmp_path / "first"])
        check_ended(tmp_path / "second", self.space(), trials=4)
        assert all(row["state"] == "completed" for row in trials_of(tmp_path / "second"))
        assert Counter((params.value, params.depth) for params in fake_source.RAN) == {(7, 0): 1, (7, 1): 1}
        name = open_sweep(tmp_path / "first").identity["sweep"]
        [taken] = open_sweep(tmp_path / "second").rows("SELECT * FROM attempts WHERE worker IS NULL")
        assert (taken["state"], taken["reason"]) == ("ok", f"taken over from {name}")
        [first], rows = (
            {row["path"] for row in Store(tmp_path / each).rows("artifacts") if row["spec"] == taken["spec"]}
            for each in ("first", "second")
        )
        assert rows == {first}

    def test_it_says_what_is_other_where_nothing_could_be_taken(self, tmp_path: Path) -> None:
        space = make_space({"x": Grid([1, 2])}, fixed={"source": 5, "source_depth": 1})
        drive(tmp_path / "first", space, trials=2)
        other = make_space({"x": Grid([1]), "source": Grid([11, 13])}, fixed={"source_depth": 1})
        lines: list[str] = []
        drive(tmp_path / "second", other, trials=2, reuse=[tmp_path / "first"], say=lines.append)
        name = open_sweep(tmp_path / "first").identity["sweep"]
        assert lines == [
            f"nothing of tests.fake_source is taken from {name}: the nearest of its results differs in "
            "value (5 there, 11 here)"
        ]
        lines.clear()
        drive(tmp_path / "third", space, trials=2, reuse=[tmp_path / "first"], say=lines.append)
        assert lines == []

    @pytest.mark.parametrize("harm", ["gone", "changed"])
    def test_what_is_not_whole_any_more_is_computed(self, tmp_path: Path, harm: str) -> None:
        drive(tmp_path / "first", self.space(), trials=4)
        for path in (tmp_path / "first" / "artifacts").iterdir():
            path.unlink() if harm == "gone" else path.write_bytes(b"something else")
        fake_source.RAN.clear()
        drive(tmp_path / "second", self.space(), trials=4, reuse=[tmp_path / "first"])
        check_ended(tmp_path / "second", self.space(), trials=4)
        assert len(fake_source.RAN) == 4

    def test_a_lost_artifact_is_taken_without_a_second_result(self, tmp_path: Path) -> None:
        drive(tmp_path / "donor", self.space(), trials=4)
        with pytest.raises(Stopped):
            drive(tmp_path / "sweep", self.space(), trials=4, workers=1, max_pack=1, stop_at=12)
        for path in (tmp_path / "sweep" / "artifacts").iterdir():
            path.unlink()
        fake_source.RAN.clear()
        drive(tmp_path / "sweep", self.space(), trials=4, reuse=[tmp_path / "donor"])
        check_ended(tmp_path / "sweep", self.space(), trials=4)
        assert not fake_source.RAN

    def test_what_the_sweeps_own_job_makes_is_computed_with_its_metrics(self, tmp_path: Path) -> None:
        space = make_space(
            {"depth": Grid([1, 0])},
            job="tests.fake_source",
            fixed={"value": 3},
            objectives=(Objective(metric="value", direction="maximize"),),
        )
        drive(tmp_path / "donor", space, trials=2)
        drive(tmp_path / "sweep", space, trials=2, reuse=[tmp_path / "donor"])
        assert [row["state"] for row in trials_of(tmp_path / "sweep")] == ["completed", "completed"]

    def test_another_donor_is_asked_where_the_first_has_lost_it(self, tmp_path: Path) -> None:
        for name in ("first", "second"):
            drive(tmp_path / name, self.space(), trials=4)
        for path in (tmp_path / "first" / "artifacts").iterdir():
            path.unlink()
        fake_source.RAN.clear()
        drive(tmp_path / "sweep", self.space(), trials=4, reuse=[tmp_path / "first", tmp_path / "second"])
        check_ended(tmp_path / "sweep", self.space(), trials=4)
        assert not fake_source.RAN

    def test_the_latest_artifact_of_a_donor_is_taken(self, tmp_path: Path) -> None:
        drive(tmp_path / "donor", self.space(), trials=4)
        store = Store(tmp_path / "donor")
        row = store.rows("artifacts")[0]
        (tmp_path / "donor" / row["path"]).unlink()
        made_again = write_artifact(tmp_path / "donor", {"value": np.array([1.5])})
        again = {"hash": made_again.sha256, "path": made_again.path, "bytes": made_again.bytes}
        store.commit([], artifacts=[{**row, **again}])
        (tmp_path / "taker").mkdir()
        spec = stored_specs(open_sweep(tmp_path / "donor"))[row["spec"]]
        found = Donors([tmp_path / "donor"]).give(spec, tmp_path / "taker")
        assert found is not None
        assert read_artifact(tmp_path / "taker", found.artifact)["value"] == [1.5]

    def test_a_folder_without_a_sweep_is_refused(self, tmp_path: Path) -> None:
        with pytest.raises(SpecError, match="holds no sweep"):
            Donors([tmp_path])

    @pytest.mark.parametrize("writer", ["donors", "manifest"])
    def test_what_is_taken_waits_for_room_on_a_full_disk(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, writer: str
    ) -> None:
        drive(tmp_path / "donor", self.space(), trials=4)
        fake_source.RAN.clear()
        real, waits = durable.publish, iter([True, True, False])

        def refuse(path: Path, content: bytes) -> None:
            if next(waits, False):
                raise DiskFull(f"cannot write {path}: No space left on device")
            real(path, content)

        monkeypatch.setattr(f"storage.{writer}.publish", refuse)
        monkeypatch.setattr("orchestrator.sweep._FULL_DISK_SECONDS", 0.0)
        drive(tmp_path / "sweep", self.space(), trials=4, reuse=[tmp_path / "donor"])
        assert next(waits, None) is None
        check_ended(tmp_path / "sweep", self.space(), trials=4)
        assert not fake_source.RAN


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], dict[str, Any]]]:
    """Outcome of a scenario that nobody stops, computed once."""
    kept: dict[str, dict[str, Any]] = {}

    def outcome(name: str) -> dict[str, Any]:
        if name not in kept:
            folder = tmp_path_factory.mktemp("undisturbed")
            drive_scenario(folder, name)
            kept[name] = outcome_of(folder)
        return kept[name]

    return outcome


@pytest.mark.parametrize("name", SCENARIOS)
@pytest.mark.usefixtures("row_by_row")
def test_a_sweep_stopped_at_any_event_ends_as_if_it_had_not_been(
    tmp_path: Path, name: str, undisturbed: Callable[[str], dict[str, Any]]
) -> None:
    scenario = SCENARIOS[name]
    for stop_at in range(1, 200, scenario.every):
        folder = tmp_path / str(stop_at)
        try:
            drive_scenario(folder, name, losses=scenario.losses, stop_at=stop_at)
        except Stopped:
            drive_scenario(folder, name, seed=stop_at)
            check_ended(folder, scenario.space, trials=scenario.trials)
            assert outcome_of(folder) == undisturbed(name)
        else:
            break
    assert stop_at > scenario.trials, "the sweep ended before it could be stopped"


@pytest.mark.usefixtures("row_by_row")
def test_a_sweep_that_is_stopped_again_and_again_ends_as_if_it_had_not_been(
    tmp_path: Path, undisturbed: Callable[[str], dict[str, Any]]
) -> None:
    for name, scenario in SCENARIOS.items():
        folder = tmp_path / name
        for stop_at in [1, 2, 3, 4, 5, 6, 5, 4, 5, 6, 7, 8, None]:
            try:
                drive_scenario(folder, name, stop_at=stop_at, seed=stop_at or 0)
                break
            except Stopped:
                pass
        check_ended(folder, scenario.space, trials=scenario.trials)
        assert outcome_of(folder) == undisturbed(name)


@pytest.mark.usefixtures("row_by_row")
def test_a_disk_that_fills_up_at_any_write_leaves_a_sweep_that_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, undisturbed: Callable[[str], dict[str, Any]]
) -> None:
    name = "prerequisites and failures"
    space, trials = SCENARIOS[name].space, SCENARIOS[name].trials
    for last in range(1, 400, 10):
        folder = tmp_path / str(last)
        prepare(folder, space)
        calls = iter(range(1, 10_000))
        refused: list[int] = []

        def refuse(
            file: int, calls: Iterator[int] = calls, last: int = last, refused: list[int] = refused
        ) -> None:
            if next(calls) >= last:
                refused.append(file)
                raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(os, "fsync", refuse)
        with suppress(OSError, StoreError):
            drive(folder, space, trials=trials, is_asked_to_stop=lambda refused=refused: bool(refused))
            break
        monkeypatch.setattr(os, "fsync", lambda file: None)
        assert not [path for path in folder.rglob(".*") if path.is_file()], "nothing is left behind"
        drive(folder, space, trials=trials)
        check_ended(folder, space, trials=trials)
        assert outcome_of(folder) == undisturbed(name)
    assert last > 3 * trials, "the sweep ended before the disk was full"


def test_a_clock_that_jumps_changes_no_result_and_no_time_is_negative(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, undisturbed: Callable[[str], dict[str, Any]]
) -> None:
    name = "random packs"
    chance = random.Random(0)
    real = time.time
    monkeypatch.setattr("time.time", lambda: real() + chance.choice([0, 0, 3600, -3600, 86400 * 365]))
    drive_scenario(tmp_path, name)
    check_ended(tmp_path, SCENARIOS[name].space, trials=SCENARIOS[name].trials)
    assert outcome_of(tmp_path) == undisturbed(name)
    assert all(row["seconds"] is None or row["seconds"] >= 0 for row in trials_of(tmp_path))
    assert busy_seconds(Store(tmp_path).rows("attempts")) >= 0


@pytest.mark.usefixtures("row_by_row")
def test_a_sweep_waits_for_room_on_a_full_disk_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, undisturbed: Callable[[str], dict[str, Any]]
) -> None:
    name = "prerequisites and failures"
    space, trials = SCENARIOS[name].space, SCENARIOS[name].trials
    waits: list[float] = []
    shown: list[str] = []
    monkeypatch.setattr("orchestrator.sweep.time.sleep", waits.append)
    monkeypatch.setattr(SilentProgress, "update", lambda self, tally: shown.append(describe(tally, None)))
    for first in range(1, 46, 3):
        folder = tmp_path / str(first)
        prepare(folder, space)
        calls = iter(range(1, 10_000))
        waits.clear()
        shown.clear()

        def refuse(file: int, calls: Iterator[int] = calls, first: int = first) -> None:
            if first <= next(calls) < first + 4:
                raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(os, "fsync", refuse)
        drive(folder, space, trials=trials)
        monkeypatch.setattr(os, "fsync", lambda file: None)
        pauses = sum(seconds > 0 for seconds in waits)  # a row of the job sleeps too, for no time
        assert sum("paused: cannot write" in line for line in shown) == pauses > 0
        assert "paused" not in shown[-1]
        check_ended(folder, space, trials=trials)
        assert outcome_of(folder) == undisturbed(name)
        tables = {str(path.relative_to(folder)) for path in folder.glob("tables/**/*") if path.is_file()}
        assert tables >= {file.path for file in Store(folder).files()}
        assert not list(folder.rglob(".*.????????")) + list(folder.rglob(".room"))


def _die_at_write(folder: Path, name: str, last: int, torn: int) -> None:
    """Drive a scenario in a process of its own that is gone at its `last` synced write."""
    calls = iter(range(1, 10_000))

    def die(file: int) -> None:
        if next(calls) == last:
            os.ftruncate(file, max(0, os.fstat(file).st_size - torn))
            os._exit(9)

    os.fsync = die
    worker_module._FLUSH_SECONDS = -1.0
    drive_scenario(folder, name)


@pytest.mark.parametrize("torn", [0, 3])
@pytest.mark.usefixtures("row_by_row")
def test_a_driver_killed_at_any_write_leaves_a_sweep_that_goes_on(
    tmp_path: Path, torn: int, undisturbed: Callable[[str], dict[str, Any]]
) -> None:
    # A real death: no handler runs, locks stay, and the write that was under way may be torn.
    name = "random with duplicates"
    space, trials = SCENARIOS[name].space, SCENARIOS[name].trials
    processes = multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload([__name__])
    for last in range(1 + torn, 400, 13):
        folder = tmp_path / str(last)
        prepare(folder, space)
        driver = processes.Process(target=_die_at_write, args=(folder, name, last, torn))
        driver.start()
        driver.join()
        assert driver.exitcode in (0, 9)
        drive(folder, space, trials=trials)
        check_ended(folder, space, trials=trials)
        assert outcome_of(folder) == undisturbed(name)
        if driver.exitcode == 0:
            break
    assert last > 3 * trials, "the sweep ended before it was killed"


def test_a_ledger_that_was_lost_is_not_taken_for_an_empty_one(tmp_path: Path) -> None:
    space = make_space({"x": Grid([1, 2])})
    drive(tmp_path, space, trials=2)
    ledger_path(tmp_path).unlink()
    with pytest.raises(StoreError, match=r"lacks trials that have ended: \[0, 1\]"):
        drive(tmp_path, space, trials=2)


def test_the_first_request_to_stop_is_asked_and_a_second_one_that_a_library_swallows_is_not_lost() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with stoppable() as interrupts:
        assert not interrupts.is_asked_to_stop()
        os.kill(os.getpid(), signal.SIGTERM)
        assert interrupts.is_asked_to_stop()
        with suppress(KeyboardInterrupt):  # as a callback of a library would
            os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(KeyboardInterrupt):
            interrupts.is_asked_to_stop()
    assert signal.getsignal(signal.SIGTERM) == before


@pytest.mark.usefixtures("row_by_row")
@pytest.mark.parametrize("max_pack", [1, 4])
def test_a_sweep_that_is_asked_to_stop_sees_what_runs_to_its_end_and_goes_on_later(
    tmp_path: Path, max_pack: int
) -> None:
    space = make_space({"x": Grid(list(range(1, 41)))})
    asked: list[bool] = []

    def is_asked_to_stop() -> bool:
        asked.append(bool(Store(tmp_path).rows("trials")))
        return asked[-1]

    driven = drive(tmp_path, space, trials=40, max_pack=max_pack, is_asked_to_stop=is_asked_to_stop)
    assert "asked to" in driven.tally.stopping
    ended = [row["x"] for row in trials_of(tmp_path)]
    assert 0 < len(ended) < 40
    begun = {row["x"] for order in driven.pool.orders for row in (each.params for each in order.rows)}
    assert set(ended) == begun
    drive(tmp_path, space, trials=40)
    check_ended(tmp_path, space, trials=40)
    assert all(count == 1 for count in Counter(params.x for params in fake_job.RAN).values())

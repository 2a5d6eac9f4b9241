"""Proposals: each grid cell once, the same again after any restart, and what the study remembers."""

import errno
import itertools
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import optuna
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from optuna.trial import TrialState

from jobs.spec import Status
from orchestrator.sampler import OptunaSampler, Proposal
from orchestrator.study import Ended
from search_spaces.base import Float, Grid, Int, Objective, Sampler, Space
from storage.durable import StoreError

PARAMETERS = {
    "layer": Grid([3, 5, 7]),
    "dose": Float(low=-2.0, high=2.0),
    "radius": Float(low=0.01, high=100.0, log=True),
    "count": Int(low=1, high=9),
    "mode": Grid(["add", "ablate"]),
}
CELLS = {"layer": Grid([3, 5, 7]), "count": Int(low=-1, high=1), "mode": Grid(["add", "ablate"])}
ADAPTIVE: tuple[Sampler, ...] = ("tpe", "nsga2")
FREE: tuple[Sampler, ...] = ("random", *ADAPTIVE)


def make_space(parameters: Mapping[str, Any] = PARAMETERS, *, sampler: Sampler = "random") -> Space:
    return Space(
        description="numbers",
        job="tests.fake_job",
        parameters=parameters,
        objectives=[
            Objective(metric="gain", direction="maximize"),
            Objective(metric="harm", direction="minimize"),
        ],
        sampler=sampler,
        trials=None if sampler == "grid" else 100,
    )


def open_sampler(folder: Path, name: Sampler, *, seed: int = 0, space: Space | None = None) -> OptunaSampler:
    folder.mkdir(exist_ok=True)
    journal = folder / "optuna.journal"
    return Synced(space or make_space(), name=name, seed=seed, journal=journal, study="study")


class Synced(OptunaSampler):
    """Brings everything to disk at once."""

    def ask(self, fixed: Mapping[str, Any] | None = None) -> Proposal:
        proposal = super().ask(fixed)
        self.flush()
        return proposal

    def tell(self, trial: int, status: Status, values: Sequence[float] | None) -> None:
        super().tell(trial, status, values)
        self.flush()


def load_study(folder: Path) -> optuna.Study:
    backend = optuna.storages.journal.JournalFileBackend(str(folder / "optuna.journal"))
    return optuna.load_study(study_name="study", storage=optuna.storages.JournalStorage(backend))


def values_of(params: Mapping[str, Any]) -> list[float]:
    """A landscape for adaptive samplers to learn from."""
    return [params["dose"] * params["layer"], math.log(params["radius"]) ** 2 + params["count"]]


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    # These tests survive the death of a process, not of a machine.
    monkeypatch.setattr(os, "fsync", lambda file: None)


def test_a_grid_proposes_each_cell_once_with_the_last_parameter_varying_fastest(tmp_path: Path) -> None:
    space = make_space(CELLS, sampler="grid")
    sampler = open_sampler(tmp_path, "grid", space=space)
    proposals = [sampler.ask() for _ in range(18)]
    assert [proposal.trial for proposal in proposals] == list(range(18))
    cells = itertools.product([3, 5, 7], [-1, 0, 1], ["add", "ablate"])
    assert [tuple(proposal.params.values()) for proposal in proposals] == list(cells)
    assert all(list(proposal.params) == list(CELLS) for proposal in proposals)


@pytest.mark.parametrize("half", [1, 7, 17])
def test_a_grid_goes_on_where_it_was_when_the_study_is_reopened(tmp_path: Path, half: int) -> None:
    space = make_space(CELLS, sampler="grid")
    first = open_sampler(tmp_path, "grid", space=space)
    before = [first.ask() for _ in range(half)]
    for proposal in before[::2]:
        first.tell(proposal.trial, Status.COMPLETED, [1.0, 2.0])
    second = open_sampler(tmp_path, "grid", space=space)
    after = [second.ask() for _ in range(18 - half)]
    cells = itertools.product([3, 5, 7], [-1, 0, 1], ["add", "ablate"])
    assert [tuple(proposal.params.values()) for proposal in [*before, *after]] == list(cells)


def test_a_grid_is_walked_in_order_whatever_a_pack_would_hold_fixed(tmp_path: Path) -> None:
    space = make_space(CELLS, sampler="grid")
    sampler = open_sampler(tmp_path, "grid", space=space)
    first = sampler.ask()
    assert sampler.ask({"mode": first.params["mode"]}).params["mode"] != first.params["mode"]


@pytest.mark.parametrize("name", FREE)
def test_proposals_have_the_types_and_bounds_of_the_space(tmp_path: Path, name: Sampler) -> None:
    sampler = open_sampler(tmp_path, name)
    for _ in range(30):
        proposal = sampler.ask()
        params = proposal.params
        assert {key: type(value) for key, value in params.items()} == {
            "layer": int,
            "dose": float,
            "radius": float,
            "count": int,
            "mode": str,
        }
        assert params["layer"] in (3, 5, 7)
        assert -2 <= params["dose"] <= 2
        assert 0.01 <= params["radius"] <= 100
        assert 1 <= params["count"] <= 9
        sampler.tell(proposal.trial, Status.COMPLETED, values_of(params))


def test_random_proposals_follow_from_seed_and_number_alone(tmp_path: Path) -> None:
    told, untold = open_sampler(tmp_path / "told", "random"), open_sampler(tmp_path / "untold", "random")
    other = open_sampler(tmp_path / "other", "random", seed=1)
    first, second, third = [], [], []
    for _ in range(8):
        proposal = told.ask()
        told.tell(proposal.trial, Status.COMPLETED, [0.0, 0.0])
        first.append(proposal.params)
        second.append(untold.ask().params)
        third.append(other.ask().params)
    assert first == second
    assert not any(mine == others for mine, others in zip(first, third, strict=True))
    assert len({params["dose"] for params in first}) == 8


def run(folder: Path, name: Sampler, *, restarts: set[int], steps: int) -> list[Proposal]:
    """Ask and tell as a driver with two workers would, with new drivers at some of the steps."""
    sampler = open_sampler(folder, name)
    proposals: list[Proposal] = []
    for step in range(steps):
        if step in restarts:
            sampler = open_sampler(folder, name)
        fixed = {"layer": proposals[-1].params["layer"]} if step % 4 else {}
        proposals.append(sampler.ask(fixed))
        if step >= 2:
            ended = proposals[step - 2]
            values = None if ended.params["count"] == 5 else values_of(ended.params)
            status = Status.COMPLETED if values is not None else Status.INFEASIBLE
            sampler.tell(ended.trial, Status.FAILED if ended.params["mode"] == "add" else status, values)
    return proposals


@pytest.mark.parametrize("name", FREE)
def test_proposals_after_a_restart_are_those_without_one(tmp_path: Path, name: Sampler) -> None:
    # TPE models from the 11th trial on; the genetic sampler has its second generation after 50.
    steps = 64 if name == "nsga2" else 24
    undisturbed = run(tmp_path / "undisturbed", name, restarts=set(), steps=steps)
    assert len({proposal.params["radius"] for proposal in undisturbed}) > steps // 2
    assert run(tmp_path / "once", name, restarts={3 * steps // 4}, steps=steps) == undisturbed
    assert (
        run(tmp_path / "often", name, restarts=set(range(0, steps, steps // 6)), steps=steps) == undisturbed
    )


@pytest.mark.parametrize("name", ADAPTIVE)
def test_an_adaptive_sampler_proposes_otherwise_when_it_was_told_otherwise(
    tmp_path: Path, name: Sampler
) -> None:
    samplers = [open_sampler(tmp_path / str(sign), name, space=make_space()) for sign in (1, -1)]
    last: list[list[dict[str, Any]]] = [[], []]
    for _ in range(60):
        for sampler, sign, params in zip(samplers, (1, -1), last, strict=True):
            proposal = sampler.ask()
            params.append(proposal.params)
            sampler.tell(
                proposal.trial, Status.COMPLETED, [sign * value for value in values_of(proposal.params)]
            )
    assert last[0][0] == last[1][0]
    assert last[0] != last[1]


@pytest.mark.parametrize("name", FREE)
def test_parameters_that_are_held_fixed_are_held_and_the_others_still_vary(
    tmp_path: Path, name: Sampler
) -> None:
    sampler = open_sampler(tmp_path, name)
    held = {"layer": 5, "mode": "ablate", "dose": 0.25}
    doses = set()
    for step in range(26):
        proposal = sampler.ask(held if step % 2 else None)
        if step % 2:
            assert {key: proposal.params[key] for key in held} == held
        doses.add(proposal.params["radius"])
        sampler.tell(proposal.trial, Status.COMPLETED, values_of(proposal.params))
    assert len(doses) == 26


@pytest.mark.parametrize("name", FREE)
@pytest.mark.parametrize("shared", [(), ("layer", "mode")])
def test_a_pack_is_asked_for_together_with_what_it_shares(
    tmp_path: Path, name: Sampler, shared: Sequence[str]
) -> None:
    sampler = open_sampler(tmp_path, name)
    number = 0
    for _ in range(4):
        pack = sampler.ask_together(8, shared)
        assert [proposal.trial for proposal in pack] == list(range(number, number + 8))
        assert len({tuple(proposal.params.items()) for proposal in pack}) == 8
        assert {proposal.seen for proposal in pack} == {number}
        number += 8
        for proposal in pack:
            assert proposal.params.keys() == PARAMETERS.keys()
            assert all(proposal.params[key] == pack[0].params[key] for key in shared)
            assert set(proposal.fixed) == (set(shared) if proposal is not pack[0] else set())
        for proposal in pack[::-1]:
            sampler.tell(proposal.trial, Status.COMPLETED, values_of(proposal.params))
    found = load_study(tmp_path).get_trials(deepcopy=False)
    assert [trial.state for trial in found] == [TrialState.COMPLETE] * 32
    assert list(found[-1].params) == list(PARAMETERS)


def test_a_pack_larger_than_a_space_repeats_configurations(tmp_path: Path) -> None:
    space = make_space({"mode": Grid(["add", "ablate"]), "layer": Grid([3])})
    sampler = open_sampler(tmp_path, "tpe", space=space)
    for _ in range(2):
        pack = sampler.ask_together(12, ())
        assert {proposal.params["mode"] for proposal in pack} == {"add", "ablate"}
        assert {proposal.params["layer"] for proposal in pack} == {3}
        for proposal in pack:
            sampler.tell(proposal.trial, Status.COMPLETED, [1.0, 2.0])


def test_a_proposal_says_how_many_results_were_known(tmp_path: Path) -> None:
    sampler = open_sampler(tmp_path, "random")
    assert sampler.ask().seen == 0
    assert sampler.ask().seen == 0
    sampler.tell(0, Status.COMPLETED, [1.0, 1.0])
    assert sampler.ask().seen == 1
    sampler.tell(1, Status.FAILED, None)
    sampler.tell(2, Status.INFEASIBLE, None)
    assert sampler.ask().seen == 3
    again = open_sampler(tmp_path, "random")
    for trial in range(3):
        again.tell(trial, Status.COMPLETED, [1.0, 1.0])
    assert again.ask().seen == 3, "a trial that is told again is no further result"


def test_telling_again_changes_nothing(tmp_path: Path) -> None:
    sampler = open_sampler(tmp_path, "random")
    for _ in range(3):
        sampler.ask()
    sampler.tell(0, Status.COMPLETED, [1.0, 2.0])
    sampler.tell(1, Status.INFEASIBLE, None)
    sampler.tell(2, Status.FAILED, None)
    before = [(trial.state, trial.values, trial.system_attrs) for trial in load_study(tmp_path).trials]
    content = (tmp_path / "optuna.journal").read_bytes()
    for again in (sampler, open_sampler(tmp_path, "random")):
        for trial, status in itertools.product(range(3), Status):
            again.tell(trial, status, [3.0, 4.0] if status == Status.COMPLETED else None)
    assert [
        (trial.state, trial.values, trial.system_attrs) for trial in load_study(tmp_path).trials
    ] == before
    assert (tmp_path / "optuna.journal").read_bytes().startswith(content)


def test_an_infeasible_trial_is_pruned_with_a_constraint_and_a_failed_one_fails(tmp_path: Path) -> None:
    sampler = open_sampler(tmp_path, "tpe")
    for _ in range(4):
        sampler.ask()
    sampler.tell(0, Status.COMPLETED, [1.0, 2.0])
    sampler.tell(1, Status.INFEASIBLE, None)
    sampler.tell(2, Status.FAILED, None)
    sampler.tell(3, Status.INFEASIBLE, [3.0, 4.0])
    completed, infeasible, failed, measured = load_study(tmp_path).trials
    assert (completed.state, completed.values) == (TrialState.COMPLETE, [1.0, 2.0])
    assert infeasible.state == TrialState.PRUNED
    assert max(infeasible.constraints.values()) > 0
    assert failed.state == TrialState.FAIL
    assert (measured.state, measured.values) == (TrialState.COMPLETE, [3.0, 4.0])
    assert max(measured.constraints.values()) > 0
    assert load_study(tmp_path).best_trials == [completed]
    assert not completed.constraints
    assert not failed.constraints


def test_an_infeasible_trial_whose_driver_died_between_constraint_and_state_can_be_told(
    tmp_path: Path,
) -> None:
    sampler = open_sampler(tmp_path, "random")
    sampler.ask()
    sampler.tell(0, Status.INFEASIBLE, None)
    journal = tmp_path / "optuna.journal"
    lines = journal.read_bytes().splitlines(keepends=True)
    journal.write_bytes(b"".join(lines[:-1]))
    [trial] = load_study(tmp_path).trials
    assert trial.state == TrialState.RUNNING
    assert trial.constraints
    open_sampler(tmp_path, "random").tell(0, Status.INFEASIBLE, None)
    [trial] = load_study(tmp_path).trials
    assert trial.state == TrialState.PRUNED


def test_the_study_opens_with_optuna_alone_and_names_its_objectives(tmp_path: Path) -> None:
    sampler = open_sampler(tmp_path, "tpe")
    proposal = sampler.ask()
    sampler.tell(proposal.trial, Status.COMPLETED, [1.0, 2.0])
    study = load_study(tmp_path)
    assert [direction.name for direction in study.directions] == ["MAXIMIZE", "MINIMIZE"]
    assert study.metric_names == ["gain", "harm"]
    [trial] = study.best_trials
    assert (trial.params, trial.values) == (proposal.params, [1.0, 2.0])
    distributions = trial.distributions
    assert distributions["radius"] == optuna.distributions.FloatDistribution(0.01, 100.0, log=True)
    assert distributions["count"] == optuna.distributions.IntDistribution(1, 9)
    assert distributions["mode"] == optuna.distributions.CategoricalDistribution(["add", "ablate"])


@pytest.mark.parametrize(
    ("name", "before"),
    [("random", 2), ("tpe", 12), ("nsga2", 12), ("nsga2", 50), ("nsga2", 100), ("grid", 12)],
)
def test_a_pack_that_is_cut_anywhere_is_dropped_and_proposed_again(
    tmp_path: Path, name: Sampler, before: int
) -> None:
    # A driver that dies while it asks leaves some of the pack, the last one with some of its parameters.
    space = make_space(CELLS, sampler="grid") if name == "grid" else make_space()
    sampler = open_sampler(tmp_path, name, space=space)
    asked, ended = {}, {}
    for number in range(before):
        asked[number] = sampler.ask().params
        ended[number] = Ended(Status.COMPLETED, [float(number), float(-number % 5)])
        sampler.tell(number, *ended[number])
    journal = tmp_path / "optuna.journal"
    start = journal.stat().st_size
    pack = sampler.ask_together(4, ())
    sampler.flush()
    content = journal.read_bytes()
    for cut in (*range(start, len(content), 197), len(content)):
        journal.write_bytes(content[:cut])
        again = open_sampler(tmp_path, name, space=space)
        if left := again.unrecorded(asked):
            assert left == list(range(before, before + len(left)))
            again.restate(asked, ended)
        assert again.unrecorded(asked) == []
        assert again.disagreements(asked, ended) == {}
        assert again.ask_together(4, ()) == pack


def test_a_study_that_is_written_anew_keeps_the_parents_of_its_generations(tmp_path: Path) -> None:
    def drive(sampler: OptunaSampler, trials: int) -> list[dict[str, Any]]:
        found = []
        for _ in range(trials):
            proposal = sampler.ask()
            found.append(proposal.params)
            ended[proposal.trial] = Ended(Status.COMPLETED, values_of(proposal.params))
            sampler.tell(proposal.trial, *ended[proposal.trial])
        return found

    ended: dict[int, Ended] = {}
    whole = drive(OptunaSampler(make_space(), name="nsga2", seed=0, journal=tmp_path / "a", study="a"), 170)
    ended.clear()
    sampler = OptunaSampler(make_space(), name="nsga2", seed=0, journal=tmp_path / "b", study="b")
    parts = drive(sampler, 130)
    sampler.restate(dict(enumerate(parts)), ended)
    assert parts + drive(sampler, 40) == whole


@settings(max_examples=30)
@given(
    low=st.floats(-1e6, 1e6), width=st.floats(0, 1e6), first=st.integers(-50, 50), count=st.integers(0, 50),
    seed=st.integers(0, 2**40),
)  # fmt: skip
def test_any_bounds_and_any_seed_are_kept(
    tmp_path_factory: pytest.TempPathFactory, low: float, width: float, first: int, count: int, seed: int
) -> None:
    space = make_space({"a": Float(low=low, high=low + width), "b": Int(low=first, high=first + count)})
    sampler = open_sampler(tmp_path_factory.mktemp("study"), "random", seed=seed, space=space)
    for _ in range(3):
        params = sampler.ask().params
        assert low <= params["a"] <= low + width
        assert first <= params["b"] <= first + count


def test_a_trial_costs_one_sync_for_asking_and_one_for_telling(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[int] = []
    monkeypatch.setattr(os, "fsync", synced.append)
    sampler = open_sampler(tmp_path, "random")
    before = len(synced)
    proposal = sampler.ask()
    sampler.tell(proposal.trial, Status.COMPLETED, [1.0, 2.0])
    sampler.flush()
    assert len(synced) - before == 2


def test_a_disk_that_refuses_loses_nothing_that_waits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sampler = open_sampler(tmp_path, "random")
    sampler.ask()
    before = (tmp_path / "optuna.journal").read_bytes()

    def refuse(file: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as full:
        full.setattr(os, "fsync", refuse)
        with pytest.raises(StoreError, match="No space left"):
            sampler.ask()
        assert (tmp_path / "optuna.journal").read_bytes() == before
    sampler.flush()
    assert [trial.number for trial in load_study(tmp_path).trials] == [0, 1]

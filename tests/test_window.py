"""What a sampler is shown of a long study: enough to go on, the same after a stop, and no more."""

import random
from collections import deque
from pathlib import Path
from typing import Any

import optuna
import pytest
from hypothesis import given
from hypothesis import strategies as st
from optuna.samplers import BaseSampler, RandomSampler
from optuna.trial import FrozenTrial, TrialState, create_trial

from jobs.spec import Status
from orchestrator import window as window_module
from orchestrator.sampler import OptunaSampler, Proposal
from orchestrator.window import Window, WindowedSampler, latest_generations, shown
from search_spaces.base import Float
from tests.sweeps import make_space

DIRECTIONS = ("maximize", "minimize")
SPACE = make_space({"y": Float(low=0, high=1)}, fixed={"x": 1}, sampler="tpe", trials=100)


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(window_module, "LATEST", 8)
    monkeypatch.setattr(window_module, "BEST", 3)


def trial_of(number: int, values: list[float] | None) -> FrozenTrial:
    state = TrialState.RUNNING if values is None else TrialState.COMPLETE
    trial = create_trial(state=state, values=values)
    trial.number = number
    return trial


def is_dominated(values: list[float] | None, by: list[list[float] | None]) -> bool:
    assert values is not None
    up, down = values
    return any(other is not None and other != values and other[0] >= up and other[1] <= down for other in by)


objectives = st.lists(st.integers(0, 5).map(float), min_size=2, max_size=2)


@given(st.lists(st.none() | objectives, max_size=40))
def test_the_latest_are_shown_and_the_best_and_the_running_of_those_before(
    found: list[list[float] | None],
) -> None:
    trials = [trial_of(number, values) for number, values in enumerate(found)]
    window = Window(DIRECTIONS)
    for trial in trials:
        if trial.state == TrialState.COMPLETE:
            window.add({trial.number: trial.values})
    shown = [trial.number for trial in window.of(trials)]
    assert shown == sorted(set(shown))
    ended = [number for number, values in enumerate(found) if values is not None]
    running = [number for number, values in enumerate(found) if values is None]
    assert set(ended[-window_module.LATEST :]) | set(running) <= set(shown)
    extra = set(shown) - set(ended[-window_module.LATEST :]) - set(running)
    assert len(extra) <= window_module.BEST
    before = [number for number in ended if number not in ended[-window_module.LATEST :]]
    front = [number for number in before if not is_dominated(found[number], found)]
    assert extra == set(front) or len(extra) == window_module.BEST < len(front)
    assert not any(is_dominated(found[number], found) for number in extra)


@given(st.lists(objectives, min_size=1, max_size=30), st.randoms(use_true_random=False))
def test_the_window_depends_on_what_was_told_and_not_on_when(
    found: list[list[float]], chance: random.Random
) -> None:
    trials = [trial_of(number, values) for number, values in enumerate(found)]
    at_once, one_by_one = Window(DIRECTIONS), Window(DIRECTIONS)
    at_once.add(dict(enumerate(found)))
    for number in chance.sample(range(len(found)), len(found)):
        one_by_one.add({number: found[number]})
    assert [trial.number for trial in at_once.of(trials)] == [trial.number for trial in one_by_one.of(trials)]


class Spy(RandomSampler):
    """Notes what it could see."""

    def __init__(self) -> None:
        super().__init__(seed=0)
        self.seen: list[int] = []

    def sample_independent(self, study: Any, trial: Any, name: str, distribution: Any) -> Any:
        self.seen = [trial.number for trial in study.get_trials(deepcopy=False)]
        return super().sample_independent(study, trial, name, distribution)


def test_a_sampler_sees_all_of_a_short_study_and_the_window_of_a_long_one() -> None:
    spy, window = Spy(), Window(["maximize"])
    sampler = WindowedSampler(spy, lambda study: shown(study, window))
    study = optuna.create_study(direction="maximize", sampler=sampler)
    for number in range(30):
        trial = study.ask()
        value = trial.suggest_float("y", 0, 1)
        assert len(spy.seen) <= window_module.LATEST + window_module.BEST + 1
        assert spy.seen[-1] == number
        assert number >= window_module.LATEST or spy.seen == list(range(number + 1))
        study.tell(trial, value)
        window.add({number: [value]})
    assert len(spy.seen) > window_module.LATEST


def drive_sampler(sampler: OptunaSampler, trials: int) -> list[dict[str, Any]]:
    """Three run at any time, and every seventh breaks a constraint."""
    found = []
    running: deque[Proposal] = deque()
    for _ in range(trials):
        proposal = sampler.ask()
        found.append(proposal.params)
        running.append(proposal)
        if len(running) > 2:
            told = running.popleft()
            y = told.params["y"]
            status = Status.COMPLETED if told.trial % 7 else Status.INFEASIBLE
            sampler.tell(told.trial, status, [y, (y - 0.7) ** 2] if told.trial % 7 else None)
    sampler.flush()
    return found


@pytest.mark.parametrize(("name", "trials"), [("tpe", 40), ("nsga2", 130)])
def test_a_driver_that_goes_on_proposes_what_the_first_one_would_have(
    tmp_path: Path, name: str, trials: int
) -> None:
    whole, parts = opened(tmp_path / "whole", name), opened(tmp_path / "parts", name)
    proposed, told = [], deque[tuple[int, float]]()
    for number in range(trials):
        if number == trials // 2:
            parts.flush()
            parts = opened(tmp_path / "parts", name)
        first, second = whole.ask(), parts.ask()
        proposed.append((first.params, second.params))
        told.append((number, first.params["y"]))
        if len(told) > 2:
            trial, y = told.popleft()
            for sampler in (whole, parts):
                sampler.tell(trial, Status.COMPLETED, [y, (y - 0.7) ** 2])
    assert all(one == other for one, other in proposed)


def opened(path: Path, name: str) -> OptunaSampler:
    return OptunaSampler(SPACE, name=name, seed=3, journal=path, study="study")


def bare(inner: BaseSampler, show: object) -> BaseSampler:
    """What the sampler is without a window."""
    return inner


def test_below_its_length_the_window_changes_no_proposal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(window_module, "LATEST", 1000)
    ours = drive_sampler(opened(tmp_path / "ours", "tpe"), 30)
    monkeypatch.setattr("orchestrator.sampler.WindowedSampler", bare)
    assert drive_sampler(opened(tmp_path / "plain", "tpe"), 30) == ours


def test_what_nsga2_is_shown_changes_no_proposal_and_is_no_more_than_it_takes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = []

    def noted(study: optuna.Study) -> optuna.Study:
        found = latest_generations(study)
        sizes.append(len(found.get_trials(deepcopy=False)))
        return found

    monkeypatch.setattr("orchestrator.sampler.latest_generations", noted)
    ours = drive_sampler(opened(tmp_path / "ours", "nsga2"), 500)
    # Two generations of 50 complete trials and of infeasible ones, and the parents of both and of the next.
    assert max(sizes) < 2 * 50 * 7 / 6 + 3 * 50 + 5
    monkeypatch.setattr("orchestrator.sampler.WindowedSampler", bare)
    assert drive_sampler(opened(tmp_path / "plain", "nsga2"), 500) == ours

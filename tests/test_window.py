"""What a sampler is shown of a long study: enough to go on, the same after a stop, and no more."""

import random
from pathlib import Path
from typing import Any

import optuna
import pytest
from hypothesis import given
from hypothesis import strategies as st
from optuna.samplers import BaseSampler, RandomSampler, TPESampler
from optuna.trial import FrozenTrial, TrialState, create_trial

from jobs.spec import Status
from orchestrator import window as window_module
from orchestrator.sampler import OptunaSampler
from orchestrator.window import Window, WindowedSampler
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
    study = optuna.create_study(direction="maximize", sampler=WindowedSampler(spy, window))
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
    found = []
    for _ in range(trials):
        proposal = sampler.ask()
        found.append(proposal.params)
        y = proposal.params["y"]
        sampler.tell(proposal.trial, Status.COMPLETED, [y, (y - 0.7) ** 2])
    sampler.flush()
    return found


def test_a_driver_that_goes_on_proposes_what_the_first_one_would_have(tmp_path: Path) -> None:
    def opened(name: str) -> OptunaSampler:
        return OptunaSampler(SPACE, name="tpe", seed=3, journal=tmp_path / name, study="study")

    whole = drive_sampler(opened("whole"), 40)
    parts = drive_sampler(opened("parts"), 17) + drive_sampler(opened("parts"), 23)
    assert parts == whole


def test_below_its_length_the_window_changes_no_proposal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(window_module, "LATEST", 1000)
    ours = drive_sampler(
        OptunaSampler(SPACE, name="tpe", seed=3, journal=tmp_path / "study", study="study"), 30
    )

    def bare(inner: BaseSampler, window: Window) -> BaseSampler:
        assert isinstance(inner, TPESampler)
        return inner

    monkeypatch.setattr("orchestrator.sampler.WindowedSampler", bare)
    plain = drive_sampler(
        OptunaSampler(SPACE, name="tpe", seed=3, journal=tmp_path / "plain", study="study"), 30
    )
    assert ours == plain

"""What a sampler is shown of a long study, so that a proposal costs the same however long it has become."""

from collections.abc import Callable, Container, Mapping, Sequence
from typing import Any

import numpy as np
import optuna
from optuna.distributions import BaseDistribution
from optuna.samplers import BaseSampler, NSGAIISampler
from optuna.trial import FrozenTrial, TrialState

from storage.front import front

GENERATION = NSGAIISampler._get_generation_key()
"""Attribute of a trial that says which generation it is of."""
PARENTS = NSGAIISampler._get_parent_cache_key_prefix()
"""Attributes of a study that begin so name the trials that were chosen for a generation."""
LATEST = 1000
"""Trials that have ended and are shown because they are the latest."""
BEST = 200
"""Earlier ones that are shown because nothing dominates them."""


class Window:
    """The latest trials of a study, and the front of all that have ended.

    It depends on nothing but which trials were told, so that a driver that goes on sees the same.

    Args:
        directions: Of the objectives.
    """

    def __init__(self, directions: Sequence[str]) -> None:
        self._directions = directions
        self._front: dict[int, Sequence[float]] = {}

    def add(self, ended: Mapping[int, Sequence[float]]) -> None:
        """Feasible trials have ended.

        Args:
            ended: Trial -> its objectives.
        """
        found = {**self._front, **ended}
        kept = front(np.array(list(found.values()), dtype=float), self._directions)
        self._front = {
            number: values for (number, values), stays in zip(found.items(), kept, strict=True) if stays
        }

    def of(self, trials: Sequence[FrozenTrial]) -> list[FrozenTrial]:
        """The trials of a study that are shown: the latest, and before them the best and those that run.

        Args:
            trials: All of them, in the order of their numbers.
        """
        first, ended = len(trials), 0
        while first and ended < LATEST:
            first -= 1
            ended += trials[first].state.is_finished()
        best = self._best(first)
        earlier = [
            trial for trial in trials[:first] if trial.number in best or trial.state == TrialState.RUNNING
        ]
        return [*earlier, *trials[first:]]

    def _best(self, first: int) -> set[int]:
        """Trials of the front before a number, evenly spread along the first objective if there are many."""
        earlier = [number for number in self._front if number < first]
        order = sorted(earlier, key=lambda number: (self._front[number][0], number))
        if len(order) <= BEST:
            return set(order)
        return {order[place] for place in np.linspace(0, len(order) - 1, BEST).astype(int)}


class _Shown(optuna.Study):
    """A study that has the trials of a window and no others, for its sampler."""

    def __init__(self, study: optuna.Study, trials: Sequence[FrozenTrial]) -> None:
        self.__dict__.update(study.__dict__)
        self._trials = trials

    def _get_trials(
        self, deepcopy: bool = True, states: Container[TrialState] | None = None, use_cache: bool = False
    ) -> list[FrozenTrial]:
        """As every sampler of Optuna asks."""
        return [trial for trial in self._trials if states is None or trial.state in states]


def shown(study: optuna.Study, window: Window) -> optuna.Study:
    """The study as TPE is shown it: all of a short one, the window of a long one."""
    trials = study._storage.get_all_trials(study._study_id, deepcopy=False)
    return study if len(trials) < LATEST else _Shown(study, window.of(trials))


def latest_generations(study: optuna.Study) -> optuna.Study:
    """The study as NSGA-II is shown it: all that it takes a child from, so that its proposals stay the same.

    That is the latest generation of which a trial is complete, the one before it, and the parents that were
    chosen for both. A later trial is of no earlier generation.
    """
    trials = study._storage.get_all_trials(study._study_id, deepcopy=False)
    first, latest = len(trials), None
    while first and (latest is None or trials[first - 1].system_attrs.get(GENERATION, latest) >= latest - 1):
        first -= 1
        if latest is None and trials[first].state == TrialState.COMPLETE:
            latest = trials[first].system_attrs.get(GENERATION)
    parents = _parents(study, latest or 0)
    if latest and not parents:  # they were chosen by nobody, and are chosen from all
        return study
    earlier = [trial for trial in trials[:first] if trial._trial_id in parents]
    return _Shown(study, [*earlier, *trials[first:]])


def _parents(study: optuna.Study, latest: int) -> set[int]:
    """Ids of those chosen for a generation and its neighbours; none if none were chosen for itself."""
    attributes = study._storage.get_study_system_attrs(study._study_id)
    near = [attributes.get(f"{PARENTS}{generation}", ()) for generation in (latest, latest - 1, latest + 1)]
    return {trial_id for ids in near for trial_id in ids} if near[0] else set()


class WindowedSampler(BaseSampler):
    """A sampler that is shown a part of its study.

    Args:
        sampler: Who proposes.
        show: Gives the study as it is shown.
    """

    def __init__(self, sampler: BaseSampler, show: Callable[[optuna.Study], optuna.Study]) -> None:
        self._sampler = sampler
        self._show = show
        self._seen: tuple[int, optuna.Study] | None = None

    def _shown(self, study: optuna.Study, trial: FrozenTrial) -> optuna.Study:
        """The study with what is shown of it, looked at once for each proposal."""
        if trial.number < LATEST:
            return study
        if self._seen is None or self._seen[0] != trial.number:
            self._seen = trial.number, self._show(study)
        return self._seen[1]

    def infer_relative_search_space(
        self, study: optuna.Study, trial: FrozenTrial
    ) -> dict[str, BaseDistribution]:
        """As the sampler does."""
        return self._sampler.infer_relative_search_space(self._shown(study, trial), trial)

    def sample_relative(
        self, study: optuna.Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """As the sampler does."""
        return self._sampler.sample_relative(self._shown(study, trial), trial, search_space)

    def sample_independent(
        self, study: optuna.Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        """As the sampler does."""
        return self._sampler.sample_independent(
            self._shown(study, trial), trial, param_name, param_distribution
        )

    def before_trial(self, study: optuna.Study, trial: FrozenTrial) -> None:
        """As the sampler does."""
        self._sampler.before_trial(self._shown(study, trial), trial)

    def after_trial(
        self, study: optuna.Study, trial: FrozenTrial, state: TrialState, values: Sequence[float] | None
    ) -> None:
        """As the sampler does."""
        self._sampler.after_trial(study, trial, state, values)

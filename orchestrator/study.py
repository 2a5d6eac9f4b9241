"""A sweep's study as Optuna keeps it: opened, compared with what is kept, written anew from that."""

from collections.abc import Container, Mapping, Sequence
from typing import Any, NamedTuple, cast

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.storages import BaseStorage, JournalStorage, RDBStorage
from optuna.storages.journal import BaseJournalBackend
from optuna.trial import TrialState

from jobs.errors import SpecError, first_line
from jobs.spec import Status
from orchestrator.journal import Journal
from orchestrator.window import GENERATION, PARENTS
from search_spaces.base import Domain, Float, Grid, Int, Space

INFEASIBLE = {"infeasible": 1.0}
"""Constraint of a trial that broke one, or has not all its objectives."""


class Ended(NamedTuple):
    """How a trial has ended.

    Attributes:
        status: Failed teaches the sampler nothing, infeasible that a constraint said no.
        values: The objectives, all finite; None if not all are defined, which only a completed trial may not
            have.
    """

    status: Status
    values: Sequence[float] | None = None


class OwnAttributes(NamedTuple):
    """What a sampler has noted in its study.

    Attributes:
        trials: Number of a trial, as text -> its attributes.
        parents: Key of the study -> numbers of the trials that NSGA-II chose for a generation.
    """

    trials: dict[str, Any]
    parents: dict[str, list[int]]


def in_file(journal: Journal | None) -> BaseStorage:
    """Optuna's storage in a journal file."""
    return JournalStorage(cast(BaseJournalBackend, journal))


def open_database(url: str) -> BaseStorage:
    """Optuna's storage in a PostgreSQL database. Raises SpecError if that cannot be used."""
    try:
        return RDBStorage(url, engine_kwargs={"pool_pre_ping": True})
    except ImportError as error:
        raise SpecError(
            "storage needs the package psycopg; install the extra `postgres` (pip install '.[postgres]')"
        ) from error
    except Exception as error:  # whatever SQLAlchemy and the driver make of a wrong address
        why = first_line(error.__cause__ or error)
        raise SpecError(
            f"storage={url!r} cannot be used: {why}; give postgresql://user@host:port/database, with the "
            "password in PGPASSWORD or ~/.pgpass, and a user who may make tables there"
        ) from error


def open_study(storage: BaseStorage, name: str, space: Space) -> optuna.Study:
    """The study of a name, made if it is not there."""
    study = optuna.create_study(
        storage=storage,
        study_name=name,
        directions=[objective.direction for objective in space.objectives],
        load_if_exists=True,
    )
    study.set_metric_names([objective.metric for objective in space.objectives])
    return study


def distributions_of(space: Space) -> dict[str, BaseDistribution]:
    """The space's parameters as Optuna knows them."""
    return {name: _distribution(domain) for name, domain in space.parameters.items()}


def _distribution(domain: Domain) -> BaseDistribution:
    match domain:
        case Float():
            return FloatDistribution(domain.low, domain.high, log=domain.log)
        case Int():
            return IntDistribution(domain.low, domain.high, log=domain.log)
        case Grid():
            return CategoricalDistribution(list(domain.values))


def state_of(end: Ended) -> TrialState:
    """What Optuna calls it."""
    if end.status == Status.FAILED:
        return TrialState.FAIL
    return TrialState.PRUNED if end.values is None else TrialState.COMPLETE


def disagreements(
    study: optuna.Study, asked: Mapping[int, Mapping[str, Any]], ended: Mapping[int, Ended]
) -> dict[int, str]:
    """Where the study says something else than what is kept, as no death of a driver leaves it.

    A trial that has ended and was not told yet is none.

    Args:
        study: Of a sweep.
        asked: Trial -> its parameters.
        ended: Trial -> how it ended, for those that have.

    Returns:
        Trial -> what is wrong.
    """
    trials = {trial.number: trial for trial in study.get_trials(deepcopy=False)}
    wrong: dict[int, str] = {}
    for number, params in asked.items():
        found = trials.get(number)
        if found is None:
            wrong[number] = "the study lacks it"
        elif found.params != params:
            wrong[number] = f"the study has it with {found.params}, the ledger with {dict(params)}"
        elif found.state.is_finished() and number not in ended:
            wrong[number] = f"the study has it as {found.state.name}, and it has no result"
        elif found.state.is_finished() and found.state != state_of(ended[number]):
            wrong[number] = f"the study has it as {found.state.name}, its result is {ended[number].status}"
        elif found.state == TrialState.COMPLETE and found.values != list(ended[number].values or ()):
            wrong[number] = f"the study has its objectives as {found.values}"
    return wrong


def own_attributes(study: optuna.Study, asked: Container[int], ended: Container[int]) -> OwnAttributes:
    """What a sampler has noted in its study.

    Parents that were chosen for a generation of which no trial is kept, or that have not ended any more,
    are left out: who asks for the next trial chooses again.
    """
    trials = [trial for trial in study.get_trials(deepcopy=False) if trial.number in asked]
    latest = max((trial.system_attrs.get(GENERATION, 0) for trial in trials), default=0)
    numbers = {trial._trial_id: trial.number for trial in trials if trial.number in ended}
    attributes = study._storage.get_study_system_attrs(study._study_id)
    chosen = {f"{PARENTS}{generation}" for generation in range(latest + 1)} & attributes.keys()
    parents = {
        key: [numbers[trial_id] for trial_id in attributes[key]]
        for key in chosen
        if numbers.keys() >= set(attributes[key])
    }
    return OwnAttributes({str(trial.number): trial.system_attrs for trial in trials}, parents)


def write_trials(
    study: optuna.Study,
    asked: Mapping[int, Mapping[str, Any]],
    ended: Mapping[int, Ended],
    own: OwnAttributes,
    distributions: Mapping[str, BaseDistribution],
) -> None:
    """Fill an empty study.

    Args:
        study: As `open_study` makes it.
        asked: Trial -> its parameters.
        ended: Trial -> how it ended, for those that have.
        own: What the sampler had noted.
        distributions: Of the space.
    """
    for number, params in sorted(asked.items()):
        end = ended.get(number)
        study.add_trial(
            optuna.trial.create_trial(
                state=TrialState.RUNNING if end is None else state_of(end),
                params=dict(params),
                distributions=dict(distributions),
                values=None if end is None or state_of(end) != TrialState.COMPLETE else end.values,
                constraints=INFEASIBLE if end is not None and end.status == Status.INFEASIBLE else None,
                system_attrs=own.trials.get(str(number)),
            )
        )
    ids = {trial.number: trial._trial_id for trial in study.get_trials(deepcopy=False)}
    for key, numbers in own.parents.items():
        chosen = [ids[number] for number in numbers]
        study._storage.set_study_system_attr(study._study_id, key, chosen)

"""Proposals from Optuna by ask and tell."""

import hashlib
import json
import uuid
import warnings
from collections.abc import Callable, Container, Mapping, Sequence
from functools import partial, wraps
from pathlib import Path
from typing import Any, NamedTuple, ParamSpec, TypeVar

import optuna
from optuna.distributions import BaseDistribution
from optuna.samplers import BaseSampler, NSGAIISampler, PartialFixedSampler, RandomSampler, TPESampler
from optuna.trial import Trial, TrialState

from jobs.errors import first_line
from jobs.spec import Status
from orchestrator.journal import Journal
from orchestrator.pack_tpe import propose_pack
from orchestrator.space_file import grid_cell
from orchestrator.study import (
    INFEASIBLE,
    Ended,
    OwnAttributes,
    disagreements,
    distributions_of,
    in_file,
    open_database,
    open_study,
    own_attributes,
    write_trials,
)
from orchestrator.window import Window, WindowedSampler, latest_generations, shown
from search_spaces.base import Space
from storage.durable import StoreError, publish

Given = ParamSpec("Given")
Found = TypeVar("Found")


class Proposal(NamedTuple):
    """A configuration to try.

    Attributes:
        trial: Its number.
        params: Parameter -> value.
        seen: Number of results that were told before it was asked.
        fixed: Parameters that were held fixed.
    """

    trial: int
    params: dict[str, Any]
    seen: int
    fixed: tuple[str, ...] = ()


def _storing(method: Callable[Given, Found]) -> Callable[Given, Found]:
    """What Optuna raises of its storage becomes a StoreError."""

    @wraps(method)
    def storing(*arguments: Given.args, **named: Given.kwargs) -> Found:
        try:
            return method(*arguments, **named)
        except optuna.exceptions.OptunaError as error:
            raise StoreError(f"the study cannot be kept: {first_line(error.__cause__ or error)}") from error

    return storing


class OptunaSampler:
    """One study in a journal file or in PostgreSQL, asked and told by one driver.

    Before ask `n` the sampler is made anew from (seed, n), so that proposals depend on what was
    told and not on when the driver was restarted.

    Args:
        space: What may be proposed.
        name: The sampler: grid, random, tpe or nsga2.
        seed: The sweep's seed.
        journal: File of the study.
        study: Name of the study.
        storage: URL of a PostgreSQL database to keep the study in, in place of the file.

    Raises:
        SpecError: If the database cannot be reached or does not let in.
    """

    def __init__(
        self, space: Space, *, name: str, seed: int, journal: Path, study: str, storage: str | None = None
    ) -> None:
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        self._space = space
        self._name = name
        self._seed = seed
        self._distributions = distributions_of(space)
        self._path = journal
        self._own_path = journal.with_name("optuna.attributes.json")
        self._study_name = study
        self._database = None if storage is None else open_database(storage)
        self._open()

    @_storing
    def _open(self) -> None:
        self._journal = None if self._database else Journal(self._path)
        try:
            self._study = open_study(self._database or in_file(self._journal), self._study_name, self._space)
        except (KeyError, TypeError, ValueError, AttributeError, AssertionError) as error:
            # Whatever Optuna makes of lines that it has not written.
            raise StoreError(
                f"{self._path} is not what was written ({error!r}); `steersweep doctor --repair` writes it "
                "anew"
            ) from error
        trials = self._study.get_trials(deepcopy=False)
        self._asked = len(trials)
        self._ended = {trial.number for trial in trials if trial.state.is_finished()}
        self._window = Window([objective.direction for objective in self._space.objectives])
        complete = [trial for trial in trials if trial.state == TrialState.COMPLETE and not trial.constraints]
        if complete:
            self._window.add({trial.number: trial.values for trial in complete})

    @_storing
    def ask(self, fixed: Mapping[str, Any] | None = None) -> Proposal:
        """Propose a configuration.

        Args:
            fixed: Parameters that must take these values; a grid has its own order and ignores them.
        """
        held = {} if fixed is None or self._name == "grid" else fixed
        self._study.sampler = self._sampler(self._asked, held)
        trial = self._study.ask(self._distributions)
        self._asked += 1
        return Proposal(trial.number, self._plain(trial), len(self._ended), tuple(held))

    def ask_together(self, count: int, shared: Sequence[str]) -> list[Proposal]:
        """Propose configurations of one pack: the first is free, the others take what has to be shared of it.

        Args:
            count: How many.
            shared: Parameters that the rows of a pack must share.
        """
        found = self._ask_pack(1 if shared else count, {}) or [self.ask()]
        fixed = {name: found[0].params[name] for name in shared}
        if len(found) < count:
            found += self._ask_pack(count - len(found), fixed)
        return [*found, *(self.ask(fixed) for _ in range(count - len(found)))]

    @_storing
    def _ask_pack(self, count: int, fixed: Mapping[str, Any]) -> list[Proposal]:
        """Propose from one look at the study what can be had so, with parameters held fixed."""
        if self._name != "tpe":
            return []
        free = {name: domain for name, domain in self._distributions.items() if name not in fixed}
        seed = _derived_seed(self._seed, self._asked)
        found = propose_pack(shown(self._study, self._window), free, count, seed)
        return [self._add(params, fixed) for params in found]

    def _add(self, free: Mapping[str, Any], fixed: Mapping[str, Any]) -> Proposal:
        """Have a trial in the study as if it had been asked for there."""
        params = {
            name: fixed[name] if name in fixed else free[name] if name in free else _only_value(domain)
            for name, domain in self._distributions.items()
        }
        self._study.add_trial(
            optuna.trial.create_trial(
                state=TrialState.RUNNING, params=params, distributions=self._distributions
            )
        )
        self._asked += 1
        return Proposal(self._asked - 1, params, len(self._ended), tuple(fixed))

    @_storing
    def unrecorded(self, asked: Container[int]) -> list[int]:
        """Trials of the study that are not among those that were asked for.

        A driver that dies between asking and writing its ledger leaves some: of a pack, perhaps not all.
        `restate` drops them, and who asks again gets the whole pack.
        """
        return [trial.number for trial in self._study.get_trials(deepcopy=False) if trial.number not in asked]

    @_storing
    def disagreements(
        self, asked: Mapping[int, Mapping[str, Any]], ended: Mapping[int, Ended]
    ) -> dict[int, str]:
        """As `orchestrator.study.disagreements` says of its study."""
        return disagreements(self._study, asked, ended)

    def without_result(self, ended: Container[int]) -> list[int]:
        """Trials that the study has as ended and that have not."""
        return sorted(number for number in self._ended if number not in ended)

    def untold(self, ended: Mapping[int, Ended]) -> list[int]:
        """Trials that have ended and that the study has as running."""
        return sorted(ended.keys() - self._ended)

    @property
    def was_cut_short(self) -> bool:
        """Whether a driver died while it wrote the study anew in a database."""
        return self._own_path.is_file()

    @_storing
    def restate(self, asked: Mapping[int, Mapping[str, Any]], ended: Mapping[int, Ended]) -> None:
        """Write the study anew from what is kept, whole or not at all. Arguments as for `disagreements`.

        Raises:
            StoreError: If the disk refuses.
        """
        own = self._read_own() if self.was_cut_short else own_attributes(self._study, asked, ended)
        staging = self._path.with_name(f".{self._path.name}.{uuid.uuid4().hex[:8]}")
        journal = None if self._database else Journal(staging)
        if self._database is not None:
            publish(self._own_path, json.dumps(own._asdict()).encode())
            self.forget()
        study = open_study(self._database or in_file(journal), self._study_name, self._space)
        write_trials(study, asked, ended, own, self._distributions)
        if journal is not None:
            journal.flush()
            staging.replace(self._path)
        self._own_path.unlink(missing_ok=True)
        self._open()

    def _read_own(self) -> OwnAttributes:
        return OwnAttributes(**json.loads(self._own_path.read_bytes()))

    @_storing
    def forget(self) -> None:
        """Delete the study. It can be written anew, by another sampler, with `restate`."""
        if self._database is None:
            self._path.unlink(missing_ok=True)
        else:
            optuna.delete_study(study_name=self._study_name, storage=self._database)

    @_storing
    def tell(self, trial: int, status: Status, values: Sequence[float] | None) -> None:
        """Report how a trial ended, as `Ended` says; telling it again changes nothing."""
        if trial in self._ended:
            return
        if status == Status.INFEASIBLE:
            self._set_infeasible(trial)
        if status == Status.FAILED:
            self._study.tell(trial, state=TrialState.FAIL, skip_if_finished=True)
        elif values is None:
            assert status == Status.INFEASIBLE, f"trial {trial} is {status} without objectives"
            self._study.tell(trial, state=TrialState.PRUNED, skip_if_finished=True)
        else:
            self._study.tell(trial, list(values), skip_if_finished=True)
            if status == Status.COMPLETED:
                self._window.add({trial: values})
        self._ended.add(trial)

    def flush(self) -> None:
        """Bring to disk what was asked and told. Raises StoreError if the disk refuses."""
        if self._journal is not None:
            self._journal.flush()

    def _set_infeasible(self, number: int) -> None:
        trial = Trial(self._study, self._study.get_trials(deepcopy=False)[number]._trial_id)
        if not trial.constraints:
            [(name, value)] = INFEASIBLE.items()
            trial.set_constraint(name, value)

    def _plain(self, trial: Trial) -> dict[str, Any]:
        return {name: trial.params[name] for name in self._distributions}

    def _sampler(self, number: int, fixed: Mapping[str, Any]) -> BaseSampler:
        if self._name == "grid":
            fixed = grid_cell(self._space, number)
        sampler = _free_sampler(self._name, _derived_seed(self._seed, number), self._window)
        return PartialFixedSampler(dict(fixed), sampler) if fixed else sampler


def _only_value(domain: BaseDistribution) -> Any:
    """Of a parameter that cannot vary."""
    return optuna.distributions._get_single_value(domain)


def _free_sampler(name: str, seed: int, window: Window) -> BaseSampler:
    match name:
        case "tpe":
            sampler = TPESampler(seed=seed, multivariate=True, constant_liar=True)
            return WindowedSampler(sampler, partial(shown, window=window))
        case "nsga2":
            return WindowedSampler(NSGAIISampler(seed=seed), latest_generations)
        case _:
            return RandomSampler(seed=seed)


def _derived_seed(seed: int, number: int) -> int:
    digest = hashlib.sha256(f"{seed}:{number}".encode()).digest()
    return int.from_bytes(digest[:4], "big")

"""From trials that were asked for to tasks: what is known already, what comes first, which stage is next."""

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from jobs.resolve import load_job, parse_use
from jobs.spec import Spec
from orchestrator.planning import Planner
from orchestrator.pool import Order, OrderRow
from orchestrator.promotion import held_back
from orchestrator.results import Results
from orchestrator.scheduler import Kind, Scheduler, Task
from search_spaces.base import Space
from storage.artifacts import Artifact
from storage.ledger import Asked
from storage.manifest import StoredResult
from storage.store import Part


class Planned(NamedTuple):
    """A spec that waits or runs, with the specs whose artifacts it takes, by requirement key."""

    spec: Spec
    needs: Mapping[str, Spec]


@dataclass(slots=True)
class _Group:
    """Trials that were asked for together and go from stage to stage together.

    Attributes:
        trials: Those that are still in, with the spec of each stage; the last one is the trial's own.
        stage: Where they are.
        open: Specs of this stage without a result.
    """

    trials: list[tuple[Asked, Sequence[Spec]]]
    stage: int = 0
    open: set[str] = field(default_factory=set)


class Intake:
    """What has to be computed for the trials of a sweep, given to the scheduler as it becomes known.

    Args:
        space: What is tried.
        planner: What its parameters mean.
        scheduler: Who is given the tasks.
        results: What is there already.
        take_over: Takes a spec's artifact from another sweep, and says whether one has it.
        workers: Among how many prerequisites are shared out.
        max_pack: Most tasks of a pack.

    Attributes:
        planned: Spec id -> the spec, for those that wait or run.
    """

    def __init__(
        self,
        space: Space,
        planner: Planner,
        scheduler: Scheduler,
        results: Results,
        take_over: Callable[[Spec], bool],
        *,
        workers: int,
        max_pack: int,
    ) -> None:
        self._space = space
        self._planner = planner
        self._scheduler = scheduler
        self._results = results
        self._take_over = take_over
        self._workers = workers
        self._max_pack = max_pack
        self._groups: dict[str, list[_Group]] = {}
        self.planned: dict[str, Planned] = {}

    def take(self, trials: Sequence[Asked]) -> None:
        """Take trials in that were asked for together."""
        self._enter(_Group([(trial, self._planner.stages(trial.spec)) for trial in trials]))

    def _enter(self, group: _Group) -> None:
        """Plan what has no result yet of a group's stage."""
        tasks: list[Task] = []
        first: list[Task] = []
        cannot: list[tuple[Spec, StoredResult]] = []
        for trial, stages in group.trials:
            spec = stages[group.stage]
            if not self._awaits(group, trial, stages) or spec.id in self.planned:
                continue
            ended = self._cannot_run(spec)
            if ended is None:
                tasks.append(self._plan(spec, first, is_trial=True))
            else:
                cannot.append((spec, ended))
        # Prerequisites are shared out at once: trials wait for the last of theirs.
        if first:
            share = math.ceil(len(first) / self._workers)
            self._scheduler.add(first, settled=self._results.artifacts, most=min(self._max_pack, share))
        self._scheduler.add(tasks, settled=self._results.artifacts, most=self._max_pack)
        for spec, result in cannot:
            self._end(spec, result)
        self._go_on(group)

    def _awaits(self, group: _Group, trial: Asked, stages: Sequence[Spec]) -> bool:
        """Whether a result of its group's stage is still to come for a trial. Notes who waits for it."""
        spec = stages[group.stage]
        own = self._results.of(stages[-1].id)
        if group.stage == len(stages) - 1:
            if own is None:
                self._results.expect(trial)
            else:
                self._results.reuse(trial, own)
            return own is None
        if own is not None or self._results.of(spec.id) is not None:
            return False
        if spec.id not in group.open:
            group.open.add(spec.id)
            self._groups.setdefault(spec.id, []).append(group)
        return True

    def _plan(self, spec: Spec, first: list[Task], *, is_trial: bool) -> Task:
        """The spec as a task; what it needs and nobody has planned yet is added to `first`."""
        needs = self._planner.needs(spec)
        for need in needs.values():
            if need.id in self._results.artifacts or need.id in self.planned:
                continue
            # Of its own job a sweep needs metrics and texts too, which an artifact does not hold.
            is_own = need.job == spec.job
            if is_own or not self._take_over(need):
                first.append(self._plan(need, first, is_trial=False))
        self.planned[spec.id] = Planned(spec, needs)
        # What is computed again because its artifact was lost has a result: its other tables are not kept.
        is_alone = self._results.is_lost(spec.id)
        return make_task(spec, needs.values(), is_trial=is_trial, is_alone=is_alone)

    def _cannot_run(self, spec: Spec) -> StoredResult | None:
        """How a spec ends that lacks a prerequisite for good; None if all of them may still be had."""
        for need in self._planner.needs(spec).values():
            if need.id in self._results.artifacts or need.id in self.planned:
                continue
            result = self._results.of(need.id)
            if result is not None and not self._results.is_lost(need.id):
                return StoredResult(spec.id, "failed", _ended_without_artifact(need.job, result))
            if (ended := self._cannot_run(need)) is not None:
                return ended._replace(spec=spec.id)
        return None

    def trials(self, spec: str) -> list[int]:
        """Numbers of the trials that wait for a spec, as their own or as a stage of theirs."""
        own = [trial.trial for trial in self._results.waiting(spec)]
        return own + [
            trial.trial
            for group in self._groups.get(spec, ())
            for trial, stages in group.trials
            if stages[group.stage].id == spec
        ]

    def ended(self, results: Iterable[StoredResult]) -> list[StoredResult]:
        """What was planned has ended: what waited for it may run, or cannot any more.

        Args:
            results: What was accepted.

        Returns:
            The results of what cannot run any more, for the caller to accept.
        """
        further: list[StoredResult] = []
        for result in results:
            planned = self._pop(result.spec)
            if result.spec in self._results.artifacts:
                self._scheduler.settle(result.spec)
                continue
            why = _ended_without_artifact(planned.spec.job, result)
            for spec in self._scheduler.fail(result.spec):
                self._pop(spec)
                further.append(StoredResult(spec, "failed", why))
        return further

    def _pop(self, spec: str) -> Planned:
        planned = self.planned.pop(spec)
        self._note(planned)
        return planned

    def _note(self, planned: Planned) -> None:
        spec, needs = planned
        self._results.note_spec(spec, needs.values(), self._planner.control(spec))

    def advance(self, specs: Iterable[str]) -> None:
        """Let groups go on to their next stage that waited for the last of these."""
        for spec in specs:
            for group in self._groups.pop(spec, []):
                group.open.discard(spec)
                self._go_on(group)

    def _go_on(self, group: _Group) -> None:
        """Move a group to its next stage if nothing of this one is open any more."""
        if group.open or group.stage == len(self._space.stages):
            return
        trials, group.trials = group.trials, []
        if not trials:
            return
        reasons = self._held_back(trials, group.stage)
        for index, (status, why) in reasons.items():
            trial, stages = trials[index]
            own = stages[-1]
            # Another group may have let the same configuration through: the trial shares what becomes of it.
            if (result := self._results.of(own.id)) is not None:
                self._results.reuse(trial, result)
                continue
            self._results.expect(trial)
            if own.id not in self.planned:
                self._end(own, StoredResult(own.id, status, why))
        going = [trial for index, trial in enumerate(trials) if index not in reasons]
        self._enter(_Group(going, group.stage + 1))

    def _held_back(
        self, trials: Sequence[tuple[Asked, Sequence[Spec]]], number: int
    ) -> dict[int, tuple[str, str]]:
        """Trials of a group that end at a stage, by index, with their status and why."""
        where = f"stage {number + 1} of {len(self._space.stages) + 1}"
        results = [self._results.of(stages[number].id) for _, stages in trials]
        ended = {
            index: (result.status, f"{where}: {result.reason}")
            for index, result in enumerate(results)
            if result is not None and result.status != "completed"
        }
        left = [index for index in range(len(trials)) if index not in ended]
        metrics = [self._results.metrics(trials[index][1][number].id) for index in left]
        stage = self._space.stages[number]
        held = held_back(stage, self._space.objectives, metrics, of=len(trials))
        return ended | {left[place]: ("infeasible", f"{where}: {why}") for place, why in held.items()}

    def _end(self, spec: Spec, result: StoredResult) -> None:
        """A spec ends without having run."""
        self._note(Planned(spec, self._planner.needs(spec)))
        self._results.accept(Part((), (result,)), seconds=None)
        self.advance([result.spec])


def make_task(spec: Spec, needs: Iterable[Spec], *, is_trial: bool, is_alone: bool = False) -> Task:
    """The spec as the scheduler sees it, with all that has to end before it."""
    model = spec.model
    pack_by = load_job(spec.job).PACK_BY
    is_packed = pack_by is not None and not is_alone
    return Task(
        spec=spec.id,
        kind=Kind(spec.job, f"{model.id}@{model.revision} {model.dtype} {model.tuned}"),
        pack_key=json.dumps([spec.params[name] for name in pack_by or ()]) if is_packed else None,
        needs=frozenset(need.id for need in needs),
        is_trial=is_trial,
    )


def make_order(attempt: str, rows: Sequence[Planned], artifacts: Mapping[str, Artifact]) -> Order:
    """Specs of one job and model as the order that a worker gets.

    Args:
        attempt: Id of the try.
        rows: What to compute.
        artifacts: Spec id -> its artifact, for all that the rows need.
    """
    job, model = rows[0].spec.job, rows[0].spec.model
    return Order(
        attempt=attempt,
        job=job,
        model=model,
        rows=tuple(OrderRow(row.spec.id, dict(row.spec.params), row.spec.seed) for row in rows),
        artifacts={key: artifacts[need.id] for row in rows for key, need in row.needs.items()},
        tuned=artifacts[rows[0].needs[parse_use(model.tuned).key].id] if model.tuned else None,
    )


def _ended_without_artifact(job: str, result: StoredResult) -> str:
    return (
        f"its prerequisite {job} ({result.spec}) ended as {result.status} without artifact: {result.reason}"
    )

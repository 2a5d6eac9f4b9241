"""The loop: ask, pack, dispatch, store, tell. Sampler, scheduler, pool and store meet only here."""

import math
import time
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from jobs.resolve import parse_use
from jobs.spec import Spec
from orchestrator.config import RunConfig
from orchestrator.planning import Planner, make_task
from orchestrator.pool import Delivery, Event, Finished, Order, OrderRow, Pool
from orchestrator.progress import Progress, Tally
from orchestrator.results import Results
from orchestrator.sampler import OptunaSampler, Proposal
from orchestrator.scheduler import Pack, Scheduler, Task, pack_limit
from search_spaces.base import Space
from storage.artifacts import Artifact
from storage.donors import Donors
from storage.durable import StoreError, remove_staging
from storage.ledger import Asked, Ledger, read_asked
from storage.store import Part, Store, StoredResult

_POLL_SECONDS = 0.5
_GATE = "its cheaper form did not pass the gate"


class _Planned(NamedTuple):
    """A spec that waits or runs, with the specs whose artifacts it takes, by requirement key."""

    spec: Spec
    needs: Mapping[str, Spec]


@dataclass(frozen=True, slots=True)
class _Settled:
    """The specs that nothing waits for any more: they have an artifact, or are gates that were passed."""

    artifacts: Mapping[str, Artifact]
    passed: set[str]

    def __contains__(self, spec: object) -> bool:
        return spec in self.artifacts or spec in self.passed


@dataclass(slots=True)
class _Running:
    """A pack on a worker; times in s since 1970, `latest` that of the last delivery."""

    worker: str
    pack: Pack
    attempt: str
    dispatched: float
    latest: float | None = None


class Sweep:
    """One sweep from its folder to its last trial.

    Args:
        folder: The sweep's folder, claimed by the caller.
        space: What to try.
        config: How to run it.
        trials: Number of trials to have had in the end.
        sampler: Who proposes.
        pool: Who runs.
        donors: Other sweeps whose artifacts may be taken.
        progress: Who is told how it stands.
        on_result: Called after each trial that has ended.
        check_stop: Called between events; what it raises ends the run.
    """

    def __init__(
        self,
        folder: Path,
        *,
        space: Space,
        config: RunConfig,
        trials: int,
        sampler: OptunaSampler,
        pool: Pool,
        donors: Donors,
        progress: Progress,
        on_result: Callable[[], None],
        check_stop: Callable[[], None],
    ) -> None:
        self._check_stop = check_stop
        self._config = config
        self._trials = trials
        self._sampler = sampler
        self._pool = pool
        self._progress = progress
        self._store = Store(folder)
        self._ledger = Ledger(folder)
        self._planner = Planner(space, config)
        self._scheduler = Scheduler(max_attempts=config.max_attempts)
        self._tally = Tally(total=trials)
        self._results = Results(self._store, space, sampler, self._tally, on_result)
        self._donors = donors
        self._planned: dict[str, _Planned] = {}
        self._running: dict[str, _Running] = {}
        self._gates: set[str] = set()
        self._settled = _Settled(self._results.artifacts, set())
        self._loaded: set[str] = set()
        self._idle: list[str] = []
        self._asked = 0

    def run(self) -> Tally:
        """Go on until every trial has ended.

        Raises:
            SteersweepError: If the work cannot go on; everything accepted so far stays.
        """
        self._take_up()
        while self._tally.done < self._trials:
            self._propose()
            self._dispatch()
            if self._tally.done == self._trials:
                break
            for event in self._pool.events(_POLL_SECONDS):
                self._handle(event)
            self._show()
            self._check_stop()
        self._show()
        return self._tally

    def _show(self) -> None:
        on_workers = [task for run in self._running.values() for task in run.pack.tasks]
        self._tally.workers_ready = len(self._loaded)
        self._tally.running = sum(len(self._results.waiting(task.spec)) for task in on_workers)
        self._tally.preparing = ", ".join(sorted({task.job for task in on_workers if not task.is_trial}))
        self._progress.update(self._tally)

    def _take_up(self) -> None:
        """Go on where an earlier driver of the folder was stopped."""
        remove_staging(self._store.folder)
        asked = read_asked(self._store.folder)
        ended = {row["trial"]: row for row in self._store.rows("trials")}
        if lost := sorted(ended.keys() - {trial.trial for trial in asked}):
            raise StoreError(f"the ledger in {self._store.folder} lacks trials that have ended: {lost[:10]}")
        self._ledger.taken_over()
        adopted = [
            self._record(proposal) for proposal in self._sampler.adopt([trial.trial for trial in asked])
        ]
        if adopted:
            self._ledger.asked(adopted)
        for trial in asked:
            if trial.trial in ended:
                self._results.recall(ended[trial.trial])
        left = [trial for trial in (*asked, *adopted) if trial.trial not in ended]
        self._asked = len(asked) + len(adopted) - len(left)
        while left:
            count = self._pack_limit()
            self._take_in(left[:count])
            self._asked += len(left[:count])
            left = left[count:]

    def _pack_limit(self) -> int:
        return pack_limit(
            unasked=self._trials - self._asked, workers=self._config.workers, max_pack=self._config.max_pack
        )

    def _propose(self) -> None:
        """Ask, a pack's worth at a time, until every idle worker has a pack to take.

        What waits for a prerequisite keeps no worker busy, but was asked blindly: there is an end to it.
        """
        while (
            self._asked < self._trials
            and self._scheduler.runnable < len(self._idle)
            and self._scheduler.blocked < self._config.workers
        ):
            trials = self._ask(self._pack_limit())
            self._ledger.asked(trials)
            self._asked += len(trials)
            self._take_in(trials)

    def _ask(self, count: int) -> list[Asked]:
        """The first proposal is free, the others hold what the rows of a pack must share."""
        first = self._record(self._sampler.ask())
        fixed = {name: first.params[name] for name in self._planner.shared()}
        return [first, *(self._record(self._sampler.ask(fixed)) for _ in range(count - 1))]

    def _record(self, proposal: Proposal) -> Asked:
        return Asked(
            trial=proposal.trial,
            params=proposal.params,
            spec=self._planner.spec(proposal.params),
            seen=proposal.seen,
            fixed=proposal.fixed,
        )

    def _take_in(self, trials: Sequence[Asked]) -> None:
        """Answer trials from results that are there, or plan what has to be computed for them."""
        tasks: list[Task] = []
        first: list[Task] = []
        for trial in trials:
            spec = trial.spec
            if (result := self._results.of(spec.id)) is not None:
                self._results.reuse(trial, result)
                continue
            self._results.expect(trial)
            if spec.id in self._planned:
                continue
            ended = self._behind_closed_gate(spec) or self._cannot_run(spec)
            if ended is not None:
                self._results.accept(Part((), (ended,)), seconds=None)
                continue
            tasks.append(self._plan(spec, first, is_trial=True))
        # Prerequisites are shared out at once: trials wait for the last of theirs.
        if first:
            share = math.ceil(len(first) / self._config.workers)
            self._scheduler.add(first, settled=self._settled, most=min(self._config.max_pack, share))
        self._scheduler.add(tasks, settled=self._settled)

    def _plan(self, spec: Spec, first: list[Task], *, is_trial: bool) -> Task:
        """The spec as a task; what it needs and nobody has planned yet is added to `first`."""
        needs = self._planner.needs(spec)
        before = list(needs.values())
        if is_trial and (gate := self._planner.gate(spec)) is not None and gate.id != spec.id:
            self._gates.add(gate.id)
            before.append(gate)
        for need in before:
            if need.id in self._settled or need.id in self._planned:
                continue
            # Of its own job a sweep needs metrics and texts too, which an artifact does not hold.
            is_own = need.job == spec.job
            if is_own or not self._results.take_over(need, self._donors):
                first.append(self._plan(need, first, is_trial=False))
        self._planned[spec.id] = _Planned(spec, needs)
        return make_task(spec, before, is_trial=is_trial)

    def _behind_closed_gate(self, spec: Spec) -> StoredResult | None:
        """How a trial ends whose gate has ended already; None if it may run, or its gate has to run first."""
        gate = self._planner.gate(spec)
        result = None if gate is None else self._results.of(gate.id)
        if gate is None or result is None or gate.id == spec.id:
            return None
        if result.status != "completed":
            return StoredResult(spec.id, "failed", _ended_without_artifact(gate.job, result))
        why = self._results.closed_gate(gate.id)
        if why is not None:
            return StoredResult(spec.id, "infeasible", f"{_GATE}: {why}")
        self._settled.passed.add(gate.id)
        return None

    def _cannot_run(self, spec: Spec) -> StoredResult | None:
        """How a spec ends that lacks a prerequisite for good; None if all of them may still be had."""
        for need in self._planner.needs(spec).values():
            if need.id in self._results.artifacts or need.id in self._planned:
                continue
            result = self._results.of(need.id)
            if result is not None and not self._results.is_lost(need.id):
                return StoredResult(spec.id, "failed", _ended_without_artifact(need.job, result))
            if (ended := self._cannot_run(need)) is not None:
                return ended._replace(spec=spec.id)
        return None

    def _dispatch(self) -> None:
        while self._idle and (pack := self._scheduler.next_pack()) is not None:
            run = _Running(self._idle.pop(0), pack, uuid.uuid4().hex[:12], time.time())
            rows = [self._planned[task.spec] for task in pack.tasks]
            self._ledger.dispatched(run.attempt, run.worker, [row.spec.id for row in rows])
            self._running[run.worker] = run
            self._pool.start(run.worker, self._order(run, rows))

    def _order(self, run: _Running, rows: Sequence[_Planned]) -> Order:
        tuned = rows[0].spec.model.tuned
        return Order(
            attempt=run.attempt,
            job=run.pack.tasks[0].job,
            rows=tuple(OrderRow(row.spec.id, dict(row.spec.params), row.spec.seed) for row in rows),
            artifacts={
                key: self._results.artifacts[need.id] for row in rows for key, need in row.needs.items()
            },
            tuned=self._results.artifacts[rows[0].needs[parse_use(tuned).key].id] if tuned else None,
        )

    def _handle(self, event: Event) -> None:
        if event.kind == "ready":
            self._loaded.add(event.worker)
            self._idle.append(event.worker)
        elif event.kind == "delivery" and event.delivery is not None:
            self._receive(self._running[event.worker], event.delivery)
        elif event.kind == "done":
            run = self._running.pop(event.worker, None)
            self._tally.packs_ended += run is not None and any(task.is_trial for task in run.pack.tasks)
            self._idle.append(event.worker)
        elif event.kind == "lost":
            self._lost(event.worker, event.reason or "the worker died")

    def _receive(self, run: _Running, delivery: Delivery) -> None:
        self._accept(run, delivery.part, delivery.finished, delivery)
        if delivery.error is None:
            return
        state = "oom" if delivery.out_of_memory else "failed"
        ended = self._ended(run, state, delivery.error)
        if self._scheduler.split(run.pack):
            self._results.note_attempts(self._attempts(run, ended, delivery))
            return
        status = "infeasible" if delivery.out_of_memory else "failed"
        self._give_up(run, ended, delivery, status, delivery.error.splitlines()[0])

    def _lost(self, worker: str, reason: str) -> None:
        self._loaded.discard(worker)
        if worker in self._idle:
            self._idle.remove(worker)
        run = self._running.pop(worker, None)
        if run is None:
            return
        ended = self._ended(run, "lost", reason)
        if self._scheduler.lost(run.pack):
            self._results.note_attempts(self._attempts(run, ended))
            return
        why = f"lost: {run.pack.attempt} workers died running it; the last said: {reason.splitlines()[0]}"
        self._give_up(run, ended, None, "failed", why)

    def _ended(self, run: _Running, state: str, reason: str) -> list[Finished]:
        """The rows of a pack that have no result, as ended now."""
        left = [task.spec for task in run.pack.tasks if self._scheduler.knows(task.spec)]
        return [Finished(spec, state, reason, time.time()) for spec in left]

    def _give_up(
        self, run: _Running, ended: Sequence[Finished], delivery: Delivery | None, status: str, why: str
    ) -> None:
        results = tuple(StoredResult(row.spec, status, why) for row in ended)
        self._accept(run, Part((), results), ended, delivery)

    def _accept(
        self, run: _Running, part: Part, finished: Sequence[Finished], delivery: Delivery | None
    ) -> None:
        """Accept what ended, and what cannot run any more because of it."""
        self._results.learn(finished)
        further = [failure for result in part.results for failure in self._settle(result)]
        since = run.latest or (delivery.started if delivery is not None else run.dispatched)
        run.latest = max((row.at for row in finished), default=time.time())
        self._results.accept(
            Part(part.files, (*part.results, *further)),
            seconds=(run.latest - since) / max(1, len(part.results)),
            attempts=self._attempts(run, finished, delivery),
        )
        for result in (*part.results, *further):
            del self._planned[result.spec]

    def _settle(self, result: StoredResult) -> list[StoredResult]:
        """Let dependents run, or fail them by name; returns the results of those that failed."""
        if result.spec in self._gates and result.status == "completed":
            why = self._results.closed_gate(result.spec)
            if why is not None:
                dropped = self._scheduler.fail(result.spec)
                return [StoredResult(spec, "infeasible", f"{_GATE}: {why}") for spec in dropped]
            self._settled.passed.add(result.spec)
        if result.spec in self._settled:
            self._scheduler.settle(result.spec)
            return []
        why = _ended_without_artifact(self._planned[result.spec].spec.job, result)
        return [StoredResult(spec, "failed", why) for spec in self._scheduler.fail(result.spec)]

    def _attempts(
        self, run: _Running, finished: Iterable[Finished], delivery: Delivery | None = None
    ) -> list[dict[str, Any]]:
        """Rows of the table `attempts`."""
        return [
            {
                "attempt": run.attempt,
                "pack": str(run.pack.id),
                "trial": next((trial.trial for trial in self._results.waiting(row.spec)), None),
                "spec": row.spec,
                "job": run.pack.tasks[0].job,
                "state": row.state,
                "reason": row.reason,
                "worker": run.worker,
                "host": delivery.host if delivery is not None else None,
                "started": delivery.started if delivery is not None else run.dispatched,
                "finished": row.at,
            }
            for row in finished
        ]


def _ended_without_artifact(job: str, result: StoredResult) -> str:
    return (
        f"its prerequisite {job} ({result.spec}) ended as {result.status} without artifact: {result.reason}"
    )

"""The loop: ask, pack, dispatch, store, tell. The only place where sampler, scheduler, pool and store meet."""

import json
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from jobs.resolve import load_job, make_params, make_spec
from jobs.spec import Requirement, Spec, is_defined
from orchestrator.config import RunConfig
from orchestrator.pool import Event, Finished, Order, OrderRow, Pool, Report
from orchestrator.progress import Progress, Tally
from orchestrator.sampler import OptunaSampler
from orchestrator.scheduler import Pack, Scheduler, Task
from search_spaces.base import Space
from storage.artifacts import Artifact
from storage.ledger import Asked, Ledger, read_asked
from storage.store import Part, Store, StoredResult

_POLL_SECONDS = 0.5


class _Planned(NamedTuple):
    """A spec that was asked for, with the specs whose artifacts it takes, by requirement key."""

    spec: Spec
    needs: Mapping[str, Spec]


@dataclass(slots=True)
class _Running:
    """A pack on a worker."""

    pack: Pack
    attempt: str
    dispatched: float


class Sweep:
    """One sweep from its folder to its last trial.

    Args:
        folder: The sweep's folder, claimed by the caller.
        space: What to try.
        config: How to run it.
        trials: Number of trials to have had in the end.
        sampler: Who proposes.
        pool: Who runs.
        progress: Who is told how it stands.
        on_result: Called after each trial that has ended.
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
        progress: Progress,
        on_result: Callable[[], None],
    ) -> None:
        self._space = space
        self._config = config
        self._trials = trials
        self._sampler = sampler
        self._pool = pool
        self._progress = progress
        self._on_result = on_result
        self._store = Store(folder)
        self._ledger = Ledger(folder)
        self._scheduler = Scheduler(
            workers=config.workers, trials=trials, max_pack=config.max_pack, max_attempts=config.max_attempts
        )
        self._tally = Tally(total=trials)
        self._planned: dict[str, _Planned] = {}
        self._waiting_trials: dict[str, list[Asked]] = {}
        self._artifacts = _stored_artifacts(self._store)
        self._made = {row["spec"] for row in self._store.rows("artifacts")}
        self._values = _stored_objectives(self._store, space)
        self._first_trial: dict[str, int] = {}
        self._running: dict[str, _Running] = {}
        self._idle: list[str] = []
        self._asked = 0
        self._best: float | None = None

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
            self._tally.running = sum(
                len(self._waiting_trials.get(task.spec, ())) for run in self._running.values() for task in run.pack.tasks
            )
            self._progress.update(self._tally)
        self._tally.running = 0
        self._progress.update(self._tally)
        return self._tally

    # Taking up what an earlier driver left

    def _take_up(self) -> None:
        finished = {row["trial"]: row for row in self._store.rows("trials")}
        asked = read_asked(self._store.folder)
        adopted = self._sampler.adopt([trial.trial for trial in asked])
        new = [self._record(proposal.trial, proposal.params, proposal.seen) for proposal in adopted]
        if new:
            self._ledger.asked(new)
        self._asked = len(asked) + len(new)
        for trial in (*asked, *new):
            row = finished.get(trial.trial)
            if row is None:
                self._take_in(trial)
            else:
                self._first_trial.setdefault(row["spec"], trial.trial)
                self._tell(trial.trial, row["spec"], row["state"])
                self._scheduler.no_new_work()

    # Proposals

    def _propose(self) -> None:
        wanted = len(self._idle) * self._scheduler.pack_limit()
        # Trials that wait for a prerequisite keep no worker busy, but were asked blindly: there is an end to them.
        most_blocked = self._config.workers * self._scheduler.pack_limit()
        while (
            self._asked < self._trials
            and self._scheduler.ready < wanted
            and self._scheduler.blocked < most_blocked
        ):
            count = min(self._scheduler.pack_limit(), self._trials - self._asked)
            trials = self._ask(count)
            self._ledger.asked(trials)
            self._asked += len(trials)
            for trial in trials:
                self._take_in(trial)
            if not self._idle or self._blocked():
                break

    def _blocked(self) -> bool:
        return self._scheduler.ready == 0 and self._scheduler.has_work

    def _ask(self, count: int) -> list[Asked]:
        """The first proposal is free, the others hold what a pack must share."""
        pack_by = load_job(self._space.job).PACK_BY or ()
        shared = [name for name in pack_by if name in self._space.parameters]
        fixed: dict[str, Any] = {}
        trials: list[Asked] = []
        for _ in range(count):
            proposal = self._sampler.ask(fixed)
            trials.append(self._record(proposal.trial, proposal.params, proposal.seen, tuple(fixed)))
            fixed = {name: trials[0].params[name] for name in shared}
        return trials

    def _record(self, trial: int, params: Mapping[str, Any], seen: int, fixed: tuple[str, ...] = ()) -> Asked:
        requirement = self._requirement(params)
        spec = make_spec(requirement, model=self._config.model_ref, seed=self._config.seed)
        return Asked(trial=trial, params=params, spec=spec, seen=seen, fixed=fixed)

    def _requirement(self, params: Mapping[str, Any]) -> Requirement:
        values = {**self._space.fixed, **params}
        return Requirement(job=self._space.job, params=make_params(self._space.job, values))

    def _take_in(self, trial: Asked) -> None:
        spec_id = trial.spec.id
        if (result := self._store.results.get(spec_id)) is not None:
            self._scheduler.no_new_work()
            self._reuse(trial, result)
        elif self._scheduler.knows(spec_id):
            self._scheduler.no_new_work()
            self._waiting_trials.setdefault(spec_id, []).append(trial)
        elif (why := self._cannot_run(trial.spec)) is not None:
            self._scheduler.no_new_work()
            result = StoredResult(spec_id, "failed", why)
            self._store.commit([Part((), (result,))], trials=[self._trial_row(trial, result, None)])
            self._tell(trial.trial, spec_id, result.status)
        else:
            self._waiting_trials[spec_id] = [trial]
            self._plan(trial.spec, is_trial=True)

    def _plan(self, spec: Spec, *, is_trial: bool) -> None:
        """Hand a spec to the scheduler, its prerequisites first."""
        needs = self._needs(spec)
        for need in needs.values():
            if need.id not in self._artifacts and not self._scheduler.knows(need.id):
                self._plan(need, is_trial=False)
        self._planned[spec.id] = _Planned(spec, needs)
        task = Task(
            spec=spec.id,
            job=spec.job,
            pack_key=_pack_key(spec),
            needs=frozenset(need.id for need in needs.values()),
            is_trial=is_trial,
        )
        self._scheduler.add(task, settled=[need.id for need in needs.values() if need.id in self._artifacts])

    def _needs(self, spec: Spec) -> dict[str, Spec]:
        """What the spec's job requires, by requirement key."""
        return {
            requirement.key: make_spec(requirement, model=spec.model, seed=self._config.seed)
            for requirement in load_job(spec.job).requires(make_params(spec.job, spec.params))
        }

    def _cannot_run(self, spec: Spec) -> str | None:
        """Which prerequisite has ended without an artifact; None if all may still be had."""
        for need in self._needs(spec).values():
            if need.id in self._artifacts or self._scheduler.knows(need.id):
                continue
            result = self._store.results.get(need.id)
            if result is not None and need.id not in self._made:
                return _ended_without_artifact(need.job, result)
            if (why := self._cannot_run(need)) is not None:
                return why
        return None

    # Packs

    def _dispatch(self) -> None:
        while self._idle and (pack := self._scheduler.next_pack()) is not None:
            worker = self._idle.pop(0)
            attempt = uuid.uuid4().hex[:12]
            specs = [self._planned[task.spec] for task in pack.tasks]
            order = Order(
                attempt=attempt,
                job=pack.tasks[0].job,
                rows=tuple(OrderRow(plan.spec.id, dict(plan.spec.params), plan.spec.seed) for plan in specs),
                artifacts={key: self._artifacts[need.id] for plan in specs for key, need in plan.needs.items()},
            )
            self._ledger.dispatched(attempt, worker, [plan.spec.id for plan in specs])
            self._running[worker] = _Running(pack, attempt, time.time())
            self._pool.start(worker, order)

    def _handle(self, event: Event) -> None:
        if event.kind == "ready":
            self._tally.workers_ready += 1
            self._idle.append(event.worker)
        elif event.kind == "report" and event.report is not None:
            self._report(event.worker, event.report)
        elif event.kind == "done":
            self._running.pop(event.worker, None)
            self._idle.append(event.worker)
        elif event.kind == "lost":
            self._lost(event.worker, event.reason or "the worker died")

    def _report(self, worker: str, report: Report) -> None:
        run = self._running[worker]
        self._commit(run, worker, report, report.part, report.finished)
        if report.error is None:
            return
        unfinished = [task.spec for task in run.pack.tasks if self._scheduler.knows(task.spec)]
        attempt_state = "oom" if report.out_of_memory else "failed"
        ended = [Finished(spec, attempt_state, report.error, time.time()) for spec in unfinished]
        if self._scheduler.split(run.pack):
            self._store.commit([], attempts=self._attempt_rows(run, worker, report, ended))
            return
        status = "infeasible" if report.out_of_memory else "failed"
        results = tuple(StoredResult(spec, status, report.error.splitlines()[0]) for spec in unfinished)
        self._commit(run, worker, report, Part((), results), ended)

    def _lost(self, worker: str, reason: str) -> None:
        self._tally.workers_ready = max(0, self._tally.workers_ready - 1)
        if worker in self._idle:
            self._idle.remove(worker)
        run = self._running.pop(worker, None)
        if run is None:
            return
        report = Report(Part((), ()), (), run.dispatched, "", None)
        unfinished = [task.spec for task in run.pack.tasks if self._scheduler.knows(task.spec)]
        ended = [Finished(spec, "lost", reason, time.time()) for spec in unfinished]
        if self._scheduler.lost(run.pack):
            self._store.commit([], attempts=self._attempt_rows(run, worker, report, ended))
            return
        why = f"lost: {run.pack.attempt} workers died running it; the last said: {reason.splitlines()[0]}"
        results = tuple(StoredResult(spec, "failed", why) for spec in unfinished)
        self._commit(run, worker, report, Part((), results), ended)

    # Results

    def _commit(
        self, run: _Running, worker: str, report: Report, part: Part, finished: Sequence[Finished]
    ) -> None:
        """Make results visible together with their trials, then tell the sampler."""
        for row in finished:
            if row.artifact is not None:
                self._artifacts[row.spec] = row.artifact
            if row.metrics is not None:
                self._values[row.spec] = _objectives(self._space, row.metrics)
        results = [
            self._judged(result) if result.spec in self._waiting_trials else result for result in part.results
        ]
        for result in list(results):
            results += self._settle(result)
        at = [row.at for row in finished]
        seconds = (max(at, default=time.time()) - report.started) / len(run.pack.tasks)
        attempts = self._attempt_rows(run, worker, report, finished)
        trials = [
            (trial, result, seconds if trial is waiting[0] else None)
            for result in results
            for waiting in [self._waiting_trials.pop(result.spec, [])]
            for trial in waiting
        ]
        rows = [self._trial_row(trial, result, share) for trial, result, share in trials]
        self._store.commit([self._without_known(Part(part.files, tuple(results)))], trials=rows, attempts=attempts)
        for trial, result, _ in trials:
            self._tell(trial.trial, result.spec, result.status)

    def _judged(self, result: StoredResult) -> StoredResult:
        """A trial whose objectives are not all defined is infeasible, not completed."""
        if result.status != "completed" or self._values.get(result.spec) is not None:
            return result
        names = [objective.metric for objective in self._space.objectives]
        return StoredResult(result.spec, "infeasible", f"not all of the objectives {names} are defined")

    def _settle(self, result: StoredResult) -> list[StoredResult]:
        """Let dependents run, or fail them by name; returns the results of those that failed."""
        if result.spec in self._artifacts:
            self._scheduler.settle(result.spec)
            return []
        why = _ended_without_artifact(self._planned[result.spec].spec.job, result)
        return [StoredResult(spec, "failed", why) for spec in self._scheduler.fail(result.spec)]

    def _without_known(self, part: Part) -> Part:
        """A prerequisite that was computed again because its artifact was lost adds only the artifact."""
        known = [result for result in part.results if result.spec in self._store.results]
        if not known:
            return part
        files = tuple(file for file in part.files if file.table == "artifacts")
        return Part(files, tuple(result for result in part.results if result not in known))

    def _reuse(self, trial: Asked, result: StoredResult) -> None:
        result = self._judged(result)
        self._store.commit([], trials=[self._trial_row(trial, result, None)])
        self._tell(trial.trial, result.spec, result.status)

    def _trial_row(self, trial: Asked, result: StoredResult, seconds: float | None) -> dict[str, Any]:
        first = self._first_trial.setdefault(result.spec, trial.trial)
        return {
            "trial": trial.trial,
            "spec": result.spec,
            "state": result.status,
            "reason": result.reason,
            "reused_from": None if first == trial.trial else first,
            "seconds": seconds,
            "finished": time.time(),
            "params": json.dumps(dict(trial.params)),
        }

    def _attempt_rows(
        self, run: _Running, worker: str, report: Report, finished: Sequence[Finished]
    ) -> list[dict[str, Any]]:
        return [
            {
                "attempt": run.attempt,
                "pack": str(run.pack.id),
                "trial": next((trial.trial for trial in self._waiting_trials.get(row.spec, ())), None),
                "spec": row.spec,
                "job": run.pack.tasks[0].job,
                "state": row.state,
                "reason": row.reason,
                "worker": worker,
                "host": report.host,
                "started": report.started,
                "finished": row.at,
            }
            for row in finished
        ]

    def _tell(self, trial: int, spec: str, status: str) -> None:
        values = self._values.get(spec) if status == "completed" else None
        self._sampler.tell(trial, values, failed=status == "failed")
        setattr(self._tally, status, getattr(self._tally, status) + 1)
        if values is not None:
            self._note_best(trial, values[0])
        self._on_result()

    def _note_best(self, trial: int, value: float) -> None:
        objective = self._space.objectives[0]
        sign = -1 if objective.direction == "minimize" else 1
        if self._best is None or sign * value > sign * self._best:
            self._best = value
            self._tally.best = f"{objective.metric} {value:.3g} (trial {trial})"


def _objectives(space: Space, metrics: Mapping[str, float | None]) -> list[float] | None:
    """Values of the objectives in order; None if any is not defined."""
    values = [metrics.get(objective.metric) for objective in space.objectives]
    return [float(value) for value in values if value is not None] if all(map(is_defined, values)) else None


def _ended_without_artifact(job: str, result: StoredResult) -> str:
    return f"its prerequisite {job} ({result.spec}) ended as {result.status} without an artifact: {result.reason}"


def _stored_artifacts(store: Store) -> dict[str, Artifact]:
    """Spec -> its artifact, for those whose file is still there."""
    found = {row["spec"]: Artifact(row["hash"], row["path"], row["bytes"]) for row in store.rows("artifacts")}
    return {spec: artifact for spec, artifact in found.items() if (store.folder / artifact.path).is_file()}


def _stored_objectives(store: Store, space: Space) -> dict[str, list[float] | None]:
    metrics: dict[str, dict[str, float]] = {}
    for row in store.rows("metrics"):
        if row["split"] == "select":
            metrics.setdefault(row["spec"], {})[row["name"]] = row["value"]
    return {spec: _objectives(space, found) for spec, found in metrics.items()}


def _pack_key(spec: Spec) -> str | None:
    pack_by = load_job(spec.job).PACK_BY
    if pack_by is None:
        return None
    return json.dumps([spec.job, [spec.params[name] for name in pack_by]], sort_keys=True)

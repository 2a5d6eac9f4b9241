"""The loop: ask, pack, dispatch, store, tell. Sampler, scheduler, pool and store meet only here."""

import os
import socket
import time
import uuid
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from orchestrator.budget import Budget, busy_seconds
from orchestrator.config import RunConfig
from orchestrator.intake import Intake, make_order
from orchestrator.planning import Planner, group_size
from orchestrator.pool import Delivery, Event, Finished, Pool, written
from orchestrator.progress import Progress, Tally
from orchestrator.results import Results, event_row
from orchestrator.sampler import OptunaSampler, Proposal
from orchestrator.scheduler import Kind, Pack, Scheduler
from search_spaces.base import Space
from storage.donors import Donors
from storage.durable import DiskFull, StoreError, remove_staging
from storage.ledger import Asked, Ledger, read_asked, read_limits
from storage.manifest import StoredResult
from storage.remote import Remote
from storage.store import Part, Store

Written = TypeVar("Written")
_POLL_SECONDS = 0.5
_FULL_DISK_SECONDS = 5.0
_QUEUED = 1
"""Packs that wait for a worker, so that none waits for the sampler."""
_ASKED_TO_STOP = "asked to; once more stops at once"


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
        is_asked_to_stop: Called between events; once it is true, only what runs is seen to its end.
        remote: Where workers put their files that do not share the folder.
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
        is_asked_to_stop: Callable[[], bool],
        remote: Remote | None = None,
    ) -> None:
        self._remote = remote
        self._is_asked_to_stop = is_asked_to_stop
        self._space = space
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
        busy = busy_seconds(self._store.rows("attempts"))
        self._budget = Budget(config, space.objectives, spent_seconds=busy)
        self._results = Results(self._store, space, sampler, self._tally, self._budget, on_result, remote)
        self._intake = Intake(
            space,
            self._planner,
            self._scheduler,
            self._results,
            lambda spec: self._write(partial(self._results.take_over, spec, donors)),
            workers=config.workers,
            max_pack=config.max_pack,
        )
        self._running: dict[str, _Running] = {}
        self._loaded: set[str] = set()
        self._held: dict[str, str] = {}
        self._idle: deque[str] = deque()
        self._asked = 0

    def run(self) -> Tally:
        """Go on until every trial has ended, the budget is spent, or somebody asks to stop.

        Raises:
            SteersweepError: If the work cannot go on; everything accepted so far stays.
        """
        self._take_up()
        self._check_stop()
        if has_work := not self._is_over():
            self._note_start()
        try:
            while not self._is_over():
                if not self._tally.stopping:
                    self._propose()
                    self._dispatch()
                if self._is_over():
                    break
                for event in self._pool.events(_POLL_SECONDS):
                    self._handle(event)
                if not (self._tally.stopping or self._is_asked_to_stop()):
                    self._dispatch()  # nobody waits for the disk, or for the sampler
                self._write(self._results.commit)
                with suppress(StoreError):  # it can be done later; damaged files are the doctor's to name
                    self._store.compact(keeps_entries=self._remote is not None)
                self._check_stop()
                self._show()
        except BaseException as error:
            with suppress(StoreError):
                self._sampler.flush()
                # What was taken in may be what cannot be written: it is left to the next driver.
                why = f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"
                self._store.commit([], events=[event_row("driver ended", why)])
            raise
        self._write(self._sampler.flush)
        if has_work:
            self._results.note_event("driver ended", self._tally.stopping or "all trials have ended")
            self._write(self._results.commit)
        self._show()
        return self._tally

    def _note_start(self) -> None:
        where = f"process {os.getpid()} on {socket.gethostname()}"
        what = f"{self._tally.done} of {self._trials} trials have ended; {self._config.workers} workers"
        self._results.note_event("driver started", f"{where}; {what}")

    def _write(self, act: Callable[[], Written]) -> Written:
        """Bring something to disk; as long as that is full, wait for somebody to make room.

        Args:
            act: Can be done again where it fails, and leaves nothing then that anything reads.

        Returns:
            What it returns.

        Raises:
            StoreError: If the disk refuses for another reason, or somebody asks to stop meanwhile.
        """
        is_waiting = False
        while True:
            try:
                return act()
            except DiskFull as error:
                if self._is_asked_to_stop():
                    raise
                if not is_waiting:
                    self._results.note_event("paused", str(error))
                is_waiting = True
                self._pause(str(error))

    def _pause(self, reason: str) -> None:
        """Wait a little, and say why."""
        self._tally.paused = f"{reason}; goes on when there is room"
        self._show()
        time.sleep(_FULL_DISK_SECONDS)
        self._tally.paused = ""

    def _check_stop(self) -> None:
        if not self._tally.stopping:
            kept = self._store.bytes + self._results.artifact_bytes
            why = _ASKED_TO_STOP if self._is_asked_to_stop() else self._budget.spent(kept)
            if why is not None:
                self._tally.stopping = why
                self._pool.drain()

    def _is_over(self) -> bool:
        return self._tally.done >= self._trials or (bool(self._tally.stopping) and not self._running)

    def _show(self) -> None:
        on_workers = [task for run in self._running.values() for task in run.pack.tasks]
        self._tally.workers_ready = len(self._loaded)
        self._tally.running = sum(len(self._intake.trials(task.spec)) for task in on_workers)
        self._tally.preparing = ", ".join(sorted({task.kind.job for task in on_workers if not task.is_trial}))
        self._progress.update(self._tally)

    def _take_up(self) -> None:
        """Go on where an earlier driver of the folder was stopped."""
        remove_staging(self._store.folder)
        asked = read_asked(self._store.folder)
        ended = {row["trial"]: row for row in self._store.rows("trials")}
        if lost := sorted(ended.keys() - {trial.trial for trial in asked}):
            raise StoreError(f"the ledger in {self._store.folder} lacks trials that have ended: {lost[:10]}")
        self._scheduler.limits |= {
            Kind(*kind): most for kind, most in read_limits(self._store.folder).items()
        }
        params = {trial.trial: trial.params for trial in asked}
        ends = {number: self._results.end_of(row) for number, row in ended.items()}
        is_whole = not self._sampler.was_cut_short and not self._sampler.unrecorded(params)
        if not is_whole or self._sampler.disagreements(params, ends):
            self._write(partial(self._sampler.restate, params, ends))
        self._write(self._ledger.taken_over)
        for trial in asked:
            if trial.trial in ended:
                self._results.recall(ended[trial.trial])
        groups: dict[int, list[Asked]] = {}
        for trial in asked:
            groups.setdefault(trial.group, []).append(trial)
        for group in groups.values():
            self._asked += len(group)
            if not all(trial.trial in ended for trial in group):
                self._intake.take(group)
        self._write(self._results.commit)

    def _propose(self) -> None:
        """Ask, a group at a time, until every idle worker has a pack to take and the next idle one too.

        What waits for a prerequisite keeps no worker busy, but was asked blindly: there is an end to it.
        """
        while (
            self._asked < self._trials
            and self._scheduler.runnable < len(self._idle) + _QUEUED
            and self._scheduler.blocked < self._config.workers
        ):
            trials = self._ask()
            self._write(partial(self._ledger.asked, trials))
            self._asked += len(trials)
            self._intake.take(trials)
            self._write(self._results.commit)

    def _ask(self) -> list[Asked]:
        count = group_size(self._space, self._config, unasked=self._trials - self._asked)
        proposals = self._sampler.ask_together(count, self._planner.shared())
        self._write(self._sampler.flush)
        return self._record(proposals)

    def _record(self, proposals: Sequence[Proposal]) -> list[Asked]:
        return [
            Asked(
                trial=proposal.trial,
                params=proposal.params,
                spec=self._planner.spec(proposal.params),
                seen=proposal.seen,
                fixed=proposal.fixed,
                group=proposals[0].trial,
            )
            for proposal in proposals
        ]

    def _dispatch(self) -> None:
        while self._idle and (pack := self._scheduler.next_pack(self._held.get(self._idle[0]))) is not None:
            run = _Running(self._idle.popleft(), pack, uuid.uuid4().hex[:12], time.time())
            self._held[run.worker] = pack.kind.model
            rows = [self._intake.planned[task.spec] for task in pack.tasks]
            specs = [row.spec.id for row in rows]
            self._write(partial(self._ledger.dispatched, run.attempt, run.worker, specs))
            self._running[run.worker] = run
            self._pool.start(run.worker, make_order(run.attempt, rows, self._results.artifacts))

    def _handle(self, event: Event) -> None:
        if event.kind == "ready":
            self._loaded.add(event.worker)
            self._idle.append(event.worker)
            self._results.note_event("worker ready", "its model is loaded", event.worker)
        elif event.kind == "delivery" and event.delivery is not None:
            self._receive(self._running[event.worker], event.delivery)
        elif event.kind == "done":
            run = self._running.pop(event.worker, None)
            self._tally.packs_ended += run is not None and any(task.is_trial for task in run.pack.tasks)
            self._idle.append(event.worker)
        elif event.kind == "lost":
            self._lost(event.worker, event.reason or "the worker died", is_fault=event.is_fault)
            if event.is_disk_full:
                self._results.note_event("paused", "the disk of a worker is full", event.worker)
                self._pause(event.reason or "the disk of a worker is full")

    def _receive(self, run: _Running, delivery: Delivery) -> None:
        if self._remote is not None:
            self._write(partial(self._fetch, self._remote, delivery))
        self._accept(run, delivery.part, delivery.finished, delivery)
        if delivery.error is None:
            return
        ended = self._ended(run, "oom" if delivery.out_of_memory else "failed", delivery.error)
        if self._runs_again(run.pack, delivery):
            self._results.note_attempts(self._attempts(run, ended, delivery))
            return
        status = "infeasible" if delivery.out_of_memory else "failed"
        self._give_up(run, ended, delivery, status, delivery.error.splitlines()[0])

    def _fetch(self, remote: Remote, delivery: Delivery) -> None:
        for path in written(delivery.part, delivery.finished):
            remote.fetch(self._store.folder, path)

    def _runs_again(self, pack: Pack, delivery: Delivery) -> bool:
        """Whether what is left of a pack that raised can be tried in smaller ones."""
        if not delivery.out_of_memory:
            return self._scheduler.split(pack)
        if not self._scheduler.halve(pack):
            return False
        limit = self._scheduler.limits[pack.kind]
        self._results.note_event("pack limited", f"{pack.kind.job}: {limit} rows fit")
        self._write(partial(self._ledger.limited, pack.kind.job, pack.kind.model, limit))
        return True

    def _lost(self, worker: str, reason: str, *, is_fault: bool) -> None:
        self._loaded.discard(worker)
        self._held.pop(worker, None)
        self._results.note_event("worker lost", reason, worker)
        if worker in self._idle:
            self._idle.remove(worker)
        run = self._running.pop(worker, None)
        if run is None:
            return
        ended = self._ended(run, "lost", reason)
        if self._scheduler.lost(run.pack, counts=is_fault):
            self._results.note_attempts(self._attempts(run, ended))
            return
        # Who was alone with its last worker, and not for the first time, is held to have killed it.
        what = "quarantined" if len(run.pack.tasks) == 1 and run.pack.attempt > 1 else "lost"
        why = f"{what}: {run.pack.attempt} workers died running it; the last said: {reason.splitlines()[0]}"
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
        attempts = self._attempts(run, finished, delivery)
        self._results.learn(finished)
        since = run.latest or (delivery.started if delivery is not None else run.dispatched)
        run.latest = max((row.at for row in finished), default=time.time())
        taken = max(0.0, run.latest - since)  # clocks of other machines are others, and clocks jump
        self._budget.spend(taken)
        results = (*part.results, *self._intake.ended(part.results))
        self._results.accept(
            Part(part.files, results),
            seconds=taken / max(1, len(part.results)),
            attempts=attempts,
        )
        self._intake.advance(result.spec for result in results)

    def _attempts(
        self, run: _Running, finished: Iterable[Finished], delivery: Delivery | None = None
    ) -> list[dict[str, Any]]:
        """Rows of the table `attempts`."""
        return [
            {
                "attempt": run.attempt,
                "pack": str(run.pack.id),
                "trial": next(iter(self._intake.trials(row.spec)), None),
                "spec": row.spec,
                "job": run.pack.kind.job,
                "state": row.state,
                "reason": row.reason,
                "worker": run.worker,
                "host": delivery.host if delivery is not None else None,
                "device": delivery.device if delivery is not None else None,
                "loaded": int(delivery is not None and delivery.has_loaded),
                "started": delivery.started if delivery is not None else run.dispatched,
                "finished": row.at,
            }
            for row in finished
        ]

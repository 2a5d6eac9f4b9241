"""Accept results: make them visible with their trials, then tell the sampler and count."""

import json
import time
import uuid
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from jobs.spec import Spec, Status, choosing_split, is_defined
from orchestrator.budget import Budget
from orchestrator.lineage import spec_row
from orchestrator.pool import Finished
from orchestrator.progress import Tally
from orchestrator.sampler import OptunaSampler
from orchestrator.study import Ended
from search_spaces.base import Space, broken
from storage.donors import Donors
from storage.ledger import Asked
from storage.manifest import StoredResult
from storage.parquet import TableFile
from storage.remote import Remote
from storage.store import Part, Store


@dataclass(slots=True)
class _New:
    """What was taken in since the last commit."""

    files: list[TableFile] = field(default_factory=list)
    results: dict[str, StoredResult] = field(default_factory=dict)
    specs: list[Mapping[str, Any]] = field(default_factory=list)
    trials: list[dict[str, Any]] = field(default_factory=list)
    attempts: list[Mapping[str, Any]] = field(default_factory=list)
    events: list[Mapping[str, Any]] = field(default_factory=list)


def event_row(kind: str, detail: str, worker: str | None = None) -> dict[str, Any]:
    """A row of the table `events` of something that happens now; kinds are those of the schema."""
    return {"time": time.time(), "kind": kind, "worker": worker, "detail": detail}


class Results:
    """What is known of every spec, and which trials wait for one.

    Args:
        store: Where results are kept.
        space: Whose objectives decide.
        sampler: Who is told.
        tally: Counts to keep.
        budget: Hears the objectives of every trial that has completed.
        on_result: Called after each trial that has ended.
        remote: Where workers look for artifacts that do not share the folder.

    Attributes:
        artifacts: Spec -> its artifact, for those whose file is there.
        artifact_bytes: What they take.
    """

    def __init__(
        self,
        store: Store,
        space: Space,
        sampler: OptunaSampler,
        tally: Tally,
        budget: Budget,
        on_result: Callable[[], None],
        remote: Remote | None = None,
    ) -> None:
        self._remote = remote
        self._store = store
        self._space = space
        self._sampler = sampler
        self._tally = tally
        self._budget = budget
        self._on_result = on_result
        self._waiting: dict[str, list[Asked]] = {}
        self._first_trial: dict[str, int] = {}
        self._metrics = _stored_metrics(store, _wanted(space))
        self._best: float | None = None
        stored = store.artifacts()
        self.artifacts = {
            spec: artifact for spec, artifact in stored.items() if (store.folder / artifact.path).is_file()
        }
        self.artifact_bytes = sum(artifact.bytes for artifact in self.artifacts.values())
        self._lost = stored.keys() - self.artifacts.keys()
        self._ended: set[int] = set()
        self._new = _New()

    def of(self, spec: str) -> StoredResult | None:
        """The result of a spec, kept or about to be; None if it has none."""
        return self._new.results.get(spec) or self._store.results.get(spec)

    def is_lost(self, spec: str) -> bool:
        """Whether the spec had an artifact whose file is gone, so that it has to be computed again."""
        return spec in self._lost

    def expect(self, trial: Asked) -> None:
        """The trial waits for its spec's result."""
        self._waiting.setdefault(trial.spec.id, []).append(trial)

    def waiting(self, spec: str) -> Sequence[Asked]:
        """Trials that wait for a spec, in the order of asking."""
        return self._waiting.get(spec, ())

    def recall(self, row: Mapping[str, Any]) -> None:
        """A trial that an earlier driver stored; it may have died before telling."""
        self._ended.add(row["trial"])
        self._first_trial.setdefault(row["spec"], row["trial"])
        self._tell(row)

    def learn(self, finished: Iterable[Finished]) -> None:
        """Note the metrics and artifacts of rows that are about to be accepted."""
        wanted = _wanted(self._space)
        for row in finished:
            if row.artifact is not None:
                self.artifacts[row.spec] = row.artifact
                self.artifact_bytes += row.artifact.bytes
            if row.metrics is not None:
                self._metrics[row.spec] = {name: row.metrics[name] for name in wanted if name in row.metrics}

    def metrics(self, spec: str) -> Mapping[str, float]:
        """Metrics of a spec that decide anything, on the split that configurations are chosen on."""
        return self._metrics.get(spec, {})

    def accept(
        self, part: Part, *, seconds: float | None, attempts: Sequence[Mapping[str, Any]] = ()
    ) -> None:
        """Take results in for the next `commit`, together with the trials that wait for them.

        Args:
            part: What was written, and how each spec ended.
            seconds: Time that each result took; trials that share a result get none.
            attempts: Rows of the table `attempts`.
        """
        results = [self._judged(result) if self.waiting(result.spec) else result for result in part.results]
        new = self._without_known(part.files, results)
        self._new.files += new.files
        self._new.results.update({result.spec: result for result in new.results})
        self._new.attempts += attempts
        for result in results:
            for trial in self._waiting.pop(result.spec, ()):
                self._end(trial, result, seconds)

    def reuse(self, trial: Asked, result: StoredResult) -> None:
        """End a trial with a result that is there already, unless it has ended."""
        if trial.trial not in self._ended:
            self._end(trial, self._judged(result), None)

    def _end(self, trial: Asked, result: StoredResult, seconds: float | None) -> None:
        self._ended.add(trial.trial)
        self._new.trials.append(self._trial_row(trial, result, seconds))

    def note_spec(self, spec: Spec, needs: Iterable[Spec], control: str | None) -> None:
        """Take in, for the next `commit`, what a spec that has ended was made of; as in `spec_row`."""
        if self.of(spec.id) is None:  # else its artifact was lost, and it was computed again
            self._new.specs.append(spec_row(spec, needs, control))

    def note_attempts(self, attempts: Sequence[Mapping[str, Any]]) -> None:
        """Take attempts in that gave no result."""
        self._new.attempts += attempts

    def note_event(self, kind: str, detail: str, worker: str | None = None) -> None:
        """Take in, for the next `commit`, that something happened now; kinds are those of the schema."""
        self._new.events.append(event_row(kind, detail, worker))

    def commit(self) -> None:
        """Make what was taken in visible, all at once, then tell the sampler.

        Raises:
            StoreError: If the disk refuses; nothing becomes visible then, and it waits on.
        """
        new = self._new
        part = Part(tuple(new.files), tuple(new.results.values()))
        tables = {name: getattr(new, name) for name in ("trials", "attempts", "specs", "events")}
        self._store.commit([part], **tables)
        self._new = _New()
        for row in new.trials:
            self._tell(row)

    def take_over(self, spec: Spec, donors: Donors) -> bool:
        """Take a prerequisite's artifact from another sweep. Returns whether one has it."""
        found = donors.give(spec, self._store.folder)
        if found is None:
            return False
        made = {"spec": spec.id, "job": found.job}
        attempt = {
            **made,
            "attempt": uuid.uuid4().hex[:12],
            "pack": "",
            "state": "ok",
            "reason": f"taken over from {found.sweep}",
            "started": time.time(),
            "finished": time.time(),
        }
        kept = found.artifact
        if self._remote is not None:
            self._remote.put(self._store.folder, kept.path)
        row = {**made, "hash": kept.sha256, "path": kept.path, "bytes": kept.bytes}
        results = () if self.of(spec.id) else (StoredResult(spec.id, "completed", None),)
        specs = [] if self.of(spec.id) else [spec_row(spec)]
        self._store.commit([Part((), results)], artifacts=[row], attempts=[attempt], specs=specs)
        self.artifacts[spec.id] = kept
        self.artifact_bytes += kept.bytes
        return True

    def _judged(self, result: StoredResult) -> StoredResult:
        """A trial that breaks a constraint, or without all its objectives, is infeasible, not completed."""
        if result.status != "completed":
            return result
        why = broken(self._space.constraints, self.metrics(result.spec))
        if why is None and self._objectives(result.spec) is None:
            names = [objective.metric for objective in self._space.objectives]
            why = f"not all of the objectives {names} are defined"
        return result if why is None else StoredResult(result.spec, "infeasible", why)

    def _objectives(self, spec: str) -> list[float] | None:
        """Values of the objectives in order; None if any is not defined."""
        metrics = self.metrics(spec)
        values = [metrics.get(objective.metric) for objective in self._space.objectives]
        return (
            [float(value) for value in values if value is not None] if all(map(is_defined, values)) else None
        )

    def _without_known(self, files: tuple[Any, ...], results: Sequence[StoredResult]) -> Part:
        """A prerequisite that was computed again because its artifact was lost adds only the artifact."""
        new = tuple(result for result in results if self.of(result.spec) is None)
        if len(new) < len(results):
            files = tuple(file for file in files if file.table == "artifacts")
        return Part(files, new)

    def _trial_row(self, trial: Asked, result: StoredResult, seconds: float | None) -> dict[str, Any]:
        first = self._first_trial.setdefault(result.spec, trial.trial)
        return {
            "trial": trial.trial,
            "spec": result.spec,
            "state": result.status,
            "reason": result.reason,
            "reused_from": None if first == trial.trial else first,
            "seconds": seconds if first == trial.trial else None,
            "finished": time.time(),
            "params": json.dumps(dict(trial.params)),
        }

    def end_of(self, row: Mapping[str, Any]) -> Ended:
        """How the trial of a row of `trials` ended, as the sampler is told."""
        status = Status(row["state"])
        values = None if status == Status.FAILED else self._objectives(row["spec"])
        # Objectives that were accepted as a change may not be defined for all that had completed.
        return Ended(Status.INFEASIBLE if status == Status.COMPLETED and values is None else status, values)

    def _tell(self, row: Mapping[str, Any]) -> None:
        trial, (status, values) = row["trial"], self.end_of(row)
        self._sampler.tell(trial, status, values)
        self._tally.count(status)
        if status == Status.COMPLETED and values is not None:
            self._note_best(trial, values[0])
            self._budget.observe(values)
        self._on_result()

    def _note_best(self, trial: int, value: float) -> None:
        objective = self._space.objectives[0]
        sign = -1 if objective.direction == "minimize" else 1
        if self._best is None or sign * value > sign * self._best:
            self._best = value
            self._tally.best = f"{objective.metric} {value:.3g} (trial {trial})"


def _wanted(space: Space) -> set[str]:
    """The metrics that decide anything."""
    bounds = (*space.constraints, *(each for stage in space.stages for each in stage.constraints))
    return {*(each.metric for each in space.objectives), *(each.metric for each in bounds)}


def _stored_metrics(store: Store, wanted: Container[str]) -> dict[str, dict[str, float]]:
    metrics: dict[str, dict[str, dict[str, float]]] = {}
    for row in store.rows("metrics"):
        if row["name"] in wanted:
            metrics.setdefault(row["spec"], {}).setdefault(row["split"], {})[row["name"]] = row["value"]
    return {spec: splits.get(choosing_split(splits), {}) for spec, splits in metrics.items()}

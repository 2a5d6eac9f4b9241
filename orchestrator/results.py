"""Accept results: make them visible with their trials, then tell the sampler and count."""

import json
import time
import uuid
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from typing import Any

from jobs.spec import Spec, Status, choosing_split, is_defined
from orchestrator.pool import Finished
from orchestrator.progress import Tally
from orchestrator.sampler import OptunaSampler
from search_spaces.base import Constraint, Space
from storage.artifacts import Artifact
from storage.donors import Donors
from storage.ledger import Asked
from storage.store import Part, Store, StoredResult


class Results:
    """What is known of every spec, and which trials wait for one.

    Args:
        store: Where results are kept.
        space: Whose objectives decide.
        sampler: Who is told.
        tally: Counts to keep.
        on_result: Called after each trial that has ended.

    Attributes:
        artifacts: Spec -> its artifact, for those whose file is there.
    """

    def __init__(
        self, store: Store, space: Space, sampler: OptunaSampler, tally: Tally, on_result: Callable[[], None]
    ) -> None:
        self._store = store
        self._space = space
        self._sampler = sampler
        self._tally = tally
        self._on_result = on_result
        self._waiting: dict[str, list[Asked]] = {}
        self._first_trial: dict[str, int] = {}
        self._metrics = _stored_metrics(store, _wanted(space))
        self._best: float | None = None
        stored = {
            row["spec"]: Artifact(row["hash"], row["path"], row["bytes"]) for row in store.rows("artifacts")
        }
        self.artifacts = {
            spec: artifact for spec, artifact in stored.items() if (store.folder / artifact.path).is_file()
        }
        self._lost = stored.keys() - self.artifacts.keys()

    def of(self, spec: str) -> StoredResult | None:
        """The accepted result of a spec; None if it has none."""
        return self._store.results.get(spec)

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
        self._first_trial.setdefault(row["spec"], row["trial"])
        self._tell(row["trial"], row["spec"], row["state"])

    def learn(self, finished: Iterable[Finished]) -> None:
        """Note the metrics and artifacts of rows that are about to be accepted."""
        wanted = _wanted(self._space)
        for row in finished:
            if row.artifact is not None:
                self.artifacts[row.spec] = row.artifact
            if row.metrics is not None:
                self._metrics[row.spec] = {name: row.metrics[name] for name in wanted if name in row.metrics}

    def closed_gate(self, spec: str) -> str | None:
        """Which constraint of the space's gate a spec breaks; None if it keeps all."""
        assert self._space.gate is not None
        return self._broken(spec, self._space.gate.constraints)

    def accept(
        self, part: Part, *, seconds: float | None, attempts: Sequence[Mapping[str, Any]] = ()
    ) -> None:
        """Make results visible together with the trials that wait for them, then tell the sampler.

        Args:
            part: What was written, and how each spec ended.
            seconds: Time that each result took; trials that share a result get none.
            attempts: Rows of the table `attempts`.

        Raises:
            OSError: If the disk refuses; nothing is accepted then.
        """
        results = [self._judged(result) if self.waiting(result.spec) else result for result in part.results]
        trials = [(trial, result) for result in results for trial in self.waiting(result.spec)]
        rows = [self._trial_row(trial, result, seconds) for trial, result in trials]
        self._store.commit([self._without_known(part.files, results)], trials=rows, attempts=attempts)
        for result in results:
            self._waiting.pop(result.spec, None)
        for trial, result in trials:
            self._tell(trial.trial, result.spec, result.status)

    def reuse(self, trial: Asked, result: StoredResult) -> None:
        """End a trial with a result that is there already."""
        result = self._judged(result)
        self._store.commit([], trials=[self._trial_row(trial, result, None)])
        self._tell(trial.trial, result.spec, result.status)

    def take_over(self, spec: Spec, donors: Donors) -> bool:
        """Take a prerequisite's artifact from another sweep. Returns whether one has it."""
        found = donors.give(spec.id, self._store.folder)
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
        row = {**made, "hash": kept.sha256, "path": kept.path, "bytes": kept.bytes}
        results = () if self.of(spec.id) else (StoredResult(spec.id, "completed", None),)
        self._store.commit([Part((), results)], artifacts=[row], attempts=[attempt])
        self.artifacts[spec.id] = kept
        return True

    def note_attempts(self, attempts: Sequence[Mapping[str, Any]]) -> None:
        """Keep attempts that gave no result."""
        self._store.commit([], attempts=attempts)

    def _judged(self, result: StoredResult) -> StoredResult:
        """A trial that breaks a constraint, or without all its objectives, is infeasible, not completed."""
        if result.status != "completed":
            return result
        broken = self._broken(result.spec, self._space.constraints)
        if broken is None and self._objectives(result.spec) is None:
            names = [objective.metric for objective in self._space.objectives]
            broken = f"not all of the objectives {names} are defined"
        return result if broken is None else StoredResult(result.spec, "infeasible", broken)

    def _broken(self, spec: str, constraints: Sequence[Constraint]) -> str | None:
        metrics = self._metrics.get(spec, {})
        return next(filter(None, (each.broken(metrics.get(each.metric)) for each in constraints)), None)

    def _objectives(self, spec: str) -> list[float] | None:
        """Values of the objectives in order; None if any is not defined."""
        metrics = self._metrics.get(spec, {})
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

    def _tell(self, trial: int, spec: str, status: str) -> None:
        values = None if status == Status.FAILED else self._objectives(spec)
        self._sampler.tell(trial, Status(status), values)
        self._tally.count(status)
        if status == Status.COMPLETED and values is not None:
            self._note_best(trial, values[0])
        self._on_result()

    def _note_best(self, trial: int, value: float) -> None:
        objective = self._space.objectives[0]
        sign = -1 if objective.direction == "minimize" else 1
        if self._best is None or sign * value > sign * self._best:
            self._best = value
            self._tally.best = f"{objective.metric} {value:.3g} (trial {trial})"


def _wanted(space: Space) -> set[str]:
    """The metrics that decide anything."""
    gated = () if space.gate is None else space.gate.constraints
    bounds = (*space.constraints, *gated)
    return {*(each.metric for each in space.objectives), *(each.metric for each in bounds)}


def _stored_metrics(store: Store, wanted: Container[str]) -> dict[str, dict[str, float]]:
    metrics: dict[str, dict[str, dict[str, float]]] = {}
    for row in store.rows("metrics"):
        if row["name"] in wanted:
            metrics.setdefault(row["spec"], {}).setdefault(row["split"], {})[row["name"]] = row["value"]
    return {spec: splits.get(choosing_split(splits), {}) for spec, splits in metrics.items()}

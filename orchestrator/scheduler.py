"""Which specs run together next, on whom to wait, when to give up.

Pure: no clock, no I/O, no Ray, no model; every decision costs the same however many trials there are.
"""

from collections import deque
from collections.abc import Container, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple


class Kind(NamedTuple):
    """What all tasks of a pack have in common, and what a replica has to be for them.

    Attributes:
        job: Import path of the job.
        model: The weights that it runs on.
    """

    job: str
    model: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """A spec to be computed.

    Attributes:
        spec: Its id.
        kind: Its job and model.
        pack_key: Tasks of equal kind and key may share a pack; None = always alone.
        needs: Ids of the specs whose artifacts it takes.
        is_trial: Whether a trial waits for it; prerequisites go first.
    """

    spec: str
    kind: Kind
    pack_key: str | None
    needs: frozenset[str]
    is_trial: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Pack:
    """Tasks that run as rows of one batch.

    Attributes:
        id: Number of the pack, kept while its tasks stay together.
        tasks: The rows, of one kind.
        attempt: Which try this is, from 1.
    """

    id: int
    tasks: tuple[Task, ...]
    attempt: int = 1

    @property
    def kind(self) -> Kind:
        """Job and model of all its tasks."""
        return self.tasks[0].kind


def pack_limit(*, unasked: int, workers: int, max_pack: int) -> int:
    """Most trials of the next pack: half a worker's share of what is left, so that no worker waits long.

    From: S. F. Hummel, E. Schonberg and L. E. Flynn, "Factoring" (1992).

    Args:
        unasked: Trials that were not proposed yet.
        workers: Workers that share the work.
        max_pack: Most trials of any pack.
    """
    return max(1, min(max_pack, unasked // (2 * workers)))


class _Line:
    """Packs that wait: first come, first served inside a kind, and the kinds in turn."""

    def __init__(self) -> None:
        self._kinds: dict[Kind, deque[Pack]] = {}
        self._packs = 0

    def __len__(self) -> int:
        return self._packs

    def push(self, pack: Pack) -> None:
        self._kinds.setdefault(pack.kind, deque()).append(pack)
        self._packs += 1

    def push_first(self, pack: Pack) -> None:
        """Put back what was taken too much of; its kind has the next turn."""
        packs = self._kinds.pop(pack.kind, deque())
        packs.appendleft(pack)
        self._kinds = {pack.kind: packs, **self._kinds}
        self._packs += 1

    def pop(self, model: str | None) -> Pack | None:
        """The first pack of the kind whose turn it is, among those of a model; None takes any."""
        kind = next((kind for kind in self._kinds if model in (None, kind.model)), None)
        if kind is None:
            return None
        packs = self._kinds.pop(kind)
        pack = packs.popleft()
        if packs:
            self._kinds[kind] = packs  # behind the others
        self._packs -= 1
        return pack


class Scheduler:
    """Packs that wait, run, or run again.

    Packs are made when their tasks are added, of tasks that were added together. So what rides
    with what follows from the order of proposals alone, never from how fast a worker was; but a
    pack that turned out too large for its kind is cut, and so are the later ones.

    Args:
        max_attempts: Tries at a pack whose worker is lost.

    Attributes:
        limits: Kind -> most tasks that a replica was found to hold.
    """

    def __init__(self, *, max_attempts: int) -> None:
        self._max_attempts = max_attempts
        self._unsettled: set[str] = set()
        self._blocked: dict[int, tuple[Pack, set[str]]] = {}
        self._blocked_trials = 0
        self._dependents: dict[str, list[int]] = {}
        self._again, self._prerequisites, self._ready = _Line(), _Line(), _Line()
        self._packs = 0
        self.limits: dict[Kind, int] = {}

    @property
    def runnable(self) -> int:
        """Number of packs that a worker could be given now."""
        return len(self._again) + len(self._prerequisites) + len(self._ready)

    @property
    def blocked(self) -> int:
        """Number of packs of trials that wait for a prerequisite."""
        return self._blocked_trials

    def knows(self, spec: str) -> bool:
        """Whether the spec is waiting or running."""
        return spec in self._unsettled

    def add(self, tasks: Sequence[Task], *, settled: Container[str], most: int | None = None) -> None:
        """Take tasks in that were proposed together; those of equal kind and pack key become one pack.

        A task that another one needs, one of them or a known one, goes ahead in a pack of its own.

        Args:
            tasks: Specs that are not known yet.
            settled: Specs whose artifacts exist already.
            most: Most tasks of a pack; None = as many as there are.
        """
        self._unsettled.update(task.spec for task in tasks)
        needed = _needs(tasks)
        groups: dict[tuple[Kind, str], list[Task]] = {}
        for task in tasks:
            alone = task.pack_key is None or task.spec in needed or task.spec in self._dependents
            name = f"spec {task.spec}" if alone else f"key {task.pack_key}"
            groups.setdefault((task.kind, name), []).append(task)
        for group in groups.values():
            for part in _parts(group, most or len(group)):
                self._wait(self._pack(part), {need for need in _needs(part) if need not in settled})

    def _wait(self, pack: Pack, missing: set[str]) -> None:
        if not missing:
            (self._ready if pack.tasks[0].is_trial else self._prerequisites).push(pack)
            return
        self._blocked[pack.id] = (pack, missing)
        self._blocked_trials += pack.tasks[0].is_trial
        for need in missing:
            self._dependents.setdefault(need, []).append(pack.id)

    def _waited(self, spec: str) -> Iterator[tuple[Pack, set[str]]]:
        """Take out what waited for a spec: packs, and what they still lack besides."""
        for pack_id in self._dependents.pop(spec, ()):
            if pack_id in self._blocked:
                pack, missing = self._blocked.pop(pack_id)
                self._blocked_trials -= pack.tasks[0].is_trial
                yield pack, missing - {spec}

    def next_pack(self, model: str | None = None) -> Pack | None:
        """The pack that an idle worker should run now; None if nothing can run yet.

        What runs again goes first, then prerequisites; but packs of another model wait until there is
        nothing for the one that the worker holds.

        Args:
            model: What the worker holds; None = nothing yet.
        """
        for wanted in (model, None):
            for line in (self._again, self._prerequisites, self._ready):
                if (pack := line.pop(wanted)) is not None:
                    return self._cut(pack, line)
        return None

    def _cut(self, pack: Pack, line: _Line) -> Pack:
        """As much of a pack as a replica holds; the rest goes back."""
        most = self.limits.get(pack.kind, len(pack.tasks))
        if len(pack.tasks) <= most:
            return pack
        line.push_first(self._pack(pack.tasks[most:], pack.attempt))
        return self._pack(pack.tasks[:most], pack.attempt)

    def settle(self, spec: str) -> None:
        """A result of the spec was accepted; what waited for it may run."""
        self._unsettled.discard(spec)
        for pack, missing in self._waited(spec):
            self._wait(pack, missing)

    def fail(self, spec: str) -> list[str]:
        """The spec will have no artifact: the tasks that need it, directly or not, are dropped.

        Returns:
            Specs of the dropped tasks.
        """
        self._unsettled.discard(spec)
        dropped: list[str] = []
        for pack, missing in self._waited(spec):
            dropped += [task.spec for task in pack.tasks if spec in task.needs]
            kept = tuple(task for task in pack.tasks if spec not in task.needs)
            if kept:
                self._wait(replace(pack, tasks=kept), missing & _needs(kept))
        self._unsettled.difference_update(dropped)
        return dropped + [further for one in dropped for further in self.fail(one)]

    def lost(self, pack: Pack, *, counts: bool = True) -> bool:
        """The pack's worker died. Its unsettled tasks run again, in the same company.

        At the last attempt each runs alone, so that one that kills workers takes no other along.

        Args:
            pack: What it ran.
            counts: Whether the pack may be to blame; it is not where a machine was taken away.

        Returns:
            False if the pack had its last attempt; its tasks are then the caller's to fail.
        """
        attempt = pack.attempt + counts
        if attempt > self._max_attempts:
            return False
        left = self._left(pack)
        if attempt == self._max_attempts and len(left) > 1:
            self._run_again(left, 1, attempt)
        elif left:
            self._again.push(Pack(id=pack.id, tasks=left, attempt=attempt))
        return True

    def split(self, pack: Pack) -> bool:
        """The pack raised. Its unsettled tasks run again, each alone, so that one cannot fail the others.

        Returns:
            False if it was alone already; the failure is then its own.
        """
        if len(pack.tasks) == 1:
            return False
        self._run_again(self._left(pack), 1)
        return True

    def halve(self, pack: Pack) -> bool:
        """The pack did not fit. Its unsettled tasks run again in halves, and later ones of its kind are cut.

        Returns:
            False if it was alone already; it fits nowhere then.
        """
        if len(pack.tasks) == 1:
            return False
        half = len(pack.tasks) // 2
        self.limits[pack.kind] = min(half, self.limits.get(pack.kind, half))
        self._run_again(self._left(pack), half)
        return True

    def _run_again(self, tasks: Sequence[Task], most: int, attempt: int = 1) -> None:
        for part in _parts(tasks, most):
            self._again.push(self._pack(part, attempt))

    def _left(self, pack: Pack) -> tuple[Task, ...]:
        return tuple(task for task in pack.tasks if task.spec in self._unsettled)

    def _pack(self, tasks: Sequence[Task], attempt: int = 1) -> Pack:
        self._packs += 1
        return Pack(id=self._packs, tasks=tuple(tasks), attempt=attempt)


def _parts(tasks: Sequence[Task], most: int) -> Iterator[Sequence[Task]]:
    return (tasks[start : start + most] for start in range(0, len(tasks), most))


def _needs(tasks: Iterable[Task]) -> set[str]:
    return {need for task in tasks for need in task.needs}

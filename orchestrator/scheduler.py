"""Which specs run together next, on whom to wait, when to give up.

Pure: no clock, no I/O, no Ray, no model; every decision costs the same however many trials there are.
"""

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """A spec to be computed.

    Attributes:
        spec: Its id.
        job: Import path of its job.
        pack_key: Tasks of equal key may share a pack; None = always alone.
        needs: Ids of the specs whose artifacts it takes.
        is_trial: Whether a trial waits for it; prerequisites go first.
    """

    spec: str
    job: str
    pack_key: str | None
    needs: frozenset[str]
    is_trial: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Pack:
    """Tasks that run as rows of one batch.

    Attributes:
        id: Number of the pack, kept through its attempts.
        tasks: The rows.
        attempt: Which try this is, from 1.
    """

    id: int
    tasks: tuple[Task, ...]
    attempt: int = 1


class Scheduler:
    """Waiting tasks, and the packs made of them.

    Args:
        workers: Number of workers that share the work.
        trials: Number of trials that the sweep will have had in the end.
        max_pack: Most tasks of a pack.
        max_attempts: Tries at a pack whose worker is lost.
    """

    def __init__(self, *, workers: int, trials: int, max_pack: int, max_attempts: int) -> None:
        self._shares = 4 * workers
        self._undispatched = trials
        self._max_pack = max_pack
        self._max_attempts = max_attempts
        self._tasks: dict[str, Task] = {}
        self._missing: dict[str, set[str]] = {}
        self._dependents: dict[str, list[str]] = {}
        self._again: deque[Pack] = deque()
        self._prerequisites: deque[Task] = deque()
        self._ready: dict[str, deque[Task]] = {}
        self._packs = 0

    @property
    def ready(self) -> int:
        """Number of trials that could be packed now."""
        return sum(len(queue) for queue in self._ready.values())

    @property
    def has_work(self) -> bool:
        """Whether any task was added that is not settled yet, dispatched ones included."""
        return bool(self._tasks)

    @property
    def blocked(self) -> int:
        """Number of tasks that wait for a prerequisite."""
        return len(self._missing)

    def knows(self, spec: str) -> bool:
        """Whether the spec is waiting or running."""
        return spec in self._tasks

    def add(self, task: Task, *, settled: Iterable[str]) -> None:
        """Take a task in.

        Args:
            task: A spec that is not known yet.
            settled: The needs whose artifacts exist already.
        """
        self._tasks[task.spec] = task
        missing = set(task.needs) - set(settled)
        if not missing:
            self._enqueue(task)
            return
        self._missing[task.spec] = missing
        for need in missing:
            self._dependents.setdefault(need, []).append(task.spec)

    def no_new_work(self) -> None:
        """A trial was answered without computing anything (its spec had a result already)."""
        self._undispatched -= 1

    def pack_limit(self) -> int:
        """Most trials of the next pack: a share of what is left, so that no worker ends up waiting long."""
        return max(1, min(self._max_pack, self._undispatched // self._shares))

    def next_pack(self) -> Pack | None:
        """The pack that an idle worker should run now; None if nothing can run yet."""
        if self._again:
            return self._again.popleft()
        if self._prerequisites:
            return self._pack([self._prerequisites.popleft()])
        for key, queue in self._ready.items():
            limit = self.pack_limit() if key else 1
            tasks = [queue.popleft() for _ in range(min(limit, len(queue)))]
            self._undispatched -= len(tasks)
            if not queue:
                del self._ready[key]
            return self._pack(tasks)
        return None

    def settle(self, spec: str) -> None:
        """A result of the spec was accepted; what waited for it may run."""
        self._tasks.pop(spec, None)
        for dependent in self._dependents.pop(spec, []):
            missing = self._missing.get(dependent)
            if missing is None:
                continue
            missing.discard(spec)
            if not missing:
                del self._missing[dependent]
                self._enqueue(self._tasks[dependent])

    def fail(self, spec: str) -> list[str]:
        """The spec will have no artifact: it and all that need it, directly or not, are dropped.

        Returns:
            Ids of the dropped dependents.
        """
        self._tasks.pop(spec, None)
        dropped = []
        for dependent in self._dependents.pop(spec, []):
            if self._missing.pop(dependent, None) is not None:
                self._undispatched -= self._tasks[dependent].is_trial
                dropped += [dependent, *self.fail(dependent)]
        return dropped

    def lost(self, pack: Pack) -> bool:
        """The pack's worker died. Its unsettled tasks run again, in the same company.

        Returns:
            False if the pack had its last attempt; its tasks are then the caller's to fail.
        """
        if pack.attempt >= self._max_attempts:
            return False
        tasks = self._unsettled(pack)
        if tasks:
            self._again.append(Pack(id=pack.id, tasks=tasks, attempt=pack.attempt + 1))
        return True

    def split(self, pack: Pack) -> bool:
        """The pack raised. Its unsettled tasks run again, each alone, so that one cannot fail the others.

        Returns:
            False if it was alone already; the failure is then its own.
        """
        if len(pack.tasks) == 1:
            return False
        self._again.extend(self._pack([task]) for task in self._unsettled(pack))
        return True

    def _unsettled(self, pack: Pack) -> tuple[Task, ...]:
        return tuple(task for task in pack.tasks if task.spec in self._tasks)

    def _enqueue(self, task: Task) -> None:
        if not task.is_trial:
            self._prerequisites.append(task)
        else:
            self._ready.setdefault(task.pack_key or "", deque()).append(task)

    def _pack(self, tasks: list[Task]) -> Pack:
        self._packs += 1
        return Pack(id=self._packs, tasks=tuple(tasks))

"""Which specs run together next, on whom to wait, when to give up.

Pure: no clock, no I/O, no Ray, no model; every decision costs the same however many trials there are.
"""

from collections import deque
from collections.abc import Container, Iterable, Sequence
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
        id: Number of the pack, kept while its tasks stay together.
        tasks: The rows.
        attempt: Which try this is, from 1.
    """

    id: int
    tasks: tuple[Task, ...]
    attempt: int = 1


def pack_limit(*, unasked: int, workers: int, max_pack: int) -> int:
    """Most trials of the next pack: a share of what is left, so that no worker ends up waiting long.

    Args:
        unasked: Trials that were not proposed yet.
        workers: Workers that share the work.
        max_pack: Most trials of any pack.
    """
    return max(1, min(max_pack, unasked // (4 * workers)))


class Scheduler:
    """Packs that wait, run, or run again.

    Packs are made when their tasks are added, of tasks that were added together. So what rides
    with what follows from the order of proposals alone, never from how fast a worker was.

    Args:
        max_attempts: Tries at a pack whose worker is lost.
    """

    def __init__(self, *, max_attempts: int) -> None:
        self._max_attempts = max_attempts
        self._unsettled: set[str] = set()
        self._blocked: dict[int, tuple[Pack, set[str]]] = {}
        self._dependents: dict[str, list[int]] = {}
        self._again: deque[Pack] = deque()
        self._prerequisites: deque[Pack] = deque()
        self._ready: deque[Pack] = deque()
        self._packs = 0

    @property
    def runnable(self) -> int:
        """Number of packs that a worker could be given now."""
        return len(self._again) + len(self._prerequisites) + len(self._ready)

    @property
    def blocked(self) -> int:
        """Number of packs of trials that wait for a prerequisite."""
        return sum(pack.tasks[0].is_trial for pack, _ in self._blocked.values())

    def knows(self, spec: str) -> bool:
        """Whether the spec is waiting or running."""
        return spec in self._unsettled

    def add(self, tasks: Sequence[Task], *, settled: Container[str], most: int | None = None) -> None:
        """Take tasks in that were proposed together; those of equal pack key become one pack.

        A task that another one needs, one of them or a known one, goes ahead in a pack of its own.

        Args:
            tasks: Specs that are not known yet.
            settled: Specs whose artifacts exist already.
            most: Most tasks of a pack; None = as many as there are.
        """
        self._unsettled.update(task.spec for task in tasks)
        needed = _needs(tasks) | self._dependents.keys()
        groups: dict[str, list[Task]] = {}
        for task in tasks:
            alone = task.pack_key is None or task.spec in needed
            groups.setdefault(task.spec if alone else f"key {task.pack_key}", []).append(task)
        for group in groups.values():
            size = most or len(group)
            for start in range(0, len(group), size):
                part = group[start : start + size]
                self._wait(self._pack(part), {need for need in _needs(part) if need not in settled})

    def _wait(self, pack: Pack, missing: set[str]) -> None:
        if not missing:
            self._enqueue(pack)
            return
        self._blocked[pack.id] = (pack, missing)
        for need in missing:
            self._dependents.setdefault(need, []).append(pack.id)

    def _enqueue(self, pack: Pack) -> None:
        (self._ready if pack.tasks[0].is_trial else self._prerequisites).append(pack)

    def next_pack(self) -> Pack | None:
        """The pack that an idle worker should run now; None if nothing can run yet."""
        for queue in (self._again, self._prerequisites, self._ready):
            if queue:
                return queue.popleft()
        return None

    def settle(self, spec: str) -> None:
        """A result of the spec was accepted; what waited for it may run."""
        self._unsettled.discard(spec)
        for pack_id in self._dependents.pop(spec, []):
            if pack_id in self._blocked:
                pack, missing = self._blocked.pop(pack_id)
                self._wait(pack, missing - {spec})

    def fail(self, spec: str) -> list[str]:
        """The spec will have no artifact: the tasks that need it, directly or not, are dropped.

        Returns:
            Specs of the dropped tasks.
        """
        self._unsettled.discard(spec)
        dropped: list[str] = []
        for pack_id in self._dependents.pop(spec, []):
            if pack_id in self._blocked:
                pack, missing = self._blocked.pop(pack_id)
                dropped += [task.spec for task in pack.tasks if spec in task.needs]
                kept = tuple(task for task in pack.tasks if spec not in task.needs)
                if kept:
                    self._wait(Pack(id=pack.id, tasks=kept), missing & _needs(kept))
        self._unsettled.difference_update(dropped)
        return dropped + [further for one in dropped for further in self.fail(one)]

    def lost(self, pack: Pack) -> bool:
        """The pack's worker died. Its unsettled tasks run again, in the same company.

        At the last attempt each runs alone, so that one that kills workers takes no other along.

        Returns:
            False if the pack had its last attempt; its tasks are then the caller's to fail.
        """
        attempt = pack.attempt + 1
        if attempt > self._max_attempts:
            return False
        left = self._left(pack)
        if attempt == self._max_attempts and len(left) > 1:
            self._again.extend(self._pack([task], attempt) for task in left)
        elif left:
            self._again.append(Pack(id=pack.id, tasks=left, attempt=attempt))
        return True

    def split(self, pack: Pack) -> bool:
        """The pack raised. Its unsettled tasks run again, each alone, so that one cannot fail the others.

        Returns:
            False if it was alone already; the failure is then its own.
        """
        if len(pack.tasks) == 1:
            return False
        self._again.extend(self._pack([task]) for task in self._left(pack))
        return True

    def _left(self, pack: Pack) -> tuple[Task, ...]:
        return tuple(task for task in pack.tasks if task.spec in self._unsettled)

    def _pack(self, tasks: list[Task], attempt: int = 1) -> Pack:
        self._packs += 1
        return Pack(id=self._packs, tasks=tuple(tasks), attempt=attempt)


def _needs(tasks: Iterable[Task]) -> set[str]:
    return {need for task in tasks for need in task.needs}

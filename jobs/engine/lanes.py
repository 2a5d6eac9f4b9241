"""Work side by side on a CPU: each lane has threads, modules and caches of its own, and the same weights.

Two threads that share every matrix product wait for each other at each one. Two that go through the model on
their own, with other prompts, do not.
"""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from queue import SimpleQueue
from threading import Event, Lock, Semaphore

import torch

from jobs.engine.memory import Found, within_memory
from jobs.engine.replica import Replica
from jobs.engine.skipping import separable

LANES = 2
_FEWEST = 128
"""With less work than that, one lane is as fast."""
_MOST_WAITING = 64
"""Findings that wait for a reader; then the lanes wait too."""

Run = Callable[[Replica, list[int]], Iterator[tuple[int, Found]]]
"""Takes a replica and indices of work, and yields each with what it finds, within the replica's budgets."""


def side_by_side(
    replica: Replica, prompts: Sequence[int], indices: Sequence[int], run: Run[Found]
) -> Iterator[tuple[int, Found]]:
    """All that `run` finds, within the replica's memory, in lanes where that is faster.

    Lanes go on between one finding and the next, until the iterator ends or is closed; meanwhile the caller's
    own products have the threads of one lane, and what it starts on the same replica runs beside the lanes.

    Which lane a prompt takes depends on nothing but the work, so that a run repeated is the same.

    Args:
        replica: The model.
        prompts: Prompt of each piece of work; all pieces of a prompt take the same lane.
        indices: Of the pieces to do.
        run: Does them.

    Raises:
        OutOfMemory: If even one at a time does not fit.
    """
    parts = _parts(prompts, indices)
    worth_it = len(indices) >= _FEWEST and all(parts) and torch.get_num_threads() >= LANES
    if replica.device.type != "cpu" or not worth_it or not replica.has_lanes.acquire(blocking=False):
        yield from within_memory(replica, indices, lambda left: run(replica, left))
        return
    try:
        yield from _in_lanes(replica, parts, run)
    finally:
        replica.has_lanes.release()


def _parts(prompts: Sequence[int], indices: Sequence[int]) -> list[list[int]]:
    """Every other prompt in each lane."""
    different = dict.fromkeys(prompts[index] for index in indices)
    lane_of = {prompt: number % LANES for number, prompt in enumerate(different)}
    return [[index for index in indices if lane_of[prompts[index]] == lane] for lane in range(LANES)]


def _in_lanes(
    replica: Replica, parts: Sequence[Sequence[int]], run: Run[Found]
) -> Iterator[tuple[int, Found]]:
    # Tried out once, not in each lane.
    _ = separable(replica), replica.cache_bytes, replica.blocks_give_tuples
    stopped, given = Event(), replica.memory // len(parts)
    lanes = [replica.lane(number, of=len(parts), stopped=stopped) for number in range(len(parts))]
    found: SimpleQueue[tuple[int, tuple[int, Found] | None]] = SimpleQueue()
    room = Semaphore(_MOST_WAITING)

    def work(number: int) -> None:
        lane = lanes[number]
        try:
            for each in within_memory(lane, parts[number], lambda left: run(lane, left)):
                room.acquire()
                found.put((number, each))
        finally:
            found.put((number, None))

    with _THREADS.divided(len(parts)), ThreadPoolExecutor(len(parts)) as pool:
        try:
            running = {number: pool.submit(work, number) for number in range(len(parts))}
            while running:
                number, each = found.get()
                if each is None:
                    running.pop(number).result()
                else:
                    room.release()
                    yield each
        finally:
            stopped.set()
            room.release(sum(map(len, parts)))
            replica.token_budget = min(replica.token_budget, *(lane.token_budget for lane in lanes))
            least = min(lane.memory for lane in lanes)
            if least < given:
                replica.memory = min(replica.memory, len(parts) * least)


class _Threads:
    """How many threads a product has; several replicas' lanes may begin and end in any order."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._users = 0
        self._before = 0

    @contextmanager
    def divided(self, lanes: int) -> Iterator[None]:
        """Inside the block the threads are divided among the lanes."""
        with self._lock:
            if not self._users:
                self._before = torch.get_num_threads()
                torch.set_num_threads(max(1, self._before // lanes))
            self._users += 1
        try:
            yield
        finally:
            with self._lock:
                self._users -= 1
                if not self._users:
                    torch.set_num_threads(self._before)


_THREADS = _Threads()

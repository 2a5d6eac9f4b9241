"""The scheduler at a million trials and thousands of workers, by a virtual clock.

Real are the scheduler and what it costs; simulated are the proposals, the workers, how long a trial takes,
and who dies.
"""

import heapq
import random
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from orchestrator.sampler import Proposal
from orchestrator.scheduler import Kind, Pack, Scheduler, Task, pack_limit

_KIND = Kind("jobs.steer", "model")
_MAX_PACK = 16
_MAX_ATTEMPTS = 10
_SHORTEST_SECONDS, _LONGEST_SECONDS = 2.0, 40.0
_RESTART_SECONDS = 60.0
_DEATHS = 0.001
"""Share of packs whose worker dies on the way."""


class Simulated(NamedTuple):
    """How a simulated sweep went.

    Attributes:
        workers: How many.
        trials: How many.
        deaths: Workers that died.
        utilisation: Share of the workers' time until the queue was empty that they had a pack.
        decisions: Proposals taken in, packs given out, results and deaths.
        decisions_per_second: Over the whole simulation, its own bookkeeping included.
        microseconds_per_decision: In each tenth of the simulation.
    """

    workers: int
    trials: int
    deaths: int
    utilisation: float
    decisions: int
    decisions_per_second: float
    microseconds_per_decision: list[float]


class Proposals:
    """Random proposals, asked for as `OptunaSampler` is: a layer, which a pack shares, and a dose."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)
        self._asked = 0

    def ask(self, fixed: Mapping[str, Any] | None = None) -> Proposal:
        """Propose."""
        params = {"layer": self._random.randrange(32), "dose": self._random.random(), **(fixed or {})}
        self._asked += 1
        return Proposal(self._asked - 1, params, 0, tuple(fixed or ()))


@dataclass(order=True, slots=True)
class _Event:
    """A pack ends, or (without one) a worker is back; whether its worker dies of it."""

    at: float
    number: int
    pack: Pack | None = field(compare=False, default=None)
    dies: bool = field(compare=False, default=False)


class Simulation:
    """A sweep of so many trials on so many workers.

    Args:
        workers: How many.
        trials: How many.
        seed: Of chance.
    """

    def __init__(self, *, workers: int, trials: int, seed: int = 0) -> None:
        self._workers, self._trials = workers, trials
        self._chance = random.Random(seed)
        self._proposals = Proposals(seed)
        self._scheduler = Scheduler(max_attempts=_MAX_ATTEMPTS)
        self._idle, self._restarting = workers, 0
        self._events: list[_Event] = []
        self._clock = self._idle_seconds = 0.0
        self._asked = self._settled = self._deaths = self._decisions = self._numbers = 0

    def run(self) -> Simulated:
        """Until every trial has its result."""
        began = time.perf_counter()
        tenths: list[tuple[float, int]] = []
        drained: float | None = None
        while self._settled < self._trials:
            self._dispatch()
            self._propose()
            self._dispatch()
            if drained is None and self._asked == self._trials and self._scheduler.runnable == 0:
                drained = self._idle_seconds / (self._workers * self._clock)
            self._advance()
            if self._settled * 10 >= self._trials * (len(tenths) + 1):
                tenths.append((time.perf_counter() - began, self._decisions))
        seconds = time.perf_counter() - began
        return Simulated(
            self._workers,
            self._trials,
            self._deaths,
            1 - (drained or 0.0),
            self._decisions,
            self._decisions / seconds,
            [
                1e6 * (after[0] - before[0]) / (after[1] - before[1])
                for before, after in zip([(0.0, 0), *tenths], tenths, strict=False)
            ],
        )

    def _propose(self) -> None:
        """As `Sweep` does: a group at a time, until every idle worker has a pack and one waits."""
        while self._asked < self._trials and self._scheduler.runnable < self._idle + 1:
            unasked = self._trials - self._asked
            count = pack_limit(unasked=unasked, workers=self._workers, max_pack=_MAX_PACK)
            first = self._proposals.ask()
            held = {"layer": first.params["layer"]}
            group = [first, *(self._proposals.ask(held) for _ in range(count - 1))]
            self._scheduler.add([_task(proposal) for proposal in group], settled=())
            self._asked += count
            self._decisions += count

    def _dispatch(self) -> None:
        while self._idle and (pack := self._scheduler.next_pack(_KIND.model)) is not None:
            seconds = sum(self._chance.uniform(_SHORTEST_SECONDS, _LONGEST_SECONDS) for _ in pack.tasks)
            dies = self._chance.random() < _DEATHS
            self._push(seconds * self._chance.random() if dies else seconds, pack, dies=dies)
            self._idle -= 1
            self._decisions += 1

    def _push(self, seconds: float, pack: Pack | None = None, *, dies: bool = False) -> None:
        self._numbers += 1
        heapq.heappush(self._events, _Event(self._clock + seconds, self._numbers, pack, dies))

    def _advance(self) -> None:
        """Let the next thing happen."""
        event = heapq.heappop(self._events)
        self._idle_seconds += (self._idle + self._restarting) * (event.at - self._clock)
        self._clock = event.at
        if event.pack is None:
            self._restarting -= 1
            self._idle += 1
        elif event.dies:
            assert self._scheduler.lost(event.pack), "a trial was given up"
            self._deaths += 1
            self._decisions += 1
            self._restarting += 1
            self._push(_RESTART_SECONDS)
        else:
            for task in event.pack.tasks:
                self._scheduler.settle(task.spec)
            self._settled += len(event.pack.tasks)
            self._decisions += len(event.pack.tasks)
            self._idle += 1


def _task(proposal: Proposal) -> Task:
    return Task(
        spec=f"spec{proposal.trial}",
        kind=_KIND,
        pack_key=str(proposal.params["layer"]),
        needs=frozenset(),
        is_trial=True,
    )

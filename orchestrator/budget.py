"""When a sweep has cost enough: hours, device hours, disk, or a front that hardly grows any more."""

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from orchestrator.config import RunConfig
from search_spaces.base import Objective
from storage.front import hypervolume

_CHECK_SECONDS = 5.0
_WINDOW = 0.25
"""Share of the hours so far over which the growth of the front is judged."""
_FEWEST = 20
"""Completed trials in the window; fewer say nothing."""


class Budget:
    """What a sweep may cost, and what it has.

    Device hours are workers' busy hours times `gpus_per_worker`, or 1 where that is 0.

    Args:
        config: The limits.
        objectives: What the front is made of.
        spent_seconds: Busy seconds of all workers in earlier runs of the sweep.
        clock: Gives s, never backwards.
    """

    def __init__(
        self,
        config: RunConfig,
        objectives: Sequence[Objective],
        *,
        spent_seconds: float = 0.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._config = config
        self._directions = [objective.direction for objective in objectives]
        self._devices = max(1.0, config.gpus_per_worker)
        self._hours = spent_seconds * self._devices / 3600
        self._clock = clock
        self._began = self._checked = clock()
        self._seen: list[tuple[float, Sequence[float]]] = []

    def spend(self, seconds: float) -> None:
        """A worker was busy for so long."""
        self._hours += seconds * self._devices / 3600

    def observe(self, values: Sequence[float]) -> None:
        """A trial has completed with these objectives."""
        self._seen.append((self._hours, values))

    def spent(self, kept_bytes: int = 0) -> str | None:
        """Why the sweep should stop; None if it may go on. Looks at the front now and then only.

        Args:
            kept_bytes: What its tables and artifacts take.
        """
        config, now = self._config, self._clock()
        if config.budget_hours is not None and now - self._began >= 3600 * config.budget_hours:
            return f"{config.budget_hours:g} hours are over (budget_hours)"
        if config.budget_device_hours is not None and self._hours >= config.budget_device_hours:
            return f"{self._hours:.3g} device hours are spent (budget_device_hours)"
        if config.budget_disk_gib is not None and kept_bytes >= config.budget_disk_gib * 2**30:
            return f"{kept_bytes / 2**30:.3g} GiB of disk are taken (budget_disk_gib)"
        if config.least_gain is None or now - self._checked < _CHECK_SECONDS:
            return None
        self._checked = now
        gain = self.gain()
        if gain is None or gain >= config.least_gain:
            return None
        return f"the front's hypervolume grows by {gain:.2g} of itself a device hour (least_gain)"

    def gain(self) -> float | None:
        """Growth of the front's hypervolume in the last quarter of all device hours, a device hour.

        As a share of the hypervolume now, with the worst values seen as its reference. None while too few
        trials have completed in that time.
        """
        since = self._hours * (1 - _WINDOW)
        before = sum(hours < since for hours, _ in self._seen)
        if len(self._seen) - before < _FEWEST or before == 0 or self._hours == 0:
            return None
        points = np.array([values for _, values in self._seen])
        now = hypervolume(points, self._directions, among=points)
        if now == 0:
            return 0.0
        then = hypervolume(points[:before], self._directions, among=points)
        return (now - then) / now / (self._hours * _WINDOW)


def busy_seconds(attempts: Iterable[Mapping[str, Any]]) -> float:
    """How long workers were busy, from rows of the table `attempts`, one a result; in s."""
    longest: dict[str, float] = {}
    for row in attempts:
        seconds = row["finished"] - row["started"]
        longest[row["attempt"]] = max(seconds, longest.get(row["attempt"], 0.0))
    return sum(longest.values())

"""Intervals: pure functions of counts."""

import math
from typing import NamedTuple


class Interval(NamedTuple):
    """A 95 % interval."""

    low: float
    high: float


def wilson_interval(successes: int, trials: int) -> Interval:
    """Wilson score interval of a proportion at 95 %; (0, 1) if there were no trials.

    Source: Wilson, Journal of the American Statistical Association 22 (1927) 209-212.
    """
    if trials == 0:
        return Interval(0.0, 1.0)
    z = 1.959963984540054
    share = successes / trials
    centre = share + z * z / (2 * trials)
    spread = z * math.sqrt(share * (1 - share) / trials + z * z / (4 * trials * trials))
    scale = 1 + z * z / trials
    return Interval(max(0.0, (centre - spread) / scale), min(1.0, (centre + spread) / scale))

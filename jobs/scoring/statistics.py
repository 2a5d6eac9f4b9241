"""Intervals and probabilities of counts: pure functions."""

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


def chance_probability(successes: int, trials: int) -> float:
    """Probability of at least this many successes if each has probability 1/2; exact, 1 without trials.

    It is the one-sided p value of one binomial test. Whoever takes the best of n tests multiplies it by n.

    Source: Bonferroni's inequality; Dunn, Journal of the American Statistical Association 56 (1961) 52-64.
    """
    ways = at_least = math.comb(trials, successes)
    for more in range(successes + 1, trials + 1):
        ways = ways * (trials - more + 1) // more
        at_least += ways
    return at_least / (1 << trials)

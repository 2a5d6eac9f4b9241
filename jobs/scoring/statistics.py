"""Intervals, probabilities and agreement of scores: pure functions."""

import math
from collections import Counter
from collections.abc import Hashable, Sequence
from typing import NamedTuple

import numpy as np


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


class PairedDifference(NamedTuple):
    """Mean of first minus second over pairs, and its interval.

    Attributes:
        mean: Mean difference; NaN without pairs.
        interval: 95 % bootstrap interval of it; NaN with fewer than two pairs.
        pairs: Pairs of which both values are defined.
    """

    mean: float
    interval: Interval
    pairs: int


_BLOCK = 1 << 20  # draws held in memory at once


def paired_bootstrap(
    first: Sequence[float], second: Sequence[float], *, seed: int, resamples: int = 10_000
) -> PairedDifference:
    """Mean difference of paired scores, and its 95 % interval by the percentile bootstrap over pairs.

    Pairs are drawn whole and with replacement. Pairs with a value that is not finite are left out and not
    counted in `pairs`; if they are many, what is compared is no longer the sample.

    Args:
        first: A score of each item, such as the steered one.
        second: The other score of the same items in the same order.
        seed: Seed of the draws: equal seeds and scores give equal intervals.
        resamples: Number of draws of the whole sample.

    Raises:
        ValueError: If the lengths differ or `resamples` is below 1.

    Source: Efron and Tibshirani, An Introduction to the Bootstrap (1993), chapter 13.
    """
    if len(first) != len(second) or resamples < 1:
        raise ValueError(
            f"{len(first)} and {len(second)} scores, {resamples} resamples; scores come in pairs"
        )
    every = np.asarray(first, dtype=np.float64) - np.asarray(second, dtype=np.float64)
    differences = every[np.isfinite(every)]
    number = len(differences)
    if number < 2:
        mean = float(differences[0]) if number else math.nan
        return PairedDifference(mean, Interval(math.nan, math.nan), number)
    generator = np.random.default_rng(seed)
    block = max(1, _BLOCK // number)
    means = [
        differences[generator.integers(0, number, size=(min(block, resamples - done), number))].mean(axis=1)
        for done in range(0, resamples, block)
    ]
    low, high = np.quantile(np.concatenate(means), [0.025, 0.975])
    return PairedDifference(float(differences.mean()), Interval(float(low), float(high)), number)


def cohens_kappa(first: Sequence[Hashable], second: Sequence[Hashable]) -> float:
    """Agreement of two raters beyond chance: 1 = always, 0 = as by chance, below 0 = less.

    Args:
        first: The category that one rater gives each item.
        second: Same for the other rater, in the same order.

    Returns:
        NaN without items, and where both give all items the same one category.

    Raises:
        ValueError: If the lengths differ.

    Source: Cohen, Educational and Psychological Measurement 20 (1960) 37-46.
    """
    if len(first) != len(second):
        raise ValueError(f"{len(first)} and {len(second)} ratings; both raters rate the same items")
    items = len(first)
    ones, others = Counter(first), Counter(second)
    by_chance = sum(count * others[category] for category, count in ones.items())
    if by_chance == items * items:
        return math.nan
    agreed = sum(one == other for one, other in zip(first, second, strict=True))
    return (agreed * items - by_chance) / (items * items - by_chance)

"""How far a reading of a panel is from the unsteered one, with intervals.

B draws, R replies.
"""

from collections.abc import Mapping

import numpy as np

from jobs.scoring.statistics import paired_bootstrap

COMPARED = ("log_odds", "nll", "repetition", "empty")
"""Scores of `jobs.reading.readout.split_scores` that are kept of the unsteered model to compare with."""
_DRAWS = 2000
_FEWEST = 5
"""Prompts that a bootstrap takes: of fewer it says that two of them were alike, and nothing of others."""


def effect(after: np.ndarray, before: np.ndarray, seed: int) -> dict[str, float]:
    """Mean shift of the log-odds with its 95 % bootstrap interval over choices, paired.

    Args:
        after: One a choice, nats; with the sign of the side that is wanted.
        before: The same of the unsteered model.
        seed: Of the draws.
    """
    found = paired_bootstrap(after.tolist(), before.tolist(), seed=seed)
    low, high = found.interval
    return {"effect": found.mean, "effect_low": low, "effect_high": high}


def damage(after: Mapping[str, np.ndarray], before: Mapping[str, np.ndarray], seed: int) -> dict[str, float]:
    """Rises over unsteered, each at least 0, added, with a 95 % interval of a bootstrap over prompts, paired.

    The interval of fewer than five prompts is NaN.

    Args:
        after: Score -> its values, one a reply.
        before: The same of the unsteered model.
        seed: Of the draws.
    """
    prompts = len(after["empty"])
    each_R = np.full(prompts, 1 / prompts)
    times_BR = np.random.default_rng(seed).multinomial(prompts, each_R, size=_DRAWS).astype(float)
    once_1R = np.ones((1, prompts))

    def risen(times: np.ndarray) -> np.ndarray:
        rises = [_means(after[name], times) - _means(before[name], times) for name in COMPARED[1:]]
        # Not defined stays so, which `max` would hide.
        total: np.ndarray = np.sum([np.where(rise <= 0, 0.0, rise) for rise in rises], axis=0)
        return total

    drawn = risen(times_BR)
    drawn = drawn[np.isfinite(drawn)]
    low, high = np.quantile(drawn, [0.025, 0.975]) if prompts >= _FEWEST and len(drawn) else (np.nan, np.nan)
    return {"damage": float(risen(once_1R)[0]), "damage_low": float(low), "damage_high": float(high)}


def _means(values_R: np.ndarray, times_BR: np.ndarray) -> np.ndarray:
    """Mean of the values that are defined, each as often as a draw has it; NaN of none."""
    known_R = np.isfinite(values_R)
    counts_B = times_BR @ known_R.astype(float)
    totals_B = times_BR @ np.where(known_R, values_R, 0.0)
    found_B: np.ndarray = np.divide(
        totals_B, counts_B, out=np.full(len(counts_B), np.nan), where=counts_B > 0
    )
    return found_B

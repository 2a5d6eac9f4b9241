"""Which of several norms makes completions most diverse before they become loops, and how sure that is.

P prompts, V vectors, E width of an embedding.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


class Curve(NamedTuple):
    """What a set of vectors says at one norm.

    Attributes:
        distances_PVV: 1 - cosine of two completions' sentence embeddings.
        known_PV: Which completions have an embedding.
        fluent_PV: Which of them are fluent.
    """

    distances_PVV: np.ndarray
    known_PV: np.ndarray
    fluent_PV: np.ndarray


class Pick(NamedTuple):
    """Places among the norms; None where no prompt has two completions to compare.

    Attributes:
        best: The norm whose fluent completions are most diverse, up to the cusp.
        cusp: The norm whose completions are most diverse, fluent or not.
    """

    best: int | None
    cusp: int | None


def curve(embeddings_PVE: np.ndarray, fluent_PV: np.ndarray) -> Curve:
    """What a set says, from the embeddings of its completions, NaN where there is none, and their fluency."""
    known_PV = np.isfinite(embeddings_PVE).all(axis=2)
    filled_PVE = np.nan_to_num(embeddings_PVE).astype(np.float64)
    norms_PV1 = np.linalg.norm(filled_PVE, axis=2, keepdims=True)
    units_PVE = filled_PVE / np.where(norms_PV1 == 0, 1, norms_PV1)
    return Curve(1 - units_PVE @ units_PVE.swapaxes(1, 2), known_PV, known_PV & fluent_PV.astype(bool))


def pick(curves: Sequence[Curve], weights_V: np.ndarray | None = None) -> Pick:
    """The best norm and the cusp of a series of rising norms; the lowest of equals.

    Args:
        curves: One a norm.
        weights_V: How often each vector counts; None counts each once.
    """
    vectors = curves[0].known_PV.shape[1]
    weights_V = np.ones(vectors) if weights_V is None else weights_V
    everything, fluent = (
        np.array([_diversity(each.distances_PVV, chosen_PV, weights_V) for each, chosen_PV in pairs])
        for pairs in (
            [(each, each.known_PV) for each in curves],
            [(each, each.fluent_PV) for each in curves],
        )
    )
    cusp = _highest(everything)
    return Pick(None if cusp is None else _highest(fluent[: cusp + 1]), cusp)


def _highest(values: np.ndarray) -> int | None:
    return None if np.isnan(values).all() else int(np.nanargmax(values))


def bootstrap(curves: Sequence[Curve], *, resamples: int, seed: int) -> list[Pick]:
    """What would have been picked with other vectors: those of the set, drawn with replacement.

    The vectors of all norms start alike, so that the same ones are drawn at each.

    Args:
        curves: One a norm.
        resamples: How many sets are drawn.
        seed: Of the draws.
    """
    generator = np.random.default_rng(seed)
    vectors = curves[0].known_PV.shape[1]
    return [
        pick(curves, generator.multinomial(vectors, np.full(vectors, 1 / vectors))) for _ in range(resamples)
    ]


def _diversity(distances_PVV: np.ndarray, chosen_PV: np.ndarray, weights_V: np.ndarray) -> float:
    """Mean over the prompts of the mean distance between two chosen completions of different vectors.

    A vector that is drawn twice makes no pair with itself, which would say nothing of the set's diversity.
    """
    counts_PV = chosen_PV * weights_V
    pairs_PVV = np.triu(counts_PV[:, :, None] * counts_PV[:, None, :], k=1)
    totals_P = pairs_PVV.sum(axis=(1, 2))
    if not totals_P.any():
        return float("nan")
    sums_P = (distances_PVV * pairs_PVV).sum(axis=(1, 2))
    return float((sums_P[totals_P > 0] / totals_P[totals_P > 0]).mean())

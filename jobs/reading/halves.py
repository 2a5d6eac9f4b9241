"""How sure the metrics of a set of vectors are: read again on halves of the set.

Vectors are drawn without replacement: the same one twice would say the same twice, and lower any diversity.
V vectors, P prompts, R draws.
"""

import math

import numpy as np

from jobs.scoring.similarity import cosine_similarity
from jobs.spec import Metric

METRICS = {
    "diversity_low": Metric("1 - cosine", "lower end of its 95 % interval over halves of the vectors"),
    "diversity_high": Metric("1 - cosine", "upper end of its 95 % interval over halves of the vectors"),
    "nll_low": Metric("nats/token", "lower end of its 95 % interval over halves of the vectors"),
    "nll_high": Metric("nats/token", "upper end of its 95 % interval over halves of the vectors"),
}
_DRAWS = 400
_FEWEST = 4


def intervals(embeddings_PVD: np.ndarray, fluent_PV: np.ndarray, nll_PV: np.ndarray) -> dict[str, float]:
    """The ends of the intervals of diversity and nll.

    The variance of what halves say, times m / (V - m) for m of V vectors, is that of the whole set.

    Args:
        embeddings_PVD: Of the completions, NaN for an empty one.
        fluent_PV: Whether each counts for the diversity.
        nll_PV: Of the completions, nats a token, NaN for an empty one.

    Returns:
        The metrics of `METRICS`; NaN for fewer than four vectors, or where a half has nothing to say.

    Source: Politis, Romano and Wolf, "Subsampling" (1999), chapter 2.
    """
    vectors = nll_PV.shape[1]
    if vectors < _FEWEST:
        return dict.fromkeys(METRICS, math.nan)
    halves_RV = _halves(vectors)
    scale = math.sqrt(halves_RV[0].sum() / (vectors - halves_RV[0].sum()))
    distances_PVV = np.array([_distances(*each) for each in zip(embeddings_PVD, fluent_PV, strict=True)])
    times_RV = np.vstack([np.ones(vectors), halves_RV])
    found: dict[str, float] = {}
    for name, values_R in (
        ("diversity", _mean_pairs(distances_PVV, times_RV)),
        ("nll", _mean_of(nll_PV, times_RV)),
    ):
        value, known_R = float(values_R[0]), values_R[1:][np.isfinite(values_R[1:])]
        half = 1.96 * scale * float(known_R.std()) if len(known_R) else math.nan
        found |= {f"{name}_low": value - half, f"{name}_high": value + half}
    return found


def _halves(vectors: int) -> np.ndarray:
    """Which vectors each draw has, 1 or 0, shape (R, V); the same for all sets of a size."""
    order_RV = np.random.default_rng(vectors).random((_DRAWS, vectors)).argsort(axis=1)
    return (order_RV < vectors // 2).astype(float)


def _distances(embeddings_VD: np.ndarray, fluent_V: np.ndarray) -> np.ndarray:
    """1 - cosine of every two different completions that count, NaN elsewhere."""
    distances_VV: np.ndarray = 1 - cosine_similarity(embeddings_VD, embeddings_VD)
    distances_VV[~fluent_V] = np.nan
    distances_VV[:, ~fluent_V] = np.nan
    np.fill_diagonal(distances_VV, np.nan)
    return distances_VV


def _mean_pairs(distances_PVV: np.ndarray, times_RV: np.ndarray) -> np.ndarray:
    """Mean over prompts of the mean distance of the pairs in each draw, shape (R,)."""
    known_PVV = np.isfinite(distances_PVV)
    totals_PR = np.einsum("rv,pvw,rw->pr", times_RV, np.where(known_PVV, distances_PVV, 0.0), times_RV)
    counts_PR = np.einsum("rv,pvw,rw->pr", times_RV, known_PVV.astype(float), times_RV)
    return _over_prompts(totals_PR, counts_PR)


def _mean_of(values_PV: np.ndarray, times_RV: np.ndarray) -> np.ndarray:
    """Mean over prompts of the mean value in each draw, shape (R,)."""
    known_PV = np.isfinite(values_PV)
    totals_PR = np.where(known_PV, values_PV, 0.0) @ times_RV.T
    return _over_prompts(totals_PR, known_PV.astype(float) @ times_RV.T)


def _over_prompts(totals_PR: np.ndarray, counts_PR: np.ndarray) -> np.ndarray:
    """Mean of the quotients that are defined; NaN where none is."""
    means_PR = np.divide(totals_PR, counts_PR, out=np.full(totals_PR.shape, np.nan), where=counts_PR > 0)
    known_PR = np.isfinite(means_PR)
    counts_R = known_PR.sum(axis=0)
    totals_R = np.where(known_PR, means_PR, 0.0).sum(axis=0)
    found_R: np.ndarray = np.divide(
        totals_R, counts_R, out=np.full(len(counts_R), np.nan), where=counts_R > 0
    )
    return found_R

"""Intervals over halves of a set, against sets drawn anew from the same source."""

import itertools

import numpy as np
import pytest

from jobs.reading.halves import METRICS, intervals
from jobs.scoring.diversity import mean_cosine_distance


def a_set(random: np.random.Generator, *, vectors: int, prompts: int = 3) -> tuple[np.ndarray, np.ndarray]:
    """Embeddings and nll of completions; what a vector makes of all prompts is alike."""
    own_VD = random.normal(size=(vectors, 6)) * random.uniform(0.2, 3.0, size=(vectors, 1)) + 1.0
    embeddings_PVD = own_VD + 0.3 * random.normal(size=(prompts, vectors, 6))
    nll_PV = random.gamma(2.0, size=vectors) + 0.1 * random.normal(size=(prompts, vectors))
    return embeddings_PVD, nll_PV


def diversity(embeddings_PVD: np.ndarray) -> float:
    return float(np.mean([mean_cosine_distance(each) for each in embeddings_PVD]))


@pytest.mark.parametrize("vectors", [16, 25])
def test_intervals_are_as_wide_as_sets_that_are_drawn_anew_differ(vectors: int) -> None:
    random = np.random.default_rng(vectors)
    sets = [a_set(random, vectors=vectors) for _ in range(300)]
    for name, values in (
        ("diversity", [diversity(embeddings) for embeddings, _ in sets]),
        ("nll", [float(nll.mean()) for _, nll in sets]),
    ):
        found = [intervals(embeddings, np.ones(nll.shape, dtype=bool), nll) for embeddings, nll in sets[:60]]
        widths = [each[f"{name}_high"] - each[f"{name}_low"] for each in found]
        assert np.mean(widths) == pytest.approx(2 * 1.96 * np.std(values), rel=0.2)
        truth = np.mean(values)
        covered = np.mean([each[f"{name}_low"] <= truth <= each[f"{name}_high"] for each in found])
        assert covered >= 0.8


def test_the_middle_is_the_metric_itself_over_what_counts() -> None:
    random = np.random.default_rng(0)
    embeddings, nll = a_set(random, vectors=8)
    fluent = random.random(nll.shape) < 0.7
    embeddings[1, 3] = np.nan
    nll[1, 3] = np.nan
    fluent[1, 3] = False
    found = intervals(embeddings, fluent, nll)
    expected = np.mean([mean_cosine_distance(each[on]) for each, on in zip(embeddings, fluent, strict=True)])
    assert (found["diversity_low"] + found["diversity_high"]) / 2 == pytest.approx(expected)
    assert (found["nll_low"] + found["nll_high"]) / 2 == pytest.approx(
        np.mean([np.nanmean(each) for each in nll])
    )


def test_all_halves_of_four_are_what_the_interval_comes_from(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("jobs.reading.halves._DRAWS", 20_000)
    random = np.random.default_rng(0)
    embeddings, nll = a_set(random, vectors=4)
    found = intervals(embeddings, np.ones(nll.shape, dtype=bool), nll)
    halves = [diversity(embeddings[:, list(pair)]) for pair in itertools.combinations(range(4), 2)]
    assert found["diversity_high"] - found["diversity_low"] == pytest.approx(
        2 * 1.96 * np.std(halves), rel=0.02
    )


def test_of_too_few_vectors_or_none_that_is_fluent_nobody_knows() -> None:
    random = np.random.default_rng(0)
    embeddings, nll = a_set(random, vectors=3)
    found = intervals(embeddings, np.ones(nll.shape, dtype=bool), nll)
    assert found.keys() == METRICS.keys()
    assert all(np.isnan(value) for value in found.values())
    embeddings, nll = a_set(random, vectors=8)
    found = intervals(embeddings, np.zeros(nll.shape, dtype=bool), nll)
    assert np.isnan([found["diversity_low"], found["diversity_high"]]).all()
    assert np.isfinite([found["nll_low"], found["nll_high"]]).all()

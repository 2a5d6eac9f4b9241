"""What a set of vectors makes a model say: how much it varies, and how fluent it is.

V vectors, P prompts.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from jobs.checks import above_zero, at_least
from jobs.data.prompts import OpenPrompt
from jobs.reading import halves
from jobs.scoring import diversity
from jobs.scoring.similarity import cosine_similarity, embed
from jobs.spec import Metric

_MEANS = {
    "diversity": Metric("1 - cosine", "mean pairwise distance of the fluent completions' embeddings"),
    "diversity_all": Metric("1 - cosine", "the same over all completions, fluent or not"),
    "vendi": Metric("texts", "effective number of different fluent completions by their embeddings"),
    "distinct_completions": Metric("texts", "different fluent completions of a prompt"),
    "distinct_2": Metric("share", "different among all bigrams of the fluent completions"),
    "distinct_3": Metric("share", "different among all trigrams of the fluent completions"),
    "self_bleu": Metric("share", "mean BLEU of a fluent completion against the others of its prompt"),
    "compression": Metric("ratio", "bytes of the fluent completions over those that zlib needs for them"),
    "fluent": Metric("share", "completions within both bars of fluency"),
    "nll": Metric("nats/token", "mean negative log-likelihood of the completions under the unsteered model"),
    "repetition": Metric("share", "mean share of repeated trigrams in the completions"),
    "ended": Metric("share", "completions that end by themselves"),
}
METRICS = {**_MEANS, **halves.METRICS}

OVER_RANDOM = {
    "diversity_over_random": Metric("1 - cosine", "diversity less that of random vectors of the same norm"),
    "vendi_over_random": Metric("texts", "vendi less that of random vectors of the same norm"),
    "distinct_over_random": Metric("texts", "distinct_completions less those of random vectors"),
}


def over_random(found: Mapping[str, float], random: Mapping[str, float] | None) -> dict[str, float]:
    """What a set has over random vectors of its norm; NaN where there are none."""
    pairs = zip(OVER_RANDOM, ("diversity", "vendi", "distinct_completions"), strict=True)
    return {name: found[of] - random[of] if random is not None else math.nan for name, of in pairs}


FROM_UNSTEERED = {
    "from_unsteered": Metric("1 - cosine", "mean distance of the fluent completions from the unsteered reply")
}


def from_unsteered(
    tensors: Mapping[str, np.ndarray], unsteered: Mapping[str, np.ndarray], split: str
) -> dict[str, float]:
    """How far the embeddings of a set's fluent completions lie from those of one unsteered reply a prompt.

    Args:
        tensors: Of the set; see `stored_sayings`.
        unsteered: Of the unsteered replies to the same prompts.
        split: Which prompts.

    Returns:
        The metric of `FROM_UNSTEERED`; NaN where nothing is fluent, or no unsteered reply has a word.
    """
    embeddings_PVD, fluent_PV = stored_sayings(tensors, split)
    usual_P1D, _ = stored_sayings(unsteered, split)
    [name] = FROM_UNSTEERED
    if embeddings_PVD.shape[-1] != usual_P1D.shape[-1]:  # on one side no reply had a word
        return {name: math.nan}
    pairs = zip(embeddings_PVD, usual_P1D, fluent_PV, strict=True)
    return {
        name: _mean(
            [
                1 - cosine
                for own_VD, usual_1D, fluent_V in pairs
                for cosine in cosine_similarity(own_VD[fluent_V], usual_1D)[:, 0]
            ]
        )
    }


class Behaviours(NamedTuple):
    """What the completions of a set are worth.

    Attributes:
        metrics: Those of `METRICS` on each split.
        tensors: For those who compare themselves with the set; see `stored_means` and `stored_sayings`.
    """

    metrics: dict[str, dict[str, float]]
    tensors: dict[str, np.ndarray]


def stored_means(artifact: Mapping[str, np.ndarray], split: str) -> dict[str, float]:
    """The metrics of a set on a split, intervals left out, from its tensor `means_SPLIT`, float64."""
    return dict(zip(_MEANS, map(float, artifact[f"means_{split}"]), strict=True))


def stored_sayings(artifact: Mapping[str, np.ndarray], split: str) -> tuple[np.ndarray, np.ndarray]:
    """The completions of a set on a split.

    Returns:
        `embeddings_SPLIT`, float32, shape (prompts, vectors, width of the encoder), NaN for an empty one; and
        `fluent_SPLIT`, as bool, shape (prompts, vectors).
    """
    return artifact[f"embeddings_{split}"], artifact[f"fluent_{split}"].astype(bool)


class Said(NamedTuple):
    """A completion under one vector.

    Attributes:
        tokens: New tokens, without the stop token.
        text: The same as text.
        nll: Mean -ln p of the tokens under the unsteered model, nats a token; NaN if there is none.
        repetition: Share of repeated trigrams.
        ended: Whether a stop token ended it.
    """

    tokens: list[int]
    text: str
    nll: float
    repetition: float
    ended: bool


@dataclass(frozen=True, kw_only=True)  # no slots: two bases that have them cannot be combined
class Reading:
    """How the completions of a set are made and judged.

    Attributes:
        read_on: How many prompts of each of the splits select and report are completed, besides those that
            were learned from.
        max_new_tokens: Most tokens of a completion.
        most_nll: A completion is fluent up to so many nats a token under the unsteered model.
        most_repetition: A completion is fluent up to this share of repeated trigrams.
        encoder: Of the sentence embeddings that diversity is measured with.
    """

    read_on: int = 2
    max_new_tokens: int = 30
    most_nll: float = 3.0
    most_repetition: float = 0.3
    encoder: str = "all-minilm-l6-v2"

    def check_reading(self) -> None:
        """Raises ValueError if the completions cannot be read so."""
        at_least(self, 1, "read_on", "max_new_tokens")
        above_zero(self, "most_nll")
        if not 0 <= self.most_repetition <= 1:
            raise ValueError(f"most_repetition={self.most_repetition}; it takes a share from 0 to 1")

    def is_fluent(self, said: Said) -> bool:
        """Whether a completion has a token and is within both bars."""
        return said.nll <= self.most_nll and said.repetition <= self.most_repetition

    def behaviours(self, prompts: Sequence[OpenPrompt], said_PV: Sequence[Sequence[Said]]) -> Behaviours:
        """Every metric on each split, as the mean over its prompts where it is defined; NaN where on none.

        Args:
            prompts: What was asked.
            said_PV: For each prompt the completions under all vectors.
        """
        texts = sorted({said.text for said_V in said_PV for said in said_V if said.text.strip()})
        embeddings = dict(zip(texts, embed(texts, self.encoder), strict=True)) if texts else {}
        found = Behaviours({}, {})
        for split in dict.fromkeys(prompt.split for prompt in prompts):
            chosen = [
                said_V for prompt, said_V in zip(prompts, said_PV, strict=True) if prompt.split == split
            ]
            fluent_PV = np.array([[self.is_fluent(said) for said in said_V] for said_V in chosen])
            means = [_of_prompt(*each, embeddings) for each in zip(chosen, fluent_PV, strict=True)]
            named = {name: _mean([each[name] for each in means]) for name in _MEANS}
            embedded_PVD = _embedded(chosen, embeddings)
            nll_PV = np.array([[said.nll for said in said_V] for said_V in chosen])
            found.metrics[split] = {**named, **halves.intervals(embedded_PVD, fluent_PV, nll_PV)}
            found.tensors[f"means_{split}"] = np.array([*named.values()])
            found.tensors[f"embeddings_{split}"] = embedded_PVD
            found.tensors[f"fluent_{split}"] = fluent_PV.astype(np.float32)
        return found


def _embedded(said_PV: Sequence[Sequence[Said]], embeddings: Mapping[str, np.ndarray]) -> np.ndarray:
    width = len(next(iter(embeddings.values()), (0.0,)))
    nothing = np.full(width, np.nan)
    return np.array(
        [[embeddings.get(said.text, nothing) for said in said_V] for said_V in said_PV], dtype=np.float32
    )


def at_nll(grid: Sequence[Mapping[str, float]], name: str, nll: float) -> float:
    """A metric of a series of sets where its nll is the given one, between the nearest two of the series.

    Args:
        grid: Metrics of sets that differ in one thing, such as their norm; those without nll or the metric
            are left out.
        name: Which metric.
        nll: Nats a token.

    Returns:
        NaN beyond the series' lowest and highest nll, and of fewer than two sets.
    """
    known = sorted(
        (each["nll"], each[name]) for each in grid if math.isfinite(each["nll"]) and math.isfinite(each[name])
    )
    if len(known) < 2 or not known[0][0] <= nll <= known[-1][0]:
        return math.nan
    levels, values = zip(*known, strict=True)
    return float(np.interp(nll, levels, values))


def _of_prompt(
    said_V: Sequence[Said], fluent_V: np.ndarray, embeddings: Mapping[str, np.ndarray]
) -> dict[str, float]:
    fluent = [said for said, holds in zip(said_V, fluent_V, strict=True) if holds]
    texts = [said.text for said in fluent if said.text in embeddings]
    embedded = np.array([embeddings[text] for text in texts])
    everything = np.array([embeddings[said.text] for said in said_V if said.text in embeddings])
    return {
        "diversity": diversity.mean_cosine_distance(embedded) if len(embedded) else math.nan,
        "diversity_all": diversity.mean_cosine_distance(everything) if len(everything) else math.nan,
        "vendi": diversity.vendi_score(embedded),
        "distinct_completions": float(diversity.distinct([said.text for said in fluent])),
        "distinct_2": diversity.distinct_ngrams([said.tokens for said in fluent], 2),
        "distinct_3": diversity.distinct_ngrams([said.tokens for said in fluent], 3),
        "self_bleu": diversity.self_bleu([said.text for said in fluent]),
        "compression": diversity.compression_ratio([said.text for said in fluent]),
        "fluent": len(fluent) / len(said_V),
        "nll": _mean([said.nll for said in said_V]),
        "repetition": _mean([said.repetition for said in said_V]),
        "ended": _mean([float(said.ended) for said in said_V]),
    }


def _mean(values: Sequence[float]) -> float:
    known = [value for value in values if math.isfinite(value)]
    return float(np.mean(known)) if known else math.nan

"""What a set of vectors makes a model say: how much it varies, and how fluent it is.

V vectors, P prompts.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from jobs.scoring import diversity
from jobs.scoring.similarity import embed
from jobs.spec import Metric

METRICS = {
    "diversity": Metric("1 - cosine", "mean pairwise distance of the fluent completions' embeddings"),
    "diversity_all": Metric("1 - cosine", "the same over all completions, fluent or not"),
    "vendi": Metric("texts", "effective number of different fluent completions by their embeddings"),
    "distinct_completions": Metric("texts", "different fluent completions of a prompt"),
    "distinct_2": Metric("share", "different among all bigrams of the fluent completions"),
    "distinct_3": Metric("share", "different among all trigrams of the fluent completions"),
    "compression": Metric("ratio", "bytes of the fluent completions over those that zlib needs for them"),
    "fluent": Metric("share", "completions within both bars of fluency"),
    "nll": Metric("nats/token", "mean negative log-likelihood of the completions under the unsteered model"),
    "repetition": Metric("share", "mean share of repeated trigrams in the completions"),
    "ended": Metric("share", "completions that end by themselves"),
}


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


@dataclass(frozen=True, slots=True, kw_only=True)
class Fluency:
    """Which completions count as fluent.

    Attributes:
        most_nll: Highest mean negative log-likelihood under the unsteered model, nats a token.
        most_repetition: Highest share of repeated trigrams.
    """

    most_nll: float
    most_repetition: float

    def holds(self, said: Said) -> bool:
        """Whether a completion has a token and is within both bars."""
        return said.nll <= self.most_nll and said.repetition <= self.most_repetition


def behaviours(said_PV: Sequence[Sequence[Said]], fluency: Fluency, encoder: str) -> dict[str, float]:
    """Every metric, as the mean over the prompts where it is defined; NaN where it is for none.

    Args:
        said_PV: For each prompt the completions under all vectors.
        fluency: Which of them diversity is measured over.
        encoder: Of the sentence embeddings; see `similarity.embed`.
    """
    texts = sorted({said.text for said_V in said_PV for said in said_V if said.text.strip()})
    embeddings = dict(zip(texts, embed(texts, encoder), strict=True)) if texts else {}
    found = [_of_prompt(said_V, fluency, embeddings) for said_V in said_PV]
    return {name: _mean([each[name] for each in found]) for name in METRICS}


def _of_prompt(
    said_V: Sequence[Said], fluency: Fluency, embeddings: dict[str, np.ndarray]
) -> dict[str, float]:
    fluent = [said for said in said_V if fluency.holds(said)]
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
        "compression": diversity.compression_ratio([said.text for said in fluent]),
        "fluent": len(fluent) / len(said_V),
        "nll": _mean([said.nll for said in said_V]),
        "repetition": _mean([said.repetition for said in said_V]),
        "ended": _mean([float(said.ended) for said in said_V]),
    }


def _mean(values: Sequence[float]) -> float:
    known = [value for value in values if math.isfinite(value)]
    return float(np.mean(known)) if known else math.nan

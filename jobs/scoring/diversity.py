"""How much the texts of a set differ from each other: pure functions of texts, tokens and embeddings.

N texts, D width.
"""

import zlib
from collections.abc import Hashable, Sequence

import numpy as np

from jobs.scoring.similarity import cosine_similarity


def distinct(texts: Sequence[Hashable]) -> int:
    """Number of different texts."""
    return len(set(texts))


def mean_cosine_distance(embeddings_ND: np.ndarray) -> float:
    """Mean of 1 - cosine over all pairs of different texts, from 0 to 2; NaN for fewer than two.

    Args:
        embeddings_ND: One a text, any float dtype; computed in float64. A pair with an embedding of zero is
            left out.
    """
    cosines_NN = cosine_similarity(embeddings_ND, embeddings_ND)
    pairs = 1 - cosines_NN[np.triu_indices(len(cosines_NN), k=1)]
    known = pairs[np.isfinite(pairs)]
    return float(known.mean()) if len(known) else float("nan")


def vendi_score(embeddings_ND: np.ndarray) -> float:
    """Effective number of texts: the exponential of the entropy of the eigenvalues of K / N, K the cosines.

    Source: Friedman and Dieng, "The Vendi score", arXiv:2210.02410, definition 3.1.

    Args:
        embeddings_ND: One a text, none of them 0, any float dtype; computed in float64.

    Returns:
        From 1, all alike, to N, all at right angles; NaN for no text.
    """
    if not len(embeddings_ND):
        return float("nan")
    cosines_NN = cosine_similarity(embeddings_ND, embeddings_ND)
    eigenvalues_N = np.linalg.eigvalsh(cosines_NN / len(cosines_NN))
    shares_N = eigenvalues_N[eigenvalues_N > 0]
    return float(np.exp(-(shares_N * np.log(shares_N)).sum()))


def distinct_ngrams(texts: Sequence[Sequence[int]], n: int) -> float:
    """Share of different n-grams among those of all texts; NaN where there is none.

    Source: Li et al., "A diversity-promoting objective function", arXiv:1510.03055, distinct-1 and -2.

    Args:
        texts: Tokens of each.
        n: Tokens of an n-gram, at least 1.
    """
    found = [tuple(text[at : at + n]) for text in texts for at in range(len(text) - n + 1)]
    return len(set(found)) / len(found) if found else float("nan")


def self_bleu(texts: Sequence[str]) -> float:
    """Mean BLEU of each text against all others, from 0, nothing in common, to 1; NaN for fewer than two.

    Source: Zhu et al., "Texygen", arXiv:1802.01886; BLEU as sacrebleu computes it, the orders of n-grams that
    a text is too short for left out.
    """
    from sacrebleu.metrics.bleu import BLEU

    if len(texts) < 2:
        return float("nan")
    bleu = BLEU(effective_order=True)
    scores = [
        bleu.sentence_score(text, [*texts[:place], *texts[place + 1 :]]).score
        for place, text in enumerate(texts)
    ]
    return sum(scores) / len(scores) / 100


def compression_ratio(texts: Sequence[str]) -> float:
    """Bytes of all texts, one a line, over those that zlib needs for them; NaN for no text.

    The more the texts repeat each other and themselves, the higher. Source: Shaib et al., "Standardizing the
    measurement of text diversity", arXiv:2403.00553, section 3.
    """
    joined = "\n".join(texts).encode("utf-8", "replace")
    return len(joined) / len(zlib.compress(joined, 9)) if joined else float("nan")

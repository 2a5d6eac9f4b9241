"""Scores of text and tokens: pure functions, no model."""

import re
from collections.abc import Sequence


def repeated_ngrams(tokens: Sequence[int], n: int = 3) -> float:
    """Share of the n-grams that have occurred before in the same text: 0 = none, towards 1 = a loop.

    A text of fewer than `n` tokens has no n-grams and scores 0.

    Source: rep-n of Welleck et al., arXiv:1908.04319.
    """
    grams = [tuple(tokens[start : start + n]) for start in range(len(tokens) - n + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def parse_letter(text: str) -> str | None:
    """The answer letter of a reply, A or B: the first that stands alone; None if there is none.

    The article "A" counts only where it is the whole reply or is followed by punctuation or a line end.
    """
    found = re.search(r"(?<!\w)(B(?![\w'’-])|A(?=[^\w\s'’-]|\s*$|\s*\n))", text)
    return found.group(1) if found else None

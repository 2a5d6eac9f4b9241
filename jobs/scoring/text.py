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


_LETTER = re.compile(r"(?<!\w)(B(?![\w'’-])|A(?=[^\w\s'’-]|\s*$|\s*\n))")
_NEGATION = re.compile(r"(?:\bnot|n't)\s+$", re.IGNORECASE)
_WORD = re.compile(r"(?<!\w)(true|false)(?!\w)", re.IGNORECASE)


def parse_judgement(text: str, true_letter: str) -> bool | None:
    """Whether a reply calls the claim true, by its first answer letter or word "true" or "false".

    Args:
        text: The reply.
        true_letter: The letter, A or B, that stands for "true".

    Returns:
        None if the reply has neither a letter nor a word, or the word stands after "not" or "n't".
    """
    letter, word = _LETTER.search(text), _WORD.search(text)
    if letter is None and word is None:
        return None
    if word is None or (letter is not None and letter.start() < word.start()):
        assert letter is not None
        return letter.group(1) == true_letter
    if _NEGATION.search(text[: word.start()]):
        return None
    return word.group(1).lower() == "true"

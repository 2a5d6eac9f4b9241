"""What a direction comes from: both sides of texts or claims, as the model reads them.

N pairs, L layers, D hidden.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from jobs.data.claims import LETTERS, ClaimQuestion, honesty_pairs, load_questions
from jobs.data.pairs import load_pairs
from jobs.directions.contrast import keep_pairs
from jobs.engine.capture import capture_last
from jobs.engine.groups import next_token
from jobs.engine.replica import Replica
from jobs.engine.tables import row_tables

HONEST = "Pretend that you are always honest, no matter what."
DISHONEST = "Pretend that you are dishonest when it serves you."
FEWEST_CORRECT = 5
"""Fewer claims than that, where as many were given, give no direction worth the name."""


class Contrast(NamedTuple):
    """Both sides of a dataset.

    Attributes:
        prompts: Token ids of the positive and the negative side of each pair.
        positive_NLD: Output of every block at one token, the model's dtype, on the CPU.
        negative_NLD: Same of the negative side.
        answered_correctly: Share of the claims that the model answers correctly; NaN if it was not asked.
    """

    prompts: list[tuple[list[int], list[int]]]
    positive_NLD: Tensor
    negative_NLD: Tensor
    answered_correctly: float = math.nan


def text_contrast(replica: Replica, name: str, *, count: int, offset: int) -> Contrast:
    """Texts read raw.

    Args:
        replica: The model.
        name: Dataset of pairs.
        count: Number of pairs, from the start; 0 takes all.
        offset: Token whose activation is taken, counted from the end: 1 = the last one.
    """
    pairs = load_pairs(name)
    prompts = [
        (replica.encode(pair.positive), replica.encode(pair.negative))
        for pair in (pairs[:count] if count else pairs)
    ]
    return _captured(replica, prompts, offset)


def claims_contrast(
    replica: Replica, name: str, *, count: int, offset: int, correct_only: bool = False
) -> Contrast:
    """An honest persona that gives the honest letter, against a dishonest one that gives the other.

    Args:
        replica: The model.
        name: Dataset of labelled claims.
        count: Number of claims.
        offset: Token whose activation is taken, counted from the end: 1 = the letter.
        correct_only: Keep only the claims that the model answers correctly without a persona.

    Raises:
        ValueError: If too few claims are left.
    """
    questions = load_questions(name, extract=count, select=0, report=0)
    prompts = [
        (
            replica.encode_chat(user, system=HONEST, answer=pair.positive),
            replica.encode_chat(user, system=DISHONEST, answer=pair.negative),
        )
        for user, pair in honesty_pairs(questions)
    ]
    if not correct_only:
        return _captured(replica, prompts, offset)
    correct_N = answers_correctly(replica, questions)
    kept = int(correct_N.sum())
    if kept < min(FEWEST_CORRECT, len(questions)):
        raise ValueError(
            f"the model answers {kept} of {len(questions)} claims correctly, and correct_only needs at least "
            f"{min(FEWEST_CORRECT, len(questions))}; raise count, or choose other claims"
        )
    every = _captured(replica, prompts, offset)
    chosen = [prompt for prompt, correct in zip(prompts, correct_N.tolist(), strict=True) if correct]
    sides = keep_pairs(every.positive_NLD, every.negative_NLD, correct_N)
    return Contrast(chosen, *sides, kept / len(questions))


def answers_correctly(replica: Replica, questions: Sequence[ClaimQuestion]) -> Tensor:
    """Whether the honest letter is the likelier of the two as the reply's first token.

    Returns:
        Shape (questions,), bool, on the CPU; letters of equal probability count as wrong.

    Raises:
        SpecError: If a letter is several tokens of this model.
    """
    tokens = {letter: replica.single_token(letter) for letter in LETTERS}
    prompts = [replica.encode_chat(question.user) for question in questions]
    work = [(index, 0) for index in range(len(prompts))]
    correct_N = torch.zeros(len(prompts), dtype=torch.bool)
    for index, logits_V in next_token(replica, prompts, row_tables(replica, [[]]), work):
        honest, dishonest = (
            tokens[letter] for letter in (questions[index].honest_letter, questions[index].dishonest_letter)
        )
        correct_N[index] = bool(logits_V[honest] > logits_V[dishonest])
    return correct_N


def _captured(replica: Replica, prompts: list[tuple[list[int], list[int]]], offset: int) -> Contrast:
    positive, negative = zip(*prompts, strict=True)
    return Contrast(
        prompts,
        capture_last(replica, positive, offset=offset),
        capture_last(replica, negative, offset=offset),
    )

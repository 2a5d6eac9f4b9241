"""What a model says under each configuration of a pack: choices, completions and their scores.

The unsteered baseline and the steered job read the same panel of prompts with the same code.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from jobs.data.prompts import Choice, OpenPrompt
from jobs.engine.decoding import Continuation, Decoding, Work, generate
from jobs.engine.groups import in_parts, next_token
from jobs.engine.replica import Replica
from jobs.engine.tables import RowTables, row_tables
from jobs.errors import SpecError
from jobs.reading.completions import missed
from jobs.reading.rereading import unsteered_nll
from jobs.scoring import logits, text


class Completion(NamedTuple):
    """A greedy reply to an open prompt.

    Attributes:
        prompt: The prompt and its split.
        tokens: New tokens, without the stop token.
        text: The same as text.
        nll: Mean -ln p of the tokens under the unsteered model, nats a token; NaN for an empty reply.
        repetition: Share of repeated trigrams.
    """

    prompt: OpenPrompt
    tokens: list[int]
    text: str
    nll: float
    repetition: float


class Reading(NamedTuple):
    """One configuration's reading of the panel.

    Attributes:
        log_odds_N: Positive over negative continuation a choice, nats, shape (choices,), float64.
        kl_N: KL(unsteered || steered) of the next token a choice, nats, shape (choices,), float64.
        completions: Replies to the open prompts.
        finite: Whether all logits were finite; a reply ends before the first that were not.
        missed: Where other tokens were changed than were to be, in a sentence; None if nowhere.
    """

    log_odds_N: np.ndarray
    kl_N: np.ndarray
    completions: list[Completion]
    finite: bool
    missed: str | None = None


class Panel:
    """Choices and open prompts, tokenised for one model."""

    def __init__(
        self,
        replica: Replica,
        choices: Sequence[Choice],
        prompts: Sequence[OpenPrompt],
        *,
        max_new_tokens: int,
    ) -> None:
        self.replica = replica
        self.choices = list(choices)
        self.prompts = list(prompts)
        self.max_new_tokens = max_new_tokens
        self._choice_ids = [
            replica.encode(f"Question: {choice.user}\nAnswer: {choice.answer}") for choice in choices
        ]
        self._prompt_ids = [replica.encode_chat(prompt.prompt) for prompt in prompts]
        self._positive = torch.tensor([self._single_token(choice.positive) for choice in choices])
        self._negative = torch.tensor([self._single_token(choice.negative) for choice in choices])

    def _single_token(self, word: str) -> int:
        tokens = self.replica.encode_continuation(word)
        if len(tokens) != 1:
            raise SpecError(
                f"{word!r} is {len(tokens)} tokens of this model; a choice takes words of one token"
            )
        return tokens[0]

    def unsteered(self) -> Tensor:
        """Log-probabilities of the next token after each choice, shape (choices, vocabulary)."""
        return self._next_token(row_tables(self.replica, [[]]), 0)

    def read(self, tables: RowTables, reference_NV: Tensor) -> Iterator[tuple[int, Reading]]:
        """Readings of every row, each once its last reply is finished.

        Args:
            tables: What each row does where.
            reference_NV: What `unsteered` returned, float32 or wider.
        """
        for row, replies in self._complete(tables):
            found_NV = self._next_token(tables, row)
            log_odds_N = logits.log_odds(found_NV, self._positive, self._negative)
            kl_N = logits.kl_divergence(reference_NV, found_NV)
            finite = bool(found_NV.isfinite().all()) and all(reply.finite for reply in replies)
            completions = self._scored([reply.tokens for reply in replies])
            missing = next(filter(None, (missed(reply.fired, reply.intended) for reply in replies)), None)
            yield (
                row,
                Reading(log_odds_N.double().numpy(), kl_N.double().numpy(), completions, finite, missing),
            )

    def _next_token(self, tables: RowTables, row: int) -> Tensor:
        """Log-probabilities of the next token, shape (choices, vocabulary), on the CPU."""
        work = [(choice, row) for choice in range(len(self.choices))]
        found = dict(next_token(self.replica, self._choice_ids, tables, work))
        return torch.stack([logits.log_probabilities(found[choice]).cpu() for choice in range(len(work))])

    def _complete(self, tables: RowTables) -> Iterator[tuple[int, list[Continuation]]]:
        """Replies of every row, each row once its last reply is finished."""
        number = len(self.prompts)
        work = [Work(prompt, row) for row in range(tables.rows) for prompt in range(number)]
        decoding = Decoding(max_new_tokens=self.max_new_tokens)
        found = generate(self.replica, self._prompt_ids, tables, work, decoding)
        return in_parts(found, number)

    def _scored(self, replies: Sequence[list[int]]) -> list[Completion]:
        """The replies to all prompts in their order, with their scores."""
        nll = unsteered_nll(self.replica, self._prompt_ids, replies)
        return [
            Completion(prompt, tokens, self.replica.decode(tokens), score, text.repeated_ngrams(tokens))
            for prompt, tokens, score in zip(self.prompts, replies, nll, strict=True)
        ]


def split_means(panel: Panel, reading: Reading) -> dict[str, dict[str, float]]:
    """Split -> mean of each score over that split's choices or replies; empty replies have no nll."""
    means = {}
    for split in ("select", "report"):
        chosen = [index for index, choice in enumerate(panel.choices) if choice.split == split]
        replies = [reply for reply in reading.completions if reply.prompt.split == split]
        spoken = [reply.nll for reply in replies if reply.tokens]
        means[split] = {
            "log_odds": float(reading.log_odds_N[chosen].mean()),
            "kl": float(reading.kl_N[chosen].mean()),
            "nll": float(np.mean(spoken)) if spoken else float("nan"),
            "repetition": float(np.mean([reply.repetition for reply in replies])),
            "empty": float(np.mean([not reply.tokens for reply in replies])),
        }
    return means


def read_tables(panel: Panel, reading: Reading) -> dict[str, list[dict[str, Any]]]:
    """Rows of the tables `items` (one a choice and score) and `completions` (one a reply)."""
    items = [
        {
            "split": choice.split,
            "item": index,
            "prompt": f"{choice.user} {choice.answer}{choice.positive} /{choice.negative}",
            "name": name,
            "value": value,
        }
        for index, choice in enumerate(panel.choices)
        for name, value in (
            ("log_odds", float(reading.log_odds_N[index])),
            ("kl", float(reading.kl_N[index])),
        )
    ]
    completions = [
        {
            "split": completion.prompt.split,
            "item": index,
            "prompt": completion.prompt.prompt,
            "text": completion.text,
            "tokens": len(completion.tokens),
            "nll": completion.nll,
            "repetition": completion.repetition,
        }
        for index, completion in enumerate(reading.completions)
    ]
    return {"items": items, "completions": completions}

"""What a model says under each configuration of a pack: choices, completions and their scores.

The unsteered baseline and the steered job read the same panel of prompts with the same code.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from jobs.data.prompts import Choice, OpenPrompt
from jobs.engine.decoding import Continuation, Decoding, Work, generate
from jobs.engine.groups import in_parts, next_token
from jobs.engine.replica import Replica
from jobs.engine.tables import RowTables, row_tables
from jobs.reading.completions import NOT_FINITE, flaw_of
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
        flaw: Why it says nothing about its configuration; None if nothing is wrong.
    """

    log_odds_N: np.ndarray
    kl_N: np.ndarray
    completions: list[Completion]
    flaw: str | None


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
        self._positive = torch.tensor([replica.single_token(choice.positive) for choice in choices])
        self._negative = torch.tensor([replica.single_token(choice.negative) for choice in choices])

    def unsteered(self) -> Tensor:
        """Log-probabilities of the next token after each choice, shape (choices, vocabulary)."""
        found = dict(self._answers(row_tables(self.replica, [[]])))
        return torch.stack([found[choice] for choice in range(len(self.choices))])

    def read(self, tables: RowTables, reference_NV: Tensor) -> Iterator[tuple[int, Reading]]:
        """Readings of every row, each once its last reply is finished.

        Args:
            tables: What each row does where.
            reference_NV: What `unsteered` returned, float32 or wider.
        """
        judged = dict(in_parts(self._judged(tables, reference_NV), len(self.choices)))
        for row, replies in self._complete(tables):
            log_odds_N, kl_N = np.array(judged.pop(row)).T
            flaw = None if np.isfinite([log_odds_N, kl_N]).all() else NOT_FINITE
            flaw = next(filter(None, map(flaw_of, replies)), flaw)
            yield row, Reading(log_odds_N, kl_N, self._scored([reply.tokens for reply in replies]), flaw)

    def _judged(self, tables: RowTables, reference_NV: Tensor) -> Iterator[tuple[int, tuple[float, float]]]:
        """Log-odds and KL of every choice under every row; read at once, as logits are large."""
        for index, found_V in self._answers(tables):
            choice = index % len(self.choices)
            one = slice(choice, choice + 1)
            odds_1 = logits.log_odds(found_V[None], self._positive[one], self._negative[one])
            kl_1 = logits.kl_divergence(reference_NV[one], found_V[None])
            yield index, (float(odds_1), float(kl_1))

    def _answers(self, tables: RowTables) -> Iterator[tuple[int, Tensor]]:
        """Log-probabilities of the next token after every choice under every row, on the CPU."""
        number = len(self.choices)
        work = [(choice, row) for row in range(tables.rows) for choice in range(number)]
        for index, logits_V in next_token(self.replica, self._choice_ids, tables, work):
            yield index, logits.log_probabilities(logits_V).cpu()

    def _complete(self, tables: RowTables) -> Iterator[tuple[int, list[Continuation]]]:
        """Replies of every row, each row once its last reply is finished."""
        number = len(self.prompts)
        work = [Work(prompt, row) for row in range(tables.rows) for prompt in range(number)]
        decoding = Decoding(max_new_tokens=self.max_new_tokens)
        found = generate(self.replica, self._prompt_ids, tables, work, decoding)
        return in_parts(found, number)

    def said(self, reading: Reading, split: str) -> tuple[list[list[int]], list[list[int]]]:
        """Token ids of a split's open prompts, and of the replies to them."""
        chosen = [index for index, prompt in enumerate(self.prompts) if prompt.split == split]
        prompts = [self._prompt_ids[index] for index in chosen]
        return prompts, [reading.completions[index].tokens for index in chosen]

    def rescored(self, reading: Reading) -> Reading:
        """The reading with the replies' nll under the weights as they are now."""
        return reading._replace(completions=self._scored([each.tokens for each in reading.completions]))

    def _scored(self, replies: Sequence[list[int]]) -> list[Completion]:
        """The replies to all prompts in their order, with their scores."""
        nll = unsteered_nll(self.replica, self._prompt_ids, replies)
        return [
            Completion(prompt, tokens, self.replica.decode(tokens), score, text.repeated_ngrams(tokens))
            for prompt, tokens, score in zip(self.prompts, replies, nll, strict=True)
        ]


def split_scores(panel: Panel, reading: Reading) -> dict[str, dict[str, np.ndarray]]:
    """Split -> score -> its values, float64, one a choice or a reply; the nll of an empty one is NaN."""
    scores = {}
    for split in ("select", "report"):
        chosen = [index for index, choice in enumerate(panel.choices) if choice.split == split]
        replies = [reply for reply in reading.completions if reply.prompt.split == split]
        scores[split] = {
            "log_odds": reading.log_odds_N[chosen],
            "kl": reading.kl_N[chosen],
            "nll": np.array([reply.nll if reply.tokens else np.nan for reply in replies]),
            "repetition": np.array([reply.repetition for reply in replies]),
            "empty": np.array([float(not reply.tokens) for reply in replies]),
        }
    return scores


def split_means(scores: Mapping[str, Mapping[str, np.ndarray]]) -> dict[str, dict[str, float]]:
    """Split -> mean of each score of `split_scores`; NaN of none."""
    return {
        split: {name: _mean(values) for name, values in of_split.items()}
        for split, of_split in scores.items()
    }


def _mean(values: np.ndarray) -> float:
    known = values[~np.isnan(values)]
    return float(known.mean()) if len(known) else float("nan")


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

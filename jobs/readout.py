"""What a model says under each configuration of a pack: choices, completions and their scores.

The unsteered baseline and the steered job read the same panel of prompts with the same code.
"""

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from jobs.data.prompts import Choice, OpenPrompt
from jobs.engine.batches import micro_batches
from jobs.engine.generate import greedy
from jobs.engine.replica import Replica
from jobs.engine.sharing import LowerLayers, resumed
from jobs.engine.steering import RowTables, steered
from jobs.errors import SpecError
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
    """

    log_odds_N: np.ndarray
    kl_N: np.ndarray
    completions: list[Completion]


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
        self._lower = LowerLayers(replica, self._choice_ids)
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

    def tokens_a_row(self) -> int:
        """Tokens, without padding, that one configuration costs."""
        prompts = sum(len(ids) + self.max_new_tokens for ids in self._prompt_ids)
        return sum(len(ids) for ids in self._choice_ids) + prompts

    @torch.inference_mode()
    def unsteered(self) -> Tensor:
        """Log-probabilities of the next token after each choice, shape (choices, vocabulary)."""
        return self._next_token(RowTables({}), [0])[0]

    def read(self, tables: RowTables, rows: int, reference_NV: Tensor) -> Iterator[tuple[int, Reading]]:
        """Readings of every row, a few rows at a time, each as soon as it is finished.

        Args:
            tables: What each row adds where.
            rows: Number of rows.
            reference_NV: What `unsteered` returned, float32 or wider.
        """
        together = max(1, self.replica.token_budget // self.tokens_a_row())
        for start in range(0, rows, together):
            group = list(range(start, min(start + together, rows)))
            yield from zip(group, self._read_group(tables, group, reference_NV), strict=True)

    @torch.inference_mode()
    def _read_group(self, tables: RowTables, group: list[int], reference_NV: Tensor) -> list[Reading]:
        odds, divergences = [], []
        for log_probabilities_NV in self._next_token(tables, group):
            odds.append(logits.log_odds(log_probabilities_NV, self._positive, self._negative))
            divergences.append(logits.kl_divergence(reference_NV, log_probabilities_NV))
        completions = self._complete(tables, group)
        return [
            Reading(log_odds_N.double().numpy(), kl_N.double().numpy(), replies)
            for log_odds_N, kl_N, replies in zip(odds, divergences, completions, strict=True)
        ]

    def _next_token(self, tables: RowTables, group: Sequence[int]) -> Tensor:
        """Log-probabilities of the next token, shape (rows of the group, choices, vocabulary)."""
        work = [(place, choice) for place in range(len(group)) for choice in range(len(self.choices))]
        result: Tensor | None = None
        for layer, members in self._by_lowest_layer(tables, group, work):
            for batch in micro_batches(
                [len(self._choice_ids[work[i][1]]) for i in members], self.replica.token_budget
            ):
                chosen = [members[place] for place in batch]
                found_SV = self._pass(
                    tables, layer, [group[work[i][0]] for i in chosen], [work[i][1] for i in chosen]
                )
                if result is None:
                    result = found_SV.new_empty((len(work), found_SV.shape[-1]))
                result[chosen] = found_SV
        assert result is not None
        by_row: Tensor = result.unflatten(0, (len(group), len(self.choices)))
        return by_row

    def _by_lowest_layer(
        self, tables: RowTables, group: Sequence[int], work: Sequence[tuple[int, int]]
    ) -> Iterator[tuple[int | None, list[int]]]:
        """Indices of the work by the lowest steered layer: only those can begin at the same block."""
        lowest = [tables.lowest(row) if self._lower.fits else None for row in group]
        for layer in dict.fromkeys(lowest):
            yield layer, [index for index, (place, _) in enumerate(work) if lowest[place] == layer]

    def _pass(
        self, tables: RowTables, layer: int | None, rows: Sequence[int], choices: Sequence[int]
    ) -> Tensor:
        """Log-probabilities after each choice, begun after block `layer`, or at the first block if None."""
        begun = (
            nullcontext() if layer is None else resumed(self.replica, layer, self._lower.at(layer, choices))
        )
        with begun, steered(self.replica, tables.take(rows)):
            found = self.replica.logits([self._choice_ids[choice] for choice in choices], keep=1)
        return logits.log_probabilities(found[:, -1]).cpu()

    def _complete(self, tables: RowTables, group: Sequence[int]) -> list[list[Completion]]:
        work = [(row, place) for row in group for place in range(len(self.prompts))]
        lengths = [len(self._prompt_ids[place]) + self.max_new_tokens for _, place in work]
        tokens: list[list[int]] = [[] for _ in work]
        for batch in micro_batches(lengths, self.replica.token_budget):
            prompts = [self._prompt_ids[work[index][1]] for index in batch]
            deltas = tables.take([work[index][0] for index in batch])
            found = greedy(self.replica, prompts, deltas, max_new_tokens=self.max_new_tokens)
            for index, completion in zip(batch, found.tokens, strict=True):
                tokens[index] = completion
        nll = self._nll([self._prompt_ids[place] for _, place in work], tokens)
        by_row: dict[int, list[Completion]] = {row: [] for row in group}
        for index, (row, place) in enumerate(work):
            by_row[row].append(
                Completion(
                    self.prompts[place],
                    tokens[index],
                    self.replica.decode(tokens[index]),
                    nll[index],
                    text.repeated_ngrams(tokens[index]),
                )
            )
        return [by_row[row] for row in group]

    def _nll(self, prompts: Sequence[list[int]], completions: Sequence[list[int]]) -> list[float]:
        """Mean -ln p of each completion under the unsteered model; NaN where it is empty."""
        scores = [float("nan")] * len(prompts)
        filled = [index for index, tokens in enumerate(completions) if tokens]
        sequences = [prompts[index] + completions[index] for index in filled]
        for batch in micro_batches([len(sequence) for sequence in sequences], self.replica.token_budget):
            longest = max(len(completions[filled[place]]) for place in batch)
            found = self.replica.logits([sequences[place] for place in batch], keep=longest + 1)
            for logits_TV, place in zip(found, batch, strict=True):
                tokens = torch.tensor(completions[filled[place]], device=logits_TV.device)
                predicting = logits_TV[-len(tokens) - 1 : -1]
                scores[filled[place]] = float(logits.negative_log_likelihood(predicting, tokens))
        return scores


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

"""Read completions again, without steering and with it.

T tokens of a completion, V vocabulary.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import NamedTuple

import torch
from torch import Tensor

from jobs.engine.memory import in_batches, pass_tokens
from jobs.engine.replica import Replica
from jobs.engine.tables import RowTables, Steering, steered
from jobs.reading.completions import Reply
from jobs.scoring import logits

_COPIES = 4
"""So many times the logits are in memory: of two models, raw and as log-probabilities."""


@torch.inference_mode()
def unsteered_nll(
    replica: Replica, prompts: Sequence[list[int]], completions: Sequence[list[int]]
) -> list[float]:
    """Mean -ln p of each completion under the unsteered model, nats a token; NaN where it is empty."""
    filled = [index for index, tokens in enumerate(completions) if tokens]
    costs = [
        cost(replica, len(prompts[index]) + len(completions[index]), kept=len(completions[index]) + 1)
        for index in filled
    ]

    def score(batch: list[int]) -> list[float]:
        new = [completions[filled[place]] for place in batch]
        found = _predictions(replica, [prompts[filled[place]] for place in batch], new)
        return [_nll(logits_TV, tokens) for logits_TV, tokens in zip(found, new, strict=True)]

    scores = dict(zip(filled, in_batches(replica, costs, score), strict=True))
    return [scores.get(index, math.nan) for index in range(len(completions))]


class Reread(NamedTuple):
    """What the unsteered and the steered model say of a completion that both read.

    Attributes:
        nll: Mean -ln p of its tokens under the unsteered model, nats a token; NaN if it is empty.
        first_kl: KL(unsteered || steered) of its first token, or of the stop token in its place, nats.
        kl: The same, mean over its tokens, nats a token; NaN if it is empty.
        finite: Whether the logits of both were finite where they predict it.
    """

    nll: float
    first_kl: float
    kl: float
    finite: bool


@torch.inference_mode()
def reread(
    replica: Replica, replies: Sequence[Reply], tables: RowTables, rows: Sequence[int]
) -> list[Reread]:
    """Completions, read by the unsteered model and under rows of the tables (teacher-forced).

    Args:
        replica: The model.
        replies: The completions with their prompts.
        tables: The configurations.
        rows: For each completion, which of them.
    """

    def compare(batch: list[int]) -> list[Reread]:
        prompts = [replies[index].prompt for index in batch]
        new = [replies[index].tokens for index in batch]
        before = _predictions(replica, prompts, new)
        steering = Steering(tables.take([rows[index] for index in batch]), [*map(len, prompts)])
        with steered(replica, steering):
            after = _predictions(replica, prompts, new)
        return [_reread(*each) for each in zip(before, after, new, strict=True)]

    return in_batches(replica, [_cost(replica, reply) for reply in replies], compare)


def reread_together(
    replica: Replica, finished: Iterable[tuple[int, Sequence[Reply]]], tables: RowTables
) -> Iterator[tuple[int, list[Reread]]]:
    """What `reread` finds for each row's completions, those of several rows in one batch.

    A row waits until the rows before it, and itself, fill a batch, or no more rows come.

    Args:
        replica: The model.
        finished: Rows of the tables with their completions, as they are finished.
        tables: The configurations.
    """
    waiting: list[tuple[int, Sequence[Reply]]] = []
    spent = 0
    for row, replies in finished:
        waiting.append((row, replies))
        spent += sum(_cost(replica, reply) for reply in replies)
        if spent >= pass_tokens(replica):
            yield from _reread_rows(replica, waiting, tables)
            waiting, spent = [], 0
    yield from _reread_rows(replica, waiting, tables)


def _reread_rows(
    replica: Replica, waiting: Sequence[tuple[int, Sequence[Reply]]], tables: RowTables
) -> Iterator[tuple[int, list[Reread]]]:
    rows = [row for row, replies in waiting for _ in replies]
    found = iter(reread(replica, [reply for _, replies in waiting for reply in replies], tables, rows))
    for row, replies in waiting:
        yield row, list(islice(found, len(replies)))


def _cost(replica: Replica, reply: Reply) -> int:
    return cost(replica, len(reply.prompt) + len(reply.tokens), kept=len(reply.tokens) + 1)


def cost(replica: Replica, tokens: int, *, kept: int) -> int:
    """Tokens of the budget that a text takes: those it has, or as many as its logits fill.

    Args:
        replica: The model.
        tokens: Length of the text.
        kept: At how many of its tokens the logits are wanted.
    """
    width = int(replica.model.config.get_text_config().vocab_size) * int(replica.model.dtype.itemsize)
    return max(tokens, _COPIES * width * kept * replica.token_budget // max(1, replica.memory))


def _predictions(
    replica: Replica, prompts: Sequence[list[int]], completions: Sequence[list[int]]
) -> list[Tensor]:
    """Logits that predict each completion's tokens and what follows them, shape (T + 1, V)."""
    sequences = [[*prompt, *tokens] for prompt, tokens in zip(prompts, completions, strict=True)]
    found = replica.logits(sequences, keep=max(map(len, completions)) + 1)
    return [logits_TV[-len(tokens) - 1 :] for logits_TV, tokens in zip(found, completions, strict=True)]


def _reread(before_TV: Tensor, after_TV: Tensor, tokens: list[int]) -> Reread:
    first = float(logits.token_kl(before_TV[:1], after_TV[:1]))
    kl = float(logits.completion_kl(before_TV[:-1], after_TV[:-1]))
    nll = _nll(before_TV, tokens) if tokens else math.nan
    return Reread(nll, first, kl, finite=not math.isnan(kl if tokens else first))


def _nll(logits_TV: Tensor, tokens: list[int]) -> float:
    return float(
        logits.negative_log_likelihood(logits_TV[:-1], torch.tensor(tokens, device=logits_TV.device))
    )

"""Complete prompts and conversations under the configurations of a pack, and read completions again.

T tokens of a completion, V vocabulary.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from jobs.engine.decoding import Decoding, Work, generate
from jobs.engine.memory import in_batches
from jobs.engine.replica import Replica
from jobs.engine.tables import RowTables, Steering, steered
from jobs.errors import SpecError
from jobs.scoring import logits

NOT_FINITE = "the model's logits are not finite; use a smaller dose, or a wider dtype"
_COPIES = 4
"""So many times the logits are in memory: of two models, raw and as log-probabilities."""


class Reply(NamedTuple):
    """A completion.

    Attributes:
        prompt: Token ids that it follows: the whole conversation before it.
        tokens: New tokens, without the stop token.
        text: The same as text, special tokens left out.
    """

    prompt: list[int]
    tokens: list[int]
    text: str


@dataclass(slots=True)
class Thread:
    """A conversation under one configuration, as far as it has been held; a lone prompt has one turn.

    Attributes:
        row: Which row of the tables.
        asked: The user's messages.
        seeds: Of the random numbers of each reply.
        replies: The replies so far.
        flaw: Why the conversation cannot go on; None if nothing is wrong.
    """

    row: int
    asked: Sequence[str]
    seeds: Sequence[int]
    replies: list[Reply] = field(default_factory=list)
    flaw: str | None = None

    @property
    def history(self) -> list[str]:
        """The user's messages and the replies in turn, the next message without a reply last."""
        pairs = zip(self.asked, self.replies, strict=False)
        said = [text for user, reply in pairs for text in (user, reply.text)]
        return [*said, self.asked[len(self.replies)]]


def converse(
    replica: Replica,
    threads: Sequence[Thread],
    tables: RowTables,
    decoding: Decoding,
    encode: Callable[[Sequence[str]], list[int]],
) -> Iterator[int]:
    """Hold conversations turn by turn, each turn in shared batches; their threads take the replies in.

    A thread whose logits are not finite, or that has outgrown the model's context, gets a flaw and no
    further replies.

    Args:
        replica: The model.
        threads: Conversations without a reply.
        tables: The configurations.
        decoding: How replies are made.
        encode: Token ids of a `Thread.history`, ready for the reply.

    Yields:
        Each row as soon as all its threads are finished.

    Raises:
        SpecError: As `generate` does, for a first message that is too long; nothing has run then.
    """
    left: Counter[int] = Counter()
    for thread in threads:
        left[thread.row] += len(thread.asked)
    for turn in range(max(len(thread.asked) for thread in threads)):
        waiting = [thread for thread in threads if turn < len(thread.asked) and thread.flaw is None]
        for thread in _answered(replica, waiting, tables, decoding, encode):
            left[thread.row] -= 1 if thread.flaw is None else len(thread.asked) - turn
            if left[thread.row] == 0:
                yield thread.row


def _answered(
    replica: Replica,
    threads: Sequence[Thread],
    tables: RowTables,
    decoding: Decoding,
    encode: Callable[[Sequence[str]], list[int]],
) -> Iterator[Thread]:
    """Each thread, as soon as it has one more reply or a flaw."""
    numbers: dict[tuple[int, ...], int] = {}
    asking, work = [], []
    for thread in threads:
        prompt = tuple(encode(thread.history))
        if thread.replies:
            thread.flaw = _outgrown(replica, len(prompt) + decoding.max_new_tokens)
        if thread.flaw is None:
            asking.append(thread)
            number = numbers.setdefault(prompt, len(numbers))
            work.append(Work(number, thread.row, thread.seeds[len(thread.replies)]))
        else:
            yield thread
    prompts = list(numbers)
    for index, found in generate(replica, prompts, tables, work, decoding) if work else ():
        thread, prompt = asking[index], prompts[work[index].prompt]
        thread.replies.append(Reply(list(prompt), found.tokens, replica.decode(found.tokens)))
        thread.flaw = None if found.finite else NOT_FINITE
        yield thread


def _outgrown(replica: Replica, tokens: int) -> str | None:
    try:
        replica.check_length(tokens)
    except SpecError as error:
        return f"a conversation has outgrown the context: {error}"
    return None


@torch.inference_mode()
def unsteered_nll(
    replica: Replica, prompts: Sequence[list[int]], completions: Sequence[list[int]]
) -> list[float]:
    """Mean -ln p of each completion under the unsteered model, nats a token; NaN where it is empty."""
    filled = [index for index, tokens in enumerate(completions) if tokens]
    lengths = [len(prompts[index]) + len(completions[index]) for index in filled]

    def score(batch: list[int]) -> list[float]:
        new = [completions[filled[place]] for place in batch]
        found = _predictions(replica, [prompts[filled[place]] for place in batch], new)
        return [_nll(logits_TV, tokens) for logits_TV, tokens in zip(found, new, strict=True)]

    scores = dict(zip(filled, in_batches(replica, lengths, score), strict=True))
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
def reread(replica: Replica, replies: Sequence[Reply], tables: RowTables, row: int) -> list[Reread]:
    """Completions, read by the unsteered model and under a row of the tables (teacher-forced).

    Args:
        replica: The model.
        replies: The completions with their prompts.
        tables: The configurations.
        row: Which of them.
    """

    def compare(batch: list[int]) -> list[Reread]:
        prompts = [replies[index].prompt for index in batch]
        new = [replies[index].tokens for index in batch]
        before = _predictions(replica, prompts, new)
        with steered(replica, Steering(tables.take([row] * len(batch)), [*map(len, prompts)])):
            after = _predictions(replica, prompts, new)
        return [_reread(*each) for each in zip(before, after, new, strict=True)]

    return in_batches(replica, [_cost(replica, reply) for reply in replies], compare)


def _cost(replica: Replica, reply: Reply) -> int:
    """Tokens of the budget that a completion takes: those it has, or as many as its logits fill."""
    width = int(replica.model.config.get_text_config().vocab_size) * int(replica.model.dtype.itemsize)
    memory = _COPIES * width * (len(reply.tokens) + 1)
    return max(len(reply.prompt) + len(reply.tokens), memory * replica.token_budget // max(1, replica.memory))


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

"""Complete prompts and hold conversations under the configurations of a pack."""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from jobs.engine.decoding import Continuation, Decoding, Work, generate
from jobs.engine.replica import Replica
from jobs.engine.tables import Counts, RowTables
from jobs.errors import SpecError

NOT_FINITE = "the model's logits are not finite; use a smaller dose, or a wider dtype"


def flaw_of(found: Continuation) -> str | None:
    """Why a continuation says nothing about its configuration; None if nothing is wrong."""
    if not found.finite:
        return NOT_FINITE
    return missed(found.fired, found.intended)


def missed(fired: Counts, intended: Counts) -> str | None:
    """The places at which not as many tokens were changed as were to be; None if there are none.

    Args:
        fired: Place -> at how many tokens it was changed.
        intended: Place -> at how many tokens it was to be changed.
    """
    places = sorted(fired.keys() | intended.keys())
    wrong = [place for place in places if fired.get(place, 0) != intended.get(place, 0)]
    if not wrong:
        return None
    said = [
        f"at layer {place.layer}, site {place.site}, {fired.get(place, 0)} of {intended.get(place, 0)} tokens"
        for place in wrong
    ]
    return (
        f"the steering did not act as it was to: {'; '.join(said)} were changed; this model runs its blocks "
        "in a way that hooks do not see: steer at another site, or take another model"
    )


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


def replies_of(threads: Sequence[Thread]) -> list[Reply]:
    """All replies of conversations in their order; none if one of them has a flaw."""
    if any(thread.flaw is not None for thread in threads):
        return []
    return [reply for thread in threads for reply in thread.replies]


def converse(
    replica: Replica,
    threads: Sequence[Thread],
    tables: RowTables,
    decoding: Decoding,
    encode: Callable[[Sequence[str]], list[int]],
) -> Iterator[int]:
    """Hold conversations turn by turn, each turn in shared batches; their threads take the replies in.

    A thread whose logits are not finite, whose steering missed a token, or that has outgrown the model's
    context gets a flaw and no further replies.

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
        thread.flaw = flaw_of(found)
        yield thread


def _outgrown(replica: Replica, tokens: int) -> str | None:
    try:
        replica.check_length(tokens)
    except SpecError as error:
        return f"a conversation has outgrown the context: {error}"
    return None

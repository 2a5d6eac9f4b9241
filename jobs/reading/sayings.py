"""What a model says to some prompts under each vector of a set.

V vectors, P prompts.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from jobs.data.prompts import OpenPrompt
from jobs.engine.decoding import Continuation, Decoding, Work, generate
from jobs.engine.groups import in_parts
from jobs.engine.replica import Replica
from jobs.engine.sampling import Sampling
from jobs.engine.tables import RowTables
from jobs.reading.behaviours import Said
from jobs.reading.completions import flaw_of
from jobs.reading.rereading import unsteered_nll
from jobs.scoring.text import repeated_ngrams
from jobs.spec import UNSTEERED, content_hash


class Sayings(NamedTuple):
    """The completions of a set.

    Attributes:
        said_PV: For each prompt what is said under each vector; empty if there is a flaw.
        flaw: Why the set says nothing; None if nothing is wrong.
    """

    said_PV: list[list[Said]]
    flaw: str | None


def sayings(
    replica: Replica,
    prompts: Sequence[Sequence[list[int]]],
    tables: RowTables,
    *,
    vectors: int,
    max_new_tokens: int,
    temperature: float = 0.0,
    seeds: Sequence[int] = (),
) -> Iterator[tuple[int, Sayings]]:
    """The completions of every set, each with its number, as soon as they are finished.

    Args:
        replica: The model.
        prompts: For each set the token ids of its prompts; all sets have the same number of them.
        tables: The sets one after another, a vector a row.
        vectors: How many vectors a set has.
        max_new_tokens: Most tokens of a completion.
        temperature: Divides the logits before a token is drawn; 0 takes the likeliest.
        seeds: One a set, for what is drawn; a text depends on it, the vector's number and the prompt's.

    Raises:
        SpecError: If a prompt with its completion is longer than the context.
        OutOfMemory: If a single row does not fit.
    """
    places: dict[tuple[int, ...], int] = {}
    work = []
    for row in range(tables.rows):
        number, vector = divmod(row, vectors)
        for prompt, ids in enumerate(prompts[number]):
            seed = int(content_hash([seeds[number], vector, prompt])[:13], 16) if temperature else 0
            work.append(Work(places.setdefault(tuple(ids), len(places)), row, seed))
    decoding = Decoding(max_new_tokens=max_new_tokens, sampling=Sampling(temperature=temperature))
    found = generate(replica, list(map(list, places)), tables, work, decoding)
    for number, replies in in_parts(found, vectors * len(prompts[0])):
        flaw = next(filter(None, map(flaw_of, replies)), None)
        said_PV = [] if flaw else said(replica, prompts[number], replies, max_new_tokens)
        yield number, Sayings(said_PV, flaw)


def said(
    replica: Replica, prompts: Sequence[list[int]], replies: Sequence[Continuation], most: int
) -> list[list[Said]]:
    """For each prompt what is said under each vector, with what the unsteered model makes of it.

    Args:
        replica: The model; unsteered.
        prompts: Token ids.
        replies: Those of a vector to all prompts, one vector after another.
        most: Tokens that a completion could have.
    """
    tokens = [reply.tokens for reply in replies]
    nll = unsteered_nll(replica, [*prompts] * (len(replies) // len(prompts)), tokens)
    found = [
        Said(new, replica.decode(new), score, repeated_ngrams(new), len(new) < most)
        for new, score in zip(tokens, nll, strict=True)
    ]
    return [found[prompt :: len(prompts)] for prompt in range(len(prompts))]


def completion_rows(
    prompts: Sequence[OpenPrompt], said_PV: Sequence[Sequence[Said]], variant: str
) -> list[dict[str, object]]:
    """Rows of the table `completions`.

    Args:
        prompts: What was asked.
        said_PV: For each prompt what was said under each vector.
        variant: What a vector is called, such as `vector`, which makes `vector 0`, `vector 1`, ...;
            `unsteered` stays as it is.

    Returns:
        With `item` = prompt x vectors + vector, each from 0.
    """
    return [
        {
            "split": prompt.split,
            "item": number * len(said_V) + vector,
            "variant": variant if variant == UNSTEERED else f"{variant} {vector}",
            "prompt": prompt.prompt,
            "text": said.text,
            "tokens": len(said.tokens),
            "nll": said.nll,
            "repetition": said.repetition,
        }
        for number, (prompt, said_V) in enumerate(zip(prompts, said_PV, strict=True))
        for vector, said in enumerate(said_V)
    ]

"""Job: complete prompts, or hold conversations, under steering; any scorers read what is written.

The unsteered model reads every completion again, in the same pack: what it would be compared with differs
from row to row, so that nothing but the direction is required.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain, cycle
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from jobs import extract, steering
from jobs.data.prompts import Conversation, load_conversations
from jobs.errors import SpecError
from jobs.scoring import uses
from jobs.scoring.scorers import Use, apply_scorers
from jobs.scoring.scores import Score, summarise
from jobs.scoring.uses import check_columns, parse_uses
from jobs.spec import Context, Metric, Outcome, Requirement, Row, Size, Status, content_hash
from jobs.steering import (
    Steering,
    canonical_steering,
    directions_of,
    extraction_of,
    interventions,
    vector_rows,
)

if TYPE_CHECKING:
    from jobs.engine.decoding import Decoding
    from jobs.engine.interventions import AnyIntervention
    from jobs.engine.replica import Replica
    from jobs.reading.completions import Reply, Thread
    from jobs.reading.rereading import Reread

Some = TypeVar("Some", bound="Params")


@dataclass(frozen=True, slots=True, kw_only=True)
class Params(Steering):
    """A direction, where and how strongly it acts, what is completed, how, and what reads the completions.

    Attributes:
        pairs: Contrast pairs that the direction comes from.
        prompts: Dataset with the columns of `jobs.data.prompts.load_conversations`: `prompt`, or `turns` for
            a conversation, whose replies are all made by the steered model; `split`; what scorers need.
        count: Number of prompts, taken from the start; 0 takes all.
        chat: Whether prompts are asked in the model's chat template; otherwise they are completed raw.
        system: System message; None leaves what the model's template does by itself.
        max_new_tokens: Most tokens of a completion.
        temperature: Divides the logits before a token is drawn; 0 always takes the likeliest token.
        top_p: Draws among the likeliest tokens that together have this probability.
        repetition_penalty: Divides positive logits of tokens that the text holds, and multiplies negative
            ones; 1 changes nothing.
        samples: Completions of each prompt; greedy ones would all be the same, so that 1 is made.
        scorers: Names of `jobs.scoring.scorers.SCORERS`, with options as JSON behind them, such as
            `contains{"sought": "sun"}`.
    """

    pairs: str = "tone_pairs"
    prompts: str = "open_prompts"
    count: int = 0
    chat: bool = True
    system: str | None = None
    max_new_tokens: int = 64
    temperature: float = 0.0
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    samples: int = 1
    scorers: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        self.check_steering()
        for name, least in (("count", 0), ("max_new_tokens", 1), ("samples", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name}={getattr(self, name)}; it takes {least} or more")
        if not 0 <= self.temperature < math.inf:
            raise ValueError(f"temperature={self.temperature}; it takes 0 (greedy) or more")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p={self.top_p}; it takes more than 0, at most 1")
        if not 0 < self.repetition_penalty < math.inf:
            raise ValueError(f"repetition_penalty={self.repetition_penalty}; it takes more than 0")
        if self.system is not None and not self.chat:
            raise ValueError(f"system={self.system!r} with chat=False; a raw prompt has no system message")


_READ = {
    "nll": Metric("nats/token", "mean negative log-likelihood of the completions under the unsteered model"),
    "repetition": Metric("share", "mean share of repeated trigrams in the completions"),
    "empty": Metric("share", "completions without a token"),
    "distinct": Metric("share", "distinct texts among the completions, over their number"),
    "first_kl": Metric("nats", "mean KL(unsteered || steered) of a completion's first token"),
    "kl": Metric("nats/token", "mean over completions of KL(unsteered || steered), mean over their tokens"),
}
METRICS = {**_READ, **uses.METRICS}
"""Those of a scorer that is not used are absent from a result."""
PACK_BY = (
    *("prompts", "count", "chat", "system", "max_new_tokens"),
    *("temperature", "top_p", "repetition_penalty", "samples", "scorers"),
)
DATA = ("pairs", "prompts", *steering.DATA)
LAYERS = ("layer", "layers")


def size(params: Params) -> Size:
    """About 45 tokens a prompt, read three times, and what is generated: written once and read twice."""
    sequences = (params.count or 100) * params.samples
    return Size(sequences, 3 * sequences * (45 + params.max_new_tokens))


def requires(params: Params) -> Sequence[Requirement]:
    """The direction, if it is steered."""
    if params.is_unsteered:
        return ()
    return (directions_of(params, _extraction(params)),)


def check(params: Params) -> None:
    """The pairs and the prompts can be read, with what the scorers need. Raises SpecError if not."""
    extract.check(_extraction(params))
    prompts = load_conversations(params.prompts, params.count)
    if not params.chat and any(len(prompt.turns) > 1 for prompt in prompts):
        raise SpecError(f"{params.prompts} holds conversations, which take chat=True")
    for use in parse_uses(params.scorers).values():
        try:
            check_columns([prompt.columns for prompt in prompts], use)
        except SpecError as error:
            raise SpecError(f"{params.prompts}, rows from 0: {error}") from error


def canonical(params: Params) -> Params:
    """The unsteered model is the same work at every layer; greedy completions are all the same."""
    return canonical_steering(without_chance(params), shared=PACK_BY)


def without_chance(params: Some) -> Some:
    """Greedy completions are the same whatever the rest says, and all the same."""
    return replace(params, temperature=0.0, top_p=1.0, samples=1) if params.temperature == 0 else params


def _extraction(params: Params) -> extract.Params:
    return extraction_of(params, pairs=params.pairs)


def run(replica: "Replica", rows: Sequence[Row], context: Context) -> Iterator[tuple[int, Outcome]]:
    """Complete the prompts of every row of the pack in shared batches and yield what was written.

    A text depends on the row's steering, the prompt and, where tokens are drawn, the row's seed and the
    number of the sample: on no other row, and on no other prompt.

    Every reply of a conversation is one completion. Tables of the outcome: `completions`; `items`, one row
    a completion and score, NaN where the text could not be read; `vectors`. Their `item` is
    (prompt x turns + turn) x samples + sample, each from 0, with the turns of the longest conversation, so
    that with one turn and one sample it is the number of the prompt.

    A row fails alone if logits are not finite, a conversation outgrows the context, or a token is missed.

    Raises:
        SpecError: If a layer does not exist, a prompt is too long, or a column is not what a scorer takes.
        ModelError: If there is no chat template, it refuses a conversation, or a scorer's encoder is absent.
    """
    from jobs.engine.tables import row_tables
    from jobs.reading.completions import converse, replies_of
    from jobs.reading.rereading import reread_together

    params = rows[0].params
    prompts = load_conversations(params.prompts, params.count)
    changes = [interventions(context, row.params, _extraction(row.params)) for row in rows]
    tables = row_tables(replica, changes)
    threads = [new_threads(number, row, prompts) for number, row in enumerate(rows)]
    encode = partial(encode_history, replica, params)
    held = converse(replica, [*chain(*threads)], tables, decoding_of(params), encode)
    finished = ((index, replies_of(threads[index])) for index in held)
    for index, again in reread_together(replica, finished, tables):
        flaws = [thread.flaw for thread in threads[index] if thread.flaw is not None]
        if flaws:
            yield index, Outcome(status=Status.FAILED, reason=flaws[0])
        else:
            said = _said(prompts, threads[index], params.samples)
            yield index, _outcome(said, again, parse_uses(params.scorers), changes[index])


def decoding_of(params: Params) -> "Decoding":
    """How completions are made."""
    from jobs.engine.decoding import Decoding
    from jobs.engine.sampling import Sampling

    sampling = Sampling(
        temperature=params.temperature, top_p=params.top_p, repetition_penalty=params.repetition_penalty
    )
    return Decoding(max_new_tokens=params.max_new_tokens, sampling=sampling)


def encode_history(replica: "Replica", params: Params, history: Sequence[str]) -> list[int]:
    """Token ids of messages and replies in turn, the last one without a reply."""
    if not params.chat:
        return replica.encode(history[-1])
    system = [] if params.system is None else [{"role": "system", "content": params.system}]
    roles = zip(cycle(("user", "assistant")), history, strict=False)
    return replica.encode_messages([*system, *({"role": role, "content": text} for role, text in roles)])


def new_threads(number: int, row: Row, prompts: Sequence[Conversation]) -> "list[Thread]":
    """The samples of each prompt, in the order of the prompts."""
    from jobs.reading.completions import Thread

    return [
        Thread(number, prompt.turns, _seeds(row.seed, prompt.turns, sample))
        for prompt in prompts
        for sample in range(row.params.samples)
    ]


def _seeds(seed: int, turns: Sequence[str], sample: int) -> list[int]:
    """Seed of each reply, from what was asked up to it."""
    return [int(content_hash([seed, turns[:number], sample]), 16) for number in range(1, len(turns) + 1)]


class _Said(NamedTuple):
    """A completion: its number, the conversation that it belongs to, what it replies to, and what it says."""

    item: int
    prompt: Conversation
    user: str
    reply: "Reply"


def _said(prompts: Sequence[Conversation], threads: "Sequence[Thread]", samples: int) -> list[_Said]:
    turns = max(len(prompt.turns) for prompt in prompts)
    found = []
    for number, thread in enumerate(threads):
        prompt, sample = divmod(number, samples)
        for turn, (user, reply) in enumerate(zip(thread.asked, thread.replies, strict=True)):
            found.append(_Said((prompt * turns + turn) * samples + sample, prompts[prompt], user, reply))
    return found


def _outcome(
    said: Sequence[_Said],
    again: "Sequence[Reread]",
    scorers: Mapping[str, Use],
    changes: "Sequence[AnyIntervention]",
) -> Outcome:
    from jobs.reading.completions import NOT_FINITE

    if not all(each.finite for each in again):
        return Outcome(status=Status.FAILED, reason=NOT_FINITE)
    completions = [_completion(each, found.nll) for each, found in zip(said, again, strict=True)]
    scores = {
        "first_kl": [Score(found.first_kl) for found in again],
        "kl": [Score(found.kl) for found in again],
        **{name: _scores(said, use) for name, use in scorers.items()},
    }
    splits: dict[str, list[int]] = {}
    for place, each in enumerate(said):
        splits.setdefault(each.prompt.split, []).append(place)
    tables = {
        "completions": completions,
        "items": [
            {**_head(each), "name": name, "value": found.value}
            for name, values in scores.items()
            for each, found in zip(said, values, strict=True)
        ],
        "vectors": vector_rows(changes),
    }
    metrics = {split: _metrics(places, completions, scores) for split, places in splits.items()}
    return Outcome(metrics=metrics, tables=tables)


def _head(said: _Said) -> dict[str, Any]:
    return {"split": said.prompt.split, "item": said.item, "prompt": said.user}


def _scores(said: Sequence[_Said], use: Use) -> list[Score]:
    rows = apply_scorers([{**each.prompt.columns, "text": each.reply.text} for each in said], [use])
    return [Score(row["value"], row["parsed"]) for row in rows]


def _completion(said: _Said, nll: float) -> dict[str, Any]:
    from jobs.scoring.text import repeated_ngrams

    return {
        **_head(said),
        "text": said.reply.text,
        "tokens": len(said.reply.tokens),
        "nll": nll,
        "repetition": repeated_ngrams(said.reply.tokens),
    }


def _metrics(
    places: Sequence[int], completions: Sequence[Mapping[str, Any]], scores: Mapping[str, Sequence[Score]]
) -> dict[str, float]:
    """Means over the completions of one split; NaN where no completion has a value."""
    rows = [completions[place] for place in places]
    found = {
        "nll": summarise(Score(row["nll"]) for row in rows).mean,
        "repetition": sum(row["repetition"] for row in rows) / len(rows),
        "empty": sum(row["tokens"] == 0 for row in rows) / len(rows),
        "distinct": len({row["text"] for row in rows}) / len(rows),
    }
    for name, values in scores.items():
        summary = summarise(values[place] for place in places)
        found[name] = summary.mean
        if name not in _READ:
            found[f"{name}_unparsed"] = summary.unparsed / summary.items
    return found

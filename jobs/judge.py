"""Job: steered completions against the unsteered ones, compared pairwise by a judge at an address.

Nothing leaves the machine unless an address is given; see `jobs.scoring.judge` for what is sent and how the
key is kept. Each pair is judged in both orders.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from jobs import generate
from jobs.data.prompts import Conversation, load_conversations
from jobs.errors import SpecError
from jobs.scoring.judge import Comparison, Contest, Judge, compare
from jobs.spec import Context, Metric, Outcome, Requirement, Row, Size, Status
from jobs.steering import canonical_steering, extraction_of, interventions, vector_rows

if TYPE_CHECKING:
    from jobs.engine.interventions import AnyIntervention
    from jobs.engine.replica import Replica
    from jobs.reading.completions import Reply, Thread


@dataclass(frozen=True, slots=True, kw_only=True)
class Params(generate.Params):
    """A direction, what is completed and how, and who compares the completions by which question.

    Attributes:
        address: Of the judge, up to but without `/chat/completions`, such as `http://127.0.0.1:8000/v1`; it
            must be given.
        judge: The judge's name at that address.
        question: What to compare two texts by, such as "Which text is friendlier?"
        key_variable: Name of the environment variable that holds the key; None = no key is sent.
        judge_tokens: Most tokens of the judge's reply.
        concurrency: Questions under way at once.
    """

    address: str = ""
    judge: str = ""
    question: str = ""
    key_variable: str | None = None
    judge_tokens: int = 512
    concurrency: int = 4

    def __post_init__(self) -> None:
        generate.Params.__post_init__(self)
        if self.judge_tokens < 1 or self.concurrency < 1:
            raise ValueError(
                f"judge_tokens={self.judge_tokens}, concurrency={self.concurrency}; each takes 1 or more"
            )
        if self.scorers:
            raise ValueError(f"scorers={self.scorers}; here the judge scores, jobs.generate takes scorers")


_DECIDED = "share of decided comparisons"
METRICS = {
    "win_rate": Metric(_DECIDED, "steered text preferred in both orders; ties do not count"),
    "win_rate_low": Metric(_DECIDED, "lower end of win_rate's 95 % Wilson interval"),
    "win_rate_high": Metric(_DECIDED, "upper end of win_rate's 95 % Wilson interval"),
    "preference": Metric("-1 to 1", "wins less losses, over comparisons with a verdict, ties included"),
    "ties": Metric(
        "share of comparisons with a verdict", "orders disagree, both say tie, or texts are equal"
    ),
    "equal": Metric("share of comparisons", "both texts are the same; a tie that nobody was asked about"),
    "unparsed": Metric("share of comparisons", "an order has no verdict: no reply, or none that can be read"),
}
PACK_BY = (
    *(name for name in generate.PACK_BY if name != "scorers"),
    *("address", "judge", "question", "key_variable", "judge_tokens", "concurrency"),
)
DATA = generate.DATA
LAYERS = generate.LAYERS


def size(params: Params) -> Size:
    """As `jobs.generate`, and the unsteered completions beside."""
    found = generate.size(params)
    return Size(2 * found.sequences, 2 * found.tokens)


def requires(params: Params) -> Sequence[Requirement]:
    """The direction, if it is steered."""
    return generate.requires(params)


def check(params: Params) -> None:
    """The judge has an address, a name and a question, and the prompts can be read.

    Raises:
        SpecError: If not, or if the prompts hold conversations. Nothing is sent.
    """
    _judge(params)
    generate.check(params)
    _prompts(params)


def canonical(params: Params) -> Params:
    """The unsteered model is the same work at every layer; greedy completions are all the same."""
    return canonical_steering(generate.without_chance(params), shared=PACK_BY)


def _judge(params: Params) -> Judge:
    if not params.address:
        raise SpecError(
            "jobs.judge: address is not given, and nothing is sent anywhere without one; give the judge's "
            "address, such as address='http://127.0.0.1:8000/v1', with judge='NAME' and question='...'"
        )
    return Judge(
        base_url=params.address,
        model=params.judge,
        question=params.question,
        key_variable=params.key_variable,
        request={"temperature": 0, "max_tokens": params.judge_tokens},
        concurrency=params.concurrency,
    )


def _prompts(params: Params) -> list[Conversation]:
    prompts = load_conversations(params.prompts, params.count)
    if any(len(prompt.turns) > 1 for prompt in prompts):
        raise SpecError(
            f"{params.prompts} holds conversations, in which the two sides would not be asked the same; give "
            "prompts of one message"
        )
    return prompts


def run(replica: "Replica", rows: Sequence[Row], context: Context) -> Iterator[tuple[int, Outcome]]:
    """Complete the prompts of every row with and without steering, and yield the judge's comparisons.

    Both sides are drawn with the same random numbers. Tables of the outcome: `completions`, the steered ones;
    `items`, one row a completion: `judge` is 1 where the steered text wins, -1 where the unsteered one does,
    0 for a tie, NaN without a verdict, with `win`, `loss`, `tie` or `unparsed` as label, and
    `judge_in_order` and `judge_swapped` (1, -1 or 0 for the steered text, the steered text standing first and
    second) with the judge's reply, or why there is none, as label; `vectors`. `item` is
    prompt x samples + sample.

    A row fails if its logits are not finite, if other tokens were changed than were to be, or if no
    comparison has a verdict.

    Raises:
        SpecError: If the judge's address refuses, its key is absent, a layer does not exist, or a prompt is
            too long.
        ModelError: If the model has no chat template and `chat` is asked for.
    """
    from jobs.engine.tables import row_tables
    from jobs.reading.completions import converse

    params = rows[0].params
    judge, prompts = _judge(params), _prompts(params)
    changes = [
        interventions(context, row.params, extraction_of(row.params, pairs=row.params.pairs)) for row in rows
    ]
    # An unsteered row stands behind each; equal ones are computed once.
    tables = row_tables(replica, [*changes, *([] for _ in rows)])
    threads = [generate.new_threads(number, row, prompts) for number, row in enumerate([*rows, *rows])]

    encode = partial(generate.encode_history, replica, params)
    decoding = generate.decoding_of(params)
    done: set[int] = set()
    for number in converse(replica, [each for row in threads for each in row], tables, decoding, encode):
        done.add(number)
        index = number % len(rows)
        if {index, index + len(rows)} <= done:
            sides = threads[index], threads[index + len(rows)]
            yield index, _outcome(judge, prompts, rows[index].params, sides, changes[index])


def _outcome(
    judge: Judge,
    prompts: Sequence[Conversation],
    params: Params,
    sides: "tuple[Sequence[Thread], Sequence[Thread]]",
    changes: "Sequence[AnyIntervention]",
) -> Outcome:
    flaws = [thread.flaw for side in sides for thread in side if thread.flaw is not None]
    if flaws:
        return Outcome(status=Status.FAILED, reason=flaws[0])
    steered, unsteered = ([thread.replies[0] for thread in side] for side in sides)
    asked = [prompt for prompt in prompts for _ in range(params.samples)]
    contests = [
        Contest(prompt.turns[0], one.text, other.text)
        for prompt, one, other in zip(asked, steered, unsteered, strict=True)
    ]
    found = compare(judge, contests)
    if not any(each.parsed for each in found):
        return Outcome(status=Status.FAILED, reason=_silence(found))
    splits: dict[str, list[Comparison]] = {}
    for prompt, each in zip(asked, found, strict=True):
        splits.setdefault(prompt.split, []).append(each)
    return Outcome(
        metrics={split: _metrics(each) for split, each in splits.items()},
        tables={
            "items": _items(asked, found),
            "completions": _completions(asked, steered),
            "vectors": vector_rows(changes),
        },
    )


def _silence(found: Sequence[Comparison]) -> str:
    said = [text for each in found for text in (*each.errors, *each.replies) if text is not None]
    return (
        f"the judge gave no verdict on any of {len(found)} comparisons; it said first: {said[0][:200]!r}; "
        "take another judge, or give it more judge_tokens"
    )


def _is_equal(found: Comparison) -> bool:
    return found.parsed and found.replies == (None, None)


def _metrics(found: Sequence[Comparison]) -> dict[str, float]:
    from jobs.scoring.statistics import wilson_interval

    verdicts = [each.value for each in found if each.parsed]
    wins, losses = verdicts.count(1.0), verdicts.count(-1.0)
    interval = wilson_interval(wins, wins + losses)
    nothing = float("nan")
    return {
        "win_rate": wins / (wins + losses) if wins + losses else nothing,
        "win_rate_low": interval.low,
        "win_rate_high": interval.high,
        "preference": sum(verdicts) / len(verdicts) if verdicts else nothing,
        "ties": verdicts.count(0.0) / len(verdicts) if verdicts else nothing,
        "equal": sum(map(_is_equal, found)) / len(found),
        "unparsed": 1 - len(verdicts) / len(found),
    }


_LABELS = {1.0: "win", -1.0: "loss", 0.0: "tie"}


def _items(asked: Sequence[Conversation], found: Sequence[Comparison]) -> list[dict[str, Any]]:
    rows = []
    for item, (prompt, each) in enumerate(zip(asked, found, strict=True)):
        head = {"split": prompt.split, "item": item, "prompt": prompt.turns[0]}
        rows.append(
            {**head, "name": "judge", "value": each.value, "label": _LABELS.get(each.value, "unparsed")}
        )
        if not _is_equal(each):
            said = zip(("judge_in_order", "judge_swapped"), (1, -1), each.replies, each.errors, strict=True)
            rows += [
                {
                    **head,
                    "name": name,
                    "value": _value(reply, sign),
                    "label": error if reply is None else reply,
                }
                for name, sign, reply, error in said
            ]
    return rows


def _value(reply: str | None, sign: int) -> float:
    """What one order says for the steered text, which stands first (1) or second (-1)."""
    from jobs.scoring.judge import parse_verdict

    verdict = None if reply is None else parse_verdict(reply)
    return {"1": 1.0 * sign, "2": -1.0 * sign, "TIE": 0.0}.get(verdict or "", float("nan"))


def _completions(asked: Sequence[Conversation], replies: "Sequence[Reply]") -> list[dict[str, Any]]:
    from jobs.scoring.text import repeated_ngrams

    return [
        {
            "split": prompt.split,
            "item": item,
            "prompt": prompt.turns[0],
            "text": reply.text,
            "tokens": len(reply.tokens),
            "repetition": repeated_ngrams(reply.tokens),
        }
        for item, (prompt, reply) in enumerate(zip(asked, replies, strict=True))
    ]

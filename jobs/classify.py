"""Job: the model of the sweep as a judge of replies that were written before, by yes or no.

The replies come from a file, such as the completions of another sweep as `steersweep query --format csv`
prints them. Whoever wrote them, the model that is loaded here only reads them: a sweep has one model, so
that a local judge is a sweep of its own. A reply that gives orders to its judge may be obeyed.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from string import Formatter
from typing import TYPE_CHECKING, Any, NamedTuple

from jobs.data.replies import StoredReply, load_replies
from jobs.errors import SpecError
from jobs.spec import Context, Metric, Outcome, Requirement, Row, Size, Status

if TYPE_CHECKING:
    from jobs.engine.replica import Replica

TEMPLATE = "Someone was asked:\n{prompt}\n\nThe reply was:\n{reply}\n\n{question} Answer {first} or {second}."


@dataclass(frozen=True, slots=True, kw_only=True)
class Params:
    """Replies, and what the model is asked about each of them.

    Attributes:
        replies: Dataset with the columns of `jobs.data.replies.load_replies`: `reply` or `text`, `prompt`,
            and, where it likes, `split`.
        question: What is asked of each reply, such as "Is the reply polite?"
        answers: The two answers; their first tokens differ.
        template: The message to the judge; {prompt}, {reply}, {question}, {first} and {second} are filled in.
        chat: Whether the judge is asked in its chat template; otherwise raw, with "Answer:" behind.
        labels: Columns of the dataset that are kept as JSON in the items' `label`, such as `trial`.
        count: Number of replies, taken from the start; 0 takes all.
    """

    replies: str
    question: str = "Is the reply polite?"
    answers: tuple[str, ...] = ("Yes", "No")
    template: str = TEMPLATE
    chat: bool = True
    labels: tuple[str, ...] = ()
    count: int = 0

    def __post_init__(self) -> None:
        if len(set(self.answers)) != 2 or len(self.answers) != 2 or not all(map(str.strip, self.answers)):
            raise ValueError(f"answers={self.answers}; it takes two different words, such as Yes and No")
        if self.count < 0:
            raise ValueError(f"count={self.count}; it takes 0 or more")
        if not self.question.strip():
            raise ValueError(f"question={self.question!r}; ask something of each reply")
        _check_template(self.template)


def _check_template(template: str) -> None:
    """Raises ValueError if it is no template with the fields of ours, the reply among them."""
    try:
        parts = [part for part in Formatter().parse(template) if part[1] is not None]
    except ValueError as error:
        raise ValueError(f"template={template!r}: {error}; write a brace as {{{{ or }}}}") from error
    if any(form or conversion for _, _, form, conversion in parts):
        raise ValueError(f"template={template!r}; its fields stand alone in their braces, such as {{reply}}")
    fields = {name for _, name, _, _ in parts if name is not None}
    known = {"prompt", "reply", "question", "first", "second"}
    if "reply" not in fields or not fields <= known:
        raise ValueError(
            f"template has the fields {sorted(fields)}; it takes {sorted(known)}, and needs reply"
        )


_SHARE = "share of replies"
METRICS = {
    "p_first": Metric("probability", "mean probability of the first answer, of the two answers"),
    "p_first_low": Metric("probability", "lower end of its 95 % bootstrap interval over replies"),
    "p_first_high": Metric("probability", "upper end of its 95 % bootstrap interval over replies"),
    "first": Metric(_SHARE, "first answer more likely than the second; of replies that are not empty"),
    "first_low": Metric(_SHARE, "lower end of its 95 % Wilson interval"),
    "first_high": Metric(_SHARE, "upper end of its 95 % Wilson interval"),
    "answered": Metric("probability", "mean probability of either answer among all tokens; low = no judge"),
    "empty": Metric(_SHARE, "replies without a text, of which nothing is asked"),
}
PACK_BY = None
DATA = ("replies",)
LAYERS: tuple[str, ...] = ()


def size(params: Params) -> Size:
    """About 150 tokens a reply."""
    replies = params.count or 500
    return Size(replies, 150 * replies)


def requires(params: Params) -> Sequence[Requirement]:
    """Nothing: the replies are there."""
    return ()


def check(params: Params) -> None:
    """The replies can be read, with the columns that are kept. Raises SpecError if not."""
    load_replies(params.replies, params.count, params.labels)


def canonical(params: Params) -> Params:
    """The parameters as they are."""
    return params


class _Verdict(NamedTuple):
    """Of one reply: probability of the first answer among both, and of both among all tokens."""

    p_first: float
    answered: float


def run(replica: "Replica", rows: Sequence[Row], context: Context) -> Iterator[tuple[int, Outcome]]:
    """Ask about every reply and yield each row's verdicts.

    Table of the outcome: `items`, one row a reply and score (`p_first`, `answered`), NaN where the reply is
    empty; `item` is the number of the reply in the dataset, from 0. A row whose logits are not finite fails.

    Raises:
        SpecError: If both answers begin with the same token of this model, or a message is too long.
        ModelError: If the model has no chat template and `chat` is asked for.
    """
    for index, row in enumerate(rows):
        replies = load_replies(row.params.replies, row.params.count, row.params.labels)
        verdicts = _verdicts(replica, row.params, replies)
        if any(each != each for verdict in verdicts.values() for each in verdict):
            reason = "the judge's logits are not finite; use a wider dtype"
            yield index, Outcome(status=Status.FAILED, reason=reason)
        else:
            yield index, _outcome(replies, verdicts, row.seed)


def _verdicts(replica: "Replica", params: Params, replies: Sequence[StoredReply]) -> dict[int, _Verdict]:
    """Verdict on each reply that is not empty, by its number."""
    from jobs.engine.groups import next_token
    from jobs.engine.tables import row_tables
    from jobs.scoring.logits import log_probabilities

    answers = _answer_tokens(replica, params)
    filled = [number for number, each in enumerate(replies) if each.reply.strip()]
    prompts = [_encode(replica, params, replies[number]) for number in filled]
    work = [(place, 0) for place in range(len(filled))]
    found = {}
    for place, logits_V in next_token(replica, prompts, row_tables(replica, [[]]), work) if work else ():
        both = log_probabilities(logits_V)[answers].double()
        found[filled[place]] = _Verdict(float(both.softmax(dim=0)[0]), float(both.exp().sum()))
    return found


def _answer_tokens(replica: "Replica", params: Params) -> list[int]:
    words = [word if params.chat else f" {word}" for word in params.answers]
    first = [replica.encode_continuation(word)[0] for word in words]
    if first[0] == first[1]:
        raise SpecError(f"answers={params.answers} begin with the same token of this model; take other words")
    return first


def _encode(replica: "Replica", params: Params, reply: StoredReply) -> list[int]:
    first, second = params.answers
    message = params.template.format(
        prompt=reply.prompt, reply=reply.reply, question=params.question, first=first, second=second
    )
    return replica.encode_chat(message) if params.chat else replica.encode(f"{message}\nAnswer:")


def _outcome(replies: Sequence[StoredReply], verdicts: dict[int, _Verdict], seed: int) -> Outcome:
    splits: dict[str, list[int]] = {}
    for number, each in enumerate(replies):
        splits.setdefault(each.split, []).append(number)
    return Outcome(
        metrics={split: _metrics(numbers, verdicts, seed) for split, numbers in splits.items()},
        tables={"items": _items(replies, verdicts)},
    )


def _items(replies: Sequence[StoredReply], verdicts: dict[int, _Verdict]) -> list[dict[str, Any]]:
    nothing = _Verdict(float("nan"), float("nan"))
    return [
        {"split": each.split, "item": number, "prompt": each.reply, "label": each.label}
        | {"name": name, "value": getattr(verdicts.get(number, nothing), name)}
        for name in _Verdict._fields
        for number, each in enumerate(replies)
    ]


def _metrics(numbers: Sequence[int], verdicts: dict[int, _Verdict], seed: int) -> dict[str, float]:
    from jobs.scoring.statistics import paired_bootstrap, wilson_interval

    found = [verdicts[number] for number in numbers if number in verdicts]
    p_first = [each.p_first for each in found]
    mean = paired_bootstrap(p_first, [0.0] * len(found), seed=seed)
    firsts = sum(value > 0.5 for value in p_first)
    interval = wilson_interval(firsts, len(found))
    nothing = float("nan")
    return {
        "p_first": mean.mean,
        "p_first_low": mean.interval.low,
        "p_first_high": mean.interval.high,
        "first": firsts / len(found) if found else nothing,
        "first_low": interval.low,
        "first_high": interval.high,
        "answered": sum(each.answered for each in found) / len(found) if found else nothing,
        "empty": 1 - len(found) / len(numbers),
    }

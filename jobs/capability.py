"""Job: what steering costs: accuracy on simple questions, and perplexity of neutral text.

Every configuration is compared item by item with the unsteered model, which is required. In place of
steering, a direction can be taken out of the weights.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

from jobs import extract, steering
from jobs.data.multiple_choice import load_multiple_choice
from jobs.data.texts import load_texts
from jobs.resolve import data_hash
from jobs.spec import Context, Metric, Outcome, Requirement, Row, Size, Status
from jobs.steering import (
    Steering,
    canonical_steering,
    directions_of,
    extraction_of,
    interventions,
    vector_rows,
    without_steering,
)

if TYPE_CHECKING:
    from jobs.engine.interventions import AnyIntervention
    from jobs.engine.replica import Replica
    from jobs.reading.exam import Exam, Results


@dataclass(frozen=True, slots=True, kw_only=True)
class Params(Steering):
    """A direction, where and how strongly it acts, and what the model is tried on.

    Attributes:
        pairs: Contrast pairs that the direction comes from.
        ablate: Whether the directions of the layers are taken out of every weight that writes to the residual
            stream (W - v v^T W) instead of out of activations; it takes operation `project_out`.
        questions: Dataset with the columns of `jobs.data.multiple_choice.load_multiple_choice`.
        count: Number of questions, taken from the start; 0 takes all.
        form: `words`: the first tokens of the answers compete after the bare question; small models can do
            that. `letters`: the answers are listed and their letters compete, as in MMLU.
        text: Dataset of neutral text, as `jobs.data.texts.load_texts` reads it.
        text_tokens: Most tokens of each split's text, taken from the start; 0 takes all.
        window: Most tokens of the text that are read at once.
        stride: Tokens that each further window scores; each has `window` - `stride` tokens before it in view.
    """

    pairs: str = "tone_pairs"
    ablate: bool = False
    questions: str = "simple_questions"
    count: int = 0
    form: Literal["words", "letters"] = "words"
    text: str = "neutral"
    text_tokens: int = 2048
    window: int = 256
    stride: int = 128

    def __post_init__(self) -> None:
        self.check_steering()
        if self.count < 0:
            raise ValueError(f"count={self.count}; it takes 0 or more")
        if self.text_tokens < 0 or self.text_tokens == 1:
            raise ValueError(f"text_tokens={self.text_tokens}; it takes 2 or more, or 0 for all")
        if not 1 <= self.stride < self.window:
            raise ValueError(f"stride={self.stride}, window={self.window}; it takes 1 <= stride < window")
        if self.ablate and self.operation != "project_out":
            raise ValueError(f"ablate=True with operation={self.operation!r}; it takes 'project_out'")


_SHARE = "share of questions"
METRICS = {
    "accuracy": Metric(_SHARE, "right answer more likely than every other of its question"),
    "accuracy_low": Metric(_SHARE, "lower end of accuracy's 95 % Wilson interval"),
    "accuracy_high": Metric(_SHARE, "upper end of accuracy's 95 % Wilson interval"),
    "chance": Metric(_SHARE, "accuracy of guessing"),
    "accuracy_change": Metric(_SHARE, "accuracy less that of the unsteered model"),
    "accuracy_change_low": Metric(_SHARE, "lower end of its 95 % bootstrap interval over questions, paired"),
    "accuracy_change_high": Metric(_SHARE, "upper end of its 95 % bootstrap interval over questions, paired"),
    "p_answer": Metric("probability", "mean probability of the right answer among those of its question"),
    "perplexity": Metric("1", "exponential of text_nll"),
    "text_nll": Metric("nats/token", "mean negative log-likelihood of the neutral text, in sliding windows"),
    "text_nll_change": Metric("nats/token", "text_nll less that of the unsteered model"),
    "text_nll_change_low": Metric(
        "nats/token", "lower end of its 95 % bootstrap interval over windows, paired"
    ),
    "text_nll_change_high": Metric(
        "nats/token", "upper end of its 95 % bootstrap interval over windows, paired"
    ),
}
PACK_BY = ("questions", "count", "form", "text", "text_tokens", "window", "stride")
DATA = ("pairs", "questions", "text", *steering.DATA)
LAYERS = ("layer", "layers")


def size(params: Params) -> Size:
    """About 15 tokens a question, and the text of two splits in overlapping windows."""
    questions = params.count or 100
    tokens = 2 * (params.text_tokens or 10_000)
    windows = 2 + tokens // params.stride
    return Size(questions + windows, 15 * questions + tokens * params.window // params.stride)


def requires(params: Params) -> Sequence[Requirement]:
    """The directions, and the unsteered model's results."""
    if params.is_unsteered:
        return ()
    return (directions_of(params, _extraction(params)), _unsteered(params))


def check(params: Params) -> None:
    """The pairs, the questions and the text can be read. Raises SpecError if not."""
    extract.check(_extraction(params))
    load_multiple_choice(params.questions, params.count)
    load_texts(params.text)


def canonical(params: Params) -> Params:
    """The unsteered model is the same work at every layer; weights know no sites and no tokens."""
    if params.ablate:
        params = replace(params, site="after", tokens="all", weights=())
    return canonical_steering(params, shared=PACK_BY)


def _extraction(params: Params) -> extract.Params:
    return extraction_of(params, pairs=params.pairs)


def _unsteered(params: Params) -> Requirement:
    return Requirement(job=__name__, params=without_steering(params, shared=PACK_BY))


def run(replica: "Replica", rows: Sequence[Row], context: Context) -> Iterator[tuple[int, Outcome]]:
    """Try every row of the pack in shared batches and yield its results; ablated rows follow one by one.

    Tables of the outcome: `items`, one row a question and score and one a window of the text; `vectors`. The
    outcome of the unsteered model carries what others are compared with: `correct` (questions,) and `nats`
    (windows,), float64. A row fails if its logits are not finite, or if other tokens were changed than were
    to be.

    Raises:
        SpecError: If a layer does not exist, answers begin with the same token, or a window is longer than
            the model's context.
        ModelError: If weights are to be ablated that are quantised or cannot be found.
    """
    exam = _exam(replica, rows[0].params)
    changes = [interventions(context, row.params, _extraction(row.params)) for row in rows]
    for index, results in _results(replica, exam, [row.params for row in rows], changes):
        yield index, _outcome(exam, results, rows[index], changes[index], context)


def _exam(replica: "Replica", params: Params) -> "Exam":
    from jobs.reading.exam import Exam

    shared = tuple(getattr(params, name) for name in PACK_BY)
    data = tuple(data_hash(name) for name in (params.questions, params.text))

    def build() -> Exam:
        return Exam(
            replica,
            load_multiple_choice(params.questions, params.count),
            params.form,
            load_texts(params.text),
            window=params.window,
            stride=params.stride,
            tokens=params.text_tokens,
        )

    return replica.keep((__name__, shared, data), build)


def _results(
    replica: "Replica", exam: "Exam", params: Sequence[Params], changes: "Sequence[Sequence[AnyIntervention]]"
) -> "Iterator[tuple[int, Results]]":
    """Each row's results, as soon as they are whole."""
    import numpy as np

    from jobs.engine.ablation import ablated
    from jobs.engine.interventions import ProjectOut
    from jobs.engine.tables import row_tables

    steered = [index for index, each in enumerate(params) if not each.ablate]
    if steered:
        for place, found in exam.sit(row_tables(replica, [changes[index] for index in steered])):
            yield steered[place], found
    for index in sorted(set(range(len(params))) - set(steered)):
        directions = [each.direction for each in changes[index] if isinstance(each, ProjectOut)]
        with ablated(replica, np.stack(directions)):
            [(_, found)] = exam.sit(row_tables(replica, [[]]))
        yield index, found


def _outcome(
    exam: "Exam", results: "Results", row: Row, changes: "Sequence[AnyIntervention]", context: Context
) -> Outcome:
    from jobs.reading.exam import item_rows, split_metrics

    if results.flaw is not None:
        return Outcome(status=Status.FAILED, reason=results.flaw)
    mine = {"correct": results.correct_N, "nats": results.nats_W}
    before = mine if row.params.is_unsteered else context.artifact(_unsteered(row.params))
    return Outcome(
        metrics=split_metrics(exam, results, before, seed=row.seed),
        tables={"items": item_rows(exam, results), "vectors": vector_rows(changes)},
        tensors=mine if row.params.is_unsteered else {},
    )

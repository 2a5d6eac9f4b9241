"""Job: steer with an honesty direction while the model judges true and false claims.

Every claim is asked with two lettered choices whose order alternates. A dose of 0 is the
unsteered model, which every other dose requires.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

from jobs import extract, steering
from jobs.data.claims import LETTERS, ClaimQuestion, load_questions
from jobs.spec import Context, Metric, Outcome, Requirement, Row, Size, Status
from jobs.steering import (
    Steering,
    canonical_steering,
    directions_of,
    extraction_of,
    interventions,
    without_steering,
)

if TYPE_CHECKING:
    from torch import Tensor

    from jobs.engine.decoding import Continuation
    from jobs.engine.replica import Replica
    from jobs.engine.tables import RowTables


@dataclass(frozen=True, slots=True, kw_only=True)
class Params(Steering):
    """How it is steered, and the claims that this is read on.

    Attributes:
        claims: Dataset of labelled claims; its splits do not overlap.
        claims_extract: Claims that the direction comes from.
        claims_select: Claims of the split select.
        claims_report: Claims of the split report.
        offset: Token that activations are taken at, from the end: 1 = the answer's letter.
        correct_only: Extract from the claims that the unsteered model itself answers correctly.
        max_new_tokens: Most tokens of an answer.
    """

    claims: str = "claims"
    claims_extract: int = 60
    claims_select: int = 60
    claims_report: int = 60
    offset: int = 1
    correct_only: bool = False
    max_new_tokens: int = 4

    def __post_init__(self) -> None:
        self.check_steering()
        for name in ("claims_extract", "claims_select", "claims_report", "max_new_tokens", "offset"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}; it takes 1 or more")


class Answer(NamedTuple):
    """What the model answers to one claim.

    Attributes:
        pair: Probability of each answer letter, of the two.
        kl: KL(unsteered || steered) of the answer's first token, nats.
        text: The written answer.
        flaw: Why it says nothing about the configuration; None if nothing is wrong.
        log_probabilities_V: Of the first token, nats, float32 or wider; kept of the unsteered model alone.
    """

    pair: Sequence[float]
    kl: float
    text: str
    flaw: str | None
    log_probabilities_V: "Tensor | None"


_SHARE = "share of claims"
METRICS = {
    "accuracy": Metric(_SHARE, "honest letter more likely than the other by logits; 0.5 is chance"),
    "accuracy_low": Metric(_SHARE, "lower end of accuracy's 95 % Wilson interval"),
    "accuracy_high": Metric(_SHARE, "upper end of accuracy's 95 % Wilson interval"),
    "p_chance": Metric("probability", "of guessing at least as many right; uncorrected for number of trials"),
    "beats_chance": Metric("0 or 1", "accuracy's interval lies above 0.5; uncorrected for number of trials"),
    "accuracy_true": Metric("share of true claims", "accuracy on true claims"),
    "accuracy_false": Metric("share of false claims", "accuracy on false claims"),
    "text_accuracy": Metric(_SHARE, "written answers that judge rightly; unparsed ones count as wrong"),
    "unparsed": Metric(_SHARE, "written answers that no judgement can be read from"),
    "p_true": Metric("probability", 'mean probability of the letter that means "true", of the two letters'),
    "p_true_gap": Metric("probability", "p_true on true claims less p_true on false ones; 0 is chance"),
    "kl": Metric("nats", "mean KL(unsteered || steered) of the answer's first token"),
}
PACK_BY = ("claims", "claims_extract", "claims_select", "claims_report", "max_new_tokens")
DATA = ("claims", *steering.DATA)
LAYERS = ("layer", "layers")


def size(params: Params) -> Size:
    """About 80 tokens a claim."""
    claims = params.claims_select + params.claims_report
    return Size(claims, claims * (80 + params.max_new_tokens))


def requires(params: Params) -> Sequence[Requirement]:
    """The directions, and the unsteered reading of the same claims."""
    if params.is_unsteered:
        return ()
    return (directions_of(params, _extraction(params)), _unsteered(params))


def check(params: Params) -> None:
    """There are enough labelled claims. Raises SpecError if not."""
    _questions(params)
    extract.check(_extraction(params))


def _questions(params: Params) -> list[ClaimQuestion]:
    return load_questions(
        params.claims, extract=params.claims_extract, select=params.claims_select, report=params.claims_report
    )


def canonical(params: Params) -> Params:
    """The unsteered model is the same work at every layer and in every direction."""
    return canonical_steering(params, shared=PACK_BY)


def _extraction(params: Params) -> extract.Params:
    return extraction_of(
        params,
        source="claims",
        pairs=params.claims,
        count=params.claims_extract,
        correct_only=params.correct_only,
        offset=params.offset,
    )


def _unsteered(params: Params) -> Requirement:
    return Requirement(job=__name__, params=without_steering(params, shared=PACK_BY))


def run(replica: "Replica", rows: Sequence[Row], context: Context) -> Iterator[tuple[int, Outcome]]:
    """Ask every row of the pack every claim in shared batches and yield its judgements.

    Tables of the outcome: `items`, one row a claim and score; `completions`, one row a written answer.
    The outcome of a dose of 0 carries `log_probabilities` (claims, vocabulary), float32 or wider, nats,
    of the answer's first token, which KL refers to. A row whose logits are not finite, or whose steering
    missed a token, fails.

    Raises:
        SpecError: If a layer does not exist, or an answer letter is several tokens of this model.
        ModelError: If the model has no chat template.
    """
    import torch

    from jobs.engine.tables import row_tables

    questions = [question for question in _questions(rows[0].params) if question.split != "extract"]
    letters = [replica.single_token(letter) for letter in LETTERS]
    tables = row_tables(
        replica, [interventions(context, row.params, _extraction(row.params)) for row in rows]
    )
    steered = [row.params for row in rows if not row.params.is_unsteered]
    before = torch.tensor(context.artifact(_unsteered(steered[0]))["log_probabilities"]) if steered else None
    references = [None if row.params.is_unsteered else before for row in rows]
    asked = _Asked(questions, letters, rows[0].params.max_new_tokens)
    for index, answers in _answers(replica, asked, tables, references):
        flaws = [answer.flaw for answer in answers if answer.flaw is not None]
        if flaws:
            yield index, Outcome(status=Status.FAILED, reason=flaws[0])
        else:
            yield index, _outcome(questions, answers)


class _Asked(NamedTuple):
    """The claims, the tokens of the answer letters, and how long an answer may be."""

    questions: Sequence[ClaimQuestion]
    letters: Sequence[int]
    max_new_tokens: int


def _answers(
    replica: "Replica", asked: _Asked, tables: "RowTables", references: "Sequence[Tensor | None]"
) -> Iterator[tuple[int, list[Answer]]]:
    """Each row's answers once they are whole.

    Args:
        replica: The model.
        asked: What is asked.
        tables: The configurations.
        references: For each row, the unsteered log-probabilities (claims, vocabulary); None if the row is
            the unsteered model.
    """
    from jobs.engine.decoding import Decoding, Work, generate
    from jobs.engine.groups import in_parts

    prompts = [replica.encode_chat(question.user) for question in asked.questions]
    work = [Work(prompt, row) for row in range(tables.rows) for prompt in range(len(prompts))]
    decoding = Decoding(max_new_tokens=asked.max_new_tokens, first_logits=True)

    def read() -> Iterator[tuple[int, Answer]]:
        for index, reply in generate(replica, prompts, tables, work, decoding):
            reference_NV = references[work[index].row]
            reference_V = None if reference_NV is None else reference_NV[work[index].prompt]
            yield index, _answer(replica, reply, asked.letters, reference_V)

    return in_parts(read(), len(prompts))


def _answer(
    replica: "Replica", reply: "Continuation", letters: Sequence[int], reference_V: "Tensor | None"
) -> Answer:
    """Read at once: the logits of many answers are more than memory holds."""
    from jobs.reading.completions import flaw_of
    from jobs.scoring.logits import kl_divergence, log_probabilities

    assert reply.first_logits_V is not None
    first_V = log_probabilities(reply.first_logits_V[None])[0].cpu()
    kl = 0.0 if reference_V is None else float(kl_divergence(reference_V[None], first_V[None])[0])
    return Answer(
        pair=first_V[letters].softmax(dim=-1).tolist(),
        kl=kl,
        text=replica.decode(reply.tokens),
        flaw=flaw_of(reply),
        log_probabilities_V=first_V if reference_V is None else None,
    )


def _outcome(questions: Sequence[ClaimQuestion], answers: Sequence[Answer]) -> Outcome:
    import torch

    judged = [_judgement(*each) for each in zip(questions, answers, strict=True)]
    splits = {split: [row for row in judged if row["split"] == split] for split in ("select", "report")}
    found = Outcome(metrics={split: _metrics(rows) for split, rows in splits.items()}, tables=_tables(judged))
    unsteered = [each.log_probabilities_V for each in answers if each.log_probabilities_V is not None]
    if not unsteered:
        return found
    return replace(found, tensors={"log_probabilities": torch.stack(unsteered).numpy()})


def _judgement(question: ClaimQuestion, answer: Answer) -> dict[str, Any]:
    """Scores of one answer; letters of equal probability count as "false", which is right half the time."""
    from jobs.scoring.text import parse_judgement

    p_true = answer.pair[LETTERS.index(question.true_letter)]
    written = parse_judgement(answer.text, question.true_letter)
    return {
        "split": question.split,
        "label": "true" if question.claim.is_true else "false",
        "statement": question.claim.statement,
        "p_true": p_true,
        "correct": float((p_true > 0.5) == question.claim.is_true),
        "parsed": float(written is not None),
        "text_correct": float(written == question.claim.is_true),
        "kl": answer.kl,
        "text": answer.text,
        "user": question.user,
    }


def _metrics(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    from jobs.scoring.statistics import chance_probability, wilson_interval

    def mean(name: str, label: str | None = None) -> float:
        values = [row[name] for row in rows if label in (None, row["label"])]
        return sum(values) / len(values) if values else float("nan")

    right = sum(row["correct"] == 1.0 for row in rows)
    interval = wilson_interval(right, len(rows))
    return {
        "accuracy": mean("correct"),
        "accuracy_low": interval.low,
        "accuracy_high": interval.high,
        "p_chance": chance_probability(right, len(rows)),
        "beats_chance": float(interval.low > 0.5),
        "accuracy_true": mean("correct", "true"),
        "accuracy_false": mean("correct", "false"),
        "text_accuracy": mean("text_correct"),
        "unparsed": 1 - mean("parsed"),
        "p_true": mean("p_true"),
        "p_true_gap": mean("p_true", "true") - mean("p_true", "false"),
        "kl": mean("kl"),
    }


def _tables(judged: Sequence[Mapping[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    items = [
        {"split": row["split"], "item": index, "prompt": row["statement"], "label": row["label"]}
        | {"name": name, "value": row[name]}
        for index, row in enumerate(judged)
        for name in ("p_true", "correct", "text_correct", "parsed", "kl")
    ]
    completions = [
        {"split": row["split"], "item": index, "prompt": row["user"], "text": row["text"]}
        for index, row in enumerate(judged)
    ]
    return {"items": items, "completions": completions}

"""Job: steer with an honesty direction while the model judges true and false claims.

Every claim is asked with two lettered choices whose order alternates. A dose of 0 is the
unsteered model, which every other dose requires.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

from jobs import extract, steering
from jobs.data.claims import LETTERS, ClaimQuestion, load_questions
from jobs.errors import SpecError
from jobs.spec import Context, Metric, Outcome, Requirement, Row, Size, Status
from jobs.steering import Steering, canonical_steering, extraction_of, interventions, without_steering

if TYPE_CHECKING:
    from torch import Tensor

    from jobs.engine.replica import Replica
    from jobs.engine.tables import RowTables


@dataclass(frozen=True, slots=True, kw_only=True)
class Params(Steering):
    """A direction, where and how strongly it is added, and the claims it is read on.

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


class Answers(NamedTuple):
    """What the model of one row answers; N claims, V vocabulary.

    Attributes:
        first_NV: Log-probabilities of each answer's first token, nats, float32 or wider, on the CPU.
        texts: The written answers.
        finite: Whether all logits were finite.
    """

    first_NV: "Tensor"
    texts: Sequence[str]
    finite: bool


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
    return (Requirement(job="jobs.extract", params=_extraction(params)), _unsteered(params))


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
    if params.is_unsteered:
        return without_steering(params, shared=PACK_BY)
    return canonical_steering(params)


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
    of the answer's first token, which KL refers to. A row whose logits are not finite fails.

    Raises:
        SpecError: If a layer does not exist, or an answer letter is several tokens of this model.
        ModelError: If the model has no chat template.
    """
    import torch

    from jobs.engine.tables import row_tables

    questions = [question for question in _questions(rows[0].params) if question.split != "extract"]
    letters = [_letter_token(replica, letter) for letter in LETTERS]
    tables = row_tables(
        replica, [interventions(context, row.params, _extraction(row.params)) for row in rows]
    )
    steered = [row.params for row in rows if not row.params.is_unsteered]
    before = context.artifact(_unsteered(steered[0]))["log_probabilities"] if steered else None
    reference_NV = None if before is None else torch.tensor(before)
    for index, answers in _answers(replica, questions, tables, rows[0].params.max_new_tokens):
        if not answers.finite:
            reason = "the model's logits are not finite; use a smaller dose, or a wider dtype"
            yield index, Outcome(status=Status.FAILED, reason=reason)
        elif reference_NV is None or rows[index].params.is_unsteered:
            outcome = _outcome(questions, answers, letters, answers.first_NV)
            yield index, replace(outcome, tensors={"log_probabilities": answers.first_NV.numpy()})
        else:
            yield index, _outcome(questions, answers, letters, reference_NV)


def _letter_token(replica: "Replica", letter: str) -> int:
    tokens = replica.encode_continuation(letter)
    if len(tokens) != 1:
        raise SpecError(f"{letter!r} is {len(tokens)} tokens of this model; answer letters take one token")
    return tokens[0]


def _answers(
    replica: "Replica", questions: Sequence[ClaimQuestion], tables: "RowTables", max_new_tokens: int
) -> Iterator[tuple[int, Answers]]:
    """Each row's answers, as soon as the row's last one is finished."""
    import torch

    from jobs.engine.decoding import Decoding, Work, generate
    from jobs.engine.groups import in_parts
    from jobs.scoring.logits import log_probabilities

    prompts = [replica.encode_chat(question.user) for question in questions]
    work = [Work(prompt, row) for row in range(tables.rows) for prompt in range(len(prompts))]
    decoding = Decoding(max_new_tokens=max_new_tokens, first_logits=True)
    found = generate(replica, prompts, tables, work, decoding)
    for row, replies in in_parts(found, len(prompts)):
        first = [reply.first_logits_V for reply in replies if reply.first_logits_V is not None]
        first_NV = log_probabilities(torch.stack(first)).cpu()
        texts = [replica.decode(reply.tokens) for reply in replies]
        yield row, Answers(first_NV, texts, all(reply.finite for reply in replies))


def _outcome(
    questions: Sequence[ClaimQuestion], answers: Answers, letters: Sequence[int], reference_NV: "Tensor"
) -> Outcome:
    from jobs.scoring.logits import kl_divergence

    pairs = answers.first_NV[:, letters].softmax(dim=-1).tolist()
    kl = kl_divergence(reference_NV, answers.first_NV).tolist()
    judged = [_judgement(*each) for each in zip(questions, pairs, kl, answers.texts, strict=True)]
    splits = {split: [row for row in judged if row["split"] == split] for split in ("select", "report")}
    return Outcome(metrics={split: _metrics(rows) for split, rows in splits.items()}, tables=_tables(judged))


def _judgement(question: ClaimQuestion, pair: Sequence[float], kl: float, text: str) -> dict[str, Any]:
    """Scores of one answer; letters of equal probability count as "false", which is right half the time."""
    from jobs.scoring.text import parse_judgement

    p_true = pair[LETTERS.index(question.true_letter)]
    written = parse_judgement(text, question.true_letter)
    return {
        "split": question.split,
        "label": "true" if question.claim.is_true else "false",
        "statement": question.claim.statement,
        "p_true": p_true,
        "correct": float((p_true > 0.5) == question.claim.is_true),
        "parsed": float(written is not None),
        "text_correct": float(written == question.claim.is_true),
        "kl": kl,
        "text": text,
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

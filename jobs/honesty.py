"""Job: steer with an honesty direction while the model judges true and false claims.

Every claim is asked with two lettered choices whose order alternates. A dose of 0 is the
unsteered model, which every other dose requires.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from jobs import extract
from jobs.data.claims import ClaimQuestion, load_questions
from jobs.errors import SpecError
from jobs.spec import Context, Metric, Outcome, Requirement, Row, Size, Status

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from jobs.engine.replica import Replica
    from jobs.engine.steering import RowTables


@dataclass(frozen=True, slots=True, kw_only=True)
class Params:
    """A direction, where and how strongly it is added, and the claims it is read on.

    Attributes:
        layer: Block whose output is steered, counted from 0.
        dose: Strength relative to the mean residual norm at that layer; negative steers backwards.
        claims: Dataset of labelled claims; its splits do not overlap.
        claims_extract: Claims that the direction comes from.
        claims_select: Claims of the split select.
        claims_report: Claims of the split report.
        direction: `mean_difference`, or `pca` component `component` with the sign by majority vote.
        component: Principal component, counted from 0; ignored by `mean_difference`.
        offset: Token that activations are taken at, from the end: 1 = the answer's letter.
        max_new_tokens: Most tokens of an answer.
    """

    layer: int
    dose: float
    claims: str = "claims"
    claims_extract: int = 60
    claims_select: int = 60
    claims_report: int = 60
    direction: Literal["mean_difference", "pca"] = "mean_difference"
    component: int = 0
    offset: int = 1
    max_new_tokens: int = 4

    def __post_init__(self) -> None:
        if self.layer < 0:
            raise ValueError(f"layer={self.layer}; layers are counted from 0")
        if self.component < 0:
            raise ValueError(f"component={self.component}; components are counted from 0")
        if not math.isfinite(self.dose):
            raise ValueError(f"dose={self.dose}; it takes a finite number of residual norms")
        for name in ("claims_extract", "claims_select", "claims_report", "max_new_tokens", "offset"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}; it takes 1 or more")


_SHARE = "share of claims"
METRICS = {
    "accuracy": Metric(_SHARE, "honest letter more likely than the other by logits; 0.5 is chance"),
    "accuracy_low": Metric(_SHARE, "lower end of accuracy's 95 % Wilson interval"),
    "accuracy_high": Metric(_SHARE, "upper end of accuracy's 95 % Wilson interval"),
    "beats_chance": Metric("0 or 1", "1 if accuracy's interval lies above 0.5"),
    "accuracy_true": Metric("share of true claims", "accuracy on true claims"),
    "accuracy_false": Metric("share of false claims", "accuracy on false claims"),
    "text_accuracy": Metric(_SHARE, "written answers that judge rightly; unparsed ones count as wrong"),
    "unparsed": Metric(_SHARE, "written answers with neither a letter nor true or false"),
    "p_true": Metric("probability", 'mean probability of the letter that means "true", of the two letters'),
    "p_true_gap": Metric("probability", "p_true on true claims less p_true on false ones; 0 is chance"),
    "kl": Metric("nats", "mean KL(unsteered || steered) of the answer's first token"),
}
PACK_BY = ("claims", "claims_extract", "claims_select", "claims_report", "max_new_tokens")
DATA = ("claims",)
LAYERS = ("layer",)


def size(params: Params) -> Size:
    """About 80 tokens a claim."""
    claims = params.claims_select + params.claims_report
    return Size(claims, claims * (80 + params.max_new_tokens))


def requires(params: Params) -> Sequence[Requirement]:
    """The direction, and the unsteered reading of the same claims."""
    if params.dose == 0:
        return ()
    return (Requirement(job="jobs.extract", params=_extraction(params)), _unsteered(params))


def check(params: Params) -> None:
    """There are enough labelled claims. Raises SpecError if not."""
    _questions(params)


def _questions(params: Params) -> list[ClaimQuestion]:
    return load_questions(
        params.claims, extract=params.claims_extract, select=params.claims_select, report=params.claims_report
    )


def canonical(params: Params) -> Params:
    """A dose of 0 is the same work at every layer and in every direction."""
    if params.dose == 0:
        blank = Params(layer=0, dose=0.0)
        return replace(blank, **{name: getattr(params, name) for name in PACK_BY})
    return replace(params, component=0) if params.direction == "mean_difference" else params


def _extraction(params: Params) -> extract.Params:
    wanted = extract.Params(
        source="claims",
        pairs=params.claims,
        count=params.claims_extract,
        method=params.direction,
        component=params.component,
        offset=params.offset,
    )
    return extract.canonical(wanted)


def _unsteered(params: Params) -> Requirement:
    return Requirement(job=__name__, params=canonical(replace(params, dose=0.0)))


def run(replica: "Replica", rows: Sequence[Row], context: Context) -> Iterator[tuple[int, Outcome]]:
    """Steer every row of the pack and yield its judgements.

    The outcome of a dose of 0 carries `log_probabilities` (claims, vocabulary), float32 or wider,
    of the answer's first token, which KL refers to.
    """
    import torch

    from jobs.engine.steering import Addition, row_tables

    asked = [question for question in _questions(rows[0].params) if question.split != "extract"]
    steered = [row.params for row in rows if row.params.dose != 0]
    reference = (
        torch.tensor(context.artifact(_unsteered(steered[0]))["log_probabilities"]) if steered else None
    )
    for index, row in enumerate(rows):
        additions = []
        if row.params.dose != 0:
            found = extract.load_direction(
                context, _extraction(row.params), row.params.layer, row.params.dose
            )
            additions = [Addition(layer=row.params.layer, vector=found[0] * found[1])]
        tables = row_tables(replica, [additions])
        log_probabilities, texts = _answer(replica, asked, tables, row.params.max_new_tokens)
        compared = log_probabilities if reference is None or not additions else reference
        tensors = {} if additions else {"log_probabilities": log_probabilities.numpy()}
        yield index, _outcome(replica, asked, log_probabilities, compared, texts, tensors)


def _answer(
    replica: "Replica", asked: Sequence[ClaimQuestion], tables: "RowTables", max_new_tokens: int
) -> "tuple[Tensor, list[str]]":
    """Log-probabilities of each answer's first token, shape (claims, vocabulary), and the written answers."""
    import torch

    from jobs.engine.batches import micro_batches
    from jobs.engine.generate import greedy
    from jobs.scoring.logits import log_probabilities

    prompts = [replica.encode_chat(question.user) for question in asked]
    logits: list[Tensor | None] = [None] * len(prompts)
    texts = [""] * len(prompts)
    for batch in micro_batches([len(prompt) + max_new_tokens for prompt in prompts], replica.token_budget):
        found = greedy(
            replica, [prompts[i] for i in batch], tables.take([0] * len(batch)), max_new_tokens=max_new_tokens
        )
        for place, first_logits, tokens in zip(batch, found.first_logits, found.tokens, strict=True):
            logits[place] = log_probabilities(first_logits).cpu()
            texts[place] = replica.decode(tokens)
    return torch.stack([row for row in logits if row is not None]), texts


def _outcome(
    replica: "Replica",
    asked: Sequence[ClaimQuestion],
    log_probabilities: "Tensor",
    reference: "Tensor",
    texts: Sequence[str],
    tensors: "Mapping[str, np.ndarray]",
) -> Outcome:
    from jobs.scoring.logits import kl_divergence
    from jobs.scoring.text import parse_judgement

    if not log_probabilities.isfinite().all():
        return Outcome(
            status=Status.FAILED, reason="the steered model's logits are not finite; use a smaller dose"
        )
    letters = {letter: _letter_token(replica, letter) for letter in "AB"}
    pair = log_probabilities[:, [letters["A"], letters["B"]]].softmax(dim=-1)
    kl = kl_divergence(reference, log_probabilities).tolist()
    judged = []
    for index, question in enumerate(asked):
        p_true = float(pair[index, "AB".index(question.true_letter)])
        judgement = parse_judgement(texts[index], question.true_letter)
        judged.append(
            {
                "split": question.split,
                "label": "true" if question.claim.is_true else "false",
                "statement": question.claim.statement,
                "p_true": p_true,
                "correct": float((p_true > 0.5) == question.claim.is_true),
                "parsed": float(judgement is not None),
                "text_correct": float(judgement == question.claim.is_true),
                "kl": kl[index],
                "text": texts[index],
                "user": question.user,
            }
        )
    splits = {split: [row for row in judged if row["split"] == split] for split in ("select", "report")}
    return Outcome(
        metrics={split: _metrics(rows) for split, rows in splits.items()},
        tables={"items": _items(judged), "completions": _completions(judged)},
        tensors=tensors,
    )


def _letter_token(replica: "Replica", letter: str) -> int:
    tokens = replica.encode_continuation(letter)
    if len(tokens) != 1:
        raise SpecError(
            f"{letter!r} is {len(tokens)} tokens of this model; the choices need letters of one token"
        )
    return tokens[0]


def _metrics(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    from jobs.scoring.statistics import wilson_interval

    def mean(name: str, label: str | None = None) -> float:
        values = [row[name] for row in rows if label in (None, row["label"])]
        return sum(values) / len(values) if values else float("nan")

    interval = wilson_interval(sum(row["correct"] == 1.0 for row in rows), len(rows))
    return {
        "accuracy": mean("correct"),
        "accuracy_low": interval.low,
        "accuracy_high": interval.high,
        "beats_chance": float(interval.low > 0.5),
        "accuracy_true": mean("correct", "true"),
        "accuracy_false": mean("correct", "false"),
        "text_accuracy": mean("text_correct"),
        "unparsed": 1 - mean("parsed"),
        "p_true": mean("p_true"),
        "p_true_gap": mean("p_true", "true") - mean("p_true", "false"),
        "kl": mean("kl"),
    }


def _items(judged: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    return [
        {
            "split": row["split"],
            "item": index,
            "prompt": row["statement"],
            "name": name,
            "value": row[name],
            "label": row["label"],
        }
        for index, row in enumerate(judged)
        for name in ("p_true", "correct", "text_correct", "parsed", "kl")
    ]


def _completions(judged: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    return [
        {"split": row["split"], "item": index, "prompt": row["user"], "text": row["text"]}
        for index, row in enumerate(judged)
    ]

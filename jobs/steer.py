"""Job: steer with a direction; read the effect on what is said and the damage done.

A dose of 0 is the unsteered model: every other dose requires it and is compared with it.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from jobs import extract, steering
from jobs.data.prompts import Choice, OpenPrompt, load_choices, load_open_prompts
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
    import numpy as np

    from jobs.engine.interventions import AnyIntervention
    from jobs.engine.replica import Replica
    from jobs.reading.readout import Panel, Reading


@dataclass(frozen=True, slots=True, kw_only=True)
class Params(Steering):
    """How it is steered, and the prompts that this is read on.

    Attributes:
        pairs: Contrast pairs that the direction comes from.
        choices: Dataset of two-way choices.
        choices_select: Choices of the split select.
        choices_report: Choices of the split report.
        prompts: Dataset of open prompts.
        prompts_select: Open prompts of the split select.
        prompts_report: Open prompts of the split report.
        max_new_tokens: Most tokens of a completion.
    """

    pairs: str = "tone_pairs"
    choices: str = "tone_choices"
    choices_select: int = 40
    choices_report: int = 16
    prompts: str = "open_prompts"
    prompts_select: int = 6
    prompts_report: int = 2
    max_new_tokens: int = 20

    def __post_init__(self) -> None:
        self.check_steering()
        for name in (
            "choices_select",
            "choices_report",
            "prompts_select",
            "prompts_report",
            "max_new_tokens",
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}; it takes 1 or more")


METRICS = {
    "log_odds": Metric("nats", "mean log-odds of the positive over the negative continuation"),
    "effect": Metric("nats", "shift of log_odds from unsteered, towards the side that is steered to"),
    "effect_low": Metric("nats", "lower end of its 95 % bootstrap interval over choices, paired"),
    "effect_high": Metric("nats", "upper end of its 95 % bootstrap interval over choices, paired"),
    "kl": Metric("nats", "mean KL(unsteered || steered) of the next token after each choice"),
    "nll": Metric("nats/token", "mean negative log-likelihood of the completions under the unsteered model"),
    "repetition": Metric("share", "mean share of repeated trigrams in the completions"),
    "empty": Metric("share", "completions without a token"),
    "damage": Metric(
        "nats/token", "rises of nll, repetition and empty over unsteered, each at least 0, added"
    ),
    "damage_low": Metric("nats/token", "lower end of its 95 % bootstrap interval over prompts, paired"),
    "damage_high": Metric("nats/token", "upper end of its 95 % bootstrap interval over prompts, paired"),
}
PACK_BY = (
    "choices",
    "choices_select",
    "choices_report",
    "prompts",
    "prompts_select",
    "prompts_report",
    "max_new_tokens",
)
DATA = ("pairs", "choices", "prompts", *steering.DATA)
LAYERS = ("layer", "layers")


def size(params: Params) -> Size:
    """About 20 tokens a choice; 45 and the new ones a completion, which is read twice."""
    choices = params.choices_select + params.choices_report
    prompts = params.prompts_select + params.prompts_report
    return Size(choices + prompts, 20 * choices + 2 * prompts * (45 + params.max_new_tokens))


def requires(params: Params) -> Sequence[Requirement]:
    """The directions, and the unsteered reading of the same prompts."""
    if params.is_unsteered:
        return ()
    return (directions_of(params, _extraction(params)), _unsteered(params))


def check(params: Params) -> None:
    """The pairs, the choices and the open prompts can be read. Raises SpecError if not."""
    extract.check(_extraction(params))
    _read_prompts(params)


def _read_prompts(params: Params) -> tuple[list[Choice], list[OpenPrompt]]:
    return (
        load_choices(params.choices, params.choices_select, params.choices_report),
        load_open_prompts(params.prompts, params.prompts_select, params.prompts_report),
    )


def canonical(params: Params) -> Params:
    """The unsteered model is the same work at every layer and in every direction."""
    return canonical_steering(params, shared=PACK_BY)


def _extraction(params: Params) -> extract.Params:
    return extraction_of(params, pairs=params.pairs)


def _unsteered(params: Params) -> Requirement:
    return Requirement(job=__name__, params=without_steering(params, shared=PACK_BY))


def run(replica: "Replica", rows: Sequence[Row], context: Context) -> Iterator[tuple[int, Outcome]]:
    """Steer every row of the pack in shared batches and yield its reading.

    The outcome of a dose of 0 carries what others are compared with: `log_probabilities`
    (choices, vocabulary), float32 or wider, and for each split the scores that `jobs.reading.effects`
    compares, one a choice or reply, as `SPLIT.SCORE`.
    """
    import torch

    from jobs.engine.tables import row_tables

    panel = _panel(replica, rows[0].params)
    changes = [interventions(context, row.params, _extraction(row.params)) for row in rows]
    steered = [row.params for row in rows if not row.params.is_unsteered]
    before = context.artifact(_unsteered(steered[0])) if steered else None
    reference = torch.tensor(before["log_probabilities"]) if before is not None else panel.unsteered()
    for index, reading in panel.read(row_tables(replica, changes), reference):
        params = rows[index].params
        if reading.flaw is not None:
            yield index, Outcome(status=Status.FAILED, reason=reading.flaw)
        elif params.is_unsteered or before is None:
            yield index, _unsteered_outcome(panel, reading, reference.numpy())
        else:
            yield index, _steered_outcome(panel, reading, rows[index], changes[index], before)


def _panel(replica: "Replica", params: Params) -> "Panel":
    from jobs.reading.readout import Panel

    shared = tuple(getattr(params, name) for name in PACK_BY)
    data = tuple(data_hash(name) for name in (params.choices, params.prompts))
    return replica.keep(
        (__name__, shared, data),
        lambda: Panel(replica, *_read_prompts(params), max_new_tokens=params.max_new_tokens),
    )


def _unsteered_outcome(panel: "Panel", reading: "Reading", log_probabilities: "np.ndarray") -> Outcome:
    from jobs.reading.effects import COMPARED
    from jobs.reading.readout import read_tables, split_means, split_scores

    scores = split_scores(panel, reading)
    nothing = {f"{name}{end}": 0.0 for name in ("effect", "damage") for end in ("", "_low", "_high")}
    return Outcome(
        metrics={split: {**means, **nothing} for split, means in split_means(scores).items()},
        tables=read_tables(panel, reading),
        tensors={
            "log_probabilities": log_probabilities,
            **{f"{split}.{name}": scores[split][name] for split in scores for name in COMPARED},
        },
    )


def _steered_outcome(
    panel: "Panel",
    reading: "Reading",
    row: Row,
    changes: "Sequence[AnyIntervention]",
    before: Mapping[str, "np.ndarray"],
) -> Outcome:
    from jobs.reading.effects import COMPARED, damage, effect
    from jobs.reading.readout import read_tables, split_means, split_scores

    scores = split_scores(panel, reading)
    metrics = split_means(scores)
    for split, found in metrics.items():
        was = {name: before[f"{split}.{name}"] for name in COMPARED}
        sign = row.params.sign
        found |= effect(sign * scores[split]["log_odds"], sign * was["log_odds"], row.seed)
        found |= damage(scores[split], was, row.seed)
    return Outcome(metrics=metrics, tables={**read_tables(panel, reading), "vectors": vector_rows(changes)})

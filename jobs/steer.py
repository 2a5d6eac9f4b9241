"""Job: add a direction at one layer and dose; read the effect on what is said and the damage done.

A dose of 0 is the unsteered model: every other dose requires it and is compared with it.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from jobs import extract
from jobs.data.prompts import Choice, OpenPrompt, load_choices, load_open_prompts
from jobs.resolve import data_hash
from jobs.spec import Context, Metric, Outcome, Requirement, Row, Size, Status

if TYPE_CHECKING:
    import numpy as np

    from jobs.engine.interventions import Add
    from jobs.engine.replica import Replica
    from jobs.readout import Panel, Reading


@dataclass(frozen=True, slots=True, kw_only=True)
class Params:
    """A direction, where and how strongly it is added, and the prompts it is read on.

    Attributes:
        layer: Block whose output is steered, counted from 0.
        dose: Strength relative to the mean residual norm at that layer; negative steers backwards.
        pairs: Contrast pairs that the direction comes from.
        direction: How it is extracted; the methods of `jobs.extract`.
        component: Principal component, counted from 0; ignored by other methods.
        choices: Dataset of two-way choices.
        choices_select: Choices of the split select.
        choices_report: Choices of the split report.
        prompts: Dataset of open prompts.
        prompts_select: Open prompts of the split select.
        prompts_report: Open prompts of the split report.
        max_new_tokens: Most tokens of a completion.
    """

    layer: int
    dose: float
    pairs: str = "tone_pairs"
    direction: extract.MethodName = "mean_difference"
    component: int = 0
    choices: str = "tone_choices"
    choices_select: int = 40
    choices_report: int = 16
    prompts: str = "open_prompts"
    prompts_select: int = 6
    prompts_report: int = 2
    max_new_tokens: int = 20

    def __post_init__(self) -> None:
        if self.layer < 0:
            raise ValueError(f"layer={self.layer}; layers are counted from 0")
        if self.component < 0:
            raise ValueError(f"component={self.component}; components are counted from 0")
        if not math.isfinite(self.dose):
            raise ValueError(f"dose={self.dose}; it takes a finite number of residual norms")
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
    "effect": Metric("nats", "shift of log_odds from unsteered, counted in the direction of the dose's sign"),
    "kl": Metric("nats", "mean KL(unsteered || steered) of the next token after each choice"),
    "nll": Metric("nats/token", "mean negative log-likelihood of the completions under the unsteered model"),
    "repetition": Metric("share", "mean share of repeated trigrams in the completions"),
    "empty": Metric("share", "completions without a token"),
    "damage": Metric(
        "nats/token", "rises of nll, repetition and empty over unsteered, each at least 0, added"
    ),
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
DATA = ("pairs", "choices", "prompts")
LAYERS = ("layer",)
_COMPARED = ("log_odds", "nll", "repetition", "empty")


def size(params: Params) -> Size:
    """About 20 tokens a choice; 45 and the new ones a completion, which is read twice."""
    choices = params.choices_select + params.choices_report
    prompts = params.prompts_select + params.prompts_report
    return Size(choices + prompts, 20 * choices + 2 * prompts * (45 + params.max_new_tokens))


def requires(params: Params) -> Sequence[Requirement]:
    """The direction, and the unsteered reading of the same prompts."""
    if params.dose == 0:
        return ()
    return (Requirement(job="jobs.extract", params=_extraction(params)), _unsteered(params))


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
    """A dose of 0 is the same work at every layer and in every direction."""
    if params.dose == 0:
        blank = Params(layer=0, dose=0.0)
        return replace(blank, **{name: getattr(params, name) for name in PACK_BY})
    return params if params.direction in extract.PRINCIPAL else replace(params, component=0)


def _extraction(params: Params) -> extract.Params:
    wanted = extract.Params(pairs=params.pairs, method=params.direction, component=params.component)
    return extract.canonical(wanted)


def _unsteered(params: Params) -> Requirement:
    return Requirement(job=__name__, params=canonical(replace(params, dose=0.0)))


def run(replica: "Replica", rows: Sequence[Row], context: Context) -> Iterator[tuple[int, Outcome]]:
    """Steer every row of the pack in shared batches and yield its reading.

    The outcome of a dose of 0 carries what others are compared with: `log_probabilities`
    (choices, vocabulary), float32 or wider, and for each split the means named in `_COMPARED`.
    """
    import torch

    from jobs.engine.tables import row_tables

    panel = _panel(replica, rows[0].params)
    steered = [index for index, row in enumerate(rows) if row.params.dose != 0]
    additions = {index: _addition(context, rows[index].params) for index in steered}
    tables = row_tables(
        replica, [[additions[index]] if index in additions else [] for index in range(len(rows))]
    )
    before = context.artifact(_unsteered(rows[steered[0]].params)) if steered else None
    reference = torch.tensor(before["log_probabilities"]) if before is not None else panel.unsteered()
    for index, reading in panel.read(tables, reference):
        if index in additions and before is not None:
            yield index, _steered_outcome(panel, reading, rows[index].params, additions[index], before)
        else:
            yield index, _unsteered_outcome(panel, reading, reference.numpy())


def _panel(replica: "Replica", params: Params) -> "Panel":
    from jobs.readout import Panel

    shared = tuple(getattr(params, name) for name in PACK_BY)
    data = tuple(data_hash(name) for name in (params.choices, params.prompts))
    return replica.keep(
        (__name__, shared, data),
        lambda: Panel(replica, *_read_prompts(params), max_new_tokens=params.max_new_tokens),
    )


def _addition(context: Context, params: Params) -> "Add":
    from jobs.engine.interventions import Add

    direction, multiplier = extract.load_direction(context, _extraction(params), params.layer, params.dose)
    return Add(layer=params.layer, vector=direction * multiplier)


def _unsteered_outcome(panel: "Panel", reading: "Reading", log_probabilities: "np.ndarray") -> Outcome:
    import numpy as np

    from jobs.readout import read_tables, split_means

    metrics = split_means(panel, reading)
    means = {split: np.array([found[name] for name in _COMPARED]) for split, found in metrics.items()}
    for found in metrics.values():
        found |= {"effect": 0.0, "damage": 0.0}
    return Outcome(
        metrics=metrics,
        tables=read_tables(panel, reading),
        tensors={"log_probabilities": log_probabilities, **means},
    )


def _steered_outcome(
    panel: "Panel",
    reading: "Reading",
    params: Params,
    addition: "Add",
    before: Mapping[str, "np.ndarray"],
) -> Outcome:
    import numpy as np

    from jobs.readout import read_tables, split_means

    if not reading.finite:
        return Outcome(
            status=Status.FAILED, reason="the steered model's logits are not finite; use a smaller dose"
        )
    metrics = split_means(panel, reading)
    for split, found in metrics.items():
        rise = {name: found[name] - float(was) for name, was in zip(_COMPARED, before[split], strict=True)}
        found["effect"] = float(np.sign(params.dose)) * rise["log_odds"]
        found["damage"] = sum(_rise(rise[name]) for name in ("nll", "repetition", "empty"))
    vector = {
        "name": "addition",
        "layer": addition.layer,
        "norm": float(np.linalg.norm(addition.vector)),
        "vector": addition.vector.astype(np.float32),
    }
    return Outcome(metrics=metrics, tables={**read_tables(panel, reading), "vectors": [vector]})


def _rise(difference: float) -> float:
    """At least 0, and NaN where it is not defined, which `max` would hide."""
    return 0.0 if difference <= 0 else difference

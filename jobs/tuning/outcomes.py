"""What a tuning is told by: metrics, items and curves.

N examples.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from jobs.scoring.statistics import wilson_interval
from jobs.tuning.examples import Example
from jobs.tuning.reading import Answers
from jobs.tuning.training import Curve


class Training(NamedTuple):
    """How training went.

    Attributes:
        curve: The losses.
        changed: How many matrices differ from the untuned ones.
        asked: How many were to be trained.
    """

    curve: Curve
    changed: int
    asked: int


def training_metrics(training: Training | None, window: int) -> dict[str, float]:
    """Of a training, its loss the mean of the last `window` steps; of none, which took no step."""
    if training is None:
        return {"steps": 0.0, "matrices": 0.0, "matrices_asked": 0.0}
    return {
        "loss": float(np.mean(training.curve.total[-window:])),
        "steps": float(len(training.curve.total)),
        "matrices": float(training.changed),
        "matrices_asked": float(training.asked),
    }


def curves(training: Training | None) -> dict[str, np.ndarray]:
    """As an artifact has them, float32."""
    if training is None:
        return {}
    found = {f"loss.{name}": values for name, values in training.curve.losses.items()}
    found |= {"losses": training.curve.total, "validation": training.curve.validation}
    return {name: np.array(values, dtype=np.float32) for name, values in found.items()}


def example_metrics(split: str, held: Sequence[Example], before: Answers, after: Answers) -> dict[str, float]:
    """Of the examples of a split; NaN where no example has both replies, or none is of a class."""

    def chosen(label: str | None = None) -> list[int]:
        return [
            index for index, each in enumerate(held) if each.split == split and label in (None, each.label)
        ]

    def share(answers: Answers, label: str | None = None) -> float:
        odds_N = answers.log_odds_N[chosen(label)]
        return float((odds_N > 0).mean()) if len(odds_N) and np.isfinite(odds_N).all() else math.nan

    mine = chosen()
    interval = wilson_interval(int((after.log_odds_N[mine] > 0).sum()), len(mine))
    known = math.isfinite(share(after))
    return {
        "cosine": float(after.cosines_N[mine].mean()),
        "cosine_size": float(after.sizes_N[mine].mean()),
        "cosine_before": float(before.cosines_N[mine].mean()),
        "positive": share(after),
        "positive_low": interval.low if known else math.nan,
        "positive_high": interval.high if known else math.nan,
        "positive_before": share(before),
        "positive_true": share(after, "true"),
        "positive_false": share(after, "false"),
    }


def item_rows(held: Sequence[Example], answers: Answers) -> list[dict[str, Any]]:
    """Rows of the table `items`: the cosine of each example, and its log-odds where they are known."""
    return [
        {"split": each.split, "item": index, "prompt": each.prompt, "label": each.label}
        | {"name": name, "value": float(values[index])}
        for name, values in (("cosine", answers.cosines_N), ("positive_log_odds", answers.log_odds_N))
        for index, each in enumerate(held)
        if math.isfinite(values[index])
    ]

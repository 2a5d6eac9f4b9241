"""The report's part on training: what each step of the trials that learn something found."""

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import numpy as np

from orchestrator.report.canvas import Figure, Paint, Theme, new_figure, style
from orchestrator.report.findings import Findings
from storage.artifacts import read_tensor
from storage.query import StoredSweep
from storage.store import Store

MOST_SHOWN = 8
_CURVES = {"history": "objective, mean over the set", "losses": "loss (nats/token)"}
"""Tensor of an artifact, shape (steps,) or (steps, set) -> what it holds."""


class Curve(NamedTuple):
    """A trial's value at each step, shape (steps,)."""

    trial: int
    values: np.ndarray


def read_training(sweep: StoredSweep, found: Findings) -> dict[str, tuple[str, Paint]]:
    """The figure `training` of the first trials on the front whose artifacts hold curves; empty without."""
    kept = Store(sweep.folder).artifacts()
    specs = {row["trial"]: found.trials[row["trial"]]["spec"] for row in found.front}
    artifacts = {trial: kept[spec].path for trial, spec in specs.items() if spec in kept}
    front = list(artifacts)[:MOST_SHOWN]
    for name, label in _CURVES.items():
        tensors = {trial: read_tensor(sweep.folder / artifacts[trial], name) for trial in front}
        known = {trial: values for trial, values in tensors.items() if values is not None and len(values)}
        curves = [Curve(trial, _mean(values)) for trial, values in known.items()]
        if curves := [curve for curve in curves if len(curve.values) > 1]:
            ends = "; ".join(f"trial {c.trial}: {c.values[0]:.3g} to {c.values[-1]:.3g}" for c in curves)
            alt = f"Curves of the {label} over the steps. {ends}."
            return {"training": (alt, partial(training_figure, curves, label))}
    return {}


def _mean(values: np.ndarray) -> np.ndarray:
    """Mean over the set at each step that any of it took; those that have ended stay as they were."""
    table_SK = values.reshape(len(values), -1).astype(float)
    for step in range(1, len(table_SK)):
        ended_K = np.isnan(table_SK[step])
        table_SK[step, ended_K] = table_SK[step - 1, ended_K]
    last = len(values) - np.isnan(values.reshape(len(values), -1)).all(axis=1)[::-1].argmin()
    mean_S: np.ndarray = table_SK[:last].mean(axis=1)
    return mean_S


def training_figure(curves: Sequence[Curve], label: str, theme: Theme) -> Figure:
    """A line for each trial over its steps."""
    figure = new_figure(8.8, 4.2, theme)
    axes = figure.subplots()
    style(axes, theme, x="step", y=label)
    for place, curve in enumerate(curves):
        shade = theme.accent if place == 0 else theme.muted
        axes.plot(curve.values, color=shade, lw=1.6 if place == 0 else 1.0)
        axes.annotate(
            f" {curve.trial}",
            (len(curve.values) - 1, float(curve.values[-1])),
            color=theme.ink,
            fontsize=8,
            va="center",
        )
    return figure

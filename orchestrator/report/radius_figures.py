"""The figure of norms of learned vectors, from plain numbers. Knows no sweep and no file; no pyplot state."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from matplotlib.ticker import StrMethodFormatter

from orchestrator.report.canvas import Figure, Theme, new_figure, style


class Line(NamedTuple):
    """A metric over the norms.

    Attributes:
        label: For the legend.
        values: Shape (norms,), NaN where it is not defined.
        split: `select` or `report`.
        is_learned: Whether it is of learned vectors, or else of random ones.
    """

    label: str
    values: np.ndarray
    split: str
    is_learned: bool


def radius_figure(
    radii: np.ndarray,
    panels: Mapping[str, Sequence[Line]],
    best: tuple[float, float, float],
    cusp: float,
    unit: str,
    theme: Theme,
) -> Figure:
    """Metrics below one another over the norm, with the best norm and the cusp.

    Args:
        radii: The norms, rising, above 0.
        panels: Metric -> its lines.
        best: The norm of highest diversity up to the cusp, and the ends of its interval.
        cusp: The norm of highest diversity of all completions.
        unit: Of the norms.
        theme: Colours.
    """
    figure = new_figure(8.8, 1.0 + 2.1 * len(panels), theme)
    grid = list(figure.subplots(len(panels), 1, sharex=True, squeeze=False)[:, 0])
    for axes, (name, lines) in zip(grid, panels.items(), strict=True):
        style(axes, theme, x=f"R ({unit})" if axes is grid[-1] and unit else "", y=name)
        axes.set_xscale("log")
        axes.set_xticks(radii)
        axes.minorticks_off()
        axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axes.axvspan(best[1], best[2], color=theme.accent, alpha=0.12, lw=0)
        axes.axvline(best[0], color=theme.accent, lw=1.2, label="best R, with its interval")
        axes.axvline(cusp, color=theme.ink, lw=1.2, ls=(0, (1, 2)), label="cusp")
        for line in lines:
            axes.plot(
                radii,
                line.values,
                color=theme.accent if line.is_learned else theme.muted,
                ls="-" if line.split == "select" else (0, (4, 2)),
                marker="o" if line.is_learned else "s",
                ms=4,
                lw=1.5,
                label=line.label,
            )
    handles, labels = grid[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right upper", frameon=False, labelcolor=theme.ink, fontsize=9)
    figure.align_ylabels(grid)
    return figure

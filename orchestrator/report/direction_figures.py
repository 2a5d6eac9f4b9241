"""Figures of stored directions, from plain arrays. Knows no sweep and no file; no pyplot state.

L layers, B bins, M points, P prompts, T columns.
"""

from collections.abc import Sequence

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.ticker import MaxNLocator

from orchestrator.report.canvas import Figure, Theme, colour_bar, new_figure, style

_WITHIN_SCALE = 0.98
"""Share of a heat-map's cells that the colours tell apart."""
_LAYER = "layer (block, from 0)"


def _sides(theme: Theme) -> tuple[str, str]:
    """Colours of the positive and the negative side, apart in brightness too."""
    return theme.accent, theme.muted


def layers_figure(
    separability_L: np.ndarray, auc_L: np.ndarray, cosines_LL: np.ndarray, best: int, theme: Theme
) -> Figure:
    """How well each layer's direction tells the sides apart, and how alike the layers' directions are.

    Args:
        separability_L: Share of pairs in order, of those that the direction was fitted on; NaN = none.
        auc_L: Area under the curve over pairs that it was not fitted on.
        cosines_LL: Cosine of every layer's direction with every other's.
        best: The layer that other figures show.
        theme: Colours.
    """
    figure = new_figure(11.0, 4.4, theme)
    curves, profile = figure.subplots(1, 2, width_ratios=(1.25, 1))
    style(curves, theme, x=_LAYER, y="share of pairs, or probability")
    held_out, fitted = _sides(theme)
    layers = np.arange(len(auc_L))
    curves.axhline(0.5, color=theme.muted, lw=1, ls=(0, (5, 3)), label="chance")
    curves.axvline(best, color=theme.faint, lw=5, zorder=0)
    curves.plot(layers, separability_L, color=fitted, marker="s", ms=4, lw=1.2, label="in order, fitted on")
    curves.plot(layers, auc_L, color=held_out, marker="o", ms=4, lw=1.6, label="AUC, held out")
    curves.xaxis.set_major_locator(MaxNLocator(integer=True))
    # A little above 1, so that markers there are whole.
    curves.set_ylim(
        min(0.45, *(float(np.nanmin(line)) - 0.03 for line in _known(separability_L, auc_L))), 1.03
    )
    _legend(curves, theme)
    style(profile, theme, x=_LAYER, y=_LAYER)
    mapped = _mesh(profile, cosines_LL, layers - 0.5, layers - 0.5, Normalize(-1, 1), theme)
    profile.set_aspect("equal")
    colour_bar(figure, profile, mapped, "cosine between directions", theme)
    return figure


def _known(*lines: np.ndarray) -> list[np.ndarray]:
    return [line for line in lines if np.isfinite(line).any()] or [np.array([0.5])]


def pairs_figure(
    edges_E: np.ndarray,
    counts_2B: tuple[np.ndarray, np.ndarray],
    points_M2: np.ndarray,
    is_positive_M: np.ndarray,
    shares_2: np.ndarray,
    theme: Theme,
) -> Figure:
    """One layer: both sides along its direction, and in the plane in which they vary most.

    Args:
        edges_E: Edges of the bins, residual-stream units.
        counts_2B: Texts of the positive and of the negative side in each bin.
        points_M2: Activations in the plane; NaN if they span none.
        is_positive_M: Which of them are of the positive side.
        shares_2: Share of the whole variance along each axis.
        theme: Colours.
    """
    figure = new_figure(11.0, 4.0, theme)
    along, plane = figure.subplots(1, 2)
    positive, negative = _sides(theme)
    style(along, theme, x="projection on the direction (residual-stream units)", y="texts")
    for counts, colour, side in zip(counts_2B, (positive, negative), ("positive", "negative"), strict=True):
        along.stairs(counts, edges_E, color=colour, fill=True, alpha=0.45)
        along.stairs(counts, edges_E, color=colour, lw=1.5, label=side)
    along.yaxis.set_major_locator(MaxNLocator(integer=True))
    _legend(along, theme)
    labels = [
        f"component {number} ({share:.0%} of the variance)" if np.isfinite(share) else f"component {number}"
        for number, share in enumerate(shares_2, start=1)
    ]
    style(plane, theme, x=labels[0], y=labels[1])
    for chosen, colour, marker, side in (
        (is_positive_M, positive, "o", "positive"),
        (~is_positive_M, negative, "X", "negative"),
    ):
        plane.scatter(
            *points_M2[chosen].T, s=22, color=colour, marker=marker, alpha=0.75, linewidths=0, label=side
        )
    _legend(plane, theme)
    return figure


def positions_figure(
    columns_T: np.ndarray, cosines_PLT: np.ndarray, is_positive_P: np.ndarray, theme: Theme
) -> Figure:
    """Layer by position, before and during generation: each side's mean, and their difference.

    Args:
        columns_T: -1 is the prompt's last token, 0 the first new one.
        cosines_PLT: Cosine of each token's state with its layer's direction; NaN where there is no token.
        is_positive_P: Which prompts are of the positive side.
        theme: Colours.
    """
    is_used_T = np.isfinite(cosines_PLT).any(axis=(0, 1))
    columns_T, cosines_PLT = columns_T[is_used_T], cosines_PLT[:, :, is_used_T]
    sides = [_mean(cosines_PLT[chosen]) for chosen in (is_positive_P, ~is_positive_P)]
    figure = new_figure(11.0, 4.2, theme)
    grid = figure.subplots(1, 3, sharey=True)
    _side_by_side(figure, grid[:2], columns_T, sides, ("positive", "negative"), "mean cosine", theme)
    _side_by_side(
        figure,
        grid[2:],
        columns_T,
        [sides[0] - sides[1]],
        ("positive − negative",),
        "difference of cosines",
        theme,
    )
    grid[0].set_ylabel(_LAYER, color=theme.ink, fontsize=10, labelpad=8)
    return figure


def _mean(cosines_PLT: np.ndarray) -> np.ndarray:
    """Mean over the prompts that have the token; NaN where none has."""
    known = np.isfinite(cosines_PLT)
    counts = known.sum(axis=0)
    sums = np.where(known, cosines_PLT, 0).sum(axis=0)
    means: np.ndarray = np.divide(sums, counts, out=np.full(counts.shape, np.nan), where=counts > 0)
    return means


def _side_by_side(
    figure: Figure,
    grid: Sequence[Axes],
    columns_T: np.ndarray,
    values: Sequence[np.ndarray],
    titles: Sequence[str],
    label: str,
    theme: Theme,
) -> None:
    """Panels with one scale of colours, centred at 0; a few outliers would darken all else."""
    known = np.abs(np.concatenate([each[np.isfinite(each)] for each in values]))
    widest = (float(np.quantile(known, _WITHIN_SCALE)) if len(known) else 0) or 1.0
    for axes, each, title in zip(grid, values, titles, strict=True):
        style(axes, theme, x="token (0 = first new one)", y="")
        axes.set_title(title, color=theme.ink, fontsize=10)
        layers = np.arange(len(each))
        mapped = _mesh(axes, each, columns_T - 0.5, layers - 0.5, Normalize(-widest, widest), theme)
        axes.axvline(-0.5, color=theme.ink, lw=1.2)
    colour_bar(figure, grid, mapped, label, theme)


def _mesh(
    axes: Axes, values: np.ndarray, left: np.ndarray, below: np.ndarray, norm: Normalize, theme: Theme
) -> ScalarMappable:
    """Coloured cells of width and height 1; hatched where there is no value."""
    axes.grid(visible=False)
    axes.patch.set(hatch="////", edgecolor=theme.faint, linewidth=0)
    edges = [np.append(starts, starts[-1] + 1) for starts in (left, below)]
    colours = matplotlib.colormaps[theme.diverging]
    mesh: ScalarMappable = axes.pcolormesh(
        *edges, np.ma.masked_invalid(values), cmap=colours, norm=norm, rasterized=True
    )
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(integer=True))
    return mesh


def _legend(axes: Axes, theme: Theme) -> None:
    """Over a veil, so that it can be read where it covers lines."""
    look = {"facecolor": theme.paper, "edgecolor": "none", "framealpha": 0.85, "labelcolor": theme.ink}
    axes.legend(loc="best", fontsize=9, **look)

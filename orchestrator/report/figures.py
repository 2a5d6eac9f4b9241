"""The report's figures, from plain numbers. Knows no sweep and no file; no pyplot state."""

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Colormap, ListedColormap, Normalize
from matplotlib.ticker import MaxNLocator, StrMethodFormatter
from matplotlib.transforms import Bbox

from orchestrator.report.canvas import Figure, Measure, Theme, colour_bar, new_figure, style

MOST_ROWS, MOST_COLUMNS, BINS = 48, 16, 12
"""Distinct values that a heat-map shows one by one; of more it shows `BINS` ranges."""
_MOST_IN_LEGEND = 10
_MARKERS = "osD^vPX*<>"
_MOST_LABELS = 40
_LABEL_SIDES = ((1, 1), (-1, 1), (1, -1), (-1, -1), (0, 1.4), (0, -1.4))
_LABEL_PLACES = tuple((radius * x, radius * y) for radius in (4, 10, 18) for x, y in _LABEL_SIDES)
"""Offsets of a label from its point, points; nearer ones are tried first."""


class Plot(NamedTuple):
    """One metric of the curves; every array has shape (trials,), NaN where a trial has no value.

    Attributes:
        measure: The metric.
        values: Its values.
        low: Lower ends of their intervals.
        high: Upper ends.
        unsteered: The unsteered model's value, or None.
    """

    measure: Measure
    values: np.ndarray
    low: np.ndarray
    high: np.ndarray
    unsteered: float | None


def pareto_figure(
    points: np.ndarray, on_front: np.ndarray, trials: Sequence[int], measures: Sequence[Measure], theme: Theme
) -> Figure:
    """The first objective against each other one; a single objective against the trial's number.

    Args:
        points: Shape (trials, objectives), finite.
        on_front: Boolean, shape (trials,).
        trials: Numbers of the trials.
        measures: The objectives.
        theme: Colours.
    """
    if len(measures) == 1:
        points = np.column_stack([trials, points])
        measures = [Measure("trial"), *measures]
    panels = len(measures) - 1
    figure = new_figure(max(8.8, 4.6 * panels), 5.0, theme)
    grid = figure.subplots(1, panels, squeeze=False)[0]
    for place, axes in enumerate(grid, start=1):
        style(axes, theme, x=measures[0].label, y=measures[place].label)
        axes.scatter(*points[~on_front][:, [0, place]].T, s=26, color=theme.muted, alpha=0.6, linewidths=0)
        front = points[on_front][:, [0, place]]
        if panels == 1 and measures[0].direction:
            steps = "steps-pre" if measures[0].direction == "maximize" else "steps-post"
            steps_x, steps_y = front[np.lexsort(front.T[::-1])].T
            axes.plot(steps_x, steps_y, drawstyle=steps, color=theme.accent, lw=1, alpha=0.5)
        axes.scatter(*front.T, s=46, color=theme.accent, edgecolors=theme.paper, linewidths=0.8, zorder=3)
        axes.margins(0.09)
        if measures[0].name == "trial":
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    figure.draw_without_rendering()
    figure.set_layout_engine("none")
    labels = [str(trial) for trial, kept in zip(trials, on_front, strict=True) if kept]
    for place, axes in enumerate(grid, start=1):
        _label_points(axes, points[on_front][:, [0, place]], labels, theme)
    return figure


def _label_points(axes: Axes, points: np.ndarray, labels: Sequence[str], theme: Theme) -> None:
    """Write each label near its point; one that would cover another or leave the axes is left out."""
    canvas = axes.figure.canvas
    assert isinstance(canvas, FigureCanvasAgg)
    renderer = canvas.get_renderer()  # type: ignore[no-untyped-call]
    taken = [Bbox.from_bounds(x - 6, y - 6, 12, 12) for x, y in axes.transData.transform(points)]
    stride = 1 + len(labels) // _MOST_LABELS
    for point, label in zip(points[::stride], labels[::stride], strict=True):
        for offset in _LABEL_PLACES:
            text = axes.annotate(
                label,
                (float(point[0]), float(point[1])),
                xytext=offset,
                textcoords="offset points",
                ha="center" if offset[0] == 0 else "left" if offset[0] > 0 else "right",
                va="bottom" if offset[1] > 0 else "top",
                color=theme.ink,
                fontsize=9,
            )
            box = text.get_window_extent(renderer)
            inside = axes.bbox.contains(box.x0, box.y0) and axes.bbox.contains(box.x1, box.y1)
            if inside and not any(box.overlaps(other) for other in taken):
                taken.append(box)
                break
            text.remove()


def heatmap_figure(
    x: np.ndarray, y: np.ndarray, values: np.ndarray, measures: tuple[Measure, Measure, Measure], theme: Theme
) -> Figure:
    """The mean value of the trials at each pair of parameters, printed in the cells.

    Args:
        x: First parameter, shape (trials,).
        y: Second parameter, shape (trials,); numbers or text.
        values: Shape (trials,), finite.
        measures: What x, y and the values are.
        theme: Colours.
    """
    column, column_labels = _cells(x, MOST_COLUMNS)
    row, row_labels = _cells(y, MOST_ROWS)
    shape = (len(row_labels), len(column_labels))
    sums, counts = np.zeros(shape), np.zeros(shape)
    np.add.at(sums, (row, column), values)
    np.add.at(counts, (row, column), 1)
    means = np.divide(sums, counts, out=np.full(shape, np.nan), where=counts > 0)
    figure = new_figure(max(7.0, 2.4 + 0.8 * shape[1]), max(2.8, 1.5 + 0.36 * shape[0]), theme)
    axes = figure.subplots()
    style(axes, theme, x=measures[0].label, y=measures[1].label)
    axes.grid(visible=False)
    axes.patch.set(hatch="////", edgecolor=theme.faint, linewidth=0)
    norm, colours = _colours(means, theme)
    edges = [np.arange(size + 1) - 0.5 for size in shape]
    axes.pcolormesh(edges[1], edges[0], means, cmap=colours, norm=norm, edgecolors=theme.paper, linewidth=1.5)
    axes.set_xticks(range(shape[1]), column_labels)
    axes.set_yticks(range(shape[0]), row_labels)
    _print_cells(axes, means, norm, colours)
    colour_bar(figure, axes, ScalarMappable(norm, colours), measures[2].label, theme)
    return figure


def _cells(values: np.ndarray, most: int) -> tuple[np.ndarray, list[str]]:
    """Which cell each value falls into, and the cells' labels."""
    distinct = np.unique(values)
    if values.dtype.kind == "U":
        return np.searchsorted(distinct, values), distinct.tolist()
    if len(distinct) <= most:
        return np.searchsorted(distinct, values), [_signed(f"{value:g}") for value in distinct]
    space = np.geomspace if _spans_decades(values) else np.linspace
    edges = space(distinct[0], distinct[-1], BINS + 1)
    labels = [_signed(f"{low:.3g} to\n{high:.3g}") for low, high in pairwise(edges)]
    return np.clip(np.digitize(values, edges) - 1, 0, BINS - 1), labels


def _spans_decades(values: np.ndarray) -> bool:
    """Whether a logarithmic scale suits them."""
    # Layers and other counts are read off an even scale for longer.
    factor = 50 if (values == values.round()).all() else 10
    return bool(values.min() > 0 and values.max() > factor * values.min())


def _colours(values: np.ndarray, theme: Theme) -> tuple[Normalize, Colormap]:
    """Diverging and centred at 0 where values have both signs, else from the lowest to the highest."""
    low, high = float(np.nanmin(values)), float(np.nanmax(values))
    if low < 0 < high:
        return Normalize(-max(-low, high), max(-low, high)), matplotlib.colormaps[theme.diverging]
    return Normalize(low, high if high > low else low + 1), matplotlib.colormaps[theme.sequential]


def _print_cells(axes: Axes, values: np.ndarray, norm: Normalize, colours: Colormap) -> None:
    digits = 2 if np.nanmax(np.abs(values)) < 100 else 0
    look: dict[str, Any] = {"ha": "center", "va": "center", "fontsize": 8.5}
    for (row, column), value in np.ndenumerate(values):
        if np.isfinite(value):
            red, green, blue, _ = colours(norm(value))
            ink = "#000000" if 0.299 * red + 0.587 * green + 0.114 * blue > 0.45 else "#ffffff"
            axes.text(column, row, _signed(f"{value:.{digits}f}"), color=ink, **look)


def _signed(text: str) -> str:
    return text.replace("-", "\N{MINUS SIGN}")


def curves_figure(
    x: np.ndarray,
    lines: np.ndarray | None,
    panels: Sequence[Plot],
    measures: tuple[Measure, Measure | None],
    theme: Theme,
    *,
    is_joined: bool = True,
) -> Figure:
    """Metrics below one another over the same parameter, one line for each value of another parameter.

    Points are means of the trials that share both parameters; a point of one trial shows its interval.
    Where the common parameter takes many values points are not joined.

    Args:
        x: Parameter on the common axis, shape (trials,).
        lines: Parameter that tells the lines apart, shape (trials,), numbers or text; None for a single line.
        panels: The metrics.
        measures: What x and the lines are.
        theme: Colours.
        is_joined: Whether neighbours may be joined by a line.
    """
    row, names = _cells(np.zeros(len(x)) if lines is None else lines, MOST_ROWS)
    figure = new_figure(8.8, 0.9 + 2.5 * len(panels), theme)
    grid = list(figure.subplots(len(panels), 1, sharex=True, squeeze=False)[:, 0])
    low, high = theme.range
    scale = matplotlib.colormaps[theme.sequential]
    colours = scale(np.linspace(low, high, len(names)))
    for axes, panel in zip(grid, panels, strict=True):
        style(axes, theme, x=measures[0].label if axes is grid[-1] else "", y=panel.measure.label)
        axes.margins(0.03, 0.1)
        if _spans_decades(x):
            axes.set_xscale("log")
            axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        # Highest line first, so that the legend reads as the heat-map does.
        for index, name in reversed(list(enumerate(names))):
            points = np.array(list(_means(x, panel, row == index))).reshape(-1, 4)
            axes.errorbar(
                points[:, 0],
                points[:, 1],
                yerr=points[:, 2:].T if points[:, 2:].any() else None,
                color=colours[index],
                marker=_MARKERS[index % len(_MARKERS)] if len(names) <= _MOST_IN_LEGEND else "o",
                ms=4.5,
                lw=1.5,
                ls="-" if is_joined and len(np.unique(x)) <= MOST_COLUMNS else "",
                elinewidth=0.9,
                capsize=2.5,
                label=name,
            )
        if panel.unsteered is not None:
            axes.axhline(panel.unsteered, color=theme.muted, lw=1, ls=(0, (5, 3)), label="unsteered")
    line = measures[1]
    if line is not None and len(names) <= _MOST_IN_LEGEND:
        _legend(figure, grid, line.name, theme)
    elif line is not None and lines is not None:
        norm = Normalize(float(lines.min()), float(lines.max()))
        shown = ListedColormap(scale(np.linspace(low, high, 256)))
        colour_bar(figure, grid, ScalarMappable(norm, shown), line.label, theme)
    figure.align_ylabels(grid)
    return figure


def _means(x: np.ndarray, panel: Plot, chosen: np.ndarray) -> Iterator[tuple[float, float, float, float]]:
    """From left to right: position, mean, the interval's reach below and above (0 where there is none)."""
    chosen = chosen & np.isfinite(panel.values)
    for position in np.unique(x[chosen]):
        here = chosen & (x == position)
        mean = float(panel.values[here].mean())
        reach = [mean - float(panel.low[here][0]), float(panel.high[here][0]) - mean]
        below, above = np.nan_to_num(np.maximum(reach, 0)) if here.sum() == 1 else (0.0, 0.0)
        yield float(position), mean, float(below), float(above)


def _legend(figure: Figure, grid: Sequence[Axes], title: str, theme: Theme) -> None:
    labelled = {
        name: handle for axes in grid for handle, name in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    legend = figure.legend(
        list(labelled.values()),
        list(labelled),
        loc="outside right upper",
        title=title,
        frameon=False,
        labelcolor=theme.ink,
        fontsize=9,
    )
    legend.get_title().set_color(theme.ink)

"""What the report's figures share: colours, typography, axes, PNG."""

import io
from collections.abc import Callable, Sequence
from typing import NamedTuple

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cm import ScalarMappable
from matplotlib.figure import Figure as Figure


class Theme(NamedTuple):
    """Colours of a figure, safe for colour-blind readers; the colour maps go from low to high."""

    paper: str
    ink: str
    faint: str
    muted: str
    accent: str
    diverging: str
    sequential: str
    range: tuple[float, float]


LIGHT = Theme("#ffffff", "#1d2127", "#dfe3e8", "#848c96", "#c04a00", "RdBu_r", "viridis", (0.0, 0.88))
DARK = Theme("#15181c", "#e4e7eb", "#30363d", "#8a939e", "#ff9d5c", "berlin", "viridis", (0.25, 1.0))


class Measure(NamedTuple):
    """A metric or a parameter on an axis.

    Attributes:
        name: Its name.
        unit: Its unit, or "".
        direction: `maximize`, `minimize`, or "" where neither way is better.
    """

    name: str
    unit: str = ""
    direction: str = ""

    @property
    def label(self) -> str:
        """Name, unit and the way to better; on an upright axis the arrow turns with the text."""
        text = f"{self.name} ({self.unit})" if self.unit else self.name
        if self.direction == "maximize":
            return f"{text}   better →"
        return f"← better   {text}" if self.direction == "minimize" else text


Paint = Callable[[Theme], Figure]
"""Draws a figure in a theme's colours."""


def to_png(figure: Figure) -> bytes:
    """The figure as the bytes of a PNG file."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()


def new_figure(width: float, height: float, theme: Theme) -> Figure:
    """An empty figure of a size in inches."""
    figure = Figure(figsize=(width, height), dpi=150, layout="constrained", facecolor=theme.paper)
    FigureCanvasAgg(figure)
    return figure


def style(axes: Axes, theme: Theme, *, x: str, y: str) -> None:
    """Labels, a faint grid and no frame."""
    axes.set_facecolor(theme.paper)
    axes.set_axisbelow(True)
    axes.grid(color=theme.faint, lw=0.7)
    axes.tick_params(colors=theme.ink, labelsize=9, length=0, which="both")
    axes.spines[:].set_visible(False)
    axes.set_xlabel(x, color=theme.ink, fontsize=10)
    axes.set_ylabel(y, color=theme.ink, fontsize=10, labelpad=8)


def colour_bar(
    figure: Figure, axes: Axes | Sequence[Axes], mappable: ScalarMappable, label: str, theme: Theme
) -> None:
    """A labelled scale of the colours, beside the axes."""
    bar = figure.colorbar(mappable, ax=axes, pad=0.02, fraction=0.05)
    bar.set_label(label, color=theme.ink, fontsize=9)
    bar.ax.tick_params(colors=theme.ink, labelsize=8, length=0)
    bar.outline.set_visible(False)

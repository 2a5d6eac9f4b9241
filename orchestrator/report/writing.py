"""A sweep as one HTML page that works offline, and its figures as PNG files.

Reads what is stored, at any state of the sweep; decides nothing.
"""

import base64
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from orchestrator.lineage import lineage
from orchestrator.report import figures
from orchestrator.report.canvas import DARK, LIGHT, Measure, Paint, to_png
from orchestrator.report.comparisons import compare_replies
from orchestrator.report.directions import read_section
from orchestrator.report.figures import Plot
from orchestrator.report.findings import Findings, Record, axes, others, parameter, read_findings
from orchestrator.report.page import page_template
from orchestrator.report.radius_scans import read_scans
from orchestrator.report.scatter import scatter
from orchestrator.report.training import read_training
from storage.durable import publish
from storage.query import StoredSweep, open_sweep

_CSS_PIXELS_AN_INCH = 96
MOST_LISTED = 2000
"""Trials in the page's table; a browser takes seconds for more, and the scatter has them all."""


class Image(NamedTuple):
    """A figure in both colour schemes as data URIs, what it says in words, and its size on the page."""

    light: str
    dark: str
    alt: str
    width: int
    height: int


def write_report(folder: Path) -> Path:
    """Write `report/index.html` and its PNG files into a sweep's folder, whatever state it is in.

    Returns:
        The page.

    Raises:
        SpecError: If the folder holds no sweep.
        OSError: If the disk refuses.
    """
    target = folder / "report"
    with open_sweep(folder).moment() as sweep:
        page = _page(sweep, target)
    publish(target / "index.html", page.encode())
    return target / "index.html"


def _page(sweep: StoredSweep, target: Path) -> str:
    """The page's text; its figures are written into the folder `target`."""
    found = read_findings(sweep)
    directions = read_section(sweep)
    painted = _figures(found)
    for extraction in directions.shown:
        painted |= extraction.images
    painted |= read_training(sweep, found)
    scans = read_scans(sweep, found)
    painted |= {scan.image: scan.figure for scan in scans}
    drawn = {name: _draw(target / f"{name}.png", *figure) for name, figure in painted.items()}
    for path in target.glob("*.png"):
        if path.stem not in drawn:  # of an earlier report
            path.unlink()
    return page_template().render(
        **found._asdict(),
        states=Counter(row["state"] for row in found.trials.values()),
        images=drawn,
        points=scatter(sweep, found),
        listed=_listed(found),
        axes=axes(found),
        others=others(found),
        comparisons=(comparisons := compare_replies(sweep, found)),
        made_of={
            shown.trial["trial"]: lineage(sweep, found.trials[shown.trial["trial"]]["spec"])
            for shown in comparisons
        },
        costs=_costs(sweep),
        directions=directions,
        scans=scans,
        items=_sizes(sweep, "items"),
        replies=_sizes(sweep, "completions"),
        attempts=_failed_attempts(sweep),
        elapsed=sweep.rows("SELECT max(finished) - min(started) AS seconds FROM attempts")[0]["seconds"],
    )


def _listed(found: Findings) -> dict[int, Record]:
    """The trials of the page's table: of many those of the front, then the best by the first objective."""
    if len(found.trials) <= MOST_LISTED:
        return found.trials
    [first, *_] = found.identity["objectives"]
    sign = -1 if first["direction"] == "maximize" else 1
    front = [row["trial"] for row in found.front]
    values = {trial: row["chosen"].get(first["metric"]) for trial, row in found.scored.items()}
    scored = sorted(
        (trial for trial, value in values.items() if value is not None),
        key=lambda trial: sign * values[trial],
    )
    chosen = list(dict.fromkeys([*front, *scored, *found.trials]))[:MOST_LISTED]
    return {trial: found.trials[trial] for trial in sorted(chosen)}


def _column(rows: Sequence[Mapping[str, Any]], name: str, split: str = "chosen") -> np.ndarray:
    """A metric or (with the split `params`) a parameter of every row, float64, NaN where undefined."""
    return np.array([row[split].get(name) for row in rows], dtype=float)


def _setting(rows: Sequence[Mapping[str, Any]], name: str) -> np.ndarray:
    """A parameter of every row, float64, or text where it is no number."""
    values = [row["params"].get(name) for row in rows]
    return np.array(values, dtype=str if any(isinstance(value, str) for value in values) else float)


def _figures(found: Findings) -> dict[str, tuple[str, Paint]]:
    """Name of each figure that can be drawn -> its alternative text and how to draw it."""
    objectives = [found.measures[objective["metric"]] for objective in found.identity["objectives"]]
    drawn: dict[str, tuple[str, Paint]] = {}
    scored = found.scored.values()
    # Trials that share a result would only be printed over one another.
    rows = [row for row in scored if found.trials[row["trial"]]["reused_from"] is None]
    if rows := [row for row in rows if not np.isnan([_column([row], m.name) for m in objectives]).any()]:
        drawn["pareto"] = _pareto(found, rows, objectives)
    x, y = axes(found)
    needed = [name for name in (x, y) if name]
    rows = [row for row in scored if all(row["params"][name] is not None for name in needed)]
    rows = [row for row in rows if row["chosen"].get(objectives[0].name) is not None]
    if rows and x and y:
        drawn["heatmap"] = _heatmap(rows, x, y, objectives[0])
    if rows and x:
        drawn["curves"] = _curves(found, rows, x, y)
    return drawn


def _pareto(found: Findings, rows: Sequence[Record], objectives: Sequence[Measure]) -> tuple[str, Paint]:
    points = np.column_stack([_column(rows, measure.name) for measure in objectives])
    trials = [row["trial"] for row in rows]
    front = [row["trial"] for row in found.front]
    on_front = np.isin(trials, front)
    alt = (
        f"Scatter plot of {len(rows)} results by {' and '.join(measure.name for measure in objectives)}; "
        f"highlighted: trials {', '.join(map(str, front))}. The table below has their values."
    )
    return alt, lambda theme: figures.pareto_figure(points, on_front, trials, objectives, theme)


def _heatmap(rows: Sequence[Record], x: str, y: str, measure: Measure) -> tuple[str, Paint]:
    values = _column(rows, measure.name)
    across, down = _setting(rows, x), _setting(rows, y)
    ends = [
        f"{end} {values[place]:.3g} at {y} {_shown(down[place])}, {x} {_shown(across[place])}"
        for end, place in (("highest", values.argmax()), ("lowest", values.argmin()))
    ]
    alt = f"Heat-map of {measure.name} by {y} and {x}: {'; '.join(ends)}."
    measures = (parameter(x), parameter(y), measure)
    return alt, lambda theme: figures.heatmap_figure(across, down, values, measures, theme)


def _curves(found: Findings, rows: Sequence[Record], x: str, y: str | None) -> tuple[str, Paint]:
    objectives = [objective["metric"] for objective in found.identity["objectives"]]
    harm = "damage" if "damage" in found.measures else objectives[-1]
    telling = ("diversity_all", "repetition") if "diversity_all" in found.measures else ("log_odds",)
    names = [
        name
        for name in dict.fromkeys((objectives[0], *telling, harm))
        if name in found.measures and np.isfinite(_column(rows, name)).any()
    ]
    unsteered = found.unsteered.get(found.split, {})
    ends = [[_column(rows, name + end) for end in ("_low", "_high")] for name in names]
    panels = [
        Plot(found.measures[name], _column(rows, name), low, high, unsteered.get(name))
        for name, (low, high) in zip(names, ends, strict=True)
    ]
    across, lines = _setting(rows, x), _setting(rows, y) if y else None
    alt = f"Curves of {', '.join(names)} over {x}" + (f", a colour for each {y}." if y else ".")
    measures = (parameter(x), parameter(y) if y else None)
    # A line through values that a sampler drew, or through a mixture of other parameters, would mislead.
    is_grid = lines is None or 2 * len(np.unique(across)) <= len(across)
    is_joined = is_grid and not others(found)
    return alt, lambda theme: figures.curves_figure(
        across, lines, panels, measures, theme, is_joined=is_joined
    )


def _shown(value: Any) -> str:
    return value if isinstance(value, str) else f"{value:g}"


def _draw(path: Path, alt: str, paint: Paint) -> Image:
    """Publish the light figure and return both."""
    figure = paint(LIGHT)
    light, dark = to_png(figure), to_png(paint(DARK))
    publish(path, light)
    width, height = (round(inches * _CSS_PIXELS_AN_INCH) for inches in figure.get_size_inches())
    return Image(_data_uri(light), _data_uri(dark), alt, width, height)


def _data_uri(png: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"


def _sizes(sweep: StoredSweep, table: str) -> dict[str, int]:
    """Split -> number of prompts in a table."""
    rows = sweep.rows(f"SELECT split, count(DISTINCT item) AS number FROM {table} GROUP BY split")
    return {row["split"]: row["number"] for row in sorted(rows, key=lambda row: row["split"], reverse=True)}


def _costs(sweep: StoredSweep) -> list[Record]:
    """Packs and worker seconds of each job, those spent in vain among them."""
    return sweep.rows(
        "SELECT job, count(*) AS packs, sum(seconds) AS seconds, "
        "coalesce(sum(seconds) FILTER (NOT is_ok), 0) AS in_vain FROM ("
        "SELECT job, bool_or(state = 'ok') AS is_ok, max(finished) - min(started) AS seconds "
        "FROM attempts WHERE started IS NOT NULL GROUP BY job, pack, worker, started"
        ") GROUP BY job ORDER BY seconds DESC"
    )


def _failed_attempts(sweep: StoredSweep) -> list[Record]:
    return sweep.rows(
        "SELECT state, job, reason, count(*) AS times, list(DISTINCT trial ORDER BY trial) AS trials "
        "FROM attempts WHERE state <> 'ok' GROUP BY ALL ORDER BY times DESC, job, state, reason"
    )

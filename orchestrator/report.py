"""A sweep as one HTML page that works offline, and its figures as PNG files.

Reads what is stored, at any state of the sweep; decides nothing.
"""

import base64
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from orchestrator import figures
from orchestrator.canvas import DARK, LIGHT, Figure, Measure, Theme, to_png
from orchestrator.direction_section import stored_directions
from orchestrator.figures import Plot
from orchestrator.page import page_template
from storage.durable import publish
from storage.pareto import pareto, scored_trials
from storage.query import StoredSweep, open_sweep

SHOWN_OF_FRONT = 6
_CSS_PIXELS_AN_INCH = 96
UNITS = {"dose": "mean residual norms", "layer": "block, from 0"}
"""Units of the parameters that mean the same in every job."""

Record = dict[str, Any]
Paint = Callable[[Theme], Figure]


class Image(NamedTuple):
    """A figure in both colour schemes as data URIs, what it says in words, and its size on the page."""

    light: str
    dark: str
    alt: str
    width: int
    height: int


class Comparison(NamedTuple):
    """A trial's replies beside the unsteered ones.

    Attributes:
        trial: The trial with its metrics.
        why: Why it is shown.
        replies: Pairs of rows of the table `completions`: steered, and unsteered where there is one.
    """

    trial: Record
    why: str
    replies: list[tuple[Record, Record | None]]


class Findings(NamedTuple):
    """What the page is made from.

    Attributes:
        identity: What `sweep.json` says.
        trials: Rows of the table `trials`, by number.
        scored: Completed trials with their metrics, by number; a shared result stands at each of its trials.
        front: Those of the Pareto front, one for each result, best first objective first.
        measures: Metric -> name, unit and direction, objectives first; ends of intervals left out.
        unsteered: Split -> metric -> value of the unsteered model.
    """

    identity: Mapping[str, Any]
    trials: dict[int, Record]
    scored: dict[int, Record]
    front: list[Record]
    measures: dict[str, Measure]
    unsteered: dict[str, dict[str, float]]


def write_report(folder: Path) -> Path:
    """Write `report/index.html` and its PNG files into a sweep's folder, whatever state it is in.

    Returns:
        The page.

    Raises:
        SpecError: If the folder holds no sweep.
        OSError: If the disk refuses.
    """
    sweep = open_sweep(folder)
    found = _read(sweep)
    target = folder / "report"
    directions = stored_directions(sweep)
    painted = _figures(found)
    for extraction in directions.shown:
        painted |= extraction.images
    drawn = {name: _draw(target / f"{name}.png", *figure) for name, figure in painted.items()}
    page = page_template().render(
        **found._asdict(),
        states=Counter(row["state"] for row in found.trials.values()),
        images=drawn,
        axes=_axes(found),
        others=_others(found),
        comparisons=_comparisons(sweep, found),
        directions=directions,
        items=_sizes(sweep, "items"),
        replies=_sizes(sweep, "completions"),
        attempts=_failed_attempts(sweep),
        elapsed=sweep.rows("SELECT max(finished) - min(started) AS seconds FROM attempts")[0]["seconds"],
    )
    publish(target / "index.html", page.encode())
    return target / "index.html"


def _read(sweep: StoredSweep) -> Findings:
    trials = {row["trial"]: row for row in sweep.rows("SELECT * FROM trials ORDER BY trial")}
    results = {row["trial"]: row for row in scored_trials(sweep)}
    scored = {}
    for number, row in trials.items():
        if found := results.get(row["reused_from"] if row["reused_from"] is not None else number):
            own = {name: row[name] for name in found["params"]}
            scored[number] = {**found, "trial": number, "params": own}
    # A running sweep may have gone on since the trials were read.
    front = [scored[row["trial"]] for row in pareto(sweep) if row["trial"] in scored]
    unsteered: dict[str, dict[str, float]] = {}
    for row in sweep.rows(
        f"SELECT split, name, min(value) AS value FROM metrics WHERE spec IN ({_unsteered_specs(sweep)}) "
        # Several unsteered readings (of different prompts, say) have no common value.
        "GROUP BY split, name HAVING count(DISTINCT spec) = 1 AND min(value) IS NOT NULL"
    ):
        unsteered.setdefault(row["split"], {})[row["name"]] = row["value"]
    return Findings(sweep.identity, trials, scored, front, _measures(sweep.identity), unsteered)


def _measures(identity: Mapping[str, Any]) -> dict[str, Measure]:
    directions = {objective["metric"]: objective["direction"] for objective in identity["objectives"]}
    metrics = identity["metrics"]
    ends = {f"{name}_{end}" for name in metrics for end in ("low", "high")}
    names = dict.fromkeys([*directions, *(name for name in metrics if name not in ends)])
    return {name: Measure(name, metrics[name]["unit"], directions.get(name, "")) for name in names}


def _column(rows: Sequence[Mapping[str, Any]], name: str, split: str = "select") -> np.ndarray:
    """A metric or (with the split `params`) a parameter of every row, float64, NaN where undefined."""
    return np.array([row[split].get(name) for row in rows], dtype=float)


def _distinct(found: Findings) -> dict[str, set[Any]]:
    """Parameter -> values that completed trials have."""
    params = [row["params"] for row in found.scored.values()]
    return {name: {row[name] for row in params} - {None} for name in found.identity["parameters"]}


def _others(found: Findings) -> list[str]:
    """Parameters that vary and are no axis of the figures, which show means over them."""
    return [name for name, values in _distinct(found).items() if len(values) > 1 and name not in _axes(found)]


def _axes(found: Findings) -> tuple[str | None, str | None]:
    """Parameters of the figures: the one along the x axis and the one that tells lines and rows apart."""
    distinct = _distinct(found)
    numeric = {name: values for name, values in distinct.items() if values and all(map(_is_number, values))}
    if {"layer", "dose"} <= numeric.keys():
        return "dose", "layer"
    counts = {name: len(values) for name, values in numeric.items() if len(values) > 1}
    first, second = [*sorted(counts, key=lambda name: -counts[name]), None, None][:2]
    return first, second


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _figures(found: Findings) -> dict[str, tuple[str, Paint]]:
    """Name of each figure that can be drawn -> its alternative text and how to draw it."""
    objectives = [found.measures[objective["metric"]] for objective in found.identity["objectives"]]
    drawn: dict[str, tuple[str, Paint]] = {}
    scored = found.scored.values()
    # Trials that share a result would only be printed over one another.
    rows = [row for row in scored if found.trials[row["trial"]]["reused_from"] is None]
    if rows := [row for row in rows if not np.isnan([_column([row], m.name) for m in objectives]).any()]:
        drawn["pareto"] = _pareto(found, rows, objectives)
    x, y = _axes(found)
    needed = [name for name in (x, y) if name]
    rows = [row for row in scored if all(row["params"][name] is not None for name in needed)]
    rows = [row for row in rows if row["select"].get(objectives[0].name) is not None]
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
    across, down = _column(rows, x, "params"), _column(rows, y, "params")
    ends = [
        f"{end} {values[place]:.3g} at {y} {down[place]:g}, {x} {across[place]:g}"
        for end, place in (("highest", values.argmax()), ("lowest", values.argmin()))
    ]
    alt = f"Heat-map of {measure.name} by {y} and {x}: {'; '.join(ends)}."
    measures = (_parameter(x), _parameter(y), measure)
    return alt, lambda theme: figures.heatmap_figure(across, down, values, measures, theme)


def _curves(found: Findings, rows: Sequence[Record], x: str, y: str | None) -> tuple[str, Paint]:
    objectives = [objective["metric"] for objective in found.identity["objectives"]]
    harm = "damage" if "damage" in found.measures else objectives[-1]
    names = [
        name
        for name in dict.fromkeys((objectives[0], "log_odds", harm))
        if name in found.measures and np.isfinite(_column(rows, name)).any()
    ]
    unsteered = found.unsteered.get("select", {})
    ends = [[_column(rows, name + end) for end in ("_low", "_high")] for name in names]
    panels = [
        Plot(found.measures[name], _column(rows, name), low, high, unsteered.get(name))
        for name, (low, high) in zip(names, ends, strict=True)
    ]
    across, lines = _column(rows, x, "params"), _column(rows, y, "params") if y else None
    alt = f"Curves of {', '.join(names)} over {x}" + (f", a colour for each {y}." if y else ".")
    measures = (_parameter(x), _parameter(y) if y else None)
    # A line through values that a sampler drew, or through a mixture of other parameters, would mislead.
    is_grid = lines is None or 2 * len(np.unique(across)) <= len(across)
    is_joined = is_grid and not _others(found)
    return alt, lambda theme: figures.curves_figure(
        across, lines, panels, measures, theme, is_joined=is_joined
    )


def _parameter(name: str) -> Measure:
    return Measure(name, UNITS.get(name, ""))


def _draw(path: Path, alt: str, paint: Paint) -> Image:
    """Publish the light figure and return both."""
    figure = paint(LIGHT)
    light, dark = to_png(figure), to_png(paint(DARK))
    publish(path, light)
    width, height = (round(inches * _CSS_PIXELS_AN_INCH) for inches in figure.get_size_inches())
    return Image(_data_uri(light), _data_uri(dark), alt, width, height)


def _data_uri(png: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"


def _comparisons(sweep: StoredSweep, found: Findings) -> list[Comparison]:
    """Trials along the front and the strongest doses of the best layer, with their replies."""
    chosen = _worth_reading(found)
    replies = _replies(sweep, list(chosen))
    unsteered = sweep.rows(f"SELECT * FROM completions WHERE spec IN ({_unsteered_specs(sweep)})")
    before = {(row["split"], row["prompt"]): row for row in unsteered}
    comparisons = [
        Comparison(
            found.scored[trial],
            why,
            [(row, before.get((row["split"], row["prompt"]))) for row in replies if row["trial"] == trial],
        )
        for trial, why in chosen.items()
    ]
    return [comparison for comparison in comparisons if comparison.replies]


def _unsteered_specs(sweep: StoredSweep) -> str:
    """SQL for the unsteered model's specs: the job's own prerequisites, else the trials at a dose of 0."""
    specs = f"SELECT spec FROM attempts WHERE trial IS NULL AND job = '{sweep.identity['job']}'"
    if "dose" not in sweep.identity["parameters"]:
        return specs
    return f"{specs} UNION SELECT spec FROM trials WHERE dose = 0 AND NOT EXISTS ({specs})"


def _replies(sweep: StoredSweep, trials: Sequence[int]) -> list[Record]:
    listed = ", ".join(map(str, trials)) or "NULL"
    return sweep.rows(f"SELECT * FROM completions WHERE trial IN ({listed}) ORDER BY trial, split DESC, item")


def _worth_reading(found: Findings) -> dict[int, str]:
    """Trial -> why its replies are shown; a dose of 0 says nothing new."""
    moved = [row for row in found.front if row["params"].get("dose") != 0]
    places = np.linspace(0, len(moved) - 1, min(SHOWN_OF_FRONT, len(moved))).round().astype(int)
    chosen = {moved[place]["trial"]: "on the front" for place in places}
    steered = moved or [row for row in found.scored.values() if row["params"].get("dose") != 0]
    if not steered:
        return chosen
    # Front rows stand best first, and Counter keeps that order among equals.
    [(layer, _)] = Counter(row["params"].get("layer") for row in steered).most_common(1)
    where = "" if layer is None else f" at layer {layer}"
    where += ", which has most trials on the front" if where and moved else ""
    there = [row for row in found.scored.values() if row["params"].get("layer") == layer]
    doses = [(row["params"].get("dose"), row["trial"]) for row in there]
    doses = [(dose, trial) for dose, trial in doses if _is_number(dose)]
    strongest = {"positive": max(doses, default=(0, 0)), "negative": min(doses, default=(0, 0))}
    for sign, (dose, trial) in strongest.items():
        if dose and (dose > 0) == (sign == "positive"):
            told = f"{chosen[trial]}; " if trial in chosen else ""
            chosen[trial] = f"{told}strongest {sign} dose{where}"
    return chosen


def _sizes(sweep: StoredSweep, table: str) -> dict[str, int]:
    """Split -> number of prompts in a table."""
    rows = sweep.rows(f"SELECT split, count(DISTINCT item) AS number FROM {table} GROUP BY split")
    return {row["split"]: row["number"] for row in sorted(rows, key=lambda row: row["split"], reverse=True)}


def _failed_attempts(sweep: StoredSweep) -> list[Record]:
    return sweep.rows(
        "SELECT state, job, reason, count(*) AS times, list(DISTINCT trial ORDER BY trial) AS trials "
        "FROM attempts WHERE state <> 'ok' GROUP BY ALL ORDER BY times DESC, job, state, reason"
    )

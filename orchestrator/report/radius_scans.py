"""The report's part on norms of learned vectors: what a set says at each, and which is best."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from jobs.errors import SpecError
from jobs.resolve import parse_use
from orchestrator.lineage import lineage
from orchestrator.report.canvas import Paint
from orchestrator.report.comparisons import Reply, replies_of
from orchestrator.report.findings import Findings, Record
from orchestrator.report.radius_figures import Line, radius_figure
from storage.query import StoredSweep

MOST_SHOWN = 4
METRICS = ("diversity", "diversity_all", "nll", "repetition")
_JOB = "jobs.radius_scan"


class Scan(NamedTuple):
    """One set of vectors at several norms.

    Attributes:
        trial: The trial with its metrics; `chosen` and `report` have those of `jobs.radius_scan`.
        radii: The norms.
        unit: What a norm of 1 is.
        image: Name of the figure.
        figure: Its alternative text and how to draw it.
        is_at_edge: Whether the cusp is the largest of the norms, so that it may lie beyond.
        replies: What the set says at the best norm.
    """

    trial: Record
    radii: Sequence[float]
    unit: str
    image: str
    figure: tuple[str, Paint]
    is_at_edge: bool
    replies: Sequence[Reply]


def read_scans(sweep: StoredSweep, found: Findings) -> list[Scan]:
    """The first completed scans of a sweep of `jobs.radius_scan`; none of any other sweep."""
    if found.identity["job"] != _JOB:
        return []
    shown = [*found.scored.values()][:MOST_SHOWN]
    made = [lineage(sweep, found.trials[trial["trial"]]["spec"]) for trial in shown]
    return [_scan(sweep, trial, of_trial) for trial, of_trial in zip(shown, made, strict=True) if of_trial]


def _scan(sweep: StoredSweep, trial: Record, made: Sequence[Record]) -> Scan:
    params = made[0]["params"]
    number, radii = trial["trial"], np.array(params["radii"])
    rows = sweep.rows(f"SELECT split, item, name, value FROM items WHERE trial = {number}")
    curves: dict[tuple[str, str], np.ndarray] = {}
    for row in rows:
        values = curves.setdefault((row["split"], row["name"]), np.full(len(radii), np.nan))
        values[row["item"]] = np.nan if row["value"] is None else row["value"]
    panels = {
        name: [
            Line(f"{kind}, {split}", curves[split, head + name], split=split, is_learned=not head)
            for split in ("select", "report")
            for head, kind in (("", "learned"), ("random_", "random"))
        ]
        for name in METRICS
    }
    named = trial["chosen"]
    best = tuple(named[f"best_radius{end}"] for end in ("", "_low", "_high"))
    cusp = named["cusp"]
    unit = _unit(params["learned"])
    alt = (
        f"Curves of {', '.join(METRICS)} over the norm R, of learned and of random vectors, on the splits "
        f"select and report. Marked: the best norm {best[0]:g}, from {best[1]:g} to {best[2]:g}, and the "
        f"cusp {cusp:g}."
    )
    return Scan(
        trial,
        radii.tolist(),
        unit,
        f"radii-{number}",
        (alt, lambda theme: radius_figure(radii, panels, best, cusp, unit, theme)),
        cusp == radii[-1],
        _replies(sweep, made, best[0]),
    )


def _replies(sweep: StoredSweep, made: Sequence[Record], radius: float) -> list[Reply]:
    """What a scan's set says at one of its norms."""
    sets = [row for row in made if row["params"].get("radius") == radius]
    learned = [row["spec"] for row in sets if row["params"]["optimiser"] != "none"]
    return replies_of(sweep, learned[:1])[learned[0]] if learned else []


def _unit(learned: str) -> str:
    """What a norm of 1 is, in words."""
    try:
        named = parse_use(learned).params.radius_in
    except SpecError:  # another version of the job wrote it
        return ""
    return {
        "stream": "stream units",
        "residual_norm": "mean residual norms",
        "calibrated": "calibrated norms",
    }.get(named, "")

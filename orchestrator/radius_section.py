"""The report's part on norms of learned vectors: what a set says at each, and which is best."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from jobs.errors import SpecError
from jobs.resolve import parse_use
from orchestrator.canvas import Paint
from orchestrator.findings import Findings, Record
from orchestrator.lineage import stored_specs
from orchestrator.radius_figures import Line, radius_figure
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
    """

    trial: Record
    radii: Sequence[float]
    unit: str
    image: str
    figure: tuple[str, Paint]


def read_scans(sweep: StoredSweep, found: Findings) -> list[Scan]:
    """The first completed scans of a sweep of `jobs.radius_scan`; none of any other sweep."""
    if found.identity["job"] != _JOB:
        return []
    specs = stored_specs(sweep)
    shown = [*found.scored.values()][:MOST_SHOWN]
    known = [(trial, specs.get(found.trials[trial["trial"]]["spec"])) for trial in shown]
    return [_scan(sweep, trial, spec.params) for trial, spec in known if spec is not None]


def _scan(sweep: StoredSweep, trial: Record, params: Mapping[str, Any]) -> Scan:
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
    )


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

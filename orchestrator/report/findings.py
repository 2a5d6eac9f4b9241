"""What a report is made from, read once from a sweep at any state."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from jobs.spec import UNSTEERED
from orchestrator.report.canvas import Measure
from storage.pareto import scored_trials
from storage.query import StoredSweep
from storage.uncertainty import doubted_front

Record = dict[str, Any]
UNITS = {"dose": "mean residual norms", "layer": "block, from 0"}
"""Units of the parameters that mean the same in every job."""
MOST_GROUPS, LONGEST_GROUP = 8, 30
"""Up to so many values of so many letters figures tell lines apart by a parameter that is no number."""


class Findings(NamedTuple):
    """What the page is made from.

    Attributes:
        identity: What `sweep.json` says.
        trials: Rows of the table `trials`, by number.
        scored: Completed trials with their metrics, by number; a shared result stands at each of its trials.
        front: Those of the Pareto front, one for each result, best first objective first, each with the
            `probability` that it is on the front and whether it `is_knee`.
        near: Others that are on the front in a tenth of the draws or more, likeliest first; the same keys.
        optimism: Objective -> how much better than it is the best looks for having been chosen, or None.
        measures: Metric -> name, unit and direction, objectives first; ends of intervals left out.
        control: What the trials' texts are compared with, in a word or two.
        tried: What the trials' own texts are called beside it.
        unsteered: Split -> metric -> value of the unsteered model, where that is the control.
        split: The split that trials are chosen on.
    """

    identity: Mapping[str, Any]
    trials: dict[int, Record]
    scored: dict[int, Record]
    front: list[Record]
    near: list[Record]
    optimism: Mapping[str, float | None]
    measures: dict[str, Measure]
    control: str
    tried: str
    unsteered: dict[str, dict[str, float]]
    split: str


def read_findings(sweep: StoredSweep) -> Findings:
    """Trials, metrics and the front of a sweep, which is read in one moment."""
    trials = {row["trial"]: row for row in sweep.rows("SELECT * FROM trials ORDER BY trial")}
    results = {row["trial"]: row for row in scored_trials(sweep)}
    scored = {}
    for number, row in trials.items():
        if found := results.get(row["reused_from"] if row["reused_from"] is not None else number):
            own = {name: row[name] for name in found["params"]}
            scored[number] = {**found, "trial": number, "params": own}
    doubted = doubted_front(sweep)
    front, near = (
        [
            {**scored[row["trial"]], "probability": row["probability"], "is_knee": row["is_knee"]}
            for row in doubted[place]
        ]
        for place in ("pareto", "near")
    )
    control = control_of(sweep.identity)
    unsteered = _unsteered(sweep) if control == UNSTEERED else {}
    split = next((row["split"] for row in scored.values()), "select")
    return Findings(
        identity=sweep.identity,
        trials=trials,
        scored=scored,
        front=front,
        near=near,
        optimism=doubted["optimism"],
        measures=_measures(sweep.identity),
        control=control,
        tried="steered" if control == UNSTEERED else "trial" if control else "reply",
        unsteered=unsteered,
        split=split,
    )


def control_of(identity: Mapping[str, Any]) -> str:
    """What the texts of a sweep's trials are compared with, in a word or two; empty if with nothing."""
    control: str = identity.get("control", UNSTEERED)
    return control


def _unsteered(sweep: StoredSweep) -> dict[str, dict[str, float]]:
    found: dict[str, dict[str, float]] = {}
    for row in sweep.rows(
        f"SELECT split, name, min(value) AS value FROM metrics WHERE spec IN ({unsteered_specs(sweep)}) "
        # Several unsteered readings (of different prompts, say) have no common value.
        "GROUP BY split, name HAVING count(DISTINCT spec) = 1 AND min(value) IS NOT NULL"
    ):
        found.setdefault(row["split"], {})[row["name"]] = row["value"]
    return found


def _measures(identity: Mapping[str, Any]) -> dict[str, Measure]:
    directions = {objective["metric"]: objective["direction"] for objective in identity["objectives"]}
    metrics = identity["metrics"]
    ends = {f"{name}_{end}" for name in metrics for end in ("low", "high")}
    names = dict.fromkeys([*directions, *(name for name in metrics if name not in ends)])
    return {name: Measure(name, metrics[name]["unit"], directions.get(name, "")) for name in names}


def unsteered_specs(sweep: StoredSweep) -> str:
    """SQL for the unsteered model's specs: the job's own prerequisites, else the trials at a dose of 0."""
    specs = f"SELECT spec FROM attempts WHERE trial IS NULL AND job = '{sweep.identity['job']}'"
    if "dose" not in sweep.identity["parameters"]:
        return specs
    return f"{specs} UNION SELECT spec FROM trials WHERE dose = 0 AND NOT EXISTS ({specs})"


def _distinct(found: Findings) -> dict[str, set[Any]]:
    """Parameter -> values that completed trials have."""
    params = [row["params"] for row in found.scored.values()]
    return {name: {row[name] for row in params} - {None} for name in found.identity["parameters"]}


def others(found: Findings) -> list[str]:
    """Parameters that vary and are no axis of the figures, which show means over them."""
    return [name for name, values in _distinct(found).items() if len(values) > 1 and name not in axes(found)]


def axes(found: Findings) -> tuple[str | None, str | None]:
    """Parameters of the figures: the one along the x axis and the one that tells lines and rows apart."""
    distinct = _distinct(found)
    numeric = {name: values for name, values in distinct.items() if values and all(map(is_number, values))}
    if {"layer", "dose"} <= numeric.keys():
        return "dose", "layer"
    counts = {name: len(values) for name, values in numeric.items() if len(values) > 1}
    across = sorted(counts, key=lambda name: (name != "radius", -counts[name]))
    groups = [name for name, values in distinct.items() if _are_groups(values)]
    first, second = [*across, *(groups if across else ()), None, None][:2]
    return first, second


def _are_groups(values: set[Any]) -> bool:
    """Whether a parameter has a few short words as values."""
    words = [value for value in values if isinstance(value, str) and len(value) <= LONGEST_GROUP]
    return len(words) == len(values) and 2 <= len(values) <= MOST_GROUPS


def parameter(name: str) -> Measure:
    """A parameter along an axis."""
    return Measure(name, UNITS.get(name, ""))


def is_number(value: Any) -> bool:
    """Whether a parameter's value can stand along an axis."""
    return isinstance(value, int | float) and not isinstance(value, bool)

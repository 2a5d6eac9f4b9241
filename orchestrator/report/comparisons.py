"""Which trials' replies are worth reading, and what was said instead without what they try."""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from jobs.spec import UNSTEERED
from orchestrator.report.findings import Findings, Record, control_of, is_number, unsteered_specs
from storage.query import StoredSweep
from storage.views import listed, quoted

SHOWN_OF_FRONT = 6
_Place = tuple[str, int, str]


class Reply(NamedTuple):
    """A reply of a result, a row of the table `completions`, and what stands beside it.

    Attributes:
        own: The result's.
        control: That of the result's control in the same place; None where there is none.
        unsteered: What the unsteered model says to the same prompt, where the control is something else.
    """

    own: Record
    control: Record | None
    unsteered: Record | None


class Comparison(NamedTuple):
    """A trial's replies beside those of its control.

    Attributes:
        trial: The trial with its metrics.
        why: Why it is shown.
        replies: What it says.
    """

    trial: Record
    why: str
    replies: list[Reply]


def compare_replies(sweep: StoredSweep, found: Findings) -> list[Comparison]:
    """Trials along the front and the strongest doses of the best layer, with their replies."""
    chosen = _worth_reading(found)
    specs = {trial: found.trials[trial]["spec"] for trial in chosen}
    replies = replies_of(sweep, list(specs.values()))
    return [
        Comparison(found.scored[trial], why, replies[specs[trial]])
        for trial, why in chosen.items()
        if replies[specs[trial]]
    ]


def replies_of(sweep: StoredSweep, specs: Sequence[str]) -> dict[str, list[Reply]]:
    """Spec -> what is said under it, each reply with what stands beside it."""
    made = {row["spec"]: row for row in sweep.rows(f"SELECT * FROM specs WHERE spec IN ({listed(specs)})")}
    controls, unsteered = _controls(sweep, specs, made), _unsteered(sweep, made)
    found: dict[str, list[Reply]] = {spec: [] for spec in specs}
    for row in _said(sweep, f"spec IN ({listed(specs)})"):
        usual = unsteered.get(row["spec"], {}).get((row["split"], row["prompt"]))
        found[row["spec"]].append(Reply(row, controls[row["spec"]].get(_place(row)), usual))
    return found


def _said(sweep: StoredSweep, which: str) -> list[Record]:
    """Rows of the table `completions`, once where several trials share a result."""
    return sweep.rows(
        f"SELECT DISTINCT * EXCLUDE (trial) FROM completions WHERE {which} ORDER BY spec, split DESC, item"
    )


def _controls(
    sweep: StoredSweep, specs: Sequence[str], made: Mapping[str, Record]
) -> dict[str, dict[_Place, Record]]:
    """Spec -> what is said at each place by its control.

    Where the job names no control of a spec's own, that is the unsteered model, the same for all specs.
    """
    control = control_of(sweep.identity)
    if not control:
        return {spec: {} for spec in specs}
    if control == UNSTEERED:
        places = {_place(row): row for row in _said(sweep, f"spec IN ({unsteered_specs(sweep)})")}
        return {spec: places for spec in specs}
    named = {spec: row["control"] for spec, row in made.items() if row["control"] is not None}
    said: dict[str, dict[_Place, Record]] = {}
    for row in _said(sweep, f"spec IN ({listed(named.values())})"):
        said.setdefault(row["spec"], {})[_place(row)] = row
    return {spec: said.get(named.get(spec, ""), {}) for spec in specs}


def _unsteered(sweep: StoredSweep, made: Mapping[str, Record]) -> dict[str, dict[tuple[str, str], Record]]:
    """Spec -> by split and prompt the unsteered reply, where its job requires it as such."""
    required = {spec: json.loads(row["requires"]) for spec, row in made.items()}
    needed = listed(need for needs in required.values() for need in needs)
    said: dict[str, dict[tuple[str, str], Record]] = {}
    for row in _said(sweep, f"variant = {quoted(UNSTEERED)} AND spec IN ({needed})"):
        said.setdefault(row["spec"], {})[row["split"], row["prompt"]] = row
    return {
        spec: {place: row for need in needs for place, row in said.get(need, {}).items()}
        for spec, needs in required.items()
    }


def _place(reply: Record) -> _Place:
    """What a reply shares with the one beside it."""
    return reply["split"], reply["item"], reply["prompt"]


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
    doses = [(dose, trial) for dose, trial in doses if is_number(dose)]
    strongest = {"positive": max(doses, default=(0, 0)), "negative": min(doses, default=(0, 0))}
    for sign, (dose, trial) in strongest.items():
        if dose and (dose > 0) == (sign == "positive"):
            told = f"{chosen[trial]}; " if trial in chosen else ""
            chosen[trial] = f"{told}strongest {sign} dose{where}"
    return chosen

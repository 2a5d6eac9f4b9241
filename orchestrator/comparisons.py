"""Which trials' replies are worth reading, and what was said instead without what they try."""

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from jobs.spec import UNSTEERED
from orchestrator.findings import Findings, Record, control_of, is_number, unsteered_specs
from storage.query import StoredSweep

SHOWN_OF_FRONT = 6
_Place = tuple[str, int, str]


class Comparison(NamedTuple):
    """A trial's replies beside those of its control.

    Attributes:
        trial: The trial with its metrics.
        why: Why it is shown.
        replies: Pairs of rows of the table `completions`: the trial's, and the control's where there is one.
    """

    trial: Record
    why: str
    replies: list[tuple[Record, Record | None]]


def compare_replies(sweep: StoredSweep, found: Findings) -> list[Comparison]:
    """Trials along the front and the strongest doses of the best layer, with their replies."""
    chosen = _worth_reading(found)
    replies = replies_of(sweep, list(chosen))
    return [
        Comparison(found.scored[trial], why, replies[trial])
        for trial, why in chosen.items()
        if replies[trial]
    ]


def replies_of(sweep: StoredSweep, trials: Sequence[int]) -> dict[int, list[tuple[Record, Record | None]]]:
    """Trial -> its rows of the table `completions`, each with its control's, where there is one."""
    controls = _controls(sweep, trials)
    found: dict[int, list[tuple[Record, Record | None]]] = {trial: [] for trial in trials}
    for row in _replies(sweep, trials):
        found[row["trial"]].append((row, controls[row["trial"]].get(_place(row))))
    return found


def _controls(sweep: StoredSweep, trials: Sequence[int]) -> dict[int, dict[_Place, Record]]:
    """Trial -> what is said at each place by its control.

    Where the job names no control of a trial's own, that is the unsteered model, the same for all trials.
    """
    control = control_of(sweep.identity)
    if not control:
        return {trial: {} for trial in trials}
    if control == UNSTEERED:
        listed = unsteered_specs(sweep)
        said = sweep.rows(f"SELECT * FROM completions WHERE spec IN ({listed})")
        places = {_place(row): row for row in said}
        return {trial: places for trial in trials}
    listed = ", ".join(map(str, trials)) or "NULL"
    rows = sweep.rows(f"SELECT trial, control FROM trials JOIN specs USING (spec) WHERE trial IN ({listed})")
    named = {row["trial"]: row["control"] for row in rows}
    return {trial: _said_by(sweep, named.get(trial)) for trial in trials}


def _said_by(sweep: StoredSweep, spec: str | None) -> dict[_Place, Record]:
    return {_place(row): row for row in sweep.rows(f"SELECT * FROM completions WHERE spec = '{spec}'")}


def _place(reply: Record) -> _Place:
    """What a reply shares with the one beside it."""
    return reply["split"], reply["item"], reply["prompt"]


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
    doses = [(dose, trial) for dose, trial in doses if is_number(dose)]
    strongest = {"positive": max(doses, default=(0, 0)), "negative": min(doses, default=(0, 0))}
    for sign, (dose, trial) in strongest.items():
        if dose and (dose > 0) == (sign == "positive"):
            told = f"{chosen[trial]}; " if trial in chosen else ""
            chosen[trial] = f"{told}strongest {sign} dose{where}"
    return chosen

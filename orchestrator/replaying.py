"""One trial of a sweep once more, and what came out otherwise."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jobs.spec import Spec, spec_differences
from orchestrator.lineage import ended_trial
from orchestrator.planning import Planner
from orchestrator.probe import probing
from orchestrator.reopening import load_kept
from storage.donors import Donors
from storage.query import StoredSweep, open_sweep

_RELATIVE, _ABSOLUTE = 1e-4, 1e-6
"""What rounding may change: a trial runs alone here, and ran in a pack."""


def replay(folder: Path, trial: int, *, takes_stored: bool = True) -> dict[str, Any]:
    """Run a trial again on this machine, with the code, data and weights that are here now; stores nothing.

    Args:
        folder: The sweep's folder.
        trial: Its number.
        takes_stored: Whether what it requires is taken from the sweep where that is the same work; it is
            computed again otherwise.

    Returns:
        trial; changed, what decides the result and is other now, with both values; metrics, for each metric
        and split the value then, now and their difference; texts, how many completions there were;
        other_texts, those that are other now, in full; device, where it ran; is_same, whether no text is
        other and no metric by more than rounding.

    Raises:
        SpecError: If there is no such trial, it has no result, or it fails now.
        ModelError: If the model cannot be loaded.
        OutOfMemory: If it does not fit.
    """
    sweep = open_sweep(folder)
    then, proposed = ended_trial(sweep, trial)
    file, config = load_kept(folder)
    config = config.pinned()
    planner = Planner(file.space, config)
    now = planner.spec(proposed)
    with probing(planner, config, now.model, Donors([folder] if takes_stored else [])) as probe:
        probe.prepare(now)
        probe.run([now])
        tables = {name: probe.rows(name, now) for name in ("metrics", "completions")}
    return {"trial": trial, "device": probe.device, **_drift(sweep, then, now, tables)}


def _drift(
    sweep: StoredSweep, then: Spec, now: Spec, tables: Mapping[str, Sequence[Mapping[str, Any]]]
) -> dict[str, Any]:
    metrics = _metrics(sweep, then.id, tables["metrics"])
    said = sweep.rows(f"SELECT DISTINCT * EXCLUDE (trial) FROM completions WHERE spec = '{then.id}'")
    others = _other_texts(said, tables["completions"])
    changed = spec_differences(then.to_json(), now.to_json())
    return {
        "changed": [{"name": name, "then": one, "now": other} for name, (one, other) in changed.items()],
        "metrics": metrics,
        "texts": len(said),
        "other_texts": others,
        "is_same": not others and all(each["is_same"] for each in metrics),
    }


def _metrics(sweep: StoredSweep, spec: str, rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    stored = sweep.rows(f"SELECT DISTINCT split, name, value FROM metrics WHERE spec = '{spec}'")
    then, now = ({(row["name"], row["split"]): row["value"] for row in of} for of in (stored, rows))
    found = []
    for name, split in sorted(then.keys() | now.keys()):
        one, other = then.get((name, split)), now.get((name, split))
        if one is None or other is None:
            difference, is_same = None, one is other
        else:
            difference = other - one
            is_same = math.isclose(one, other, rel_tol=_RELATIVE, abs_tol=_ABSOLUTE)
        head = {"name": name, "split": split, "then": one, "now": other}
        found.append({**head, "difference": difference, "is_same": is_same})
    return found


def _other_texts(then: Sequence[Mapping[str, Any]], now: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    before, after = ({(row["split"], row["item"]): row for row in of} for of in (then, now))
    found = []
    for place in sorted(before.keys() | after.keys()):
        rows = before.get(place), after.get(place)
        texts = [None if row is None else row["text"] for row in rows]
        if texts[0] != texts[1]:
            prompt = next(row["prompt"] for row in rows if row is not None)
            found.append(
                {"split": place[0], "item": place[1], "prompt": prompt, "then": texts[0], "now": texts[1]}
            )
    return found

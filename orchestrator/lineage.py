"""What a stored result was made of."""

import dataclasses
import json
from collections.abc import Iterable, Mapping
from typing import Any

from jobs.errors import SpecError
from jobs.spec import Spec
from storage.query import StoredSweep


def spec_row(spec: Spec, needs: Iterable[Spec] = (), control: str | None = None) -> dict[str, Any]:
    """A row of the table `specs`.

    Args:
        spec: The spec.
        needs: Those whose artifacts it takes.
        control: Id of the one whose texts its own are compared with.
    """
    return {
        "spec": spec.id,
        "job": spec.job,
        "code": spec.code,
        "params": json.dumps(dict(spec.params), ensure_ascii=False),
        "model": json.dumps(dataclasses.asdict(spec.model)),
        "data": json.dumps(dict(spec.data)),
        "seed": spec.seed,
        "requires": json.dumps(sorted(need.id for need in needs)),
        "control": control,
    }


def lineage(sweep: StoredSweep, spec: str) -> list[dict[str, Any]]:
    """What a result was made of: its own spec first, then all that it took, and what those took.

    Returns:
        Rows of the table `specs`, with their JSON read and with `artifact`: hash, path and bytes, or None.
    """
    rows = {row["spec"]: row for row in sweep.rows("SELECT * FROM specs")}
    artifacts = {row["spec"]: row for row in sweep.rows("SELECT spec, hash, path, bytes FROM artifacts")}
    found: dict[str, dict[str, Any]] = {}
    waiting = [spec]
    while waiting:
        name = waiting.pop(0)
        if name in found or name not in rows:
            continue
        read = {column: json.loads(rows[name][column]) for column in ("params", "model", "data", "requires")}
        kept = artifacts.get(name)
        artifact = None if kept is None else {key: kept[key] for key in ("hash", "path", "bytes")}
        found[name] = {**rows[name], **read, "artifact": artifact}
        waiting += read["requires"]
    return [*found.values()]


def stored_specs(sweep: StoredSweep) -> dict[str, Spec]:
    """The specs that have a result so far, by id."""
    rows = sweep.rows("SELECT * FROM specs")
    return {row["spec"]: _spec(row) for row in rows}


def ended_trial(sweep: StoredSweep, trial: int) -> tuple[Spec, dict[str, Any]]:
    """What was computed for a trial, and the parameters that it was proposed with.

    Raises:
        SpecError: If there is no such trial, or it has no result yet.
    """
    sweep.check_trial(trial)
    [row] = sweep.rows(f"SELECT spec, state, params FROM trials WHERE trial = {trial:d}")
    spec = stored_specs(sweep).get(row["spec"])
    if spec is None:
        raise SpecError(f"trial {trial} is {row['state']}; give one that has ended")
    params: dict[str, Any] = json.loads(row["params"])
    return spec, params


def _spec(row: Mapping[str, Any]) -> Spec:
    read = {name: json.loads(row[name]) for name in ("params", "model", "data")}
    return Spec.from_json({"job": row["job"], "code": row["code"], "seed": row["seed"], **read})

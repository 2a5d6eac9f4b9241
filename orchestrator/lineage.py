"""What a stored result was made of."""

import dataclasses
import json
from collections.abc import Iterable, Mapping
from typing import Any

from jobs.errors import SpecError
from jobs.spec import Spec
from storage.artifacts import Artifact
from storage.query import StoredSweep
from storage.store import Store
from storage.views import listed


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
    kept = Store(sweep.folder).artifacts()
    found: dict[str, dict[str, Any]] = {}
    waiting = [spec]
    while waiting:
        found_specs = sweep.rows(f"SELECT * FROM specs WHERE spec IN ({listed(waiting)})")
        rows = {row["spec"]: row for row in found_specs}
        for name in filter(rows.__contains__, waiting):
            read = {column: json.loads(rows[name][column]) for column in _JSON}
            found[name] = {**rows[name], **read, "artifact": _said(kept.get(name))}
        needs = (need for name in waiting if name in rows for need in found[name]["requires"])
        waiting = [need for need in dict.fromkeys(needs) if need not in found]
    return [*found.values()]


_JSON = ("params", "model", "data", "requires")


def _said(artifact: Artifact | None) -> dict[str, Any] | None:
    return artifact and {"hash": artifact.sha256, "path": artifact.path, "bytes": artifact.bytes}


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
        raise SpecError(
            f"trial {trial} {_WITHOUT_RESULT.get(row['state'], 'has not ended; give one that has')}"
        )
    params: dict[str, Any] = json.loads(row["params"])
    return spec, params


_WITHOUT_RESULT = {
    "completed": "is of an older version, which did not keep what it was made of; run its sweep again",
    "failed": "failed and has made nothing; give one that has completed",
}


def _spec(row: Mapping[str, Any]) -> Spec:
    read = {name: json.loads(row[name]) for name in ("params", "model", "data")}
    return Spec.from_json({"job": row["job"], "code": row["code"], "seed": row["seed"], **read})

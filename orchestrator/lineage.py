"""What a stored result was made of."""

import dataclasses
import json
from collections.abc import Iterable, Mapping
from typing import Any

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


def stored_specs(sweep: StoredSweep) -> dict[str, Spec]:
    """The specs that have a result so far, by id."""
    rows = sweep.rows("SELECT * FROM specs")
    return {row["spec"]: _spec(row) for row in rows}


def _spec(row: Mapping[str, Any]) -> Spec:
    read = {name: json.loads(row[name]) for name in ("params", "model", "data")}
    return Spec.from_json({"job": row["job"], "code": row["code"], "seed": row["seed"], **read})

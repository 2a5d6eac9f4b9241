"""Which directions and which learned vectors a sweep has stored."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from orchestrator.lineage import stored_specs
from storage.artifacts import Artifact, read_tensor
from storage.query import StoredSweep, open_sweep
from storage.store import Store


class Directions(NamedTuple):
    """One direction a layer, stored as an artifact.

    Attributes:
        spec: Id of the spec that made them.
        job: Import path of its job.
        params: Its parameters; None where they cannot be told any more.
        layers: Layers that have a direction; a file that it was read from may have had some only.
        hidden: Length of a direction.
        artifact: The stored arrays.
    """

    spec: str
    job: str
    params: Mapping[str, Any] | None
    layers: Sequence[int]
    hidden: int
    artifact: Artifact

    def to_json(self) -> dict[str, Any]:
        """What a user chooses by."""
        return {
            "spec": self.spec,
            "job": self.job,
            "params": self.params,
            "layers": list(self.layers),
            "hidden": self.hidden,
            "file": self.artifact.path,
        }


class LearnedSet(NamedTuple):
    """Vectors of one layer that a job has learned, stored as an artifact.

    Attributes:
        spec: Id of the spec that made them.
        job: Import path of its job.
        params: Its parameters; None where they cannot be told any more.
        layer: The block whose output they are added to.
        vectors: How many.
        norm: Their mean norm, in stream units.
        trials: Trials whose result they are; none of what other trials required.
        artifact: The stored arrays.
    """

    spec: str
    job: str
    params: Mapping[str, Any] | None
    layer: int
    vectors: int
    norm: float
    trials: Sequence[int]
    artifact: Artifact

    def to_json(self) -> dict[str, Any]:
        """What a user chooses by."""
        return {
            "spec": self.spec,
            "trials": list(self.trials),
            "job": self.job,
            "params": self.params,
            "layers": [self.layer],
            "vectors": self.vectors,
            "norm": self.norm,
            "file": self.artifact.path,
        }


def stored_directions(folder: Path) -> list[Directions]:
    """The directions that a sweep has stored so far, by spec.

    Raises:
        SpecError: If the folder holds no sweep.
        StoreError: If its tables are not what was written.
    """
    params = _params(open_sweep(folder))
    kept = _matrices(folder, "directions")
    return [
        Directions(spec, job, params.get(spec), _layers(directions_LD), directions_LD.shape[1], artifact)
        for spec, job, artifact, directions_LD in kept
    ]


def stored_sets(folder: Path) -> list[LearnedSet]:
    """The sets of learned vectors that a sweep has stored so far, by spec. Raises as `stored_directions`."""
    sweep = open_sweep(folder)
    trials: dict[str, list[int]] = {}
    for row in sweep.rows("SELECT spec, trial FROM trials ORDER BY trial"):
        trials.setdefault(row["spec"], []).append(row["trial"])
    rows = sweep.rows("SELECT spec, min(layer) AS layer FROM vectors GROUP BY spec")
    layers = {row["spec"]: row["layer"] for row in rows}
    kept = _matrices(folder, "vectors")
    params = _params(sweep)
    found = []
    for spec, job, artifact, vectors_VD in kept:
        # What was taken over from another sweep has no rows in `vectors`.
        layer = layers.get(spec, (params.get(spec) or {}).get("source"))
        if layer is not None:
            norm = float(np.linalg.norm(vectors_VD, axis=1).mean())
            told = (spec, job, params.get(spec), layer, len(vectors_VD), norm)
            found.append(LearnedSet(*told, trials.get(spec, []), artifact))
    return found


def _params(sweep: StoredSweep) -> dict[str, Mapping[str, Any]]:
    return {spec: found.params for spec, found in stored_specs(sweep).items()}


def _matrices(folder: Path, name: str) -> list[tuple[str, str, Artifact, np.ndarray]]:
    """Spec, job, artifact and matrix of all artifacts that hold one of that name, by spec."""
    rows = {row["spec"]: row for row in Store(folder).rows("artifacts")}  # the latest, if one was lost
    found = []
    for spec, row in sorted(rows.items()):
        matrix = read_tensor(folder / row["path"], name)
        if matrix is not None and matrix.ndim == 2:
            found.append((spec, row["job"], Artifact(row["hash"], row["path"], row["bytes"]), matrix))
    return found


def _layers(directions_LD: np.ndarray) -> list[int]:
    layers: list[int] = np.flatnonzero(np.isfinite(directions_LD).all(axis=1)).tolist()
    return layers

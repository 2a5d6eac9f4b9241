"""Take one of a sweep's directions or learned vectors out, as a control vector for others."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from safetensors.numpy import save

from jobs import catalog
from jobs.directions.vector_files import VECTOR_SUFFIXES, write_gguf, write_safetensors
from jobs.errors import SpecError
from jobs.spec import canonical_json
from orchestrator.stored_vectors import Directions, LearnedSet, stored_directions, stored_sets
from storage.artifacts import read_artifact
from storage.durable import publish
from storage.query import open_sweep


class Chosen(NamedTuple):
    """Which directions, or which vector of a learned set, to write where.

    Attributes:
        out: A `.safetensors` or `.gguf` file.
        spec: Beginning of the spec's id; None takes the only one there is.
        vector: Number of the vector, from 0, where the spec is a learned set's.
        architecture: Name of the model's architecture for GGUF; None reads it from the model.
        force: Whether a file that is there is replaced.
    """

    out: Path
    spec: str | None = None
    vector: int | None = None
    architecture: str | None = None
    force: bool = False


def write_control_vector(folder: Path, chosen: Chosen) -> dict[str, Any]:
    """Write one of the sweep's directions or learned vectors as a control vector.

    The file holds the residual norms that doses refer to, where they are known.

    Returns:
        file, the layers in it, and what `to_json` says of their source; of a learned vector also the
        multiplier that steers as strongly as it was learned, since files are read as directions of norm 1.

    Raises:
        SpecError: If none or several are meant, the file is there already, its suffix is none of ours, or
            it cannot be written.
        StoreError: If what is stored is gone or has changed.
    """
    if chosen.out.suffix not in VECTOR_SUFFIXES:
        raise SpecError(f"{chosen.out}: control vectors are written to {' or '.join(VECTOR_SUFFIXES)} files")
    if chosen.out.exists() and not chosen.force:
        raise SpecError(f"{chosen.out} is there already; give another name, or --force to replace it")
    source = _pick(folder, [*stored_directions(folder), *stored_sets(folder)], chosen.spec)
    arrays = read_artifact(folder, source.artifact)
    directions = _chosen(source, arrays, chosen.vector)
    norms = dict(enumerate(arrays.get("residual_norms", np.empty(0)).tolist()))
    model = open_sweep(folder).identity["model"]
    said: dict[str, Any] = {
        "model": model_name(model),
        "method": _method(source) + ("" if chosen.vector is None else f", vector {chosen.vector}"),
        "residual_norms": norms or None,
    }
    if chosen.out.suffix == ".gguf":
        hint = chosen.architecture or architecture_of(model)
        write_gguf(chosen.out, directions, model_hint=hint, skip_block_0=True, **said)
    else:
        write_safetensors(chosen.out, directions, **said)
    multiplier = {}
    if isinstance(source, LearnedSet):
        multiplier["multiplier"] = float(np.linalg.norm(directions[source.layer]))
    if chosen.out.suffix == ".gguf":
        directions.pop(0, None)
    return {**source.to_json(), **multiplier, "file": str(chosen.out), "written": sorted(directions)}


def write_front_vectors(folder: Path) -> list[Path]:
    """Write the vectors of the trials on the front to `report/vectors.safetensors`, for MLflow's pages.

    Returns:
        The file, whose tensors are named `trial.N.NAME.layer.L`; nothing if no trial there has any.

    Raises:
        SpecError: If the folder holds no sweep.
        StoreError: If the disk refuses.
    """
    with open_sweep(folder).moment() as sweep:
        rows = sweep.rows("SELECT trial, name, layer, vector FROM vectors SEMI JOIN pareto USING (trial)")
    path = folder / "report" / "vectors.safetensors"
    if not rows:
        path.unlink(missing_ok=True)
        return []
    tensors = {
        f"trial.{row['trial']}.{row['name']}.layer.{row['layer']}": np.asarray(row["vector"], np.float32)
        for row in rows
    }
    publish(path, save(tensors, {"sweep": sweep.identity["sweep"]}))
    return [path]


def _chosen(
    source: Directions | LearnedSet, arrays: Mapping[str, np.ndarray], vector: int | None
) -> dict[int, np.ndarray]:
    """Layer -> what is added there."""
    if isinstance(source, Directions):
        if vector is not None:
            raise SpecError(f"--vector {vector}: {source.spec} holds one direction a layer, no learned set")
        return {layer: arrays["directions"][layer] for layer in source.layers}
    if vector is None or not 0 <= vector < source.vectors:
        given = "no --vector" if vector is None else f"--vector {vector}"
        raise SpecError(f"{given}: {source.spec} is a learned set; it takes 0 to {source.vectors - 1}")
    return {source.layer: arrays["vectors"][vector]}


def _pick(folder: Path, found: list[Directions | LearnedSet], spec: str | None) -> Directions | LearnedSet:
    if not found:
        raise SpecError(
            f"{folder} has stored no directions and no learned vectors; jobs such as jobs.extract make them, "
            "which sweeps of jobs.steer and jobs.generate require, and jobs such as jobs.melbo"
        )
    fitting = [each for each in found if each.spec.startswith(spec or "")]
    if len(fitting) == 1:
        return fitting[0]
    listed = "; ".join(f"{each.spec} ({_method(each)})" for each in fitting or found)
    if spec is None:
        raise SpecError(f"{folder} has stored {len(found)} sets of vectors; choose one with --spec: {listed}")
    raise SpecError(f"--spec {spec!r} fits {len(fitting)} of what is stored; there are {listed}")


def _method(source: Directions | LearnedSet) -> str:
    """The job, and its parameters where they are known."""
    return source.job if source.params is None else f"{source.job} {canonical_json(dict(source.params))}"


def model_name(model: Mapping[str, Any]) -> str:
    """Name and revision; of a folder its own name, since others do not have its path, and the weights."""
    if model.get("weights"):
        return f"{Path(model['id']).name} (weights {model['weights'][:16]})"
    return f"{model['id']}@{model['revision']}" if model.get("revision") else str(model["id"])


def architecture_of(model: Mapping[str, Any]) -> str:
    """`model_type` of the model's configuration. Raises SpecError if that is not on this machine."""
    path = _config_path(model)
    try:
        found = None if path is None else json.loads(path.read_text(encoding="utf-8")).get("model_type")
    except (OSError, ValueError, AttributeError):
        found = None
    if not isinstance(found, str):
        raise SpecError(
            f"a GGUF file names the model's architecture, and the configuration of {model['id']} is not on "
            "this machine; give --architecture, such as llama"
        )
    return found


def _config_path(model: Mapping[str, Any]) -> Path | None:
    folder = catalog.folder(model["id"]) if model["id"] in catalog.ENTRIES else Path(model["id"])
    if folder.is_dir():
        return folder / "config.json"
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        found = try_to_load_from_cache(model["id"], "config.json", revision=model.get("revision"))
    except HFValidationError:
        return None
    return Path(found) if isinstance(found, str) else None

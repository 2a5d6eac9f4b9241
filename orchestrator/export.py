"""Directions that a sweep has stored: which there are, and one of them as a control vector for others."""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from safetensors import SafetensorError, safe_open

from jobs import catalog
from jobs.directions.vector_files import VECTOR_SUFFIXES, write_gguf, write_safetensors
from jobs.errors import SpecError
from jobs.resolve import load_job, make_params, make_spec
from jobs.spec import Requirement, Spec, canonical_json
from storage.artifacts import Artifact, read_artifact
from storage.ledger import read_asked
from storage.query import open_sweep
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


def stored_directions(folder: Path) -> list[Directions]:
    """The directions that a sweep has stored so far, by spec.

    Raises:
        SpecError: If the folder holds no sweep.
        StoreError: If its tables are not what was written.
    """
    open_sweep(folder)
    rows = {row["spec"]: row for row in Store(folder).rows("artifacts")}  # the latest, if one was lost
    shaped = [(row, _shape(folder / row["path"])) for row in rows.values()]
    kept = {row["spec"]: (row, shape) for row, shape in shaped if shape is not None}
    params = _params(folder, {spec: row["job"] for spec, (row, _) in kept.items()})
    return [
        Directions(
            spec, row["job"], params.get(spec), *shape, Artifact(row["hash"], row["path"], row["bytes"])
        )
        for spec, (row, shape) in sorted(kept.items())
    ]


def _shape(path: Path) -> tuple[list[int], int] | None:
    """Layers and hidden size of an artifact that holds directions; None of any other, or one that is gone."""
    try:
        with safe_open(path, framework="numpy") as file:
            if "directions" not in file.keys():  # noqa: SIM118 - the file is no mapping
                return None
            directions_LD = file.get_tensor("directions")
    except (SafetensorError, OSError):
        return None
    if directions_LD.ndim != 2:
        return None
    return np.flatnonzero(np.isfinite(directions_LD).all(axis=1)).tolist(), directions_LD.shape[1]


def _params(folder: Path, jobs: Mapping[str, str]) -> dict[str, Mapping[str, Any]]:
    """Parameters of the specs, from what the trials required; `jobs` gives each spec's job.

    A spec's id changes with the code of its job. Where it has changed since, the only requirement of a job
    still is the only spec of it.
    """
    required = list(_required(folder))
    found = {spec.id: spec.params for spec in required if spec.id in jobs}
    for job in set(jobs.values()):
        specs = [spec for spec in jobs if jobs[spec] == job]
        candidates = [spec for spec in required if spec.job == job]
        if len(specs) == len(candidates) == 1:
            found[specs[0]] = candidates[0].params
    return found


def _required(folder: Path) -> Iterator[Spec]:
    """What the trials and their requirements require, each once; what cannot be formed now is left out."""
    waiting = [asked.spec for asked in read_asked(folder)]
    seen: set[str] = set()
    while waiting:
        spec = waiting.pop()
        for need in _needs(spec):
            key = f"{need.key} {spec.seed}"
            if key not in seen:
                seen.add(key)
                try:
                    waiting.append(make_spec(need, model=spec.model, seed=spec.seed))
                except SpecError:  # a dataset is gone
                    continue
                yield waiting[-1]


def _needs(spec: Spec) -> Sequence[Requirement]:
    try:
        return load_job(spec.job).requires(make_params(spec.job, spec.params))
    except SpecError:  # another version of the job wrote it
        return ()


class Chosen(NamedTuple):
    """Which directions to write where.

    Attributes:
        out: A `.safetensors` or `.gguf` file.
        spec: Beginning of the spec's id; None takes the only one there is.
        architecture: Name of the model's architecture for GGUF; None reads it from the model.
        force: Whether a file that is there is replaced.
    """

    out: Path
    spec: str | None = None
    architecture: str | None = None
    force: bool = False


def export(folder: Path, chosen: Chosen) -> dict[str, Any]:
    """Write one of the sweep's directions as a control vector, with the residual norms that doses refer to.

    Returns:
        file, the layers in it, and what `Directions.to_json` says of their source.

    Raises:
        SpecError: If none or several are meant, the file is there already, its suffix is none of ours, or
            it cannot be written.
        StoreError: If the stored directions are gone or have changed.
    """
    if chosen.out.suffix not in VECTOR_SUFFIXES:
        raise SpecError(f"{chosen.out}: control vectors are written to {' or '.join(VECTOR_SUFFIXES)} files")
    if chosen.out.exists() and not chosen.force:
        raise SpecError(f"{chosen.out} is there already; give another name, or --force to replace it")
    source = _pick(folder, stored_directions(folder), chosen.spec)
    arrays = read_artifact(folder, source.artifact)
    directions = {layer: arrays["directions"][layer] for layer in source.layers}
    norms = dict(enumerate(arrays.get("residual_norms", np.empty(0)).tolist()))
    model = open_sweep(folder).identity["model"]
    said: dict[str, Any] = {
        "model": _model_name(model),
        "method": _method(source),
        "residual_norms": norms or None,
    }
    if chosen.out.suffix == ".gguf":
        hint = chosen.architecture or _architecture(model)
        write_gguf(chosen.out, directions, model_hint=hint, skip_block_0=True, **said)
        directions.pop(0, None)
    else:
        write_safetensors(chosen.out, directions, **said)
    return {**source.to_json(), "file": str(chosen.out), "written": sorted(directions)}


def _pick(folder: Path, found: Sequence[Directions], spec: str | None) -> Directions:
    if not found:
        raise SpecError(
            f"{folder} has stored no directions; jobs such as jobs.extract make them, which sweeps of "
            "jobs.steer and jobs.generate require"
        )
    fitting = [each for each in found if each.spec.startswith(spec or "")]
    if len(fitting) == 1:
        return fitting[0]
    listed = "; ".join(f"{each.spec} ({_method(each)})" for each in fitting or found)
    if spec is None:
        raise SpecError(f"{folder} has stored {len(found)} directions; choose one with --spec: {listed}")
    raise SpecError(f"--spec {spec!r} fits {len(fitting)} of the stored directions; there are {listed}")


def _method(source: Directions) -> str:
    """The job, and its parameters where they are known."""
    return source.job if source.params is None else f"{source.job} {canonical_json(dict(source.params))}"


def _model_name(model: Mapping[str, Any]) -> str:
    """Name and revision; of a folder its own name, since others do not have its path, and the weights."""
    if model.get("weights"):
        return f"{Path(model['id']).name} (weights {model['weights'][:16]})"
    return f"{model['id']}@{model['revision']}" if model.get("revision") else str(model["id"])


def _architecture(model: Mapping[str, Any]) -> str:
    """`model_type` of the model's configuration, if that is on this machine."""
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

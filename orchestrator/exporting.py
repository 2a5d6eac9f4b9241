"""One trial of a sweep as other programs take it: a control vector, a model, an adapter, or plain tables."""

import csv
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jobs.directions.vector_files import write_gguf, write_safetensors
from jobs.errors import SpecError
from jobs.merging import Change, LowRank, new_folder, save_delta, save_lora, save_merged
from jobs.resolve import load_job, make_params, parse_use
from jobs.spec import ModelRef, Spec, canonical_json
from orchestrator.control_vectors import architecture_of, model_name
from orchestrator.lineage import ended_trial, lineage
from storage.artifacts import Artifact, read_artifact
from storage.query import StoredSweep, open_sweep

_FILES = {"safetensors": ".safetensors", "gguf": ".gguf", "delta": ".safetensors"}
_CSV = ("metrics", "items", "completions", "scores")


class Wanted(NamedTuple):
    """What to write where.

    Attributes:
        form: One of `FORMS`.
        out: A file of that suffix for safetensors, gguf and delta; else a new folder.
        vector: Which of several vectors or adapters, from 0.
        architecture: Name of the model's architecture for GGUF; None reads it from the model.
        force: Whether a file that is there is replaced; a folder never is.
    """

    form: str
    out: Path
    vector: int | None = None
    architecture: str | None = None
    force: bool = False


class _Trial:
    """A trial in its sweep."""

    def __init__(self, sweep: StoredSweep, number: int) -> None:
        self.sweep = sweep
        self.number = number

    @cached_property
    def spec(self) -> Spec:
        """What was computed. Raises SpecError if the trial has no result."""
        return ended_trial(self.sweep, self.number)[0]


def export_trial(folder: Path, trial: int, wanted: Wanted) -> dict[str, Any]:
    """Write what a trial adds to the model or changes in it, so that it acts at strength 1 as in the trial.

    Returns:
        trial, spec, format, out, and of vectors their layers.

    Raises:
        SpecError: If there is no such trial, it has nothing that the format can say, or the file or folder is
            there already or cannot be written.
        ModelError: If the model is needed and cannot be loaded, or has no place for the change.
        StoreError: If what is stored is gone or has changed.
    """
    sweep = open_sweep(folder)
    sweep.check_trial(trial)
    suffix = _FILES.get(wanted.form, "")
    if suffix and wanted.out.suffix != suffix:
        raise SpecError(f"{wanted.out}: the format {wanted.form} is written to a {suffix} file")
    if wanted.out.exists() and not (suffix and wanted.force):
        hint = ", or --force to replace it" if suffix else ""
        raise SpecError(f"{wanted.out} is there already; give another name{hint}")
    wrote = FORMS[wanted.form](_Trial(sweep, trial), wanted)
    [row] = sweep.rows(f"SELECT spec FROM trials WHERE trial = {trial:d}")
    return {"trial": trial, "spec": row["spec"], "format": wanted.form, "out": str(wanted.out), **wrote}


def _safetensors(trial: _Trial, wanted: Wanted) -> dict[str, Any]:
    vectors = _vectors(trial, wanted.vector)
    write_safetensors(
        wanted.out, vectors, model=model_name(trial.sweep.identity["model"]), method=_said(trial)
    )
    return {"layers": sorted(vectors)}


def _gguf(trial: _Trial, wanted: Wanted) -> dict[str, Any]:
    vectors, model = _vectors(trial, wanted.vector), trial.sweep.identity["model"]
    if 0 in vectors:
        raise SpecError(
            f"trial {trial.number} steers layer 0, for which a GGUF control vector has no place; take "
            "safetensors, or hf"
        )
    hint = wanted.architecture or architecture_of(model)
    write_gguf(wanted.out, vectors, model_hint=hint, model=model_name(model), method=_said(trial))
    return {"layers": sorted(vectors)}


def _lora(trial: _Trial, wanted: Wanted) -> dict[str, Any]:
    save_lora(_base(trial), _change(trial, wanted.vector), wanted.out)
    return {}


def _delta(trial: _Trial, wanted: Wanted) -> dict[str, Any]:
    save_delta(_base(trial), _change(trial, wanted.vector), wanted.out)
    return {}


def _hf(trial: _Trial, wanted: Wanted) -> dict[str, Any]:
    save_merged(_base(trial), _change(trial, wanted.vector), wanted.out)
    return {}


def _csv(trial: _Trial, wanted: Wanted) -> dict[str, Any]:
    """A file for each of the trial's tables that has rows, in a new folder."""
    if wanted.vector is not None:
        raise SpecError(f"--vector {wanted.vector}: csv has all of the trial's rows; leave it out")
    chosen = f"WHERE trial = {trial.number:d} ORDER BY ALL"
    tables = {table: trial.sweep.rows(f"SELECT * FROM {table} {chosen}") for table in _CSV}
    tables = {table: rows for table, rows in tables.items() if rows}
    if not tables:
        raise SpecError(f"trial {trial.number} has no result yet; give one that has ended")
    with new_folder(wanted.out) as staging:
        for table, rows in tables.items():
            with (staging / f"{table}.csv").open("w", encoding="utf-8", newline="") as file:
                writer = csv.DictWriter(file, rows[0])
                writer.writeheader()
                writer.writerows(rows)
    return {"tables": sorted(tables)}


FORMS: Mapping[str, Callable[[_Trial, Wanted], dict[str, Any]]] = {
    "safetensors": _safetensors,
    "gguf": _gguf,
    "lora": _lora,
    "delta": _delta,
    "hf": _hf,
    "csv": _csv,
}


def _said(trial: _Trial) -> str:
    params = canonical_json(dict(trial.spec.params))
    if trial.spec.model.tuned:
        params += f" on weights tuned by {trial.spec.model.tuned}"
    return (
        f"trial {trial.number} of {trial.sweep.identity['sweep']}: {trial.spec.job} {params}; add it times 1"
    )


def _base(trial: _Trial) -> ModelRef:
    """The weights that the trial's own changes are made to."""
    return replace(trial.spec.model, tuned="")


def _change(trial: _Trial, vector: int | None) -> Change:
    """All that the trial changes in the model, and what its weights were tuned with before."""
    job = load_job(trial.spec.job)
    matrices: dict[str | int, LowRank | np.ndarray] = {}
    if trial.spec.model.tuned:
        matrices |= _matrices(trial, parse_use(trial.spec.model.tuned).job, None)
    if not hasattr(job, "weight_changes"):
        return Change(matrices, _vectors(trial, vector))
    if matrices:
        raise SpecError(
            f"trial {trial.number} changes weights that were tuned before; export the two one after the other"
        )
    return Change(_matrices(trial, trial.spec.job, vector), {})


def _matrices(trial: _Trial, name: str, number: int | None) -> dict[str | int, LowRank | np.ndarray]:
    """What a job that the trial is, or was made of, has made of matrices."""
    made_of = next(row for row in lineage(trial.sweep, trial.spec.id) if row["job"] == name)
    kept = made_of["artifact"]
    tensors = read_artifact(trial.sweep.folder, Artifact(kept["hash"], kept["path"], kept["bytes"]))
    job: Any = load_job(name)
    changes = job.weight_changes(make_params(name, made_of["params"]), tensors)
    number = _number(number, len(changes), f"{name} has learned")
    return {
        key: LowRank(*change) if isinstance(change, tuple) else change
        for key, change in changes[number].items()
    }


def _number(given: int | None, there: int, what: str) -> int:
    if given is None and there == 1:
        return 0
    if given is None or not 0 <= given < there:
        asked = "no --vector" if given is None else f"--vector {given}"
        raise SpecError(f"{asked}: {what} {there}; give --vector 0 to {there - 1}")
    return given


def _vectors(trial: _Trial, number: int | None) -> dict[int, np.ndarray]:
    """Layer to what is added to its output at every token. Raises SpecError if the trial does not do that."""
    rows = trial.sweep.rows(
        f"SELECT DISTINCT name, layer, vector FROM vectors WHERE trial = {trial.number:d}"
    )
    job, params = load_job(trial.spec.job), trial.spec.params
    if hasattr(job, "learned_vectors"):
        number = _number(number, job.learned_vectors(make_params(trial.spec.job, params)), "it has learned")
        rows = [row for row in rows if row["name"].endswith(f"_{number}")]
    elif number is not None:
        raise SpecError(f"--vector {number}: trial {trial.number} steers with one vector a layer")
    else:
        _check_added(trial, rows)
    return {row["layer"]: np.asarray(row["vector"], dtype=np.float32) for row in rows}


def _check_added(trial: _Trial, rows: list[dict[str, Any]]) -> None:
    params = trial.spec.params
    if not rows:
        raise SpecError(f"trial {trial.number} of {trial.spec.job} adds no vectors; take csv")
    usual = {"operation": "add", "site": "after", "tokens": "all"}
    other = {name: params[name] for name, value in usual.items() if params.get(name, value) != value}
    if other:
        raise SpecError(
            f"trial {trial.number} steers with {canonical_json(other)}; such files say only what is added to "
            "a block's output at every token"
        )

"""Commands that take directions, vectors, models and tables out of a sweep, for other programs."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from jobs.errors import SpecError
from jobs.resolve import load_job
from orchestrator.kept import Folder
from orchestrator.printing import Json, print_json, print_table, say

ExportFormat = Literal["safetensors", "gguf", "lora", "hf", "delta", "csv"]


def vectors(
    folder: Folder,
    out: Annotated[
        Path | None, typer.Option(help="Write one as a control vector: FILE.safetensors or FILE.gguf.")
    ] = None,
    spec: Annotated[str | None, typer.Option(help="Which one: the beginning of its id.")] = None,
    vector: Annotated[int | None, typer.Option(help="Which vector of a learned set, from 0.")] = None,
    architecture: Annotated[
        str | None, typer.Option(help="The model's architecture in a GGUF file; read from the model without.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace a file that is there.")] = False,
    as_json: Json = False,
) -> None:
    """List the directions and the learned vectors that a sweep has stored, or export one."""
    from orchestrator.control_vectors import Chosen, write_control_vector
    from orchestrator.stored_vectors import stored_directions, stored_sets

    if out is None and vector is not None:
        raise SpecError(f"--vector {vector}: give --out FILE, the file that it is written to")
    if out is not None:
        written = write_control_vector(folder, Chosen(out, spec, vector, architecture, force))
        if as_json:
            print_json(written)
        else:
            say(_written_line(written))
        return
    stored: dict[str, Sequence[Any]] = {
        "directions": stored_directions(folder),
        "learned": stored_sets(folder),
    }
    found = {
        kind: [each.to_json() for each in listed if each.spec.startswith(spec or "")]
        for kind, listed in stored.items()
    }
    if any(stored.values()) and not any(found.values()):
        raise SpecError(f"--spec {spec!r} fits nothing that is stored; leave it out for a list")
    if as_json:
        print_json(found)
        return
    for listed in filter(None, found.values()):
        rows = [
            {**each, "layers": _spans(each["layers"]), "params": _short(each["job"], each["params"])}
            for each in listed
        ]
        print_table(list(rows[0]), rows)
    if not any(found.values()):
        say("no directions and no learned vectors are stored")


def export(
    folder: Folder,
    trial: Annotated[int, typer.Argument(min=0, help="Number of a trial that has ended.")],
    out: Annotated[
        Path, typer.Option(help="FILE.safetensors (delta too) or FILE.gguf; for other formats a new folder.")
    ],
    form: Annotated[
        ExportFormat,
        typer.Option(
            "--format",
            help="A control vector (safetensors, gguf), a peft adapter (lora), a Hugging Face folder with "
            "the change in its weights (hf), that change alone (delta), or the trial's tables (csv).",
        ),
    ] = "safetensors",
    vector: Annotated[int | None, typer.Option(help="Which of a learned set, from 0.")] = None,
    architecture: Annotated[
        str | None, typer.Option(help="The model's architecture in a GGUF file; read from the model without.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace a file that is there.")] = False,
    as_json: Json = False,
) -> None:
    """Take a trial out, so that other programs steer as it does."""
    from orchestrator.exporting import Wanted, export_trial

    written = export_trial(folder, trial, Wanted(form, out, vector, architecture, force))
    if as_json:
        print_json(written)
        return
    layers = f", layer {_spans(written['layers'])}: add it times 1" if "layers" in written else ""
    say(f"{out}: trial {trial} as {form}{layers}")


def _spans(layers: Sequence[int]) -> str:
    """Layers in short: 0-29, or 4, 8, 12."""
    whole = len(layers) > 2 and layers[-1] - layers[0] == len(layers) - 1
    return f"{layers[0]}-{layers[-1]}" if whole else ", ".join(map(str, layers))


def _short(job: str, params: Mapping[str, Any] | None) -> str:
    """Parameters in short: those that are as by default are left out."""
    if params is None:
        return "unknown"
    try:
        fields = dataclasses.fields(load_job(job).Params)
    except SpecError:  # the job is gone
        fields = ()
    usual = {field.name: field.default for field in fields if field.default is not dataclasses.MISSING}
    plain = {name: list(value) if isinstance(value, tuple) else value for name, value in usual.items()}
    changed = {name: value for name, value in params.items() if name not in plain or value != plain[name]}
    return ", ".join(f"{name}={value}" for name, value in changed.items())


def _written_line(written: Mapping[str, Any]) -> str:
    is_cut = written["written"] != written["layers"]
    left = "; a GGUF control vector has no layer 0, which was left out" if is_cut else ""
    told = (
        f"; multiplier={written['multiplier']:g} is the norm it was learned at"
        if "multiplier" in written
        else ""
    )
    return f"{written['file']}: layers {_spans(written['written'])} of {written['spec']}{left}{told}"

"""Commands over what a sweep has kept: look at it, ask it, take directions out."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from jobs.errors import SpecError
from jobs.resolve import load_job
from orchestrator.printing import (
    FORMATS,
    Json,
    print_comparison,
    print_doubts,
    print_drift,
    print_json,
    print_pareto,
    print_table,
    print_trial,
    say,
)
from search_spaces.base import Retention

ExportFormat = Literal["safetensors", "gguf", "lora", "hf", "csv"]
Folder = Annotated[Path, typer.Argument(help="The sweep's folder, as given to `run --out`.")]


def status(folder: Folder, as_json: Json = False) -> None:
    """How many trials wait, run, have completed, were infeasible, failed; who drives it, or why it ended."""
    from storage.lock import driver
    from storage.query import open_sweep

    sweep = open_sweep(folder)
    failures = sweep.rows("SELECT trial, reason FROM trials WHERE state = 'failed' ORDER BY trial LIMIT 20")
    counts = sweep.counts()
    trials = sweep.identity.get("trials")
    ends = sweep.rows("SELECT detail FROM events WHERE kind = 'driver ended' ORDER BY time DESC LIMIT 1")
    driven_by = driver(folder)
    summary = {
        "sweep": sweep.identity["sweep"],
        "trials": trials,
        "unproposed": None if trials is None else max(0, trials - sum(counts.values())),
        **counts,
        "driver": driven_by,
        "ended": ends[0]["detail"] if ends and driven_by is None else None,
    }
    if as_json:
        print_json({**summary, "failures": failures})
        return
    for name, value in summary.items():
        say(f"{name:>10}  {'none' if value is None else value}")
    for failure in failures:
        say(f"trial {failure['trial']}: {failure['reason']}")


def show(
    folder: Folder,
    trial: Annotated[int, typer.Argument(min=0, help="Number of the trial.")],
    texts: Annotated[int, typer.Option(min=0, help="Most completions of each split.")] = 3,
    as_json: Json = False,
) -> None:
    """One trial in full: parameters, metrics with intervals, what it says, and what it was made of."""
    from orchestrator.showing import describe_trial

    found = describe_trial(folder, trial, texts=texts)
    if as_json:
        print_json(found)
    else:
        print_trial(found)


def compare(
    folder: Folder,
    first: Annotated[int, typer.Argument(min=0, help="Number of a trial.")],
    second: Annotated[int, typer.Argument(min=0, help="Number of another.")],
    texts: Annotated[int, typer.Option(min=0, help="Most completions of each split.")] = 3,
    as_json: Json = False,
) -> None:
    """Two trials side by side: parameters, metrics with the interval of their difference, and texts."""
    from orchestrator.comparing import compare_trials

    found = compare_trials(folder, first, second, texts=texts)
    if as_json:
        print_json(found)
    else:
        print_comparison(found)


def replay(
    folder: Folder,
    trial: Annotated[int, typer.Argument(min=0, help="Number of the trial.")],
    anew: Annotated[
        bool, typer.Option("--from-scratch", help="Compute again what it requires, such as its direction.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Run one trial again, and say what comes out otherwise; exit code 1 if anything does. Stores nothing."""
    from orchestrator.replaying import replay as run_again

    found = run_again(folder, trial, takes_stored=not anew)
    if as_json:
        print_json(found)
    else:
        print_drift(found)
    raise typer.Exit(0 if found["is_same"] else 1)


def files(
    folder: Folder,
    table: Annotated[str, typer.Argument(help="Name of a table, such as completions.")],
    as_json: Json = False,
) -> None:
    """Print the Parquet files that hold a table now, for readers other than `query`."""
    from storage.query import open_sweep

    paths = open_sweep(folder).paths(table)
    if as_json:
        print_json({"files": paths})
        return
    for path in paths:
        say(path)


def logs(
    folder: Folder,
    trial: Annotated[str, typer.Argument(help="Number of a trial, or the beginning of a spec's id.")],
    lines: Annotated[int, typer.Option(min=0, help="Most lines of what the worker said.")] = 20,
    as_json: Json = False,
) -> None:
    """Every try at a trial: where it ran, how it ended, its traceback, and the last lines of its worker."""
    from orchestrator.worker_logs import attempts_of

    found = attempts_of(folder, trial, lines=lines)
    if as_json:
        print_json({"attempts": found})
        return
    for each in found:
        where = " on ".join(filter(None, (each["worker"], each["host"], each["device"])))
        say(f"attempt {each['attempt']} of {each['job']} ({each['spec']}): {each['state']}")
        say(f"  {where}, {each['seconds']:.1f} s")
        for line in [*(each["reason"] or "").splitlines(), *each["lines"]]:
            say(f"  {line}")


def doctor(
    folder: Folder,
    repair: Annotated[bool, typer.Option("--repair", help="Mend what can be mended.")] = False,
    as_json: Json = False,
) -> None:
    """Compare ledger, study, tables, artifacts and MLflow of a sweep that nobody drives."""
    from orchestrator.doctor import examine

    found = examine(folder, repair=repair)
    if as_json:
        print_json(found)
    else:
        for each in found["findings"]:
            mended, examples = ", mended" if each["is_mended"] else "", "; ".join(each["examples"])
            say(f"{each['where']}: {each['what']}, {each['count']} in all{mended}: {examples}")
        say("consistent" if found["consistent"] else "not consistent; --repair mends what can be mended")
    raise typer.Exit(0 if found["consistent"] else 1)


def mirror(
    folder: Folder,
    to: Annotated[
        str | None,
        typer.Option(help="MLflow store or server; as the sweep's own configuration says without."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Write a sweep's runs to MLflow, anew or elsewhere, from its tables."""
    from orchestrator.mirroring import mirror_again

    runs = mirror_again(folder, to)
    if as_json:
        print_json({"written": runs})
    else:
        say(f"{runs} runs were missing and are there now")


def gc(
    folder: Folder,
    retention: Annotated[
        str | None,
        typer.Option(
            "--keep",
            help="Trials whose artifacts and activations stay: all, front, or the last N; as the space says.",
        ),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would go; remove nothing.")] = False,
    as_json: Json = False,
) -> None:
    """Remove artifacts and activations that no kept trial needs, and files that nobody lists."""
    from orchestrator.garbage import collect_garbage
    from orchestrator.reopening import load_kept
    from storage.lock import driving

    kept = load_kept(folder)[0].space.retention if retention is None else _retention(retention)
    with driving(folder):
        found = collect_garbage(folder, kept, is_tried=dry_run)
    if as_json:
        print_json(found)
        return
    would = "would go" if dry_run else "are gone"
    what = f"{found['artifacts']} artifacts and {found['activations']} activations"
    at_least = "at least " if dry_run else ""
    say(f"{what} of {found['results']} results {would}: {at_least}{found['bytes'] / 2**20:.1f} MiB")
    if found["activations"] and not dry_run:
        say("files of activations stay for ten minutes for their readers; `gc` after that frees the room")


def _retention(text: str) -> Retention:
    if text.isdecimal() and int(text):
        return int(text)
    if text not in ("all", "front"):
        raise SpecError(f"--keep {text}; it takes all, front, or a number of trials of 1 or more")
    return "front" if text == "front" else "all"


def pareto(folder: Folder, as_json: Json = False) -> None:
    """The trials that no other dominates, how sure that is, and the report split beside the select split."""
    from storage.query import open_sweep
    from storage.uncertainty import doubted_front

    found = doubted_front(open_sweep(folder))
    if as_json:
        print_json(found)
    else:
        print_pareto(found["pareto"])
        print_doubts(found)


def query(
    folder: Folder,
    sql: Annotated[
        str,
        typer.Argument(
            help="One SELECT over the tables, such as trials, metrics, items, completions, scores, vectors."
        ),
    ],
    output: Annotated[str, typer.Option("--format", help="table, csv or json.")] = "table",
) -> None:
    """Ask the sweep's tables in SQL (DuckDB); nothing can be changed."""
    from storage.query import open_sweep

    if output not in FORMATS:
        raise SpecError(f"--format {output!r}; it takes one of {sorted(FORMATS)}")
    table = open_sweep(folder).query(sql)
    FORMATS[output](table.column_names, table.to_pylist())


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
    out: Annotated[Path, typer.Option(help="FILE.safetensors or FILE.gguf; for other formats a new folder.")],
    form: Annotated[
        ExportFormat,
        typer.Option(
            "--format",
            help="A control vector (safetensors, gguf), a peft adapter (lora), a Hugging Face folder with "
            "the change in its weights (hf), or the trial's tables (csv).",
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


def report(folder: Folder, as_json: Json = False) -> None:
    """Write the report again: one HTML page that works offline, and its figures as PNG."""
    from orchestrator.report.writing import write_report

    path = write_report(folder)
    if as_json:
        print_json({"report": str(path)})
    else:
        say(str(path))


def ui(
    folder: Folder, port: Annotated[int, typer.Option(min=1, max=65535, help="Port on 127.0.0.1.")] = 5000
) -> None:
    """Open MLflow's UI on the sweep's store, on this machine only; stop it with Ctrl-C."""
    from storage.mlflow_ui import serve_ui
    from storage.query import open_sweep

    def announce(address: str) -> None:
        say(f"MLflow on {address} (Ctrl-C stops it)")
        # Its first page is about conversations with agents. Experiment 0 is MLflow's own, 1 the sweep's.
        say(f"this sweep's runs: {address}/#/experiments/1/runs?workflowType=machine_learning")

    open_sweep(folder)
    serve_ui(folder, port, announce)

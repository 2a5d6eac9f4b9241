"""Commands over what a sweep has kept: look at it, ask it, take directions out."""

import time
from pathlib import Path
from typing import Annotated

import typer

from jobs.errors import SpecError
from orchestrator.printing import (
    FORMATS,
    Json,
    print_comparison,
    print_doubts,
    print_drift,
    print_json,
    print_pareto,
    print_trial,
    say,
)

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
    [times] = sweep.rows("SELECT min(started) AS began, max(finished) AS last FROM attempts")
    model = sweep.identity["model"]
    summary = {
        "sweep": sweep.identity["sweep"],
        "job": sweep.identity["job"],
        "model": "@".join(filter(None, (model["id"], model.get("revision")))),
        "seed": sweep.identity.get("seed"),
        "objectives": ", ".join(f"{o['direction']} {o['metric']}" for o in sweep.identity["objectives"]),
        "began": _moment(times["began"]),
        "last result": _moment(times["last"]),
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
        say(f"{name:>11}  {'none' if value is None else value}")
    for failure in failures:
        say(f"trial {failure['trial']}: {failure['reason']}")


def _moment(seconds: float | None) -> str | None:
    return None if seconds is None else time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))


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

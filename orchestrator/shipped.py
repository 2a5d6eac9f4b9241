"""Commands over what comes with the package: its jobs, and the scorers that `score --list` shows."""

from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import typer

from jobs.errors import SpecError
from orchestrator.printing import Json, print_json, print_table, say


def list_jobs(
    name: Annotated[
        str | None, typer.Argument(help="A job, such as steer or jobs.steer; all are listed without.")
    ] = None,
    as_json: Json = False,
) -> None:
    """List the jobs, or show one: its parameters, metrics and datasets, and whether its trials pack."""
    from orchestrator.descriptions import describe_job, describe_jobs

    if as_json:
        print_json({"jobs": describe_jobs()} if name is None else describe_job(name))
    elif name is None:
        print_table(["job", "about"], describe_jobs())
        say("`steersweep jobs NAME` shows one with its parameters and metrics")
    else:
        _print_job(describe_job(name))


def _print_job(found: Mapping[str, Any]) -> None:
    say(f"{found['job']}: {found['about']}")
    print_table(["parameter", "type", "default", "about"], _field_rows("parameter", found["parameters"]))
    print_table(["metric", "unit", "meaning"], [{"metric": row["name"], **row} for row in found["metrics"]])
    say(f"datasets or files: {', '.join(found['data']) or 'none'}")
    say(_packing_line(found["pack_by"]))


def _field_rows(kind: str, fields: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Rows of a table of parameters or options; defaults as Python writes them."""
    return [
        {**row, kind: row["name"], "default": "required" if row["is_required"] else repr(row["default"])}
        for row in fields
    ]


def _packing_line(pack_by: Sequence[str] | None) -> str:
    if pack_by is None:
        return "trials do not pack: each is computed by itself"
    return f"trials pack: those that share {', '.join(pack_by) or 'nothing in particular'} run together"


def schema(
    table: Annotated[str | None, typer.Argument(help="A table; all are printed without.")] = None,
    as_json: Json = False,
) -> None:
    """Print the tables that a sweep keeps: every column with its type, unit and meaning."""
    from storage.schema import SCHEMA_VERSION, TABLES

    if table is not None and table not in TABLES:
        raise SpecError(f"no table {table!r}; there are {', '.join(TABLES)}")
    chosen = {name: columns for name, columns in TABLES.items() if table in (None, name)}
    if as_json:
        tables = {name: [column._asdict() for column in columns] for name, columns in chosen.items()}
        print_json({"version": SCHEMA_VERSION, "tables": tables})
        return
    say(f"version {SCHEMA_VERSION}")
    for name, columns in chosen.items():
        print_table(
            [name, "type", "unit", "meaning"],
            [{**column._asdict(), name: column.name, "type": column.kind} for column in columns],
        )


def list_scorers(*, as_json: bool) -> None:
    """Print every scorer of text: what it says of a text, what it needs beside it, and its options."""
    from orchestrator.descriptions import describe_scorers

    found = describe_scorers()
    if as_json:
        print_json({"scorers": found})
        return
    print_table(
        ["scorer", "value", "meaning", "needs"],
        [{**row, "value": row["unit"], "needs": ", ".join(row["needs"])} for row in found],
    )
    options = [
        {"scorer": row["scorer"], **option}
        for row in found
        for option in _field_rows("option", row["options"])
    ]
    print_table(["scorer", "option", "type", "default", "about"], options)
    say('options stand behind the name as JSON: --scorer \'contains{"sought": "sun"}\'')

"""What commands write to standard output: tables, CSV, JSON, lines."""

import json
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from jobs.spec import UNSTEERED

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text.")]


def print_pareto(found: list[dict[str, Any]]) -> None:
    """A Pareto front as a table: parameters, then objectives on the split of choice and on report, if any.

    How sure it is stands beside it: intervals of 95 %, and how often draws have a point on the front.
    """
    if not found:
        say("no completed trial yet, so no Pareto front")
        return
    has_report = found[0]["split"] == "select"
    is_doubted = any(point.get("probability", 1.0) < 1.0 for point in found)
    rows = [
        {
            "trial": f"{point['trial']} (knee)" if point.get("is_knee") else point["trial"],
            **point["params"],
            **{
                f"{name} ({point['split']})": _with_interval(value, point.get("intervals", {}).get(name))
                for name, value in point["objectives"].items()
            },
            **{f"{name} (report)": value for name, value in point["report"].items() if has_report},
            **({"on the front": point["probability"]} if is_doubted else {}),
        }
        for point in found
    ]
    print_table(list(rows[0]), rows)


def print_doubts(found: Mapping[str, Any]) -> None:
    """What `storage.uncertainty.doubted_front` says besides the front itself."""
    if found["near"]:
        say("not on the front, but in a tenth of the draws or more:")
        print_pareto(found["near"])
    for name, gained in found["optimism"].items():
        if gained is not None:
            say(
                f"{name}: chosen as the best, a trial looks about {gained:.2g} better than it is; read report"
            )


def _with_interval(value: Any, ends: Sequence[float] | None) -> str:
    return _cell(value) if ends is None else f"{_cell(value)} ({_cell(ends[0])} to {_cell(ends[1])})"


def print_reasons(reasons: list[dict[str, Any]]) -> None:
    """The most frequent reasons of trials that were infeasible or failed, each with their number."""
    for row in reasons[:_MOST_REASONS]:
        why = next(iter((row["reason"] or "no reason was stored").splitlines()))
        say(f"{row['state']}, {row['trials']} trial{'s' if row['trials'] > 1 else ''}: {why}")
    if len(reasons) > _MOST_REASONS:
        say(f"... and {len(reasons) - _MOST_REASONS} more reasons, which the report and --json show")


_MOST_REASONS = 5


def print_plan(found: Mapping[str, Any]) -> None:
    """What a sweep would take, in a few lines."""
    first = "".join(f", {number} x {job} before them" for job, number in found["prerequisites"].items())
    say(f"{found['trials']} trials in {found['packs']} packs{first}; {found['tokens']:.3g} tokens")
    workers = f"{found['workers']} workers ({found['worker_hours']:.3g} worker hours)"
    say(f"{_duration(found['hours'])} with {workers}")
    if found["trials_in_budget"] is not None:
        say(f"the budget is enough for about {found['trials_in_budget']} of them")
    memory = f"{found['weights_gib']:.2f} GiB of weights, at its most {found['peak_gib']:.2f} GiB so far"
    say(f"a worker on {found['device']}: {memory}, loaded in {found['loading_seconds']:.0f} s")
    say(f"disk: about {found['disk_gib']:.3g} GiB of {found['free_disk_gib']:.3g} GiB free")
    if found["retention"] != "all":
        last = f"the last {found['retention']} trials" if found["retention"] != "front" else "the front"
        say(f"of artifacts and activations only those of {last} stay at the end (retention)")
    for job, pace in found["measured"].items():
        say(
            f"measured: {job}, up to {pace['rows']} rows together, {pace['pack_seconds']:.3g} s a pack and "
            f"{1000 * pace['token_seconds']:.3g} s for 1000 tokens"
        )


def print_trial(found: Mapping[str, Any]) -> None:
    """What is stored of a trial: parameters, metrics, texts, and what it was made of."""
    front = ", on the Pareto front" if found["is_on_front"] else ""
    same = "" if found["reused_from"] is None else f", the same work as trial {found['reused_from']}"
    say(f"trial {found['trial']}: {found['state']}{front}{same}")
    if found["reason"]:
        say(f"  {found['reason']}")
    for name, value in found["params"].items():
        say(f"  {name} = {_cell(value)}")
    for metric in found["metrics"]:
        ends = [metric["low"], metric["high"]]
        interval = "" if None in ends else f" ({_cell(ends[0])} to {_cell(ends[1])})"
        value = "not defined" if metric["value"] is None else _cell(metric["value"])
        say(f"  {metric['name']} ({metric['split']}): {value}{interval} {metric['unit']}".rstrip())
    for each in found["texts"]:
        variant = f", {each['variant']}" if each["variant"] else ""
        say(f"{each['split']}, item {each['item']}{variant}: {_one_line(each['prompt'])}")
        say(f"  > {_one_line(each['text'])}")
        for beside, text in ((found["control"], each["control"]), (UNSTEERED, each["unsteered"])):
            if text is not None:
                say(f"  {beside} > {_one_line(text)}")
    for place, spec in enumerate(found["made_of"]):
        where = "" if spec["artifact"] is None else f", {spec['artifact']['path']}"
        say(f"{'made of' if place else 'spec'} {spec['spec']}: {spec['job']}, seed {spec['seed']}{where}")
        say(f"  {json.dumps(spec['params'], ensure_ascii=False)}")
    if found["made_of"]:
        model = found["made_of"][0]["model"]
        say("model " + ", ".join(f"{name} {value}" for name, value in model.items() if value))


def print_comparison(found: Mapping[str, Any]) -> None:
    """Two trials side by side."""
    first, second = (f"trial {trial}" for trial in found["trials"])
    say(f"{first}: {found['states'][0]}; {second}: {found['states'][1]}")
    rows = [
        {"what": each["name"], first: each["values"][0], second: each["values"][1]}
        for each in found["params"]
    ]
    rows += [
        {
            "what": f"{each['name']} ({each['split']})",
            **{name: value for name, value in zip((first, second), each["values"], strict=True)},
            "difference": _with_interval(
                each["difference"], None if each["low"] is None else (each["low"], each["high"])
            ),
            "unit": each["unit"],
        }
        for each in found["metrics"]
    ]
    columns = ["what", first, second, "difference", "unit"]
    print_table(columns, [{column: row.get(column) for column in columns} for row in rows])
    same = ", ".join(f"{name} = {_cell(value)}" for name, value in found["same"].items())
    say(f"the same in both: {same or 'no parameter'}")
    for each in found["texts"]:
        variant = f", {each['variant']}" if each["variant"] else ""
        say(f"{each['split']}, item {each['item']}{variant}: {_one_line(each['prompt'])}")
        for name, text in zip((first, second), each["texts"], strict=True):
            say(f"  {name} > {_one_line(text)}")


def print_drift(found: Mapping[str, Any]) -> None:
    """What came out otherwise when a trial was run again."""
    for each in found["changed"]:
        say(f"{each['name']} is {each['now']!r} now, and was {each['then']!r}")
    columns = ["name", "split", "then", "now", "difference"]
    if moved := [each for each in found["metrics"] if not each["is_same"]]:
        print_table(columns, moved)
    for each in found["other_texts"]:
        say(f"{each['split']}, item {each['item']}: {_one_line(each['prompt'])}")
        for when in ("then", "now"):
            say(f"  {when} > {'not there' if each[when] is None else _one_line(each[when])}")
    say(
        f"{len(moved)} of {len(found['metrics'])} metrics and {len(found['other_texts'])} of "
        f"{found['texts']} texts of trial {found['trial']} are other than they were, on {found['device']}"
    )


def shown(text: str) -> str:
    """Text of a model as it stands, with nothing that a terminal obeys but new lines."""
    allowed = (each if each.isprintable() or each == "\n" else repr(each)[1:-1] for each in text)
    return "".join(allowed)


def _one_line(text: str) -> str:
    """Text of a model on one line, with nothing that a terminal obeys."""
    return repr(text)


def _duration(hours: float) -> str:
    if hours >= 1.5:
        return f"about {hours:.1f} hours"
    return f"about {60 * hours:.0f} minutes" if 60 * hours >= 1.5 else f"about {3600 * hours:.0f} seconds"


def print_table(columns: list[str], rows: list[dict[str, Any]]) -> None:
    """The first rows as a table, and how many more there are."""
    table = Table(*columns)
    for row in rows[:_MOST_ROWS]:
        table.add_row(*(_cell(row[column]) for column in columns))
    Console(width=None if sys.stdout.isatty() else 240, markup=False, highlight=False).print(table)
    if len(rows) > _MOST_ROWS:
        say(f"... and {len(rows) - _MOST_ROWS} more rows, which CSV and JSON show")


_MOST_ROWS = 1000
_MOST_ENTRIES = 4
"""Of a vector, in a table."""


def _cell(value: Any) -> str:
    if isinstance(value, float):
        # Times are seconds since 1970.
        return f"{value:.1f}" if 1e4 <= abs(value) < 1e12 else f"{value:.4g}"
    if isinstance(value, list) and len(value) > _MOST_ENTRIES:
        return f"{', '.join(map(_cell, value[:_MOST_ENTRIES]))}, ... ({len(value)} in all)"
    return "" if value is None else str(value)


def _print_csv(columns: list[str], rows: list[dict[str, Any]]) -> None:
    import csv

    writer = csv.DictWriter(sys.stdout, columns)
    writer.writeheader()
    writer.writerows(rows)


def _print_rows(columns: list[str], rows: list[dict[str, Any]]) -> None:
    print_json(rows)


FORMATS: dict[str, Callable[[list[str], list[dict[str, Any]]], None]] = {
    "table": print_table,
    "csv": _print_csv,
    "json": _print_rows,
}


def print_json(value: Any) -> None:
    """One line of JSON; what JSON does not know becomes text, and numbers that are not finite null."""
    say(json.dumps(_finite(value), ensure_ascii=False, default=str, allow_nan=False))


def _finite(value: Any) -> Any:
    match value:
        case float():
            return value if math.isfinite(value) else None
        case Mapping():
            return {key: _finite(each) for key, each in value.items()}
        case list() | tuple():
            return [_finite(each) for each in value]
    return value


def say(line: str) -> None:
    """One line, at once."""
    sys.stdout.write(line + "\n")
    sys.stdout.flush()

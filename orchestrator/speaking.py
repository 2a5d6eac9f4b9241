"""Commands about what a sweep's models say: scorers, people's labels, conversations."""

import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from jobs.errors import SpecError
from orchestrator.printing import Json, print_json, print_table, say, shown
from orchestrator.shipped import list_scorers


def score(
    folder: Annotated[
        Path | None, typer.Argument(help="The sweep's folder, as given to `run --out`.", show_default=False)
    ] = None,
    scorers: Annotated[
        list[str] | None,
        typer.Option(
            "--scorer", help='A scorer, with options as JSON behind it: refusal, contains{"sought": "sun"}.'
        ),
    ] = None,
    is_list: Annotated[bool, typer.Option("--list", help="Name the scorers and their options.")] = False,
    as_json: Json = False,
) -> None:
    """Score stored completions with other scorers, without the model; the table `scores` keeps them."""
    from orchestrator.rescoring import rescore

    if is_list:
        list_scorers(as_json=as_json)
        return
    if folder is None or not scorers:
        raise SpecError(
            "score takes a sweep's folder and one --scorer NAME or more; `steersweep score --list` names them"
        )
    found = rescore(folder, scorers)
    if as_json:
        print_json(found)
        return
    _print_scores(folder, found)
    for used in found["scorers"]:
        say(f"{used['label']}: {used['scorer']} version {used['version']} {used['options']}")
    say(_score_line(found))


_MOST_SCORED = 20


def _print_scores(folder: Path, found: Mapping[str, Any]) -> None:
    """The trials that score highest, with what they were proposed with."""
    from storage.query import open_sweep

    sweep = open_sweep(folder)
    names = list(sweep.identity["parameters"])
    params = {row["trial"]: {name: row[name] for name in names} for row in sweep.trials().to_pylist()}
    labels = {used["name"]: used["label"] for used in found["scorers"]}
    order = sorted(found["trials"], key=lambda row: (row["scorer"], row["split"], -(row["mean"] or 0.0)))
    rows = [{**row, "scorer": labels[row["scorer"]], **params.get(row["trial"], {})} for row in order]
    columns = ["trial", *names, "split", "scorer", "mean", "items", "unparsed"]
    for scorer, split in dict.fromkeys((row["scorer"], row["split"]) for row in rows):
        mine = [row for row in rows if (row["scorer"], row["split"]) == (scorer, split)]
        print_table(columns, mine[:_MOST_SCORED])
        if len(mine) > _MOST_SCORED:
            say(f"and {len(mine) - _MOST_SCORED} more; `steersweep query` has all in the table scores")


def _score_line(found: Mapping[str, Any]) -> str:
    pairs = found["specs"] * len(found["scorers"])
    if found["added"] == 0:
        return "nothing to do: all stored completions had these scores already"
    there = f"; {found['unchanged']} of {pairs} were there already" if found["unchanged"] else ""
    return f"{found['added']} scores added for {found['specs']} results{there}"


def label(
    folder: Annotated[Path, typer.Argument(help="The sweep's folder, as given to `run --out`.")],
    out: Annotated[
        Path | None, typer.Option(help="Write completions to label to this new .csv file.")
    ] = None,
    most: Annotated[int | None, typer.Option(min=1, help="So many of them at most, drawn at random.")] = None,
    seed: Annotated[int, typer.Option(help="Of their order.")] = 0,
    labels: Annotated[Path | None, typer.Option("--in", help="Take the labels of such a file in.")] = None,
    annotator: Annotated[str | None, typer.Option(help="Who gave them.")] = None,
    as_json: Json = False,
) -> None:
    """Have people label completions, without knowing whose they are, and compare them with the scorers."""
    from orchestrator.labelling import export_texts, import_labels

    if (out is None) == (labels is None):
        raise SpecError("label takes --out FILE, to write completions, or --in FILE, to take labels in")
    if out is not None:
        written = export_texts(folder, out, most=most, seed=seed)
        if as_json:
            print_json({"file": str(out), "texts": written})
        else:
            say(f"{out}: {written} completions; fill in the column label, and give it back with --in")
        return
    assert labels is not None
    if not annotator:
        raise SpecError("label --in FILE needs --annotator NAME: who gave the labels")
    found = import_labels(folder, labels, annotator=annotator)
    if as_json:
        print_json(found)
    else:
        _print_labels(found)


def chat(
    folder: Annotated[Path, typer.Argument(help="The sweep's folder, as given to `run --out`.")],
    trial: Annotated[int, typer.Argument(min=0, help="Number of the trial.")],
    vector: Annotated[int | None, typer.Option(min=0, help="Which vector of a learned set, from 0.")] = None,
    dose: Annotated[
        float | None,
        typer.Option(help="In place of the trial's dose or multiplier; of a set, times its norm."),
    ] = None,
    tokens: Annotated[int, typer.Option(min=1, help="Tokens that a reply may have.")] = 200,
    messages: Annotated[
        list[str] | None, typer.Option("--say", help="Say this and end; several times for several messages.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Talk to the model as a trial steers it, beside the unsteered one; an empty line ends it."""
    from orchestrator.chatting import chat as talk

    with talk(folder, trial, vector=vector, strength=dose, most=tokens) as conversation:
        for message in messages or _typed():
            replies = conversation.say(message)
            if as_json:
                print_json({"user": message, **replies})
                continue
            for kind, text in replies.items():
                say(f"{kind}> {shown(text)}")
    if conversation.transcript.exists():
        sys.stderr.write(f"kept in {conversation.transcript}\n")


def _typed() -> Iterator[str]:
    """Lines that a person types, up to an empty one or the end."""
    while True:
        sys.stderr.write("you> ")
        sys.stderr.flush()
        line = sys.stdin.readline().strip()
        if not line:
            return
        yield line


def _print_labels(found: Mapping[str, Any]) -> None:
    kept = f"kept as version {found['version']}" if found["is_new"] else "were there already"
    say(f"{found['labels']} labels of {found['annotator']} for {found['completions']} completions, {kept}")
    columns = ["with", "items", "agreed", "kappa", "low", "high"]
    if found["agreement"]:
        print_table(columns, [{**each, "with": each["with_"]} for each in found["agreement"]])
    else:
        say("no other score of these completions has few enough values to compare with")

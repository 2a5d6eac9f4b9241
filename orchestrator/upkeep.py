"""Commands that mend what a sweep has kept, give back its room, or write it to MLflow again."""

from typing import Annotated

import typer

from jobs.errors import SpecError
from jobs.spec import Retention
from orchestrator.kept import Folder
from orchestrator.printing import Json, print_json, say


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
    what = (
        f"{found['artifacts']} artifacts and {found['activations']} activations of {found['results']} results"
    )
    if not found["artifacts"] and not found["activations"]:
        say(f"nothing to remove: keeping {kept}, every artifact is needed; {_mib(found['bytes'])} are free")
        return
    if dry_run:
        say(f"{what} would go: {_mib(found['bytes'])} and the activations' own")
        return
    say(f"{what} are gone, {_mib(found['bytes'])} are free")
    if found["waiting"]:
        say(f"{_mib(found['waiting'])} stay for ten minutes for their readers; `gc` after that frees them")


def _mib(size: int) -> str:
    return f"{size / 2**20:.1f} MiB"


def _retention(text: str) -> Retention:
    if text.isdecimal() and int(text):
        return int(text)
    if text not in ("all", "front"):
        raise SpecError(f"--keep {text}; it takes all, front, or a number of trials of 1 or more")
    return "front" if text == "front" else "all"


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

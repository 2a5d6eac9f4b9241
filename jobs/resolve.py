"""From the name of a job to its module, its parameters, its code version and its data.

No torch: everything but a job's `run` imports without it.
"""

import ast
import dataclasses
import difflib
import hashlib
import importlib
import importlib.metadata
import importlib.util
import json
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any, cast

from jobs.directions.vector_files import VECTOR_SUFFIXES
from jobs.errors import SpecError
from jobs.spec import Job, ModelRef, Requirement, Spec, content_hash, params_to_json

_REQUIRED_NAMES = (
    "Params",
    "METRICS",
    "PACK_BY",
    "DATA",
    "LAYERS",
    "size",
    "requires",
    "check",
    "canonical",
    "run",
)
_LOADER = "jobs.engine.loading"
_ASSETS = Path(__file__).parent / "data" / "assets"
_ASSET_SUFFIXES = (".jsonl", ".csv", ".txt")


@cache
def load_job(name: str) -> Job:
    """The job module called `name`, such as `jobs.steer`, checked against the contract.

    Raises:
        SpecError: If there is no such module or it lacks a name of the contract.
    """
    unknown = SpecError(
        f"no job {name!r}; give the import path of a job module, such as 'jobs.steer'; "
        "`steersweep jobs` lists those that there are"
    )
    if not all(name.split(".")):
        raise unknown
    try:
        module = importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not name.startswith(error.name):
            raise
        raise unknown from error
    missing = [required for required in _REQUIRED_NAMES if not hasattr(module, required)]
    if missing:
        raise SpecError(f"{name} is not a job module: it lacks {missing}; see `Job` in jobs/spec.py")
    return cast(Job, module)


def shipped_jobs() -> list[str]:
    """Import paths of the job modules that stand beside this file, in the order of their names."""
    names = [f"{__package__}.{path.stem}" for path in sorted(Path(__file__).parent.glob("*.py"))]
    modules = {name: importlib.import_module(name) for name in names}
    return [
        name
        for name, module in modules.items()
        if all(hasattr(module, required) for required in _REQUIRED_NAMES)
    ]


def shipped_packages(job: str) -> list[Path]:
    """Folders of the packages that a worker needs for a job: the project's own, and the job's.

    Args:
        job: Import path; one that is a single module, in no package, has to be on every machine already.
    """
    own = Path(__file__).parents[1]
    first = {name: own / name for name in ("jobs", "orchestrator", "search_spaces", "storage")}
    path = getattr(importlib.import_module(job.partition(".")[0]), "__path__", None)
    return [*first.values(), *(Path(place) for place in path or () if Path(place) not in first.values())]


def make_params(job: str, values: Mapping[str, Any]) -> Any:
    """An instance of the job's `Params`, every name and type checked.

    Raises:
        SpecError: If a parameter is unknown, missing, of another type, or refused by `Params` itself.
    """
    params_type = load_job(job).Params
    hints = typing.get_type_hints(params_type)
    unknown = sorted(set(values) - set(hints))
    if unknown:
        nearest = difflib.get_close_matches(unknown[0], hints, n=1)
        hint = f" (did you mean {nearest[0]!r}?)" if nearest else ""
        raise SpecError(f"{job} has no parameter {unknown}{hint}; it takes {sorted(hints)}")
    required = {
        field.name
        for field in dataclasses.fields(params_type)
        if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
    }
    absent = sorted(required - set(values))
    if absent:
        raise SpecError(
            f"{job} needs the parameters {absent}; add them to the space's fixed values or parameters"
        )
    converted = {name: convert(job, name, value, hints[name]) for name, value in values.items()}
    try:
        return params_type(**converted)
    except ValueError as error:
        raise SpecError(f"{job}: {error}") from error


def convert(owner: str, name: str, value: Any, hint: Any) -> Any:
    """A plain value as its field stores it: lists become tuples, whole numbers floats where those are asked.

    Args:
        owner: Whose field it is, for the message, such as `jobs.steer` or `scorer 'regex'`.
        name: Name of the field.
        value: What was given, as JSON or YAML give it.
        hint: The field's type.

    Raises:
        SpecError: If the value is of another type.
    """
    if isinstance(value, (list, tuple)) and hint == tuple[float, ...]:
        value = [float(item) if _matches(item, int) else item for item in value]
    if _matches(value, hint):
        return tuple(value) if isinstance(value, list) else value
    if isinstance(value, int) and not isinstance(value, bool) and float in (hint, *typing.get_args(hint)):
        return float(value)
    raise SpecError(f"{owner}: {name}={value!r}; it takes {_in_words(hint)}")


def _in_words(hint: Any) -> str:
    """What a field of a type takes."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(map(_in_words, arguments))
    if origin is typing.Literal:
        return ("one of " if len(arguments) > 1 else "") + ", ".join(map(repr, arguments))
    if origin is tuple:
        return f"a list, each entry {_in_words(arguments[0])}"
    return _WORDS.get(hint, str(hint))


_WORDS = {
    int: "a whole number",
    float: "a number",
    str: "a text",
    bool: "true or false",
    types.NoneType: "null",
}


def _matches(value: Any, hint: Any) -> bool:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return True
    if origin in (typing.Union, types.UnionType):
        return any(_matches(value, argument) for argument in arguments)
    if origin is typing.Literal:
        return value in arguments
    if origin is tuple:
        return isinstance(value, (list, tuple)) and all(_matches(item, arguments[0]) for item in value)
    if hint is float:
        return isinstance(value, float)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, hint)


def parse_use(text: str) -> Requirement:
    """A job with its parameters as JSON behind its name, such as `jobs.melbo{"radius": 0.3}`.

    Raises:
        SpecError: If it is not that, there is no such job, or it refuses its parameters.
    """
    name, brace, rest = text.partition("{")
    try:
        values = json.loads(brace + rest) if brace else {}
    except json.JSONDecodeError as error:
        raise SpecError(
            f"the parameters of {text!r} are not JSON ({error.msg}); write them such as "
            'jobs.melbo{"radius": 0.3}'
        ) from error
    return Requirement(job=name.strip(), params=make_params(name.strip(), values))


def make_spec(requirement: Requirement, *, model: ModelRef, seed: int) -> Spec:
    """The full spec of a job and its parameters.

    The parameters are first brought into the job's canonical form, so that configurations that mean the same
    work (a dose of 0 at any layer) share one spec. The data of what the job requires count, and the code of
    required jobs that it does not import.
    """
    job = load_job(requirement.job)
    params = job.canonical(requirement.params)
    data = {
        key: data_hash(dataset)
        for name in job.DATA
        for key, dataset in _datasets(name, getattr(params, name)).items()
    }
    code, codes = code_version(requirement.job), set()
    for need, weights in prerequisites(Requirement(job=requirement.job, params=params), model):
        needed = make_spec(need, model=weights, seed=seed)
        if need.job not in _reachable(requirement.job):
            codes.add(needed.code)
        for key, found in needed.data.items():
            if found not in data.values():
                data[f"{need.job}:{key}"] = found
    return Spec(
        job=requirement.job,
        code=content_hash([code, sorted(codes)]) if codes else code,
        params=params_to_json(params),
        model=model,
        data=data,
        seed=seed,
    )


def prerequisites(requirement: Requirement, model: ModelRef) -> list[tuple[Requirement, ModelRef]]:
    """What a job requires, and what the weights that it runs on require, each with its own weights."""
    needed = [(need, model) for need in load_job(requirement.job).requires(requirement.params)]
    return needed if model.tuned == "" else [*needed, (parse_use(model.tuned), replace(model, tuned=""))]


def _datasets(name: str, value: str | Sequence[str]) -> dict[str, str]:
    """Key in the spec -> dataset, of a parameter that names one dataset, none ("") or several."""
    if isinstance(value, str):
        return {name: value} if value else {}
    return {f"{name}.{place}": each for place, each in enumerate(value)}


def locate_data(name: str, folders: Sequence[Path] = (Path(),)) -> Path:
    """The file of a dataset or of vectors: one of the project's own by name, or any path.

    Args:
        name: The name or the path.
        folders: Where a relative path begins, in the order in which they are tried.

    Raises:
        SpecError: If there is no such file; the folders are named.
    """
    if (own_path := _own_data(name)) is not None:
        return own_path
    given = Path(name).expanduser()
    paths = [folder / given for folder in folders]
    if (found := next((path for path in paths if path.is_file()), None)) is not None:
        return found.resolve()
    raise SpecError(_no_file(name, folders))


def _no_file(name: str, folders: Sequence[Path]) -> str:
    """What to say of a dataset or of a file of vectors that is not there."""
    searched = dict.fromkeys(str(folder.absolute()) for folder in folders)
    is_relative = not Path(name).expanduser().is_absolute()
    where = f"there is no such file in {' or in '.join(searched)}" if is_relative else "there is no such file"
    if Path(name).suffix in VECTOR_SUFFIXES:
        return f"no vector file {name!r}: {where}; give the path of a {' or '.join(VECTOR_SUFFIXES)} file"
    own = sorted(path.stem for path in _ASSETS.glob("*") if path.suffix in (".jsonl", ".csv"))
    return f"no dataset {name!r}: {where}, and the project's own are {own}; give a path or one of these"


def is_own_data(name: str) -> bool:
    """Whether a name means one of the project's own datasets, whatever files there are."""
    return _own_data(name) is not None


def _own_data(name: str) -> Path | None:
    paths = [_ASSETS / f"{name}{suffix}" for suffix in _ASSET_SUFFIXES]
    return next((path for path in paths if path.is_file()), None)


def data_hash(name: str) -> str:
    """Sixteen hexadecimal digits of SHA-256 over the dataset's bytes."""
    return hashlib.sha256(locate_data(name).read_bytes()).hexdigest()[:16]


@cache
def code_version(job: str) -> str:
    """Hash of the job's syntax tree and of every `jobs` module it reaches, and of torch and transformers.

    The module that loads a job's replica counts, although no job imports it.

    Comments, docstrings and layout do not count, so that a better comment recomputes nothing.
    """
    digest = hashlib.sha256()
    for name, path in sorted(_reachable(job).items()):
        digest.update(name.encode())
        digest.update(_normalised(path).encode())
    for library in ("torch", "transformers"):
        digest.update(f"{library}=={_installed_version(library)}".encode())
    return digest.hexdigest()[:16]


def _installed_version(library: str) -> str:
    try:
        return importlib.metadata.version(library)
    except importlib.metadata.PackageNotFoundError:
        return "absent"


@cache
def _reachable(root: str) -> dict[str, Path]:
    found: dict[str, Path] = {}
    waiting = [root, _LOADER]
    while waiting:
        name = waiting.pop()
        spec = importlib.util.find_spec(name)
        if name in found or spec is None or spec.origin is None:
            continue
        found[name] = Path(spec.origin)
        waiting += [module for module in _imports(found[name]) if module.split(".")[0] == "jobs"]
    return found


@cache
def _imports(path: Path) -> Sequence[str]:
    names = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            names.append(node.module)
            names += [
                f"{node.module}.{alias.name}" for alias in node.names if _is_module(node.module, alias.name)
            ]
    return names


def _is_module(package: str, name: str) -> bool:
    return (
        package.split(".")[0] == "jobs"
        and importlib.util.find_spec(package) is not None
        and (Path(__file__).parents[1].joinpath(*package.split("."), f"{name}.py").is_file())
    )


@cache
def _normalised(path: Path) -> str:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            node.body = [statement for statement in node.body if not _is_docstring(statement)]
    return ast.dump(tree)


def _is_docstring(statement: ast.stmt) -> bool:
    return (
        isinstance(statement, ast.Expr)
        and isinstance(statement.value, ast.Constant)
        and isinstance(statement.value.value, str)
    )

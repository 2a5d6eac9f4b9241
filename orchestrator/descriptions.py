"""What jobs and scorers say of themselves, as plain values. No torch."""

import dataclasses
import inspect
import re
import types
import typing
from typing import Any

from jobs.resolve import load_job, shipped_jobs
from jobs.scoring.scorers import SCORERS, Scorer

Record = dict[str, Any]


def describe_jobs() -> list[Record]:
    """`job` and `about`, its docstring's first line, of every job that comes with the package."""
    return [{"job": name, "about": _about(name)} for name in shipped_jobs()]


def _about(job: str) -> str:
    lines = inspect.cleandoc(load_job(job).__doc__ or "").splitlines()
    return next(iter(lines), "").removeprefix("Job: ")


def describe_job(name: str) -> Record:
    """What a space may say of a job.

    Args:
        name: Its import path, or what stands behind `jobs.` there.

    Returns:
        job; about; parameters, as `describe_fields` has them; metrics, each with name, unit and meaning;
        data, the parameters that name datasets or files; pack_by, the parameters that the trials of a pack
        share, None where trials are not packed.

    Raises:
        SpecError: If there is no such job.
    """
    name = name if "." in name else f"jobs.{name}"
    job = load_job(name)
    return {
        "job": name,
        "about": _about(name),
        "parameters": describe_fields(job.Params),
        "metrics": [{"name": metric, **found._asdict()} for metric, found in job.METRICS.items()],
        "data": list(job.DATA),
        "pack_by": None if job.PACK_BY is None else list(job.PACK_BY),
    }


def describe_scorers() -> list[Record]:
    """Name, unit, meaning, needs and options (as `describe_fields` has them) of every scorer of text."""
    return [_describe_scorer(scorer) for scorer in SCORERS.values()]


def _describe_scorer(scorer: Scorer) -> Record:
    return {
        "scorer": scorer.name,
        **scorer.metric._asdict(),
        "needs": list(scorer.needs),
        "options": describe_fields(scorer.options),
    }


def describe_fields(owner: type[Any]) -> list[Record]:
    """The fields of a dataclass, each with name, type in words, is_required, default and about.

    The default of a required field is None. `about` is what the docstring of the class, or of one that it
    inherits from, has under Attributes.
    """
    hints, texts = typing.get_type_hints(owner), _attributes(owner)
    return [
        {
            "name": field.name,
            "type": _type_name(hints[field.name]),
            "is_required": field.default is dataclasses.MISSING
            and field.default_factory is dataclasses.MISSING,
            "default": _default(field),
            "about": texts.get(field.name, ""),
        }
        for field in dataclasses.fields(owner)
    ]


def _default(field: "dataclasses.Field[Any]") -> Any:
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return None if field.default is dataclasses.MISSING else field.default


def _type_name(hint: Any) -> str:
    """A type as one would write it in a space: the choices of a Literal, `list of` for a tuple."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Literal:
        return " | ".join(map(repr, arguments))
    if origin in (typing.Union, types.UnionType):
        return " | ".join(map(_type_name, arguments))
    if origin is tuple:
        return f"list of {_type_name(arguments[0])}"
    if hint is type(None):
        return "None"
    return hint.__name__ if isinstance(hint, type) else str(hint)


def _attributes(owner: type[Any]) -> dict[str, str]:
    """Field -> its text under Attributes; a class's own words replace those of its bases."""
    found: dict[str, str] = {}
    for each in reversed(owner.__mro__):
        section = _SECTION.search(inspect.cleandoc(each.__doc__ or ""))
        for name, text in _ENTRY.findall(section[1]) if section else ():
            found[name] = " ".join(text.split())
    return found


_SECTION = re.compile(r"^Attributes:\n((?: {4}.*\n?|\n)+)", re.MULTILINE)
_ENTRY = re.compile(r"^ {4}(\w+): (.*(?:\n {8}.*)*)", re.MULTILINE)

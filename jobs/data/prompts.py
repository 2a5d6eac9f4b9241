"""Prompts to read a model with: two-way choices and open questions."""

from typing import NamedTuple, TypeVar

from jobs.data.files import read_rows
from jobs.errors import SpecError


class Choice(NamedTuple):
    """A question, the beginning of its answer, and two words that may come next.

    Attributes:
        split: `select` or `report`.
        user: The question.
        answer: Beginning of the answer, without a trailing space.
        positive: Continuation with its leading space; one token of the model.
        negative: The opposite one.
    """

    split: str
    user: str
    answer: str
    positive: str
    negative: str


class OpenPrompt(NamedTuple):
    """A question or request whose answer is free."""

    split: str
    prompt: str


def load_choices(name: str, select: int, report: int) -> list[Choice]:
    """The first choices of each split. Raises SpecError as `read_rows` does, or if there are too few."""
    choices = [Choice(*(row[column] for column in Choice._fields)) for row in read_rows(name, Choice._fields)]
    return [*_first(name, choices, "select", select), *_first(name, choices, "report", report)]


def load_open_prompts(name: str, select: int, report: int) -> list[OpenPrompt]:
    """The first prompts of each split. Raises SpecError as `read_rows` does, or if there are too few."""
    prompts = [OpenPrompt(row["split"], row["prompt"]) for row in read_rows(name, OpenPrompt._fields)]
    return [*_first(name, prompts, "select", select), *_first(name, prompts, "report", report)]


_Item = TypeVar("_Item", Choice, OpenPrompt)


def _first(name: str, items: list[_Item], split: str, count: int) -> list[_Item]:
    found = [item for item in items if item.split == split]
    if len(found) < count:
        raise SpecError(f"{name} has {len(found)} rows of the split {split!r} and {count} are asked for")
    return found[:count]

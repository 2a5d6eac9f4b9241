"""Prompts to read a model with: two-way choices, open questions, conversations."""

from collections.abc import Mapping
from typing import Any, NamedTuple, TypeVar

from jobs.data.files import read_rows
from jobs.errors import SpecError
from jobs.spec import SPLITS


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


class Conversation(NamedTuple):
    """What a user says, one message after each reply, and what is known of it.

    Attributes:
        split: `extract`, `select` or `report`.
        turns: The user's messages; a lone prompt is a conversation of one turn.
        columns: What else the dataset says of it, such as `answer`.
    """

    split: str
    turns: tuple[str, ...]
    columns: Mapping[str, Any]


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


def load_conversations(name: str, count: int) -> list[Conversation]:
    """The first conversations of a dataset.

    Its columns: `prompt`, a text, or `turns`, a list of the user's messages; `split`, which is `select` where
    it is absent; and any others.

    Args:
        name: One of the project's own datasets or a path.
        count: How many, from the start; 0 takes all.

    Raises:
        SpecError: As `read_rows` does, if a row cannot be used, or if there are too few.
    """
    rows = read_rows(name, ())
    if not any(row.get("turns") for row in rows):
        rows = read_rows(name, ("prompt",))  # whose errors name the line
    if len(rows) < count:
        raise SpecError(f"{name} has {len(rows)} rows and count={count} are asked for")
    found = [_conversation(f"{name}, row {number} (from 0)", row) for number, row in enumerate(rows)]
    return found[: count or None]


def _conversation(where: str, row: Mapping[str, Any]) -> Conversation:
    columns = {key: value for key, value in row.items() if isinstance(key, str) and value not in (None, "")}
    split = columns.pop("split", "select")
    prompt, turns = columns.pop("prompt", None), columns.pop("turns", None)
    if split not in SPLITS:
        raise SpecError(f"{where}: split={split!r}; it takes one of {list(SPLITS)}, or none, which is select")
    if (prompt is None) == (turns is None):
        raise SpecError(f"{where}: prompt={prompt!r}, turns={turns!r}; give one of them")
    messages = [prompt] if turns is None else turns
    if not isinstance(messages, list) or not messages or not all(map(_is_text, messages)):
        raise SpecError(f"{where}: turns={messages!r}; it takes a list of texts, in a .jsonl file")
    return Conversation(split, tuple(messages), columns)


def _is_text(value: Any) -> bool:
    """Whether something can be said: not white space alone, and no halves of surrogate pairs."""
    return isinstance(value, str) and bool(value.strip()) and value.encode(errors="ignore").decode() == value

"""Prompts to read a model with: two-way choices, open questions, conversations.

Choices and open prompts are always read on two splits. Where no row of such a dataset names one, every fourth
row (the 4th, the 8th, ...) belongs to report and the others to select: a row keeps its split when others are
added behind it, or when other numbers are asked for. Where some rows name one, the rest belong to select.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

from jobs.data.files import read_rows, read_split
from jobs.errors import SpecError

REPORT_EVERY = 4
"""Of rows that name no split, every so many-th belongs to report."""


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
    """The first choices of each split.

    Its columns: `user`, `answer`, `positive` and `negative`; `split`, which may be absent.

    Raises:
        SpecError: As `read_rows` does, if a split does not exist, or if there are too few.
    """
    columns = Choice._fields[1:]
    rows = _with_splits(name, read_rows(name, columns))
    choices = [Choice(split, *(row[column] for column in columns)) for split, row in rows]
    return [*_first(name, choices, "select", select), *_first(name, choices, "report", report)]


def load_open_prompts(
    name: str, select: int, report: int, *, extract: int = 0, after: int = 0
) -> list[OpenPrompt]:
    """The first prompts of each split, those of extract first, then those of select.

    Its columns: `prompt`; `split`, which may be absent.

    Args:
        name: One of the project's own datasets or a path.
        select: How many of that split.
        report: How many of that split.
        extract: How many of that split.
        after: How many of the split extract are passed over first.

    Raises:
        SpecError: As `read_rows` does, if a split does not exist, or if there are too few.
    """
    rows = _with_splits(name, read_rows(name, ["prompt"]))
    prompts = [OpenPrompt(split, row["prompt"]) for split, row in rows]
    learned = _first(name, prompts, "extract", after + extract)[after:]
    return [
        *learned,
        *_first(name, prompts, "select", select),
        *_first(name, prompts, "report", report),
    ]


_Item = TypeVar("_Item", Choice, OpenPrompt)
_Row = Mapping[str, Any]


def _with_splits(name: str, rows: Sequence[_Row]) -> list[tuple[str, _Row]]:
    """Each row behind its split."""
    if all(row.get("split") in (None, "") for row in rows):
        last = REPORT_EVERY - 1
        return [("report" if at % REPORT_EVERY == last else "select", row) for at, row in enumerate(rows)]
    return [(read_split(f"{name}, row {at} (from 0)", row), row) for at, row in enumerate(rows)]


def _first(name: str, items: list[_Item], split: str, count: int) -> list[_Item]:
    found = [item for item in items if item.split == split]
    if len(found) < count:
        where = f"where none names a split, every {REPORT_EVERY}th is 'report', the others 'select'"
        if split == "extract":
            where = 'it takes rows with "split": "extract"; those are what vectors are learned from'
        raise SpecError(
            f"{name} has {len(found)} rows of the split {split!r} and {count} are asked for; ask for fewer "
            f"or add rows ({where})"
        )
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
    split = read_split(where, columns)
    columns.pop("split", None)
    prompt, turns = columns.pop("prompt", None), columns.pop("turns", None)
    if (prompt is None) == (turns is None):
        raise SpecError(f"{where}: prompt={prompt!r}, turns={turns!r}; give one of them")
    messages = [prompt] if turns is None else turns
    if not isinstance(messages, list) or not messages or not all(map(_is_text, messages)):
        raise SpecError(f"{where}: turns={messages!r}; it takes a list of texts, in a .jsonl file")
    return Conversation(split, tuple(messages), columns)


def _is_text(value: Any) -> bool:
    """Whether something can be said: not white space alone, and no halves of surrogate pairs."""
    return isinstance(value, str) and bool(value.strip()) and value.encode(errors="ignore").decode() == value

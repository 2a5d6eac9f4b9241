"""Replies that were written before, with what they reply to."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from jobs.data.files import read_rows, read_split
from jobs.errors import SpecError
from jobs.spec import canonical_json


class StoredReply(NamedTuple):
    """A reply as a dataset holds it.

    Attributes:
        split: `extract`, `select` or `report`.
        prompt: What it replies to.
        reply: What it says; it may be empty.
        label: Columns that are kept, as JSON; None if none are.
    """

    split: str
    prompt: str
    reply: str
    label: str | None


def load_replies(name: str, count: int, labels: Sequence[str] = ()) -> list[StoredReply]:
    """The first replies of a dataset.

    Its columns: `prompt`; `reply`, or `text` as a sweep's completions have it, which may be empty; `split`,
    which is select where it is absent; any others.

    Args:
        name: One of the project's own datasets or a path.
        count: How many, from the start; 0 takes all.
        labels: Columns that are kept.

    Raises:
        SpecError: As `read_rows` does, if a column is absent or a split does not exist, or if there are too
            few.
    """
    rows = read_rows(name, ["prompt"])
    if len(rows) < count:
        raise SpecError(f"{name} has {len(rows)} replies and count={count} are asked for")
    return [_reply(name, number, row, labels) for number, row in enumerate(rows[: count or None])]


def _reply(name: str, number: int, row: Mapping[str, Any], labels: Sequence[str]) -> StoredReply:
    where = f"{name}, reply {number} (from 0)"
    said = {key: row[key] for key in ("reply", "text") if key in row}
    if len(said) != 1:
        raise SpecError(
            f"{where}: it has the columns {[*row]}; it takes one of 'reply' and 'text' beside 'prompt'"
        )
    [reply] = ("" if value is None else value for value in said.values())
    if not isinstance(reply, str):
        raise SpecError(
            f"{where}: the reply is {str(reply)[:40]!r}, a {type(reply).__name__}; it takes a text"
        )
    if absent := [column for column in labels if column not in row]:
        raise SpecError(f"{where}: it has no columns {absent}, which labels names; it has {[*row]}")
    split = read_split(where, row)
    return StoredReply(split, row["prompt"], reply, _label(where, row, labels) if labels else None)


def _label(where: str, row: Mapping[str, Any], labels: Sequence[str]) -> str:
    try:
        return canonical_json({column: row[column] for column in labels})
    except ValueError as error:
        raise SpecError(f"{where}: of {[*labels]} a column cannot be kept: {error}") from error

"""Questions with several answers of which one is right."""

import string
from collections.abc import Mapping
from typing import Any, NamedTuple

from jobs.data.files import read_rows, read_split
from jobs.errors import SpecError

LETTERS = string.ascii_uppercase


class Question(NamedTuple):
    """A question and its answers.

    Attributes:
        split: `extract`, `select` or `report`.
        topic: What it is about; None where the dataset does not say.
        text: The question.
        choices: Answers, at least two, none twice.
        answer: Which of them is right, counted from 0.
    """

    split: str
    topic: str | None
    text: str
    choices: tuple[str, ...]
    answer: int


def load_multiple_choice(name: str, count: int) -> list[Question]:
    """The first questions of a dataset.

    Its columns: `question`; `choices`, a list of texts, or the columns `A`, `B`, ... in its place; `answer`,
    the number of the right one from 0 or its letter from A; `topic` and `split`, which may be absent: a
    question without a split belongs to select.

    Args:
        name: One of the project's own datasets or a path.
        count: How many, from the start; 0 takes all.

    Raises:
        SpecError: As `read_rows` does, if a row cannot be used, or if there are too few.
    """
    rows = read_rows(name, ["question"], ["answer"])
    if len(rows) < count:
        raise SpecError(f"{name} has {len(rows)} questions and count={count} are asked for")
    found = [_question(f"{name}, question {number} (from 0)", row) for number, row in enumerate(rows)]
    return found[: count or None]


def _question(where: str, row: Mapping[str, Any]) -> Question:
    split = read_split(where, row)
    choices = _choices(where, row)
    return Question(
        split, row.get("topic") or None, row["question"], choices, _answer(where, row["answer"], len(choices))
    )


def _choices(where: str, row: Mapping[str, Any]) -> tuple[str, ...]:
    found = row.get("choices")
    if found is None:
        found = [row[letter] for letter in LETTERS if row.get(letter) not in (None, "")]
    if not isinstance(found, list) or not all(isinstance(each, str) and each.strip() for each in found):
        raise SpecError(f"{where}: choices={found!r}; it takes a list of texts, or columns A, B, ...")
    if not 2 <= len(set(found)) == len(found) <= len(LETTERS):
        raise SpecError(f"{where}: choices={found}; it takes 2 to {len(LETTERS)} texts, none of them twice")
    return tuple(found)


def _answer(where: str, given: Any, number: int) -> int:
    text = str(given).strip()
    place = LETTERS.find(text.upper()) if len(text) == 1 and text.isalpha() else -1
    if text.isdecimal() and not isinstance(given, bool):
        place = int(text)
    if not 0 <= place < number:
        raise SpecError(
            f"{where}: answer={given!r}; it takes 0 to {number - 1}, or A to {LETTERS[number - 1]}"
        )
    return place

"""Contrast pairs: two texts that differ in the behaviour a direction should carry."""

from typing import NamedTuple

from jobs.data.files import read_rows


class Pair(NamedTuple):
    """A text that shows the behaviour and its twin that shows the opposite."""

    positive: str
    negative: str


def load_pairs(name: str) -> list[Pair]:
    """Pairs of a dataset with the columns `positive` and `negative`. Raises SpecError as `read_rows` does."""
    return [Pair(row["positive"], row["negative"]) for row in read_rows(name, Pair._fields)]

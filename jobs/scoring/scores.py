"""A score of one reply, and the means of many."""

import math
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

Item = Mapping[str, Any]
"""A reply and what is known of it: `text`, and what its scorers need, such as `answer`."""


class Score(NamedTuple):
    """Value of one item, NaN where it is not defined, and whether the text could be read at all."""

    value: float
    parsed: bool = True


UNPARSED = Score(math.nan, parsed=False)
UNDEFINED = Score(math.nan)


class Summary(NamedTuple):
    """Means of one scorer's values.

    Attributes:
        mean: Over the items whose value is defined; NaN if there are none.
        mean_of_all: Same, an unparsed item counting as 0: how a share of right answers is usually given.
        items: All items.
        unparsed: Items whose text could not be read.
        undefined: Items that were read and have no value.
    """

    mean: float
    mean_of_all: float
    items: int
    unparsed: int
    undefined: int


def summarise(scores: Iterable[Score]) -> Summary:
    """Means and counts of the scores of one scorer."""
    every = list(scores)
    values = [score.value for score in every if not math.isnan(score.value)]
    unparsed = sum(not score.parsed for score in every)
    of_all = len(values) + unparsed
    return Summary(
        mean=sum(values) / len(values) if values else math.nan,
        mean_of_all=sum(values) / of_all if of_all else math.nan,
        items=len(every),
        unparsed=unparsed,
        undefined=len(every) - of_all,
    )

"""A job that does nothing, for what a sweep costs besides its jobs: five parameters, two metrics."""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from jobs.spec import Context, Metric, Outcome, Requirement, Row, Size


@dataclass(frozen=True, slots=True, kw_only=True)
class Params:
    """Five numbers.

    Attributes:
        a: From 0 to 1, as are all.
        b: Second.
        c: Third.
        d: Fourth.
        e: Fifth.
        pause: How long a row does nothing, s.
    """

    a: float
    b: float
    c: float
    d: float
    e: float
    pause: float = 0.0


METRICS = {"up": Metric("1", "a + b + c"), "down": Metric("1", "d - e")}
PACK_BY: tuple[str, ...] = ()
DATA: tuple[str, ...] = ()
LAYERS: tuple[str, ...] = ()


def size(params: Params) -> Size:
    """One row, no tokens."""
    return Size(1, 0)


def requires(params: Params) -> Sequence[Requirement]:
    """Nothing."""
    return ()


def check(params: Params) -> None:
    """Everything is allowed."""


def canonical(params: Params) -> Params:
    """As they are."""
    return params


def values(params: Any) -> dict[str, float]:
    """The two metrics of five numbers."""
    return {"up": params.a + params.b + params.c, "down": params.d - params.e}


def run(replica: Any, rows: Sequence[Row], context: Context) -> Iterator[tuple[int, Outcome]]:
    """One outcome a row."""
    for index, row in enumerate(rows):
        time.sleep(row.params.pause)
        yield index, Outcome(metrics={"select": values(row.params)})

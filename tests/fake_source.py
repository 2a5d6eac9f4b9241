"""A job that makes an artifact and needs no model; it can require another of itself."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from jobs.spec import Context, Metric, Outcome, Requirement, Row, Size, Status


@dataclass(frozen=True, slots=True, kw_only=True)
class Params:
    """What the artifact holds.

    Attributes:
        value: Number in the artifact.
        depth: How many further artifacts stand under this one, each adding its own value.
        mode: `ok`, `unmeasured` (without a metric on the split select), or, for the deepest one alone,
            `fail`, `raise` or `empty` (completed without an artifact).
    """

    value: int
    depth: int = 0
    mode: str = "ok"


METRICS = {"value": Metric("1", "number in the artifact")}
PACK_BY = None
DATA: tuple[str, ...] = ()
LAYERS: tuple[str, ...] = ()
RAN: list[Params] = []
"""Every row that was begun in this process, for counting."""


def size(params: Params) -> Size:
    return Size(1, 1)


def requires(params: Params) -> Sequence[Requirement]:
    if params.depth == 0:
        return ()
    return (
        Requirement(
            job=__name__, params=Params(value=params.value, depth=params.depth - 1, mode=params.mode)
        ),
    )


def check(params: Params) -> None:
    pass


def canonical(params: Params) -> Params:
    return params


def run(replica: Any, rows: Sequence[Row], context: Context) -> Iterator[tuple[int, Outcome]]:
    for index, row in enumerate(rows):
        params: Params = row.params
        RAN.append(params)
        under = sum(int(context.artifact(need)["value"][0]) for need in requires(params))
        mode = "ok" if params.depth else params.mode
        if mode == "raise":
            raise RuntimeError("the source was told to raise")
        if mode == "fail":
            yield index, Outcome(status=Status.FAILED, reason="the source was told to fail")
            continue
        tensors = {} if mode == "empty" else {"value": np.array([params.value + under], dtype=np.float32)}
        splits = ("report",) if params.mode == "unmeasured" else ("extract", "select")
        yield (
            index,
            Outcome(metrics={split: {"value": params.value + under} for split in splits}, tensors=tensors),
        )

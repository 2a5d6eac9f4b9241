"""A job of the real contract that needs no model: exact whole numbers, and every way to go wrong."""

import math
import os
import signal
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from jobs.errors import OutOfMemory, SpecError
from jobs.spec import Context, Metric, Outcome, Requirement, Row, Size, Status
from tests import fake_source


class Died(BaseException):
    """The process that ran the row is gone."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Params:
    """Two numbers, and how the row behaves.

    Attributes:
        x: First number; 0 means the same work at any `y`.
        y: Second number.
        group: What the rows of a pack share; for modes that happen once, a file whose name, with mode and x
            behind it, says that it has happened.
        mode: `ok`, or one of the ways to go wrong in `run`.
        source: Number in the artifact that the row needs; 0 = it needs none.
        source_depth: How many artifacts stand under that one.
        source_mode: How the source behaves.
        layer: A layer, which changes nothing.
        seconds: How long the row takes.
    """

    x: int
    y: float = 0.0
    group: str = "a"
    mode: str = "ok"
    source: int = 0
    source_depth: int = 0
    source_mode: str = "ok"
    layer: int = 0
    seconds: float = 0.0

    def __post_init__(self) -> None:
        if self.x < -1000:
            raise ValueError(f"x={self.x}; it takes -1000 or more")


METRICS = {
    "total": Metric("1", "x + y + what the artifact holds"),
    "square": Metric("1", "x * x"),
}
PACK_BY = ("group",)
DATA: tuple[str, ...] = ()
LAYERS = ("layer",)
RAN: list[Params] = []
"""Every row that was begun in this process, for counting."""
NASTY = "emoji 👩‍🔬🎉, controls \x00\x07\x1b[31m\x9b\r\n, right to left \u202e"


def size(params: Params) -> Size:
    return Size(1, 1)


def requires(params: Params) -> Sequence[Requirement]:
    if params.source == 0:
        return ()
    source = fake_source.Params(value=params.source, depth=params.source_depth, mode=params.source_mode)
    return (Requirement(job="tests.fake_source", params=source),)


def check(params: Params) -> None:
    if params.group == "unreadable":
        raise SpecError("group='unreadable' cannot be read")


def canonical(params: Params) -> Params:
    return replace(params, y=0.0) if params.x == 0 else params


def expected(params: Params) -> dict[str, dict[str, float]]:
    """The metrics that `run` gives, from the parameters alone."""
    plain = canonical(params)
    total = plain.x + plain.y + plain.source * (plain.source_depth + 1)
    select = {"total": total, "square": float(plain.x**2)}
    return {"select": select, "report": {name: value + 1000 for name, value in select.items()}}


def run(replica: Any, rows: Sequence[Row], context: Context) -> Iterator[tuple[int, Outcome]]:
    for index, row in enumerate(rows):
        RAN.append(row.params)
        for need in requires(row.params):
            held = int(context.artifact(need)["value"][0])
            assert held == row.params.source * (row.params.source_depth + 1), (
                "not the artifact that was required"
            )
        time.sleep(row.params.seconds)
        yield from ((index, outcome) for outcome in _outcomes(row.params))


def _outcomes(params: Params) -> list[Outcome]:
    metrics = expected(params)
    good = Outcome(metrics=metrics)
    match params.mode:
        case "ok":
            return [good]
        case "fail":
            return [Outcome(status=Status.FAILED, reason="told to fail")]
        case "infeasible":
            return [Outcome(status=Status.INFEASIBLE, reason="told to be infeasible")]
        case "nan" | "inf":
            value = math.nan if params.mode == "nan" else math.inf
            return [Outcome(metrics={**metrics, "select": {**metrics["select"], "total": value}})]
        case "extract":
            return [Outcome(metrics={"extract": metrics["select"]})]
        case "missing":
            return [Outcome(metrics={**metrics, "select": {"square": metrics["select"]["square"]}})]
        case "tables":
            return [_rich(metrics)]
        case "raise":
            raise RuntimeError("told to raise")
        case "no file":
            raise FileNotFoundError("told not to find a file")
        case "oom":
            raise OutOfMemory("told not to fit", limit=1)
        case "die":
            raise Died("told to die")
        case "freeze once" | "hang once" | "kill once":
            _once(Path(f"{params.group} {params.mode} {params.x}"), params.mode)
            return [good]
        case "silent":
            return []
        case "twice":
            return [good, good]
        case "bad table":
            return [Outcome(metrics=metrics, tables={"nonsense": [{"item": 1}]})]
        case "bad column":
            return [Outcome(metrics=metrics, tables={"items": [{"nonsense": 1}]})]
        case "bad cell":
            return [Outcome(metrics=metrics, tables={"items": [{"item": "not a number"}]})]
        case "bad text":
            return [Outcome(metrics=metrics, tables={"items": [{"prompt": "half a pair \ud800"}]})]
        case "bad metric":
            return [Outcome(metrics={"select": {"total": "not a number"}})]
        case "bad tensor":
            return [Outcome(metrics=metrics, tensors={"a": np.array([object()])})]
    raise ValueError(f"mode={params.mode!r}")


def _once(flag: Path, mode: str) -> None:
    """The first time, the process stands still, does not return or is killed."""
    if flag.exists():
        return
    flag.touch()
    if mode == "hang once":
        time.sleep(3600)
    os.kill(os.getpid(), signal.SIGSTOP if mode == "freeze once" else signal.SIGKILL)
    time.sleep(3600)


def _rich(metrics: dict[str, dict[str, float]]) -> Outcome:
    return Outcome(
        metrics=metrics,
        tables={
            "items": [
                {
                    "split": "select",
                    "item": 0,
                    "prompt": NASTY,
                    "name": "score",
                    "value": math.nan,
                    "label": None,
                }
            ],
            "completions": [
                {
                    "split": "report",
                    "item": 1,
                    "prompt": "p",
                    "text": NASTY,
                    "tokens": 3,
                    "nll": None,
                    "repetition": 0.5,
                }
            ],
            "vectors": [
                {"name": "v", "layer": 2, "norm": 5.0, "vector": np.array([3.0, 4.0], dtype=np.float32)},
            ],
        },
        tensors={"kept": np.arange(6, dtype=np.float32).reshape(2, 3)},
    )


FAULTY = (
    "raise",
    "no file",
    "silent",
    "bad table",
    "bad column",
    "bad cell",
    "bad text",
    "bad metric",
    "bad tensor",
)
"""Modes whose fault is the job's own: such a row fails, alone, and is not tried again."""

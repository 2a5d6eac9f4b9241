"""What a space file is made of. No torch, no optuna.

A space is a Python file with one name, `SPACE`. Copy one, edit it, run it.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from jobs.spec import Retention

Sampler = Literal["grid", "random", "tpe", "nsga2"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Float:
    """A real number between two bounds, both included.

    Attributes:
        low: Smallest value.
        high: Largest value.
        log: Whether the logarithm is sampled evenly; needs `low` above 0.
    """

    low: float
    high: float
    log: bool = False

    def __post_init__(self) -> None:
        _check_bounds(self.low, self.high, log=self.log)


@dataclass(frozen=True, slots=True, kw_only=True)
class Int:
    """A whole number between two bounds, both included.

    Attributes:
        low: Smallest value.
        high: Largest value.
        log: Whether the logarithm is sampled evenly; needs `low` above 0.
    """

    low: int
    high: int
    log: bool = False

    def __post_init__(self) -> None:
        _check_whole("low", self.low)
        _check_whole("high", self.high)
        _check_bounds(self.low, self.high, log=self.log)


def _check_bounds(low: float, high: float, *, log: bool) -> None:
    if not (math.isfinite(low) and math.isfinite(high) and math.isfinite(high - low)):
        raise ValueError(f"low={low}, high={high}; both must be finite, and so must what is between them")
    if low > high:
        raise ValueError(f"low={low} is above high={high}")
    if log and low <= 0:
        raise ValueError(f"low={low} with log=True; it must be above 0")


def _check_whole(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError(f"{name}={value!r} is no whole number; use Float for others")
    if not -(2**63) <= value < 2**63:
        raise ValueError(f"{name}={value} does not fit in 64 bits")


@dataclass(frozen=True, slots=True)
class Grid:
    """One of the listed values; the sampler `grid` tries them all.

    Attributes:
        values: Distinct values of type bool, int, float or str.
    """

    values: Sequence[bool | int | float | str]

    def __post_init__(self) -> None:
        if wrong := [value for value in self.values if not isinstance(value, (bool, int, float, str))]:
            raise ValueError(f"Grid values are bool, int, float or str, not {wrong}")
        if not self.values or len(set(self.values)) < len(self.values):
            raise ValueError(f"Grid({list(self.values)}) needs at least one value, each listed once")
        if wrong := [value for value in self.values if isinstance(value, float) and not math.isfinite(value)]:
            raise ValueError(f"Grid values are finite, not {wrong}")
        for value in self.values:
            if isinstance(value, int) and not isinstance(value, bool):
                _check_whole("a Grid value", value)
            if isinstance(value, str) and not _is_text(value):
                raise ValueError(f"Grid value {value!r} is no text that can be written as UTF-8")


def _is_text(value: str) -> bool:
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


Domain = Float | Int | Grid


@dataclass(frozen=True, slots=True, kw_only=True)
class Objective:
    """A metric to push in one direction, read on the split select.

    A job that measures only what it extracts, such as `jobs.extract`, is read on the split extract.

    Attributes:
        metric: Name in the job's METRICS.
        direction: `minimize` or `maximize`.
    """

    metric: str
    direction: Literal["minimize", "maximize"]

    def __post_init__(self) -> None:
        if self.direction not in ("minimize", "maximize"):
            raise ValueError(f"direction={self.direction!r}; it takes 'minimize' or 'maximize'")


@dataclass(frozen=True, slots=True, kw_only=True)
class Constraint:
    """A bound on a metric, read where objectives are read; a trial beyond it is infeasible.

    Attributes:
        metric: Name in the job's METRICS.
        most: Highest value that is allowed; None allows any.
        least: Lowest value that is allowed; None allows any.
    """

    metric: str
    most: float | None = None
    least: float | None = None

    def __post_init__(self) -> None:
        if self.most is None and self.least is None:
            raise ValueError(f"Constraint({self.metric!r}) bounds nothing; give most, least or both")

    def broken(self, value: float | None) -> str | None:
        """How a value breaks the bound; None if it does not."""
        if value is None or math.isnan(value):
            return f"{self.metric} is not defined"
        if self.most is not None and value > self.most:
            return f"{self.metric} {value:.3g} is above {self.most:g}"
        if self.least is not None and value < self.least:
            return f"{self.metric} {value:.3g} is below {self.least:g}"
        return None


def broken(constraints: Sequence[Constraint], metrics: Mapping[str, float]) -> str | None:
    """How metrics break the first constraint that they break; None if they keep all."""
    return next(filter(None, (each.broken(metrics.get(each.metric)) for each in constraints)), None)


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """A cheaper form of every trial, run before the trial itself; only what passes goes on.

    Attributes:
        overrides: Job parameter -> the value that makes it cheaper, such as fewer prompts or tokens.
        constraints: What its metrics have to keep.
        keep: Share of the trials of a bracket that go on: the best by the space's objectives as they are in
            this cheaper form. 1 lets all go on that keep the constraints.
    """

    overrides: Mapping[str, Any]
    constraints: Sequence[Constraint] = ()
    keep: float = 1.0

    def __post_init__(self) -> None:
        if not self.overrides:
            raise ValueError("a Stage needs overrides that make a trial cheaper")
        if not 0 < self.keep <= 1:
            raise ValueError(f"keep={self.keep}; it takes a share above 0, up to 1")
        if not self.constraints and self.keep == 1:
            raise ValueError("a Stage that lets everything pass is in vain; give constraints, keep or both")


@dataclass(frozen=True, slots=True, kw_only=True)
class Space:
    """What to try.

    Attributes:
        description: What question the sweep answers, in a sentence or two.
        job: Import path of the job module.
        parameters: Job parameter -> the values it may take.
        fixed: Job parameter -> its one value; the rest keep the job's defaults.
        objectives: At least one; the first is shown as "best so far".
        constraints: What a trial must keep to be feasible; infeasible ones are never on the front.
        stages: Cheaper forms that every trial has to pass first, in this order; none runs each at once.
        bracket: Number of trials, in the order of proposals, that a stage compares to keep the best of them.
        sampler: Who proposes configurations.
        trials: How many; None tries every cell of a grid.
        retention: Whose artifacts and activations are kept once all trials have ended: those of `all`, of the
            `front`, or of the so many that ended last. What others were made of stays in any case.
    """

    description: str
    job: str
    parameters: Mapping[str, Domain]
    objectives: Sequence[Objective]
    fixed: Mapping[str, Any] = field(default_factory=dict)
    constraints: Sequence[Constraint] = ()
    stages: Sequence[Stage] = ()
    bracket: int = 9
    sampler: Sampler = "tpe"
    trials: int | None = None
    retention: Retention = "all"

    def __post_init__(self) -> None:
        if not isinstance(self.job, str) or not all(self.job.split(".")):
            raise ValueError(
                f"job={self.job!r}; it takes the import path of a job module, such as 'jobs.steer'"
            )
        if not self.parameters:
            raise ValueError("parameters is empty; name at least one parameter to vary")
        if unnamed := [name for name in (*self.parameters, *self.fixed) if not isinstance(name, str)]:
            raise ValueError(f"{unnamed} in parameters or fixed; the job's parameters are named by texts")
        if wrong := {name: value for name, value in self.parameters.items() if not isinstance(value, Domain)}:
            raise ValueError(
                f"parameters {wrong}: each takes Float(low=, high=), Int(low=, high=) or Grid([...])"
            )
        if self.sampler not in get_args(Sampler):
            raise ValueError(f"sampler={self.sampler!r}; it takes one of {list(get_args(Sampler))}")
        if not self.objectives:
            raise ValueError("objectives is empty; name at least one metric and its direction")
        if not all(isinstance(objective, Objective) for objective in self.objectives):
            raise ValueError(f"objectives={self.objectives!r}; each is an Objective(metric=, direction=)")
        metrics = [objective.metric for objective in self.objectives]
        if len(set(metrics)) < len(metrics):
            raise ValueError(f"objectives {metrics}: each metric once")
        if both := sorted(set(self.parameters) & set(self.fixed)):
            raise ValueError(f"{both} are both parameters and fixed; keep one of them")
        if self.retention not in ("all", "front") and not (
            type(self.retention) is int and self.retention >= 1
        ):
            raise ValueError(f"retention={self.retention!r}; it takes 'all', 'front' or a number of trials")
        if self.bracket < 2:
            raise ValueError(f"bracket={self.bracket}; it takes 2 or more trials to keep the best of them")
        if self.trials is not None and self.trials < 1:
            raise ValueError(f"trials={self.trials}; it takes 1 or more")
        if self.sampler == "grid":
            if endless := sorted(
                name for name, domain in self.parameters.items() if isinstance(domain, Float)
            ):
                raise ValueError(
                    f"sampler='grid' with the real parameters {endless}; list their values as Grid([...])"
                )
        elif self.trials is None:
            raise ValueError(f"sampler={self.sampler!r} needs trials=N; only a grid ends by itself")

"""Job: the norm at which vectors at a layer act nonlinearly on a later one: the unit of calibrated radii."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from jobs.asking import check_asking, encode_prompt
from jobs.data.prompts import OpenPrompt, load_open_prompts
from jobs.errors import SpecError
from jobs.spec import Context, Metric, Outcome, Requirement, Row, Size

if TYPE_CHECKING:
    from jobs.engine.replica import Replica


@dataclass(frozen=True, slots=True, kw_only=True)
class Params:
    """The slice, its tokens and the prompts.

    Attributes:
        source: Block to whose output vectors are added, at every token, counted from 0.
        target: Block at whose output the change is measured; above `source`.
        target_site: `after` the target block, or what its `attention` adds.
        counted: Tokens whose change counts: `all`, all `but_first`, or the `last` few.
        last: How many, where `counted` is `last`.
        ratio: Share of a linear effect by which the effect of random vectors departs from it at the
            calibrated norm, above 0.
        prompts: Dataset of open prompts; those of the split extract are read.
        learn_from: How many of them.
        chat: Whether prompts are asked in the model's chat template; otherwise they stand raw.
        system: System message; None leaves what the model's template does by itself.
    """

    source: int = 7
    target: int = 22
    target_site: Literal["after", "attention"] = "after"
    counted: Literal["all", "but_first", "last"] = "but_first"
    last: int = 3
    ratio: float = 0.5
    prompts: str = "elicitation_prompts"
    learn_from: int = 1
    chat: bool = True
    system: str | None = None

    def __post_init__(self) -> None:
        check_asking(self)
        if not 0 <= self.source < self.target:
            raise ValueError(f"source={self.source}, target={self.target}; 0 <= source < target")
        for name in ("last", "learn_from"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}; it takes 1 or more")
        if not self.ratio > 0:
            raise ValueError(f"ratio={self.ratio}; it takes more than 0")


METRICS = {
    "calibrated": Metric("stream units", "norm at which random vectors depart from a linear effect"),
    "residual_norm": Metric("stream units", "mean norm of the counted tokens' states at the source"),
}
PACK_BY = None
DATA = ("prompts",)
LAYERS = ("source", "target")


def size(params: Params) -> Size:
    """About 45 tokens a prompt; 30 random vectors at about 12 norms."""
    sequences = 30 * params.learn_from
    return Size(sequences, 12 * 45 * sequences)


def requires(params: Params) -> Sequence[Requirement]:
    """Nothing."""
    return ()


def check(params: Params) -> None:
    """The prompts can be read. Raises SpecError if not."""
    _read_prompts(params)


def canonical(params: Params) -> Params:
    """How many last tokens count matters only where they do."""
    return params if params.counted == "last" else replace(params, last=3)


def unit_of(params: Any) -> list[Requirement]:
    """What another job needs to know the unit of its radius: the calibration of its slice, unless it is 1.

    Args:
        params: Of that job; `radius_in` names the unit, and parameters of the same names say which slice.
    """
    if params.radius_in == "stream":
        return []
    names = set(Params.__dataclass_fields__) & set(type(params).__dataclass_fields__)
    same = Params(**{name: getattr(params, name) for name in names})
    return [Requirement(job=__name__, params=canonical(same))]


def radius_unit(params: Any, context: Context) -> float:
    """What a radius of 1 means to another job, in stream units. Raises SpecError if it cannot be said."""
    for requirement in unit_of(params):
        found = float(context.artifact(requirement)[params.radius_in][0])
        if not math.isfinite(found):
            raise SpecError(
                f"radius_in={params.radius_in!r}: no norm from 0.001 to 100 residual norms makes random "
                "vectors depart far enough from a linear effect; give the radius in residual_norm or stream"
            )
        return found
    return 1.0


def _read_prompts(params: Params) -> list[OpenPrompt]:
    return load_open_prompts(params.prompts, 0, 0, extract=params.learn_from)


def run(replica: "Replica", rows: Sequence[Row], context: Context) -> Iterator[tuple[int, Outcome]]:
    """Calibrate each row's slice.

    Tensors of the outcome, float64, shape (1,): those of `METRICS`.

    Raises:
        SpecError: If a layer or a token does not exist.
        ModelError: If there is no chat template, or the blocks cannot run alone.
    """
    from jobs.unsupervised.calibration import calibrated_radius, residual_norm
    from jobs.unsupervised.ground import Ground

    for index, row in enumerate(rows):
        params: Params = row.params
        prompts = _read_prompts(params)
        encoded = [encode_prompt(replica, prompt.prompt, params) for prompt in prompts]
        ground = Ground(
            replica,
            encoded,
            source=params.source,
            target=params.target,
            site=params.target_site,
            counted=params.counted,
            last=params.last,
        )
        found = {
            "calibrated": calibrated_radius(ground.slice_, ground.counted_NT, ratio=params.ratio),
            "residual_norm": residual_norm(ground.slice_, ground.counted_NT),
        }
        yield (
            index,
            Outcome(
                metrics={"extract": found},
                tensors={name: np.array([value]) for name, value in found.items()},
            ),
        )

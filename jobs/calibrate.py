"""Job: the norm at which vectors at a layer act nonlinearly on a later one: the unit of calibrated radii."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

import numpy as np

from jobs.asking import encode_prompt
from jobs.checks import above_zero
from jobs.errors import SpecError
from jobs.spec import Context, Metric, Outcome, Requirement, Row, Size
from jobs.unsupervised.params import Sliced, canonical_slice

if TYPE_CHECKING:
    from jobs.engine.replica import Replica


@dataclass(frozen=True, slots=True, kw_only=True)
class Params(Sliced):
    """The slice, and what calibrated means.

    Attributes:
        ratio: Share of a linear effect by which the effect of random vectors departs from it at the
            calibrated norm, above 0.
    """

    ratio: float = 0.5

    def __post_init__(self) -> None:
        self.check_slice()
        above_zero(self, "ratio")


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
    params.read_prompts()


def canonical(params: Params) -> Params:
    """How many last tokens count matters only where they do."""
    return canonical_slice(params)


def unit_of(params: Any) -> list[Requirement]:
    """What another job needs to know the unit of its radius: the calibration of its slice, unless it is 1.

    Args:
        params: Of that job, which are `Sliced`; `radius_in` names the unit.
    """
    if params.radius_in == "stream":
        return []
    names = {each.name for each in fields(Sliced)}
    same = Params(**{name: getattr(params, name) for name in names})
    return [Requirement(job=__name__, params=canonical(same))]


def radius_unit(params: Any, context: Context) -> float:
    """What a radius of 1 means to another job, in stream units. Raises SpecError if it cannot be said."""
    for requirement in unit_of(params):
        found = float(context.artifact(requirement)[params.radius_in][0])
        if not math.isfinite(found):
            raise SpecError(
                f"radius_in={params.radius_in!r}: no norm from 0.001 to 100 residual norms makes random "
                "vectors depart far enough from a linear effect, as this dtype shows it; give the radius in "
                "residual_norm or stream, or use a wider dtype"
            )
        return found
    return 1.0


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
        prompts = params.read_prompts()
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

"""Job: learn a set of vectors from several random starts, and see which of them come again."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import TYPE_CHECKING, Any

import numpy as np

from jobs import melbo
from jobs.checks import at_least
from jobs.spec import Context, Metric, Outcome, Requirement, Row, Size

if TYPE_CHECKING:
    from jobs.engine.replica import Replica


@dataclass(frozen=True, slots=True, kw_only=True)
class Params:
    """Which set, and how often it is learned.

    Attributes:
        learned: `jobs.melbo` with its parameters as JSON behind its name, such as `jobs.melbo{"source": 7}`.
        draws: How many random starts.
        alike: Two vectors of a cosine from here on are the same one.
    """

    learned: str = "jobs.melbo"
    draws: int = 3
    alike: float = 0.9

    def __post_init__(self) -> None:
        at_least(self, 2, "draws")
        if not 0 < self.alike <= 1:
            raise ValueError(f"alike={self.alike}; it takes a cosine above 0, at most 1")
        params = melbo.parse(self.learned)
        if params.start != "random":
            raise ValueError(f"learned={self.learned!r}: every draw starts from the same vectors")


METRICS = {
    "matched_cosine": Metric("cosine", "mean over pairs of draws and their matched vectors"),
    "matched_cosine_random": Metric("cosine", "the same of random vectors of the same number and width"),
    "recurring": Metric("share", "matched vectors of a cosine of at least `alike`"),
    "recurring_random": Metric("share", "the same of random vectors"),
    "shared_span": Metric("share", "squared norm of a draw's vectors in the span of another's, in the mean"),
    "shared_span_random": Metric("share", "the same of random vectors"),
}
PACK_BY = None
DATA: tuple[str, ...] = ()
LAYERS: tuple[str, ...] = ()


def size(params: Params) -> Size:
    """Nothing runs on the model."""
    return Size(1, 1)


def requires(params: Params) -> Sequence[Requirement]:
    """The set, once for each draw."""
    return [
        Requirement(job="jobs.melbo", params=melbo.canonical(replace(melbo.parse(params.learned), draw=draw)))
        for draw in range(params.draws)
    ]


def check(params: Params) -> None:
    """The prompts of the set can be read. Raises SpecError if not."""
    melbo.check(melbo.parse(params.learned))


def canonical(params: Params) -> Params:
    """Every parameter matters."""
    return params


def run(replica: "Replica", rows: Sequence[Row], context: Context) -> Iterator[tuple[int, Outcome]]:
    """Match the draws of each row's set.

    Tensors of the outcome, float64: `cosines` (pairs of draws, vectors) of the matched vectors, highest
    first.
    """
    for index, row in enumerate(rows):
        sets = [context.artifact(each)["vectors"].astype(np.float64) for each in requires(row.params)]
        generator = np.random.default_rng(row.seed)
        random = [generator.normal(size=each.shape) for each in sets]
        found, chance = (_metrics(each, row.params.alike) for each in (sets, random))
        cosines = np.array([matched_cosines(*pair) for pair in combinations(sets, 2)])
        metrics = {**found, **{f"{name}_random": value for name, value in chance.items()}}
        yield index, Outcome(metrics={"extract": metrics}, tensors={"cosines": cosines})


def matched_cosines(first_VD: np.ndarray, second_VD: np.ndarray) -> np.ndarray:
    """Cosines of the vectors of two sets, matched one to one so that their sum is largest; highest first.

    Args:
        first_VD: None of them 0.
        second_VD: As many, or more.
    """
    from scipy.optimize import linear_sum_assignment

    cosines_VV = _units(first_VD) @ _units(second_VD).T
    places = linear_sum_assignment(cosines_VV, maximize=True)
    return np.sort(cosines_VV[places])[::-1]


def shared_span(first_VD: np.ndarray, second_VD: np.ndarray) -> float:
    """Mean share of squared norm that each vector of the first set has in the span of the second.

    Directions in which the second set differs by no more than rounding do not count.
    """
    _, sizes_K, basis_KD = np.linalg.svd(_units(second_VD), full_matrices=False)
    basis_KD = basis_KD[sizes_K > _ROUNDING * sizes_K[0]]
    return float(np.square(_units(first_VD) @ basis_KD.T).sum(axis=1).mean())


_ROUNDING = 1e-4


def _units(vectors_VD: np.ndarray) -> np.ndarray:
    units_VD: np.ndarray = vectors_VD / np.linalg.norm(vectors_VD, axis=1, keepdims=True)
    return units_VD


def _metrics(sets: Sequence[np.ndarray], alike: float) -> dict[str, float]:
    pairs: list[Any] = list(combinations(sets, 2))
    cosines = np.array([matched_cosines(*pair) for pair in pairs])
    return {
        "matched_cosine": float(cosines.mean()) if cosines.size else math.nan,
        "recurring": float((cosines >= alike).mean()) if cosines.size else math.nan,
        "shared_span": float(np.mean([shared_span(*pair) for pair in pairs])),
    }

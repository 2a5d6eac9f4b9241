"""Job: learn a set of vectors at several norms; name the norm at which they make the model most diverse.

Small norms change nothing and large ones leave only loops: in between lies a Goldilocks range, and beyond the
cusp, where the diversity of all completions is highest, they repeat themselves more and more.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from jobs import melbo
from jobs.checks import at_least
from jobs.reading.behaviours import stored_means, stored_sayings
from jobs.scoring.goldilocks import Pick, bootstrap, curve, pick
from jobs.spec import Context, Metric, Outcome, Requirement, Row, Size

if TYPE_CHECKING:
    from jobs.engine.replica import Replica


@dataclass(frozen=True, slots=True, kw_only=True)
class Params:
    """Which set, at which norms.

    Attributes:
        learned: `jobs.melbo` with its parameters as JSON behind its name, such as
            `jobs.melbo{"radius_in": "calibrated"}`; its own radius does not matter.
        radii: The norms, in the unit that the set's `radius_in` says, rising.
        resamples: Sets that are drawn from the vectors with replacement, for the intervals.
    """

    learned: str = "jobs.melbo"
    radii: tuple[float, ...] = (0.03, 0.06, 0.12, 0.25, 0.5, 1.0)
    resamples: int = 1000

    def __post_init__(self) -> None:
        are_radii = all(0 < radius < math.inf for radius in self.radii)
        if len(self.radii) < 3 or not are_radii or list(self.radii) != sorted(set(self.radii)):
            raise ValueError(f"radii={self.radii}; it takes three or more finite ones above 0, rising")
        at_least(self, 100, "resamples")
        melbo.parse(self.learned)


METRICS = {
    "best_radius": Metric("as radius_in", "norm of highest diversity up to the cusp, on the split select"),
    "best_radius_low": Metric("as radius_in", "low end of its 95 % interval"),
    "best_radius_high": Metric("as radius_in", "high end of its 95 % interval"),
    "cusp": Metric("as radius_in", "norm of highest diversity_all, on the split select"),
    "cusp_low": Metric("as radius_in", "low end of its 95 % interval"),
    "cusp_high": Metric("as radius_in", "high end of its 95 % interval"),
    "diversity": Metric("1 - cosine", "that of the fluent completions at best_radius"),
    "diversity_random": Metric("1 - cosine", "the same of random vectors of that norm"),
    "regret": Metric("1 - cosine", "what it lacks to the highest diversity of any norm on this split"),
    "nll": Metric("nats/token", "of all completions at best_radius"),
}
PACK_BY = None
DATA: tuple[str, ...] = ()
LAYERS: tuple[str, ...] = ()
CONTROL = "random vectors"


def size(params: Params) -> Size:
    """Nothing runs on the model."""
    return Size(1, 1)


def requires(params: Params) -> Sequence[Requirement]:
    """The set at each norm, and random vectors at each."""
    return [*_sets(params), *_random(params)]


def _sets(params: Params) -> list[Requirement]:
    learned = melbo.parse(params.learned)
    return [
        Requirement(job="jobs.melbo", params=melbo.canonical(replace(learned, radius=radius)))
        for radius in params.radii
    ]


def _random(params: Params) -> list[Requirement]:
    return [melbo.random_of(each.params) for each in _sets(params)]


def control(params: Params) -> None:
    """It says nothing itself: the texts are those of the sets that it requires."""


def check(params: Params) -> None:
    """The prompts of the set can be read. Raises SpecError if not."""
    melbo.check(melbo.parse(params.learned))


def canonical(params: Params) -> Params:
    """The set's own radius does not matter, but it stands in a text and stays as it is."""
    return params


def run(replica: "Replica", rows: Sequence[Row], context: Context) -> Iterator[tuple[int, Outcome]]:
    """Choose a norm for each row's set.

    Table `items`: the curves; `item` is the number of the norm, `prompt` says it, `name` is a metric of
    `behaviours.METRICS`, and the same with `random_` before it for random vectors.
    """
    for index, row in enumerate(rows):
        yield index, _outcome(row.params, row.seed, context)


def _outcome(params: Params, seed: int, context: Context) -> Outcome:
    sets = [context.artifact(each) for each in _sets(params)]
    random = [context.artifact(each) for each in _random(params)]
    radii = np.array(params.radii)
    curves = [curve(*stored_sayings(each, "select")) for each in sets]
    chosen, drawn = pick(curves), bootstrap(curves, resamples=params.resamples, seed=seed)
    metrics = {
        split: {**_named(radii, chosen, drawn), **_at_best(sets, random, split, chosen.best)}
        for split in ("select", "report")
    }
    items = [
        item
        for split in ("select", "report")
        for number, radius in enumerate(params.radii)
        for head, artifact in (("", sets[number]), ("random_", random[number]))
        for item in _items(split, number, radius, head, stored_means(artifact, split))
    ]
    return Outcome(metrics=metrics, tables={"items": items})


def _named(radii: np.ndarray, chosen: Pick, drawn: Sequence[Pick]) -> dict[str, float]:
    found: dict[str, float] = {}
    for name, place, places in (
        ("best_radius", chosen.best, [each.best for each in drawn]),
        ("cusp", chosen.cusp, [each.cusp for each in drawn]),
    ):
        known = radii[[each for each in places if each is not None]]
        ends = np.quantile(known, [0.025, 0.975], method="nearest") if place is not None else (np.nan, np.nan)
        value = np.nan if place is None else float(radii[place])
        found |= {name: value, f"{name}_low": float(ends[0]), f"{name}_high": float(ends[1])}
    return found


def _at_best(
    sets: Sequence[Mapping[str, np.ndarray]],
    random: Sequence[Mapping[str, np.ndarray]],
    split: str,
    best: int | None,
) -> dict[str, float]:
    if best is None:
        return dict.fromkeys(("diversity", "diversity_random", "regret", "nll"), np.nan)
    every = [stored_means(each, split) for each in sets]
    diversity = np.array([each["diversity"] for each in every])
    return {
        "diversity": float(diversity[best]),
        "diversity_random": stored_means(random[best], split)["diversity"],
        "regret": float(np.nanmax(diversity) - diversity[best]) if np.isfinite(diversity).any() else np.nan,
        "nll": every[best]["nll"],
    }


def _items(
    split: str, number: int, radius: float, head: str, means: Mapping[str, float]
) -> Iterator[dict[str, Any]]:
    for name, value in means.items():
        yield {
            "split": split,
            "item": number,
            "prompt": f"R = {radius:g}",
            "name": head + name,
            "value": value,
        }

"""Fronts that are found when whole packs are proposed at once, beside those of Optuna's one by one.

Run by `python -m benchmarks.orchestrator`. Three packs are always under way, as with two workers and one
that waits for them, so that each is proposed without knowing what became of the two before.
"""

import math
import tempfile
from collections import deque
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import moocore
import numpy as np

from jobs.spec import Status
from orchestrator.sampler import OptunaSampler, Proposal
from orchestrator.scheduler import pack_limit
from search_spaces.base import Domain, Float, Grid, Int, Objective, Space

TRIALS, WORKERS, QUEUED, MAX_PACK, SEEDS = 300, 2, 1, 16, 10
Values = tuple[float, float]


class Problem(NamedTuple):
    """Two objectives to minimise.

    Attributes:
        parameters: What they depend on.
        values: The objectives.
        reference: Point that every front's hypervolume is measured from.
    """

    parameters: Mapping[str, Domain]
    values: Callable[[Mapping[str, Any]], Values]
    reference: Values


_NUMBERS = {name: Float(low=0.0, high=1.0) for name in "abcde"}
_ONE = np.array([0.2, 0.7, 0.4, 0.6, 0.3])
_OTHER = np.array([0.6, 0.3, 0.5, 0.2, 0.8])


def _vector(params: Mapping[str, Any]) -> np.ndarray:
    return np.array([params[name] for name in "abcde"])


def _zdt1(params: Mapping[str, Any]) -> Values:
    """From: E. Zitzler, K. Deb and L. Thiele, Evolutionary Computation 8 (2000), 173."""
    first, *others = _vector(params)
    height = 1 + 9 * float(np.mean(others))
    return float(first), height * (1 - math.sqrt(first / height))


def _two_centres(params: Mapping[str, Any]) -> Values:
    point = _vector(params)
    return float(((point - _ONE) ** 2).sum()), float(((point - _OTHER) ** 2).sum())


def _rugged(params: Mapping[str, Any]) -> Values:
    point = _vector(params)
    one = np.abs(point - 0.37).sum() + 0.3 * np.sin(20 * point).sum() + 1.5
    return float(one), float(((point - 0.7) ** 2).sum() + 0.1 * np.cos(15 * point).sum() + 0.5)


def _steering(params: Mapping[str, Any]) -> Values:
    """Like a search over layers: an effect that few layers have, and a harm that grows with the dose."""
    reach = (
        math.exp(-(((params["layer"] - 13) / 4) ** 2))
        * {"all": 1.0, "last": 0.7, "first": 0.2}[params["tokens"]]
    )
    dose = math.log10(params["dose"]) + 1
    return -reach * math.tanh(params["dose"] * params["sharpness"]), dose**2 * (1 + params["offset"])


PROBLEMS = {
    "zdt1": Problem(_NUMBERS, _zdt1, (1.1, 6.0)),
    "two centres": Problem(_NUMBERS, _two_centres, (1.0, 1.0)),
    "rugged": Problem(_NUMBERS, _rugged, (4.0, 2.0)),
    "steering": Problem(
        {
            "layer": Int(low=0, high=29),
            "tokens": Grid(["all", "last", "first"]),
            "dose": Float(low=0.01, high=10.0, log=True),
            "sharpness": Float(low=0.1, high=2.0),
            "offset": Float(low=0.0, high=1.0),
        },
        _steering,
        (0.0, 4.0),
    ),
}


def hypervolume(problem: Problem, *, seed: int, in_packs: bool) -> float:
    """Of the front after `TRIALS` trials, proposed pack by pack or one by one."""
    objectives = [Objective(metric=name, direction="minimize") for name in ("one", "other")]
    space = Space(
        description="A problem with a known shape.",
        job="benchmarks.nothing",
        parameters=dict(problem.parameters),
        objectives=objectives,
        sampler="tpe",
        trials=TRIALS,
    )
    found: list[Values] = []
    running: deque[list[Proposal]] = deque()
    with tempfile.TemporaryDirectory() as folder:
        sampler = OptunaSampler(space, name="tpe", seed=seed, journal=Path(folder) / "study", study="study")
        asked = 0
        while asked < TRIALS or running:
            if asked < TRIALS and len(running) < WORKERS + QUEUED:
                count = pack_limit(unasked=TRIALS - asked, workers=WORKERS, max_pack=MAX_PACK)
                asked += count
                running.append(
                    sampler.ask_together(count, ()) if in_packs else [sampler.ask() for _ in range(count)]
                )
                continue
            for proposal in running.popleft():
                values = problem.values(proposal.params)
                found.append(values)
                sampler.tell(proposal.trial, Status.COMPLETED, values)
    return float(moocore.hypervolume(np.array(found), ref=np.array(problem.reference)))


def measure() -> dict[str, dict[str, float]]:
    """Mean hypervolume and its standard error over the seeds, by problem."""
    result = {}
    for name, problem in PROBLEMS.items():
        packs, singles = (
            np.array([hypervolume(problem, seed=seed, in_packs=in_packs) for seed in range(SEEDS)])
            for in_packs in (True, False)
        )
        result[name] = {
            "in packs": float(packs.mean()),
            "error": float(packs.std(ddof=1) / math.sqrt(SEEDS)),
            "one by one": float(singles.mean()),
            "error, one by one": float(singles.std(ddof=1) / math.sqrt(SEEDS)),
            "ratio": float(packs.mean() / singles.mean()),
        }
    return result

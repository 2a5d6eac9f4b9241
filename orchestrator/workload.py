"""How much a sweep has to compute, counted on what its sampler would propose. No model, no clock."""

import tempfile
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from itertools import accumulate
from operator import mul
from pathlib import Path
from typing import NamedTuple

from jobs.resolve import load_job, make_params
from jobs.spec import Spec
from orchestrator.config import RunConfig
from orchestrator.intake import make_task
from orchestrator.planning import Planner, group_size
from orchestrator.sampler import OptunaSampler
from search_spaces.base import Space

_MOST_DRAWN = 512
"""Proposals that are counted. Whatever the second half of them adds, later ones are taken to add too."""


class Work(NamedTuple):
    """What a sweep computes with one job.

    Attributes:
        specs: How many specs; where stages let only a share pass, on average.
        first: How many of them trials wait for, and are none themselves.
        tokens: Tokens of all of them, as the job's `size` says.
        packs: Packs that they run in.
    """

    specs: float
    first: float
    tokens: float
    packs: float


class Workload(NamedTuple):
    """What a sweep has to compute.

    Attributes:
        works: Job -> what is computed with it.
        packs: Specs that ride together, of the trials that were drawn.
    """

    works: dict[str, Work]
    packs: list[list[Spec]]


class _Drawn(NamedTuple):
    """A spec, the number of the trial that first asks for it, and the share of such trials that get to it."""

    spec: Spec
    trial: int
    share: float


def tokens_of(spec: Spec) -> int:
    """Tokens of a spec, as its job's `size` says."""
    return load_job(spec.job).size(make_params(spec.job, spec.params)).tokens


def workload(space: Space, config: RunConfig, trials: int) -> Workload:
    """Count what a sweep has to compute.

    Args:
        space: What is tried.
        config: How it is run.
        trials: Number of trials.
    """
    planner = Planner(space, config)
    shares = list(accumulate((stage.keep for stage in space.stages), mul, initial=1.0))
    found: dict[str, _Drawn] = {}
    packs: list[list[_Drawn]] = []
    trial = 0
    for group in _groups(space, config, planner, trials):
        together: defaultdict[tuple[int, str], list[_Drawn]] = defaultdict(list)
        for own in group:
            for stage, (spec, share) in enumerate(zip(planner.stages(own), shares, strict=True)):
                for need in required(planner, spec):
                    found.setdefault(need.id, _Drawn(need, trial, share))
                if spec.id not in found:
                    found[spec.id] = _Drawn(spec, trial, share)
                    key = make_task(spec, (), is_trial=True).pack_key
                    together[stage, key or spec.id].append(found[spec.id])
            trial += 1
        packs += together.values()
    packed = {drawn.spec.id for pack in packs for drawn in pack}
    works = {}
    for job in {drawn.spec.job for drawn in found.values()}:
        of_job = [drawn for drawn in found.values() if drawn.spec.job == job]
        first = _all([(drawn, 1.0) for drawn in of_job if drawn.spec.id not in packed], trial, trials)
        works[job] = Work(
            specs=_all([(drawn, 1.0) for drawn in of_job], trial, trials),
            first=first,
            tokens=_all([(drawn, tokens_of(drawn.spec)) for drawn in of_job], trial, trials),
            packs=_all([(pack[0], 1.0) for pack in packs if pack[0].spec.job == job], trial, trials)
            + first / _rows_together(job, first, config),
        )
    return Workload(works, [[drawn.spec for drawn in pack] for pack in packs])


def _groups(space: Space, config: RunConfig, planner: Planner, trials: int) -> Iterator[list[Spec]]:
    """Trials that would be asked for together, as a sampler proposes them that knows no result yet."""
    name = "grid" if (config.sampler or space.sampler) == "grid" else "random"
    with tempfile.TemporaryDirectory() as folder:
        journal = Path(folder) / "study"
        sampler = OptunaSampler(space, name=name, seed=config.seed, journal=journal, study="plan")
        drawn = min(trials, _MOST_DRAWN)
        left = drawn
        while left:
            count = min(left, group_size(space, config, unasked=trials - (drawn - left)))
            left -= count
            yield [planner.spec(each.params) for each in sampler.ask_together(count, planner.shared())]


def required(planner: Planner, spec: Spec) -> Iterator[Spec]:
    """All that has to be computed before a spec, in an order in which it can be."""
    for need in planner.needs(spec).values():
        yield from required(planner, need)
        yield need


def _all(amounts: Sequence[tuple[_Drawn, float]], drawn: int, trials: int) -> float:
    """The sum of amounts over all trials, of which some were drawn."""
    late = _sum((each, amount) for each, amount in amounts if each.trial >= drawn // 2)
    return _sum(amounts) + late * (trials - drawn) / (drawn - drawn // 2)


def _sum(amounts: Iterable[tuple[_Drawn, float]]) -> float:
    return sum(drawn.share * amount for drawn, amount in amounts)


def _rows_together(job: str, specs: float, config: RunConfig) -> float:
    """Rows of a pack of prerequisites: they are shared out among the workers."""
    return 1.0 if load_job(job).PACK_BY is None else min(config.max_pack, max(1.0, specs / config.workers))

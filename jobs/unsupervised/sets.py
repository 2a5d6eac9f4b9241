"""The sets of vectors that the rows of a pack ask for, learned in shared batches.

V vectors, N prompts, T tokens, D hidden.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from torch import Tensor
from torch.nn.functional import cosine_similarity

from jobs.engine.replica import Replica
from jobs.spec import Row, content_hash
from jobs.unsupervised.effects import Effects, effects
from jobs.unsupervised.ground import Ground
from jobs.unsupervised.landscape import Goal
from jobs.unsupervised.learned import Learned
from jobs.unsupervised.objective import NormOver
from jobs.unsupervised.params import TOGETHER, Learning
from jobs.unsupervised.search import Method, Search, learn, start_of
from jobs.unsupervised.span import activation_span, share_within


class VectorSet(NamedTuple):
    """The vectors of a row.

    Attributes:
        learned: As they were learned.
        radius: Their norm, in stream units.
        effects: What they do to the prompts that they were learned from; None where a vector is not finite.
        on_manifold_V: Each vector's share of squared norm in the span of the counted tokens' activations.
        on_manifold_random: That share of random vectors, in the mean: directions of the span over D.
        start_cosine: Mean cosine between a vector and its start.
    """

    learned: Learned
    radius: float
    effects: Effects | None
    on_manifold_V: Tensor
    on_manifold_random: float
    start_cosine: float

    @property
    def is_whole(self) -> bool:
        """Whether every vector is finite."""
        return self.effects is not None

    @property
    def is_nothing(self) -> bool:
        """Whether a vector changes nothing at all, as one does that is lost in the rounding of the states."""
        return self.effects is not None and not bool(self.effects.objectives_V.all())


def learn_sets(
    replica: Replica, prompts: Sequence[Sequence[Sequence[int]]], rows: Sequence[Row], units: Sequence[float]
) -> list[VectorSet]:
    """The vectors of every row; what a row learns does not depend on the others, but for rounding.

    Args:
        replica: The model.
        prompts: For each row the token ids of the prompts that it learns from.
        rows: Their params are `Learning`.
        units: What a radius of 1 means to each of them, in stream units.

    Raises:
        SpecError: If a layer or a token does not exist, or so many vectors do not.
        ModelError: If the blocks cannot run alone.
        OutOfMemory: If a single vector on a single prompt does not fit.
    """
    together: dict[tuple[Any, ...], list[int]] = {}
    for index, row in enumerate(rows):
        together.setdefault(tuple(getattr(row.params, name) for name in TOGETHER), []).append(index)
    found: dict[int, VectorSet] = {}
    for indices in together.values():
        texts = {tuple(ids): None for index in indices for ids in prompts[index]}
        ground = _ground(replica, tuple(texts), rows[indices[0]].params)
        numbers = {ids: number for number, ids in enumerate(texts)}
        searches = [
            _search(ground, rows[index], units[index], tuple(numbers[tuple(ids)] for ids in prompts[index]))
            for index in indices
        ]
        found |= zip(indices, _learned(ground, searches, rows[indices[0]].params), strict=True)
    return [found[index] for index in range(len(rows))]


def _ground(replica: Replica, prompts: tuple[tuple[int, ...], ...], params: Learning) -> Ground:
    place = {name: getattr(params, name) for name in ("source", "target", "counted", "last")}
    key = (__name__, prompts, *place.values(), params.target_site)
    return replica.keep(key, lambda: Ground(replica, prompts, site=params.target_site, **place))


def _learned(ground: Ground, searches: Sequence[Search], params: Learning) -> list[VectorSet]:
    """The sets of rows that agree in `TOGETHER`."""
    method = Method(
        optimiser=params.optimiser,
        steps=params.most_steps,
        tolerance=params.tolerance,
        learning_rate=params.learning_rate,
    )
    learned = learn(ground.slice_, ground.counted_NT, searches, method, over=params.norm_over)
    return [
        _set(ground, search, each, params.norm_over) for search, each in zip(searches, learned, strict=True)
    ]


def _search(ground: Ground, row: Row, unit: float, prompts: tuple[int, ...]) -> Search:
    params: Learning = row.params
    goal = Goal(radius=params.radius * unit, power=params.power, root=params.root, prompts=prompts)
    counted_NT = ground.counted(prompts)
    search = Search(
        vectors=params.vectors,
        goal=goal,
        orthogonality=params.orthogonality,
        apart=params.apart,
        contrast=params.contrast,
        within_KD=activation_span(ground.slice_, counted_NT, params.span) if params.span else None,
        seed=_seed(row.seed, params.draw),
    )
    if params.start == "random":
        return search
    search.check(ground.slice_.inputs_NTD.shape[-1])
    return replace(search, start_VD=ground.jacobian(params.vectors, prompts))


def _seed(seed: int, draw: int) -> int:
    """That of a draw; of the first one the row's own."""
    return seed if draw == 0 else int(content_hash([seed, draw])[:8], 16)


def _set(ground: Ground, search: Search, learned: Learned, over: NormOver) -> VectorSet:
    done = None
    if bool(learned.theta_VD.isfinite().all()):
        done = effects(ground.slice_, ground.counted_NT, learned.theta_VD, search.goal, over=over)
    span_KD = activation_span(ground.slice_, ground.counted(search.goal.prompts))
    shares_V = share_within(learned.theta_VD, span_KD)
    kept_V = cosine_similarity(learned.theta_VD, start_of(ground.slice_, search)).double()
    expected = len(span_KD) / span_KD.shape[1]
    return VectorSet(learned, search.goal.radius, done, shares_V, expected, float(kept_V.mean()))

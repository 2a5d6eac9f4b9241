"""Learn the vectors of many trials at once, on one slice.

V vectors, N prompts, T tokens, D hidden.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from jobs.engine.slices import Slice
from jobs.errors import SpecError
from jobs.unsupervised.amsgrad import amsgrad
from jobs.unsupervised.coupling import Coupling
from jobs.unsupervised.fixed_point import fixed_point
from jobs.unsupervised.landscape import Goal, Landscape
from jobs.unsupervised.learned import Learned
from jobs.unsupervised.objective import NormOver
from jobs.unsupervised.sphere import Surface, orthonormal

Orthogonality = Literal["joint", "sequential", "soft_vectors", "soft_deltas", "none"]
Optimiser = Literal["fixed_point", "amsgrad", "none"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Search:
    """The vectors of one trial.

    Attributes:
        vectors: How many, at least 1.
        goal: What each is to maximise.
        orthogonality: `joint`: all at right angles, learned together. `sequential`: each at right angles to
            those before it, learned one after another, as the original does. `soft_vectors`, `soft_deltas`:
            learned together, with a penalty where two vectors, or their changes of the target, are not.
            `none`.
        apart: Weight of that penalty, at least 0; see `Coupling`.
        contrast: Weight of the contrastive term; see `Coupling`.
        within_KD: Rows, orthonormal, that span what the vectors lie in; None takes the whole space.
        start_VD: Directions that the vectors start from; None draws them.
        seed: Of the vectors that are drawn.
    """

    vectors: int
    goal: Goal
    orthogonality: Orthogonality = "joint"
    apart: float = 1.0
    contrast: float = 0.0
    within_KD: Tensor | None = None
    start_VD: Tensor | None = None
    seed: int = 0

    @property
    def surface(self) -> Surface:
        """Where each vector may lie by itself."""
        return Surface(radius=self.goal.radius, within_KD=self.within_KD)

    @property
    def start_surface(self) -> Surface:
        """Where the vectors start."""
        return replace(self.surface, orthogonal=self.orthogonality in ("joint", "sequential"))

    @property
    def rounds(self) -> int:
        """How many times vectors of it are learned, one after another."""
        return self.vectors if self.orthogonality == "sequential" else 1

    @property
    def coupling(self) -> Coupling | None:
        """How the objectives depend on each other; None if they do not."""
        soft = {
            f"apart_{of}": self.apart for of in ("vectors", "deltas") if self.orthogonality == f"soft_{of}"
        }
        if not soft and not self.contrast:
            return None
        return Coupling(vectors=tuple(range(self.vectors)), contrast=self.contrast, **soft)

    def check(self, hidden: int) -> None:
        """Raises SpecError if there are no such vectors in `hidden` dimensions."""
        self.start_surface.check(self.vectors, hidden)
        if self.contrast and self.orthogonality == "sequential":
            raise SpecError(
                f"contrast={self.contrast} with orthogonality='sequential'; it compares vectors that are "
                "learned together"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class Method:
    """How vectors are learned.

    Attributes:
        optimiser: `fixed_point`, `amsgrad`, or `none`: the vectors that the others start from.
        steps: Most steps of each vector.
        tolerance: Relative rise of the objective at which the fixed point has settled.
        learning_rate: Of AMSGrad, in residual-stream units an element and step.
    """

    optimiser: Optimiser = "fixed_point"
    steps: int = 60
    tolerance: float = 1e-4
    learning_rate: float = 1e-3


def learn(
    slice_: Slice,
    counted_NT: Tensor,
    searches: Sequence[Search],
    method: Method,
    *,
    over: NormOver = "hidden",
) -> list[Learned]:
    """The vectors of every trial, in batches of all of them.

    What a trial learns does not depend on the others.

    Args:
        slice_: The blocks, and the prompts.
        counted_NT: Which tokens count, bool.
        searches: The trials.
        method: How they are learned.
        over: What the norm of the objective is taken over.

    Raises:
        SpecError: If a radius is not above 0, so many orthogonal vectors do not exist, or a trial cannot be
            meant.
        OutOfMemory: If a single vector on a single prompt does not fit.
    """
    hidden = slice_.inputs_NTD.shape[-1]
    for search in searches:
        search.check(hidden)
    starts = [start_of(slice_, search) for search in searches]
    rounds = max(search.rounds for search in searches)
    found: list[list[Learned]] = [[] for _ in searches]
    for number in range(rounds):
        parts = [
            _part(place, searches[place], starts[place], found[place], number)
            for place in range(len(searches))
            if number < searches[place].rounds
        ]
        for part, learned in zip(parts, _learned(slice_, counted_NT, parts, method, over), strict=True):
            found[part.place].append(learned)
    return [_joined(each) for each in found]


class _Part(NamedTuple):
    """Vectors of one trial that are learned in one round.

    Attributes:
        place: Which trial.
        goal: What each is to maximise.
        start_VD: Where they start.
        groups: Those that are learned together, by their place in `start_VD`, and where they may lie.
        kin: Those that may lead each other.
        coupling: How their objectives depend on each other.
    """

    place: int
    goal: Goal
    start_VD: Tensor
    groups: list[tuple[list[int], Surface]]
    kin: list[int]
    coupling: Coupling | None


def start_of(slice_: Slice, search: Search) -> Tensor:
    """Where a search's vectors start, shape (V, D); sequential ones each before it is set at right angles."""
    hidden = slice_.inputs_NTD.shape[-1]
    surface = search.start_surface
    if search.start_VD is None:
        return surface.drawn(search.vectors, hidden, search.seed).to(slice_.wide)
    return surface.onto(search.start_VD.to(slice_.wide))


def _part(place: int, search: Search, start_VD: Tensor, before: Sequence[Learned], number: int) -> _Part:
    surface, everyone = search.surface, list(range(search.vectors))
    match search.orthogonality:
        case "joint":
            groups = [(everyone, replace(surface, orthogonal=True))]
        case "sequential":
            known = [each.theta_VD for each in before if bool(each.theta_VD.isfinite().all())]
            if known:
                surface = replace(surface, without_KD=orthonormal(torch.cat(known)))
            groups, start_VD = [([0], surface)], surface.onto(start_VD[[number]])
        case _ if search.coupling is not None:
            groups = [(everyone, surface)]
        case _:
            groups = [([vector], surface) for vector in everyone]
    is_quadratic = search.goal.power == 2 and search.goal.root == 1
    kin = everyone if is_quadratic and len(groups) == len(everyone) > 1 else []
    return _Part(place, search.goal, start_VD, groups, kin, search.coupling)


def _learned(
    slice_: Slice, counted_NT: Tensor, parts: Sequence[_Part], method: Method, over: NormOver
) -> list[Learned]:
    """What each part learns, in batches of all of them."""
    sizes = [len(part.start_VD) for part in parts]
    goals = [part.goal for part, size in zip(parts, sizes, strict=True) for _ in range(size)]
    firsts = [sum(sizes[:place]) for place in range(len(parts))]
    groups = [
        ([first + vector for vector in vectors], surface)
        for part, first in zip(parts, firsts, strict=True)
        for vectors, surface in part.groups
    ]
    couplings = [
        replace(part.coupling, vectors=tuple(first + vector for vector in part.coupling.vectors))
        for part, first in zip(parts, firsts, strict=True)
        if part.coupling is not None
    ]
    landscape = Landscape(slice_, counted_NT, goals, over=over, couplings=couplings)
    start_VD = torch.cat([part.start_VD for part in parts])
    match method.optimiser:
        case "fixed_point":
            kin = [[first + vector for vector in part.kin] for part, first in zip(parts, firsts, strict=True)]
            learned = fixed_point(
                *(landscape, start_VD, groups),
                kin=list(filter(None, kin)),
                steps=method.steps,
                tolerance=method.tolerance,
            )
        case "amsgrad":
            learned = amsgrad(
                landscape, start_VD, groups, steps=method.steps, learning_rate=method.learning_rate
            )
        case "none":
            learned = amsgrad(landscape, start_VD, groups, steps=0)
    return [
        Learned(
            learned.theta_VD[first : first + size],
            learned.values_V[first : first + size],
            _taken(learned.history_SV[:, first : first + size]),
            learned.settled_V[first : first + size],
            learned.finite_V[first : first + size],
        )
        for first, size in zip(firsts, sizes, strict=True)
    ]


def _taken(history_SV: Tensor) -> Tensor:
    """The steps that any of these vectors took."""
    steps = history_SV.isfinite().any(dim=1).nonzero()[:, 0]
    return history_SV[: int(steps.max()) + 1 if len(steps) else 0]


def _joined(parts: Sequence[Learned]) -> Learned:
    """Vectors that were learned one after another, as if together; histories end in NaN."""
    steps = max(len(part.history_SV) for part in parts)
    padded = [
        torch.nn.functional.pad(part.history_SV, (0, 0, 0, steps - len(part.history_SV)), value=torch.nan)
        for part in parts
    ]
    return Learned(
        torch.cat([part.theta_VD for part in parts]),
        torch.cat([part.values_V for part in parts]),
        torch.cat(padded, dim=1),
        torch.cat([part.settled_V for part in parts]),
        torch.cat([part.finite_V for part in parts]),
    )

"""Maximise on a sphere by putting each vector where its gradient points: theta <- R g / |g|.

At a maximum on the sphere the gradient is parallel to the vector, so that this is a fixed point. For p = 2,
q = 1 and a linear slice it is power iteration for the Jacobian's first right singular vector. An orthogonal
set goes where the sum of its inner products with the gradients is largest, which raises any convex sum.
V vectors, S steps, D hidden.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from jobs.unsupervised.landscape import Climb, Landscape
from jobs.unsupervised.learned import Learned
from jobs.unsupervised.sphere import Surface

_SHORTEST = 2.0**-6
"""Of a whole step; a group that does not rise by a shorter one has settled."""


def fixed_point(
    landscape: Landscape,
    start_VD: Tensor,
    groups: Sequence[tuple[Sequence[int], Surface]],
    *,
    steps: int = 60,
    tolerance: float = 1e-4,
) -> Learned:
    """Vectors of locally greatest objective.

    A step that lowers the sum of a group's objectives is taken back, and one half as long is tried, from the
    best point towards its gradient; after one that rises the next is twice as long, up to a whole one. A
    group has settled once a whole step raises the sum by less than `tolerance` of it, or no step of 1/64
    raises it.

    Args:
        landscape: The goals.
        start_VD: Where the vectors start, on their surfaces.
        groups: Vectors that share a surface; each vector in one group.
        steps: Most looks at each vector, at least 1.
        tolerance: Least relative rise, above 0.

    Raises:
        OutOfMemory: If a single vector on a single prompt does not fit.
    """
    climbers = [_Climber(list(vectors), surface, start_VD[list(vectors)]) for vectors, surface in groups]
    history: list[Tensor] = []
    while len(history) < steps and (moving := [each for each in climbers if each.moves]):
        vectors = [vector for climber in moving for vector in climber.vectors]
        found = landscape.climb(torch.cat([climber.next_VD for climber in moving]), vectors)
        values_V = start_VD.new_full((len(start_VD),), torch.nan)
        values_V[vectors] = found.values_V
        history.append(values_V)
        parts = [len(climber.vectors) for climber in moving]
        for climber, values, gradients in zip(
            moving, found.values_V.split(parts), found.gradients_VD.split(parts), strict=True
        ):
            climber.take(Climb(values, gradients), tolerance)
    return _learned(climbers, start_VD, torch.stack(history))


def _learned(climbers: Sequence["_Climber"], start_VD: Tensor, history_SV: Tensor) -> Learned:
    number = len(start_VD)
    learned = Learned(
        torch.full_like(start_VD, torch.nan),
        start_VD.new_full((number,), torch.nan),
        history_SV,
        torch.zeros(number, dtype=torch.bool),
        torch.zeros(number, dtype=torch.bool),
    )
    for climber in climbers:
        for vector, (theta_D, value) in climber.ended.items():
            learned.theta_VD[vector], learned.values_V[vector] = theta_D, value
        learned.theta_VD[climber.vectors] = climber.best_VD
        learned.values_V[climber.vectors] = climber.values_V
        learned.settled_V[climber.vectors] = climber.settled
        learned.finite_V[climber.vectors] = True
    return learned


class _Climber:
    """A group on its way up.

    Attributes:
        vectors: Those that are still finite.
        next_VD: Where to look next.
        best_VD: The highest point so far; NaN before the first look, as `values_V`.
        values_V: The objectives there.
        ended: Of those that are not, the last point where they were, and its objective.
        settled: Whether the summit is reached.
    """

    def __init__(self, vectors: list[int], surface: Surface, start_VD: Tensor) -> None:
        self.vectors = vectors
        self.next_VD = start_VD
        self.best_VD = torch.full_like(start_VD, torch.nan)
        self.values_V = start_VD.new_full((len(vectors),), torch.nan)
        self.ended: dict[int, tuple[Tensor, Tensor]] = {}
        self.settled = False
        self._surface = surface
        self._gradients_VD = torch.zeros_like(start_VD)
        self._length = 1.0

    @property
    def moves(self) -> bool:
        """Whether there is anything left to look at."""
        return bool(self.vectors) and not self.settled

    def take(self, found: Climb, tolerance: float) -> None:
        """Go on from what was found at `next_VD`."""
        found = self._without_broken(found)
        if not self.vectors:
            return
        before, after = float(self.values_V.sum()), float(found.values_V.sum())
        if after < before:
            self._length /= 2
            self.settled = self._length < _SHORTEST
        else:
            # The first look has nothing to compare with: `before` is NaN.
            self.settled = self._length == 1 and after - before < tolerance * abs(after)
            self._length = min(1.0, 2 * self._length)
            self.best_VD, self.values_V, self._gradients_VD = self.next_VD, *found
        self.next_VD = self._step()

    def _step(self) -> Tensor:
        ahead_VD = self._surface.onto(self._gradients_VD)
        return self._surface.onto((1 - self._length) * self.best_VD + self._length * ahead_VD)

    def _without_broken(self, found: Climb) -> Climb:
        """What was found for finite vectors; the others leave the group."""
        finite_V = found.values_V.isfinite() & found.gradients_VD.isfinite().all(dim=1)
        if bool(finite_V.all()):
            return found
        for place in (~finite_V).nonzero()[:, 0].tolist():
            self.ended[self.vectors[place]] = (self.best_VD[place], self.values_V[place])
        self.vectors = [v for v, finite in zip(self.vectors, finite_V.tolist(), strict=True) if finite]
        self.next_VD, self.best_VD = self.next_VD[finite_V], self.best_VD[finite_V]
        self.values_V, self._gradients_VD = self.values_V[finite_V], self._gradients_VD[finite_V]
        return Climb(found.values_V[finite_V], found.gradients_VD[finite_V])

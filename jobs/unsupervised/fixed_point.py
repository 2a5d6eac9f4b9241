"""Maximise on a sphere by putting each vector where its gradient points: theta <- R g / |g|.

At a maximum on the sphere the gradient is parallel to the vector, so that this is a fixed point. For p = 2,
q = 1 and a linear slice it is power iteration for the Jacobian's first right singular vector. An orthogonal
set goes where the sum of its inner products with the gradients is largest, which raises any convex sum.

A random start says little about where it is high, and on which side. So the first step of vectors that may
be led by each other goes where power iteration would go that had only their first gradients to judge by, and
the first step of any vector goes to the higher of its two ends.
V vectors, K of them, S steps, D hidden.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from jobs.unsupervised.landscape import Climb, Landscape
from jobs.unsupervised.learned import Learned
from jobs.unsupervised.sphere import Surface

_SHORTEST, _LONGEST = 2.0**-6, 1.3
"""Of a whole step; a group that does not rise by a shorter one has settled. A longer one makes up for slow
convergence: it weakens the second of two directions that compete."""
_AHEAD = 3
"""Power iterations in what the first look has shown."""


def fixed_point(
    landscape: Landscape,
    start_VD: Tensor,
    groups: Sequence[tuple[Sequence[int], Surface]],
    *,
    kin: Sequence[Sequence[int]] = (),
    steps: int = 60,
    tolerance: float = 1e-4,
) -> Learned:
    """Vectors of locally greatest objective.

    A step that lowers the sum of a group's objectives is taken back, and one half as long is tried, from the
    best point towards its gradient; after one that rises the next is twice as long, up to 1.3 of a whole one.
    A group has settled once a whole step raises the sum by less than `tolerance` of it, or no step of 1/64
    raises it. Where the objective of a vector is not finite any more it keeps its last point; a group at
    right angles ends there as a whole.

    Args:
        landscape: The goals.
        start_VD: Where the vectors start, on their surfaces.
        groups: Vectors that share a surface; each vector in one group.
        kin: Vectors that lead each other's first step: of one goal with p = 2 and q = 1, which is quadratic
            near zero, and each in a group of its own.
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
        if len(history) == 1:
            surfaces = {vector: surface for vectors, surface in groups for vector in vectors}
            led = [(list(vectors), surfaces[vectors[0]]) for vectors in kin]
            found = found._replace(gradients_VD=_led(start_VD, found.gradients_VD, led))
        parts = [len(climber.vectors) for climber in moving]
        for climber, values, gradients in zip(
            moving, found.values_V.split(parts), found.gradients_VD.split(parts), strict=True
        ):
            climber.take(Climb(values, gradients), tolerance)
        if len(history) == 1:
            _choose_ends(landscape, [climber for climber in climbers if climber.moves])
    return _learned(climbers, start_VD, torch.stack(history))


def _led(start_VD: Tensor, gradients_VD: Tensor, kin: Sequence[tuple[list[int], Surface]]) -> Tensor:
    """Gradients at the start, those of kin turned to where power iteration leads from all that they show."""
    led_VD = gradients_VD.clone()
    for vectors, surface in kin:
        if bool(gradients_VD[vectors].isfinite().all()):
            images_KD = surface.flat(gradients_VD[vectors])
            led_VD[vectors] = sketched_power(start_VD[vectors], images_KD, times=_AHEAD)
    return led_VD


def sketched_power(points_KD: Tensor, images_KD: Tensor, *, times: int) -> Tensor:
    """Directions of the images after further products with the operator that made them of the points.

    The operator is taken to be symmetric without negative eigenvalues, and to be no more than the images
    show: M ~ Y^T (X Y^T)^-1 Y for the images Y of the points X, as rows. A single image stays as it is.

    Args:
        points_KD: What it was applied to, shape (K, D), of any norm.
        images_KD: What it made of them, shape (K, D).
        times: Further products, at least 1.

    Returns:
        Unit vectors, shape (K, D), of the images' dtype.

    Sources: the Nyström approximation, Halko et al. 2011 (arXiv:0909.4061), section 5.4.
    """
    images = images_KD.double()
    core_KK = points_KD.double() @ images.T
    values_K, vectors_KK = torch.linalg.eigh((core_KK + core_KK.T) / 2)
    kept_K = values_K > _SMALLEST * values_K.max()
    inverse_KK = vectors_KK[:, kept_K] / values_K[kept_K] @ vectors_KK[:, kept_K].T
    ahead_KD = images
    for _ in range(times):
        ahead_KD = torch.nn.functional.normalize(ahead_KD @ images.T @ inverse_KK @ images, dim=-1)
    return ahead_KD.to(images_KD)


_SMALLEST = 1e-3
"""Eigenvalues below this share of the largest are noise."""


def _choose_ends(landscape: Landscape, climbers: Sequence["_Climber"]) -> None:
    """Turn those about whose next point is lower than the one opposite, unless others depend on them."""
    climbers = [each for each in climbers if not landscape.is_coupled(each.vectors[0])]
    if not climbers:
        return
    vectors = [vector for climber in climbers for vector in climber.vectors]
    next_VD = torch.cat([climber.next_VD for climber in climbers])
    turned_V = landscape.values(-next_VD, vectors) > landscape.values(next_VD, vectors)
    for climber, turned in zip(
        climbers, turned_V.split([len(climber.vectors) for climber in climbers]), strict=True
    ):
        climber.turn(turned)


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
        learned.finite_V[climber.vectors] = not climber.is_over
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
        is_over: Whether it ended as a whole because one of its vectors did.
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
        self.is_over = False

    @property
    def moves(self) -> bool:
        """Whether there is anything left to look at."""
        return bool(self.vectors) and not self.settled and not self.is_over

    def take(self, found: Climb, tolerance: float) -> None:
        """Go on from what was found at `next_VD`."""
        finite_V = found.values_V.isfinite() & found.gradients_VD.isfinite().all(dim=1)
        is_whole = bool(finite_V.all())
        if not is_whole and self._surface.orthogonal and bool(self.values_V.isfinite().all()):
            self.is_over = (
                True  # where all were finite they stand at right angles, and further on nobody knows
            )
            return
        if not is_whole:
            found = self._without_broken(found, finite_V)
        if not self.vectors:
            return
        before, after = float(self.values_V.sum()), float(found.values_V.sum())
        if after < before:
            self._length /= 2
            self.settled = self._length < _SHORTEST
        else:
            # The first look has nothing to compare with: `before` is NaN.
            self.settled = self._length >= 1 and after - before < tolerance * abs(after)
            self._length = 1.0 if math.isnan(before) else min(_LONGEST, 2 * self._length)
            self.best_VD, self.values_V, self._gradients_VD = self.next_VD, *found
        self.next_VD = self._step()

    def turn(self, turned_V: Tensor) -> None:
        """Have some vectors go the opposite way."""
        signs_V1 = torch.where(turned_V, -1.0, 1.0)[:, None].to(self.next_VD)
        self.next_VD = self.next_VD * signs_V1
        self._gradients_VD = self._gradients_VD * signs_V1

    def _step(self) -> Tensor:
        # A gradient that rounding has left nothing of leads nowhere.
        led_V1 = self._gradients_VD.any(dim=1, keepdim=True)
        ahead_VD = self._surface.onto(torch.where(led_V1, self._gradients_VD, self.best_VD))
        return self._surface.onto((1 - self._length) * self.best_VD + self._length * ahead_VD)

    def _without_broken(self, found: Climb, finite_V: Tensor) -> Climb:
        """What was found for finite vectors; the others leave the group."""
        for place in (~finite_V).nonzero()[:, 0].tolist():
            self.ended[self.vectors[place]] = (self.best_VD[place], self.values_V[place])
        self.vectors = [v for v, finite in zip(self.vectors, finite_V.tolist(), strict=True) if finite]
        self.next_VD, self.best_VD = self.next_VD[finite_V], self.best_VD[finite_V]
        self.values_V, self._gradients_VD = self.values_V[finite_V], self._gradients_VD[finite_V]
        return Climb(found.values_V[finite_V], found.gradients_VD[finite_V])

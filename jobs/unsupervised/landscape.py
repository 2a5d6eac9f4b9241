"""What is maximised over perturbations, and its gradient, for many of them at once.

V vectors, B rows (a vector on a prompt), T tokens, D hidden.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from jobs.engine.slices import Slice
from jobs.unsupervised.coupling import Coupling
from jobs.unsupervised.objective import NormOver, movement
from jobs.unsupervised.passes import Passes


@dataclass(frozen=True, slots=True, kw_only=True)
class Goal:
    """What one vector is to maximise: the sum of `objective.movement` over its prompts.

    Attributes:
        radius: R, the norm of the vector, in residual-stream units; above 0.
        power: p, at least 1.
        root: q, at least 1.
        prompts: Which of the slice's prompts.
    """

    radius: float
    power: float = 2.0
    root: float = 1.0
    prompts: tuple[int, ...] = (0,)


class Climb(NamedTuple):
    """One look at some vectors.

    Attributes:
        values_V: The objective of each.
        gradients_VD: The gradient of the sum of the objectives.
    """

    values_V: Tensor
    gradients_VD: Tensor


class _Row(NamedTuple):
    """A vector, by its place among those that are looked at, on a prompt."""

    place: int
    prompt: int


class Landscape:
    """The goals of many vectors on one slice.

    Args:
        slice_: The blocks between source and target, and the prompts.
        counted_NT: Which tokens of each prompt count, bool; padding does not.
        goals: One a vector.
        over: What the norm is taken over.
        couplings: Sets of vectors whose objectives depend on each other; a vector is in one at most, and
            those of a set have the same prompts. What their targets do is then held at once.

    Attributes:
        goals: As given.
    """

    def __init__(
        self,
        slice_: Slice,
        counted_NT: Tensor,
        goals: Sequence[Goal],
        *,
        over: NormOver = "hidden",
        couplings: Sequence[Coupling] = (),
    ) -> None:
        self.goals = goals
        self._slice = slice_
        self._counted_NT = counted_NT
        self._over = over
        self._couplings = couplings
        self._passes = Passes(slice_)

    def is_coupled(self, vector: int) -> bool:
        """Whether a vector's objective depends on others."""
        return any(vector in coupling.vectors for coupling in self._couplings)

    @torch.no_grad()
    def values(self, theta_VD: Tensor, vectors: Sequence[int]) -> Tensor:
        """The objectives of some vectors that do not depend on each other; arguments as for `climb`."""
        rows = self._rows(vectors)
        values_V = theta_VD.new_zeros(len(theta_VD))

        def look(chosen: list[int]) -> None:
            batch = [rows[index] for index in chosen]
            theta_BD = theta_VD[[row.place for row in batch]]
            values_B = self._values(self._deltas(theta_BD, batch), batch, vectors)
            values_V.index_add_(0, _places(batch, theta_VD), values_B)

        self._passes.over(len(rows), look)
        return values_V

    def climb(self, theta_VD: Tensor, vectors: Sequence[int]) -> Climb:
        """The objectives of some vectors and their gradient.

        Args:
            theta_VD: The vectors, float32 or wider.
            vectors: Which goal each one has.

        Raises:
            OutOfMemory: If a single row does not fit.
        """
        rows = self._rows(vectors)
        if self._couplings:
            return self._climb_together(theta_VD, vectors, rows)
        found = Climb(theta_VD.new_zeros(len(theta_VD)), torch.zeros_like(theta_VD))

        def look(chosen: list[int]) -> None:
            batch = [rows[index] for index in chosen]
            with torch.enable_grad():
                theta_BD = theta_VD[[row.place for row in batch]].requires_grad_()
                values_B = self._values(self._deltas(theta_BD, batch), batch, vectors)
                (gradients_BD,) = torch.autograd.grad(values_B.sum(), theta_BD)
            found.values_V.index_add_(0, _places(batch, theta_VD), values_B.detach())
            found.gradients_VD.index_add_(0, _places(batch, theta_VD), gradients_BD)

        self._passes.over(len(rows), look)
        return found

    def _rows(self, vectors: Sequence[int]) -> list[_Row]:
        return [
            _Row(place, prompt)
            for place, vector in enumerate(vectors)
            for prompt in self.goals[vector].prompts
        ]

    def _climb_together(self, theta_VD: Tensor, vectors: Sequence[int], rows: Sequence[_Row]) -> Climb:
        """In two passes: what all targets do, then its gradient, a batch at a time."""
        _, tokens, hidden = self._slice.targets_NTD.shape
        deltas_RTD = theta_VD.new_empty((len(rows), tokens, hidden))

        @torch.no_grad()
        def look(chosen: list[int]) -> None:
            batch = [rows[index] for index in chosen]
            deltas_RTD[chosen] = self._deltas(theta_VD[[row.place for row in batch]], batch)

        self._passes.over(len(rows), look)
        with torch.enable_grad():
            deltas_RTD, theta_VD = deltas_RTD.requires_grad_(), theta_VD.detach().requires_grad_()
            values_R = self._values(deltas_RTD, rows, vectors)
            values_V = theta_VD.new_zeros(len(theta_VD)).index_add(0, _places(rows, theta_VD), values_R)
            finite_V = values_V.isfinite()
            # One that is not finite would spoil the gradient of the others through the set's factor.
            values_V = torch.where(finite_V, values_V, 0.0) * self._factors(
                theta_VD, deltas_RTD, vectors, rows
            )
            pulls_RTD, gradients_VD = torch.autograd.grad(
                values_V.sum(),
                (deltas_RTD, theta_VD),
                allow_unused=True,
                materialize_grads=True,
            )

        def pull(chosen: list[int]) -> None:
            batch = [rows[index] for index in chosen]
            with torch.enable_grad():
                theta_BD = theta_VD.detach()[[row.place for row in batch]].requires_grad_()
                (pulled_BD,) = torch.autograd.grad(self._deltas(theta_BD, batch), theta_BD, pulls_RTD[chosen])
            gradients_VD.index_add_(0, _places(batch, theta_VD), pulled_BD)

        self._passes.over(len(rows), pull)
        return Climb(torch.where(finite_V, values_V.detach(), torch.nan), gradients_VD)

    def _deltas(self, theta_BD: Tensor, batch: Sequence[_Row]) -> Tensor:
        return self._slice.deltas(theta_BD, [row.prompt for row in batch]).to(theta_BD.dtype)

    def _values(self, deltas_BTD: Tensor, batch: Sequence[_Row], vectors: Sequence[int]) -> Tensor:
        goals = [self.goals[vectors[row.place]] for row in batch]
        powers_B, roots_B = (
            deltas_BTD.new_tensor([getattr(goal, name) for goal in goals]) for name in ("power", "root")
        )
        counted_BT = self._counted_NT[[row.prompt for row in batch]]
        return movement(deltas_BTD, counted_BT, powers_B, roots_B, over=self._over)

    def _factors(
        self, theta_VD: Tensor, deltas_RTD: Tensor, vectors: Sequence[int], rows: Sequence[_Row]
    ) -> Tensor:
        factors_V = theta_VD.new_ones(len(theta_VD))
        for coupling in self._couplings:
            places = [place for place, vector in enumerate(vectors) if vector in coupling.vectors]
            if not places:
                continue
            prompts = list(self.goals[vectors[places[0]]].prompts)
            chosen = [index for index, row in enumerate(rows) if row.place in places]
            deltas_VNTD = deltas_RTD[chosen].unflatten(0, (len(places), len(prompts)))
            found = coupling.factor(theta_VD[places], deltas_VNTD, self._counted_NT[prompts])
            of_set_V = torch.zeros_like(factors_V, dtype=torch.bool)
            of_set_V[places] = True
            factors_V = torch.where(of_set_V, found, factors_V)
        return factors_V


def _places(rows: Sequence[_Row], like: Tensor) -> Tensor:
    return torch.tensor([row.place for row in rows], device=like.device)

"""What is maximised over perturbations, and its gradient, for many of them at once.

V vectors, B rows (a vector on a prompt), T tokens, D hidden.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from jobs.engine.memory import share, within_memory
from jobs.engine.slices import Slice
from jobs.unsupervised.objective import NormOver, movement


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
        gradients_VD: Its gradient.
    """

    values_V: Tensor
    gradients_VD: Tensor


class Landscape:
    """The goals of many vectors on one slice.

    Args:
        slice_: The blocks between source and target, and the prompts.
        counted_NT: Which tokens of each prompt count, bool; padding does not.
        goals: One a vector.
        over: What the norm is taken over.

    Attributes:
        goals: As given.
    """

    def __init__(
        self, slice_: Slice, counted_NT: Tensor, goals: Sequence[Goal], *, over: NormOver = "hidden"
    ) -> None:
        self.goals = goals
        self._slice = slice_
        self._counted_NT = counted_NT
        self._over = over

    def climb(self, theta_VD: Tensor, vectors: Sequence[int]) -> Climb:
        """The objective of each vector and its gradient.

        Args:
            theta_VD: The vectors, float32 or wider.
            vectors: Which goal each one has.

        Raises:
            OutOfMemory: If a single row does not fit.
        """
        rows = [
            (place, prompt) for place, vector in enumerate(vectors) for prompt in self.goals[vector].prompts
        ]
        replica = self._slice.replica
        found = Climb(theta_VD.new_zeros(len(theta_VD)), torch.zeros_like(theta_VD))

        def run(left: list[int]) -> Iterator[tuple[int, None]]:
            most = max(1, share(replica, "batch") // self._row_bytes)
            for start in range(0, len(left), most):
                chosen = left[start : start + most]
                places = [rows[index][0] for index in chosen]
                values_B, gradients_BD = self._look(
                    theta_VD[places], [rows[index][1] for index in chosen], [vectors[at] for at in places]
                )
                at_B = torch.tensor(places, device=theta_VD.device)
                found.values_V.index_add_(0, at_B, values_B)
                found.gradients_VD.index_add_(0, at_B, gradients_BD)
                yield from ((index, None) for index in chosen)

        for _ in within_memory(replica, range(len(rows)), run):
            pass
        return found

    def _look(self, theta_BD: Tensor, prompts: list[int], vectors: list[int]) -> tuple[Tensor, Tensor]:
        with torch.enable_grad():
            theta_BD = theta_BD.detach().requires_grad_()
            deltas_BTD = self._slice.deltas(theta_BD, prompts).to(theta_BD.dtype)
            powers_B, roots_B = (
                deltas_BTD.new_tensor([getattr(self.goals[vector], name) for vector in vectors])
                for name in ("power", "root")
            )
            values_B = movement(deltas_BTD, self._counted_NT[prompts], powers_B, roots_B, over=self._over)
            (gradients_BD,) = torch.autograd.grad(values_B.sum(), theta_BD)
        return values_B.detach(), gradients_BD

    @cached_property
    def _row_bytes(self) -> int:
        """What a row keeps for its gradient, measured."""
        weights = {each.untyped_storage().data_ptr() for each in self._slice.replica.model.parameters()}
        sizes: dict[int, int] = {}

        def measure(saved: Tensor) -> Tensor:
            storage = saved.untyped_storage()
            sizes[storage.data_ptr()] = storage.nbytes()
            return saved

        theta_1D = torch.zeros_like(self._slice.inputs_NTD[:1, 0]).requires_grad_()
        with torch.enable_grad(), saved_tensors_hooks(measure, lambda saved: saved):
            deltas = self._slice.deltas(theta_1D, [0])
        del deltas
        return max(1, sum(size for at, size in sizes.items() if at not in weights))

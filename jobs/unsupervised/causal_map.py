"""The mean change of the target as a function of what is added at the source, and its derivatives.

V vectors, N prompts, T tokens, B rows (a vector on a prompt), D hidden.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from jobs.engine.slices import Slice
from jobs.unsupervised.jacobian import directional, plain_attention
from jobs.unsupervised.passes import Passes

_Row = tuple[int, int]


class Pulled(NamedTuple):
    """The map at some points, and output directions carried back to its input there.

    Attributes:
        values_VD: The map.
        pulled_VD: J^T u, with J the Jacobian at each point.
    """

    values_VD: Tensor
    pulled_VD: Tensor


class Curved(NamedTuple):
    """The map's second derivative H at 0 along input directions v and output directions u.

    Attributes:
        values_VD: H[v, v].
        pulled_VD: The gradient of u . H[v, v] / 2 with regard to v.
    """

    values_VD: Tensor
    pulled_VD: Tensor


class CausalMap:
    """What DCT approximates: delta(theta), averaged over each prompt's counted tokens, then over prompts.

    Source: Mack, "Deep causal transcoding", 2024. `theta` is added at every token of the source block's
    output, which is where `Add(layer=source)` steers.

    Args:
        slice_: The blocks, and the prompts.
        counted_NT: Which tokens count.
    """

    def __init__(self, slice_: Slice, counted_NT: Tensor) -> None:
        self._slice = slice_
        self._weights_NT = counted_NT / counted_NT.sum(dim=1, keepdim=True) / len(counted_NT)

    def at(self, theta_VD: Tensor) -> Tensor:
        """The map at some points, shape (V, D). Raises OutOfMemory if one row does not fit."""

        @torch.no_grad()
        def look(batch: Sequence[_Row]) -> tuple[Tensor]:
            vectors, prompts = map(list, zip(*batch, strict=True))
            return (self._mean(theta_VD[vectors], prompts),)

        [found_VD] = self._over(theta_VD, look, parts=1, states=1)
        return found_VD

    def pulled(self, theta_VD: Tensor, ways_VD: Tensor) -> Pulled:
        """The map at some points, and output directions carried back there. Raises as `at` does."""

        def look(batch: Sequence[_Row]) -> tuple[Tensor, Tensor]:
            vectors, prompts = map(list, zip(*batch, strict=True))
            with torch.enable_grad():
                theta_BD = theta_VD[vectors].requires_grad_()
                values_BD = self._mean(theta_BD, prompts)
                (pulled_BD,) = torch.autograd.grad(values_BD, theta_BD, ways_VD[vectors])
            return values_BD.detach(), pulled_BD

        return Pulled(*self._over(theta_VD, look, parts=2, states=1))

    def pushed(self, ways_VD: Tensor) -> Tensor:
        """J v of input directions v, with J the Jacobian at 0, shape (V, D). Raises as `at` does."""

        @torch.no_grad()
        def look(batch: Sequence[_Row]) -> tuple[Tensor]:
            vectors, prompts = map(list, zip(*batch, strict=True))
            ways_BD = ways_VD[vectors]
            _, pushed_BD = directional(
                lambda theta_BD: self._mean(theta_BD, prompts), torch.zeros_like(ways_BD), ways_BD
            )
            return (pushed_BD,)

        [found_VD] = self._over(ways_VD, look, parts=1, states=1)
        return found_VD

    def curved(self, inputs_VD: Tensor, outputs_VD: Tensor) -> Curved:
        """True second-order products at 0. Raises as `at` does.

        Args:
            inputs_VD: v.
            outputs_VD: u.
        """

        def look(batch: Sequence[_Row]) -> tuple[Tensor, Tensor]:
            vectors, prompts = map(list, zip(*batch, strict=True))
            ways_BD, outputs_BD = inputs_VD[vectors], outputs_VD[vectors].requires_grad_()
            # Not by forward over forward mode, whose second derivative of a layer norm is wrong (torch 2.13).
            with torch.enable_grad(), plain_attention():
                theta_BD = torch.zeros_like(ways_BD).requires_grad_()
                along = (self._mean(theta_BD, prompts) * outputs_BD).sum()
                (slopes_BD,) = torch.autograd.grad(along, theta_BD, create_graph=True)
                slope = (slopes_BD * ways_BD).sum()
                (pulled_BD,) = torch.autograd.grad(slope, theta_BD, create_graph=True)
                # u . H[v, v] is linear in u, so that its gradient is H[v, v] itself.
                (values_BD,) = torch.autograd.grad((pulled_BD * ways_BD).sum(), outputs_BD)
            return values_BD, pulled_BD.detach()

        return Curved(*self._over(inputs_VD, look, parts=2, states=6))

    def _mean(self, theta_BD: Tensor, prompts: list[int]) -> Tensor:
        deltas_BTD = self._slice.deltas(theta_BD, prompts).to(theta_BD.dtype)
        return (deltas_BTD * self._weights_NT[prompts][..., None].to(deltas_BTD)).sum(dim=1)

    def _over(
        self,
        theta_VD: Tensor,
        look: Callable[[Sequence[_Row]], Sequence[Tensor]],
        *,
        parts: int,
        states: int,
    ) -> list[Tensor]:
        """The sums over prompts of what `look` gives of each row, batch by batch."""
        prompts = range(len(self._weights_NT))
        rows = [(vector, prompt) for vector in range(len(theta_VD)) for prompt in prompts]
        found = [torch.zeros_like(theta_VD) for _ in range(parts)]

        def run(chosen: list[int]) -> None:
            batch = [rows[index] for index in chosen]
            at_B = torch.tensor([vector for vector, _ in batch], device=theta_VD.device)
            for sum_VD, part_BD in zip(found, look(batch), strict=True):
                sum_VD.index_add_(0, at_B, part_BD)

        Passes(self._slice, states=states).over(len(rows), run)
        return found

"""What perturbations do to the target: where, and how alike.

V vectors, N prompts, T tokens, D hidden.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from jobs.engine.memory import in_batches
from jobs.engine.slices import Slice
from jobs.unsupervised.landscape import Goal
from jobs.unsupervised.objective import NormOver, movement, shares


class Effects(NamedTuple):
    """Changes of the target over the counted tokens of some prompts.

    Attributes:
        objectives_V: The sum of `objective.movement` over the prompts.
        products_VV: Inner products of two vectors' changes, summed over prompts, tokens and hidden units,
            float64.
        shares_VNT: Share of each token in the sum of |delta|^p of its prompt, as many as the longest prompt
            has; padding, on the left, has 0.
        identity: Largest change that a vector of 0 makes, over the largest state of the target: what the
            slice's own rounding is worth.
    """

    objectives_V: Tensor
    products_VV: Tensor
    shares_VNT: Tensor
    identity: float

    @property
    def cosines_VV(self) -> Tensor:
        """Cosines of the changes; NaN where there is none."""
        norms_V = self.products_VV.diagonal().sqrt()
        return self.products_VV / (norms_V[:, None] * norms_V)


@torch.no_grad()
def effects(
    slice_: Slice, counted_NT: Tensor, theta_VD: Tensor, goal: Goal, *, over: NormOver = "hidden"
) -> Effects:
    """What each vector does.

    Args:
        slice_: The blocks, and the prompts.
        counted_NT: Which tokens count.
        theta_VD: The vectors.
        goal: On which prompts, and the p and q of the objective.
        over: What the norm of the objective is taken over.

    Raises:
        OutOfMemory: If a single vector on a single prompt does not fit.
    """
    objectives_V = torch.zeros(len(theta_VD), dtype=torch.float64)
    products_VV = torch.zeros((len(theta_VD), len(theta_VD)), dtype=torch.float64)
    found = []
    for prompt in goal.prompts:
        deltas_VTD = _deltas(slice_, theta_VD, prompt) * counted_NT[prompt, :, None].cpu()
        flat_VK = deltas_VTD.flatten(1).double()
        products_VV += flat_VK @ flat_VK.T
        counted_VT = counted_NT[[prompt]].cpu().expand(len(theta_VD), -1)
        powers_V, roots_V = (torch.full((len(theta_VD),), number) for number in (goal.power, goal.root))
        objectives_V += movement(deltas_VTD, counted_VT, powers_V, roots_V, over=over)
        found.append(shares(deltas_VTD, counted_VT, powers_V))
    prompts = list(goal.prompts)
    longest = int((slice_.positions_NT[prompts] >= 0).sum(dim=1).max())
    shares_VNT = torch.stack(found, dim=1)[..., -longest:]
    return Effects(objectives_V, products_VV, shares_VNT, _identity(slice_, prompts))


def _identity(slice_: Slice, prompts: Sequence[int]) -> float:
    shifts = [
        slice_.deltas(torch.zeros_like(slice_.inputs_NTD[[prompt], 0]), [prompt]).abs().max()
        for prompt in prompts
    ]
    real_NT1 = (slice_.positions_NT[prompts] >= 0)[..., None].to(slice_.targets_NTD.device)
    return float(torch.stack(shifts).max() / (slice_.targets_NTD[prompts] * real_NT1).abs().max())


def _deltas(slice_: Slice, theta_VD: Tensor, prompt: int) -> Tensor:
    """Changes of the target of one prompt, shape (V, T, D), float32 or wider, on the CPU."""

    def run(batch: list[int]) -> list[Tensor]:
        deltas_BTD = slice_.deltas(theta_VD[batch], [prompt] * len(batch))
        return list(deltas_BTD.to(torch.promote_types(deltas_BTD.dtype, torch.float32)).cpu())

    tokens = slice_.positions_NT.shape[1]
    return torch.stack(in_batches(slice_.replica, [tokens] * len(theta_VD), run))

"""Radii that mean the same at other layers and in other models.

V vectors, N prompts, T tokens, D hidden.
"""

import math

import torch
from scipy.optimize import brentq
from torch import Tensor

from jobs.engine.memory import in_batches
from jobs.engine.slices import Slice

_PROBES = 30
_SMALL = 1e-2
"""Of the residual norm: short enough to be linear, long enough for float32 to tell both ends apart. Narrower
types need more, as the cube root of their rounding."""
_RANGE = (1e-3, 1e2)
"""Radii that are tried, in residual norms."""


def residual_norm(slice_: Slice, counted_NT: Tensor) -> float:
    """Mean norm of the unsteered residual stream at the source over the counted tokens."""
    return float(slice_.inputs_NTD[counted_NT].double().norm(dim=-1).mean())


def calibrated_radius(slice_: Slice, counted_NT: Tensor, *, ratio: float = 0.5, seed: int = 0) -> float:
    """R at which the effect of random vectors departs from a linear one by a given share of it.

    Solves sqrt(mean over v of |delta(R v) - R J v|^2 / |R J v|^2) = ratio for 30 random unit vectors v, with
    delta the mean of the target's change over all counted tokens and J its Jacobian at 0 (here a central
    difference).

    Source: Mack, "Deep causal transcoding", 2024, the code's `SteeringCalibrator`.

    Args:
        slice_: The blocks, and the prompts.
        counted_NT: Which tokens count.
        ratio: The share, above 0.
        seed: Of the random vectors.

    Returns:
        In stream units; NaN if no radius from 0.001 to 100 residual norms does so.
    """
    unit = residual_norm(slice_, counted_NT)
    generator = torch.Generator().manual_seed(seed)
    hidden = slice_.inputs_NTD.shape[-1]
    probes_VD = torch.nn.functional.normalize(torch.randn((_PROBES, hidden), generator=generator), dim=-1)
    share = max(_SMALL, 0.5 * torch.finfo(slice_.inputs_NTD.dtype).eps ** (1 / 3))
    small = share * unit
    ahead, behind = (_effects(slice_, counted_NT, sign * small * probes_VD) for sign in (1, -1))
    slopes_VK = (ahead - behind) / (2 * small)

    def excess(norms: float) -> float:
        linear_VK = norms * unit * slopes_VK
        off_VK = _effects(slice_, counted_NT, norms * unit * probes_VD) - linear_VK
        return float((off_VK.square().sum(dim=1) / linear_VK.square().sum(dim=1)).mean().sqrt()) - ratio

    low, high = _RANGE
    # Of so short vectors a narrow type shows its rounding alone, which is no linear effect either.
    low = low if excess(low) < 0 else share
    if not excess(low) < 0 < excess(high):
        return math.nan
    return unit * float(brentq(excess, low, high, rtol=1e-2))


@torch.no_grad()
def _effects(slice_: Slice, counted_NT: Tensor, theta_VD: Tensor) -> Tensor:
    """Mean change of the target over the counted tokens of all prompts, shape (V, D), float64."""
    prompts = list(range(len(counted_NT)))
    theta_VD = theta_VD.to(slice_.inputs_NTD)

    def run(batch: list[int]) -> list[Tensor]:
        found = []
        for vector in batch:
            repeated_ND = theta_VD[vector].expand(len(prompts), -1)
            found.append(slice_.deltas(repeated_ND, prompts)[counted_NT].double().mean(dim=0))
        return found

    return torch.stack(in_batches(slice_.replica, [counted_NT.numel()] * len(theta_VD), run))

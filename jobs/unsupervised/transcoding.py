"""Deep causal transcoding: a sum of one-input, one-output features that stands for a causal map.

Source: Mack, "Deep causal transcoding", 2024. That code's linear variant takes columns of the wrong singular
matrix, and its quadratic one is power iteration for the Jacobian; both are as in the formulas here.
V factors, D hidden, S iterations.
"""

from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import normalize

from jobs.unsupervised.causal_map import CausalMap
from jobs.unsupervised.sphere import orthonormal

Kind = Literal["linear", "quadratic", "exponential"]


class Factors(NamedTuple):
    """The features of a transcoder.

    Attributes:
        inputs_VD: v, the direction that each reads at the source, of norm 1; where to steer.
        outputs_VD: u, the direction that it writes at the target, of norm 1.
        strengths_V: Singular values (linear), u . H[v, v] / 2 (quadratic), or alpha (exponential).
        history_S: What each iteration found of the mean over the factors of |J v|, u . H[v, v] / 2 or
            |u . delta(R v)|.
    """

    inputs_VD: Tensor
    outputs_VD: Tensor
    strengths_V: Tensor
    history_S: Tensor


def linear_factors(causal: CausalMap, start_VD: Tensor, *, iterations: int = 8) -> Factors:
    """The first singular vectors of the map's Jacobian at 0, largest first, by subspace iteration.

    Args:
        causal: The map.
        start_VD: Independent rows.
        iterations: Passes of J and of its transpose.

    Raises:
        OutOfMemory: If a single row does not fit.
    """
    inputs_VD, history = orthonormal(start_VD), []
    for _ in range(iterations):
        pushed_VD = causal.pushed(inputs_VD)
        history.append(pushed_VD.norm(dim=1).mean())
        inputs_VD = orthonormal(causal.pulled(torch.zeros_like(inputs_VD), pushed_VD).pulled_VD)
    pushed_VD = causal.pushed(inputs_VD)
    # Of J restricted to the subspace, the singular vectors themselves.
    left_VK, sizes_K, right_KD = torch.linalg.svd(pushed_VD, full_matrices=False)
    return Factors(left_VK.T @ inputs_VD, right_KD, sizes_K, torch.stack(history))


def quadratic_factors(causal: CausalMap, start_VD: Tensor, *, iterations: int = 10) -> Factors:
    """Orthogonal v that maximise |H[v, v]|, with H the map's second derivative at 0, and u along H[v, v].

    Alternating maximisation of the sum of u . H[v, v] over unit u and orthonormal v.

    Args:
        causal: The map.
        start_VD: Independent rows.
        iterations: Products of H with all factors.

    Raises:
        OutOfMemory: If a single row does not fit.
    """
    inputs_VD = orthonormal(start_VD)
    outputs_VD = normalize(causal.curved(inputs_VD, torch.zeros_like(inputs_VD)).values_VD, dim=1)
    history = []
    for _ in range(iterations):
        found = causal.curved(inputs_VD, outputs_VD)
        outputs_VD = normalize(found.values_VD, dim=1)
        history.append((found.values_VD * outputs_VD).sum(dim=1).mean() / 2)
        inputs_VD = orthonormal(found.pulled_VD)
    values_VD = causal.curved(inputs_VD, outputs_VD).values_VD
    outputs_VD = normalize(values_VD, dim=1)
    return Factors(inputs_VD, outputs_VD, (values_VD * outputs_VD).sum(dim=1) / 2, torch.stack(history))


def exponential_factors(
    causal: CausalMap, start_VD: Tensor, radius: float, *, iterations: int = 10, mix: float = 1.0
) -> Factors:
    """Features of delta(theta) ~ sum of alpha u (exp(v . theta / R) - 1).

    Each iteration makes the v orthonormal and then, for all factors at once, u the direction of delta(R v)
    and v that of J(R v)^T u. A u that points against delta(R v) is turned about first: else the signs of the
    pair change in turn for ever.

    Args:
        causal: The map.
        start_VD: Independent rows.
        radius: R, in stream units.
        iterations: How many.
        mix: Share of the new direction in each update, above 0 and at most 1.

    Raises:
        OutOfMemory: If a single row does not fit.
    """
    inputs_VD = orthonormal(start_VD)
    outputs_VD = normalize(causal.at(radius * inputs_VD), dim=1)
    history = []
    for _ in range(iterations):
        inputs_VD = orthonormal(inputs_VD)
        found = causal.pulled(radius * inputs_VD, outputs_VD)
        along_V1 = (found.values_VD * outputs_VD).sum(dim=1, keepdim=True)
        signs_V1 = torch.where(along_V1 < 0, -1.0, 1.0).to(along_V1)
        history.append(along_V1.abs().mean())
        outputs_VD = signs_V1 * outputs_VD
        outputs_VD = normalize(mix * found.values_VD + (1 - mix) * outputs_VD, dim=1)
        inputs_VD = normalize(mix * radius * signs_V1 * found.pulled_VD + (1 - mix) * inputs_VD, dim=1)
    strengths_V = alphas(inputs_VD, outputs_VD, causal.at(radius * inputs_VD))
    return Factors(inputs_VD, outputs_VD, strengths_V, torch.stack(history))


def alphas(inputs_VD: Tensor, outputs_VD: Tensor, values_VD: Tensor) -> Tensor:
    """The alpha for which the exponential features fit delta(R v) along every u, shape (V,), float64.

    Solves K alpha = (u . delta(R v)) with K = (U U^T) * expm1(V V^T), in least squares where features are
    alike. NaN if something is not finite.

    Args:
        inputs_VD: v, of norm 1.
        outputs_VD: u, of norm 1.
        values_VD: delta(R v).
    """
    inputs_VD, outputs_VD, values_VD = (each.double().cpu() for each in (inputs_VD, outputs_VD, values_VD))
    if not all(bool(each.isfinite().all()) for each in (inputs_VD, outputs_VD, values_VD)):
        return torch.full((len(inputs_VD),), torch.nan, dtype=torch.float64)
    kernel_VV = (outputs_VD @ outputs_VD.T) * torch.expm1(inputs_VD @ inputs_VD.T)
    along_V = (values_VD * outputs_VD).sum(dim=1)
    found_V: Tensor = torch.linalg.lstsq(kernel_VV, along_V[:, None], driver="gelsd").solution[:, 0]
    return found_V

"""Directions from contrast pairs: pure tensor functions. N prompts, M rows, D hidden, K components."""

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

Rows = Literal["activations", "differences", "centred_differences"]
"""What principal components are taken of; see `principal_components`."""


class Components(NamedTuple):
    """Principal components, largest variance first.

    Attributes:
        directions_KD: Shape (components, hidden); unit norm, at right angles to each other.
        variances_K: Variance along each, in squared residual-stream units.
    """

    directions_KD: Tensor
    variances_K: Tensor


def mean_difference(positive_ND: Tensor, negative_ND: Tensor) -> Tensor:
    """Direction from the mean negative to the mean positive activation.

    Args:
        positive_ND: Shape (prompts, hidden), any float dtype; computed in float32 or wider.
        negative_ND: Same; the number of prompts may differ.

    Returns:
        Shape (hidden,), in residual-stream units, not normalised.

    Raises:
        ValueError: If either side is empty or the hidden sizes differ.

    Source: Rimsky et al., arXiv:2312.06681.
    """
    check_sides(positive_ND, negative_ND)
    return widened(positive_ND).mean(dim=0) - widened(negative_ND).mean(dim=0)


def principal_components(positive_ND: Tensor, negative_ND: Tensor, *, of: Rows = "activations") -> Components:
    """All principal components, each with the sign that most pairs vote for.

    Args:
        positive_ND: Shape (pairs, hidden), any float dtype; computed in float32 or wider.
        negative_ND: Same shape, pair by pair.
        of: `activations`: both sides together, around their common mean.
            `differences`: positive minus negative of each pair, around zero. Zou et al. shuffle which side
            of a pair comes first and subtract the mean; with both orders of every pair that mean is zero,
            so this is the same method without its chance.
            `centred_differences`: the same around their mean, which takes the mean difference away and
            leaves what varies between pairs; scikit-learn's PCA of ordered differences.

    Returns:
        The components that the activations span; none if they do not vary.

    Raises:
        ValueError: If a side is empty or the shapes differ.

    Source: Zou et al., arXiv:2310.01405; the sign rule is the pairwise vote of the same work.
    """
    positive, negative = paired(positive_ND, negative_ND)
    rows = torch.cat([positive, negative]) if of == "activations" else positive - negative
    directions, variances = principal_axes(rows, centred=of != "differences")
    return Components(directions * _votes(positive, negative, directions)[:, None], variances)


def principal_component(
    positive_ND: Tensor, negative_ND: Tensor, component: int, *, of: Rows = "activations"
) -> Tensor:
    """Principal component `component` (0 = largest variance); all activations, both sides together.

    The sign is chosen by majority: most pairs project higher on their positive side.

    Args:
        positive_ND: Shape (pairs, hidden), any float dtype; computed in float32 or wider.
        negative_ND: Same shape, pair by pair.
        component: Which component, counted from 0.
        of: What varies: see `principal_components`.

    Returns:
        Shape (hidden,), unit norm.

    Raises:
        ValueError: If a side is empty, the shapes differ, or the activations do not have the component.

    Source: Zou et al., arXiv:2310.01405.
    """
    directions = principal_components(positive_ND, negative_ND, of=of).directions_KD
    if not 0 <= component < len(directions):
        raise ValueError(f"component={component}; {_available(len(directions))}")
    return directions[component]


def component_mixture(
    positive_ND: Tensor,
    negative_ND: Tensor,
    weights: Sequence[float],
    *,
    of: Rows = "activations",
    by_variance: bool = False,
) -> Tensor:
    """Weighted sum of the first principal components, each with its own majority sign.

    Args:
        positive_ND: Shape (pairs, hidden), any float dtype; computed in float32 or wider.
        negative_ND: Same shape, pair by pair.
        weights: One for each component from 0 on: (0, 1) is component 1 alone. Negative ones turn it round.
        of: What varies: see `principal_components`.
        by_variance: Whether each weight is multiplied by its component's variance.

    Returns:
        Shape (hidden,), unit norm.

    Raises:
        ValueError: As `principal_component`, or if the weights are not finite or all zero.
    """
    directions, variances = principal_components(positive_ND, negative_ND, of=of)
    if not any(weights) or not all(map(math.isfinite, weights)):
        raise ValueError(f"weights={list(weights)}; at least one must differ from 0 and all must be finite")
    if len(weights) > len(directions):
        raise ValueError(f"weights for {len(weights)} components; {_available(len(directions))}")
    weights_K = torch.tensor(weights, dtype=directions.dtype, device=directions.device)
    if by_variance:
        weights_K = weights_K * variances[: len(weights)]
    mixture: Tensor = weights_K @ directions[: len(weights)]
    mixture /= mixture.norm()
    return mixture


def principal_axes(rows_MD: Tensor, *, centred: bool) -> Components:
    """Principal components of any rows, without pairs; each is positive where it is largest.

    Axes along which the rows vary no more than by rounding are left out.

    Args:
        rows_MD: Shape (rows, hidden), at least one row; computed in float32 or wider.
        centred: Whether the mean is taken away first. The variance divides by M - 1 then, else by M.

    Raises:
        ValueError: If a number is not finite.
    """
    rows = widened(rows_MD)
    if not bool(rows.isfinite().all()):
        raise ValueError(f"{int((~rows.isfinite()).sum())} numbers of the activations are not finite")
    deviations = rows - rows.mean(dim=0) if centred else rows
    freedom = len(rows) - int(centred)
    _, sizes, axes = torch.linalg.svd(deviations, full_matrices=False)
    rounding = 10 * torch.finfo(rows.dtype).eps * rows.norm()
    real = int((sizes[:freedom] > rounding).sum())
    sizes, axes = sizes[:real], axes[:real]
    largest = axes.gather(1, axes.abs().argmax(dim=1, keepdim=True))
    return Components(axes * largest.sign(), sizes.square() / max(freedom, 1))


def keep_pairs(positive: Tensor, negative: Tensor, keep_N: Tensor) -> tuple[Tensor, Tensor]:
    """Both sides of the pairs that a mask keeps, such as those that the model answered correctly.

    Args:
        positive: Shape (pairs, ...).
        negative: Same shape, pair by pair.
        keep_N: Shape (pairs,), bool.

    Raises:
        ValueError: If the shapes differ, the mask is not one bool a pair, or it keeps nothing.
    """
    if positive.shape != negative.shape or keep_N.shape != positive.shape[:1] or keep_N.dtype != torch.bool:
        sides = f"sides {tuple(positive.shape)} and {tuple(negative.shape)}"
        raise ValueError(f"{sides}, mask {tuple(keep_N.shape)} {keep_N.dtype}; it takes one bool a pair")
    if not bool(keep_N.any()):
        raise ValueError(f"the mask keeps none of {len(keep_N)} pairs")
    return positive[keep_N], negative[keep_N]


def majority_sign(positive_ND: Tensor, negative_ND: Tensor, direction_D: Tensor) -> float:
    """-1.0 if more pairs project lower on their positive side than higher, else 1.0."""
    positive = widened(positive_ND)
    return float(_votes(positive, widened(negative_ND), direction_D[None].to(positive.dtype)))


def separability(positive_ND: Tensor, negative_ND: Tensor, direction_D: Tensor) -> float:
    """Share of pairs whose positive side projects higher on the direction; 0.5 is chance, ties count half."""
    gap_ND = widened(positive_ND) - widened(negative_ND)
    gap_N = gap_ND @ direction_D.to(gap_ND.dtype)
    return float(((gap_N > 0).double() + 0.5 * (gap_N == 0).double()).mean())


def widened(tensor: Tensor) -> Tensor:
    """The tensor in float32, or in float64 if it is float64."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def check_sides(positive_ND: Tensor, negative_ND: Tensor) -> None:
    """Raises ValueError if a side is empty or the hidden sizes differ."""
    if positive_ND.shape[0] == 0 or negative_ND.shape[0] == 0:
        raise ValueError(f"no activations on one side: {positive_ND.shape[0]} and {negative_ND.shape[0]}")
    if positive_ND.shape[1] != negative_ND.shape[1]:
        raise ValueError(f"hidden sizes differ: {positive_ND.shape[1]} and {negative_ND.shape[1]}")


def paired(positive_ND: Tensor, negative_ND: Tensor) -> tuple[Tensor, Tensor]:
    """Both sides in float32 or wider. Raises ValueError as `check_sides`, or if the numbers differ."""
    check_sides(positive_ND, negative_ND)
    if positive_ND.shape != negative_ND.shape:
        raise ValueError(f"pairs of unequal number: {positive_ND.shape[0]} and {negative_ND.shape[0]}")
    return widened(positive_ND), widened(negative_ND)


def _votes(positive_ND: Tensor, negative_ND: Tensor, directions_KD: Tensor) -> Tensor:
    gap_NK = (positive_ND - negative_ND) @ directions_KD.T
    against_K = (gap_NK < 0).sum(dim=0) > (gap_NK > 0).sum(dim=0)
    return 1 - 2 * against_K.to(directions_KD.dtype)


def _available(components: int) -> str:
    return f"these activations have 0 to {components - 1}" if components else "these activations do not vary"

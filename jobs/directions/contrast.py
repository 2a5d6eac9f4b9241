"""Directions from contrast pairs: pure tensor functions. N pairs, D hidden."""

import torch
from torch import Tensor


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
    _check(positive_ND, negative_ND)
    return _wide(positive_ND).mean(dim=0) - _wide(negative_ND).mean(dim=0)


def principal_component(positive_ND: Tensor, negative_ND: Tensor, component: int) -> Tensor:
    """Principal component `component` (0 = largest variance) of all activations, both sides together.

    The sign is chosen by majority: most pairs project higher on their positive side.

    Args:
        positive_ND: Shape (pairs, hidden), any float dtype; computed in float32 or wider.
        negative_ND: Same shape, pair by pair.
        component: Which component, counted from 0.

    Returns:
        Shape (hidden,), unit norm.

    Raises:
        ValueError: If a side is empty, the shapes differ, or there are too few activations for the component.

    Source: Zou et al., arXiv:2310.01405; the sign rule is the pairwise vote of the same work.
    """
    _check(positive_ND, negative_ND)
    if positive_ND.shape != negative_ND.shape:
        raise ValueError(f"pairs of unequal number: {positive_ND.shape[0]} and {negative_ND.shape[0]}")
    positive, negative = _wide(positive_ND), _wide(negative_ND)
    everything = torch.cat([positive, negative])
    available = min(everything.shape[0] - 1, everything.shape[1])
    if not 0 <= component < available:
        raise ValueError(f"component={component}; these activations have 0 to {available - 1}")
    _, _, right = torch.linalg.svd(everything - everything.mean(dim=0), full_matrices=False)
    direction = right[component]
    signed: Tensor = direction * majority_sign(positive, negative, direction)
    return signed


def majority_sign(positive_ND: Tensor, negative_ND: Tensor, direction_D: Tensor) -> float:
    """-1.0 if more pairs project lower on their positive side than higher, else 1.0."""
    gap_N = (positive_ND - negative_ND) @ direction_D
    return -1.0 if int((gap_N < 0).sum()) > int((gap_N > 0).sum()) else 1.0


def separability(positive_ND: Tensor, negative_ND: Tensor, direction_D: Tensor) -> float:
    """Share of pairs whose positive side projects higher on the direction; 0.5 is chance, ties count half."""
    gap_ND = _wide(positive_ND) - _wide(negative_ND)
    gap_N = gap_ND @ direction_D.to(gap_ND.dtype)
    return float(((gap_N > 0).double() + 0.5 * (gap_N == 0).double()).mean())


def _wide(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def _check(positive_ND: Tensor, negative_ND: Tensor) -> None:
    if positive_ND.shape[0] == 0 or negative_ND.shape[0] == 0:
        raise ValueError(f"no activations on one side: {positive_ND.shape[0]} and {negative_ND.shape[0]}")
    if positive_ND.shape[1] != negative_ND.shape[1]:
        raise ValueError(f"hidden sizes differ: {positive_ND.shape[1]} and {negative_ND.shape[1]}")

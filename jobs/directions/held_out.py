"""How well directions tell pairs apart that they were not fitted on. N pairs, L layers, F parts, D hidden."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from jobs.directions.contrast import widened

Method = Callable[[Tensor, Tensor], Tensor]
"""Positive and negative activations, (N, D) each, to a direction (D,)."""


class Separability(NamedTuple):
    """How well directions tell unseen pairs apart, by layer; 0.5 is chance everywhere.

    Attributes:
        auc_L: Shape (layers,), float64; probability that a positive side projects higher than a negative one
            of any pair, ties half; the mean over the parts held out.
        accuracy_L: Shape (layers,), float64; share of activations on their side of the threshold halfway
            between the mean projections of the two sides that the direction was fitted on.
        in_order_L: Shape (layers,), float64; share of pairs whose positive side projects higher.
    """

    auc_L: np.ndarray
    accuracy_L: np.ndarray
    in_order_L: np.ndarray


def pair_folds(pairs: int, folds: int, *, seed: int) -> list[Tensor]:
    """Indices of the pairs in each fold: every pair in one, sizes equal to within one, order drawn at random.

    Raises:
        ValueError: If there are not between 2 and `pairs` folds.
    """
    if not 2 <= folds <= pairs:
        raise ValueError(f"folds={folds}; {pairs} pairs can be held out in 2 to {pairs}")
    return list(torch.randperm(pairs, generator=torch.Generator().manual_seed(seed)).tensor_split(folds))


def held_out_separability(
    positive_NLD: Tensor, negative_NLD: Tensor, method: Method, held_out: Sequence[Tensor | Sequence[int]]
) -> Separability:
    """Directions fitted on one part of the pairs and judged on the other.

    Args:
        positive_NLD: Shape (pairs, layers, hidden), any float dtype.
        negative_NLD: Same shape, pair by pair; both sides of a pair are always in the same part.
        method: Fits a direction of one layer. A ValueError of its own is passed on.
        held_out: Indices of the pairs to judge on; each entry is one fit on all the other pairs.
            `pair_folds` gives those of cross-validation; a single entry is a split.

    Raises:
        ValueError: If the shapes differ, or an entry is empty, names a pair twice or one that does not
            exist, or leaves none to fit on.
    """
    if positive_NLD.shape != negative_NLD.shape:
        shapes = f"{tuple(positive_NLD.shape)} and {tuple(negative_NLD.shape)}"
        raise ValueError(f"the sides are not pairs: shapes {shapes}")
    judged_N = [_mask(part, len(positive_NLD)).to(positive_NLD.device) for part in held_out]
    if not judged_N:
        raise ValueError("nothing is held out; name the pairs of at least one part")
    pairs = np.array([int(mask.sum()) for mask in judged_N])
    scores_LF3 = np.array(
        [
            [_judged(positive_NLD[:, layer], negative_NLD[:, layer], method, mask) for mask in judged_N]
            for layer in range(positive_NLD.shape[1])
        ]
    )
    auc_L = scores_LF3[..., 0].mean(axis=1)
    return Separability(auc_L, *(np.average(scores_LF3[..., 1:], axis=1, weights=pairs).T))


def area_under_curve(positive_N: Tensor, negative_N: Tensor) -> float:
    """Probability that a positive number is above a negative one, ties half; 0.5 is chance.

    Source: Mann and Whitney, Annals of Mathematical Statistics 18 (1947) 50-60.
    """
    ascending = negative_N.sort().values
    below = torch.searchsorted(ascending, positive_N.contiguous())
    not_above = torch.searchsorted(ascending, positive_N.contiguous(), right=True)
    return float((below + not_above).double().mean()) / (2 * len(negative_N))


def _judged(
    positive_ND: Tensor, negative_ND: Tensor, method: Method, judged_N: Tensor
) -> tuple[float, float, float]:
    fitted = positive_ND[~judged_N], negative_ND[~judged_N]
    direction_D = method(*fitted)
    high, low = (widened(side).to(direction_D) @ direction_D for side in fitted)
    threshold = (high.mean() + low.mean()) / 2
    high, low = (widened(side[judged_N]).to(direction_D) @ direction_D for side in (positive_ND, negative_ND))
    accuracy = (_share_above(high, threshold) + _share_above(threshold, low)) / 2
    return area_under_curve(high, low), accuracy, _share_above(high, low)


def _share_above(upper: Tensor, lower: Tensor) -> float:
    return float(((upper > lower).double() + 0.5 * (upper == lower).double()).mean())


def _mask(indices: Tensor | Sequence[int], pairs: int) -> Tensor:
    listed = torch.as_tensor(indices).tolist()
    if not listed or len(set(listed)) < len(listed) or not set(listed) < set(range(pairs)):
        allowed = f"some of 0 to {pairs - 1}, each once, not all of them"
        raise ValueError(f"pairs {listed} to hold out; name {allowed}")
    mask_N = torch.zeros(pairs, dtype=torch.bool)
    mask_N[listed] = True
    return mask_N

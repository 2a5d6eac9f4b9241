"""From the activations of one layer to its direction, judged on pairs. N pairs, K others, D hidden."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from jobs.directions.contrast import (
    Rows,
    component_mixture,
    mean_difference,
    principal_component,
    separability,
    widened,
)
from jobs.directions.held_out import Method, held_out_separability, pair_folds
from jobs.directions.probes import lda_direction, logistic_direction
from jobs.directions.projection import project_out, random_like

FOLDS = 5


class Judged(NamedTuple):
    """One layer's direction and how well it tells the pairs apart.

    Attributes:
        direction_D: Unit norm; NaN where the layer has none, as all other attributes then are.
        separability: Share of pairs with the positive side projecting higher.
        held_out_auc: Over pairs that the direction was not fitted on; NaN for a single pair.
        held_out_accuracy: Same.
        projections_N2: Of the positive and the negative side, residual-stream units.
    """

    direction_D: Tensor
    separability: float
    held_out_auc: float
    held_out_accuracy: float
    projections_N2: Tensor


def fit_direction(
    positive_ND: Tensor,
    negative_ND: Tensor,
    *,
    method: str,
    of: Rows | None = None,
    component: int = 0,
    mixture: Sequence[float] = (),
    seed: int = 0,
) -> Tensor:
    """The direction of a method.

    Args:
        positive_ND: Shape (pairs, hidden), any float dtype.
        negative_ND: Same shape, pair by pair.
        method: `mean_difference`, `logistic`, `lda` or `random`; ignored for principal components.
        of: What principal components are taken of; None takes `method`.
        component: Which principal component, counted from 0.
        mixture: Weights of the first components; empty takes `component` alone.
        seed: Of a random direction, which has the norm of the mean difference.

    Returns:
        Shape (hidden,), float32 or wider, not normalised.

    Raises:
        ValueError: If the activations give no such direction, or the method is unknown.
    """
    sides = positive_ND, negative_ND
    if of is not None:
        if mixture:
            return component_mixture(*sides, mixture, of=of)
        return principal_component(*sides, component, of=of)
    match method:
        case "mean_difference":
            return mean_difference(*sides)
        case "logistic":
            return logistic_direction(*sides)
        case "lda":
            return lda_direction(*sides)
        case "random":
            return random_like(mean_difference(*sides), seed=seed)
    raise ValueError(f"method={method!r}; it takes mean_difference, logistic, lda or random")


def composed(fit: Method, added_KD: Tensor, weights: Sequence[float], removed_JD: Tensor) -> Method:
    """A method whose direction is changed after it was fitted.

    Args:
        fit: The method.
        added_KD: Directions of unit norm that are added to the fitted one, which is first brought to norm 1.
        weights: Factor of each; negative ones subtract.
        removed_JD: Directions that are then projected out.
    """

    def whole(positive_ND: Tensor, negative_ND: Tensor) -> Tensor:
        direction_D = fit(positive_ND, negative_ND)
        if len(added_KD):
            factors_K = torch.tensor(weights, dtype=added_KD.dtype)
            direction_D = unit(direction_D) + (factors_K @ added_KD).to(direction_D)
        return project_out(direction_D, removed_JD) if len(removed_JD) else direction_D

    return whole


def unit(direction_D: Tensor) -> Tensor:
    """The direction with norm 1, float32 or wider. Raises ValueError if it has no norm."""
    wide_D = widened(direction_D)
    norm = float(wide_D.norm())
    if not 0 < norm < math.inf:
        raise ValueError(f"the two sides give a direction of norm {norm}")
    return wide_D / norm


def judged(positive_ND: Tensor, negative_ND: Tensor, fit: Method, *, seed: int) -> Judged:
    """A layer's direction, fitted on all pairs, and its cross-validation.

    Args:
        positive_ND: Shape (pairs, hidden), any float dtype.
        negative_ND: Same shape, pair by pair.
        fit: The method.
        seed: Of the folds.

    Raises:
        ValueError: If the pairs give no direction, all of them or without a fold.
    """
    direction_D = unit(fit(positive_ND, negative_ND))
    pairs = len(positive_ND)
    auc = accuracy = math.nan
    if pairs > 1:
        folds = pair_folds(pairs, min(FOLDS, pairs), seed=seed)
        unseen = held_out_separability(positive_ND[:, None], negative_ND[:, None], fit, folds)
        auc, accuracy = float(unseen.auc_L[0]), float(unseen.accuracy_L[0])
    projections = [side.to(direction_D) @ direction_D for side in (positive_ND, negative_ND)]
    share = separability(positive_ND, negative_ND, direction_D)
    return Judged(direction_D, share, auc, accuracy, torch.stack(projections, dim=-1))


def undefined(pairs: int, hidden: int) -> Judged:
    """What stands for a layer that has no direction."""
    nothing = math.nan
    return Judged(torch.full((hidden,), nothing), nothing, nothing, nothing, torch.full((pairs, 2), nothing))

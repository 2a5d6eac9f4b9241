"""What a set of directions does: pure functions from tensors to arrays that can be stored.

N prompts, M activations of both sides, L layers, T token columns, D hidden, V vocabulary. All is computed in
float32 or wider.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from jobs.directions.contrast import check_sides, principal_axes, widened


class Histograms(NamedTuple):
    """Projections of both sides counted in the same bins.

    Attributes:
        edges_LE: Shape (layers, bins + 1), float64, rising, in residual-stream units.
        positive_LB: Shape (layers, bins), int64.
        negative_LB: Same.
    """

    edges_LE: np.ndarray
    positive_LB: np.ndarray
    negative_LB: np.ndarray


class Scatter(NamedTuple):
    """Activations in the plane of their two largest principal components.

    Attributes:
        coordinates_M2: Shape (both sides, 2), float64, around the common mean, in residual-stream units.
        is_positive_M: Shape (both sides,), bool.
        variance_shares_2: Shape (2,), float64; share of the whole variance along each axis.
    """

    coordinates_M2: np.ndarray
    is_positive_M: np.ndarray
    variance_shares_2: np.ndarray


class Lens(NamedTuple):
    """Tokens that directions speak for. The middle axis is 0 for +v and 1 for -v.

    Attributes:
        tokens_L2K: Shape (layers, 2, tokens), int64, highest logit first.
        logits_L2K: Same shape, float32 or wider.
    """

    tokens_L2K: np.ndarray
    logits_L2K: np.ndarray


class HeatMap(NamedTuple):
    """Projections by layer and position.

    Attributes:
        positions_T: Shape (columns,), int64; -1 is the prompt's last token, 0 the first generated one.
        values_NLT: Shape (prompts, layers, columns), float32 or wider; NaN where a prompt has no token.
    """

    positions_T: np.ndarray
    values_NLT: np.ndarray


def cosine_profile(directions_LD: Tensor) -> np.ndarray:
    """Cosine of every layer's direction with every other layer's.

    Args:
        directions_LD: Shape (layers, hidden), any norms.

    Returns:
        Shape (layers, layers), symmetric, between -1 and 1.

    Raises:
        ValueError: If a direction has no norm.
    """
    unit_LD = _units(directions_LD)
    return _array((unit_LD @ unit_LD.T).clamp(-1, 1))


def projection_histograms(
    positive_NLD: Tensor, negative_NLD: Tensor, directions_LD: Tensor, *, bins: int = 40
) -> Histograms:
    """Distribution of both sides along each layer's direction.

    Args:
        positive_NLD: Shape (prompts, layers, hidden), any float dtype.
        negative_NLD: Same; the number of prompts may differ.
        directions_LD: Shape (layers, hidden), any norms.
        bins: Number of bins between the lowest and the highest projection of either side.

    Raises:
        ValueError: If a direction has no norm, or a projection is not finite.
    """
    unit_LD = _units(directions_LD)
    rows = []
    for layer, unit_D in enumerate(unit_LD):
        sides = [_array(widened(side[:, layer]).to(unit_D) @ unit_D) for side in (positive_NLD, negative_NLD)]
        edges = np.histogram_bin_edges(np.concatenate(sides).astype(np.float64), bins)
        rows.append((edges, *(np.histogram(side, edges)[0] for side in sides)))
    return Histograms(*(np.stack(column) for column in zip(*rows, strict=True)))


def pca_scatter(positive_ND: Tensor, negative_ND: Tensor) -> Scatter:
    """Both sides, positive first, in the plane in which they vary most.

    Each axis points to where the positive side is on average.

    Args:
        positive_ND: Shape (prompts, hidden), any float dtype.
        negative_ND: Same; the number of prompts may differ.

    Raises:
        ValueError: If a side is empty, the hidden sizes differ, or the activations span no plane.
    """
    check_sides(positive_ND, negative_ND)
    rows_MD = torch.cat([positive_ND.double(), negative_ND.double()])
    axes_2D = principal_axes(rows_MD, centred=True).directions_KD[:2]
    if len(axes_2D) < 2:
        raise ValueError(f"{len(rows_MD)} activations vary along {len(axes_2D)} axes; a plane needs 2")
    centred_MD = rows_MD - rows_MD.mean(dim=0)
    coordinates_M2 = centred_MD @ axes_2D.T
    is_positive_M = np.arange(len(rows_MD)) < len(positive_ND)
    # Around the common mean, one side's average has the opposite sign of the other's.
    signs_2 = torch.where(coordinates_M2[: len(positive_ND)].sum(dim=0) < 0, -1, 1)
    shares_2 = coordinates_M2.square().sum(dim=0) / centred_MD.square().sum()
    return Scatter(_array(coordinates_M2 * signs_2), is_positive_M, _array(shares_2))


def logit_lens(
    directions_LD: Tensor,
    unembedding_VD: Tensor,
    *,
    top: int = 10,
    norm: Callable[[Tensor], Tensor] | None = None,
) -> Lens:
    """Tokens whose logits are highest if the residual stream were the direction, or its opposite.

    Args:
        directions_LD: Shape (layers, hidden). The norm's epsilon is felt by short ones: scale them first.
        unembedding_VD: Shape (vocabulary, hidden).
        top: Number of tokens.
        norm: The model's final norm, from (..., hidden) to the same shape; None leaves it out.

    Raises:
        ValueError: If `top` is not between 1 and the size of the vocabulary, or a logit is not finite.

    Source: nostalgebraist, "interpreting GPT: the logit lens" (2020).
    """
    if not 1 <= top <= len(unembedding_VD):
        raise ValueError(f"top={top}; the vocabulary has {len(unembedding_VD)} tokens")
    both_L2D = torch.stack([directions_LD, -directions_LD], dim=1).to(unembedding_VD.device)
    states_L2D = widened(both_L2D) if norm is None else widened(norm(widened(both_L2D)))
    # By parts: a whole vocabulary in float32 is gigabytes.
    parts = [states_L2D @ part.to(states_L2D.dtype).T for part in unembedding_VD.split(8192)]
    logits_L2V = torch.cat(parts, dim=-1)
    if not bool(logits_L2V.isfinite().all()):
        raise ValueError(f"{int((~logits_L2V.isfinite()).sum())} logits of the directions are not finite")
    best = logits_L2V.topk(top)
    return Lens(_array(best.indices), _array(best.values))


def projections_by_position(
    states_NLTD: Tensor,
    directions_LD: Tensor,
    is_token_NT: Tensor,
    *,
    prompt_columns: int,
    as_cosine: bool = False,
) -> HeatMap:
    """How far every token's state lies along its layer's direction.

    Args:
        states_NLTD: Shape (prompts, layers, columns, hidden), any float dtype. All prompts end in the same
            column (padding is on the left), and generated tokens follow.
        directions_LD: Shape (layers, hidden), any norms.
        is_token_NT: Shape (prompts, columns), bool; false where a column is padding.
        prompt_columns: Columns that belong to the prompt; the others were generated.
        as_cosine: Cosine with the state instead of the projection in residual-stream units.

    Raises:
        ValueError: If the shapes do not fit, or a direction has no norm.
    """
    prompts, layers, columns, hidden = states_NLTD.shape
    if directions_LD.shape != (layers, hidden) or is_token_NT.shape != (prompts, columns):
        others = f"directions {tuple(directions_LD.shape)}, mask {tuple(is_token_NT.shape)}"
        raise ValueError(f"states {tuple(states_NLTD.shape)} do not fit {others}")
    if not 0 <= prompt_columns <= columns:
        raise ValueError(f"prompt_columns={prompt_columns}; there are {columns} columns")
    unit_LD = _units(directions_LD)
    values_LNT = [
        _along(widened(states_NLTD[:, layer]).to(unit_D), unit_D, as_cosine=as_cosine)
        for layer, unit_D in enumerate(unit_LD)
    ]
    values_NLT = torch.stack(values_LNT, dim=1)
    values_NLT = values_NLT.masked_fill(~is_token_NT.to(values_NLT.device)[:, None], float("nan"))
    return HeatMap(np.arange(columns) - prompt_columns, _array(values_NLT))


def _along(states_NTD: Tensor, unit_D: Tensor, *, as_cosine: bool) -> Tensor:
    """Projections; a state of zeros has the cosine 0."""
    along_NT = states_NTD @ unit_D
    if as_cosine:
        along_NT = along_NT / states_NTD.norm(dim=-1).clamp_min(torch.finfo(along_NT.dtype).tiny)
    return along_NT


def _units(directions_LD: Tensor) -> Tensor:
    wide_LD = widened(directions_LD)
    norms_L = wide_LD.norm(dim=1)
    wrong = [layer for layer, norm in enumerate(norms_L.tolist()) if not 0 < norm < float("inf")]
    if wrong:
        raise ValueError(f"the directions at layers {wrong} have norms {norms_L[wrong].tolist()}")
    unit_LD: Tensor = wide_LD / norms_L[:, None]
    return unit_LD


def _array(tensor: Tensor) -> np.ndarray:
    array: np.ndarray = tensor.detach().cpu().numpy()
    return array

"""What a direction shares with others, taken out; random directions. K others, V tokens, D hidden."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from jobs.directions.contrast import widened


def project_out(direction_D: Tensor, others_KD: Tensor) -> Tensor:
    """The part of a direction at right angles to every other one.

    It is the component in the orthogonal complement of their span, so it does not matter how long the
    others are, in which order they come, or whether some follow from the rest.

    Args:
        direction_D: Shape (hidden,), any float dtype; computed in float64.
        others_KD: Shape (others, hidden), any number of rows; rows of zeros are ignored.

    Returns:
        Shape (hidden,), float32 or wider, not longer than before, not normalised.

    Raises:
        ValueError: If the shapes do not fit, a number is not finite, or nothing is left.
    """
    if direction_D.ndim != 1 or others_KD.ndim != 2 or others_KD.shape[1] != len(direction_D):
        raise ValueError(f"a direction {tuple(direction_D.shape)} and others {tuple(others_KD.shape)}")
    if not bool(direction_D.isfinite().all()) or not bool(others_KD.isfinite().all()):
        raise ValueError("a direction to project, or one to project out, is not finite")
    direction = widened(direction_D)
    basis_RD = _basis(widened(others_KD).to(direction.device))
    rest = direction.double()
    for _ in range(2):  # the second pass takes what rounding left in the first
        rest = rest - (rest @ basis_RD.T) @ basis_RD
    if rest.norm() <= 100 * torch.finfo(direction.dtype).eps * direction.double().norm():
        raise ValueError(f"nothing is left of the direction: the {len(others_KD)} others span it")
    return rest.to(direction.dtype)


def project_out_tokens(
    direction_D: Tensor, unembedding_VD: Tensor, tokens: Sequence[int], *, gain_D: Tensor | None = None
) -> Tensor:
    """The part of a direction that does not move the logits of some tokens, such as those of the labels.

    Args:
        direction_D: Shape (hidden,).
        unembedding_VD: Shape (vocabulary, hidden).
        tokens: Ids whose rows are taken out.
        gain_D: Shape (hidden,), what the final norm multiplies each hidden unit by. With it the result moves
            the logits of no such token, up to the norm's common factor; without it the rows are taken as
            they are.

    Returns:
        Shape (hidden,), float32 or wider, not normalised.

    Raises:
        ValueError: If a token does not exist, or as `project_out`.
    """
    wrong = [token for token in tokens if not 0 <= token < len(unembedding_VD)]
    if wrong:
        raise ValueError(f"tokens {wrong} do not exist; the vocabulary has 0 to {len(unembedding_VD) - 1}")
    rows_KD = widened(unembedding_VD[list(tokens)])
    return project_out(direction_D, rows_KD if gain_D is None else rows_KD * widened(gain_D))


def random_like(directions: Tensor, *, seed: int) -> Tensor:
    """Directions of the same norms that point anywhere with equal probability: the control of an experiment.

    Args:
        directions: Shape (..., hidden), any float dtype.
        seed: The same seed and shape give the same result on every device.

    Returns:
        The same shape, float32 or wider.
    """
    like = widened(directions)
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(like.shape, generator=generator, dtype=torch.float64)
    drawn *= like.cpu().double().norm(dim=-1, keepdim=True) / drawn.norm(dim=-1, keepdim=True)
    return drawn.to(like.device, like.dtype)


def _basis(rows_KD: Tensor) -> Tensor:
    """Orthonormal rows with the same span. A row that the rest gives up to rounding adds nothing."""
    wide_KD = rows_KD.double()
    norms_K = wide_KD.norm(dim=1)
    unit_KD = wide_KD[norms_K > 0] / norms_K[norms_K > 0, None]
    if len(unit_KD) == 0:
        return wide_KD[:0]
    _, sizes, axes = torch.linalg.svd(unit_KD, full_matrices=False)
    rounding = 10 * math.sqrt(len(unit_KD)) * torch.finfo(rows_KD.dtype).eps
    independent: Tensor = axes[sizes > rounding]
    return independent

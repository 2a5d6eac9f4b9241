"""The part of the residual stream that some prompts' own activations span.

N prompts, T tokens, K directions, V vectors, D hidden.
"""

import torch
from torch import Tensor

from jobs.engine.slices import Slice
from jobs.errors import SpecError


def activation_span(slice_: Slice, counted_NT: Tensor, rank: int | None = None) -> Tensor:
    """The first right singular vectors of the token x activation matrix at the source, shape (K, D).

    Source: a comment on Mack and Turner, "Mechanistically eliciting latent behaviors in language models",
    2024, which proposes to stay on the manifold of a prompt's activations this way. The matrix is not
    centred.

    Args:
        slice_: The blocks, and the prompts.
        counted_NT: Which tokens make up the matrix.
        rank: How many; None takes all that the tokens span.

    Returns:
        Orthonormal rows, float32 or wider.

    Raises:
        SpecError: If the tokens span fewer directions.
    """
    states_KD = slice_.inputs_NTD[counted_NT.to(slice_.inputs_NTD.device)]
    _, sizes, basis_KD = torch.linalg.svd(states_KD.to(slice_.wide), full_matrices=False)
    known = int((sizes > sizes[0] * max(states_KD.shape) * torch.finfo(sizes.dtype).eps).sum())
    if rank is not None and not 1 <= rank <= known:
        raise SpecError(
            f"a span of {rank} directions; the {len(states_KD)} counted tokens of the prompts that vectors "
            f"are learned from span {known}"
        )
    first_KD: Tensor = basis_KD[: known if rank is None else rank]
    return first_KD


def share_within(vectors_VD: Tensor, basis_KD: Tensor) -> Tensor:
    """Each vector's share of squared norm in a span, from 0 to 1, shape (V,).

    Of random vectors it is K / D in the mean.

    Args:
        vectors_VD: None of them 0.
        basis_KD: Orthonormal rows.
    """
    inside_V = (vectors_VD.to(basis_KD) @ basis_KD.T).square().sum(dim=1)
    return inside_V / vectors_VD.to(basis_KD).square().sum(dim=1)

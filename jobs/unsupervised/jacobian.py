"""The slice's Jacobian at 0: products with it, and its first right singular vectors.

V vectors, T tokens, D hidden.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from jobs.engine.memory import is_out_of_memory
from jobs.engine.slices import Slice
from jobs.unsupervised.passes import Passes
from jobs.unsupervised.sphere import orthonormal


def plain_attention() -> AbstractContextManager[None]:
    """Inside the block attention runs as plain products: fused kernels can be differentiated once only."""
    context: AbstractContextManager[None] = sdpa_kernel(SDPBackend.MATH)
    return context


def directional(function: Callable[[Tensor], Tensor], at: Tensor, tangents: Tensor) -> tuple[Tensor, Tensor]:
    """Value and directional derivative of a function of hidden states.

    By forward-mode differentiation; where an operation of the blocks has none (experts that are multiplied
    together, quantised matrices), by differentiating the product with the transpose, which is linear.
    """
    with plain_attention():
        try:
            found: tuple[Tensor, Tensor] = torch.func.jvp(function, (at,), (tangents,))  # type: ignore[assignment]
        except RuntimeError as error:
            if is_out_of_memory(error):
                raise
            return _twice_backwards(function, at, tangents)
    return found


@torch.enable_grad()
def _twice_backwards(
    function: Callable[[Tensor], Tensor], at: Tensor, tangents: Tensor
) -> tuple[Tensor, Tensor]:
    at = at.detach().requires_grad_()
    value = function(at)
    ways = torch.zeros_like(value).requires_grad_()
    (pulled,) = torch.autograd.grad(value, at, ways, create_graph=True)
    (moved,) = torch.autograd.grad(pulled, ways, tangents)
    return value.detach(), moved


def stretched(slice_: Slice, counted_NT: Tensor, vectors_VD: Tensor) -> Tensor:
    """J^T J v of each vector v, shape (V, D): J is the Jacobian at 0 of all counted tokens of all prompts.

    Args:
        slice_: The blocks, and the prompts.
        counted_NT: Which tokens count.
        vectors_VD: The vectors, float32 or wider.

    Raises:
        OutOfMemory: If a single vector on a single prompt does not fit.
    """
    prompts_with_any = counted_NT.any(dim=1).nonzero()[:, 0].tolist()
    rows = [(vector, prompt) for vector in range(len(vectors_VD)) for prompt in prompts_with_any]
    found_VD = torch.zeros_like(vectors_VD)

    def look(chosen: list[int]) -> None:
        vectors, prompts = map(list, zip(*(rows[index] for index in chosen), strict=True))
        zeros_BD = torch.zeros_like(vectors_VD[vectors])

        def moved(theta_BD: Tensor) -> Tensor:
            return slice_.deltas(theta_BD, prompts) * counted_NT[prompts][..., None]

        _, ways_BTD = directional(moved, zeros_BD, vectors_VD[vectors])
        with torch.enable_grad():
            theta_BD = zeros_BD.requires_grad_()
            (pulled_BD,) = torch.autograd.grad(moved(theta_BD), theta_BD, ways_BTD.detach())
        found_VD.index_add_(0, torch.tensor(vectors, device=found_VD.device), pulled_BD)

    Passes(slice_, states=2).over(len(rows), look)
    return found_VD


def jacobian_directions(
    slice_: Slice, counted_NT: Tensor, vectors: int, *, passes: int = 15, extra: int = 8, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """The first right singular vectors of the Jacobian at 0, by randomised subspace iteration.

    They maximise MELBO's objective for p = 2, q = 1 in the limit of a small R. Source: Halko, Martinsson and
    Tropp, "Finding structure with randomness", arXiv:0909.4061, algorithm 4.4; that so few passes give
    useful steering vectors is the finding of the note "Power steering", 2026.

    Args:
        slice_: The blocks, and the prompts.
        counted_NT: Which tokens count.
        vectors: How many, at most D.
        passes: Passes through the slice; each product with the Jacobian or its transpose is one.
        extra: Vectors more that are iterated along, and dropped.
        seed: Of the random start.

    Returns:
        Orthonormal rows of shape (V, D), largest first, and the singular values, float32 or wider.

    Raises:
        OutOfMemory: If a single vector on a single prompt does not fit.
    """
    hidden = slice_.inputs_NTD.shape[-1]
    number = min(vectors + extra, hidden)
    start_VD = torch.randn((number, hidden), generator=torch.Generator().manual_seed(seed))
    basis_VD = orthonormal(start_VD.to(slice_.wide))
    for _ in range(max(1, passes // 2) - 1):
        basis_VD = orthonormal(stretched(slice_, counted_NT, basis_VD))
    squares_VV = basis_VD @ stretched(slice_, counted_NT, basis_VD).T
    squares_V, turn_VV = torch.linalg.eigh((squares_VV + squares_VV.T) / 2)
    order = squares_V.argsort(descending=True)[:vectors]
    return turn_VV[:, order].T @ basis_VD, squares_V[order].clamp(min=0).sqrt()

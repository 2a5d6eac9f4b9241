"""How far a perturbation of one layer moves a later one.

B rows, T tokens, D hidden.
"""

from typing import Literal

import torch
from torch import Tensor

from jobs.errors import SpecError

NormOver = Literal["hidden", "tokens"]
Counted = Literal["all", "but_first", "last"]


def counted_tokens(positions_NT: Tensor, which: Counted, *, last: int = 1) -> Tensor:
    """Which tokens count, bool of shape (N, T).

    Args:
        positions_NT: Position of each token in its prompt, from 0; -1 marks padding, on the left.
        which: `all`, all `but_first`, or the `last` few.
        last: How many those are.

    Raises:
        SpecError: If a prompt has too few tokens.
    """
    first = 1 if which == "but_first" else 0
    counted_NT = positions_NT >= first
    lengths = (positions_NT >= 0).sum(dim=1).tolist()
    least = last if which == "last" else first + 1
    for prompt, length in enumerate(lengths):
        if length < least:
            raise SpecError(
                f"prompt {prompt} has {length} tokens, and counted={which!r} asks for {least} or more"
            )
    if which == "last":
        counted_NT[:, :-last] = False
    return counted_NT


def movement(
    deltas_BTD: Tensor, counted_BT: Tensor, powers_B: Tensor, roots_B: Tensor, *, over: NormOver = "hidden"
) -> Tensor:
    """( sum over t of |delta_t|^p )^(1/q), the sum that MELBO maximises for one prompt.

    Source: Mack and Turner, "Mechanistically eliciting latent behaviors in language models", 2024. Their code
    takes the norm over the tokens instead, and the sum over the hidden units (`over="tokens"`); for p = 2
    both are the same.

    Args:
        deltas_BTD: Steered minus unsteered target.
        counted_BT: Which tokens count, bool.
        powers_B: p, at least 1.
        roots_B: q, at least 1.
        over: What the norm is taken over.

    Returns:
        Shape (B,), the dtype of the deltas, in residual-stream units to the power p / q.
    """
    dim = 2 if over == "hidden" else 1
    norms_BK = torch.linalg.vector_norm(deltas_BTD * counted_BT[..., None], dim=dim)
    values_B: Tensor = (norms_BK ** powers_B[:, None]).sum(dim=1) ** (1 / roots_B)
    return values_B


def shares(deltas_BTD: Tensor, counted_BT: Tensor, powers_B: Tensor) -> Tensor:
    """Each token's share of the sum of |delta_t|^p, shape (B, T); the rows sum to 1."""
    norms_BT = torch.linalg.vector_norm(deltas_BTD * counted_BT[..., None], dim=2)
    parts_BT: Tensor = norms_BT ** powers_B[:, None]
    return parts_BT / parts_BT.sum(dim=1, keepdim=True)

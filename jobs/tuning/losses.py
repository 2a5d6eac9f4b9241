"""What tuning makes small, as functions of tensors. K texts or tokens, R replies, D hidden, V vocabulary.

Tune-in and tune-out are those of Ackerman, "Representation Tuning", arXiv:2409.06927.
"""

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity


def cosines(states_KD: Tensor, direction_D: Tensor) -> Tensor:
    """Cosine of each state to a direction, shape (K,), float32 or wider."""
    wide = torch.promote_types(states_KD.dtype, torch.float32)
    return cosine_similarity(states_KD.to(wide), direction_D.to(states_KD.device, wide), dim=-1)


def tune_in(cosines_K: Tensor, *, enough: float = 1.0) -> Tensor:
    """Mean of (1 - cos) / 2, from 0 to 1; a state whose cosine is `enough` or more is pushed no further."""
    far_K = (1 - cosines_K) / 2
    return torch.where(cosines_K < enough, far_K, far_K.detach()).mean()


def tune_out(cosines_K: Tensor, *, enough: float = 0.0) -> Tensor:
    """Mean of |cos|, from 0 to 1; a state whose |cos| is `enough` or less is pushed no further."""
    far_K = cosines_K.abs()
    return torch.where(far_K > enough, far_K, far_K.detach()).mean()


def token_loss(logits_KV: Tensor, replies_KR: Tensor, *, floor: float = 0.0) -> Tensor:
    """Mean cross-entropy, nats a token; a loss of `floor` or less is pushed no further.

    Args:
        logits_KV: Before each token of a reply.
        replies_KR: That token, int64; or R of them that are to share the probability evenly, of which the
            loss cannot fall below ln R.
        floor: Nats a token.
    """
    wide = logits_KV.to(torch.promote_types(logits_KV.dtype, torch.float32))
    loss = -wide.log_softmax(dim=-1).gather(1, replies_KR.to(wide.device)).mean()
    return loss if float(loss.detach()) > floor else loss.detach()


def drift(states_KD: Tensor, before_KD: Tensor) -> Tensor:
    """Mean squared distance from what the states were before tuning, in units of their mean squared norm."""
    wide = torch.promote_types(states_KD.dtype, torch.float32)
    before_KD = before_KD.to(states_KD.device, wide)
    return (states_KD.to(wide) - before_KD).square().sum(dim=-1).mean() / before_KD.square().sum(
        dim=-1
    ).mean()

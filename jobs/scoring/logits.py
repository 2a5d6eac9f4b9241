"""Scores read off logits: pure tensor functions. N prompts, T tokens, V vocabulary."""

import torch
from torch import Tensor


def log_probabilities(logits_NV: Tensor) -> Tensor:
    """Log-softmax over the last dimension in float32 or wider, in nats."""
    wide = logits_NV if logits_NV.dtype == torch.float64 else logits_NV.float()
    return torch.log_softmax(wide, dim=-1)


def log_odds(log_probabilities_NV: Tensor, positive_N: Tensor, negative_N: Tensor) -> Tensor:
    """Log-odds of one next token over another, in nats.

    Args:
        log_probabilities_NV: Shape (prompts, vocabulary).
        positive_N: Token ids of the positive continuation, shape (prompts,).
        negative_N: Same for the negative one.

    Returns:
        Shape (prompts,): ln p(positive) - ln p(negative).
    """
    index = torch.arange(len(positive_N))
    return log_probabilities_NV[index, positive_N] - log_probabilities_NV[index, negative_N]


def kl_divergence(reference_NV: Tensor, other_NV: Tensor) -> Tensor:
    """Kullback-Leibler divergence KL(reference || other) in nats from log-probabilities.

    Args:
        reference_NV: Log-probabilities of the unsteered model, shape (..., vocabulary), finite.
        other_NV: Same for the steered model.

    Returns:
        Shape (...), at least 0 up to rounding.
    """
    return (reference_NV.exp() * (reference_NV - other_NV)).sum(dim=-1)


def negative_log_likelihood(logits_TV: Tensor, tokens_T: Tensor) -> Tensor:
    """Mean -ln p of the tokens, in nats a token.

    Args:
        logits_TV: Logits that predict each token, shape (tokens, vocabulary).
        tokens_T: The token ids that came, shape (tokens,), at least one.
    """
    predicted = log_probabilities(logits_TV)
    return -predicted[torch.arange(len(tokens_T)), tokens_T].mean()

"""Scores read off logits: pure tensor functions. N prompts, T tokens, V vocabulary."""

import math
from collections.abc import Iterable
from typing import NamedTuple

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


def token_kl(reference_TV: Tensor, other_TV: Tensor) -> Tensor:
    """KL(reference || other) of each token of a text that both models read, in nats.

    Args:
        reference_TV: Logits of the unsteered model that predict each token, shape (tokens, vocabulary); minus
            infinity where a token is ruled out.
        other_TV: Same for the steered model.

    Returns:
        Shape (tokens,), float32 or wider, at least 0 up to rounding; infinite where only `other` rules a
        possible token out.
    """
    reference, other = log_probabilities(reference_TV), log_probabilities(other_TV)
    probability = reference.exp()
    terms = probability * (reference - other)
    return torch.where(probability == 0, 0.0, terms).sum(dim=-1)


def completion_kl(reference_TV: Tensor, other_TV: Tensor) -> Tensor:
    """Mean of `token_kl` over a completion, in nats a token; a scalar, NaN for an empty completion.

    It is teacher-forced: both models read the prompt and the completion's own tokens, whoever wrote them.

    Args:
        reference_TV: Logits of the unsteered model that predict the completion's tokens, its first included.
        other_TV: Same for the steered model.
    """
    return token_kl(reference_TV, other_TV).mean()


class Window(NamedTuple):
    """A stretch of a text that is read at once.

    Attributes:
        start: Its first token.
        stop: One past its last token.
        new: How many of its last tokens are scored here; no other window scores them.
    """

    start: int
    stop: int
    new: int


def sliding_windows(tokens: int, *, window: int, stride: int) -> list[Window]:
    """Windows that score each token of a text but the first exactly once.

    Every scored token but those of the first window has at least `window - stride` tokens before it in view.

    Args:
        tokens: Length of the text.
        window: Most tokens that are read at once.
        stride: Tokens that each further window scores.

    Raises:
        ValueError: If the stride is not from 1 to window - 1: a window does not predict its own first token.
    """
    if not 1 <= stride < window:
        raise ValueError(f"stride={stride}, window={window}; it takes 1 <= stride < window")
    found: list[Window] = []
    start, stop = 0, 1
    while stop < tokens:
        end = min(start + window, tokens)
        found.append(Window(start, end, end - stop))
        start, stop = start + stride, end
    return found


class Surprise(NamedTuple):
    """Sum of -ln p over tokens, in nats, and their number."""

    nats: float
    tokens: int


def window_surprise(logits_TV: Tensor, tokens_T: Tensor, new: int) -> Surprise:
    """-ln p of the last `new` tokens of a window, added.

    Args:
        logits_TV: What the model puts out at each token of the window, shape (tokens, vocabulary).
        tokens_T: The window's token ids, shape (tokens,).
        new: How many tokens count, from the end.

    Raises:
        ValueError: If the first token would count, which nothing predicts.
    """
    if not 1 <= new < len(tokens_T):
        raise ValueError(f"new={new} of a window of {len(tokens_T)} tokens; all but the first can count")
    mean = negative_log_likelihood(logits_TV[-new - 1 : -1], tokens_T[-new:])
    return Surprise(float(mean) * new, new)


def perplexity(parts: Iterable[Surprise]) -> float:
    """Exponential of the mean -ln p of a token, over windows or texts; NaN without tokens.

    Sums are added before they are divided, so that a short last window counts for its tokens only. Infinite
    if it is beyond float64.
    """
    every = list(parts)
    tokens = sum(part.tokens for part in every)
    if tokens == 0:
        return math.nan
    try:
        return math.exp(sum(part.nats for part in every) / tokens)
    except OverflowError:
        return math.inf

"""Choose the next token: greedy, or drawn from each sequence's own generator. V vocabulary."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How tokens are chosen.

    Attributes:
        temperature: Divides the logits; 0 always takes the likeliest token.
        top_p: Draws among the likeliest tokens that together have this probability.
        repetition_penalty: Divides positive logits of tokens that the text holds already, and multiplies
            negative ones; 1 changes nothing (Keskar et al., arXiv:1909.05858).
    """

    temperature: float = 0.0
    top_p: float = 1.0
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < math.inf:
            raise ValueError(f"temperature={self.temperature}; it takes 0 (greedy) or more")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p={self.top_p}; it takes more than 0, at most 1")
        if not 0 < self.repetition_penalty < math.inf:
            raise ValueError(f"repetition_penalty={self.repetition_penalty}; it takes more than 0")


def choose(
    logits_SV: Tensor,
    sampling: Sampling,
    *,
    texts: Sequence[Sequence[int]],
    generators: Sequence[torch.Generator],
) -> list[int | None]:
    """The next token of each sequence, the same whatever other sequences are in the batch.

    None where a logit is NaN or plus infinity; minus infinity rules a token out.

    Args:
        logits_SV: Logits of the next token.
        sampling: How to choose.
        texts: Tokens of each sequence so far, prompt included; read only under a repetition penalty.
        generators: Random numbers of each sequence, on the CPU; one is drawn a token.
    """
    if sampling.repetition_penalty != 1:
        logits_SV = _penalised(logits_SV, sampling.repetition_penalty, texts)
    largest_S, tokens_S = logits_SV.max(dim=-1)
    finite_S = largest_S.isfinite()
    if sampling.temperature > 0:
        tokens_S = _drawn(logits_SV.masked_fill(~finite_S[:, None], 0), sampling, generators)
    pairs = zip(tokens_S.tolist(), finite_S.tolist(), strict=True)
    return [token if finite else None for token, finite in pairs]


def _drawn(logits_SV: Tensor, sampling: Sampling, generators: Sequence[torch.Generator]) -> Tensor:
    wide_SV = logits_SV.double()
    # The largest becomes 0, which no temperature takes to infinity.
    wide_SV = (wide_SV - wide_SV.max(dim=-1, keepdim=True).values) / sampling.temperature
    probabilities_SV = torch.softmax(wide_SV, dim=-1)
    sorted_SV, order_SV = probabilities_SV.sort(dim=-1, descending=True, stable=True)
    reached_SV = sorted_SV.cumsum(dim=-1)
    kept_SV = sorted_SV.masked_fill(reached_SV - sorted_SV >= sampling.top_p, 0)
    total_SV = kept_SV.cumsum(dim=-1)
    draws = [float(torch.rand((), generator=generator, dtype=torch.float64)) for generator in generators]
    wanted_S1 = torch.tensor(draws, dtype=torch.float64, device=total_SV.device)[:, None] * total_SV[:, -1:]
    place_S1 = torch.searchsorted(total_SV, wanted_S1, right=True).clamp(max=total_SV.shape[1] - 1)
    return order_SV.gather(1, place_S1)[:, 0]


def _penalised(logits_SV: Tensor, penalty: float, texts: Sequence[Sequence[int]]) -> Tensor:
    changed = logits_SV.clone()
    for row, text in enumerate(texts):
        seen = torch.tensor(sorted(set(text)), device=logits_SV.device)
        found = changed[row, seen]
        changed[row, seen] = torch.where(found > 0, found / penalty, found * penalty)
    return changed

"""Greedy completion of many prompts at once with a key-value cache."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import DynamicCache

from jobs.engine.replica import Replica, position_ids
from jobs.engine.steering import steered


class Continuation(NamedTuple):
    """What follows each prompt.

    Attributes:
        tokens: New tokens of each prompt, up to and without the first stop token.
        first_logits: Logits of the first new token, shape (prompts, vocabulary), the model's dtype.
    """

    tokens: list[list[int]]
    first_logits: Tensor


@torch.inference_mode()
def greedy(
    replica: Replica, prompts: Sequence[Sequence[int]], deltas: Mapping[int, Tensor], *, max_new_tokens: int
) -> Continuation:
    """The most likely continuation of each prompt, token by token.

    Args:
        replica: The model.
        prompts: Token ids; they may differ in length.
        deltas: Layer -> addition of shape (prompts, 1, hidden), applied at every token.
        max_new_tokens: Most tokens to add to each prompt, at least 1.
    """
    ids, mask = replica.pad(prompts)
    positions = position_ids(mask)
    cache = DynamicCache(config=replica.model.config)
    alive = list(range(len(prompts)))
    completions: list[list[int]] = [[] for _ in prompts]
    first_logits: Tensor | None = None
    for _ in range(max_new_tokens):
        index = torch.tensor(alive)
        with steered(replica, {layer: delta[index.to(delta.device)] for layer, delta in deltas.items()}):
            logits = replica.forward(ids, mask, positions, keep=1, cache=cache)
        if first_logits is None:
            first_logits = logits[:, -1]
        chosen = logits[:, -1].argmax(dim=-1)
        staying = [place for place, token in enumerate(chosen.tolist()) if token not in replica.stop_ids]
        for place in staying:
            completions[alive[place]].append(int(chosen[place]))
        if not staying:
            break
        if len(staying) < len(alive):
            keep = torch.tensor(staying, device=ids.device)
            cache.batch_select_indices(keep)
            mask, positions, chosen = mask[keep], positions[keep], chosen[keep]
            alive = [alive[place] for place in staying]
        ids = chosen.unsqueeze(1)
        mask = torch.cat([mask, mask.new_ones(len(alive), 1)], dim=1)
        positions = positions[:, -1:] + 1
    assert first_logits is not None
    return Continuation(completions, first_logits)

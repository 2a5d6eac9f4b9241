"""One pass over prompts into a key-value cache, and what is kept of it for later passes.

S sequences, T tokens, D hidden, V vocabulary, H heads, E head size.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from jobs.engine.cache import KeyValues
from jobs.engine.replica import Replica, position_ids
from jobs.engine.tables import Counts


class Prefill(NamedTuple):
    """Texts that were read, ready to be gone on with.

    Attributes:
        cache: Keys and values of the sequences.
        mask_ST: 1 where the cache holds a token, 0 where padding.
        logits_SV: Logits of the next token, the model's dtype.
        fired: What was changed, for each sequence.
    """

    cache: KeyValues
    mask_ST: Tensor
    logits_SV: Tensor
    fired: list[Counts]


class Read(NamedTuple):
    """What is kept of one text that was read.

    Attributes:
        states: Keys and values of the lowest blocks, each of shape (H, T, E).
        outputs: Layer -> what the block put out, shape (T, D).
        logits_V: Logits of the next token.
        fired: What was changed.
    """

    states: list[tuple[Tensor, ...]]
    outputs: Mapping[int, Tensor]
    logits_V: Tensor
    fired: Counts


def prefill(
    replica: Replica, texts: Sequence[Sequence[int]], beginnings: Sequence[Read | None], *, room: int = 0
) -> Prefill:
    """Read texts, each after its beginning: all have one, of equal length, or none has.

    Args:
        replica: The model.
        texts: Token ids.
        beginnings: What was read before each.
        room: Tokens for which the cache keeps memory free.
    """
    cache, mask_ST = begin(replica, texts, beginnings, room=room)
    ids_ST, _ = replica.pad(texts)
    positions_ST = position_ids(mask_ST)[:, -ids_ST.shape[1] :]
    logits = replica.forward(ids_ST, mask_ST, positions_ST, keep=1, cache=cache)
    return Prefill(cache, mask_ST, logits[:, -1], [{} for _ in texts])


def begin(
    replica: Replica, texts: Sequence[Sequence[int]], beginnings: Sequence[Read | None], *, room: int
) -> tuple[KeyValues, Tensor]:
    """A cache that holds the beginnings alone, and the mask of the whole texts."""
    _, mask_ST = replica.pad(texts)
    begun = 0 if beginnings[0] is None else beginnings[0].states[0][0].shape[1]
    cache = KeyValues(replica.layers, slots=len(texts), capacity=begun + mask_ST.shape[1] + room)
    for slot, beginning in enumerate(beginnings):
        if beginning is not None:
            for layer, states in zip(cache.by_layer, beginning.states, strict=True):
                layer.put([slot], 0, [each[None] for each in states])
    cache.length = begun
    return cache, torch.cat([mask_ST.new_ones((len(texts), begun)), mask_ST], dim=1)


def fill(cache: KeyValues, texts: Sequence[Read], blocks: int) -> None:
    """Give the lowest blocks, which were not computed, the texts' keys and values."""
    if not blocks:
        return
    longest = max(text.states[0][0].shape[1] for text in texts)
    for layer in range(blocks):
        found = cache.by_layer[layer]
        for slot, text in enumerate(texts):
            states = text.states[layer]
            start = found.length + longest - states[0].shape[1]
            found.put([slot], start, [each[None] for each in states])
        found.length += longest


def kept(found: Prefill, slot: int, tokens: int, *, blocks: int, outputs: Mapping[int, Tensor]) -> Read:
    """The last `tokens` tokens of one sequence, copied.

    Args:
        found: The pass.
        slot: The sequence's place in it.
        tokens: Number of tokens.
        blocks: Keys and values of so many blocks, from the bottom, are kept.
        outputs: Layer -> what the block put out, shape (S, T, D).
    """
    stop = found.cache.length
    return Read(
        [
            tuple(each[slot, :, stop - tokens : stop].clone() for each in layer.states)
            for layer in found.cache.by_layer[:blocks]
        ],
        {layer: output[slot, -tokens:].clone() for layer, output in outputs.items()},
        found.logits_SV[slot].clone(),
        found.fired[slot],
    )

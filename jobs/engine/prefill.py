"""One pass over texts into a key-value cache, and what is kept of it for later passes.

N and S texts, T tokens, D hidden, V vocabulary, H heads, E head size.
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
        cache: Keys and values of the texts.
        mask_ST: 1 where the cache holds a token, 0 where padding.
        logits_SV: Logits of the next token, the model's dtype.
        fired: What was changed, for each text.
    """

    cache: KeyValues
    mask_ST: Tensor
    logits_SV: Tensor
    fired: list[Counts]


class Texts:
    """What is kept of texts that were read, padded on the left.

    Args:
        number: How many texts.
        tokens: Length of the longest.

    Attributes:
        states: For each of the lowest blocks, keys and values of shape (N, H, T, E).
        outputs: Layer -> what the block put out, shape (N, T, D).
        logits_NV: Logits of the next token.
        fired: What was changed, for each text.
        tokens: Length of the longest.
    """

    def __init__(self, number: int, tokens: int) -> None:
        self.tokens = tokens
        self.states: list[tuple[Tensor, ...]] = []
        self.outputs: dict[int, Tensor] = {}
        self.logits_NV = torch.empty(0)
        self.fired: list[Counts] = [{} for _ in range(number)]

    def put(
        self, places: Sequence[int], found: Prefill, *, blocks: int, outputs: Mapping[int, Tensor]
    ) -> None:
        """Keep what a pass has found.

        Args:
            places: Number of each text of the pass.
            found: The pass; what it read last, not what it went on from, is kept.
            blocks: Keys and values of so many blocks, from the bottom, are kept.
            outputs: Layer -> what the block put out, shape (S, T, D).
        """
        stop = found.cache.length
        states = [layer.states for layer in found.cache.by_layer[:blocks]]
        tokens = min(self.tokens, stop)
        number = len(self.fired)
        if not len(self.logits_NV):
            self.logits_NV = found.logits_SV.new_zeros((number, found.logits_SV.shape[1]))
            self.states = [
                tuple(each.new_zeros((number, each.shape[1], self.tokens, each.shape[3])) for each in pair)
                for pair in states
            ]
            self.outputs = {
                layer: output.new_zeros((number, self.tokens, output.shape[2]))
                for layer, output in outputs.items()
            }
        for mine, theirs in zip(self.states, states, strict=True):
            for one, other in zip(mine, theirs, strict=True):
                one[places, :, self.tokens - tokens :] = other[:, :, stop - tokens : stop]
        for layer, output in outputs.items():
            self.outputs[layer][places, self.tokens - output.shape[1] :] = output
        self.logits_NV[places] = found.logits_SV
        for place, fired in zip(places, found.fired, strict=True):
            self.fired[place] = fired


def prefill(
    replica: Replica,
    texts: Sequence[Sequence[int]],
    beginnings: Texts | None = None,
    places: Sequence[int] = (),
) -> Prefill:
    """Read texts, each after its beginning.

    Args:
        replica: The model.
        texts: Token ids.
        beginnings: What was read before, of equal length; None if nothing was.
        places: Which beginning each text has.
    """
    cache, mask_ST = begin(replica, texts, beginnings, places)
    ids_ST, _ = replica.pad(texts)
    positions_ST = position_ids(mask_ST)[:, -ids_ST.shape[1] :]
    logits = replica.forward(ids_ST, mask_ST, positions_ST, keep=1, cache=cache)
    # A block that was skipped has not moved on by itself.
    cache.length = mask_ST.shape[1]
    return Prefill(cache, mask_ST, logits[:, -1], [{} for _ in texts])


def begin(
    replica: Replica, texts: Sequence[Sequence[int]], beginnings: Texts | None, places: Sequence[int]
) -> tuple[KeyValues, Tensor]:
    """A cache that holds the beginnings alone, and the mask of the whole texts. Takes what `prefill` does."""
    _, mask_ST = replica.pad(texts)
    begun = 0 if beginnings is None else beginnings.tokens
    cache = KeyValues(replica.layers, slots=len(texts), capacity=begun + mask_ST.shape[1])
    if beginnings is not None:
        for layer, states in zip(cache.by_layer, beginnings.states, strict=True):
            layer.put(slice(0, len(texts)), 0, [each[places] for each in states])
        cache.length = begun
    return cache, torch.cat([mask_ST.new_ones((len(texts), begun)), mask_ST], dim=1)

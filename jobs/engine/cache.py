"""Keys and values of many sequences in memory that is taken once.

Sequences stand in slots, the live ones first, and share one time axis: padding on the left, the newest
token last. A sequence that ends gives its slot to the last live one, one that joins is copied in, and
nothing else moves. H heads, T tokens, E head size.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor
from transformers import Cache
from transformers.cache_utils import DynamicLayer


class _Layer(DynamicLayer):
    """One layer's keys and values, written in place.

    Attributes:
        states: Keys and values, each (slots, H, capacity, E); nothing before the first write.
        length: Tokens of the time axis so far.
        at_1: Place of the time axis that the next token is written to, and all of whose capacity is then
            handed back; None while `length` says it.
    """

    is_sliding = False

    def __init__(self, slots: int, capacity: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._slots = slots
        self._capacity = capacity
        self.states: tuple[Tensor, ...] = ()
        self.length = 0
        self.at_1: Tensor | None = None

    def update(
        self, key_states: Tensor, value_states: Tensor, *arguments: Any, **options: Any
    ) -> tuple[Tensor, Tensor]:
        """Write new tokens of the first sequences; returns all that these have, as views."""
        sequences = key_states.shape[0]
        if self.at_1 is not None:
            keys, values = (states[:sequences] for states in self.states)
            keys.index_copy_(2, self.at_1, key_states)
            values.index_copy_(2, self.at_1, value_states)
            return keys, values
        self.put(slice(0, sequences), self.length, (key_states, value_states))
        self.length += key_states.shape[2]
        keys, values = (states[:sequences, :, : self.length] for states in self.states)
        return keys, values

    def put(self, slots: Any, start: int, states_SHTE: Sequence[Tensor]) -> None:
        """Write keys and values of some slots from a place of the time axis on."""
        if not self.states:
            self.states = tuple(self._buffer(states) for states in states_SHTE)
        for mine, theirs in zip(self.states, states_SHTE, strict=True):
            mine[slots, :, start : start + theirs.shape[2]] = theirs

    def _buffer(self, like_SHTE: Tensor) -> Tensor:
        _, heads, _, size = like_SHTE.shape
        return like_SHTE.new_zeros((self._slots, heads, self._capacity, size))

    def get_seq_length(self) -> int:
        """Tokens of the time axis so far."""
        return self.length

    def get_mask_sizes(self, query_length: int | Tensor) -> tuple[int, int]:
        """Tokens that a query may see, and the place of the first."""
        if self.at_1 is not None:
            return self._capacity, 0
        # Older releases of transformers hand over the positions of the query, not their number.
        query = query_length if isinstance(query_length, int) else query_length.shape[0]
        return self.length + query, 0


class KeyValues(Cache):
    """The cache of a batch.

    Args:
        layers: Number of decoder blocks.
        slots: Most sequences at a time.
        capacity: Most tokens of the time axis.

    Attributes:
        by_layer: One cache a block.
    """

    def __init__(self, layers: int, *, slots: int, capacity: int) -> None:
        self.by_layer = [_Layer(slots, capacity) for _ in range(layers)]
        super().__init__(layers=list(self.by_layer))
        self.capacity = capacity

    @property
    def length(self) -> int:
        """Tokens of the time axis so far."""
        return self.by_layer[-1].length

    @length.setter
    def length(self, tokens: int) -> None:
        for layer in self.by_layer:
            layer.length = tokens

    @contextmanager
    def written_at(self, at_1: Tensor) -> Iterator[None]:
        """Inside the block a pass writes one token to the place that a tensor names; `length` stays.

        Attention then sees the whole capacity, so that nothing but contents changes from step to step.
        """
        for layer in self.by_layer:
            layer.at_1 = at_1
        try:
            yield
        finally:
            for layer in self.by_layer:
                layer.at_1 = None

    def take_in(self, slots: Sequence[int], other: "KeyValues") -> None:
        """Copy the first sequences of another cache into these slots, their last token at `length`."""
        for mine, theirs in zip(self.by_layer, other.by_layer, strict=True):
            # What is masked still counts if it is not a number.
            for left_behind in mine.states:
                left_behind[list(slots)] = 0
            states = [states[: len(slots), :, : other.length] for states in theirs.states]
            mine.put(list(slots), self.length - other.length, states)

    def move(self, sources: Sequence[int], targets: Sequence[int]) -> None:
        """Put the sequences of some slots into other slots."""
        for layer in self.by_layer:
            for states in layer.states:
                states[targets, :, : self.length] = states[sources, :, : self.length]

    def follow(self, computed: Sequence[int], leader: Sequence[int]) -> None:
        """Write the newest token of the slots that a block has not computed.

        Args:
            computed: For each block, how many slots it has computed.
            leader: For each slot, the one whose keys and values it takes.
        """
        for layer, number in zip(self.by_layer, computed, strict=True):
            if number < len(leader):
                newest = [states[leader[number:], :, layer.length - 1, None] for states in layer.states]
                layer.put(slice(number, len(leader)), layer.length - 1, newest)

    def forget(self, tokens: int) -> None:
        """Drop the oldest tokens of the time axis, which no live sequence has."""
        kept = self.length - tokens
        for layer in self.by_layer:
            for states in layer.states:
                states[:, :, :kept] = states[:, :, tokens : self.length].clone()
                states[:, :, kept : self.length] = 0
        self.length = kept

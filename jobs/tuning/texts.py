"""What a tuning reads: prompts with their replies, and what of them no step has to compute again.

T tokens, D hidden.
"""

from collections.abc import Hashable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from jobs.engine.memory import micro_batches
from jobs.engine.packed import Layout, common_beginning, padded, run_blocks, side_by_side
from jobs.engine.replica import Replica


class Text(NamedTuple):
    """Token ids of a prompt, and of what is to be said to it.

    Attributes:
        prompt: At least one.
        reply: The reply; it may be empty.
        others: Further replies of the same length that are as good as it.
    """

    prompt: list[int]
    reply: list[int]
    others: Sequence[list[int]] = ()

    @property
    def read(self) -> list[int]:
        """What the model reads: all but the last token of the reply."""
        return [*self.prompt, *self.reply[:-1]]


def contents(texts: Sequence[Text]) -> Hashable:
    """Equal for equal texts."""
    return tuple((tuple(each.prompt), tuple(each.reply), *map(tuple, each.others)) for each in texts)


class Texts:
    """Texts for one model, and the states that enter the lowest trained block, computed once.

    Args:
        replica: The model, untuned.
        texts: At least one.
        first: Lowest block that is trained.
        compared: Blocks whose untuned output is needed as well.

    Attributes:
        texts: As given.
        first: Lowest block that has to run: 0 if the states that enter `first` would take more than the
            replica's memory.
        together: Whether a batch runs as one sequence; otherwise it is padded.
    """

    def __init__(
        self, replica: Replica, texts: Sequence[Text], *, first: int, compared: Sequence[int] = ()
    ) -> None:
        self.replica = replica
        self.texts = list(texts)
        read = [text.read for text in texts]
        self._shared = common_beginning(read)
        self.together = _runs_together(replica, read, self._shared)
        fits = sum(map(len, read)) * replica.state_bytes * (1 + len(compared)) <= replica.memory
        self.first = first if fits else 0
        wanted = [*({self.first - 1} - {-1}), *compared]
        self._states = self._untuned(wanted) if wanted else {}

    @staticmethod
    def kept(replica: Replica, texts: Sequence[Text], *, first: int, compared: Sequence[int] = ()) -> "Texts":
        """The ones of the last trial, where they are the same."""
        return replica.keep(
            (__name__, contents(texts), first, tuple(compared)),
            lambda: Texts(replica, texts, first=first, compared=compared),
        )

    @property
    def most_tokens(self) -> int:
        """Of a pass without gradients."""
        return min(self.replica.token_budget, _TOGETHER) if self.together else self.replica.token_budget

    def layout(self, chosen: Sequence[int]) -> Layout:
        """A batch of texts."""
        return _arranged(
            self.replica,
            [self.texts[index].read for index in chosen],
            self._shared if self.together else None,
        )

    def entering(self, chosen: Sequence[int], layout: Layout) -> Tensor | None:
        """States that enter the block `first`, shape (S x T, D); None if that is 0."""
        if not self.first:
            return None
        states = [self._states[self.first - 1][index] for index in chosen]
        size = layout.ids_ST.numel()
        entering = states[0].new_zeros((size, self.replica.hidden_size))
        for place_T, state_TD in zip(layout.places, states, strict=True):
            entering[place_T] = state_TD
        return entering

    def before(self, layer: int, index: int) -> Tensor:
        """Untuned output of a compared block for one text, shape (T, D)."""
        return self._states[layer][index]

    @torch.no_grad()
    def _untuned(self, layers: Sequence[int]) -> dict[int, list[Tensor]]:
        found: dict[int, dict[int, Tensor]] = {layer: {} for layer in layers}
        for batch in micro_batches([len(text.read) for text in self.texts], self.most_tokens):
            layout = self.layout(batch)
            states = run_blocks(self.replica, layout, last=max(layers), layers=layers).states
            for layer in layers:
                found[layer] |= {
                    index: states[layer][place_T] for index, place_T in zip(batch, layout.places, strict=True)
                }
        return {layer: [found[layer][index] for index in range(len(self.texts))] for layer in layers}


_TOGETHER = 1024
"""Most tokens of texts in one sequence, whose attention costs the square."""


def _arranged(replica: Replica, read: Sequence[Sequence[int]], shared: int | None) -> Layout:
    return padded(replica, read) if shared is None else side_by_side(replica, read, shared)


_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4}
"""Of the largest state; a wrong mask or position is far beyond it."""


@torch.no_grad()
def _runs_together(replica: Replica, read: Sequence[Sequence[int]], shared: int) -> bool:
    """Whether texts give in one sequence what they give alone: tried on the first, as models differ."""
    if replica.has_windows:
        return False
    tried, top = read[:3], replica.layers - 1
    states = []
    for beginning in (None, shared):
        layout = _arranged(replica, tried, beginning)
        try:
            state = run_blocks(replica, layout, layers=[top]).states[top]
        except (RuntimeError, ValueError, IndexError):
            return False
        states.append(torch.cat([state[place_T] for place_T in layout.places]))
    off = (states[0] - states[1]).abs().max() / states[0].abs().max()
    return bool(off <= _TOLERANCE.get(replica.model.dtype, 0.05))

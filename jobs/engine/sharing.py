"""Compute once what steering does not change: the blocks up to the lowest steered one.

Their outputs are the same for every configuration, so one unsteered pass over fixed prompts serves
all of them. L layers, S sequences, T tokens, D hidden.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from jobs.engine.batches import micro_batches
from jobs.engine.replica import Replica
from jobs.engine.steering import recorded


class LowerLayers:
    """Unsteered output of every block for some prompts, computed at the first use and kept on the CPU.

    Args:
        replica: The model.
        prompts: Token ids.
        budget_bytes: Most memory to keep; prompts that need more are not kept at all.
    """

    def __init__(
        self, replica: Replica, prompts: Sequence[Sequence[int]], *, budget_bytes: int = 2**30
    ) -> None:
        self._replica = replica
        self._prompts = prompts
        self._outputs: list[Tensor] = []
        size = replica.layers * replica.hidden_size * torch.finfo(replica.model.dtype).bits // 8
        self.fits = sum(map(len, prompts)) * size <= budget_bytes

    def at(self, layer: int, prompts: Sequence[int]) -> Tensor:
        """Output of block `layer`, shape (S, T, D), for the named prompts, padded on the left with zeros."""
        if not self._outputs:
            self._outputs = self._compute()
        chosen = [self._outputs[prompt][layer] for prompt in prompts]
        longest = max(len(output) for output in chosen)
        padded = chosen[0].new_zeros((len(chosen), longest, self._replica.hidden_size))
        for place, output in enumerate(chosen):
            padded[place, longest - len(output) :] = output
        return padded

    @torch.inference_mode()
    def _compute(self) -> list[Tensor]:
        kept: list[Tensor] = [torch.empty(0)] * len(self._prompts)
        for batch in micro_batches([len(prompt) for prompt in self._prompts], self._replica.token_budget):
            with recorded(self._replica) as outputs:
                self._replica.logits([self._prompts[index] for index in batch], keep=1)
            stacked_LSTD = torch.stack([outputs[layer].cpu() for layer in range(self._replica.layers)])
            for place, index in enumerate(batch):
                kept[index] = stacked_LSTD[:, place, -len(self._prompts[index]) :].clone()
        return kept


@contextmanager
def resumed(replica: Replica, layer: int, output_STD: Tensor) -> Iterator[None]:
    """Inside the block, a pass without cache begins with block `layer`'s output.

    Args:
        replica: The model.
        layer: Last block that is not computed.
        output_STD: Its output, shape (sequences, tokens, hidden); hooks on it still run.
    """
    blocks = [replica.blocks[index] for index in range(layer + 1)]
    try:
        device = next(blocks[-1].parameters()).device
        for block in blocks:
            block.forward = _giving(output_STD.to(device), as_tuple=replica.blocks_give_tuples)
        yield
    finally:
        for block in blocks:
            block.__dict__.pop("forward", None)


def _giving(output: Tensor, *, as_tuple: bool) -> Any:
    def forward(*arguments: Any, **options: Any) -> Any:
        return (output,) if as_tuple else output

    return forward

"""Residual-stream activations of many prompts in one pass each."""

from collections.abc import Sequence

import torch
from torch import Tensor

from jobs.engine.memory import in_batches
from jobs.engine.recording import recorded
from jobs.engine.replica import Replica
from jobs.errors import SpecError


@torch.inference_mode()
def capture_last(replica: Replica, prompts: Sequence[Sequence[int]], *, offset: int = 1) -> Tensor:
    """Output of every block at one token of each prompt, counted from the end.

    Args:
        replica: The model.
        prompts: Token ids.
        offset: 1 = last token, 2 = the one before, and so on.

    Returns:
        Shape (prompts, layers, hidden), the model's dtype, on the CPU.

    Raises:
        SpecError: If a prompt is shorter than `offset`.
    """
    lengths = [len(prompt) for prompt in prompts]
    if min(lengths) < offset:
        raise SpecError(
            f"offset={offset}, and prompt {lengths.index(min(lengths))} has only {min(lengths)} tokens"
        )

    def capture(batch: list[int]) -> Sequence[Tensor]:
        with recorded(replica) as outputs:
            replica.logits([prompts[index] for index in batch], keep=1)
        states = [outputs[layer][:, -offset].cpu() for layer in range(replica.layers)]
        return torch.stack(states, dim=1).unbind()

    return torch.stack(in_batches(replica, lengths, capture))

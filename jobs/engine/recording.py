"""Record what blocks put out. S sequences, T tokens, D hidden."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from jobs.engine.replica import Replica


@contextmanager
def recorded(replica: Replica, layers: Sequence[int] | None = None) -> Iterator[dict[int, Tensor]]:
    """Inside the block, a dictionary that each forward pass fills: layer -> output of shape (S, T, D).

    Args:
        replica: The model.
        layers: Blocks whose outputs are wanted; None takes all.
    """
    outputs: dict[int, Tensor] = {}
    handles = []
    try:
        for layer in range(replica.layers) if layers is None else layers:
            handles.append(replica.blocks[layer].register_forward_hook(_recorder(outputs, layer)))
        yield outputs
    finally:
        for handle in handles:
            handle.remove()


def _recorder(outputs: dict[int, Tensor], layer: int) -> Any:
    def record(module: nn.Module, inputs: Any, output: Any) -> None:
        outputs[layer] = output[0] if isinstance(output, tuple) else output

    return record

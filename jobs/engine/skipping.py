"""Passes in which a block computes only the first sequences of its batch; the others' outputs are known.

S sequences, T tokens, D hidden.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from jobs.engine.replica import Replica

Known = Callable[[int, Tensor | None], Tensor | None]
"""Takes a block and its output for the first sequences, None if it computed none; gives that for the others.

None stands for any value: it is never read.
"""


def first_sequences(replica: Replica, depths: Sequence[int]) -> list[int]:
    """How many sequences each block has to compute.

    Args:
        replica: The model.
        depths: For each sequence how many blocks, from the bottom, need not compute it; ascending.
    """
    if not separable(replica):
        depths = [depths[0]] * len(depths)
    return [sum(depth <= block for depth in depths) for block in range(replica.layers)]


@contextmanager
def skipping(replica: Replica, computed: Sequence[int], sequences: int, known: Known) -> Iterator[None]:
    """Inside the block, every pass computes only the first `computed[b]` sequences in block `b`.

    Hooks on a block still see all sequences; those inside it see the first. Keys and values of the others
    are not written.

    Args:
        replica: The model; `separable` unless each block computes all sequences or none.
        computed: For each block.
        sequences: Number of sequences in the batch.
        known: What the blocks put out for the other sequences.
    """
    changed = [index for index, number in enumerate(computed) if number < sequences]
    as_tuples = replica.blocks_give_tuples
    before: list[Any] = [vars(block).get("forward") for block in replica.blocks]
    try:
        for index in changed:
            replica.blocks[index].forward = _partly(
                replica, index, computed[index], sequences, known, as_tuples
            )
        yield
    finally:
        for index in changed:
            vars(replica.blocks[index]).pop("forward", None)
            if before[index] is not None:
                replica.blocks[index].forward = before[index]


def _partly(
    replica: Replica, block: int, number: int, sequences: int, known: Known, as_tuple: bool
) -> Callable[..., Any]:
    whole_forward = replica.blocks[block].forward

    def first(value: Any) -> Any:
        if isinstance(value, Tensor) and value.dim() > 1 and value.shape[0] == sequences:
            return value[:number]
        return tuple(map(first, value)) if type(value) is tuple else value

    def forward(*arguments: Any, **options: Any) -> Any:
        h_STD = arguments[0] if arguments else options["hidden_states"]
        output: Any = (None,) if as_tuple else None
        if number:
            output = whole_forward(
                *map(first, arguments), **{name: first(value) for name, value in options.items()}
            )
        computed = output[0] if isinstance(output, tuple) else output
        others = known(block, computed)
        others = h_STD[number:] if others is None else others
        found = others if computed is None else torch.cat([computed, others])
        return (found, *output[1:]) if isinstance(output, tuple) else found

    return forward


def separable(replica: Replica) -> bool:
    """Whether a block can compute a part of the batch: tried out, as models hand on what they like."""
    if replica.separable is None:
        config = replica.model.config.get_text_config()
        heads = (getattr(config, name, None) for name in ("num_attention_heads", "num_key_value_heads"))
        # As many sequences as heads: what is cut along the wrong dimension shows.
        replica.separable = all(_tried(replica, number) for number in {3, *heads} if number and number > 1)
    return replica.separable


@torch.inference_mode()
def _tried(replica: Replica, sequences: int) -> bool:
    # As many tokens as sequences, for the same reason.
    texts = [[(first + at) % sequences for at in range(sequences)] for first in range(sequences)]
    computed = [sequences - 1] * replica.layers
    expected = replica.logits(texts, keep=1)[:-1]
    try:
        with skipping(replica, computed, len(texts), lambda block, output: None):
            found = replica.logits(texts, keep=1)[:-1]
    except (RuntimeError, IndexError, ValueError):
        return False
    return torch.allclose(found, expected, rtol=1e-2, atol=1e-2)

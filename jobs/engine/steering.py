"""Interventions as data: one table a layer, one row of the table a configuration.

A pack's configurations differ only in what their table rows hold, never in code, so that
any mix of layers, vectors and strengths rides in one batch.
Shapes: R rows (configurations), S sequences, T tokens, D hidden.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from jobs.engine.replica import Replica
from jobs.errors import SpecError


@dataclass(frozen=True, slots=True, kw_only=True)
class Addition:
    """Add a vector to the output of a block, at every token, prompt and generated alike.

    Attributes:
        layer: Block whose output is changed, counted from 0.
        vector: Shape (hidden,), in residual-stream units, already scaled.
    """

    layer: int
    vector: np.ndarray


class RowTables:
    """What each configuration adds at each layer.

    Attributes:
        by_layer: Layer -> deltas of shape (R, D) in the model's dtype; zero rows change nothing.
    """

    def __init__(self, by_layer: Mapping[int, Tensor]) -> None:
        self.by_layer = by_layer

    def lowest(self, row: int) -> int | None:
        """The lowest layer at which a row changes anything; None if it changes nothing."""
        return min((layer for layer, table in self.by_layer.items() if bool(table[row].any())), default=None)

    def take(self, rows: Sequence[int]) -> dict[int, Tensor]:
        """Deltas of shape (S, 1, D) a layer for sequences that belong to these rows."""
        index = torch.tensor(rows)
        return {layer: table[index.to(table.device)].unsqueeze(1) for layer, table in self.by_layer.items()}


def row_tables(replica: Replica, rows: Sequence[Sequence[Addition]]) -> RowTables:
    """Tables of a pack: row `i` of each holds the sum of configuration `i`'s additions there.

    Raises:
        SpecError: If a layer does not exist, or a vector has another width or is not finite;
            the message names the row.
    """
    tables: dict[int, Tensor] = {}
    for index, additions in enumerate(rows):
        for addition in additions:
            _check(replica, index, addition)
            if addition.layer not in tables:
                tables[addition.layer] = _empty_table(replica, addition.layer, len(rows))
            table = tables[addition.layer]
            table[index] += torch.as_tensor(addition.vector).to(table)
    return RowTables(tables)


def _empty_table(replica: Replica, layer: int, rows: int) -> Tensor:
    like = next(replica.blocks[layer].parameters())
    return torch.zeros((rows, replica.hidden_size), dtype=replica.model.dtype, device=like.device)


def _check(replica: Replica, row: int, addition: Addition) -> None:
    if not 0 <= addition.layer < replica.layers:
        raise SpecError(
            f"row {row}: layer {addition.layer} does not exist; the model has 0 to {replica.layers - 1}"
        )
    if addition.vector.shape != (replica.hidden_size,):
        raise SpecError(
            f"row {row}: vector of shape {addition.vector.shape}; "
            f"the model's hidden size is {replica.hidden_size}"
        )
    if not np.isfinite(addition.vector).all():
        raise SpecError(f"row {row}: the vector holds NaN or an infinity; extract it again")


@contextmanager
def steered(replica: Replica, deltas: Mapping[int, Tensor]) -> Iterator[None]:
    """Inside the block, every forward pass adds `deltas[layer]`, shape (S, 1, D), to that block's output."""
    handles = []
    try:
        for layer, delta in deltas.items():
            handles.append(replica.blocks[layer].register_forward_hook(_adder(delta)))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _adder(delta: Tensor) -> Any:
    def add(module: nn.Module, inputs: Any, output: Any) -> Any:
        if isinstance(output, tuple):
            return (output[0] + delta, *output[1:])
        return output + delta

    return add


@contextmanager
def recorded(replica: Replica) -> Iterator[dict[int, Tensor]]:
    """Inside the block, a dictionary that each forward pass fills: layer -> output of shape (S, T, D)."""
    outputs: dict[int, Tensor] = {}
    handles = []
    try:
        for layer, block in enumerate(replica.blocks):
            handles.append(block.register_forward_hook(_recorder(outputs, layer)))
        yield outputs
    finally:
        for handle in handles:
            handle.remove()


def _recorder(outputs: dict[int, Tensor], layer: int) -> Any:
    def record(module: nn.Module, inputs: Any, output: Any) -> None:
        outputs[layer] = output[0] if isinstance(output, tuple) else output

    return record

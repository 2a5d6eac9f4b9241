"""Pass many perturbations through a slice, with what their gradients need, in batches that fit."""

from collections.abc import Callable, Iterator
from functools import cached_property

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from jobs.engine.memory import share, within_memory
from jobs.engine.slices import Slice


class Passes:
    """Cuts the rows of a slice into batches.

    Args:
        slice_: The blocks, and the prompts.
        states: How many times a row holds what its gradient needs: 2 where tangents ride along.
    """

    def __init__(self, slice_: Slice, *, states: int = 1) -> None:
        self._slice = slice_
        self._states = states

    def over(self, rows: int, look: Callable[[list[int]], None]) -> None:
        """Let `look` see every row, a batch of row numbers at a time.

        Args:
            rows: How many.
            look: Notes what it finds; where memory ran out under it, it sees the same rows again.

        Raises:
            OutOfMemory: If a single row does not fit.
        """
        replica = self._slice.replica

        def run(left: list[int]) -> Iterator[tuple[int, None]]:
            most = max(1, share(replica, "batch") // (self._states * self._row_bytes))
            for start in range(0, len(left), most):
                chosen = left[start : start + most]
                look(chosen)
                yield from ((index, None) for index in chosen)

        for _ in within_memory(replica, range(rows), run):
            pass

    @cached_property
    def _row_bytes(self) -> int:
        """What a row keeps for its gradient, measured."""
        weights = {each.untyped_storage().data_ptr() for each in self._slice.replica.model.parameters()}
        sizes: dict[int, int] = {}

        def measure(saved: Tensor) -> Tensor:
            storage = saved.untyped_storage()
            sizes[storage.data_ptr()] = storage.nbytes()
            return saved

        theta_1D = torch.zeros_like(self._slice.inputs_NTD[:1, 0]).requires_grad_()
        with torch.enable_grad(), saved_tensors_hooks(measure, lambda saved: saved):
            deltas = self._slice.deltas(theta_1D, [0])
        del deltas
        return max(1, sum(size for at, size in sizes.items() if at not in weights))

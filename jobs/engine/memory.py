"""Work in batches that fit, halved where memory runs out all the same."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Literal, TypeVar

import torch

from jobs.engine.replica import Replica
from jobs.errors import OutOfMemory

Found = TypeVar("Found")
Use = Literal["batch", "unsteered", "kept", "beginnings", "pass"]
_SIXTEENTHS: dict[Use, int] = {"batch": 6, "kept": 2, "unsteered": 2, "beginnings": 2, "pass": 2}
"""What a replica's memory is for: the sequences that are being completed, unsteered prompts that are kept for
the next call, those of this call, the common beginnings of configurations, and the pass that is running. The
two that are left are for what its lanes keep."""
_WORKING_STATES = 16
"""A block works with so many hidden states of a token at a time: attention, the wide part, float32 copies."""


def share(replica: Replica, use: Use) -> int:
    """Bytes of the replica's memory for a use."""
    return replica.memory * _SIXTEENTHS[use] // 16


def pass_tokens(replica: Replica) -> int:
    """Most tokens (sequences x padded length) of one pass that keeps keys and values."""
    token_bytes = replica.cache_bytes + _WORKING_STATES * replica.state_bytes
    return max(1, min(replica.token_budget, share(replica, "pass") // token_bytes))


def micro_batches(lengths: Sequence[int], budget: int) -> Iterator[list[int]]:
    """Indices of `lengths` in groups whose padded size stays within the budget.

    Neighbours in length ride together, so that little is spent on padding. A sequence that is
    longer than the budget gets a batch of its own.

    Args:
        lengths: Tokens of each sequence, new tokens included.
        budget: Most tokens, padding included, of one group.
    """
    order = sorted(range(len(lengths)), key=lambda index: (-lengths[index], index))
    start = 0
    while start < len(order):
        count = max(1, budget // max(1, lengths[order[start]]))
        yield order[start : start + count]
        start += count


def in_batches(
    replica: Replica, costs: Sequence[int], run: Callable[[list[int]], Sequence[Found]]
) -> list[Found]:
    """What `run` finds for every sequence, in batches of at most `pass_tokens`.

    Args:
        replica: The model.
        costs: Tokens of the budget that each sequence takes: its own, new ones included, or more.
        run: Takes the indices of a batch and gives what it finds for each.

    Raises:
        OutOfMemory: If a single sequence does not fit.
    """

    def run_left(left: list[int]) -> Iterator[tuple[int, Found]]:
        for batch in micro_batches([costs[index] for index in left], pass_tokens(replica)):
            chosen = [left[place] for place in batch]
            yield from zip(chosen, run(chosen), strict=True)

    found = dict(within_memory(replica, range(len(costs)), run_left))
    return [found[index] for index in range(len(costs))]


def within_memory(
    replica: Replica, indices: Iterable[int], run: Callable[[list[int]], Iterator[tuple[int, Found]]]
) -> Iterator[tuple[int, Found]]:
    """All that `run` finds; where memory runs out, the rest is run again with half of the replica's budgets.

    Args:
        replica: The model; budgets that were halved stay so.
        indices: Of the work.
        run: Takes the indices that are left and yields each with what it finds, within the budgets.

    Raises:
        OutOfMemory: If even one at a time does not fit; the budgets are then as they were.
    """
    left = dict.fromkeys(indices)
    budgets = replica.token_budget, replica.memory
    while left:
        try:
            for index, found in run(list(left)):
                del left[index]
                yield index, found
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            if replica.token_budget == 1:
                replica.token_budget, replica.memory = budgets
                raise _too_large(replica) from error
            replica.token_budget = max(1, replica.token_budget // 2)
            replica.memory //= 2


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out."""
    # The CPU's allocator has no error class of its own.
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def _too_large(replica: Replica) -> OutOfMemory:
    total = None
    if replica.device.type == "cuda":
        total = int(torch.cuda.get_device_properties(replica.device).total_memory)
    return OutOfMemory(
        f"a single row does not fit into the memory of {replica.device}; use shorter prompts, fewer new "
        "tokens, a smaller dtype or a larger device",
        limit=total,
    )

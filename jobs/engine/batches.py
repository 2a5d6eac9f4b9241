"""Cut work into micro-batches that fit a token budget."""

from collections.abc import Iterator, Sequence


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

"""Where the sequences of a decoding batch stand, so that those that have the same text run as one.

The blocks below a configuration's lowest change put out what they put out unsteered. Sequences of the same
text thus differ only above: in every block one of them, their leader, computes for those that have not been
changed yet.
"""

from collections.abc import Hashable, Sequence


def skipped(texts: Sequence[Hashable], untouched: Sequence[int], layers: int) -> tuple[list[int], list[int]]:
    """How many blocks, from the bottom, each sequence need not compute, and who does it for it.

    Args:
        texts: What each sequence has read; equal where all tokens are.
        untouched: For each sequence, how many blocks put out what they would unsteered; see `RowTables`.
        layers: Number of blocks.

    Returns:
        Number of blocks of each sequence, 0 for a leader; and each sequence's leader.
    """
    leaders: dict[Hashable, int] = {}
    for index, text in enumerate(texts):
        if text not in leaders or untouched[index] > untouched[leaders[text]]:
            leaders[text] = index
    leader = [leaders[text] for text in texts]
    blocks = [0 if index == leader[index] else min(depth, layers) for index, depth in enumerate(untouched)]
    return blocks, leader


def in_order(keys: Sequence[int]) -> list[int]:
    """Indices that sort the keys and leave as many as possible in their places."""
    wanted = sorted(keys)
    order = list(range(len(keys)))
    loose: dict[int, list[int]] = {}
    for place, key in enumerate(keys):
        if key != wanted[place]:
            loose.setdefault(key, []).append(place)
    for place, key in enumerate(wanted):
        if key != keys[place]:
            order[place] = loose[key].pop()
    return order

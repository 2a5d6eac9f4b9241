"""Prompts that begin alike: which of them to read together, and how much of them only once."""

from collections.abc import Sequence
from itertools import groupby, takewhile
from typing import NamedTuple

from jobs.engine.replica import Replica
from jobs.engine.tables import RowTables

_COST_TOKENS = 64
"""What another family costs, in tokens read: its prompts fill batches of their own."""


class Family(NamedTuple):
    """Prompts that begin alike.

    Attributes:
        prompts: Their numbers.
        prefix: Number of first tokens that they have in common and that are read once for all.
    """

    prompts: list[int]
    prefix: int


def families(
    replica: Replica, prompts: Sequence[Sequence[int]], used: Sequence[int], tables: RowTables
) -> list[Family]:
    """The cut of prompts into families that saves the most tokens.

    The rest of a prompt is at least one token, and holds all positions that configurations count from the
    end. Nothing is shared where the model's windows of attention would see the padding that stands between
    the beginning and the rest.

    Args:
        replica: The model.
        prompts: Token ids.
        used: Numbers of the prompts to cut.
        tables: The configurations.
    """
    if replica.has_windows:
        return [Family(list(used), 0)]
    rest = max((-at for row in tables.positions for positions in row for at in positions), default=1)
    ordered = sorted(used, key=lambda prompt: tuple(prompts[prompt]))
    _, found = _best(prompts, ordered, max(1, rest))
    return found


def _best(prompts: Sequence[Sequence[int]], members: list[int], rest: int) -> tuple[int, list[Family]]:
    """The best cut of prompts in lexical order, and how many tokens it saves."""
    longest = max(0, min(len(prompts[prompt]) for prompt in members) - rest)
    first, last = prompts[members[0]], prompts[members[-1]]
    agreeing = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(first, last, strict=False)))
    prefix = min(longest, agreeing)
    whole = (len(members) - 1) * prefix - _COST_TOKENS
    parts = [
        list(part)
        for _, part in groupby(members, key=lambda prompt: prompts[prompt][agreeing : agreeing + 1])
    ]
    if len(parts) == 1:
        return whole, [Family(members, prefix)]
    saved, found = 0, []
    for part in parts:
        saved_by_part, families_of_part = _best(prompts, part, rest)
        saved += saved_by_part
        found += families_of_part
    return (saved, found) if saved > whole else (whole, [Family(members, prefix)])

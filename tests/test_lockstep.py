"""Sequences of the same text run as one, up to the block where their configurations differ."""

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from jobs.engine.decoding import Decoding, Work, generate
from jobs.engine.interventions import Add, Intervention
from jobs.engine.lockstep import in_order, skipped
from jobs.engine.replica import Replica
from jobs.engine.tables import row_tables
from tests.models import HIDDEN, LAYERS, tiny_replica


@given(st.lists(st.integers(0, 5), max_size=40))
def test_an_order_sorts_and_moves_only_what_stands_wrong(keys: list[int]) -> None:
    order = in_order(keys)
    assert sorted(order) == list(range(len(keys)))
    assert [keys[place] for place in order] == sorted(keys)
    right = [place for place, key in enumerate(sorted(keys)) if keys[place] == key]
    assert all(order[place] == place for place in right)


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 7)), min_size=1, max_size=20))
def test_a_leader_computes_every_block_and_is_unchanged_wherever_it_stands_in(
    sequences: list[tuple[int, int]],
) -> None:
    texts, untouched = zip(*sequences, strict=True)
    blocks, leader = skipped(texts, untouched, 6)
    for index, (text, depth) in enumerate(sequences):
        assert texts[leader[index]] == text
        assert blocks[leader[index]] == 0
        assert blocks[index] <= min(depth, untouched[leader[index]])
        assert blocks[index] in ((0,) if index == leader[index] else (min(depth, 6),))
    assert blocks.count(0) >= len(set(texts))


@contextmanager
def tokens_read(replica: Replica) -> Iterator[list[int]]:
    """For every block, how many tokens were computed in it, padding left out."""
    counts = [0] * replica.layers
    handles = []
    for layer in range(replica.layers):

        def count(module: object, inputs: tuple[torch.Tensor, ...], layer: int = layer) -> None:
            positions_ST = replica.positions_ST[: len(inputs[0])]
            counts[layer] += int((positions_ST >= 0).sum())

        handles.append(replica.parts[layer].mlp.register_forward_pre_hook(count))
    try:
        yield counts
    finally:
        for handle in handles:
            handle.remove()


@pytest.mark.parametrize("slots", [1, 3, 64])
def test_configurations_that_leave_the_text_as_it_is_cost_only_the_blocks_above_them(slots: int) -> None:
    replica = tiny_replica("llama")
    vector = np.full(HIDDEN, 1e-9)
    rows: list[list[Intervention]] = [
        [],
        [Add(layer=1, vector=vector)],
        [Add(layer=2, vector=vector, tokens="generated")],
    ]
    prompt = [5, 6, 7, 8]
    new = 6
    decoding = Decoding(max_new_tokens=new, stops=False, slots=slots)
    with tokens_read(replica) as counts:
        list(generate(replica, [prompt], row_tables(replica, rows), [Work(0, 0)], decoding))
        counts[:] = [0] * LAYERS
        found = dict(
            generate(
                replica, [prompt], row_tables(replica, rows), [Work(0, row) for row in range(3)], decoding
            )
        )
    assert len({tuple(each.tokens) for each in found.values()}) == 1
    read = [0, 0, len(prompt), len(prompt)]  # the unsteered prompt was read before
    step = [3] * LAYERS if slots == 1 else [1, 1, 2, 3]
    assert counts == [tokens + (new - 1) * each for tokens, each in zip(read, step, strict=True)]

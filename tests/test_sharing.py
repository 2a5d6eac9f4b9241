"""Passes that share what configurations have in common equal passes over everything."""

from collections.abc import Iterator, Sequence

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from jobs.engine.groups import groups, in_parts, next_token, once
from jobs.engine.interventions import Add, Intervention, ProjectOut, Tokens
from jobs.engine.prefixes import families
from jobs.engine.replica import Replica
from jobs.engine.skipping import first_sequences, separable, skipping
from jobs.engine.tables import Steering, row_tables, steered
from tests.models import ARCHITECTURES, HIDDEN, LAYERS, tiny_replica

REPLICA: list[Replica] = []
TEMPLATE = [30, 31, 32, 33]
PROMPTS = [
    [*TEMPLATE, 8, 9, 10, 11, 12, 13, 14, 15],
    [*TEMPLATE, 21, 22],
    [*TEMPLATE, 31, 32, 33, 34, 35, 36],
]


def vector(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=HIDDEN)


def plain(replica: Replica, row: Sequence[Intervention], prompt: list[int]) -> torch.Tensor:
    """Logits of the next token from one whole pass over one prompt."""
    tables = row_tables(replica, [row])
    with torch.inference_mode(), steered(replica, Steering(tables.tables, [len(prompt)])):
        return replica.logits([prompt], keep=1)[0, -1]


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("memory", [1, 2**30])
def test_next_tokens_of_a_grid_equal_whole_passes_whatever_memory_there_is(name: str, memory: int) -> None:
    replica = tiny_replica(name)
    replica.memory = memory
    rows: list[list[Intervention]] = [
        [],
        *([Add(layer=layer, vector=vector(layer))] for layer in range(LAYERS)),
        [ProjectOut(layer=1, direction=vector(9), site="before"), Add(layer=3, vector=vector(8))],
        [Add(layer=2, vector=vector(7), tokens=(-2, -1))],
        [Add(layer=0, vector=vector(6), tokens="generated")],
    ]
    work = [(prompt, row) for row in range(len(rows)) for prompt in range(len(PROMPTS))]
    found = dict(next_token(replica, PROMPTS, row_tables(replica, rows), work))
    tolerance = 1e-9 if replica.model.dtype == torch.float64 else 1e-4
    if name == "mixtral":
        tolerance = 1e-6  # routes in float32
    for index, (prompt, row) in enumerate(work):
        expected = plain(replica, rows[row], PROMPTS[prompt])
        torch.testing.assert_close(found[index], expected, rtol=tolerance, atol=tolerance)


def test_a_shared_beginning_is_read_once_a_configuration_and_blocks_below_once_a_prompt() -> None:
    replica = tiny_replica("llama")
    rows: list[list[Intervention]] = [[Add(layer=2, vector=vector(seed))] for seed in range(3)]
    tables = row_tables(replica, rows)
    work = [(prompt, row) for row in range(3) for prompt in range(3)]
    _ = replica.cache_bytes, replica.blocks_give_tuples, separable(replica)
    tokens = {0: 0, LAYERS - 1: 0}
    for layer in tokens:

        def count(
            module: object, inputs: tuple[torch.Tensor, ...], output: object, layer: int = layer
        ) -> None:
            tokens[layer] += int((replica.positions_ST >= 0).sum())

        # A block that is not computed runs no module inside it.
        replica.parts[layer].mlp.register_forward_hook(count)
    list(next_token(replica, PROMPTS, tables, work))
    unshared = sum(len(prompt) - len(TEMPLATE) for prompt in PROMPTS)
    once = len(TEMPLATE) + unshared
    assert tokens == {0: once, LAYERS - 1: once + 3 * once}


def test_unsteered_prompts_are_kept_for_the_next_call(monkeypatch: pytest.MonkeyPatch) -> None:
    replica = tiny_replica("llama")
    tables = row_tables(replica, [[]])
    expected = dict(next_token(replica, PROMPTS, tables, [(0, 0)]))
    monkeypatch.setattr(Replica, "forward", lambda *_, **__: pytest.fail("computed again"))
    assert torch.equal(dict(next_token(replica, PROMPTS, tables, [(0, 0)]))[0], expected[0])


def test_what_is_kept_is_made_anew_where_hooks_or_weights_changed() -> None:
    replica, work = tiny_replica("llama"), [(0, 0), (0, 1)]
    tables = row_tables(replica, [[], [Add(layer=2, vector=vector(0))]])

    def found() -> list[torch.Tensor]:
        return [logits for _, logits in sorted(next_token(replica, PROMPTS, tables, work))]

    first = found()
    handle = replica.blocks[0].register_forward_pre_hook(lambda block, inputs: (inputs[0] + 1, *inputs[1:]))
    hooked = found()
    handle.remove()
    for before, after, again in zip(first, hooked, found(), strict=True):
        assert not torch.allclose(before, after)
        assert torch.equal(before, again)
    next(replica.blocks[0].parameters()).mul_(3)
    for before, after in zip(first, found(), strict=True):
        assert not torch.allclose(before, after)


@pytest.mark.parametrize(
    ("tokens", "prefix"),
    [("all", 4), ("generated", 4), ((0, 5), 4), ((-1,), 4), ((-2,), 4), ((-3,), 3), ((-6,), 0)],
)
def test_the_common_beginning_ends_before_positions_counted_from_the_end(tokens: Tokens, prefix: int) -> None:
    replica = tiny_replica("llama")
    tables = row_tables(replica, [[], [Add(layer=0, vector=vector(0), tokens=tokens)]])
    [family] = families(replica, PROMPTS, range(3), tables)
    assert (sorted(family.prompts), family.prefix) == ([0, 1, 2], prefix)


def test_a_lone_prompt_keeps_one_token_to_be_read() -> None:
    replica = tiny_replica("llama")
    for prompt in (TEMPLATE, [7]):
        [family] = families(replica, [prompt], [0], row_tables(replica, [[]]))
        assert family.prefix == len(prompt) - 1


def test_prompts_are_cut_where_two_long_beginnings_save_more_than_a_short_one() -> None:
    replica = tiny_replica("llama")
    heads = [[5, *range(10, 30)], [5, *range(40, 60)]]
    prompts = [[*heads[number % 2], 60 + number] for number in range(20)] + [[5, 99]]
    found = families(replica, prompts, range(21), row_tables(replica, [[]]))
    assert [(sorted(family.prompts), family.prefix) for family in found if len(family.prompts) > 1] == [
        (list(range(0, 20, 2)), 21),
        (list(range(1, 20, 2)), 21),
    ]
    few = families(replica, prompts, [0, 1, 20], row_tables(replica, [[]]))
    assert [(sorted(family.prompts), family.prefix) for family in few] == [([0, 1, 20], 1)]


def test_windows_of_attention_share_no_beginning() -> None:
    for replica in (tiny_replica("mistral"), tiny_replica("llama")):
        replica.model.config.attention_chunk_size = 8
        [family] = families(replica, PROMPTS, range(3), row_tables(replica, [[]]))
        assert family.prefix == 0


@given(
    st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=90), min_size=1, max_size=30),
    st.integers(1, 4),
)
@settings(max_examples=60)
def test_every_prompt_is_in_one_family_and_begins_as_its_family_does(
    prompts: list[list[int]], rest: int
) -> None:
    replica = tiny_replica("llama") if not REPLICA else REPLICA[0]
    REPLICA[:] = [replica]
    row = [Add(layer=0, vector=vector(0), tokens=(-rest,))]
    found = families(replica, prompts, range(len(prompts)), row_tables(replica, [row]))
    assert sorted(prompt for family in found for prompt in family.prompts) == list(range(len(prompts)))
    for family in found:
        assert len({tuple(prompts[prompt][: family.prefix]) for prompt in family.prompts}) == 1
        shortest = min(len(prompts[prompt]) for prompt in family.prompts)
        assert family.prefix <= max(0, shortest - rest)


@pytest.mark.parametrize("most", [1, 2, 7])
@pytest.mark.parametrize("token_budget", [1, 16, 8192])
def test_groups_hold_all_work_once_within_their_limits(most: int, token_budget: int) -> None:
    replica = tiny_replica("llama")
    replica.token_budget = token_budget
    rows: list[list[Intervention]] = [[Add(layer=layer, vector=vector(0))] for layer in (2, 0, 2)]
    tables = row_tables(replica, rows)
    work = [(prompt, row) for prompt in range(3) for row in range(3)]
    found = list(groups(replica, PROMPTS, tables, work, most=most))
    assert sorted(index for group in found for index in group.members) == list(range(9))
    for group in found:
        shared = [tables.shared[work[index][1]] for index in group.members]
        assert shared == sorted(shared)
        longest = max(len(PROMPTS[work[index][0]]) - len(TEMPLATE) for index in group.members)
        assert len(group.members) == 1 or len(group.members) * longest <= token_budget
        assert len(group.members) <= most


def test_what_is_done_to_one_prompt_stays_together() -> None:
    replica = tiny_replica("llama")
    rows: list[list[Intervention]] = [[Add(layer=layer, vector=vector(0))] for layer in (2, 0, 1)]
    work = [(prompt, row) for row in range(3) for prompt in range(3)]
    found = list(groups(replica, PROMPTS, row_tables(replica, rows), work, most=7))
    homes = [
        {number for number, group in enumerate(found) for index in group.members if work[index][0] == prompt}
        for prompt in range(3)
    ]
    assert [len(group.members) for group in found] == [6, 3]
    assert all(len(home) == 1 for home in homes)


def test_equal_configurations_and_changes_of_nothing_are_computed_once() -> None:
    replica = tiny_replica("llama")
    rows: list[list[Intervention]] = [
        [],
        [Add(layer=2, vector=vector(1))],
        [Add(layer=1, vector=0 * vector(1))],
        [Add(layer=2, vector=vector(1)), Add(layer=0, vector=0 * vector(1), tokens=(0, 1))],
        [Add(layer=2, vector=vector(1), tokens="prompt")],
    ]
    tables = row_tables(replica, rows)
    assert tables.same == [0, 1, 0, 1, 4]
    work = [(prompt, row) for row in range(len(rows)) for prompt in range(3)]
    done: list[int] = []

    def run(firsts: list[int]) -> Iterator[tuple[int, tuple[int, int]]]:
        done.extend(firsts)
        return ((index, work[index]) for index in firsts)

    found = dict(once([(prompt, tables.same[row]) for prompt, row in work], run))
    assert sorted(work[index] for index in done) == [(p, row) for p in range(3) for row in (0, 1, 4)]
    assert {work[index]: answer for index, answer in found.items()} == {
        (prompt, row): (prompt, tables.same[row]) for prompt, row in work
    }


def test_parts_come_whole_and_in_order() -> None:
    found = [(5, "f"), (0, "a"), (4, "e"), (1, "b"), (3, "d"), (2, "c")]
    assert list(in_parts(found, 2)) == [(2, ["e", "f"]), (0, ["a", "b"]), (1, ["c", "d"])]


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_blocks_of_every_architecture_can_compute_a_part_of_the_batch(name: str) -> None:
    replica = tiny_replica(name)
    assert separable(replica)
    depths = [0, 0, 2, 4]
    texts = [[1, 2, 3, 4], [5, 6, 7], [8, 9, 10, 11], [12, 13, 14, 15]]
    whole: dict[int, torch.Tensor] = {}
    for layer, block in enumerate(replica.blocks):
        block.register_forward_hook(
            lambda block, inputs, output, layer=layer: whole.setdefault(
                layer, output[0] if isinstance(output, tuple) else output
            )
        )
    with torch.inference_mode():
        expected = replica.logits(texts, keep=1)
        with skipping(replica, [2, 2, 3, 3], 4, lambda block, output: whole[block][2 if block < 2 else 3 :]):
            found = replica.logits(texts, keep=1)
    assert first_sequences(replica, depths) == [2, 2, 3, 3]
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_a_model_that_hands_on_what_cannot_be_cut_computes_whole_batches() -> None:
    replica = tiny_replica("llama")
    attention = replica.parts[0].attention
    forward = attention.forward

    def with_biases(*arguments: object, **options: object) -> object:
        h_STD = arguments[0] if arguments else options["hidden_states"]
        if len(h_STD) != len(replica.positions_ST):
            raise RuntimeError("The size of tensor a must match the size of tensor b")
        return forward(*arguments, **options)

    attention.forward = with_biases
    assert not separable(replica)
    assert first_sequences(replica, [1, 2, 4]) == [0, 3, 3, 3]


def test_what_is_as_long_as_the_batch_only_where_there_are_as_many_heads_is_noticed() -> None:
    replica = tiny_replica("llama")
    heads = replica.model.config.num_attention_heads
    attention = replica.parts[0].attention
    forward = attention.forward

    def with_biases(*arguments: object, biases: torch.Tensor, **options: object) -> object:
        if len(biases) != heads:
            raise RuntimeError("The size of tensor a must match the size of tensor b")
        return forward(*arguments, **options)

    def handed_on(block: object, arguments: tuple[object, ...], options: dict[str, object]) -> object:
        return arguments, {**options, "biases": torch.zeros(heads, 1, 1)}

    attention.forward = with_biases
    replica.blocks[0].register_forward_pre_hook(handed_on, with_kwargs=True)
    assert heads != 3
    assert not separable(replica)


def test_the_blocks_compute_again_after_an_exception() -> None:
    replica = tiny_replica("llama")
    before = replica.logits(PROMPTS, keep=1)
    with (
        pytest.raises(RuntimeError, match="on purpose"),
        skipping(replica, [0] * LAYERS, 3, lambda block, output: None),
    ):
        raise RuntimeError("on purpose")
    torch.testing.assert_close(replica.logits(PROMPTS, keep=1), before, rtol=0, atol=0)

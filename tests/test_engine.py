"""The engine on every architecture: blocks, capture, steering as row tables, cached generation."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from jobs.engine.blocks import find_blocks
from jobs.engine.capture import capture_last
from jobs.engine.decoding import Decoding, Work, generate
from jobs.engine.interventions import Add
from jobs.engine.loading import load_replica
from jobs.engine.memory import in_batches, micro_batches
from jobs.engine.replica import Replica
from jobs.engine.sites import Place, picked
from jobs.engine.tables import RowTables, Steering, row_tables, steered
from jobs.errors import ModelError, OutOfMemory, SpecError
from jobs.spec import ModelRef
from tests.models import (
    ARCHITECTURES,
    HIDDEN,
    LAYERS,
    WINDOW,
    recorded,
    save_tiny,
    tiny_model,
    tiny_replica,
    tiny_tokenizer,
)

PROMPTS = [
    [40, 41, 42],
    [50, 51, 52, 53, 54, 55, 56, 57, 58],
    [60],
    list(range(70, 84)),
    list(range(90, 90 + WINDOW)),
]
MLP_BIAS = {
    "gpt2": "mlp.c_proj.bias",
    "gpt_neox": "mlp.dense_4h_to_h.bias",
    "phi": "mlp.fc2.bias",
    "opt": "fc2.bias",
}
"""The bias that is added to a block's output last."""


@pytest.fixture(scope="module", params=ARCHITECTURES)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def replica(name: str) -> Replica:
    return tiny_replica(name)


def tolerance(replica: Replica) -> float:
    """Some architectures norm and route in float32 whatever their weights are."""
    return 1e-6 if replica.model.dtype == torch.float64 else 1e-4


def direction(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=HIDDEN)


def generated(model: Any, prompt: list[int], max_new_tokens: int) -> list[int]:
    """What transformers' own greedy search adds to one prompt, without the stop token."""
    ids = torch.tensor([prompt])
    found = model.generate(
        ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=max_new_tokens
    )
    stops = model.generation_config.eos_token_id
    new: list[int] = found[0, len(prompt) :].tolist()
    ends = [
        place for place, token in enumerate(new) if token in (stops if isinstance(stops, list) else [stops])
    ]
    return new[: ends[0]] if ends else new


class TestBlocks:
    def test_the_blocks_are_the_models_decoder_layers_in_order(self, replica: Replica) -> None:
        assert len(replica.blocks) == replica.model.config.num_hidden_layers == LAYERS
        order = []
        handles = [
            block.register_forward_hook(lambda *_, layer=layer: order.append(layer))
            for layer, block in enumerate(replica.blocks)
        ]
        replica.logits([[5, 6]], keep=1)
        for handle in handles:
            handle.remove()
        assert order == list(range(LAYERS))

    def test_lists_of_experts_inside_blocks_are_not_taken_for_the_blocks(self) -> None:
        blocks = nn.ModuleList(
            nn.ModuleDict(
                {"experts": nn.ModuleList(nn.Linear(8, 8) for _ in range(16)), "norm": nn.LayerNorm(8)}
            )
            for _ in range(3)
        )
        assert find_blocks(nn.ModuleDict({"layers": blocks})) is blocks

    def test_a_model_without_a_list_of_blocks_is_refused_with_what_it_has(self) -> None:
        with pytest.raises(ModelError, match=r"no nn\.ModuleList.*'only_child'"):
            find_blocks(nn.ModuleDict({"only_child": nn.Linear(2, 2)}))

    def test_two_lists_of_equal_weight_are_refused_by_name(self) -> None:
        twins = {side: nn.ModuleList([nn.Linear(4, 4)]) for side in ("encoder", "decoder")}
        with pytest.raises(ModelError, match="'encoder', 'decoder'"):
            find_blocks(nn.ModuleDict(twins))


class TestReplica:
    def test_a_saved_model_loads_with_the_same_logits_and_tokenizer(self, tmp_path: Path) -> None:
        loaded = load_replica(ModelRef(id=str(save_tiny(tmp_path))))
        original = Replica(tiny_model("llama").float(), tiny_tokenizer())
        assert loaded.encode_chat("Hi", system="Be kind.") == original.encode_chat("Hi", system="Be kind.")
        assert loaded.stop_ids == original.stop_ids
        for weight, value in original.model.state_dict().items():
            assert torch.equal(loaded.model.state_dict()[weight], value), weight
        # not bit-equal: the weights are memory-mapped, and kernels differ with alignment
        expected = original.logits(PROMPTS, keep=1)
        torch.testing.assert_close(loaded.logits(PROMPTS, keep=1), expected, atol=1e-5, rtol=0)

    def test_dtypes_are_read_from_the_model_ref(self, tmp_path: Path) -> None:
        folder = str(save_tiny(tmp_path))
        for dtype in ("float64", "bfloat16"):
            assert load_replica(ModelRef(id=folder, dtype=dtype)).model.dtype == getattr(torch, dtype)

    def test_an_unknown_dtype_is_refused_with_those_that_exist(self) -> None:
        with pytest.raises(ModelError, match=r"'float8'.*bfloat16.*float32"):
            load_replica(ModelRef(id="smollm2-135m", dtype="float8"))

    def test_a_folder_without_a_model_is_refused_by_name(self, tmp_path: Path) -> None:
        with pytest.raises(ModelError, match=re.escape(str(tmp_path))):
            load_replica(ModelRef(id=str(tmp_path)))

    def test_a_known_model_that_was_not_added_says_how_to_add_it(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
        with pytest.raises(ModelError, match="run `steersweep models add smollm2-135m`"):
            load_replica(ModelRef(id="smollm2-135m"))

    def test_the_chat_template_wraps_the_turn_and_the_answer_follows_it(self) -> None:
        replica = tiny_replica("llama")
        ids = replica.encode_chat("Is it?", system="Be brief.", answer="Yes")
        text = "<|system|>Be brief.<|end|><|user|>Is it?<|end|><|assistant|>Yes"
        assert replica.tokenizer.decode(ids) == text
        assert replica.decode(ids) == "Be brief.Is it?Yes"

    def test_a_tokenizer_without_a_chat_template_is_refused(self) -> None:
        replica = tiny_replica("llama")
        replica.tokenizer.chat_template = None
        with pytest.raises(ModelError, match="no chat template"):
            replica.encode_chat("Hi")

    def test_padding_changes_no_logits(self, replica: Replica) -> None:
        together = replica.logits(PROMPTS, keep=1)[:, -1]
        alone = torch.stack([replica.model(torch.tensor([prompt])).logits[0, -1] for prompt in PROMPTS])
        torch.testing.assert_close(together, alone, atol=tolerance(replica), rtol=0)


class TestMicroBatches:
    @given(st.lists(st.integers(1, 50), min_size=1, max_size=40), st.integers(1, 200))
    def test_every_sequence_rides_once_within_the_budget_or_alone(
        self, lengths: list[int], budget: int
    ) -> None:
        batches = list(micro_batches(lengths, budget))
        assert sorted(index for batch in batches for index in batch) == list(range(len(lengths)))
        for batch in batches:
            assert len(batch) == 1 or len(batch) * max(lengths[index] for index in batch) <= budget


class TestCapture:
    @pytest.mark.parametrize("offset", [1, 2])
    @pytest.mark.parametrize("token_budget", [16, 8192])
    def test_captured_activations_are_the_hidden_states_of_each_prompt_alone(
        self, name: str, offset: int, token_budget: int
    ) -> None:
        replica = tiny_replica(name)
        replica.token_budget = token_budget
        prompts = [prompt for prompt in PROMPTS if len(prompt) >= offset]
        captured_NLD = capture_last(replica, prompts, offset=offset)
        # transformers gives the last block's output only after the final norm, hence a model one block deeper
        deeper = tiny_model(name, layers=LAYERS + 1)
        for prompt, captured_LD in zip(prompts, captured_NLD, strict=True):
            with torch.inference_mode():
                states = deeper(torch.tensor([prompt]), output_hidden_states=True).hidden_states
            expected_LD = torch.stack([state[0, -offset] for state in states[1 : LAYERS + 1]])
            torch.testing.assert_close(
                captured_LD, expected_LD, atol=tolerance(replica), rtol=tolerance(replica)
            )

    def test_a_prompt_shorter_than_the_offset_is_refused_by_number(self) -> None:
        with pytest.raises(SpecError, match="offset=2, and prompt 1 has only 1 tokens"):
            capture_last(tiny_replica("llama"), [[5, 6], [7]], offset=2)


class TestInBatches:
    def test_each_gets_what_was_found_for_it_whatever_fits_at_once(self) -> None:
        replica = tiny_replica("llama")
        replica.token_budget = 20
        lengths = [7, 3, 9, 30, 1, 1, 4]
        assert in_batches(replica, lengths, lambda batch: [lengths[index] for index in batch]) == lengths

    def test_where_memory_runs_out_the_batch_is_halved_and_the_budget_stays_so(self) -> None:
        replica = tiny_replica("llama")
        replica.token_budget = 64
        sizes = []

        def run(batch: list[int]) -> list[int]:
            sizes.append(len(batch))
            if len(batch) > 3:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return batch

        assert in_batches(replica, [4] * 10, run) == list(range(10))
        assert sizes == [10, 8, 4, 2, 2, 2, 2, 2]
        assert replica.token_budget == 8

    def test_a_single_row_that_does_not_fit_says_so_and_leaves_the_budgets(self) -> None:
        replica = tiny_replica("llama")
        before = replica.token_budget, replica.memory

        def run(batch: list[int]) -> list[int]:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate")

        with pytest.raises(OutOfMemory, match="single row"):
            in_batches(replica, [4] * 3, run)
        assert (replica.token_budget, replica.memory) == before

    def test_other_errors_are_not_taken_for_a_lack_of_memory(self) -> None:
        def run(batch: list[int]) -> list[int]:
            raise RuntimeError("shapes differ")

        with pytest.raises(RuntimeError, match="shapes differ"):
            in_batches(tiny_replica("llama"), [4], run)


class TestSteering:
    @pytest.mark.parametrize("layer", range(LAYERS))
    def test_lower_layers_stay_bit_equal_and_the_steered_one_is_its_old_self_plus_the_vector(
        self, replica: Replica, layer: int
    ) -> None:
        rows = [[Add(layer=layer, vector=direction(seed))] for seed in range(len(PROMPTS))]
        steering = steering_of(replica, rows)
        with recorded(replica) as before:
            replica.logits(PROMPTS, keep=1)
        with steered(replica, steering), recorded(replica) as after:
            replica.logits(PROMPTS, keep=1)
        vectors = torch.tensor(np.stack([direction(seed) for seed in range(len(PROMPTS))]))
        assert all(torch.equal(after[lower], before[lower]) for lower in range(layer))
        assert torch.equal(after[layer], before[layer] + vectors[:, None].to(replica.model.dtype))
        assert all(not torch.equal(after[higher], before[higher]) for higher in range(layer + 1, LAYERS))

    @pytest.mark.parametrize("architecture", MLP_BIAS)
    @pytest.mark.parametrize("layer", [0, 2, LAYERS - 1])
    def test_steering_equals_the_same_addition_built_into_the_weights(
        self, architecture: str, layer: int
    ) -> None:
        replica, built_in = tiny_replica(architecture), tiny_replica(architecture)
        vector = 3 * direction()
        built_in.blocks[layer].get_parameter(MLP_BIAS[architecture]).add_(torch.tensor(vector))
        changes = [Add(layer=layer, vector=vector)]
        with steered(replica, steering_of(replica, [changes] * len(PROMPTS))):
            logits = replica.logits(PROMPTS, keep=1)
        torch.testing.assert_close(logits, built_in.logits(PROMPTS, keep=1), atol=1e-9, rtol=0)
        expected = [generated(built_in.model, prompt, 6) for prompt in PROMPTS]
        assert completed(replica, [changes], 6) == expected

    def test_no_hook_outlives_a_context_that_ends_in_an_error(self, replica: Replica) -> None:
        before = replica.logits(PROMPTS, keep=1)
        steering = steering_of(replica, [[Add(layer=0, vector=direction())]] * len(PROMPTS))
        with pytest.raises(ZeroDivisionError), steered(replica, steering), recorded(replica) as outputs:
            1 / 0  # noqa: B018
        with pytest.raises(RuntimeError), steered(replica, steering):
            replica.logits([*PROMPTS, PROMPTS[0]], keep=1)
        with pytest.raises(IndexError), picked(replica, [Place(0, "after"), Place(LAYERS, "after")], abs):
            pass
        assert torch.equal(replica.logits(PROMPTS, keep=1), before)
        assert outputs == {}

    def test_a_row_of_nan_logits_does_not_poison_its_batch_mates(self, replica: Replica) -> None:
        huge = np.full(HIDDEN, 0.4 * torch.finfo(replica.model.dtype).max)
        rows = [[Add(layer=1, vector=vector)] for vector in (direction(1), huge, direction(2))]
        with steered(replica, steering_of(replica, [rows[place % 3] for place in range(len(PROMPTS))])):
            together = replica.logits(PROMPTS, keep=1)
        for mate in (0, 2, 3):
            with steered(replica, steering_of(replica, [rows[mate % 3]], [PROMPTS[mate]])):
                alone = replica.logits([PROMPTS[mate]], keep=1)
            assert alone.isfinite().all()
            torch.testing.assert_close(together[mate], alone[0], atol=tolerance(replica), rtol=0)

    def test_a_huge_vector_does_give_nan_logits_where_norms_are_float32(self) -> None:
        replica = tiny_replica("llama")
        rows = [[Add(layer=1, vector=np.full(HIDDEN, 1e300))]]
        with steered(replica, steering_of(replica, rows, PROMPTS[:1])):
            assert replica.logits(PROMPTS[:1], keep=1).isnan().all()


def steering_of(replica: Replica, rows: list[list[Add]], prompts: list[list[int]] = PROMPTS) -> Steering:
    return Steering(row_tables(replica, rows).tables, [len(prompt) for prompt in prompts])


def completed(
    replica: Replica, rows: list[list[Add]], max_new_tokens: int, prompts: list[list[int]] = PROMPTS
) -> list[list[int]]:
    """Greedy completions: each prompt under the row of its number, or under the only one."""
    tables: RowTables = row_tables(replica, rows)
    work = [Work(prompt, prompt % len(rows)) for prompt in range(len(prompts))]
    found = dict(generate(replica, prompts, tables, work, Decoding(max_new_tokens=max_new_tokens)))
    return [found[index].tokens for index in range(len(prompts))]


class TestRowTables:
    def test_rows_that_act_elsewhere_or_nowhere_change_nothing(self) -> None:
        replica = tiny_replica("llama")
        rows = [[], [Add(layer=2, vector=direction())], [Add(layer=0, vector=2 * direction())]]
        tables = row_tables(replica, rows).take([2, 0, 1, 1])
        zero, vector = np.zeros(HIDDEN), direction()
        added = {place.layer: table.add_RKD[:, 0] for place, [table] in tables.items()}
        np.testing.assert_array_equal(added[0], [2 * vector, zero, zero, zero])
        np.testing.assert_array_equal(added[2], [zero, zero, vector, vector])

    def test_the_table_is_a_copy_of_the_callers_vector(self) -> None:
        vector = direction()
        tables = row_tables(tiny_replica("llama"), [[Add(layer=1, vector=vector)]])
        vector[:] = 0
        [[table]] = tables.tables.values()
        np.testing.assert_array_equal(table.add_RKD[0, 0], direction())


class TestGreedy:
    def test_prompts_of_different_length_get_what_transformers_generates_for_each(
        self, replica: Replica
    ) -> None:
        expected = [generated(replica.model, prompt, 2 * WINDOW) for prompt in PROMPTS]
        assert completed(replica, [[]], 2 * WINDOW) == expected

    def test_a_prompt_ends_before_its_first_stop_token_and_leaves_the_batch(self, name: str) -> None:
        model = tiny_model(name)
        endless = [generated(model, prompt, 10) for prompt in PROMPTS]
        stops = {model.config.eos_token_id, endless[1][0], endless[3][4]}
        expected = [_until(tokens, stops) for tokens in endless]
        model.generation_config.eos_token_id = sorted(stops)
        replica = Replica(model, tiny_tokenizer())
        with _counted_sequences(replica) as sizes:
            found = completed(replica, [[]], 10)
        assert found == expected
        assert found[1] == []
        # The last token of a completion of full length is chosen, but never read.
        steps = [sum(min(len(tokens), 9) >= step for tokens in expected) for step in range(1, 10)]
        assert sizes[-len([size for size in steps if size]) :] == [size for size in steps if size]

    def test_vectors_follow_their_prompts_when_others_leave(self) -> None:
        model = tiny_model("llama")
        endless = completed(Replica(model, tiny_tokenizer()), [[]], 2)
        model.generation_config.eos_token_id = [endless[0][0], endless[2][1]]
        replica = Replica(model, tiny_tokenizer())
        rows = [[Add(layer=1, vector=place * direction(place))] for place in range(len(PROMPTS))]
        together = completed(replica, rows, 8)
        assert together[0] == []
        assert len({len(tokens) for tokens in together}) > 1
        assert together == [
            completed(replica, [row], 8, [prompt])[0] for row, prompt in zip(rows, PROMPTS, strict=True)
        ]

    def test_rows_are_generated_again_where_memory_ran_out(self) -> None:
        replica = tiny_replica("llama")
        rows = [[Add(layer=1, vector=place * direction(place))] for place in range(len(PROMPTS))]
        expected = completed(replica, rows, 8)
        capacity = 2 * (max(map(len, PROMPTS)) + 8)
        before = replica.memory = 2 * 4 * replica.cache_bytes * capacity  # 4 sequences at a time
        with _most_sequences(replica, 1, after=4):
            assert completed(replica, rows, 8) == expected
        assert replica.memory < before


def _until(tokens: list[int], stops: set[int]) -> list[int]:
    ends = [place for place, token in enumerate(tokens) if token in stops]
    return tokens[: ends[0]] if ends else tokens


@contextmanager
def _counted_sequences(replica: Replica) -> Iterator[list[int]]:
    """Number of sequences in each forward pass inside the block."""
    sizes: list[int] = []
    handle = replica.blocks[0].register_forward_pre_hook(lambda _, inputs: sizes.append(len(inputs[0])))
    try:
        yield sizes
    finally:
        handle.remove()


@contextmanager
def _most_sequences(replica: Replica, most: int, *, after: int) -> Iterator[None]:
    """From some pass on, passes over more sequences run out of memory."""
    passes = 0

    def refuse(_: Any, inputs: tuple[torch.Tensor, ...]) -> None:
        nonlocal passes
        passes += 1
        if passes > after and len(inputs[0]) > most:
            raise torch.OutOfMemoryError("CUDA out of memory")

    handle = replica.blocks[0].register_forward_pre_hook(refuse)
    try:
        yield
    finally:
        handle.remove()

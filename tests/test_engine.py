"""The engine on every architecture: blocks, capture, steering as row tables, cached generation."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from jobs.engine.batches import micro_batches
from jobs.engine.blocks import find_blocks
from jobs.engine.capture import capture_last
from jobs.engine.generate import greedy
from jobs.engine.replica import Replica, load_replica
from jobs.engine.steering import Addition, recorded, row_tables, steered
from jobs.errors import ModelError, SpecError
from jobs.spec import ModelRef
from tests.models import (
    ARCHITECTURES,
    HIDDEN,
    LAYERS,
    WINDOW,
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


class TestSteering:
    @pytest.mark.parametrize("layer", range(LAYERS))
    def test_lower_layers_stay_bit_equal_and_the_steered_one_is_its_old_self_plus_the_delta(
        self, replica: Replica, layer: int
    ) -> None:
        delta = torch.tensor(np.stack([direction(seed) for seed in range(len(PROMPTS))])).unsqueeze(1)
        delta = delta.to(replica.model.dtype)
        with recorded(replica) as before:
            replica.logits(PROMPTS, keep=1)
        with steered(replica, {layer: delta}), recorded(replica) as after:
            replica.logits(PROMPTS, keep=1)
        assert all(torch.equal(after[lower], before[lower]) for lower in range(layer))
        assert torch.equal(after[layer], before[layer] + delta)
        assert all(not torch.equal(after[higher], before[higher]) for higher in range(layer + 1, LAYERS))

    @pytest.mark.parametrize("architecture", MLP_BIAS)
    @pytest.mark.parametrize("layer", [0, 2, LAYERS - 1])
    def test_steering_equals_the_same_addition_built_into_the_weights(
        self, architecture: str, layer: int
    ) -> None:
        replica, built_in = tiny_replica(architecture), tiny_replica(architecture)
        vector = 3 * direction()
        built_in.blocks[layer].get_parameter(MLP_BIAS[architecture]).add_(torch.tensor(vector))
        deltas = row_tables(replica, [[Addition(layer=layer, vector=vector)]]).take([0] * len(PROMPTS))
        with steered(replica, deltas):
            logits = replica.logits(PROMPTS, keep=1)
        torch.testing.assert_close(logits, built_in.logits(PROMPTS, keep=1), atol=1e-9, rtol=0)
        expected = [generated(built_in.model, prompt, 6) for prompt in PROMPTS]
        assert greedy(replica, PROMPTS, deltas, max_new_tokens=6).tokens == expected

    def test_no_hook_outlives_a_context_that_ends_in_an_error(self, replica: Replica) -> None:
        before = replica.logits(PROMPTS, keep=1)
        delta = torch.ones(len(PROMPTS), 1, HIDDEN, dtype=replica.model.dtype)
        with pytest.raises(ZeroDivisionError), steered(replica, {0: delta}), recorded(replica) as outputs:
            1 / 0  # noqa: B018
        with pytest.raises(RuntimeError), steered(replica, {1: delta, 2: delta[..., :-1]}):
            replica.logits(PROMPTS, keep=1)
        with pytest.raises(IndexError), steered(replica, {0: delta, LAYERS: delta}):
            pass
        assert torch.equal(replica.logits(PROMPTS, keep=1), before)
        assert outputs == {}

    @settings(max_examples=8)
    @given(st.data())
    def test_a_packed_row_equals_the_lone_row_in_any_order(
        self, replica: Replica, data: st.DataObject
    ) -> None:
        tokens = st.integers(5, len(replica.tokenizer) - 1)
        configuration = st.tuples(
            st.lists(tokens, min_size=1, max_size=2 * WINDOW), st.integers(0, LAYERS - 1), st.floats(-8, 8)
        )
        pack = data.draw(st.lists(configuration, min_size=2, max_size=5))
        order = data.draw(st.permutations(range(len(pack))))
        rows = [
            [Addition(layer=layer, vector=strength * direction(index))]
            for index, (_, layer, strength) in enumerate(pack)
        ]
        deltas = row_tables(replica, rows).take(order)
        prompts = [pack[index][0] for index in order]
        with steered(replica, deltas):
            together = replica.logits(prompts, keep=1)
        completions, first_logits = greedy(replica, prompts, deltas, max_new_tokens=4)
        torch.testing.assert_close(first_logits, together[:, -1], atol=tolerance(replica), rtol=0)
        for place, index in enumerate(order):
            alone = row_tables(replica, [rows[index]]).take([0])
            with steered(replica, alone):
                logits = replica.logits([pack[index][0]], keep=1)
            torch.testing.assert_close(together[place], logits[0], atol=tolerance(replica), rtol=0)
            assert [completions[place]] == greedy(replica, [pack[index][0]], alone, max_new_tokens=4).tokens

    def test_a_row_of_nan_logits_does_not_poison_its_batch_mates(self, replica: Replica) -> None:
        huge = np.full(HIDDEN, 0.4 * torch.finfo(replica.model.dtype).max)
        rows = [
            [Addition(layer=1, vector=vector)]
            for vector in (direction(1), huge, direction(2), huge, direction(3))
        ]
        deltas = row_tables(replica, rows).take(range(len(rows)))
        with steered(replica, deltas):
            together = replica.logits(PROMPTS, keep=1)
        completions = greedy(replica, PROMPTS, deltas, max_new_tokens=4).tokens
        for mate in (0, 2, 4):
            alone = row_tables(replica, [rows[mate]]).take([0])
            with steered(replica, alone):
                logits = replica.logits([PROMPTS[mate]], keep=1)
            assert logits.isfinite().all()
            torch.testing.assert_close(together[mate], logits[0], atol=tolerance(replica), rtol=0)
            assert [completions[mate]] == greedy(replica, [PROMPTS[mate]], alone, max_new_tokens=4).tokens

    def test_a_huge_vector_does_give_nan_logits_where_norms_are_float32(self) -> None:
        replica = tiny_replica("llama")
        deltas = row_tables(replica, [[Addition(layer=1, vector=np.full(HIDDEN, 1e300))]]).take([0])
        with steered(replica, deltas):
            assert replica.logits([PROMPTS[0]], keep=1).isnan().all()


class TestRowTables:
    def test_rows_that_steer_elsewhere_or_nowhere_hold_zeros(self) -> None:
        replica = tiny_replica("llama")
        rows = [[], [Addition(layer=2, vector=direction())], [Addition(layer=0, vector=2 * direction())]]
        deltas = row_tables(replica, rows).take([2, 0, 1, 1])
        zero, vector = np.zeros(HIDDEN), direction()
        np.testing.assert_array_equal(deltas[0][:, 0], [2 * vector, zero, zero, zero])
        np.testing.assert_array_equal(deltas[2][:, 0], [zero, zero, vector, vector])
        assert sorted(deltas) == [0, 2]

    def test_additions_of_one_row_at_one_layer_add_up(self) -> None:
        parts = [Addition(layer=1, vector=direction(seed)) for seed in range(3)]
        deltas = row_tables(tiny_replica("llama"), [parts]).take([0])
        np.testing.assert_allclose(deltas[1][0, 0], sum(part.vector for part in parts), rtol=1e-12)

    def test_the_table_is_a_copy_of_the_callers_vector(self) -> None:
        vector = direction()
        tables = row_tables(tiny_replica("llama"), [[Addition(layer=1, vector=vector)]])
        vector[:] = 0
        np.testing.assert_array_equal(tables.take([0])[1][0, 0], direction())

    @pytest.mark.parametrize(
        ("addition", "message"),
        [
            (
                Addition(layer=LAYERS, vector=direction()),
                "row 1: layer 4 does not exist; the model has 0 to 3",
            ),
            (Addition(layer=-1, vector=direction()), "row 1: layer -1 does not exist; the model has 0 to 3"),
            (
                Addition(layer=0, vector=np.ones(31)),
                "row 1: vector of shape (31,); the model's hidden size is 32",
            ),
            (Addition(layer=0, vector=np.ones((1, 32))), "row 1: vector of shape (1, 32); the model's"),
            (Addition(layer=0, vector=np.append(np.ones(31), np.nan)), "row 1: the vector holds NaN"),
            (
                Addition(layer=0, vector=np.append(np.ones(31), np.inf)),
                "row 1: the vector holds NaN or an infinity",
            ),
        ],
    )
    def test_a_vector_that_cannot_be_added_is_refused_by_row(self, addition: Addition, message: str) -> None:
        good = Addition(layer=0, vector=direction())
        with pytest.raises(SpecError, match=re.escape(message)):
            row_tables(tiny_replica("llama"), [[good], [good, addition]])


class TestGreedy:
    def test_prompts_of_different_length_get_what_transformers_generates_for_each(
        self, replica: Replica
    ) -> None:
        expected = [generated(replica.model, prompt, 2 * WINDOW) for prompt in PROMPTS]
        assert greedy(replica, PROMPTS, {}, max_new_tokens=2 * WINDOW).tokens == expected

    def test_a_prompt_ends_before_its_first_stop_token_and_leaves_the_batch(self, name: str) -> None:
        model = tiny_model(name)
        endless = [generated(model, prompt, 10) for prompt in PROMPTS]
        stops = {model.config.eos_token_id, endless[1][0], endless[3][4]}
        expected = [_until(tokens, stops) for tokens in endless]
        model.generation_config.eos_token_id = sorted(stops)
        replica = Replica(model, tiny_tokenizer())
        with _counted_sequences(replica) as sizes:
            found = greedy(replica, PROMPTS, {}, max_new_tokens=10).tokens
        assert found == expected
        assert found[1] == []
        assert sizes == [sum(len(tokens) >= step for tokens in expected) for step in range(len(sizes))]
        assert sizes[0] == len(PROMPTS)
        assert sizes[-1] < len(PROMPTS)

    def test_the_pass_ends_with_the_last_prompt(self) -> None:
        model = tiny_model("llama")
        model.generation_config.eos_token_id = list(range(model.config.vocab_size))
        replica = Replica(model, tiny_tokenizer())
        with _counted_sequences(replica) as sizes:
            assert greedy(replica, PROMPTS, {}, max_new_tokens=10).tokens == [[]] * len(PROMPTS)
        assert sizes == [len(PROMPTS)]

    def test_deltas_follow_their_prompts_when_others_leave(self) -> None:
        model = tiny_model("llama")
        endless = greedy(Replica(model, tiny_tokenizer()), PROMPTS, {}, max_new_tokens=2).tokens
        model.generation_config.eos_token_id = [endless[0][0], endless[2][1]]
        replica = Replica(model, tiny_tokenizer())
        rows = [[Addition(layer=1, vector=place * direction(place))] for place in range(len(PROMPTS))]
        tables = row_tables(replica, rows)
        together = greedy(replica, PROMPTS, tables.take(range(len(PROMPTS))), max_new_tokens=8).tokens
        assert together[0] == []
        assert len({len(tokens) for tokens in together}) > 1
        assert together == [
            greedy(replica, [prompt], tables.take([place]), max_new_tokens=8).tokens[0]
            for place, prompt in enumerate(PROMPTS)
        ]


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

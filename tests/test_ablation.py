"""Ablated weights against projections of activations, on every architecture; and that weights come back."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch import Tensor, nn

from jobs.engine.ablation import PARTS, Part, Writer, ablated, find_writers, span
from jobs.engine.decoding import Decoding, Work, generate
from jobs.engine.interventions import Add, Intervention, ProjectOut
from jobs.engine.replica import Replica
from jobs.engine.tables import RowTables, Steering, row_tables, steered
from jobs.errors import ModelError, SpecError
from tests.models import ARCHITECTURES, FLOAT32_ONLY, HIDDEN, LAYERS, tiny_model, tiny_replica, tiny_tokenizer

PROMPTS = [[40, 41, 42], [50, 51, 52, 53, 54, 55, 56], [60]]


@pytest.fixture(scope="module", params=ARCHITECTURES)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def replica(name: str) -> Replica:
    return tiny_replica(name)


def tolerance(replica: Replica) -> float:
    return 1e-6 if replica.model.dtype == torch.float64 else 1e-4


def direction(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=HIDDEN)


def logits(replica: Replica) -> Tensor:
    with torch.inference_mode():
        return replica.logits(PROMPTS, keep=1)


def projected(replica: Replica, changes: Sequence[Intervention]) -> Tensor:
    tables: RowTables = row_tables(replica, [changes] * len(PROMPTS))
    with steered(replica, Steering(tables.tables, [len(prompt) for prompt in PROMPTS])):
        return logits(replica)


def everywhere(vectors: Sequence[np.ndarray]) -> list[Intervention]:
    places: list[Any] = [(0, "before")]
    places += [(layer, site) for layer in range(LAYERS) for site in ("attention", "mlp")]
    return [ProjectOut(layer=layer, site=site, direction=each) for layer, site in places for each in vectors]


def weights(replica: Replica) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in replica.model.state_dict().items()}


def outputs(replica: Replica) -> dict[str, Tensor]:
    """What the embedding and each part of each block put out for the prompts."""
    found: dict[str, Tensor] = {}

    def keep(key: str) -> Any:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            found[key] = output[0] if isinstance(output, tuple) else output

        return hook

    handles = [replica.model.get_input_embeddings().register_forward_hook(keep("embedding"))]
    for layer, parts in enumerate(replica.parts):
        handles.append(parts.attention.register_forward_hook(keep(f"attention {layer}")))
        handles.append(parts.mlp.register_forward_hook(keep(f"mlp {layer}")))
    try:
        logits(replica)
    finally:
        for handle in handles:
            handle.remove()
    return found


def along(output: Tensor, vector: np.ndarray) -> Tensor:
    unit = torch.from_numpy(vector / np.linalg.norm(vector))
    return output.double() @ unit


def test_ablated_weights_do_what_projecting_every_parts_output_does(replica: Replica) -> None:
    before = logits(replica)
    expected = projected(replica, everywhere([direction()]))
    with ablated(replica, direction()):
        found = logits(replica)
    torch.testing.assert_close(found, expected, atol=tolerance(replica), rtol=0)
    assert (found - before).abs().max() > 0.01, "the direction matters"


def test_several_directions_are_taken_out_together_however_they_lie(replica: Replica) -> None:
    one, other = direction(1), direction(1) + 0.1 * direction(2)
    # Projections one after the other take out a span only if they are orthogonal.
    expected = projected(replica, everywhere(list(span(np.stack([one, other]), HIDDEN))))
    with ablated(replica, np.stack([one, other, one - 3 * other])):
        found = logits(replica)
    torch.testing.assert_close(found, expected, atol=tolerance(replica), rtol=0)


def test_no_part_writes_along_the_direction(replica: Replica) -> None:
    vector = 5 * direction(3)
    with ablated(replica, vector):
        found = outputs(replica)
    assert len(found) == 1 + 2 * LAYERS
    for key, output in found.items():
        assert along(output, vector).abs().max() < tolerance(replica), key
        assert output.abs().max() > 0.01, key


def test_biases_that_are_left_are_all_that_parts_write_along_the_direction(replica: Replica) -> None:
    vector = direction(3)
    with ablated(replica, vector, biases=False):
        found = outputs(replica)
    biases = {
        f"{part} {layer}": [
            getattr(module, name)
            for module, name, _ in find_writers(replica, [part], [layer])
            if name == "bias"
        ]
        for part in ("attention", "mlp")
        for layer in range(LAYERS)
    }
    for key, output in found.items():
        expected = sum(along(bias, vector) for bias in biases.get(key, []))
        left = along(output, vector) - expected
        assert left.abs().max() < tolerance(replica), key


def test_weights_and_logits_come_back_bit_equal(replica: Replica) -> None:
    parameters = dict(replica.model.named_parameters())
    before, said = weights(replica), logits(replica)
    with ablated(replica, direction()):
        changed = [name for name, value in weights(replica).items() if not torch.equal(value, before[name])]
    assert len(changed) >= 1 + 2 * LAYERS
    with pytest.raises(ZeroDivisionError), ablated(replica, direction()):
        1 / 0  # noqa: B018
    after = weights(replica)
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert all(value is parameters[name] for name, value in replica.model.named_parameters())
    assert torch.equal(logits(replica), said)


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("layers", [None, (1, 3), ()])
def test_only_the_chosen_parts_and_layers_change(
    replica: Replica, part: Part, layers: tuple[int, ...] | None
) -> None:
    chosen = range(LAYERS) if layers is None else layers
    changes: list[Intervention] = [
        ProjectOut(layer=layer, site=part, direction=direction()) for layer in chosen if part != "embedding"
    ]
    if part == "embedding":
        changes = [ProjectOut(layer=0, site="before", direction=direction())]
    expected = projected(replica, changes)
    with ablated(replica, direction(), parts=[part], layers=layers):
        found = logits(replica)
    torch.testing.assert_close(found, expected, atol=tolerance(replica), rtol=0)


def test_every_expert_of_a_mixture_is_found() -> None:
    replica = tiny_replica("mixtral")
    writers = find_writers(replica, ["mlp"])
    assert [(writer.name, writer.axis) for writer in writers] == [("down_proj", 1)] * LAYERS
    with ablated(replica, direction(), parts=["mlp"]):
        for writer in writers:
            experts_EDI = getattr(writer.module, writer.name)
            assert experts_EDI.shape[0] == 4
            assert along(experts_EDI.movedim(1, -1), direction()).abs().max() < 1e-12


def test_shared_experts_write_and_routers_and_gates_do_not() -> None:
    config = transformers.Qwen2MoeConfig(
        hidden_size=HIDDEN,
        intermediate_size=48,
        moe_intermediate_size=24,
        shared_expert_intermediate_size=48,
        num_experts=4,
        num_experts_per_tok=2,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=len(tiny_tokenizer()),
        experts_implementation="eager",
    )
    torch.manual_seed(0)
    model = transformers.Qwen2MoeForCausalLM(config).double()
    replica = Replica(model, tiny_tokenizer())
    names = {id(value): name for name, value in model.named_parameters()}
    found = {names[id(getattr(writer.module, writer.name))] for writer in find_writers(replica, ["mlp"], [0])}
    assert found == {
        "model.layers.0.mlp.experts.down_proj",
        "model.layers.0.mlp.shared_expert.down_proj.weight",
    }
    with ablated(replica, direction()):
        parts = outputs(replica)
    assert all(along(output, direction()).abs().max() < 1e-6 for output in parts.values())


def test_a_list_of_experts_writes_with_each_of_them() -> None:
    replica = tiny_replica("llama")
    experts = nn.ModuleList(replica.parts[layer].mlp for layer in (1, 2))
    replica.parts[0] = replica.parts[0]._replace(mlp=nn.ModuleDict({"experts": experts}))
    expected = [Writer(replica.parts[layer].mlp.down_proj, "weight", 0) for layer in (1, 2)]
    assert find_writers(replica, ["mlp"], [0]) == expected


def tied_replica(name: str) -> Replica:
    model: Any = tiny_model(name)
    model.config.tie_word_embeddings = True
    model.lm_head.weight = model.get_input_embeddings().weight
    return Replica(model, tiny_tokenizer())


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2"])
def test_an_unembedding_that_shares_the_token_table_keeps_the_old_one(name: str) -> None:
    replica = tied_replica(name)
    table = replica.model.lm_head.weight
    before, old = logits(replica), table.clone()
    expected = projected(replica, everywhere([direction()]))
    with ablated(replica, direction()):
        found = logits(replica)
        assert replica.model.lm_head.weight is table
        assert torch.equal(table, old)
    torch.testing.assert_close(found, expected, atol=tolerance(replica), rtol=0)
    assert replica.model.get_input_embeddings().weight is replica.model.lm_head.weight
    assert torch.equal(logits(replica), before)


def test_ablations_nest_and_come_back_one_by_one() -> None:
    replica = tiny_replica("llama")
    said = logits(replica)
    with ablated(replica, direction(1), parts=["attention"]):
        outer = logits(replica)
        with ablated(replica, direction(2), parts=["attention", "mlp"]):
            inner = logits(replica)
        assert torch.equal(logits(replica), outer)
    assert torch.equal(logits(replica), said)
    assert not torch.equal(inner, outer)
    assert not torch.equal(outer, said)


def test_configurations_of_a_pack_run_on_ablated_weights_and_nothing_kept_before_counts() -> None:
    replica, other = tiny_replica("llama"), tiny_replica("llama")
    rows: list[list[Intervention]] = [
        [],
        [Add(layer=2, vector=direction(4))],
        [Add(layer=0, vector=direction(5))],
    ]
    work = [Work(prompt, row) for prompt in range(len(PROMPTS)) for row in range(len(rows))]

    def completions(replica: Replica) -> list[list[int]]:
        tables = row_tables(replica, rows)
        found = dict(generate(replica, PROMPTS, tables, work, Decoding(max_new_tokens=5, stops=False)))
        return [found[index].tokens for index in range(len(work))]

    plain = completions(replica)  # keeps the unsteered prompts for the next pack
    with ablated(other, direction(6)):
        expected = completions(other)
    with ablated(replica, direction(6)):
        assert completions(replica) == expected
    assert completions(replica) == plain
    assert expected != plain


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_weights_keep_their_type_and_lose_the_direction_as_far_as_it_can_tell(dtype: torch.dtype) -> None:
    replica = Replica(tiny_model("gpt2").to(dtype), tiny_tokenizer())
    writers = find_writers(replica)
    before = [getattr(module, name) for module, name, _ in writers]
    with ablated(replica, direction()):
        for (module, name, axis), old in zip(writers, before, strict=True):
            new = getattr(module, name)
            assert (new.dtype, new.shape, new.requires_grad) == (dtype, old.shape, False)
            left = along(new.movedim(axis, -1), direction()).abs().max()
            assert left < 4 * torch.finfo(dtype).eps * old.abs().max(), name


@pytest.mark.parametrize(
    ("directions", "message"),
    [
        (np.zeros(HIDDEN), "direction 0 is 0 and points nowhere"),
        (np.stack([direction(), np.zeros(HIDDEN)]), "direction 1 is 0"),
        (np.full(HIDDEN, np.nan), "direction 0 holds NaN"),
        (np.stack([direction(), np.full(HIDDEN, np.inf)]), "direction 1 holds NaN or an infinity"),
        (direction()[:-1], rf"shape \({HIDDEN - 1},\); this takes \({HIDDEN},\) or \(K, {HIDDEN}\)"),
        (np.zeros((0, HIDDEN)), rf"shape \(0, {HIDDEN}\)"),
        (np.ones((1, 1, HIDDEN)), rf"shape \(1, 1, {HIDDEN}\)"),
    ],
)
def test_directions_that_cannot_be_meant_are_refused(directions: np.ndarray, message: str) -> None:
    replica = tiny_replica("llama")
    before = logits(replica)
    with pytest.raises(SpecError, match=message), ablated(replica, directions):
        pass
    assert torch.equal(logits(replica), before)


def test_parts_and_layers_that_do_not_exist_are_refused() -> None:
    replica = tiny_replica("llama")
    with pytest.raises(SpecError, match=r"parts \['head'\] do not exist; there are \['embedding'"):
        find_writers(replica, ["head"])  # type: ignore[list-item]
    with pytest.raises(
        SpecError, match=rf"layers \[{LAYERS}\] do not exist; the model has 0 to {LAYERS - 1}"
    ):
        find_writers(replica, layers=[0, LAYERS])


def test_an_embedding_of_another_width_is_refused_and_the_rest_can_be_ablated() -> None:
    config = transformers.OPTConfig(
        hidden_size=HIDDEN,
        word_embed_proj_dim=HIDDEN // 2,
        ffn_dim=64,
        num_attention_heads=4,
        num_hidden_layers=2,
        vocab_size=len(tiny_tokenizer()),
    )
    replica = Replica(transformers.OPTForCausalLM(config).double(), tiny_tokenizer())
    with pytest.raises(ModelError, match=r"not as wide as its residual stream \(32\); leave 'embedding' out"):
        find_writers(replica)
    assert len(find_writers(replica, ["attention", "mlp"], biases=False)) == 4


def test_experts_whose_layout_cannot_be_told_are_refused() -> None:
    replica = tiny_replica("llama")
    experts = nn.Module()
    experts.down_proj = nn.Parameter(torch.zeros(4, HIDDEN, HIDDEN))
    replica.parts[0] = replica.parts[0]._replace(mlp=experts)
    with pytest.raises(ModelError, match=r"down_proj has the shape \(4, 32, 32\), and which axis"):
        find_writers(replica)


def test_a_part_without_a_matrix_of_the_right_width_is_refused_with_what_it_has() -> None:
    replica = tiny_replica("llama")
    replica.parts[2] = replica.parts[2]._replace(mlp=nn.Linear(HIDDEN, HIDDEN + 1))
    with pytest.raises(
        ModelError, match=r"layer 2's mlp \(Linear\) gives .* 32; it has \['bias', 'weight'\]"
    ):
        find_writers(replica)


def test_quantised_weights_are_refused() -> None:
    replica = tiny_replica("llama")
    packed = replica.parts[1].mlp.down_proj
    packed.weight = nn.Parameter(packed.weight.to(torch.int8), requires_grad=False)
    with pytest.raises(ModelError, match=r"quantised.*load the model in a floating-point dtype"):
        find_writers(replica)


def test_the_span_of_directions_is_orthonormal_and_holds_them() -> None:
    rows = np.stack([direction(seed) for seed in range(3)])
    basis = span(np.vstack([rows, rows[:1] * 7, rows[1:2] - rows[2:]]), HIDDEN)
    assert basis.shape == (3, HIDDEN)
    np.testing.assert_allclose(basis @ basis.T, np.eye(3), atol=1e-12)
    np.testing.assert_allclose(rows @ basis.T @ basis, rows, atol=1e-12)


def test_float32_only_architectures_are_still_in_the_tests() -> None:
    assert set(FLOAT32_ONLY) < set(ARCHITECTURES)

"""Loading: types, devices, what is refused and with which line; the context; models spread over devices."""

import importlib.util
import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from transformers import PreTrainedModel

from jobs.engine import loading
from jobs.engine.blocks import find_blocks
from jobs.engine.decoding import Decoding, Work, generate
from jobs.engine.interventions import Add, ProjectOut
from jobs.engine.loading import join_devices, load_replica
from jobs.engine.prefill import prefill
from jobs.engine.replica import Replica
from jobs.engine.skipping import skipping
from jobs.engine.tables import Steering, row_tables, steered
from jobs.errors import ModelError, SpecError
from jobs.fingerprint import fingerprint
from jobs.spec import ModelRef
from orchestrator import ray_worker
from orchestrator.config import make_config
from orchestrator.ray_worker import WorkerActor
from orchestrator.worker import Worker
from tests.models import (
    ARCHITECTURES,
    HIDDEN,
    LAYERS,
    recorded,
    save_tiny,
    tiny_model,
    tiny_replica,
    tiny_tokenizer,
)

PROMPTS = [[40, 41, 42], [50, 51, 52, 53, 54, 55, 56], [60]]
WIDE = 64
SIZE = {"hidden_size": HIDDEN, "intermediate_size": 64, "num_attention_heads": 4, "num_hidden_layers": 2}


def save(path: Path, model: PreTrainedModel) -> str:
    model.save_pretrained(path)
    tiny_tokenizer().save_pretrained(path)
    return str(path)


def edit(path: Path, **changes: Any) -> None:
    """Change a JSON file; None takes a key out."""
    values = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in values.items() if value is not None}))


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_tiny(tmp_path_factory.mktemp("tiny")))


@pytest.fixture(scope="module")
def whole_blocks(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A model whose matrices have rows of whole int4 blocks."""
    torch.manual_seed(0)
    size = {**SIZE, "hidden_size": WIDE, "intermediate_size": 2 * WIDE, "vocab_size": 400}
    config = transformers.LlamaConfig(**size, pad_token_id=0)
    return save(tmp_path_factory.mktemp("wide"), transformers.LlamaForCausalLM(config).float())


def direction(seed: int = 0, size: int = HIDDEN) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=size)


class TestTypes:
    @pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16", "float16"])
    def test_weights_are_loaded_in_the_type_that_is_asked_for(self, saved: str, dtype: str) -> None:
        replica = load_replica(ModelRef(id=saved, dtype=dtype))
        assert {parameter.dtype for parameter in replica.model.parameters()} == {getattr(torch, dtype)}
        assert not any(parameter.requires_grad for parameter in replica.model.parameters())
        assert replica.state_bytes == HIDDEN * getattr(torch, dtype).itemsize

    @pytest.mark.parametrize("dtype", ["int8", "int4"])
    def test_quantised_weights_need_their_package_and_the_line_names_the_extra(
        self, saved: str, dtype: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
        with pytest.raises(ModelError, match=rf"'{dtype}' needs the package bitsandbytes.*\.\[quantized\]"):
            load_replica(ModelRef(id=saved, dtype=dtype))

    @pytest.mark.parametrize(("dtype", "bits", "agreement"), [("int8", 8, 0.999), ("int4", 4, 0.95)])
    def test_quantised_weights_say_nearly_the_same_and_can_be_steered(
        self, whole_blocks: str, dtype: str, bits: int, agreement: float
    ) -> None:
        pytest.importorskip("bitsandbytes", reason="the extra `quantized` is not installed")
        replica = load_replica(ModelRef(id=whole_blocks, dtype=dtype))
        exact = load_replica(ModelRef(id=whole_blocks))
        assert replica.model.dtype == torch.bfloat16
        matrix = replica.blocks[0].get_parameter("mlp.down_proj.weight")
        assert matrix.nbytes * 8 == bits * 2 * WIDE * WIDE
        found, expected = replica.logits(PROMPTS, keep=1).double(), exact.logits(PROMPTS, keep=1).double()
        assert torch.cosine_similarity(found.flatten(), expected.flatten(), dim=0) > agreement
        rows = [[], [Add(layer=1, vector=20 * direction(size=WIDE))]]
        work = [Work(prompt, row) for prompt in range(len(PROMPTS)) for row in range(2)]
        steered = dict(
            generate(replica, PROMPTS, row_tables(replica, rows), work, Decoding(max_new_tokens=4))
        )
        assert steered[0].tokens != steered[1].tokens
        assert all(found.finite for found in steered.values())

    @pytest.mark.parametrize("dtype", ["int8", "int4"])
    def test_gradients_go_through_quantised_weights_after_a_pass_without(
        self, whole_blocks: str, dtype: str
    ) -> None:
        pytest.importorskip("bitsandbytes", reason="the extra `quantized` is not installed")
        replica = load_replica(ModelRef(id=whole_blocks, dtype=dtype))
        replica.logits(PROMPTS, keep=1)
        exact = load_replica(ModelRef(id=whole_blocks))
        given = torch.randn(1, 2 * WIDE, dtype=torch.bfloat16, requires_grad=True)
        replica.blocks[0].get_submodule("mlp.down_proj")(given).sum().backward()
        expected = exact.blocks[0].get_parameter("mlp.down_proj.weight").sum(0)
        assert given.grad is not None
        assert torch.cosine_similarity(given.grad[0].float(), expected, dim=0) > 0.95

    def test_int4_refuses_rows_that_are_not_whole_blocks(self, saved: str) -> None:
        pytest.importorskip("bitsandbytes", reason="the extra `quantized` is not installed")
        with pytest.raises(ModelError, match=rf"int4.*_proj of model .* takes {HIDDEN} values.*take int8"):
            load_replica(ModelRef(id=saved, dtype="int4"))

    def test_a_type_that_the_device_cannot_run_says_what_to_take(
        self, saved: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(loading, "_type_options", lambda dtype: {"dtype": torch.bfloat16})

        def refuse(*arguments: Any, **options: Any) -> Any:
            raise RuntimeError("None of the available devices are supported\nby this version")

        monkeypatch.setattr(loading.AutoModelForCausalLM, "from_pretrained", refuse)
        with pytest.raises(ModelError, match=r"RuntimeError: None .* supported; .*cpu cannot run int8, take"):
            load_replica(ModelRef(id=saved, dtype="int8"))


class TestDevices:
    def test_a_gpu_that_is_not_there_is_refused(self, saved: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        with pytest.raises(ModelError, match=r"device 'cuda:1': torch finds no GPU here"):
            load_replica(ModelRef(id=saved), device="cuda:1")

    @pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
    def test_auto_takes_the_cpu_where_there_is_no_gpu(self, saved: str) -> None:
        replica = load_replica(ModelRef(id=saved), device="auto")
        assert replica.device == torch.device("cpu")
        expected = load_replica(ModelRef(id=saved)).logits(PROMPTS, keep=1)
        torch.testing.assert_close(replica.logits(PROMPTS, keep=1), expected, atol=1e-5, rtol=0)

    @pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
    def test_on_a_gpu_the_weights_lie_there_and_part_of_what_is_free_is_kept_for_activations(
        self, saved: str
    ) -> None:
        replica = load_replica(ModelRef(id=saved), device="cuda")
        assert {parameter.device.type for parameter in replica.model.parameters()} == {"cuda"}
        assert 0 < replica.memory < torch.cuda.mem_get_info()[1]

    def test_memory_is_what_is_asked_for_or_a_share_of_the_machines(
        self, saved: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        for installed, expected in ((24 * 2**30, 4 * 2**30), (12 * 2**30, 2 * 2**30)):
            monkeypatch.setattr(os, "sysconf", {"SC_PAGE_SIZE": 4096, "SC_PHYS_PAGES": installed // 4096}.get)
            assert load_replica(ModelRef(id=saved)).memory == expected
        assert load_replica(ModelRef(id=saved), memory=12345).memory == 12345

    def test_of_several_gpus_the_fullest_decides_how_much_is_kept(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        class Spread:
            def parameters(self) -> list[Any]:
                devices = ["cuda:0", "cuda:1", "cuda:0", "cuda:2"]
                return [type("Weight", (), {"device": torch.device(device)}) for device in devices]

        free = {0: 5000, 1: 1000, 2: 3000}
        monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free[device.index], 10_000))
        assert loading._free_memory(Spread()) == int(0.4 * 1000 * 3)  # type: ignore[arg-type]

    def test_the_configured_memory_and_devices_reach_the_loader(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        asked: list[dict[str, Any]] = []
        monkeypatch.setattr(loading, "load_replica", lambda ref, **options: asked.append(options))
        Worker(tmp_path, ModelRef(id="x"), device="cpu", token_budget=7, memory=2**20)
        monkeypatch.setattr(ray_worker, "_write_output_to", lambda path: None)
        for gpus in (0, 0.5, 1, 2):
            actor = WorkerActor(
                str(tmp_path), ModelRef(id="x"), name="0", cpus=1, gpus=gpus, token_budget=7, memory=None
            )
            actor.load()
        assert asked[0] == {"device": "cpu", "token_budget": 7, "memory": 2**20}
        assert [options["device"] for options in asked[1:]] == ["cpu", "cuda", "cuda", "auto"]
        assert {options["memory"] for options in asked[1:]} == {None}

    @pytest.mark.parametrize("value", ["0", "-1", "nan", "inf"])
    def test_a_memory_that_cannot_be_meant_is_refused(self, value: str) -> None:
        assert make_config(memory_gib="0.5").memory_gib == 0.5
        with pytest.raises(SpecError, match="memory_gib"):
            make_config(memory_gib=value)


def spread(name: str, *, second: str) -> Replica:
    """A tiny model whose upper half, final norm and unembedding are on a second device."""
    model: Any = tiny_model(name)
    decoder = model.get_decoder()
    names = {module: path for path, module in model.named_modules()}
    blocks = find_blocks(decoder)
    others = [child for child in decoder.children() if child is not blocks]
    norms = [
        child
        for child in others
        if not isinstance(child, torch.nn.Embedding) and any(True for _ in child.parameters())
    ]
    upper = [*blocks[LAYERS // 2 :], *norms, model.get_output_embeddings()]
    lower = [*blocks[: LAYERS // 2], *(child for child in others if child not in norms)]
    for module in upper:
        module.to(second)
    model.hf_device_map = {names[each]: "cpu" for each in lower} | {names[each]: second for each in upper}
    join_devices(model)
    return Replica(model, tiny_tokenizer())


class TestSpreadModels:
    """The meta device stands for a second GPU: it computes nothing, but does not mix with another."""

    # On the meta device a router cannot choose.
    @pytest.mark.parametrize("name", sorted({*ARCHITECTURES} - {"mixtral"}))
    def test_each_part_gets_its_inputs_on_its_own_device(self, name: str) -> None:
        replica = spread(name, second="meta")
        seen: dict[int, set[str]] = {}

        def watch(layer: int) -> Any:
            def hook(module: Any, inputs: Any, options: Any) -> None:
                tensors = [*inputs, *options.values(), *(options.get("position_embeddings") or ())]
                seen[layer] = {each.device.type for each in tensors if isinstance(each, torch.Tensor)}

            return hook

        for layer, block in enumerate(replica.blocks):
            block.register_forward_pre_hook(watch(layer), with_kwargs=True)
        with torch.inference_mode():
            logits = replica.logits(PROMPTS, keep=1)
        assert (logits.device.type, logits.shape) == ("meta", (len(PROMPTS), 1, logits.shape[-1]))
        assert seen == {0: {"cpu"}, 1: {"cpu"}, 2: {"meta"}, 3: {"meta"}}

    @pytest.mark.parametrize("name", ["llama", "gemma3", "gpt2", "opt"])
    def test_interventions_caches_and_passes_from_the_middle_follow_the_blocks(self, name: str) -> None:
        replica, plain = spread(name, second="meta"), tiny_replica(name)
        rows = [
            [
                Add(layer=layer, site=site, vector=direction(layer)),
                ProjectOut(layer=layer, direction=direction()),
            ]
            for layer, site in ((0, "before"), (1, "mlp"), (3, "attention"))
        ]
        outputs = {}
        for each in (replica, plain):
            steering = Steering(row_tables(each, rows).tables, [len(prompt) for prompt in PROMPTS])
            with torch.inference_mode(), steered(each, steering), recorded(each) as outputs[each]:
                found = prefill(each, PROMPTS)
        for layer in range(LAYERS):
            device = "cpu" if layer < LAYERS // 2 else "meta"
            assert {state.device.type for state in spread_states(replica, layer)} <= {device}
            assert outputs[replica][layer].device.type == device
        for layer in range(LAYERS // 2):
            torch.testing.assert_close(outputs[replica][layer], outputs[plain][layer], atol=1e-9, rtol=0)
        assert found.cache.length == max(map(len, PROMPTS))

    @pytest.mark.parametrize("shared", [1, LAYERS // 2])
    def test_a_pass_that_begins_in_the_middle_leaves_the_devices_joined(self, shared: int) -> None:
        replica = spread("llama", second="meta")
        with torch.inference_mode():
            with recorded(replica) as outputs:
                before = replica.logits(PROMPTS, keep=1)
            computed = [0 if layer < shared else len(PROMPTS) for layer in range(LAYERS)]
            with skipping(replica, computed, len(PROMPTS), lambda block, output: outputs.get(block)):
                begun = replica.logits(PROMPTS, keep=1)
            after = replica.logits(PROMPTS, keep=1)
        assert before.device == begun.device == after.device == torch.device("meta")

    @pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral"])
    def test_hooks_between_parts_change_nothing_that_is_said(self, name: str) -> None:
        replica, plain = spread(name, second="cpu:0"), tiny_replica(name)
        assert any(block._forward_pre_hooks for block in replica.blocks)
        rows = [[], [Add(layer=1, vector=3 * direction())]]
        work = [Work(prompt, row) for prompt in range(len(PROMPTS)) for row in range(2)]
        found, expected = (
            dict(generate(each, PROMPTS, row_tables(each, rows), work, Decoding(max_new_tokens=4)))
            for each in (replica, plain)
        )
        assert {index: each.tokens for index, each in found.items()} == {
            index: each.tokens for index, each in expected.items()
        }


def spread_states(replica: Replica, layer: int) -> list[torch.Tensor]:
    with torch.inference_mode():
        return list(prefill(replica, PROMPTS).cache.by_layer[layer].states)


class TestRefusals:
    @pytest.mark.parametrize(
        ("build", "message"),
        [
            (
                lambda: transformers.T5ForConditionalGeneration(
                    transformers.T5Config(
                        d_model=32, d_kv=8, d_ff=64, num_layers=1, num_heads=4, vocab_size=400
                    )
                ),
                r"\(t5\) is an encoder-decoder model; steersweep takes decoder-only models",
            ),
            (
                lambda: transformers.BartForConditionalGeneration(
                    transformers.BartConfig(
                        d_model=32, encoder_layers=1, decoder_layers=1, encoder_ffn_dim=64, decoder_ffn_dim=64
                    )
                ),
                r"\(bart\) is an encoder-decoder model",
            ),
            (
                lambda: transformers.BertForMaskedLM(transformers.BertConfig(vocab_size=400, **SIZE)),
                r"\(bert\) is a bidirectional model",
            ),
            (
                lambda: transformers.LlamaModel(transformers.LlamaConfig(vocab_size=400, **SIZE)),
                r"lacks weights of a LlamaForCausalLM, 1 in all, such as 'lm_head\.weight'",
            ),
            (
                lambda: transformers.ViTModel(transformers.ViTConfig(image_size=32, **SIZE)),
                r"it is of a kind that generates no text from text; choose a language model",
            ),
        ],
        ids=["t5", "bart", "bert", "without an unembedding", "images"],
    )
    def test_what_is_no_decoder_only_language_model_is_refused_in_a_line(
        self, tmp_path: Path, build: Callable[[], PreTrainedModel], message: str
    ) -> None:
        with pytest.raises(ModelError, match=message) as refused:
            load_replica(ModelRef(id=save(tmp_path, build())))
        assert str(tmp_path) in str(refused.value)
        assert "\n" not in str(refused.value)

    @pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model.safetensors"])
    def test_a_file_that_is_broken_is_a_line_that_says_which_part_could_not_be_loaded(
        self, tmp_path: Path, name: str
    ) -> None:
        (save_tiny(tmp_path) / name).write_bytes(b"\x00{")
        part = {"config.json": "configuration", "tokenizer.json": "tokenizer", "model.safetensors": "weights"}
        with pytest.raises(ModelError, match=f"cannot load the {part[name]} of folder") as refused:
            load_replica(ModelRef(id=str(tmp_path)))
        assert "\n" not in str(refused.value)

    @pytest.mark.parametrize("flag", [False, "yes", 1])
    @pytest.mark.parametrize("where", ["config.json", "tokenizer_config.json"])
    def test_a_models_own_code_runs_only_if_that_was_allowed(
        self, tmp_path: Path, where: str, flag: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("builtins.input", lambda *_: "y")
        save_tiny(tmp_path)
        ran = tmp_path / "ran"
        (tmp_path / "own.py").write_text(f"open({str(ran)!r}, 'w')\n")
        kind = {"config.json": "AutoConfig", "tokenizer_config.json": "AutoTokenizer"}[where]
        named = ["own.Own", None] if kind == "AutoTokenizer" else "own.Own"
        edit(tmp_path / where, auto_map={kind: named}, model_type="own", tokenizer_class="Own")
        with pytest.raises(
            ModelError, match=r"Python code of its own, which runs only with trust_remote_code"
        ):
            load_replica(ModelRef(id=str(tmp_path), trust_remote_code=flag))
        assert not ran.exists()

    def test_a_models_own_code_runs_where_it_was_allowed(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
        save_tiny(tmp_path)
        (tmp_path / "own.py").write_text(
            "from transformers import LlamaConfig, LlamaForCausalLM\n"
            "class Own(LlamaConfig):\n    model_type = 'own'\n"
            "class OwnLM(LlamaForCausalLM):\n    config_class = Own\n"
        )
        own = {"AutoConfig": "own.Own", "AutoModelForCausalLM": "own.OwnLM"}
        edit(tmp_path / "config.json", auto_map=own, model_type="own")
        replica = load_replica(ModelRef(id=str(tmp_path), trust_remote_code=True))
        assert type(replica.model).__name__ == "OwnLM"
        expected = Replica(tiny_model("llama").float(), tiny_tokenizer()).logits(PROMPTS, keep=1)
        torch.testing.assert_close(replica.logits(PROMPTS, keep=1), expected, atol=1e-5, rtol=0)

    def test_folders_that_changed_since_the_sweep_was_started_are_refused(self, tmp_path: Path) -> None:
        folder = str(save_tiny(tmp_path))
        ref = ModelRef(id=folder, weights=fingerprint(folder))
        assert load_replica(ref).layers == LAYERS
        edit(tmp_path / "generation_config.json", temperature=0.5)
        with pytest.raises(ModelError, match="are not those that the sweep was started with"):
            load_replica(ref)

    def test_a_model_that_does_not_fit_says_so(self, saved: str, monkeypatch: pytest.MonkeyPatch) -> None:
        def fill(*arguments: Any, **options: Any) -> Any:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

        monkeypatch.setattr(loading.AutoModelForCausalLM, "from_pretrained", fill)
        with pytest.raises(ModelError, match=r"does not fit on cpu; give more gpus_per_worker, or a smaller"):
            load_replica(ModelRef(id=saved))

    def test_blocks_that_would_lie_outside_of_the_gpus_are_refused(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        model = tiny_model("llama")
        model.hf_device_map = {"model.layers.0": 0, "model.layers.1": "cpu"}
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
        with pytest.raises(ModelError, match="does not fit on the 2 GPUs of this worker"):
            loading._check_whole(ModelRef(id="large"), model, [])


class TestTextPartsOfOtherModels:
    def test_a_model_that_also_takes_images_is_its_text_part(self, tmp_path: Path) -> None:
        text = tiny_model("gemma3").config.to_dict() | {"model_type": "gemma3_text"}
        vision = SIZE | {
            "num_hidden_layers": 12,
            "image_size": 28,
            "patch_size": 14,
            "model_type": "siglip_vision_model",
        }
        config = transformers.Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4)
        torch.manual_seed(0)
        replica = load_replica(
            ModelRef(id=save(tmp_path, transformers.Gemma3ForConditionalGeneration(config)))
        )
        assert replica.layers == LAYERS
        assert replica.hidden_size == HIDDEN
        assert replica.context == 512
        alone = Replica(transformers.Gemma3ForCausalLM(config.get_text_config()), tiny_tokenizer())
        alone.model.model.load_state_dict(replica.model.get_decoder().state_dict())
        alone.model.lm_head.load_state_dict(replica.model.lm_head.state_dict())
        rows = [[], [Add(layer=1, vector=9 * direction())]]
        work = [Work(prompt, row) for prompt in range(len(PROMPTS)) for row in range(2)]
        found, expected = (
            dict(generate(each, PROMPTS, row_tables(each, rows), work, Decoding(max_new_tokens=3)))
            for each in (replica, alone)
        )
        assert {index: each.tokens for index, each in found.items()} == {
            index: each.tokens for index, each in expected.items()
        }

    def test_blocks_of_another_number_than_the_configuration_states_are_refused(self) -> None:
        replica = tiny_replica("llama")
        replica.model.config.num_hidden_layers = LAYERS + 1
        with pytest.raises(ModelError, match=f"states {LAYERS + 1} blocks, and {LAYERS} are found"):
            loading._check_blocks(ModelRef(id="other"), replica)


class TestTokenizers:
    def test_without_padding_and_end_tokens_a_text_is_padded_and_ends_at_its_length(
        self, tmp_path: Path
    ) -> None:
        save_tiny(tmp_path)
        edit(tmp_path / "tokenizer_config.json", pad_token=None, eos_token=None)
        edit(tmp_path / "generation_config.json", eos_token_id=None, pad_token_id=None)
        edit(tmp_path / "config.json", eos_token_id=None, pad_token_id=None)
        (tmp_path / "special_tokens_map.json").unlink(missing_ok=True)
        replica = load_replica(ModelRef(id=str(tmp_path)))
        assert replica.tokenizer.pad_token_id is None
        assert (replica.pad_id, replica.stop_ids) == (0, frozenset())
        together = replica.logits(PROMPTS, keep=1)
        for prompt, expected in zip(PROMPTS, together, strict=True):
            torch.testing.assert_close(replica.logits([prompt], keep=1)[0], expected, atol=1e-5, rtol=0)
        work = [Work(prompt, 0) for prompt in range(len(PROMPTS))]
        found = dict(generate(replica, PROMPTS, row_tables(replica, [[]]), work, Decoding(max_new_tokens=5)))
        assert [len(each.tokens) for each in found.values()] == [5, 5, 5]

    def test_a_padding_token_that_the_model_does_not_know_is_not_used(self) -> None:
        replica = tiny_replica("llama")
        replica.tokenizer.add_special_tokens({"pad_token": "<|new|>"})
        assert replica.tokenizer.pad_token_id >= replica.model.get_input_embeddings().weight.shape[0]
        assert replica.pad_id == replica.tokenizer.eos_token_id
        assert replica.logits(PROMPTS, keep=1).isfinite().all()

    def test_a_chat_template_that_refuses_a_turn_says_why(self) -> None:
        replica = tiny_replica("llama")
        replica.tokenizer.chat_template = (
            "{% if messages[0].role == 'system' %}{{ raise_exception('no system, please') }}{% endif %}Hi"
        )
        assert replica.encode_chat("Hi") == replica.encode("Hi")
        with pytest.raises(
            ModelError, match=r"refuses the roles \['system', 'user'\]: no system, please; leave"
        ):
            replica.encode_chat("Hi", system="Be kind.")


class TestContext:
    @pytest.mark.parametrize("name", ARCHITECTURES)
    def test_a_text_longer_than_the_context_is_refused_with_what_is_allowed(self, name: str) -> None:
        replica = tiny_replica(name)
        assert replica.context == 512
        replica.check_length(512)
        with pytest.raises(
            SpecError, match=r"a text of 513 tokens, new ones included, .* context of 512; use"
        ):
            replica.check_length(513)

    @pytest.mark.parametrize("name", ["gpt2", "opt"])
    def test_learned_positions_end_where_the_context_does(self, name: str) -> None:
        replica = tiny_replica(name)
        assert replica.context is not None
        with torch.inference_mode():
            assert replica.logits([[40] * replica.context], keep=1).isfinite().all()
            with pytest.raises(IndexError):
                replica.logits([[40] * (replica.context + 1)], keep=1)

    def test_a_model_that_states_no_context_takes_any_length(self) -> None:
        config = transformers.BloomConfig(hidden_size=HIDDEN, n_layer=1, n_head=4, vocab_size=400)
        replica = Replica(transformers.BloomForCausalLM(config), tiny_tokenizer())
        assert replica.context is None
        replica.check_length(10**9)


def test_the_line_of_an_unknown_type_names_all_that_exist() -> None:
    with pytest.raises(
        ModelError, match=re.escape("['bfloat16', 'float16', 'float32', 'float64', 'int4', 'int8']")
    ):
        load_replica(ModelRef(id="smollm2-135m", dtype="int3"))

"""What a trial changes, written into a model's weights or beside them: against steered and tuned replicas."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from jobs.engine import loading
from jobs.engine.adapting import adapted, output_matrix
from jobs.engine.replica import Replica
from jobs.engine.tuned import tuned
from jobs.errors import ModelError, SpecError
from jobs.merging import Change, LowRank, save_lora, save_merged
from jobs.spec import ModelRef
from tests.models import ARCHITECTURES, HIDDEN, tiny_replica

PROMPTS = [[5, 6, 7, 8, 9, 3, 4], [9, 8, 7, 6, 5, 4, 3]]
REF = ModelRef(id="some")
RANDOM = np.random.default_rng(0)
VECTORS = {layer: RANDOM.normal(size=HIDDEN).astype(np.float32) for layer in (0, 2)}
WITHOUT_BIASES = ("mistral", "qwen2", "qwen3", "gemma2", "gemma3", "mixtral")


@pytest.fixture(params=ARCHITECTURES)
def name(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """An architecture, whose tiny model is what is loaded."""
    monkeypatch.setattr(loading, "load_replica", lambda ref: tiny_replica(request.param))
    found: str = request.param
    return found


def logits_of(model: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(torch.tensor(PROMPTS)).logits
    return found


def loaded(folder: Path, dtype: torch.dtype) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()


def low_rank(replica: Replica, layer: int, rank: int = 2) -> LowRank:
    weight: Any = output_matrix(replica, layer).module.weight
    inner = weight.numel() // HIDDEN
    b, a = RANDOM.normal(size=(HIDDEN, rank)), RANDOM.normal(size=(rank, inner))
    return LowRank(b.astype(np.float32), a.astype(np.float32))


def steered(replica: Replica) -> Tensor:
    def adding(vector: np.ndarray) -> Callable[..., Any]:
        def hook(block: Any, given: Any, put_out: Any) -> Any:
            if isinstance(put_out, tuple):
                return (put_out[0] + torch.tensor(vector), *put_out[1:])
            return put_out + torch.tensor(vector)

        return hook

    hooks = [replica.blocks[layer].register_forward_hook(adding(each)) for layer, each in VECTORS.items()]
    try:
        return logits_of(replica.model)
    finally:
        for hook in hooks:
            hook.remove()


def test_a_merged_model_says_what_the_steered_one_does_or_says_that_it_cannot(
    name: str, tmp_path: Path
) -> None:
    change, out = Change({}, VECTORS), tmp_path / "merged"
    if name in WITHOUT_BIASES:
        with pytest.raises(ModelError, match=r"take gguf or safetensors|a matrix for each expert"):
            save_merged(REF, change, out)
        assert list(tmp_path.iterdir()) == []
        return
    save_merged(REF, change, out)
    replica = tiny_replica(name)
    torch.testing.assert_close(
        logits_of(loaded(out, replica.model.dtype)), steered(replica), rtol=1e-3, atol=1e-4
    )
    assert AutoTokenizer.from_pretrained(out).encode("hello") == replica.tokenizer.encode("hello")
    assert [each.name for each in tmp_path.iterdir()] == ["merged"]


def test_a_norm_behind_the_feed_forward_part_is_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    replica = tiny_replica("gemma2")
    matrix: Any = output_matrix(replica, 2).module
    matrix.bias = torch.nn.Parameter(torch.zeros(HIDDEN), requires_grad=False)
    monkeypatch.setattr(loading, "load_replica", lambda ref: replica)
    with pytest.raises(ModelError, match="something comes in between; take gguf"):
        save_merged(REF, Change({}, VECTORS), tmp_path / "merged")


def test_changed_matrices_are_merged_and_written_as_an_adapter_that_peft_takes(
    name: str, tmp_path: Path
) -> None:
    if name == "mixtral":
        each_has_one = Change({1: LowRank(np.zeros((HIDDEN, 1)), np.zeros((1, 2 * HIDDEN)))}, {})
        for save in (save_merged, save_lora):
            with pytest.raises(ModelError, match="a matrix for each expert"):
                save(REF, each_has_one, tmp_path / "out")
        return
    replica = tiny_replica(name)
    wide, narrow = low_rank(replica, 1, 3), low_rank(replica, 2, 2)
    change = Change({1: wide, 2: narrow}, {})
    before = logits_of(replica.model)
    with (
        adapted(replica, 1, torch.tensor(wide.b @ wide.a)),
        adapted(replica, 2, torch.tensor(narrow.b @ narrow.a)),
    ):
        expected = logits_of(replica.model)
    assert not torch.allclose(expected, before, atol=1e-2)
    save_merged(REF, change, tmp_path / "merged")
    save_lora(REF, change, tmp_path / "lora")
    merged = logits_of(loaded(tmp_path / "merged", replica.model.dtype))
    torch.testing.assert_close(merged, expected, rtol=1e-3, atol=1e-4)
    adapter = PeftModel.from_pretrained(tiny_replica(name).model, str(tmp_path / "lora"))
    torch.testing.assert_close(logits_of(adapter), expected, rtol=1e-3, atol=1e-4)


def test_matrices_by_their_names_are_what_tuned_weights_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loading, "load_replica", lambda ref: tiny_replica("llama"))
    replica = tiny_replica("llama")
    names = ["model.layers.0.self_attn.q_proj", "model.layers.3.mlp.up_proj"]
    sizes = [replica.model.get_submodule(each).weight.shape for each in names]
    drawn = [(RANDOM.normal(size=(rows, 2)), RANDOM.normal(size=(2, columns))) for rows, columns in sizes]
    found = {
        each: LowRank(b.astype(np.float32), a.astype(np.float32))
        for each, (b, a) in zip(names, drawn, strict=True)
    }
    with tuned(
        replica, {f"{each}.{side}": getattr(pair, side) for each, pair in found.items() for side in "ab"}
    ):
        expected = logits_of(replica.model)
    save_lora(REF, Change(found, {}), tmp_path / "lora")
    adapter = PeftModel.from_pretrained(tiny_replica("llama").model, str(tmp_path / "lora"))
    torch.testing.assert_close(logits_of(adapter), expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("save", [save_merged, save_lora])
def test_nothing_is_replaced_and_nothing_left_behind(
    save: Callable[..., None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loading, "load_replica", lambda ref: tiny_replica("llama"))
    change = Change({1: low_rank(tiny_replica("llama"), 1)}, {})
    (tmp_path / "mine").mkdir()
    with pytest.raises(SpecError, match="is there already"):
        save(REF, change, tmp_path / "mine")
    (tmp_path / "file").write_text("")
    with pytest.raises(SpecError, match="cannot be written"):
        save(REF, change, tmp_path / "file" / "below")
    unknown = Change({"no.such": low_rank(tiny_replica("llama"), 1)}, {})
    with pytest.raises(ModelError, match=r"no matrix 'no\.such'"):
        save(REF, unknown, tmp_path / "new")
    assert sorted(each.name for each in tmp_path.iterdir()) == ["file", "mine"]


def test_vectors_are_no_adapter(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="adds vectors: take hf"):
        save_lora(REF, Change({}, VECTORS), tmp_path / "lora")

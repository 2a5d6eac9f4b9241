"""Content-addressed tensors: safetensors files named by their hash."""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import load as load_safetensors
from safetensors.numpy import save as save_safetensors

from storage.durable import StoreError, publish


class Artifact(NamedTuple):
    """A stored set of arrays.

    Attributes:
        sha256: Hash of the file's bytes.
        path: File, relative to the sweep's folder.
        bytes: Its size.
    """

    sha256: str
    path: str
    bytes: int


def write_artifact(folder: Path, tensors: Mapping[str, np.ndarray]) -> Artifact:
    """Store arrays once; equal content is one file. Raises StoreError if the disk refuses."""
    content = save_safetensors({name: np.asarray(array, order="C") for name, array in tensors.items()})
    digest = hashlib.sha256(content).hexdigest()
    path = folder / "artifacts" / f"{digest[:32]}.safetensors"
    if not path.exists():
        publish(path, content)
    return Artifact(digest, str(path.relative_to(folder)), len(content))


def read_artifact(folder: Path, artifact: Artifact) -> dict[str, np.ndarray]:
    """The arrays of an artifact, read-only. Raises as `artifact_bytes` does."""
    arrays = load_safetensors(artifact_bytes(folder, artifact))
    for array in arrays.values():
        array.flags.writeable = False
    return arrays


def read_tensor(path: Path, name: str) -> np.ndarray | None:
    """A tensor of an artifact; None where it has none of that name, or is gone."""
    try:
        with safe_open(path, framework="numpy") as file:
            if name not in file.keys():  # noqa: SIM118 - the file is no mapping
                return None
            found: np.ndarray = file.get_tensor(name)
    except (SafetensorError, OSError):
        return None
    return found


def artifact_bytes(folder: Path, artifact: Artifact) -> bytes:
    """The content of an artifact's file.

    Raises:
        StoreError: If the file is absent or its content is not what was stored.
    """
    path = folder / artifact.path
    if not path.is_file():
        raise StoreError(
            f"artifact {artifact.path} is gone; `steersweep resume` computes it again if trials that have "
            "not ended need it, and a new sweep otherwise"
        )
    content = path.read_bytes()
    if hashlib.sha256(content).hexdigest() != artifact.sha256:
        raise StoreError(f"artifact {artifact.path} has changed since it was stored; delete it and resume")
    return content


def is_whole(folder: Path, artifact: Artifact) -> bool:
    """Whether an artifact's file is there and what was stored."""
    try:
        artifact_bytes(folder, artifact)
    except StoreError:
        return False
    return True

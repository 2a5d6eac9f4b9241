"""Directions in files that others read: safetensors, and GGUF control vectors. No torch at import, no pickle.

Layers are counted as everywhere in this project: layer l is the output of block l, from 0. A GGUF control
vector says the same with other names: llama.cpp and repeng add the tensor `direction.n` to the output of
block n. llama.cpp has no place for block 0 and refuses a file that names it; repeng takes it.
"""

import json
import math
import os
import re
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from jobs.errors import SpecError

VECTOR_SUFFIXES = (".safetensors", ".gguf")
LAYER_CONVENTION = "output of block l, counted from 0"


@dataclass(frozen=True, slots=True, kw_only=True)
class VectorFile:
    """Directions as a file gives them.

    Attributes:
        directions: Layer to an array of shape (hidden,), float32, finite; layers ascending. A direction of
            zeros is possible: some programs write one for layers that they leave alone.
        residual_norms: Layer to the mean norm of the activations there, which doses refer to; may be empty.
        metadata: The texts of the file, such as `model` and `method`; of GGUF also `model_hint`, which is
            the name of the architecture.
    """

    directions: dict[int, np.ndarray]
    residual_norms: dict[int, float] = field(default_factory=dict)
    metadata: dict[str, str] = field(default_factory=dict)


def write_safetensors(
    path: Path,
    directions: Mapping[int, np.ndarray],
    *,
    model: str,
    method: str,
    residual_norms: Mapping[int, float] | None = None,
) -> None:
    """Write one float32 tensor `layer.{l}` a layer, whole or not at all.

    Args:
        path: File to write; one that is there is replaced.
        directions: Layer to an array of shape (hidden,), any float dtype.
        model: Name and revision of the model.
        method: How the directions were found.
        residual_norms: Mean norm of the activations, for the same layers.

    Raises:
        SpecError: If the directions are not finite vectors of one length, or the file cannot be written.
    """
    from safetensors.numpy import save

    checked = _checked(directions, "the directions to write")
    metadata = {
        "model": model,
        "method": method,
        "layer_convention": LAYER_CONVENTION,
        "norms": json.dumps(
            {layer: float(np.linalg.norm(array.astype(np.float64))) for layer, array in checked.items()}
        ),
        **_norms_as_text(residual_norms, checked),
    }
    content = save({f"layer.{layer}": array for layer, array in checked.items()}, metadata)
    with _published(path, ".safetensors") as staging:
        staging.write_bytes(content)


def write_gguf(
    path: Path,
    directions: Mapping[int, np.ndarray],
    *,
    model_hint: str,
    model: str,
    method: str,
    residual_norms: Mapping[int, float] | None = None,
    skip_block_0: bool = False,
) -> None:
    """Write a GGUF control vector as llama.cpp and repeng read it, whole or not at all.

    Both add each direction as it is, times one scale for all layers: multiply by doses beforehand.

    Args:
        path: File to write; one that is there is replaced.
        directions: Layer to an array of shape (hidden,), any float dtype; stored as float32.
        model_hint: Name of the architecture, `model_type` in a model's configuration.
        model: Name and revision of the model.
        method: How the directions were found.
        residual_norms: Mean norm of the activations, for the same layers.
        skip_block_0: Leave layer 0 out, which llama.cpp cannot express. Otherwise it is refused.

    Raises:
        SpecError: As `write_safetensors`, or if layer 0 is given and not to be skipped.
    """
    from gguf import GGUFWriter

    checked = _checked(directions, "the directions to write")
    if 0 in checked and not skip_block_0:
        raise SpecError("a GGUF control vector has no layer 0; leave it out, or say skip_block_0=True")
    kept = _checked({layer: array for layer, array in checked.items() if layer}, "layers above 0")
    texts = {"model": model, "method": method, **_norms_as_text(residual_norms, kept)}
    with _published(path, ".gguf") as staging:
        writer = GGUFWriter(staging, "controlvector")
        try:
            writer.add_string("controlvector.model_hint", model_hint)
            writer.add_uint32("controlvector.layer_count", len(kept))
            for key, text in texts.items():
                writer.add_string(f"steersweep.{key}", text)
            for layer, array in kept.items():
                writer.add_tensor(f"direction.{layer}", array)
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_tensors_to_file()
        finally:
            writer.close()


def read_vectors(path: Path, *, layers: int | None = None, hidden: int | None = None) -> VectorFile:
    """Directions of a `.safetensors` or `.gguf` file, which may be anybody's.

    Args:
        path: File to read.
        layers: Number of blocks of the model they are for; None does not check.
        hidden: Its hidden size; None does not check.

    Raises:
        SpecError: If the file cannot be read, is not of its format, or holds anything but directions of one
            length, finite, as floats, at layers that exist.
    """
    readers = {".safetensors": _read_safetensors, ".gguf": _read_gguf}
    if path.suffix not in readers:
        raise SpecError(f"{path}: directions are read from {' and '.join(readers)} files")
    if not path.is_file():
        raise SpecError(f"{path}: there is no such file")
    arrays, metadata = readers[path.suffix](path)
    directions = _checked(arrays, str(path))
    size = len(next(iter(directions.values())))
    if hidden is not None and size != hidden:
        raise SpecError(f"{path}: directions of length {size}; the model's hidden size is {hidden}")
    if layers is not None and max(directions) >= layers:
        raise SpecError(f"{path}: layer {max(directions)}; the model has 0 to {layers - 1}")
    norms = _norms_from_text(metadata.pop("residual_norms", "{}"), path)
    return VectorFile(
        directions=directions,
        residual_norms={layer: norm for layer, norm in norms.items() if layer in directions},
        metadata=metadata,
    )


def _read_safetensors(path: Path) -> tuple[dict[int, np.ndarray], dict[str, str]]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            metadata = dict(file.metadata() or {})
            convention = metadata.get("layer_convention")
            if convention != LAYER_CONVENTION:
                given = f"{path}: its metadata have layer_convention={convention!r}"
                raise SpecError(f"{given}; if its layers are so, write there {LAYER_CONVENTION!r}")
            arrays = {}
            for name in file.keys():  # noqa: SIM118 - the file is no mapping
                _check_dtype(file.get_slice(name).get_dtype(), ("F32", "F16", "BF16", "F64"), name, path)
                arrays[_layer(name, "layer", path)] = file.get_tensor(name).float().numpy()
    except (SafetensorError, OSError) as error:
        raise SpecError(f"{path}: not a whole safetensors file: {error}") from error
    return arrays, metadata


def _read_gguf(path: Path) -> tuple[dict[int, np.ndarray], dict[str, str]]:
    from gguf import GGUFReader, GGUFValueType

    class BoundedReader(GGUFReader):
        """Refuses a length beyond the end of the file, where its parent would count on and on."""

        def _get(self, offset, dtype, count=1, override_order=None):  # type: ignore[no-untyped-def]
            found = super()._get(offset, dtype, count, override_order)
            if len(found) < count:
                raise ValueError(f"{count} numbers at byte {offset} are beyond its end")
            return found

    try:
        reader = BoundedReader(path)
        strings = {key: part for key, part in reader.fields.items() if part.types == [GGUFValueType.STRING]}
        texts = {key: part.contents() for key, part in strings.items()}
    except (ValueError, KeyError, IndexError, OverflowError, RecursionError, OSError) as error:
        raise SpecError(f"{path}: not a whole GGUF file: {error}") from error
    architecture = texts.get("general.architecture")
    if architecture != "controlvector":
        raise SpecError(f"{path}: a GGUF file of architecture {architecture!r}; it must be 'controlvector'")
    arrays = {}
    for tensor in reader.tensors:
        _check_dtype(tensor.tensor_type.name, ("F32", "F16", "F64"), tensor.name, path)
        arrays[_layer(tensor.name, "direction", path)] = tensor.data
    ours = {
        key.removeprefix(prefix): text
        for prefix in ("controlvector.", "steersweep.")
        for key, text in texts.items()
        if key.startswith(prefix)
    }
    return arrays, ours


def _check_dtype(dtype: str, allowed: tuple[str, ...], name: str, path: Path) -> None:
    if dtype not in allowed:
        raise SpecError(f"{path}: {name} is stored as {dtype}; store it as {' or '.join(allowed)}")


def _layer(name: str, prefix: str, path: Path) -> int:
    number = re.fullmatch(rf"{prefix}\.(0|[1-9][0-9]{{0,5}})", name)
    if number is None:
        raise SpecError(f"{path}: has {name!r}; it may have nothing but {prefix}.0, {prefix}.1 and so on")
    return int(number[1])


def _checked(arrays: Mapping[int, np.ndarray], what: str) -> dict[int, np.ndarray]:
    """Copies in float32, layers ascending. Raises SpecError if they are not finite vectors of one length."""
    if not arrays:
        raise SpecError(f"{what}: no direction at all; at least one layer must have one")
    wrong = [layer for layer in arrays if isinstance(layer, bool) or layer != int(layer) or layer < 0]
    if wrong:
        raise SpecError(f"{what}: layers {wrong}; they are counted from 0")
    shapes = sorted({array.shape for array in arrays.values()})
    if len(shapes) > 1 or len(shapes[0]) != 1 or 0 in shapes[0]:
        raise SpecError(f"{what}: directions of shapes {shapes}; all must be vectors of one length")
    checked = {}
    for layer in sorted(arrays):
        if arrays[layer].dtype.kind != "f":
            raise SpecError(f"{what}: layer {layer} is of {arrays[layer].dtype}; directions are floats")
        with np.errstate(over="ignore"):
            checked[int(layer)] = np.array(arrays[layer], dtype=np.float32)
        if not np.isfinite(checked[int(layer)]).all():
            raise SpecError(f"{what}: layer {layer} has numbers that are not finite in float32")
    return checked


def _norms_as_text(norms: Mapping[int, float] | None, directions: Mapping[int, np.ndarray]) -> dict[str, str]:
    """One metadata entry for the layers that there are, or none without norms."""
    if norms is None:
        return {}
    missing = [layer for layer in directions if layer not in norms]
    if missing:
        raise SpecError(f"residual_norms has no layer {missing}; it needs every layer of the directions")
    kept = {layer: float(norms[layer]) for layer in directions}
    _check_norms(kept, "the residual norms to write")
    return {"residual_norms": json.dumps(kept)}


def _norms_from_text(text: str, path: Path) -> dict[int, float]:
    try:
        norms = {int(layer): float(norm) for layer, norm in json.loads(text).items()}
    except (ValueError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise SpecError(f"{path}: residual_norms in its metadata are not a norm by layer: {error}") from error
    _check_norms(norms, str(path))
    return norms


def _check_norms(norms: Mapping[int, float], what: str) -> None:
    wrong = {layer: norm for layer, norm in norms.items() if not 0 < norm < math.inf}
    if wrong:
        raise SpecError(f"{what}: residual norms {wrong} by layer; they must be above 0 and finite")


@contextmanager
def _published(path: Path, suffix: str) -> Iterator[Path]:
    """A name to write to that becomes the path at the end, or nothing if something fails."""
    if path.suffix != suffix:
        raise SpecError(f"{path}: the name of this kind of file ends in {suffix}")
    if not path.parent.is_dir():
        raise SpecError(f"{path}: cannot be written: there is no folder {path.parent}")
    staging = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}")
    try:
        yield staging
        with staging.open("rb+") as file:
            os.fsync(file.fileno())
        staging.replace(path)
    except BaseException as error:
        with suppress(OSError):
            staging.unlink()
        if isinstance(error, OSError):
            raise SpecError(f"{path}: cannot be written: {error.strerror or error}") from error
        raise

"""Directions in safetensors and GGUF files: what the formats' own packages read and write; broken files."""

import json
import os
import random
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from safetensors import safe_open
from safetensors.torch import save_file

from jobs.directions.vector_files import LAYER_CONVENTION, read_vectors, write_gguf, write_safetensors
from jobs.errors import SpecError

DIRECTIONS = {3: np.array([0.5, -2, 0]), 1: np.array([3, 0, 4]) / 3, 12: np.array([1e-30, 7, 7])}
NORMS = {1: 10.5, 3: 11.0, 12: 99.25, 13: 5.0}

Write = Callable[..., None]


def write_gguf_anyhow(path: Path, directions: Mapping[int, np.ndarray], **named: Any) -> None:
    write_gguf(path, directions, model_hint="llama", **named)


WRITERS: dict[str, Write] = {"safetensors": write_safetensors, "gguf": write_gguf_anyhow}
written_by_each = pytest.mark.parametrize(("suffix", "write"), WRITERS.items(), ids=list(WRITERS))


def control_vector(path: Path, tensors: Mapping[str, np.ndarray], *, arch: str = "controlvector") -> Path:
    """A file as repeng writes it."""
    writer = gguf.GGUFWriter(path, arch)
    writer.add_string("controlvector.model_hint", "mistral")
    writer.add_uint32("controlvector.layer_count", len(tensors))
    for name, array in tensors.items():
        writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def plain(path: Path, tensors: Mapping[str, torch.Tensor], **metadata: str) -> Path:
    save_file(dict(tensors), path, {"layer_convention": LAYER_CONVENTION} | metadata)
    return path


class TestRoundTrip:
    @written_by_each
    def test_directions_norms_and_texts_come_back(self, suffix: str, write: Write, tmp_path: Path) -> None:
        path = tmp_path / f"v.{suffix}"
        write(path, DIRECTIONS, model="m@r", method="lda, β=1", residual_norms=NORMS)
        found = read_vectors(path, layers=13, hidden=3)
        assert list(found.directions) == [1, 3, 12]
        for layer, direction in found.directions.items():
            assert direction.dtype == np.float32
            np.testing.assert_array_equal(direction, DIRECTIONS[layer].astype(np.float32))
            direction[:] = 0
        assert found.residual_norms == {1: 10.5, 3: 11.0, 12: 99.25}
        assert (found.metadata["model"], found.metadata["method"]) == ("m@r", "lda, β=1")
        assert [entry.name for entry in tmp_path.iterdir()] == [path.name]

    @settings(max_examples=25)
    @given(
        arrays.arrays(
            np.float32,
            st.tuples(st.integers(1, 4), st.integers(1, 40)),
            elements=st.floats(width=32, allow_nan=False, allow_infinity=False),
        )
    )
    def test_every_finite_float32_survives_both_formats(
        self, tmp_path_factory: pytest.TempPathFactory, rows: np.ndarray
    ) -> None:
        directions = {2 * index + 1: row for index, row in enumerate(rows)}
        folder = tmp_path_factory.mktemp("vectors")
        for suffix, write in WRITERS.items():
            write(folder / f"v.{suffix}", directions, model="m", method="x")
            found = read_vectors(folder / f"v.{suffix}")
            assert found.residual_norms == {}
            assert {layer: array.tobytes() for layer, array in found.directions.items()} == {
                layer: row.tobytes() for layer, row in directions.items()
            }

    @written_by_each
    def test_arrays_that_are_not_contiguous_and_layers_of_numpy_are_taken(
        self, suffix: str, write: Write, tmp_path: Path
    ) -> None:
        table = np.arange(12.0).reshape(3, 4)
        directions = {np.int64(layer + 1): table[:, layer] for layer in range(4)}
        write(tmp_path / f"v.{suffix}", directions, model="m", method="x")
        found = read_vectors(tmp_path / f"v.{suffix}").directions
        np.testing.assert_array_equal(np.stack(list(found.values()), axis=1), table)


class TestSafetensors:
    def test_the_formats_own_package_reads_what_is_written(self, tmp_path: Path) -> None:
        path = tmp_path / "v.safetensors"
        write_safetensors(path, {0: np.array([3.0, 4.0])}, model="m", method="x", residual_norms={0: 2})
        with safe_open(path, framework="np") as file:
            assert list(file.keys()) == ["layer.0"]
            assert file.get_slice("layer.0").get_dtype() == "F32"
            np.testing.assert_array_equal(file.get_tensor("layer.0"), [3, 4])
            metadata = file.metadata()
        assert metadata["layer_convention"] == "output of block l, counted from 0"
        assert json.loads(metadata["norms"]) == {"0": 5.0}
        assert json.loads(metadata["residual_norms"]) == {"0": 2.0}

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
    def test_every_float_is_read_as_float32(self, dtype: torch.dtype, tmp_path: Path) -> None:
        given_ = torch.tensor([1 / 3, -7.0], dtype=dtype)
        found = read_vectors(plain(tmp_path / "v.safetensors", {"layer.5": given_})).directions
        np.testing.assert_array_equal(found[5], given_.float().numpy())

    def test_layers_counted_in_an_unknown_way_are_refused_with_the_remedy(self, tmp_path: Path) -> None:
        for metadata in (None, {"layer_convention": "hidden_states index"}):
            save_file({"layer.1": torch.ones(2)}, tmp_path / "v.safetensors", metadata)
            with pytest.raises(SpecError, match="write there 'output of block l, counted from 0'"):
                read_vectors(tmp_path / "v.safetensors")

    @pytest.mark.parametrize(
        ("tensors", "why"),
        [
            ({"layer.1": torch.ones(2), "layer.2": torch.ones(3)}, r"shapes \[\(2,\), \(3,\)\]; all must be"),
            ({"layer.1": torch.ones(1, 2)}, r"shapes \[\(1, 2\)\]; all must be vectors"),
            ({"layer.1": torch.ones(0)}, r"shapes \[\(0,\)\]"),
            ({"layer.1": torch.ones(2, dtype=torch.int32)}, "layer.1 is stored as I32; store it as F32 or"),
            ({"layer.1": torch.tensor([1.0, torch.nan])}, "layer 1 has numbers that are not finite"),
            ({"layer.1": torch.tensor([1e300, 1.0]).double()}, "not finite in float32"),
            (
                {"layer.1": torch.ones(2), "bias": torch.ones(2)},
                "has 'bias'; it may have nothing but layer.0",
            ),
            ({"layer.-1": torch.ones(2)}, "has 'layer.-1'"),
            ({"layer.01": torch.ones(2)}, "has 'layer.01'"),
            ({"layer.٣": torch.ones(2)}, "has 'layer.٣'"),
            ({}, "no direction at all"),
        ],
        ids=lambda value: value[:20] if isinstance(value, str) else "",
    )
    def test_anything_but_directions_is_refused_with_what_it_is(
        self, tensors: dict[str, torch.Tensor], why: str, tmp_path: Path
    ) -> None:
        path = plain(tmp_path / "v.safetensors", tensors)
        with pytest.raises(SpecError, match=why) as refusal:
            read_vectors(path)
        assert str(path) in str(refusal.value)

    @pytest.mark.parametrize(
        "norms", ["[1]", "{", '{"1": "x"}', '{"x": 1}', '{"1": 0}', '{"1": NaN}', '{"1": 1' + "0" * 400 + "}"]
    )
    def test_residual_norms_that_are_none_are_refused(self, norms: str, tmp_path: Path) -> None:
        path = plain(tmp_path / "v.safetensors", {"layer.1": torch.ones(2)}, residual_norms=norms)
        with pytest.raises(SpecError, match=r"residual.norms"):
            read_vectors(path)

    def test_norms_of_other_layers_are_left_out(self, tmp_path: Path) -> None:
        norms = json.dumps({"1": 4, "2": 5})
        path = plain(tmp_path / "v.safetensors", {"layer.1": torch.ones(2)}, residual_norms=norms)
        assert read_vectors(path).residual_norms == {1: 4.0}


class TestGguf:
    def test_the_formats_own_package_reads_what_llama_cpp_and_repeng_ask_for(self, tmp_path: Path) -> None:
        path = tmp_path / "v.gguf"
        write_gguf(path, DIRECTIONS, model_hint="qwen3", model="m", method="x")
        reader = gguf.GGUFReader(path)
        fields = {key: part.contents() for key, part in reader.fields.items()}
        assert fields["general.architecture"] == "controlvector"
        assert fields["controlvector.model_hint"] == "qwen3"
        assert fields["controlvector.layer_count"] == 3
        assert reader.fields["controlvector.layer_count"].types == [gguf.GGUFValueType.UINT32]
        assert [tensor.name for tensor in reader.tensors] == ["direction.1", "direction.3", "direction.12"]
        for tensor in reader.tensors:
            assert tensor.tensor_type == gguf.GGMLQuantizationType.F32
            layer = int(tensor.name.split(".")[1])
            np.testing.assert_array_equal(tensor.data, DIRECTIONS[layer].astype(np.float32))

    @pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
    def test_what_others_write_is_read_with_the_same_layer_numbers(self, dtype: Any, tmp_path: Path) -> None:
        tensors = {f"direction.{layer}": np.array([layer, 0.5], dtype=dtype) for layer in (31, 0, 2)}
        found = read_vectors(control_vector(tmp_path / "v.gguf", tensors))
        assert list(found.directions) == [0, 2, 31]
        for layer, direction in found.directions.items():
            np.testing.assert_array_equal(direction, [layer, 0.5])
        assert found.metadata == {"model_hint": "mistral"}
        assert found.residual_norms == {}

    def test_block_0_is_refused_unless_it_is_to_be_skipped(self, tmp_path: Path) -> None:
        path, directions = tmp_path / "v.gguf", {0: np.ones(2), 4: np.ones(2)}
        with pytest.raises(SpecError, match="no layer 0; leave it out, or say skip_block_0=True"):
            write_gguf(path, directions, model_hint="llama", model="m", method="x")
        assert not path.exists()
        named = {"model_hint": "llama", "model": "m", "method": "x", "residual_norms": {0: 1.0, 4: 2.0}}
        write_gguf(path, directions, skip_block_0=True, **named)  # type: ignore[arg-type]
        assert list(read_vectors(path).directions) == [4]
        assert read_vectors(path).residual_norms == {4: 2.0}
        with pytest.raises(SpecError, match="layers above 0: no direction at all"):
            write_gguf(path, {0: np.ones(2)}, skip_block_0=True, **named)  # type: ignore[arg-type]

    @pytest.mark.parametrize(
        ("tensors", "why"),
        [
            ({"direction.1": np.ones(2, np.float32), "output": np.ones(2, np.float32)}, "has 'output'"),
            (
                {"direction.x": np.ones(2, np.float32)},
                "has 'direction.x'; it may have nothing but direction.0",
            ),
            ({"direction.1": np.ones((2, 2), np.float32)}, r"shapes \[\(2, 2\)\]"),
            ({"direction.1": np.ones(2, np.int32)}, "direction.1 is stored as I32; store it as F32 or"),
            ({"direction.1": np.array([np.inf, 1], np.float32)}, "layer 1 has numbers that are not finite"),
            ({}, "no direction at all"),
        ],
        ids=lambda value: value[:20] if isinstance(value, str) else "",
    )
    def test_anything_but_directions_is_refused_with_what_it_is(
        self, tensors: dict[str, np.ndarray], why: str, tmp_path: Path
    ) -> None:
        with pytest.raises(SpecError, match=why):
            read_vectors(control_vector(tmp_path / "v.gguf", tensors))

    def test_a_gguf_file_of_something_else_is_refused(self, tmp_path: Path) -> None:
        path = control_vector(tmp_path / "v.gguf", {"direction.1": np.ones(2, np.float32)}, arch="llama")
        with pytest.raises(SpecError, match="architecture 'llama'; it must be 'controlvector'"):
            read_vectors(path)

    def test_a_length_beyond_the_end_of_the_file_is_refused_at_once(self, tmp_path: Path) -> None:
        key = b"controlvector.x"
        header = b"GGUF" + struct.pack("<IQQ", 3, 0, 1)
        endless_list = struct.pack("<Q", len(key)) + key + struct.pack("<IIQ", 9, 4, 2**60)
        (tmp_path / "v.gguf").write_bytes(header + endless_list + bytes(64))
        with pytest.raises(SpecError, match="not a whole GGUF file"):
            read_vectors(tmp_path / "v.gguf")


class TestForeignFiles:
    @written_by_each
    def test_a_file_that_was_cut_or_changed_is_read_or_refused_but_nothing_else(
        self, suffix: str, write: Write, tmp_path: Path
    ) -> None:
        path = tmp_path / f"v.{suffix}"
        write(path, {1: np.ones(5), 2: np.ones(5)}, model="m", method="x", residual_norms=NORMS | {2: 3.0})
        whole, chance = path.read_bytes(), random.Random(0)
        padding = 12  # what GGUF adds to a last tensor of 20 bytes; without it nothing is missing
        for length in range(0, len(whole) - padding, 7):
            path.write_bytes(whole[:length])
            with pytest.raises(SpecError, match=str(path)):
                read_vectors(path)
        outcomes = []
        for _ in range(300):
            broken = bytearray(whole)
            broken[chance.randrange(len(broken))] = chance.choice([0, 1, 255, chance.randrange(256)])
            path.write_bytes(broken)
            try:
                outcomes.append(len(read_vectors(path).directions))
            except SpecError:
                outcomes.append(0)
        assert set(outcomes) == {0, 2}

    @written_by_each
    def test_another_models_directions_are_refused(self, suffix: str, write: Write, tmp_path: Path) -> None:
        path = tmp_path / f"v.{suffix}"
        write(path, DIRECTIONS, model="m", method="x")
        with pytest.raises(SpecError, match="directions of length 3; the model's hidden size is 4"):
            read_vectors(path, hidden=4)
        with pytest.raises(SpecError, match="layer 12; the model has 0 to 11"):
            read_vectors(path, layers=12)

    def test_files_that_are_not_there_or_of_no_known_kind_are_refused(self, tmp_path: Path) -> None:
        with pytest.raises(SpecError, match="there is no such file"):
            read_vectors(tmp_path / "v.gguf")
        with pytest.raises(SpecError, match=r"read from \.safetensors and \.gguf files"):
            read_vectors(tmp_path / "v.pkl")
        (tmp_path / "folder.gguf").mkdir()
        with pytest.raises(SpecError, match="there is no such file"):
            read_vectors(tmp_path / "folder.gguf")


class TestWriting:
    @written_by_each
    @pytest.mark.parametrize(
        ("directions", "why"),
        [
            ({}, "no direction at all"),
            ({-1: np.ones(2)}, r"layers \[-1\]; they are counted from 0"),
            ({True: np.ones(2)}, r"layers \[True\]"),
            ({1.5: np.ones(2)}, r"layers \[1\.5\]"),
            ({1: np.ones(2), 2: np.ones(3)}, r"shapes \[\(2,\), \(3,\)\]"),
            ({1: np.array([1, 2])}, "layer 1 is of int64; directions are floats"),
            ({1: np.array([1.0, np.nan])}, "not finite"),
        ],
        ids=str,
    )
    def test_what_could_not_be_read_back_is_not_written(
        self, suffix: str, write: Write, directions: dict[int, np.ndarray], why: str, tmp_path: Path
    ) -> None:
        with pytest.raises(SpecError, match=why):
            write(tmp_path / f"v.{suffix}", directions, model="m", method="x")
        assert list(tmp_path.iterdir()) == []

    @written_by_each
    def test_residual_norms_that_miss_a_layer_or_are_none_are_refused(
        self, suffix: str, write: Write, tmp_path: Path
    ) -> None:
        for norms, why in (({1: 1.0}, r"no layer \[3, 12\]"), (NORMS | {3: 0.0}, r"norms \{3: 0\.0\}")):
            with pytest.raises(SpecError, match=why):
                write(tmp_path / f"v.{suffix}", DIRECTIONS, model="m", method="x", residual_norms=norms)
        assert list(tmp_path.iterdir()) == []

    @written_by_each
    def test_a_failure_leaves_the_file_that_was_there_and_nothing_else(
        self, suffix: str, write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        path = tmp_path / f"v.{suffix}"
        write(path, {1: np.ones(2)}, model="old", method="x")

        def refuse(descriptor: int) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(os, "fsync", refuse)
        with pytest.raises(SpecError, match="cannot be written: No space left on device"):
            write(path, {1: np.zeros(2)}, model="new", method="x")
        assert [entry.name for entry in tmp_path.iterdir()] == [path.name]
        assert read_vectors(path).metadata["model"] == "old"

    @written_by_each
    def test_a_folder_that_is_not_there_or_another_ending_is_refused(
        self, suffix: str, write: Write, tmp_path: Path
    ) -> None:
        with pytest.raises(SpecError, match="cannot be written: there is no folder"):
            write(tmp_path / "gone" / f"v.{suffix}", DIRECTIONS, model="m", method="x")
        with pytest.raises(SpecError, match=rf"this kind of file ends in \.{suffix}"):
            write(tmp_path / "v.pt", DIRECTIONS, model="m", method="x")

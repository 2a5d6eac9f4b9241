"""How fast hidden states are kept, against one core's zstd and the disk, and how a layer of them is read.

Part of `make bench-storage`. The states are those of SmolLM2-135M on the project's own texts, every layer at
every token, repeated up to about half a gigabyte. L layers, T tokens, D hidden.
"""

import os
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from jobs.data.prompts import load_conversations
from jobs.engine.loading import load_replica
from jobs.spec import ModelRef
from storage.table_stream import TableStream

TOKENS = 1024
PROMPT = 64
"""Tokens whose states come together, as those of one prompt do."""
TIMES = 16
ROUNDS = 3


def states(tokens: int = TOKENS) -> np.ndarray:
    """What the blocks of the model put out, float32, shape (L, T, D)."""
    replica = load_replica(ModelRef(id="smollm2-135m"))
    text = " ".join(turn for each in load_conversations("open_prompts", 0) for turn in each.turns)
    ids = (replica.encode(text) * (1 + tokens // 64))[:tokens]
    with torch.inference_mode():
        found = replica.model(torch.tensor([ids]), output_hidden_states=True).hidden_states[1:]
    return torch.cat(found).float().numpy()


def write(folder: Path, states_LTD: np.ndarray, times: int) -> Path:
    """Keep states a prompt at a time, as a capturing job does."""
    layers, tokens, _ = states_LTD.shape
    stream = TableStream(folder, "activations")
    for number in range(times * tokens // PROMPT):
        first = number * PROMPT % tokens
        part_LTD = states_LTD[:, first : first + PROMPT]
        stream.write(
            {
                "spec": "s",
                "split": "select",
                "item": number,
                "name": "all",
                "position": np.tile(np.arange(PROMPT), layers),
                "layer": np.repeat(np.arange(layers), PROMPT),
                "site": "after",
                "vector": part_LTD.reshape(-1, part_LTD.shape[-1]),
            }
        )
    return folder / stream.finish().path


def _zstd(half_LTD: np.ndarray, times: int) -> int:
    codec = pa.Codec("zstd", compression_level=1)
    return times * len(codec.compress(half_LTD.tobytes()))


def _disk(path: Path, half_LTD: np.ndarray, times: int) -> None:
    content = half_LTD.tobytes()
    with path.open("wb") as file:
        for _ in range(times):
            file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _seconds(act: Callable[[], Any]) -> float:
    """The fastest of some rounds."""
    taken = []
    for _ in range(ROUNDS):
        began = time.perf_counter()
        act()
        taken.append(time.perf_counter() - began)
    return min(taken)


def layer_share(path: Path, layer: int) -> float:
    """Share of a file's bytes that whoever asks for one layer has to read."""
    metadata = pq.ParquetFile(path).metadata
    column = metadata.schema.to_arrow_schema().get_field_index("layer")
    groups = [metadata.row_group(number) for number in range(metadata.num_row_groups)]
    sizes = [sum(group.column(c).total_compressed_size for c in range(group.num_columns)) for group in groups]
    ranges = [group.column(column).statistics for group in groups]
    needed = [size for size, has in zip(sizes, ranges, strict=True) if has.min <= layer <= has.max]
    return float(sum(needed) / sum(sizes))


def measure(folder: Path, states_LTD: np.ndarray, times: int = TIMES) -> dict[str, Any]:
    """GB/s of raw float16 bytes: kept, through zstd alone, to the disk alone; sizes; what a layer costs."""
    half_LTD = states_LTD.astype(np.float16)
    raw = half_LTD.nbytes * times / 1e9
    kept = {"float16": half_LTD, "float32": states_LTD}
    rates = {name: raw / _seconds(partial(write, folder, each, times)) for name, each in kept.items()}
    zstd = half_LTD.nbytes / 1e9 / _seconds(lambda: _zstd(half_LTD, 1))
    disk = raw / _seconds(lambda: _disk(folder / "raw", half_LTD, times))
    path = write(folder, half_LTD, times)
    began = time.perf_counter()
    rows = pq.read_table(path, columns=["vector"], filters=[("layer", "==", 7)]).num_rows
    seconds = time.perf_counter() - began
    assert rows == times * states_LTD.shape[1]
    return {
        "activation_gb_s": rates["float16"],
        "activation_float32_gb_s": rates["float32"],
        "activation_zstd_gb_s": zstd,
        "activation_disk_gb_s": disk,
        "activation_write_ratio": rates["float16"] / min(zstd, disk),
        "activation_bytes_ratio": path.stat().st_size / (raw * 1e9),
        "activation_layer_share": layer_share(path, 7) * states_LTD.shape[0],
        "activation_layer_seconds": seconds,
    }

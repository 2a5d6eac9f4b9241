"""A large grid on a GPU, here and as a loop of `generate`: Llamas of 1B and 8B shape with random weights.

Run by `make bench-gpu`; writes `benchmarks/results/gpu.json`. Needs neither Ray nor MLflow. Random weights
take the time that trained ones take; every completion is forced to its full length.
"""

import argparse
import json
import sys
import time
from collections.abc import Sequence
from datetime import date
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.machine import describe, gemm_ceiling
from benchmarks.steering import ours, peer, rows_of, timed
from benchmarks.workload import Cell, Workload, block_flops, head_flops
from jobs.engine.replica import Replica

RESULTS = Path(__file__).parent / "results" / "gpu.json"
LLAMA_3 = {"vocab_size": 128256, "num_attention_heads": 32, "num_key_value_heads": 8}
SHAPES: dict[str, dict[str, int]] = {
    "1b": {**LLAMA_3, "hidden_size": 2048, "num_hidden_layers": 16, "intermediate_size": 8192},
    "8b": {**LLAMA_3, "hidden_size": 4096, "num_hidden_layers": 32, "intermediate_size": 14336},
    "tiny": {
        "vocab_size": 512,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "hidden_size": 64,
        "num_hidden_layers": 8,
        "intermediate_size": 128,
    },
}
"""Published shapes of Llama 3.2 1B and Llama 3.1 8B; `tiny` tries the code without a GPU."""
CONFIGURATIONS, PROMPTS, NEW_TOKENS = 30, 128, 64
COMMON_TOKENS, OWN_TOKENS = 32, 32
PEER_BATCHES = (64, 128)


def random_replica(shape: str, device: str) -> Replica:
    """A Llama with random bfloat16 weights."""
    torch.manual_seed(0)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    settings: dict[str, Any] = {**SHAPES[shape], "max_position_embeddings": 4096}
    with torch.device(device):
        model: Any = LlamaForCausalLM(LlamaConfig(**settings, tie_word_embeddings=False))
    model = model.to(dtype)
    model.generation_config.eos_token_id = 1
    memory = int(0.4 * torch.cuda.mem_get_info()[0]) if device == "cuda" else 2**30
    tokenizer = SimpleNamespace(pad_token_id=0, eos_token_id=1)
    return Replica(model, tokenizer, memory=memory)


def random_workload(replica: Replica, configurations: int, prompts: int) -> Workload:
    """Random prompts with a common beginning; six layers, vectors of random direction."""
    random = np.random.default_rng(0)
    vocabulary = int(replica.model.config.vocab_size)
    common = random.integers(2, vocabulary, COMMON_TOKENS).tolist()
    texts = [common + random.integers(2, vocabulary, OWN_TOKENS).tolist() for _ in range(prompts)]
    layers = [replica.layers * (place + 2) // 9 for place in range(6)]
    cells = [
        Cell(layers[number % 6], 0.1 * (number + 1), random.normal(size=replica.hidden_size) * 0.1)
        for number in range(configurations)
    ]
    return Workload(texts, cells)


def bandwidth(device: str, *, bytes_copied: int = 2**30) -> float:
    """Bytes a second that a copy reads and writes, the best of ten."""
    source = torch.empty(bytes_copied, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    best = 0.0
    for _ in range(10):
        _wait(device)
        began = time.perf_counter()
        target.copy_(source)
        _wait(device)
        best = max(best, 2 * bytes_copied / (time.perf_counter() - began))
    return best


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def decoding_limits(replica: Replica, rows: int, slots: int, new_tokens: int) -> tuple[float, float]:
    """Bytes that decoding has to read, and floating-point operations that it has to do.

    Every step reads the weights once and the keys and values of every sequence, whose text is on average half
    completed.
    """
    weights = sum(weight.nbytes for weight in replica.model.parameters())
    steps = new_tokens - 1
    text = COMMON_TOKENS + OWN_TOKENS + steps / 2
    read = rows / slots * steps * weights + rows * steps * text * replica.cache_bytes
    flops = rows * steps * (replica.layers * block_flops(replica) + head_flops(replica))
    return read, flops


def bench(shape: str, device: str, slots: int, configurations: int, prompts: int) -> dict[str, Any]:
    """One model: the whole grid here, three configurations of it as a loop."""
    replica = random_replica(shape, device)
    workload = random_workload(replica, configurations, prompts)
    rows = rows_of(workload, workload.cells)
    run = partial(ours, replica, forced=True, slots=slots, new_tokens=NEW_TOKENS)
    run(workload._replace(cells=workload.cells[:1]))  # warm-up
    mine = timed(rows, lambda: run(workload))
    some = workload.cells[:3]
    loops = {}
    for name in ("steering-vectors", "plain hook loop"):
        for batch in PEER_BATCHES:
            loop = partial(peer, replica, name, workload, some, batch, forced=True, new_tokens=NEW_TOKENS)
            loops[f"{name}, batch {batch}"] = timed(rows_of(workload, some), loop).rows_per_second
    read, flops = decoding_limits(replica, rows, slots, NEW_TOKENS)
    seconds = rows / mine.rows_per_second
    ceiling = gemm_ceiling(
        replica.model.dtype,
        inputs=replica.hidden_size,
        outputs=SHAPES[shape]["intermediate_size"],
        device=device,
    )
    return {
        "rows": rows,
        "slots": slots,
        "rows_per_second": {"ours": mine.rows_per_second, **loops},
        "speedup": mine.rows_per_second / max(loops.values()),
        "fraction_of_bandwidth": read / seconds / bandwidth(device),
        "fraction_of_gemm_ceiling": flops / seconds / ceiling,
    }


def main(arguments: Sequence[str]) -> None:
    """Time the shapes, print and write what was found."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("--shapes", nargs="+", choices=[*SHAPES], default=["1b", "8b"])
    parser.add_argument("--slots", type=int, default=512, help="most sequences of our batch")
    parser.add_argument("--configurations", type=int, default=CONFIGURATIONS)
    parser.add_argument("--prompts", type=int, default=PROMPTS)
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args(arguments)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu" and options.shapes != ["tiny"]:
        parser.error("there is no GPU; --shapes tiny tries the code on the CPU")
    result: dict[str, Any] = {"machine": describe(), "date": date.today().isoformat()}
    for shape in options.shapes:
        result[shape] = bench(shape, device, options.slots, options.configurations, options.prompts)
        print(json.dumps({shape: result[shape]}, indent=2), flush=True)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])

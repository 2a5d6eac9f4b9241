"""512 exponential features on a Llama of 1B shape with random weights: time, memory, share of the ceiling.

Run by `make bench-melbo`; writes `benchmarks/results/dct.json`. Random weights take the time that trained
ones take.
"""

import argparse
import json
import resource
import sys
import time
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.gpu import random_replica
from benchmarks.machine import describe, gemm_ceiling
from benchmarks.workload import block_flops
from jobs.engine.slices import Slice
from jobs.unsupervised.causal_map import CausalMap
from jobs.unsupervised.objective import counted_tokens
from jobs.unsupervised.sphere import Surface
from jobs.unsupervised.transcoding import exponential_factors

RESULTS = Path(__file__).parent / "results" / "dct.json"
SOURCE, TARGET, TOKENS, FACTORS = 4, 9, 27, 512


def bench(shape: str, device: str, factors: int, iterations: int, memory_mib: int) -> dict[str, Any]:
    """Some iterations for all factors."""
    replica = random_replica(shape, device)
    replica.memory = memory_mib * 2**20
    vocabulary = int(replica.model.config.vocab_size)
    prompt = np.random.default_rng(0).integers(2, vocabulary, TOKENS).tolist()
    slice_ = Slice(replica, [prompt], source=SOURCE, target=TARGET)
    causal = CausalMap(slice_, counted_tokens(slice_.positions_NT, "last", last=3))
    start_VD = Surface(radius=1.0, orthogonal=True).drawn(factors, replica.hidden_size, seed=0)
    loaded = _peak_mib()
    began = time.perf_counter()
    exponential_factors(causal, start_VD.to(slice_.wide), 1.0, iterations=iterations)
    if device == "cuda":
        torch.cuda.synchronize()
    seconds = time.perf_counter() - began
    # The gradient of a pass is one of activations alone, and costs as much as the pass; the start and the end
    # read the map once each.
    passes = 2 * iterations + 2
    flops = passes * factors * TOKENS * (TARGET - SOURCE) * block_flops(replica)
    ceiling = gemm_ceiling(
        replica.model.dtype,
        inputs=replica.hidden_size,
        outputs=int(replica.model.config.intermediate_size),
        device=device,
    )
    return {
        "shape": shape,
        "factors": factors,
        "tokens": TOKENS,
        "blocks": TARGET - SOURCE,
        "iterations": iterations,
        "seconds": seconds,
        "seconds_an_iteration": seconds * 2 / passes,
        "memory_mib": memory_mib,
        "loaded_mib": loaded,
        "peak_mib": _peak_mib(),
        "fraction_of_gemm_ceiling": flops / seconds / ceiling,
        "gemm_ceiling_flops_per_second": ceiling,
    }


def _peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main(arguments: Sequence[str]) -> None:
    """Time it, print it and write it."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.dct", description=__doc__)
    parser.add_argument("--shape", default="1b")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--factors", type=int, default=FACTORS)
    parser.add_argument("--iterations", type=int, default=1)
    parser.add_argument("--memory-mib", type=int, default=2048)
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args(arguments)
    found = bench(options.shape, options.device, options.factors, options.iterations, options.memory_mib)
    result = {"machine": describe(), "date": date.today().isoformat(), **found}
    print(json.dumps(result, indent=2))
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])

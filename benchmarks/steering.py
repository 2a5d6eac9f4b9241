"""A layer x dose grid, here and as other tools run it, side by side on one machine in one run.

Run by `make bench-steering`; writes `benchmarks/results/steering.json` and prints the table of
`docs/benchmarks.md`.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch

from benchmarks import peers
from benchmarks.machine import describe, gemm_ceiling
from benchmarks.workload import (
    NEW_TOKENS,
    Cell,
    Workload,
    block_flops,
    head_flops,
    make_workload,
    needed_flops,
)
from jobs.engine.decoding import Continuation, Decoding, Work, generate
from jobs.engine.groups import next_token
from jobs.engine.loading import load_replica
from jobs.engine.prefixes import Family, families
from jobs.engine.replica import Replica
from jobs.engine.tables import row_tables
from jobs.spec import ModelRef

RESULTS = Path(__file__).parent / "results" / "steering.json"
BATCHES = (8, 16, 32, 64)
NEAR_TIE = 1e-3
Found = TypeVar("Found")


class Timed(NamedTuple):
    """Rows a second, and what was made."""

    rows_per_second: float
    made: Any


def timed(rows: int, run: Callable[[], Found]) -> Timed:
    """What `run` makes of so many rows, and how fast."""
    began = time.perf_counter()
    made = run()
    return Timed(rows / (time.perf_counter() - began), made)


def ours(
    replica: Replica, workload: Workload, *, forced: bool, slots: int | None, new_tokens: int = NEW_TOKENS
) -> list[Continuation]:
    """Completions, cell by cell."""
    work = [
        Work(prompt, row) for row in range(len(workload.cells)) for prompt in range(len(workload.prompts))
    ]
    tables = row_tables(replica, workload.rows())
    decoding = Decoding(max_new_tokens=new_tokens, stops=not forced, slots=slots)
    found = dict(generate(replica, workload.prompts, tables, work, decoding))
    return [found[index] for index in range(len(work))]


def ours_by_logits(replica: Replica, workload: Workload) -> int:
    """The likeliest answer to every claim under every configuration; gives how many there were."""
    work = [(prompt, row) for row in range(len(workload.cells)) for prompt in range(len(workload.prompts))]
    found = next_token(replica, workload.prompts, row_tables(replica, workload.rows()), work)
    return sum(1 for _, logits_V in found if int(logits_V.argmax()) >= 0)


@contextmanager
def counted_passes(replica: Replica) -> Iterator[list[tuple[int, int]]]:
    """Sequences and tokens of every pass inside the block."""
    passes: list[tuple[int, int]] = []
    handle = replica.blocks[-1].register_forward_pre_hook(
        lambda block, inputs: passes.append((inputs[0].shape[0], inputs[0].shape[1]))
    )
    try:
        yield passes
    finally:
        handle.remove()


def alive_a_step(passes: Sequence[tuple[int, int]]) -> float:
    """Mean number of sequences in the passes that read one token."""
    steps = [sequences for sequences, tokens in passes if tokens == 1]
    return sum(steps) / len(steps)


def best_batch(replica: Replica, workload: Workload, cells: Sequence[Cell]) -> int:
    """The batch size at which the first peer is fastest."""
    speeds = {}
    for batch in BATCHES:
        run = partial(peer, replica, "steering-vectors", workload, cells, batch)
        speeds[batch] = timed(rows_of(workload, cells), run).rows_per_second
        print(f"  steering-vectors, batch {batch}: {speeds[batch]:.2f} rows/s")
    return max(speeds, key=speeds.__getitem__)


def peer(
    replica: Replica,
    name: str,
    workload: Workload,
    cells: Sequence[Cell],
    batch: int,
    *,
    forced: bool = False,
    new_tokens: int = NEW_TOKENS,
) -> list[list[int]]:
    """New tokens as a peer makes them, cell by cell."""
    return peers.generate(
        replica,
        peers.PEERS[name],
        cells,
        workload.prompts,
        batch=batch,
        new_tokens=new_tokens,
        forced=forced,
    )


def differences(
    replica: Replica, workload: Workload, mine: Sequence[Continuation], theirs: Sequence[Sequence[int]]
) -> list[float]:
    """For each row that differs, the gap between the peer's two largest logits where it first does."""
    gaps = []
    for index, (own, other) in enumerate(zip(mine, theirs, strict=True)):
        if own.tokens == list(other):
            continue
        cell, prompt = divmod(index, len(workload.prompts))
        pairs = zip(own.tokens, other, strict=False)
        step = next(
            (place for place, pair in enumerate(pairs) if len({*pair}) > 1), min(len(own.tokens), len(other))
        )
        text = workload.prompts[prompt] + own.tokens[:step]
        with torch.inference_mode(), peers.plain_hook(replica, workload.cells[cell]):
            largest = replica.logits([text], keep=1)[0, -1].float().topk(2).values
        gaps.append(float(largest[0] - largest[1]))
        print(f"  first difference of row {index}: token {step}, gap of the lone run {gaps[-1]:.2e}")
    return gaps


def prompt_families(replica: Replica, workload: Workload) -> list[Family]:
    """Prompts that begin alike, as the engine reads them."""
    tables = row_tables(replica, workload.rows())
    return families(replica, workload.prompts, range(len(workload.prompts)), tables)


def rows_of(workload: Workload, cells: Sequence[Cell]) -> int:
    """Rows that some cells of the workload make."""
    return len(cells) * len(workload.prompts)


def bench_fp32(model: str, slots: int | None, sample: int) -> dict[str, Any]:
    """Everything in float32: natural stop, forced length, logits; peers on the grid or a sample of it."""
    replica = load_replica(ModelRef(id=model))
    workload = make_workload(replica)
    rows = rows_of(workload, workload.cells)
    some = [cell for cell in workload.cells if cell.dose != 0][:: max(1, 24 // sample)][:sample]
    ours(replica, workload._replace(cells=some[:1]), forced=False, slots=slots)  # warm-up
    print(f"{rows} rows of {sum(map(len, workload.prompts)) / len(workload.prompts):.0f} prompt tokens")
    batch = best_batch(replica, workload, some[:2])

    with counted_passes(replica) as passes:
        before = timed(rows, lambda: ours(replica, workload, forced=False, slots=slots))
    alive = alive_a_step(passes)
    with counted_passes(replica) as passes:
        whole = timed(rows, lambda: peer(replica, "steering-vectors", workload, workload.cells, batch))
    after = timed(rows, lambda: ours(replica, workload, forced=False, slots=slots))
    # A machine that others use too is not equally fast all the time: ours before and after the peer.
    natural = Timed(2 / (1 / before.rows_per_second + 1 / after.rows_per_second), after.made)
    gaps = differences(replica, workload, natural.made, whole.made)
    new_tokens = sum(len(tokens) for tokens in whole.made)
    peer_steps = sum(sequences for sequences, tokens in passes if tokens == 1)

    forced = timed(rows, lambda: ours(replica, workload, forced=True, slots=slots))
    peer_forced = timed(
        rows_of(workload, some),
        lambda: peer(replica, "steering-vectors", workload, some, batch, forced=True),
    )
    others = {
        name: timed(rows_of(workload, some), partial(peer, replica, name, workload, some, batch))
        for name in ("steering-vectors", "repeng", "plain hook loop")
    }
    logits = timed(rows, lambda: ours_by_logits(replica, workload))
    found = prompt_families(replica, workload)
    made = {
        "natural stop": [each.tokens for each in natural.made],
        "forced": [each.tokens for each in forced.made],
        "logits": None,
    }
    needed = {
        name: needed_flops(replica, workload, found, tokens, most=NEW_TOKENS) for name, tokens in made.items()
    }
    ceiling = gemm_ceiling(
        torch.float32,
        inputs=replica.hidden_size,
        outputs=int(replica.model.config.get_text_config().intermediate_size),
    )
    speeds = {"natural stop": natural, "forced": forced, "logits": logits}
    fractions = {name: needed[name] * speeds[name].rows_per_second / rows / ceiling for name in speeds}
    return {
        "rows": rows,
        "peer_batch": batch,
        "rows_per_second": {
            "ours, natural stop": natural.rows_per_second,
            "ours, forced": forced.rows_per_second,
            "ours, logits": logits.rows_per_second,
            "steering-vectors, natural stop": whole.rows_per_second,
            "steering-vectors, forced": peer_forced.rows_per_second,
            **{f"{name}, natural stop, sample": each.rows_per_second for name, each in others.items()},
        },
        "speedup_fp32": natural.rows_per_second / whole.rows_per_second,
        "speedup_forced_fp32": forced.rows_per_second / peer_forced.rows_per_second,
        "speedup_logit": logits.rows_per_second / whole.rows_per_second,
        "token_identical_rows": rows - len(gaps),
        "differing_beyond_a_near_tie": sum(gap >= NEAR_TIE for gap in gaps),
        "mean_new_tokens": new_tokens / rows,
        "mean_alive_a_step": alive,
        "share_of_peer_steps_that_are_alive": new_tokens / peer_steps,
        "prompt_families": [{"prompts": len(each.prompts), "prefix": each.prefix} for each in found],
        "needed_flops": needed,
        "gemm_ceiling_flops_per_second": ceiling,
        "fraction_of_gemm_ceiling": fractions["natural stop"],
        "fractions_of_gemm_ceiling": fractions,
        "flops_a_token": {"block": block_flops(replica), "logits": head_flops(replica)},
    }


def bench_bf16(model: str, slots: int | None, sample: int) -> dict[str, Any]:
    """bfloat16 against the peer in bfloat16, which runs on a sample of the grid."""
    replica = load_replica(ModelRef(id=model, dtype="bfloat16"))
    workload = make_workload(replica)
    some = [cell for cell in workload.cells if cell.dose != 0][:: max(1, 24 // sample)][:sample]
    plain = peers.plain_replica(model, torch.bfloat16)
    batch = best_batch(plain, workload, some[:1])
    mine = timed(
        rows_of(workload, workload.cells), lambda: ours(replica, workload, forced=False, slots=slots)
    )
    theirs = timed(rows_of(workload, some), lambda: peer(plain, "steering-vectors", workload, some, batch))
    return {
        "speedup_bf16": mine.rows_per_second / theirs.rows_per_second,
        "peer_batch_bf16": batch,
        "rows_per_second_bf16": {
            "ours, natural stop": mine.rows_per_second,
            "steering-vectors, natural stop, sample": theirs.rows_per_second,
        },
    }


def table(result: dict[str, Any]) -> str:
    """The figures as `docs/benchmarks.md` shows them."""
    shown = [("what", "rows/s", "times the peer")]
    speedups = {
        "ours, natural stop": "speedup_fp32",
        "ours, forced": "speedup_forced_fp32",
        "ours, logits": "speedup_logit",
    }
    for name, speed in result["rows_per_second"].items():
        times = f"{result[speedups[name]]:.2f}" if name in speedups else ""
        shown.append((f"float32: {name}", f"{speed:.2f}", times))
    for name, speed in result.get("rows_per_second_bf16", {}).items():
        times = f"{result['speedup_bf16']:.2f}" if name.startswith("ours") else ""
        shown.append((f"bfloat16: {name}", f"{speed:.2f}", times))
    head, *rows = ["| " + " | ".join(row) + " |" for row in shown]
    return "\n".join([head, "|---|---|---|", *rows])


def main(arguments: Sequence[str]) -> None:
    """Time everything, print it and write it."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.steering", description=__doc__)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--slots", type=int, help="most sequences of our batch")
    parser.add_argument("--sample", type=int, default=6, help="configurations that slow peers are timed on")
    parser.add_argument("--skip-bf16", action="store_true", help="bfloat16 is slow on most CPUs")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args(arguments)
    result: dict[str, Any] = {"machine": describe(), "date": date.today().isoformat()}
    result |= bench_fp32(options.model, options.slots, options.sample)
    if not options.skip_bf16:
        result |= bench_bf16(options.model, options.slots, min(3, options.sample))
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))
    print(table(result))


if __name__ == "__main__":
    main(sys.argv[1:])

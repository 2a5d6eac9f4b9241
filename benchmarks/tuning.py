"""Tuning a direction into the weights, here and as a straightforward loop, side by side in one run.

Run by `make bench-tuning`; writes `benchmarks/results/tuning.json`. The loop is written here, as the code of
arXiv:2409.06927 goes: whole passes over padded batches, hooks on the measured blocks, a backward pass for
each loss; for each set of matrices the model is loaded again.
"""

import argparse
import gc
import hashlib
import json
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import date
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity, cross_entropy

from benchmarks.machine import describe, gemm_ceiling
from benchmarks.tuning_space import SPACE
from benchmarks.workload import block_flops, head_flops
from jobs.data.claims import load_questions
from jobs.engine.loading import load_replica
from jobs.engine.packed import common_beginning
from jobs.engine.replica import Replica
from jobs.spec import ModelRef
from jobs.tuning.texts import Text
from jobs.tuning.training import Recipe
from jobs.tuning.tuned_weights import Wanted, tuned_weights
from jobs.tuning.wanted import parse_losses
from jobs.tuning.weights import find_matrices
from search_spaces.tune_blocks import SETS
from storage.query import open_sweep

RESULTS = Path(__file__).parent / "results" / "tuning.json"
MODEL = ModelRef(id="smollm2-135m")
CLAIMS, EPOCHS, BATCH = 256, 3, 8
LAYERS = tuple(range(12, 18))
MATRICES = "v+o"
TOKEN_WEIGHT = 0.01
SUMS = {"cosine": "tune_in", "dual": f"tune_in + {TOKEN_WEIGHT} * tokens"}
SEARCHED_CLAIMS, SAMPLED_SETS = int(SPACE.fixed["examples_extract"]), 6
"""Claims of the block search, an epoch a set; sets that the loop is timed on, whose time is scaled."""


def recipe(epochs: int = EPOCHS) -> Recipe:
    """The same for both sides."""
    return Recipe(
        epochs=epochs,
        batch=BATCH,
        learning_rate=1e-4,
        weight_decay=0.01,
        warmup=0,
        decay="linear",
        until=None,
        patience=0,
        window=10,
        seed=7,
    )


def workload(replica: Replica, claims: int = CLAIMS) -> list[Text]:
    """Labelled claims in chat form with the honest letter."""
    questions = load_questions("claims", extract=claims, select=0, report=0)
    return [
        Text(replica.encode_chat(each.user), replica.encode_continuation(each.honest_letter))
        for each in questions
    ]


def directions(replica: Replica) -> dict[int, Tensor]:
    """One of unit norm for each layer; which ones does not matter to the time."""
    generator = torch.Generator().manual_seed(0)
    drawn = {layer: torch.randn(replica.hidden_size, generator=generator) for layer in LAYERS}
    return {layer: vector / vector.norm() for layer, vector in drawn.items()}


class Run(NamedTuple):
    """One side.

    Attributes:
        seconds: From the texts' token ids to the tuned weights.
        projection: Projection loss of every step.
    """

    seconds: float
    projection: list[float]


def ours(
    replica: Replica, texts: Sequence[Text], kind: str, *, blocks: str = MATRICES, epochs: int = EPOCHS
) -> Run:
    """Nothing is kept from before: the states that enter the lowest trained block are counted."""
    named = {("", layer): vector for layer, vector in directions(replica).items()}
    wanted = Wanted(parse_losses(SUMS[kind]), LAYERS, blocks, 0, recipe(epochs))
    began = time.perf_counter()
    with replica.other_weights(), tuned_weights(replica, texts, wanted, named) as tuned:
        seconds = time.perf_counter() - began
        return Run(seconds, next(iter(tuned.curve.losses.values())))


@contextmanager
def hooked(model: Any) -> Iterator[dict[int, Tensor]]:
    """What the measured blocks put out in the last pass."""
    found: dict[int, Tensor] = {}

    def keep(layer: int) -> Callable[..., None]:
        def hook(module: nn.Module, given: Any, put_out: Any) -> None:
            found[layer] = put_out[0] if isinstance(put_out, tuple) else put_out

        return hook

    handles = [model.model.layers[layer].register_forward_hook(keep(layer)) for layer in LAYERS]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def loop(
    model: Any,
    texts: Sequence[Text],
    towards: dict[int, Tensor],
    kind: str,
    names: Sequence[str],
    epochs: int,
) -> Run:
    """The straightforward training of some matrices, in place."""
    began = time.perf_counter()
    given = recipe(epochs)
    model.requires_grad_(False)
    weights = [model.get_submodule(name).weight.requires_grad_() for name in names]
    adam = torch.optim.AdamW(weights, lr=given.learning_rate, weight_decay=given.weight_decay)
    steps = epochs * -(-len(texts) // BATCH)
    falling = torch.optim.lr_scheduler.LambdaLR(adam, lambda step: 1 - step / steps)
    generator, curve = torch.Generator().manual_seed(given.seed), list[float]()
    with hooked(model) as states:
        for _ in range(epochs):
            order = torch.randperm(len(texts), generator=generator).tolist()
            for start in range(0, len(order), BATCH):
                chosen = [texts[index] for index in order[start : start + BATCH]]
                curve.append(_step(model, chosen, towards, kind, states, adam))
                falling.step()
    return Run(time.perf_counter() - began, curve)


def _step(
    model: Any,
    chosen: Sequence[Text],
    towards: dict[int, Tensor],
    kind: str,
    states: dict[int, Tensor],
    adam: torch.optim.Optimizer,
) -> float:
    longest = max(len(text.prompt) for text in chosen)
    ids = torch.tensor([text.prompt + [0] * (longest - len(text.prompt)) for text in chosen])
    mask = torch.tensor([[1] * len(text.prompt) + [0] * (longest - len(text.prompt)) for text in chosen])
    logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
    rows, ends = torch.arange(len(chosen)), torch.tensor([len(text.prompt) - 1 for text in chosen])
    each = [
        ((1 - cosine_similarity(states[layer][rows, ends], vector, dim=-1)) / 2).mean()
        for layer, vector in towards.items()
    ]
    projection = torch.stack(each).mean()
    adam.zero_grad()
    if kind == "dual":
        tokens = cross_entropy(logits[rows, ends], torch.tensor([text.reply[0] for text in chosen]))
        (TOKEN_WEIGHT * tokens).backward(retain_graph=True)
    projection.backward()
    adam.step()
    return float(projection.detach())


def fingerprint(model: nn.Module) -> str:
    """Hash of all weights."""
    found = hashlib.sha256()
    for name, weight in sorted(model.state_dict().items()):
        found.update(name.encode() + weight.numpy().tobytes())
    return found.hexdigest()


def bench_training(replica: Replica) -> dict[str, Any]:
    """Both sides on the workload, by turns."""
    texts = workload(replica)
    names = find_matrices(replica, LAYERS, MATRICES.split("+"))
    lengths = [len(text.prompt) for text in texts]
    found: dict[str, Any] = {
        "claims": len(texts),
        "epochs": EPOCHS,
        "prompt_tokens": [min(lengths), max(lengths)],
        "common_tokens": common_beginning([text.read for text in texts]),
    }
    differences = []
    for kind in SUMS:
        mine = ours(replica, texts, kind)
        copy = load_replica(MODEL)
        theirs = loop(copy.model, texts, directions(replica), kind, names, EPOCHS)
        del copy
        gc.collect()
        items = len(texts) * EPOCHS
        found |= {
            f"items_per_second_{kind}": items / mine.seconds,
            f"peer_items_per_second_{kind}": items / theirs.seconds,
            f"speedup_{kind}": theirs.seconds / mine.seconds,
        }
        differences.append(
            max(abs(one - other) for one, other in zip(mine.projection, theirs.projection, strict=True))
        )
    return {**found, "loss_max_difference": max(differences), **_limit(replica, texts, found)}


def _limit(replica: Replica, texts: Sequence[Text], found: dict[str, Any]) -> dict[str, Any]:
    """Share of the machine's speed at matrix products that the cosine run reaches."""
    shared = found["common_tokens"]
    own = sum(len(text.prompt) - shared for text in texts)
    steps = -(-len(texts) // BATCH)
    trained = own + steps * shared
    below = (own + shared) * LAYERS[0]
    # Forwards once and backwards once through the states; gradients of two of seven matrices are small.
    needed = block_flops(replica) * (below + EPOCHS * trained * 2 * len(LAYERS))
    wide: Any = replica.model.get_submodule(find_matrices(replica, LAYERS, ["gate"])[0])
    ceiling = gemm_ceiling(torch.float32, inputs=wide.in_features, outputs=wide.out_features)
    seconds = len(texts) * EPOCHS / found["items_per_second_cosine"]
    head = head_flops(replica) * EPOCHS * steps
    return {
        "needed_flops": needed + head,
        "ceiling_flops_per_second": ceiling,
        "ceiling_share": needed / seconds / ceiling,
    }


def bench_search(place: Path) -> dict[str, Any]:
    """All sets as one sweep, and some as a loop that loads the model for each."""
    space = Path(__file__).with_name("tuning_space.py")
    command = [sys.executable, "-m", "orchestrator.cli", "run", str(space), "--out", str(place), "--json"]
    command += ["--set=workers=1", "--set=cpus_per_worker=2"]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    sweep = open_sweep(place)
    [times] = sweep.rows("SELECT max(finished) - min(started) AS seconds, count(*) AS attempts FROM attempts")
    sets = sweep.rows(
        "SELECT count(*) AS trials, count(*) FILTER (m.value = a.value) AS whole FROM metrics m "
        "JOIN metrics a USING (trial, split) "
        "WHERE m.name = 'matrices' AND a.name = 'matrices_asked' AND split = 'select'"
    )[0]
    sampled = random.Random(0).sample(SETS, SAMPLED_SETS)
    began = time.perf_counter()
    for blocks in sampled:
        replica = load_replica(MODEL)
        names = find_matrices(replica, LAYERS, blocks.split("+"))
        loop(replica.model, workload(replica, SEARCHED_CLAIMS), directions(replica), "cosine", names, 1)
        del replica
        gc.collect()
    peer = (time.perf_counter() - began) / SAMPLED_SETS * len(SETS)
    return {
        "search_sets": sets["trials"],
        "search_sets_trained_as_asked": sets["whole"],
        "search_seconds": times["seconds"],
        "peer_search_seconds": peer,
        "speedup_block_search": peer / times["seconds"],
    }


def bench_restoring() -> dict[str, Any]:
    """Whether one replica's weights are the same after tuning through every set, and memory on the way."""
    replica = load_replica(MODEL)
    before, texts = fingerprint(replica.model), workload(replica, BATCH)
    for blocks in SETS:
        ours(replica, texts, "cosine", blocks=blocks, epochs=1)
    return {"weights_bit_equal": fingerprint(replica.model) == before}


def _peak_mib() -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 2**10


def bench_memory(kind: str) -> dict[str, Any]:
    """Peak of this process above the loaded model, and what should be there: copies, AdamW, kept states."""
    replica = load_replica(MODEL)
    replica.logits([list(range(10, 90))], keep=1)
    texts = workload(replica)
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here; loading took more
    loaded = _peak_mib()
    ours(replica, texts, kind, epochs=1)
    peak = _peak_mib()
    names = find_matrices(replica, LAYERS, MATRICES.split("+"))
    touched = sum(replica.model.get_submodule(name).weight.nbytes for name in names) / 2**20
    kept = sum(len(text.read) for text in texts) * replica.state_bytes / 2**20
    activations = _activations_mib(replica, texts[:BATCH], kind)
    return {
        "loaded_mib": loaded,
        "above_mib": peak - loaded,
        "touched_mib": touched,
        "copies_and_optimiser_mib": 4 * touched,
        "kept_states_mib": kept,
        "activations_mib": activations,
        "expected_above_mib": 4 * touched + kept + activations,
    }


def _activations_mib(replica: Replica, batch: Sequence[Text], kind: str) -> float:
    """What the backward pass of one batch needs."""
    weights = {each.untyped_storage().data_ptr() for each in replica.model.parameters()}
    saved: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        ours(replica, batch, kind, epochs=1)
    return sum(saved.values()) / 2**20


def main(arguments: Sequence[str]) -> None:
    """Measure and write, or the memory of one kind in a process of its own."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tuning", description=__doc__)
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--memory", choices=SUMS, help="only this, for one kind")
    options = parser.parse_args(arguments)
    if options.memory:
        sys.stdout.write(json.dumps(bench_memory(options.memory)) + "\n")
        return
    found = bench_training(load_replica(MODEL))
    for kind in SUMS:
        command = [sys.executable, "-m", "benchmarks.tuning", "--memory", kind]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        found[f"memory_{kind}"] = json.loads(done.stdout.splitlines()[-1])
    found |= bench_restoring()
    with tempfile.TemporaryDirectory() as place:
        found |= bench_search(Path(place) / "sweep")
    found |= {"machine": describe(), "date": date.today().isoformat()}
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(found, indent=2) + "\n")
    sys.stdout.write(options.out.read_text())


if __name__ == "__main__":
    main(sys.argv[1:])

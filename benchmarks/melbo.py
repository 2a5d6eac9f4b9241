"""MELBO vectors, here and as batched-melbo learns them, side by side on one machine in one run.

Run by `make bench-melbo`; writes `benchmarks/results/melbo.json`. Workload: SmolLM2-135M-Instruct in float32,
one chat prompt, output of block 7 to output of block 22, p = 2, q = 1, all tokens but the first.
V vectors, D hidden, S steps.
"""

import argparse
import json
import sys
import time
from collections.abc import Sequence
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from benchmarks import melbo_peers
from benchmarks.machine import describe, gemm_ceiling
from benchmarks.workload import block_flops
from jobs.data.prompts import OpenPrompt
from jobs.engine.interventions import Add
from jobs.engine.loading import load_replica
from jobs.engine.replica import Replica, position_ids
from jobs.engine.sites import Place, attach, picked
from jobs.engine.slices import Slice
from jobs.engine.tables import row_tables
from jobs.reading.behaviours import Reading
from jobs.reading.sayings import sayings
from jobs.spec import ModelRef
from jobs.unsupervised.amsgrad import amsgrad
from jobs.unsupervised.fixed_point import fixed_point
from jobs.unsupervised.landscape import Climb, Goal, Landscape
from jobs.unsupervised.learned import Learned
from jobs.unsupervised.search import Method, Orthogonality, Search, learn
from jobs.unsupervised.sphere import Surface

RESULTS = Path(__file__).parent / "results" / "melbo.json"
PROMPT = "Tell me a short story about a lighthouse keeper and the sea."
OTHER_PROMPTS = ("What should I do with a free afternoon?", "Describe a market in the morning.")
SOURCE, TARGET = 7, 22
RADII = (0.5, 2.0, 8.0)
VECTORS = 32
STEPS = 300
ORIGINAL_VECTORS = 3
FEW_VECTORS = 8
MEMORY_MIB = 256
ENOUGH = 0.995
"""Of what the peer reaches with all its steps."""
MOST_VECTORS = 0.95


class Timed(Landscape):
    """A landscape that notes when each look ended, in seconds from the first.

    Attributes:
        seconds: End of every look.
        found: What every look found, by vector; NaN for those that were not looked at.
    """

    def __init__(self, slice_: Slice, counted_NT: Tensor, goals: Sequence[Goal]) -> None:
        super().__init__(slice_, counted_NT, goals)
        self.seconds: list[float] = []
        self.found: list[Tensor] = []
        self._began: float | None = None

    def climb(self, theta_VD: Tensor, vectors: Sequence[int]) -> Climb:
        """As `Landscape.climb`."""
        self._began = time.perf_counter() if self._began is None else self._began
        found = super().climb(theta_VD, vectors)
        values_V = torch.full((len(self.goals),), torch.nan)
        values_V[list(vectors)] = found.values_V
        self.seconds.append(time.perf_counter() - self._began)
        self.found.append(values_V)
        return found


class Reached(NamedTuple):
    """When enough vectors had reached enough of their targets, and after how many looks at all of them."""

    seconds: float
    looks: int


def reached(ground: Timed, targets_V: Tensor) -> Reached | None:
    """When 95 % of the vectors and their mean were at 99.5 % of the targets; None if never."""
    best_V = torch.full_like(targets_V, -torch.inf)
    for number, (seconds, values_V) in enumerate(zip(ground.seconds, ground.found, strict=True), 1):
        best_V = torch.fmax(best_V, values_V)
        close = (best_V >= ENOUGH * targets_V).double().mean() >= MOST_VECTORS
        if close and best_V.mean() >= ENOUGH * targets_V.mean():
            return Reached(seconds, number)
    return None


def bench_radius(
    replica: Replica, slice_: Slice, counted_NT: Tensor, ids: Sequence[int], radius: float
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Peers and ours from the same starts at one R: the times, and the vectors of both."""
    surface = Surface(radius=radius)
    start_VD = surface.drawn(VECTORS, replica.hidden_size, seed=0)
    where: dict[str, Any] = {"source": SOURCE, "target": TARGET, "steps": STEPS, "radius": radius}
    few = melbo_peers.original(replica, ids, start_VD[:ORIGINAL_VECTORS], **where)
    all_ = melbo_peers.batched(replica, ids, start_VD, **where)
    goals = [Goal(radius=radius)] * VECTORS
    with torch.no_grad():
        targets_V = Landscape(slice_, counted_NT, goals).climb(all_.theta_VD, range(VECTORS)).values_V
    apart = (few.history_SV / all_.history_SV[:, :ORIGINAL_VECTORS] - 1).abs().max()

    alone = [([vector], surface) for vector in range(VECTORS)]
    ground = Timed(slice_, counted_NT, goals)
    began = time.perf_counter()
    found = fixed_point(ground, start_VD, alone, kin=[range(VECTORS)])
    whole = time.perf_counter() - began
    done = reached(ground, targets_V)
    faithful = amsgrad(Landscape(slice_, counted_NT, goals), start_VD, alone, steps=10)
    drift = (faithful.history_SV[:10] / all_.history_SV[:10] - 1).abs().max()
    original_seconds = few.seconds * VECTORS / ORIGINAL_VECTORS
    step_seconds = ground.seconds[0]
    times = {
        "machine": describe(),
        "date": date.today().isoformat(),
        "targets": targets_V.tolist(),
        "original_seconds": original_seconds,
        "batched_seconds": all_.seconds,
        "seconds_to_target": None if done is None else done.seconds,
        "looks_to_target": None if done is None else done.looks,
        "seconds_to_settle": whole,
        "looks_to_settle": len(ground.seconds),
        "seconds_a_look": step_seconds,
        "speedup_original": None if done is None else original_seconds / done.seconds,
        "speedup_batched": None if done is None else all_.seconds / done.seconds,
        "step_speedup_original": original_seconds / STEPS / step_seconds,
        "objective_ratio_mean": float(found.values_V.mean() / targets_V.mean()),
        "objective_ratio_lowest": float((found.values_V / targets_V).min()),
        "peers_apart": float(apart),
        "amsgrad_apart": float(drift),
    }
    return times, {"ours": found.theta_VD, "AMSGrad": all_.theta_VD}


def gradient_error(replica: Replica, slice_: Slice, counted_NT: Tensor, ids: Sequence[int]) -> float:
    """Largest relative difference between the gradient on the slice and that of the whole model."""
    theta_VD = Surface(radius=2.0).drawn(4, replica.hidden_size, seed=1)
    found = Landscape(slice_, counted_NT, [Goal(radius=2.0)] * 4).climb(theta_VD, range(4))
    errors = []
    for theta_D, gradient_D in zip(theta_VD, found.gradients_VD, strict=True):
        leaf_D = theta_D.clone().requires_grad_()
        source, target = Place(SOURCE, "after"), Place(TARGET, "after")
        tokens, mask = replica.pad([ids])
        handle = attach(replica, source, partial(torch.add, leaf_D))
        try:
            with picked(replica, [target], lambda h_BTD: h_BTD) as kept:
                replica.forward(tokens, mask, position_ids(mask), keep=1)
        finally:
            handle.remove()
        moved_TD = (kept[target] - slice_.targets_NTD)[0][counted_NT[0]]
        (expected_D,) = torch.autograd.grad(moved_TD.square().sum(), leaf_D)
        errors.append(float((gradient_D - expected_D).norm() / expected_D.norm()))
    return max(errors)


def worth(replica: Replica, theta_VD: Tensor) -> dict[str, float]:
    """What a set of vectors is worth: distinct directions, and what they make the model say."""
    reading = Reading()
    texts = [OpenPrompt("select", prompt) for prompt in (PROMPT, *OTHER_PROMPTS)]
    encoded = [replica.encode_chat(each.prompt) for each in texts]
    changes = [[Add(layer=SOURCE, vector=theta_D.numpy())] for theta_D in theta_VD]
    tables = row_tables(replica, changes)
    [(_, found)] = sayings(
        replica, [encoded], tables, vectors=len(theta_VD), max_new_tokens=reading.max_new_tokens
    )
    metrics = reading.behaviours(texts, found.said_PV).metrics["select"]
    names = ("distinct_completions", "vendi", "diversity", "nll", "repetition", "fluent")
    return {"directions": float(directions(theta_VD)), **{name: metrics[name] for name in names}}


def bench_diversity(
    replica: Replica, slice_: Slice, counted_NT: Tensor, radius: float, free: dict[str, Tensor]
) -> dict[str, Any]:
    """Both optimisers from equal starts, with orthogonality and without.

    Args:
        replica: The model.
        slice_: The blocks, and the prompt.
        counted_NT: Which tokens count.
        radius: R.
        free: The vectors of both without orthogonality.
    """
    sets = {f"{name}, none": theta_VD for name, theta_VD in free.items()}
    methods = {"ours": Method(), "AMSGrad": Method(optimiser="amsgrad", steps=STEPS)}
    for name, method in methods.items():
        search = Search(vectors=VECTORS, goal=Goal(radius=radius))
        [learned] = learn(slice_, counted_NT, [search], method)
        sets[f"{name}, joint"] = learned.theta_VD
    found = {name: worth(replica, theta_VD) for name, theta_VD in sets.items()}
    ratios = {
        f"{measure}, {kind}": found[f"ours, {kind}"][measure] / found[f"AMSGrad, {kind}"][measure]
        for kind in ("none", "joint")
        for measure in ("directions", "distinct_completions", "vendi")
    }
    return {
        "sets": found,
        "diversity_ratios": ratios,
        "diversity_ratio": min(ratio for name, ratio in ratios.items() if name.endswith("joint")),
    }


def bench_large_power(slice_: Slice, counted_NT: Tensor) -> dict[str, Any]:
    """Both optimisers where the objective is steep: p = 4."""
    found: dict[str, Any] = {"power": 4.0, "radius": 2.0, "vectors": FEW_VECTORS}
    kinds: tuple[Orthogonality, ...] = ("none", "joint")
    for kind in kinds:
        for name, method in {"ours": Method(), "AMSGrad": Method(optimiser="amsgrad", steps=STEPS)}.items():
            search = Search(vectors=FEW_VECTORS, goal=Goal(radius=2.0, power=4.0), orthogonality=kind)
            [learned] = learn(slice_, counted_NT, [search], method)
            found[f"{name}, {kind}"] = {
                "objective_mean": float(learned.values_V.mean()),
                "directions": directions(learned.theta_VD),
                "looks": len(learned.history_SV),
            }
    return found


def directions(theta_VD: Tensor) -> int:
    """How many vectors are left if those with |cosine| of 0.9 or more to an earlier one are dropped."""
    units_VD = torch.nn.functional.normalize(theta_VD.double(), dim=1)
    kept: list[Tensor] = []
    for unit_D in units_VD:
        if all(float((unit_D @ other).abs()) < 0.9 for other in kept):
            kept.append(unit_D)
    return len(kept)


def bench_orthogonal(slice_: Slice, counted_NT: Tensor, radius: float) -> dict[str, float]:
    """Joint sets against sequential ones."""
    found: dict[str, Learned] = {}
    for orthogonality in ("joint", "sequential"):
        search = Search(vectors=VECTORS, goal=Goal(radius=radius), orthogonality=orthogonality)
        [found[orthogonality]] = learn(slice_, counted_NT, [search], Method())
    units_VD = torch.nn.functional.normalize(found["joint"].theta_VD.double(), dim=1)
    cosines = (units_VD @ units_VD.T - torch.eye(VECTORS)).abs()
    ratio = found["joint"].values_V.mean() / found["sequential"].values_V.mean()
    return {"orthogonal_ratio_mean": float(ratio), "max_abs_cosine": float(cosines.max())}


def bench_costs(replica: Replica, ids: Sequence[int]) -> dict[str, Any]:
    """Seconds of a look against vectors and depth, and of steps; and how little memory changes the result."""

    def ground(target: int, vectors: int) -> tuple[Landscape, Tensor]:
        slice_ = Slice(replica, [ids], source=SOURCE, target=target)
        start_VD = Surface(radius=2.0).drawn(vectors, replica.hidden_size, seed=0)
        return Landscape(slice_, slice_.positions_NT > 0, [Goal(radius=2.0)] * vectors), start_VD

    def seconds(target: int, vectors: int, looks: int = 1) -> float:
        landscape, theta_VD = ground(target, vectors)
        landscape.climb(theta_VD[:1], [0])  # warm-up
        began = time.perf_counter()
        for _ in range(looks):
            landscape.climb(theta_VD, range(vectors))
        return time.perf_counter() - began

    memory, replica.memory = replica.memory, MEMORY_MIB * 2**20
    narrow = {str(vectors): seconds(TARGET, vectors) for vectors in (32, 128)}
    replica.memory = memory
    return {
        "seconds_by_vectors": {str(vectors): seconds(TARGET, vectors) for vectors in (8, 16, 32, 64, 128)},
        "seconds_by_looks": {str(looks): seconds(TARGET, 16, looks) for looks in (1, 2, 4, 8)},
        "seconds_by_depth": {str(target - SOURCE): seconds(target, 32) for target in (12, 17, 22, 27)},
        f"seconds_by_vectors_in_{MEMORY_MIB}_mib": narrow,
    }


def main(arguments: Sequence[str]) -> None:
    """Time everything, then compare what was found; print it and write it, one R after another."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.melbo", description=__doc__)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument(
        "--radii", type=float, nargs="+", default=list(RADII), help="what is already there of others is kept"
    )
    parser.add_argument(
        "--steep",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="the comparison at p = 4; --no-steep keeps the one that is there",
    )
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args(arguments)
    replica = load_replica(ModelRef(id=options.model))
    ids = replica.encode_chat(PROMPT)
    slice_ = Slice(replica, [ids], source=SOURCE, target=TARGET)
    counted_NT = slice_.positions_NT > 0
    options.out.parent.mkdir(parents=True, exist_ok=True)
    before = json.loads(options.out.read_text()) if options.out.is_file() else {}
    result: dict[str, Any] = {
        "machine": describe(),
        "date": date.today().isoformat(),
        "prompt_tokens": len(ids),
        "gemm_ceiling_flops_per_second": gemm_ceiling(
            torch.float32, inputs=replica.hidden_size, outputs=4 * replica.hidden_size
        ),
        "flops_a_look": 2 * VECTORS * len(ids) * (TARGET - SOURCE) * block_flops(replica),
        "radii": {r: old for r, old in before.get("radii", {}).items() if float(r) not in options.radii},
        "large_power": before.get("large_power"),
    }
    result["gradient_relative_error"] = gradient_error(replica, slice_, counted_NT, ids)
    result["costs"] = bench_costs(replica, ids)
    free: dict[float, dict[str, Tensor]] = {}
    for radius in options.radii:
        found, free[radius] = bench_radius(replica, slice_, counted_NT, ids, radius)
        _keep(result, radius, found, options.out)
    for radius in options.radii:
        found = bench_diversity(replica, slice_, counted_NT, radius, free[radius])
        _keep(result, radius, found | bench_orthogonal(slice_, counted_NT, radius), options.out)
    if options.steep:
        result["large_power"] = bench_large_power(slice_, counted_NT)
        _write(result, options.out)


def _keep(result: dict[str, Any], radius: float, found: dict[str, Any], path: Path) -> None:
    print(json.dumps({str(radius): found}, indent=2), flush=True)
    result["radii"][str(radius)] = result["radii"].get(str(radius), {}) | found
    _write(result, path)


def _write(result: dict[str, Any], path: Path) -> None:
    whole = [found for found in result["radii"].values() if {"sets", "targets"} <= found.keys()]
    result |= _summary(whole) if whole else {}
    path.write_text(json.dumps(result, indent=2) + "\n")


def _summary(found: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The worst over the radii; 0 where a target was not reached."""
    least = (
        *("speedup_original", "speedup_batched", "step_speedup_original", "objective_ratio_mean"),
        "diversity_ratio",
    )
    return {
        **{name: float(np.min([each[name] or 0.0 for each in found])) for name in least},
        "orthogonal_ratio_mean": min(each["orthogonal_ratio_mean"] for each in found),
        "max_abs_cosine": max(each["max_abs_cosine"] for each in found),
    }


if __name__ == "__main__":
    main(sys.argv[1:])

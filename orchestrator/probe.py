"""What a few trials take on the real model, measured in a folder that is thrown away afterwards."""

import importlib
import resource
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from jobs.errors import OutOfMemory, SpecError
from jobs.spec import Spec
from orchestrator.config import RunConfig
from orchestrator.intake import Planned, make_order
from orchestrator.planning import Planner
from orchestrator.worker import Worker, device_of
from orchestrator.workload import required, tokens_of
from storage.artifacts import Artifact
from storage.parquet import TableFile


class Pace(NamedTuple):
    """What a job took.

    Attributes:
        rows: Most rows that were run together.
        pack_seconds: What a pack takes whatever its rows are.
        token_seconds: What each token of its rows adds, as the job's `size` counts them.
        row_bytes: What was written for each row.
    """

    rows: int
    pack_seconds: float
    token_seconds: float
    row_bytes: float


class Measured(NamedTuple):
    """What was measured.

    Attributes:
        device: Where the replica was.
        loading_seconds: Until it was there.
        peak_bytes: Most memory that was in use: of the process on a CPU, on the GPUs there.
        paces: Job -> what it took.
    """

    device: str
    loading_seconds: float
    peak_bytes: int
    paces: dict[str, Pace]


class Ran(NamedTuple):
    """A pack that was run."""

    job: str
    rows: int
    tokens: int
    seconds: float
    bytes: int


def measure(planner: Planner, packs: Sequence[Sequence[Spec]], config: RunConfig, seconds: float) -> Measured:
    """Run the cheapest of some specs with all that it requires, and a pack of its kind if there is time.

    Args:
        planner: Knows what specs require.
        packs: Specs that ride together.
        config: How they are run.
        seconds: How long it should take; one spec and what it requires are run however long they take.

    Raises:
        OutOfMemory: If one does not fit.
        SpecError: If one fails.
        ModelError: If the model cannot be loaded.
    """
    first, pack = _cheapest(packs)
    importlib.import_module("torch").set_num_threads(config.cpus_per_worker)
    with tempfile.TemporaryDirectory() as folder:
        began = time.perf_counter()
        worker = Worker(
            Path(folder),
            first.model,
            device=device_of(config.gpus_per_worker),
            token_budget=config.token_budget,
            memory=config.memory,
        )
        loading_seconds = time.perf_counter() - began
        probe = Probe(worker, planner)
        for spec in (*required(planner, first), first):
            probe.run([spec])
        alone = probe.runs[-1].seconds
        left = seconds - (time.perf_counter() - began)
        ready = [spec for spec in pack if probe.has_all_of(spec)][: config.max_pack]
        if (rows := min(len(ready), int(left / alone))) > 1:
            probe.run(ready[:rows])
        device = probe.device
        return Measured(device, loading_seconds, _peak_bytes(device), dict(_paces(probe.runs)))


def _cheapest(packs: Sequence[Sequence[Spec]]) -> tuple[Spec, Sequence[Spec]]:
    """The spec with the fewest tokens, and those that ride with it."""
    return min(((spec, pack) for pack in packs for spec in pack), key=lambda each: tokens_of(each[0]))


class Probe:
    """A worker that is given one pack after the other, and keeps their artifacts.

    Args:
        worker: Whoever runs them.
        planner: Knows what specs require.

    Attributes:
        runs: What was run so far.
        files: Tables that were written.
        device: Where the last of them ran.
    """

    def __init__(self, worker: Worker, planner: Planner) -> None:
        self._worker = worker
        self._planner = planner
        self._artifacts: dict[str, Artifact] = {}
        self.runs: list[Ran] = []
        self.files: list[TableFile] = []
        self.device = ""

    def take(self, spec: Spec, artifact: Artifact) -> None:
        """Have a prerequisite that was made elsewhere; its file must lie in the worker's folder."""
        self._artifacts[spec.id] = artifact

    def has(self, spec: Spec) -> bool:
        """Whether a prerequisite is there."""
        return spec.id in self._artifacts

    def has_all_of(self, spec: Spec) -> bool:
        """Whether all that a spec requires is there."""
        return all(map(self.has, self._planner.needs(spec).values()))

    def run(self, specs: Sequence[Spec]) -> None:
        """Run a pack whose prerequisites are there, unless it is a prerequisite that is there itself.

        Raises:
            OutOfMemory: If it does not fit.
            SpecError: If it, or a row of it, fails.
        """
        if all(map(self.has, specs)):
            return
        job = specs[0].job
        rows = [Planned(spec, self._planner.needs(spec)) for spec in specs]
        written = 0
        began = time.perf_counter()
        for delivery in self._worker.run(make_order("plan", rows, self._artifacts)):
            self.device = delivery.device
            if delivery.error is not None:
                raise (OutOfMemory if delivery.out_of_memory else SpecError)(
                    f"{job} cannot run with {dict(specs[0].params)}: {delivery.error.splitlines()[0]}"
                )
            for result in delivery.part.results:
                if result.status == "failed":
                    raise SpecError(f"{job} fails with {dict(specs[0].params)}: {result.reason}")
            kept = {row.spec: row.artifact for row in delivery.finished if row.artifact is not None}
            self._artifacts.update(kept)
            self.files += delivery.part.files
            written += sum(file.bytes for file in delivery.part.files)
            written += sum(artifact.bytes for artifact in kept.values())
        seconds = time.perf_counter() - began
        self.runs.append(Ran(job, len(specs), sum(map(tokens_of, specs)), seconds, written))


def _paces(runs: Sequence[Ran]) -> Iterator[tuple[str, Pace]]:
    """Job -> pace: a line through the smallest and the largest pack, or through none and one."""
    for job in {run.job for run in runs}:
        own = sorted((run for run in runs if run.job == job), key=lambda run: run.tokens)
        least, most = own[0], own[-1]
        rows = sum(run.rows for run in own)
        slope = most.seconds / max(1, most.tokens)
        if most.tokens > least.tokens:
            slope = min(slope, max(0.0, (most.seconds - least.seconds) / (most.tokens - least.tokens)))
        constant = max(0.0, most.seconds - slope * most.tokens)
        yield job, Pace(most.rows, constant, slope, sum(run.bytes for run in own) / rows)


def _peak_bytes(device: str) -> int:
    if not device.startswith("cuda"):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    cuda = importlib.import_module("torch").cuda
    return sum(cuda.max_memory_reserved(number) for number in range(cuda.device_count()))

"""What a few trials take on the real model, measured in a folder that is thrown away afterwards."""

import importlib
import resource
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from jobs.errors import OutOfMemory, SpecError
from jobs.spec import ModelRef, Spec
from orchestrator.config import RunConfig
from orchestrator.intake import Planned, make_order
from orchestrator.planning import Planner
from orchestrator.worker import Worker, device_of
from orchestrator.workload import required, tokens_of
from storage.artifacts import Artifact
from storage.donors import Donors
from storage.parquet import TableFile, read_rows


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
    began = time.perf_counter()
    with probing(planner, config, first.model, Donors(())) as probe:
        loading_seconds = time.perf_counter() - began
        probe.prepare(first)
        probe.run([first])
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


@contextmanager
def probing(planner: Planner, config: RunConfig, model: ModelRef, donors: Donors) -> Iterator["Probe"]:
    """Inside the block there is a worker on this machine, in a folder that is removed afterwards.

    Args:
        planner: Knows what specs require.
        config: How they are run.
        model: The weights.
        donors: Whose artifacts are taken.

    Raises:
        ModelError: If the model cannot be loaded.
    """
    importlib.import_module("torch").set_num_threads(config.cpus_per_worker)
    with tempfile.TemporaryDirectory() as folder:
        worker = Worker(
            Path(folder),
            model,
            device=device_of(config.gpus_per_worker),
            token_budget=config.token_budget,
            memory=config.memory,
        )
        yield Probe(worker, planner, donors, Path(folder))


class Probe:
    """A worker that is given one pack after the other, and keeps their artifacts.

    Args:
        worker: Whoever runs them.
        planner: Knows what specs require.
        donors: Whose artifacts are taken.
        folder: The worker's.

    Attributes:
        runs: What was run so far.
        folder: The worker's.
        device: Where the last pack ran.
    """

    def __init__(self, worker: Worker, planner: Planner, donors: Donors, folder: Path) -> None:
        self._worker = worker
        self._planner = planner
        self._donors = donors
        self._artifacts: dict[str, Artifact] = {}
        self._files: list[TableFile] = []
        self.folder = folder
        self.runs: list[Ran] = []
        self.device = ""

    def prepare(self, spec: Spec) -> None:
        """Have all that a spec requires: from the donors, or else by running it. Raises as `run` does."""
        for need in required(self._planner, spec):
            if need.id not in self._artifacts and (found := self._donors.give(need, self.folder)):
                self._artifacts[need.id] = found.artifact
            self.run([need])

    def has_all_of(self, spec: Spec) -> bool:
        """Whether all that a spec requires is there."""
        return all(need.id in self._artifacts for need in self._planner.needs(spec).values())

    def rows(self, table: str, spec: Spec) -> list[dict[str, Any]]:
        """What a spec that was run has written to a table."""
        return [row for row in read_rows(self.folder, table, self._files) if row["spec"] == spec.id]

    def run(self, specs: Sequence[Spec]) -> None:
        """Run a pack whose prerequisites are there, unless it is a prerequisite that is there itself.

        Raises:
            OutOfMemory: If it does not fit.
            SpecError: If it, or a row of it, fails.
        """
        if all(spec.id in self._artifacts for spec in specs):
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
            self._files += delivery.part.files
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

"""What crosses process boundaries: specs, rows, outcomes, and the contract of a job module.

No torch, no I/O: the driver, the spaces and the store all import this file.
"""

import dataclasses
import hashlib
import json
import math
from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from functools import cached_property
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np

UNSTEERED = "unsteered"
"""What texts are compared with unless their job says otherwise."""
SPLITS = ("extract", "select", "report")
"""Prompts that directions come from, that configurations are chosen on, that winners are read on."""


Retention = Literal["all", "front"] | int
"""Trials whose large files stay once all have ended: all, those of the front, or the last so many."""


def choosing_split(splits: Container[str]) -> str:
    """The split of a result that configurations are chosen on, where the bare name of a metric is read.

    Args:
        splits: Those that the result has metrics on.

    Returns:
        `select`; `extract` for a job that measures on nothing else, such as `jobs.extract`.
    """
    measured_later = "select" in splits or "report" in splits
    return "extract" if "extract" in splits and not measured_later else "select"


def canonical_json(value: Any) -> str:
    """`value` as JSON with sorted keys and no spaces: equal values give equal text.

    Raises:
        ValueError: If the value holds NaN or an infinity, which JSON cannot carry.
        TypeError: If it holds anything but None, bool, int, float, str, list, tuple and dict.
    """
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def content_hash(value: Any) -> str:
    """Sixteen hexadecimal digits of SHA-256 over `canonical_json(value)`."""
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()[:16]


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelRef:
    """Which weights to load, and how.

    Attributes:
        id: Hugging Face id, a folder, or a name that `steersweep models add` knows.
        revision: Commit or tag of the hub; None for a folder.
        dtype: Type of the weights: float32, float64, bfloat16, float16, or quantised int8, int4.
        trust_remote_code: Whether the model's own Python code may run.
        weights: Hash of the files of a folder (`jobs.fingerprint`); None where `revision` says which they
            are.
        tuned: The tuning job whose outcome changes these weights, with its parameters as JSON behind it, such
            as `jobs.finetune{"epochs": 3}`; empty for the weights as they are. What that job trains are these
            weights as they are.
    """

    id: str
    revision: str | None = None
    dtype: str = "float32"
    trust_remote_code: bool = False
    weights: str | None = None
    tuned: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Requirement:
    """An artifact that a job needs: the job that makes it and that job's parameters.

    Attributes:
        job: Import path of the job module, such as `jobs.extract`.
        params: An instance of that module's `Params`.
    """

    job: str
    params: Any

    @property
    def key(self) -> str:
        """Name of the requirement inside one sweep: equal requirements have equal keys."""
        return content_hash({"job": self.job, "params": params_to_json(self.params)})


@dataclass(frozen=True, kw_only=True)
class Spec:
    """All that decides a result. Equal specs run once.

    Attributes:
        job: Import path of the job module.
        code: Version of the job's code and of the libraries under it (`jobs.resolve.code_version`).
        params: The job's parameters as plain JSON.
        model: The weights.
        data: Dataset name -> hash of its content.
        seed: Seed of the row.
    """

    job: str
    code: str
    params: Mapping[str, Any]
    model: ModelRef
    data: Mapping[str, str]
    seed: int

    @cached_property
    def id(self) -> str:
        """Hash of every field: the name under which the result is stored."""
        return content_hash(self.to_json())

    def to_json(self) -> dict[str, Any]:
        """The spec as plain JSON, as it stands in the ledger."""
        return {
            "job": self.job,
            "code": self.code,
            "params": dict(self.params),
            "model": dataclasses.asdict(self.model),
            "data": dict(self.data),
            "seed": self.seed,
        }

    @staticmethod
    def from_json(value: Mapping[str, Any]) -> "Spec":
        """The inverse of `to_json`."""
        return Spec(**{**value, "model": ModelRef(**value["model"])})


def spec_differences(one: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """What two specs, as `Spec.to_json` has them, do not share: field or part of one -> both values."""
    first, second = _flat(one), _flat(other)
    names = dict.fromkeys([*first, *second])
    pairs = {name: (first.get(name), second.get(name)) for name in names}
    return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}


def _flat(spec: Mapping[str, Any]) -> dict[str, Any]:
    parts = {
        (key if name == "params" else f"{name} {key}"): value
        for name in ("params", "model", "data")
        for key, value in spec[name].items()
    }
    return {**{name: spec[name] for name in ("job", "code", "seed")}, **parts}


class Row(NamedTuple):
    """One configuration of a pack."""

    params: Any
    seed: int


class Size(NamedTuple):
    """What one row asks of a replica: for packing and for the plan."""

    sequences: int
    tokens: int


class Status(StrEnum):
    """How a row ended."""

    COMPLETED = "completed"
    INFEASIBLE = "infeasible"
    FAILED = "failed"


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What a job hands back for one row.

    Attributes:
        status: Completed, infeasible (a constraint or a gate said no) or failed.
        reason: Why the row is not completed; None where it is.
        metrics: Split -> metric name -> value. NaN marks a metric that is not defined for this row.
        tables: Table name -> rows as dictionaries; `items` and `completions` are the usual ones.
        tensors: Name -> array, float32 or wider (bfloat16 is widened by the job).
    """

    status: Status = Status.COMPLETED
    reason: str | None = None
    metrics: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    tables: Mapping[str, Sequence[Mapping[str, Any]]] = field(default_factory=dict)
    tensors: Mapping[str, np.ndarray] = field(default_factory=dict)


class Context(Protocol):
    """What the worker offers a running job."""

    def artifact(self, requirement: Requirement) -> Mapping[str, np.ndarray]:
        """Read-only arrays of a required artifact, by tensor name."""

    def write(self, row: int, name: str, chunk: Mapping[str, Any]) -> None:
        """Store rows of a table now, for tables that are too large to wait in an outcome.

        They become visible together with the row's outcome. What was written for a row that fails, or
        never has an outcome, is dropped.

        Args:
            row: Which row of the pack; its outcome is still to come.
            name: Table of `storage/schema.py`, such as `activations`.
            chunk: Column -> an array or list with one entry a row of the table, for vectors a float array
                of shape (rows, width), stored as float32; or one value that all its rows share. Arrays
                are copied.
        """

    @property
    def stop_requested(self) -> bool:
        """True once the sweep wants the worker back; a job may then end early."""


class Metric(NamedTuple):
    """Unit and meaning of a metric; its direction belongs to the space's objectives."""

    unit: str
    meaning: str


class Job(Protocol):
    """The contract of a job module (checked by `jobs.resolve.load_job`).

    Attributes:
        Params: Frozen, keyword-only dataclass of everything that may be chosen.
        METRICS: What the job measures.
        PACK_BY: Parameters that the rows of one pack must share; None = never packed.
        DATA: Parameters that name datasets.
        LAYERS: Parameters that name layers.
        CONTROL: What its texts are compared with, in a word or two, if not with the unsteered model's; empty
            if with nothing. A job that has one also has `control(params)`, the requirement whose texts those
            are, or None. Both may be absent.

    A job whose artifact holds learned vectors, the tensor `vectors`, says with `learned_vectors(params)` how
    many; one that needs directions at right angles to each other says with `orthogonal(params)` how many.
    One that changes weights says with `weight_changes(params, tensors)` what its artifact holds: a list of
    changes, each the factors (outputs, rank) and (rank, inputs) of what is added to matrices, or the matrices
    that take their place, by the name of their module, or by the layer whose feed-forward part puts out with
    them.
    """

    Params: type
    METRICS: Mapping[str, Metric]
    PACK_BY: Sequence[str] | None
    DATA: Sequence[str]
    LAYERS: Sequence[str]

    def size(self, params: Any) -> Size:
        """Sequences and tokens that one row costs."""

    def requires(self, params: Any) -> Sequence[Requirement]:
        """Artifacts that must exist before `run`."""

    def check(self, params: Any) -> None:
        """Read the datasets as `run` will. Raises SpecError if they cannot be used."""

    def canonical(self, params: Any) -> Any:
        """Parameters that mean the same work as `params`, equal for equal work."""

    def run(self, replica: Any, rows: Sequence[Row], context: Context) -> Iterator[tuple[int, Outcome]]:
        """Yield (row index, outcome) for every row, each as soon as it is finished."""


def params_to_json(params: Any) -> dict[str, Any]:
    """A job's Params as plain JSON values; tuples become lists. Raises as `canonical_json` does."""
    plain: dict[str, Any] = json.loads(canonical_json(dataclasses.asdict(params)))
    return plain


def is_defined(value: float | None) -> bool:
    """Whether a metric has a finite value."""
    return value is not None and math.isfinite(value)

"""How a sweep is run: the fields that `run` and `--set` take."""

import json
from functools import cached_property
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from jobs import catalog
from jobs.errors import SpecError
from jobs.fingerprint import commit, fingerprint
from jobs.resolve import parse_use
from jobs.spec import ModelRef
from search_spaces.base import Sampler


class RunConfig(BaseModel):
    """How to run a sweep; unknown keys are refused.

    Attributes:
        model: Hugging Face id with an optional `@revision`, a folder, or a name for `models add`.
        dtype: Type of the weights; int8 and int4 are quantised as they are loaded.
        trust_remote_code: Whether the model's own Python code may run.
        tuned: Job that tunes the model first, with its parameters as JSON behind its name, such as
            `jobs.finetune{"epochs": 3}`; every trial then runs on the tuned weights.
        seed: Seed of the sampler and of every row.
        sampler: Overrides the space's sampler.
        trials: Overrides the space's number of trials.
        workers: Replicas, each in a Ray actor of its own.
        cpus_per_worker: CPU cores of a worker; also torch's threads.
        gpus_per_worker: GPUs of a worker; 0 runs on the CPU, more than 1 spread one model over several.
        token_budget: Most tokens of one forward pass.
        memory_gib: For keys, values and activations that a worker keeps, GiB; None takes 0.4 of what is free
            on its GPUs once the weights are there, and on a CPU 4 GiB, or a sixth of the machine's if less.
        max_pack: Most trials of one pack.
        max_attempts: Tries at a pack whose worker dies; the last one is alone.
        resources: Custom resources of Ray's that a worker takes, such as `{"tpu": 1}`.
        labels: Labels of Ray's that the machine of a worker has, such as `{"gpu-type": "H100"}`.
        loads_at_once: Most workers that load the model at the same time.
        wait_seconds: How long to wait for a machine that can hold a worker.
        answer_seconds: A worker that does not answer for so long is replaced.
        pack_seconds: A worker whose pack gives nothing for so long is replaced; None waits for ever.
        budget_hours: After so many hours of a run no further pack is started; None = never.
        budget_device_hours: The same for the hours that workers were busy, in all runs of the sweep, times
            `gpus_per_worker` (or 1 where that is 0).
        least_gain: No further pack is started once the hypervolume of the front grows by less than this share
            of itself a device hour; None = never.
        budget_disk_gib: No further pack is started once tables and artifacts of the sweep take so many GiB;
            None = never.
        mlflow: URI of the MLflow store or server; None keeps `mlflow.db` in the sweep's folder,
            or on this machine where that is on a network file system.
        system_metrics: Whether MLflow also gets what CPU, memory, disk, network and GPUs of the driver's
            machine do.
        storage: URL of a PostgreSQL database for Optuna's study, such as `postgresql://me@host/studies`; None
            keeps `optuna.journal` in the sweep's folder.
        results: URI such as `s3://bucket/sweeps`, under which the sweep's files are exchanged, and kept
            besides; for workers on machines that do not share its folder.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())

    model: str = Field("smollm2-135m", min_length=1)
    dtype: Literal["float32", "float64", "bfloat16", "float16", "int8", "int4"] = "float32"
    trust_remote_code: bool = False
    tuned: str = ""
    seed: int = Field(0, ge=0, lt=2**53)
    sampler: Sampler | None = None
    trials: int | None = Field(None, ge=1)
    workers: int = Field(2, ge=1)
    cpus_per_worker: int = Field(1, ge=1)
    gpus_per_worker: float = Field(0, ge=0, allow_inf_nan=False)
    token_budget: int = Field(8192, ge=1)
    memory_gib: float | None = Field(None, gt=0, allow_inf_nan=False)
    max_pack: int = Field(16, ge=1)
    max_attempts: int = Field(3, ge=1)
    resources: dict[str, float] = Field(default_factory=dict)
    labels: dict[str, str] = Field(default_factory=dict)
    loads_at_once: int = Field(8, ge=1)
    wait_seconds: float = Field(600, gt=0)
    answer_seconds: float = Field(120, gt=0)
    pack_seconds: float | None = Field(None, gt=0)
    budget_hours: float | None = Field(None, gt=0, allow_inf_nan=False)
    budget_device_hours: float | None = Field(None, gt=0, allow_inf_nan=False)
    least_gain: float | None = Field(None, gt=0, allow_inf_nan=False)
    budget_disk_gib: float | None = Field(None, gt=0, allow_inf_nan=False)
    mlflow: str | None = None
    system_metrics: bool = False
    storage: str | None = None
    results: str | None = None

    @field_validator("resources", "labels", mode="before")
    @classmethod
    def _from_json(cls, value: Any) -> Any:
        """The command line gives texts."""
        try:
            return json.loads(value) if isinstance(value, str) else value
        except json.JSONDecodeError as error:
            raise ValueError(f'{value!r} is no JSON object such as {{"name": 1}}') from error

    @field_validator("gpus_per_worker", "resources")
    @classmethod
    def _shares_or_whole(cls, value: float | dict[str, float]) -> float | dict[str, float]:
        """Ray shares one of a thing among several workers, or gives a worker whole ones."""
        amounts = value.values() if isinstance(value, dict) else [value]
        if wrong := [amount for amount in amounts if amount < 0 or (amount > 1 and amount % 1)]:
            raise ValueError(f"{wrong[0]} is neither a share, up to 1, nor a whole number")
        return value

    @field_validator("model")
    @classmethod
    def _absolute_folder(cls, value: str) -> str:
        """A folder means the same from wherever the sweep is resumed."""
        is_folder = value not in catalog.ENTRIES and Path(value).expanduser().is_dir()
        return str(Path(value).expanduser().resolve()) if is_folder else value

    @field_validator("tuned")
    @classmethod
    def _is_a_job(cls, value: str) -> str:
        try:
            return value and parse_use(value).job and value
        except SpecError as error:
            raise ValueError(str(error)) from error

    @field_validator("mlflow")
    @classmethod
    def _absolute_and_without_secrets(cls, value: str | None) -> str | None:
        """The configuration is kept and shown; and it means the same from wherever the sweep is resumed."""
        if value is None:
            return None
        if _holds_secret(value):
            raise ValueError(
                "a URI with a user or password would be kept with the sweep; set MLFLOW_TRACKING_TOKEN, or "
                "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, in the environment instead"
            )
        path = value.removeprefix("sqlite:///")
        return value if path == value else f"sqlite:///{Path(path).resolve()}"

    @field_validator("storage")
    @classmethod
    def _postgresql_without_secrets(cls, value: str | None) -> str | None:
        if value is None:
            return None
        if not urlsplit(value).scheme.startswith("postgresql"):
            raise ValueError("it takes a URL such as postgresql://me@host:5432/studies")
        if _holds_secret(value):
            raise ValueError(
                "a URL with a password would be kept with the sweep; set PGPASSWORD in the environment, or "
                "write it into ~/.pgpass"
            )
        return value

    @field_validator("results")
    @classmethod
    def _without_secrets(cls, value: str | None) -> str | None:
        if value is not None and (_holds_secret(value) or "secret" in urlsplit(value).query):
            raise ValueError(
                "a URI with credentials would be kept with the sweep; set them in the environment, such as "
                "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
            )
        return value

    @cached_property
    def model_ref(self) -> ModelRef:
        """The model as jobs name it, with the hash of its files as they are when this is first read.

        Raises:
            ModelError: If a file of the model's folder cannot be read.
        """
        name, _, revision = (self.model, "", "") if Path(self.model).is_dir() else self.model.partition("@")
        return ModelRef(
            id=name,
            revision=revision or None,
            dtype=self.dtype,
            trust_remote_code=self.trust_remote_code,
            weights=fingerprint(name),
            tuned=self.tuned,
        )

    @model_validator(mode="after")
    def _two_databases(self) -> "RunConfig":
        if self.storage is not None and self.storage == self.mlflow:
            raise ValueError(
                "storage and mlflow: Optuna and MLflow each keep the version of their tables under the same "
                "name; give them a database each, which may be on one server"
            )
        return self

    @property
    def memory(self) -> int | None:
        """`memory_gib` in bytes."""
        return None if self.memory_gib is None else int(self.memory_gib * 2**30)

    def pinned(self) -> "RunConfig":
        """The same with the commit of a Hugging Face id, where this machine knows it: a branch may move."""
        found = commit(self.model_ref)
        if found in (None, self.model_ref.revision):
            return self
        return RunConfig(**self.model_dump() | {"model": f"{self.model_ref.id}@{found}"})


def _holds_secret(uri: str) -> bool:
    parts = urlsplit(uri)
    return bool(parts.password or "password" in parts.query or (parts.username and parts.scheme in _WEB))


_WEB = ("http", "https")
SPACE_PREFIX = "space."


def make_config(**values: Any) -> RunConfig:
    """A configuration from the command line's values.

    Raises:
        SpecError: If a key is unknown or a value does not fit; one line that names it.
    """
    try:
        return RunConfig(**{key: value for key, value in values.items() if value is not None})
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(map(str, first["loc"]))
        if first["type"] == "extra_forbidden":
            known = sorted(RunConfig.model_fields)
            raise SpecError(f"--set {name}: no such field; it takes {known} or {SPACE_PREFIX}NAME") from error
        if first["type"] == "value_error":
            raise SpecError(": ".join(filter(None, (name, str(first["ctx"]["error"]))))) from error
        raise SpecError(f"{name}={first['input']!r}: {first['msg'].lower()}") from error


def split_settings(settings: list[str]) -> tuple[dict[str, str], dict[str, str]]:
    """`key=value` texts as fields of the configuration and as the space's fixed values.

    Raises:
        SpecError: If a text has no `=`.
    """
    fields: dict[str, str] = {}
    fixed: dict[str, str] = {}
    for text in settings:
        key, separator, value = text.partition("=")
        if not separator or not key:
            raise SpecError(
                f"--set {text!r}: write key=value, such as --set seed=1 or --set {SPACE_PREFIX}pairs=x.jsonl"
            )
        if key.startswith(SPACE_PREFIX):
            fixed[key.removeprefix(SPACE_PREFIX)] = value
        else:
            fields[key] = value
    return fields, fixed

"""What the sweep asks of workers, whoever runs them. No Ray here."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

from jobs.spec import ModelRef
from storage.artifacts import Artifact
from storage.store import Part


class OrderRow(NamedTuple):
    """One row of a pack as it travels: spec id, parameters as JSON, seed."""

    spec: str
    params: dict[str, Any]
    seed: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Order:
    """A pack for a worker.

    Attributes:
        attempt: Id of the try.
        job: Import path of the job.
        model: What it runs on.
        rows: The configurations.
        artifacts: Requirement key -> artifact that holds it.
        tuned: Changes of the model's weights that the job runs on; None for the weights as they are.
    """

    attempt: str
    job: str
    model: ModelRef
    rows: tuple[OrderRow, ...]
    artifacts: dict[str, Artifact]
    tuned: Artifact | None = None


class Finished(NamedTuple):
    """That a row's outcome is out.

    Attributes:
        spec: Whose outcome it is.
        state: State of the attempt: ok, failed, lost or oom.
        reason: Why it is not ok.
        at: When, in s since 1970.
        metrics: The outcome's metrics on the split that configurations are chosen on.
        artifact: Where the outcome's tensors are; None if it has none.
    """

    spec: str
    state: str
    reason: str | None
    at: float
    metrics: Mapping[str, float] | None = None
    artifact: Artifact | None = None


@dataclass(frozen=True, slots=True)
class Delivery:
    """What a worker says while it runs an order.

    Attributes:
        part: Files written since the last delivery, not yet visible.
        finished: The rows that they hold.
        started: When the order was taken, in s since 1970.
        host: The worker's machine.
        device: What its replica is on.
        error: The last delivery of an order that raised: one line and the traceback. The rows that had
            no outcome yet are not in `finished`.
        out_of_memory: Whether the error was that the pack does not fit.
        has_loaded: Whether the worker had to load the order's model first.
        is_worn: Whether the worker should be replaced after this order.
    """

    part: Part
    finished: tuple[Finished, ...]
    started: float
    host: str
    device: str = ""
    error: str | None = None
    out_of_memory: bool = False
    has_loaded: bool = False
    is_worn: bool = False


def written(part: Part, finished: Iterable[Finished]) -> list[str]:
    """Paths of all that a delivery brings: tables, and then artifacts."""
    artifacts = [row.artifact.path for row in finished if row.artifact is not None]
    return [*(file.path for file in part.files), *artifacts]


class Event(NamedTuple):
    """Something that happened to a worker.

    Attributes:
        worker: Its name.
        kind: `ready` (it can take an order), `delivery`, `done` (its order has ended), `lost` (it died).
        delivery: Set for `delivery`.
        reason: Set for `lost`.
        is_fault: Whether its order may be to blame for its death; not so where its machine went away.
        is_disk_full: Whether it could not write what it had found.
    """

    worker: str
    kind: str
    delivery: Delivery | None = None
    reason: str | None = None
    is_fault: bool = True
    is_disk_full: bool = False


class Pool(Protocol):
    """Workers, each with a warm replica."""

    def start(self, worker: str, order: Order) -> None:
        """Hand an order to an idle worker."""

    def events(self, timeout_seconds: float) -> list[Event]:
        """What has happened since the last call; waits for something to happen, or the timeout.

        Raises:
            SteersweepError: If no worker can be had.
        """

    def drain(self) -> None:
        """Replace no worker any more that dies."""

    def close(self) -> None:
        """Let all workers go."""

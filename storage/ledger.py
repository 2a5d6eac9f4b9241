"""The driver's own record of what was asked and dispatched: enough to go on after any death.

Results are not here: a result exists once a manifest entry lists its files.
"""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jobs.spec import Spec
from storage.durable import Log, StoreError, read_log, read_log_backwards

_PROPOSALS = ("asked", "asked again", "changes accepted")


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """A trial that the sampler proposed.

    Attributes:
        trial: Its number.
        params: Proposed parameters.
        spec: What has to be computed for it.
        seen: Number of trials that the sampler had been told of before; they are told in the order in
            which `trials` was written, so that this many of its first rows were seen.
        fixed: Parameters that were held fixed so that the trial could share a pack.
        group: Number of the first trial that was asked for together with it.
    """

    trial: int
    params: Mapping[str, Any]
    spec: Spec
    seen: int
    fixed: tuple[str, ...] = ()
    group: int


class Ledger:
    """Append-only; one writer, the driver."""

    def __init__(self, folder: Path) -> None:
        self._log = Log(ledger_path(folder))

    def taken_over(self) -> None:
        """Record that a new driver goes on; what the one before had dispatched runs no more."""
        self._log.append({"event": "taken over"})

    def asked(self, trials: Iterable[Asked]) -> None:
        """Record proposals, whole or not at all, before anything is done about them."""
        self._log.append({"event": "asked", "trials": list(map(_event, trials))})

    def asked_again(self, trials: Iterable[Asked]) -> None:
        """Record what trials that were recorded before mean from now on, whole or not at all."""
        self._log.append({"event": "asked again", "trials": list(map(_event, trials))})

    def dispatched(self, attempt: str, worker: str, specs: Iterable[str]) -> None:
        """Record that a worker was given a pack."""
        self._log.append({"event": "dispatched", "attempt": attempt, "worker": worker, "specs": list(specs)})

    def limited(self, job: str, model: str, most: int) -> None:
        """Record how many rows of a job a replica of a model was found to hold."""
        self._log.append({"event": "limited", "job": job, "model": model, "most": most})

    def changes_accepted(self, changes: str, trials: Iterable[Asked]) -> None:
        """Record, whole or not at all, what has changed, in words, and what trials mean from now on."""
        self._log.append(
            {"event": "changes accepted", "changes": changes, "trials": list(map(_event, trials))}
        )


def ledger_path(folder: Path) -> Path:
    """File of a sweep's ledger."""
    return folder / "ledger.jsonl"


def read_asked(folder: Path) -> list[Asked]:
    """All proposals of a sweep, in order; of a trial that was recorded again, as it was the last time.

    Raises:
        StoreError: If the ledger is not what was written.
    """
    return list({asked.trial: asked for asked in _recorded(folder)}.values())


def read_comparable(folder: Path) -> list[Asked]:
    """Proposals since changes were last accepted, which were recorded as meant. Raises as `read_asked`."""
    found: dict[int, Asked] = {}
    for event in _events(folder, *_PROPOSALS):
        if event["event"] == "changes accepted":
            found.clear()
        found |= {asked.trial: asked for asked in _trials(event)}
    return list(found.values())


def _recorded(folder: Path) -> Iterator[Asked]:
    for event in _events(folder, *_PROPOSALS):
        yield from _trials(event)


def _trials(event: Mapping[str, Any]) -> Iterator[Asked]:
    """Those of an event; older sweeps have one event for each. Raises StoreError as `read_asked`."""
    try:
        yield from map(_asked, event.get("trials", (event,)))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise StoreError(f"the ledger is not what was written: {str(event)[:60]}: {error!r}") from error


def _event(asked: Asked) -> dict[str, Any]:
    return {
        "trial": asked.trial,
        "params": dict(asked.params),
        "spec": asked.spec.to_json(),
        "seen": asked.seen,
        "fixed": list(asked.fixed),
        "group": asked.group,
    }


def _asked(event: Mapping[str, Any]) -> Asked:
    return Asked(
        trial=event["trial"],
        params=event["params"],
        spec=Spec.from_json(event["spec"]),
        seen=event["seen"],
        fixed=tuple(event["fixed"]),
        group=event.get("group", event["trial"]),  # older sweeps have none
    )


def read_limits(folder: Path) -> dict[tuple[str, str], int]:
    """Job and model -> most rows that a replica was found to hold. Raises as `read_asked` does."""
    return {(event["job"], event["model"]): event["most"] for event in _events(folder, "limited")}


def read_open(
    folder: Path, number_ended: int, ended: Callable[[], Collection[int]]
) -> tuple[list[Asked], set[str]]:
    """What has been asked for and has not ended, read no further back than it was asked for.

    Args:
        folder: The sweep's folder.
        number_ended: How many trials have.
        ended: Gives their numbers; asked for only where something is open.

    Returns:
        The proposals, in order; ids of the specs that the latest driver has given to a worker since then.

    Raises:
        StoreError: If the ledger is not what was written.
    """
    found: dict[int, Asked] = {}
    dispatched: set[str] = set()
    known: Collection[int] | None = None
    is_latest, left = True, None
    path = ledger_path(folder)
    for event in (_checked(path, event) for event in read_log_backwards(path)):
        if event["event"] == "taken over":
            is_latest = False
        elif event["event"] == "dispatched" and is_latest:
            dispatched.update(event["specs"])
        elif event["event"] in _PROPOSALS:
            trials = {trial.trial: trial for trial in _trials(event)}
            if left is None and event["event"] == "asked":  # they are numbered from 0
                left = max(trials) + 1 - number_ended
            if left is None or left > 0:
                known = ended() if known is None else known
                found = {number: each for number, each in trials.items() if number not in known} | found
        if left is not None and len(found) >= left:
            break
    return [found[number] for number in sorted(found)], dispatched


def _events(folder: Path, *kinds: str) -> list[dict[str, Any]]:
    path = ledger_path(folder)
    events = (_checked(path, event) for event in read_log(path))
    return [event for event in events if event["event"] in kinds]


def _checked(path: Path, event: Any) -> dict[str, Any]:
    if not isinstance(event, dict) or "event" not in event:
        raise StoreError(f"{path} is not what was written: {str(event)[:60]} is no event")
    return event

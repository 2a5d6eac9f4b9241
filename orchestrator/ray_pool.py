"""Workers as Ray actors, one replica each.

Ray restarts and retries nothing: the driver owns both, so that no pack runs twice unseen.
"""

import logging
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import ray
from ray.exceptions import ActorDiedError, ActorUnavailableError, RayActorError, RayError, RayTaskError

from jobs.errors import ModelError, SteersweepError
from jobs.spec import ModelRef
from orchestrator.breaker import Breaker
from orchestrator.config import RunConfig
from orchestrator.pool import Event, Order
from orchestrator.ray_cluster import check_fits, draining_nodes, has_died, placement
from orchestrator.ray_worker import RAY_WORKER
from storage.durable import DiskFull

logger = logging.getLogger(__name__)

_WATCH_SECONDS = 2.0
_NODE_DIED = "node has died"
_NODE_LABEL = "ray.io/node-id"


@dataclass(slots=True)
class _Member:
    """An actor; times by the monotonic clock, in s.

    Attributes:
        actor: Its handle.
        node: Id of its node; None until it has one.
        is_loaded: Whether its replica is there; None until it was told to load it.
        asked: When it was asked whether it lives; None if it has answered.
        busy: Since when its order has given nothing; None if it has none.
        leaves: Why it is given no more orders; None if it stays.
    """

    actor: Any
    node: str | None = None
    is_loaded: bool | None = None
    asked: float | None = None
    busy: float | None = None
    leaves: str | None = None


class _Awaited(NamedTuple):
    """What a reference stands for: a worker lives, or has loaded, or delivers what its order gives."""

    worker: str
    kind: Literal["alive", "load", "order"]


class RayPool:
    """`orchestrator.pool.Pool` on a local Ray or on a running cluster.

    Dead workers are replaced, also those whose machine went away: the new one starts as soon as there is a
    machine for it.

    Args:
        folder: The sweep's folder, at the same path on every node.
        config: Number, size and patience of the workers.
        model: What they load before their first order; None leaves it to the orders.
        remote_uri: Where the sweep's files are exchanged if the machines do not share its folder.

    To be used inside `connected`.
    """

    def __init__(
        self, folder: Path, config: RunConfig, model: ModelRef | None, remote_uri: str | None = None
    ) -> None:
        self._folder = folder
        self._config = config
        self._model = model
        self._remote_uri = remote_uri
        self._members: dict[str, _Member] = {}
        self._awaited: dict[Any, _Awaited] = {}
        self._breaker = Breaker()
        self._numbers = iter(range(10**9))
        self._is_draining = False
        self._began = self._watched = time.monotonic()
        self._replenish()

    def _replenish(self) -> None:
        """Start workers in the place of those that are gone."""
        while len(self._members) < self._config.workers and not self._is_draining:
            self._spawn()

    def _spawn(self) -> None:
        config = self._config
        nodes = ",".join(sorted(self._breaker.avoided))
        avoided = {_NODE_LABEL: f"!in({nodes})"} if nodes else {}
        actor_type = RAY_WORKER.options(**placement(config, **avoided), max_restarts=0, max_task_retries=0)
        name = f"worker-{next(self._numbers)}"
        actor = actor_type.remote(
            str(self._folder),
            self._model,
            name=name,
            cpus=config.cpus_per_worker,
            gpus=config.gpus_per_worker,
            token_budget=config.token_budget,
            memory=config.memory,
            results=self._remote_uri,
        )
        self._members[name] = _Member(actor)
        self._awaited[actor.alive.remote()] = _Awaited(name, "alive")

    def _load(self) -> None:
        """Let workers load that have a machine, a few at a time: the weights may come from one disk."""
        loading = sum(member.is_loaded is False for member in self._members.values())
        for name, member in self._members.items():
            if loading < self._config.loads_at_once and member.node is not None and member.is_loaded is None:
                member.is_loaded = False
                loading += 1
                self._awaited[member.actor.load.remote()] = _Awaited(name, "load")

    def start(self, worker: str, order: Order) -> None:
        """Hand an order to an idle worker."""
        member = self._members[worker]
        member.busy = time.monotonic()
        stream = member.actor.run.options(num_returns="streaming").remote(order)
        self._awaited[stream] = _Awaited(worker, "order")

    def drain(self) -> None:
        """Replace nobody any more."""
        self._is_draining = True

    def events(self, timeout_seconds: float) -> list[Event]:
        """What has happened since the last call.

        Raises:
            ModelError: If a worker cannot load the model.
            SteersweepError: If workers die one after the other and none gives a delivery, no machine can hold
                one, or Ray itself has died.
        """
        if has_died():
            return self._end_all()
        self._replenish()
        self._load()
        events = self._ready_news(timeout_seconds)
        # After the news: whoever was not listened to for a while has not been silent.
        return events + self._watch()

    def _ready_news(self, timeout_seconds: float) -> list[Event]:
        if not self._awaited:
            time.sleep(timeout_seconds)
            return []
        ready, _ = ray.wait(list(self._awaited), num_returns=1, timeout=timeout_seconds)
        if ready:
            ready, _ = ray.wait(list(self._awaited), num_returns=len(self._awaited), timeout=0)
        events: list[Event] = []
        for reference in ready:
            awaited = self._awaited.pop(reference)
            if awaited.worker in self._members:
                events += self._news(reference, *awaited)
        return events

    def _end_all(self) -> list[Event]:
        """Ray has died, and every worker with it."""
        names = list(self._members)
        self._members.clear()
        if not self._is_draining:
            raise SteersweepError("Ray has died under the sweep; `steersweep resume` goes on from here")
        return [Event(name, "lost", reason="Ray has died", is_fault=False) for name in names]

    def _news(self, reference: Any, worker: str, kind: str) -> list[Event]:
        tell = {"alive": self._answered, "load": self._loaded, "order": self._delivered}[kind]
        try:
            return tell(reference, worker)
        except ActorDiedError as error:
            if error.actor_init_failed:
                raise ModelError(f"a worker cannot start: {_last_line(error)}") from error
            is_fault = not error.preempted and _NODE_DIED not in str(error)
            return [self._lost(worker, str(error).strip(), is_fault=is_fault)]
        except ActorUnavailableError as error:
            return self._ask_again(worker, str(error).strip())
        except RayActorError as error:
            return [self._let_go(worker, str(error).strip())]
        except RayTaskError as error:
            if kind == "load":
                cause = error.cause if isinstance(error.cause, SteersweepError) else error
                raise ModelError(f"a worker cannot start: {_last_line(cause)}") from error
            if isinstance(error.cause, DiskFull):
                lost = self._let_go(worker, str(error.cause), is_fault=False)
                return [lost._replace(is_disk_full=True)]
            if isinstance(error.cause, SteersweepError):
                raise error.cause from error
            return [self._let_go(worker, str(error).strip())]
        except RayError as error:
            raise SteersweepError(
                f"Ray cannot go on with {worker}: {_last_line(error)}; mend that, then `steersweep resume`"
            ) from error

    def _ask_again(self, worker: str, reason: str) -> list[Event]:
        """Its connection broke: Ray knows a moment later whether it or its machine has died."""
        member = self._members[worker]
        member.leaves, member.busy, member.asked = reason, None, time.monotonic()
        self._awaited[member.actor.alive.remote()] = _Awaited(worker, "alive")
        return []

    def _answered(self, reference: Any, worker: str) -> list[Event]:
        member = self._members[worker]
        node = ray.get(reference)
        member.asked = None
        if member.node is not None:
            return self._leave(worker)
        member.node = node
        return []

    def _loaded(self, reference: Any, worker: str) -> list[Event]:
        ray.get(reference)
        self._members[worker].is_loaded = True
        return [Event(worker, "ready")]

    def _delivered(self, stream: Any, worker: str) -> list[Event]:
        member = self._members[worker]
        try:
            delivery = ray.get(next(stream))
        except StopIteration:
            member.busy = None
            return [Event(worker, "done"), *self._leave(worker)]
        self._awaited[stream] = _Awaited(worker, "order")
        member.busy = time.monotonic()
        self._breaker.delivered(str(member.node))
        if delivery.is_worn:
            member.leaves = "its memory is in too many pieces"
        return [Event(worker, "delivery", delivery)]

    def _watch(self) -> list[Event]:
        """Ask all whether they live, now and then; let those go that do not answer, hang or have to leave."""
        now = time.monotonic()
        if now - self._watched < _WATCH_SECONDS:
            return []
        self._watched = now
        self._check_machines(now)
        drained = set() if self._is_draining else draining_nodes()
        events = []
        for worker, member in list(self._members.items()):
            if member.node is None:
                continue
            if member.asked is None:
                member.asked = now
                self._awaited[member.actor.alive.remote()] = _Awaited(worker, "alive")
            if member.node in drained:
                member.leaves = "its machine is taken away"
            if (why := self._silence(member, now)) is not None:
                events.append(self._let_go(worker, why))
            else:
                events += self._leave(worker)
        return events

    def _silence(self, member: _Member, now: float) -> str | None:
        """Why a worker is given up that has died without a word; None if it has not."""
        patience, limit = self._config.answer_seconds, self._config.pack_seconds
        if member.asked is not None and now - member.asked > patience:
            return f"it did not answer for {patience:g} s (answer_seconds)"
        if limit is not None and member.busy is not None and now - member.busy > limit:
            return f"its pack gave nothing for {limit:g} s (pack_seconds)"
        return None

    def _leave(self, worker: str) -> list[Event]:
        """Let a worker go that has to, unless it has an order."""
        member = self._members[worker]
        if member.leaves is None or member.busy is not None:
            return []
        return [self._let_go(worker, member.leaves, is_fault=False)]

    def _let_go(self, worker: str, reason: str, *, is_fault: bool = True) -> Event:
        """End a worker that may still be alive."""
        ray.kill(self._members[worker].actor)
        return self._lost(worker, reason, is_fault=is_fault)

    def _lost(self, worker: str, reason: str, *, is_fault: bool = True) -> Event:
        member = self._members.pop(worker)
        if is_fault:
            self._breaker.died(member.node, reason, others={other.node for other in self._members.values()})
        return Event(worker, "lost", reason=reason, is_fault=is_fault)

    def _check_machines(self, now: float) -> None:
        """See to it that workers find machines.

        Raises:
            SteersweepError: If none has had one for a long time, and no machine could hold one.
        """
        if any(member.node for member in self._members.values()):
            self._began = now
        if now - self._began < self._config.wait_seconds:
            return
        self._began = now
        check_fits(self._config)
        logger.warning("no worker could start for %g s: the cluster is busy", self._config.wait_seconds)
        if self._breaker.avoided:
            self._forgive()

    def _forgive(self) -> None:
        """Take the nodes again where workers have died: there may be no others left."""
        self._breaker.forgive()
        for worker in list(self._members):
            self._let_go(worker, "it waits for another machine than there is", is_fault=False)

    def close(self) -> None:
        """Let the actors go. Closing again does nothing."""
        while self._members and not has_died():
            ray.kill(self._members.popitem()[1].actor)


def _last_line(error: Exception) -> str:
    """What an actor's own exception says, without the traceback that Ray wraps around it."""
    return str(error).strip().splitlines()[-1]

"""When deaths of workers are no bad luck any more."""

import logging
from collections import Counter
from collections.abc import Iterable

from jobs.errors import SteersweepError

logger = logging.getLogger(__name__)

_DEATHS_IN_A_ROW = 20
_DEATHS_OF_A_NODE = 5
_NONE_STARTED = (
    "could not be started: perhaps this machine has a Ray token and the cluster takes none "
    "(RAY_AUTH_MODE=disabled), or another version of Ray or Python"
)


class Breaker:
    """Counts deaths in a row, of all workers and of those of each node.

    Attributes:
        avoided: Ids of nodes where no more workers should be started.
    """

    def __init__(self) -> None:
        self.avoided: set[str] = set()
        self._deaths = 0
        self._has_started = False
        self._node_deaths: Counter[str] = Counter()

    def delivered(self, node: str) -> None:
        """A worker on a node has done something."""
        self._deaths = 0
        self._has_started = True
        self._node_deaths.pop(node, None)

    def died(self, node: str | None, reason: str, *, others: Iterable[str | None]) -> None:
        """A worker has died by its own fault.

        Args:
            node: Id of its node; None if it had none yet.
            reason: What is known about its death.
            others: The nodes of the other workers: the last one that is left is never avoided.

        Raises:
            SteersweepError: If too many died and none has done anything in between.
        """
        last = reason.strip().rpartition("\n")[2]
        self._deaths += 1
        self._has_started |= node is not None
        if self._deaths > _DEATHS_IN_A_ROW:
            what = "died and none gave a delivery in between" if self._has_started else _NONE_STARTED
            raise SteersweepError(
                f"{self._deaths} workers {what}; the last one said: {last}; mend that, then "
                "`steersweep resume`"
            )
        if node is None:
            return
        self._node_deaths[node] += 1
        if self._node_deaths[node] >= _DEATHS_OF_A_NODE and set(others) - {None, node, *self.avoided}:
            self.avoided.add(node)
            logger.warning(
                "%d workers in a row died on the node %s: no more are started there; the last said: %s",
                *(self._node_deaths[node], node, last),
            )

    def forgive(self) -> None:
        """Take every node again."""
        self.avoided.clear()
        self._node_deaths.clear()

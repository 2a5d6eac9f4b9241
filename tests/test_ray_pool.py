"""Workers on a real Ray that die, stand still, hang, or find no machine."""

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from jobs.errors import SteersweepError
from jobs.spec import ModelRef
from orchestrator.config import RunConfig
from orchestrator.pool import Event, Order, OrderRow
from orchestrator.ray_cluster import connected
from orchestrator.ray_pool import RayPool
from orchestrator.worker_logs import worker_log
from tests.models import save_tiny

pytestmark = pytest.mark.ray


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_tiny(tmp_path_factory.mktemp("pool") / "model"))


@pytest.fixture(scope="module")
def local(model: str) -> Iterator[None]:
    with connected(RunConfig(model=model), None):
        yield


def order(model: str, attempt: str, **params: Any) -> Order:
    rows = (OrderRow("spec", {"x": 1, **params}, 0),)
    return Order(attempt=attempt, job="tests.fake_job", model=ModelRef(id=model), rows=rows, artifacts={})


def pool_of(folder: Path, model: str, **changes: Any) -> RayPool:
    config = RunConfig(model=model, **{"workers": 1, "answer_seconds": 5, **changes})
    return RayPool(folder, config, config.model_ref)


def wait_for(pool: RayPool, kind: str, seconds: float = 90) -> Event:
    """The next event of a kind; others are passed over."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        for event in pool.events(0.5):
            if event.kind == kind:
                return event
    raise AssertionError(f"no {kind} within {seconds} s")


@pytest.mark.usefixtures("local")
@pytest.mark.parametrize(
    ("mode", "said"),
    [
        ("kill once", "died"),
        ("freeze once", "it did not answer for 5 s (answer_seconds)"),
        ("hang once", "its pack gave nothing for 4 s (pack_seconds)"),
    ],
)
def test_a_worker_that_is_lost_is_replaced_and_its_order_can_be_given_again(
    tmp_path: Path, model: str, mode: str, said: str
) -> None:
    pool = pool_of(tmp_path, model, pack_seconds=4 if mode == "hang once" else None)
    try:
        first = wait_for(pool, "ready").worker
        pool.start(first, order(model, "a1", mode=mode, group=str(tmp_path / "flag")))
        lost = wait_for(pool, "lost")
        assert (lost.worker, lost.is_fault) == (first, True)
        assert said in str(lost.reason)
        second = wait_for(pool, "ready").worker
        assert second != first
        pool.start(second, order(model, "a2", mode=mode, group=str(tmp_path / "flag")))
        delivery = wait_for(pool, "delivery").delivery
        assert delivery is not None
        assert (delivery.error, [row.spec for row in delivery.finished]) == (None, ["spec"])
        assert wait_for(pool, "done").worker == second
        assert "=== attempt a2" in worker_log(tmp_path, second).read_text().splitlines()
    finally:
        pool.close()


@pytest.mark.usefixtures("local")
def test_a_pool_that_is_drained_replaces_nobody(tmp_path: Path, model: str) -> None:
    pool = pool_of(tmp_path, model)
    try:
        worker = wait_for(pool, "ready").worker
        pool.drain()
        pool.start(worker, order(model, "a", mode="kill once", group=str(tmp_path / "flag")))
        wait_for(pool, "lost")
        assert pool.events(1.0) == []
        assert pool._members == {}
    finally:
        pool.close()


@pytest.mark.usefixtures("local")
def test_a_machine_that_never_comes_is_said_with_what_is_missing(tmp_path: Path, model: str) -> None:
    pool = pool_of(tmp_path, model, resources={"quantum": 2}, labels={"region": "moon"}, wait_seconds=2)
    try:
        with pytest.raises(SteersweepError) as caught:
            wait_for(pool, "ready", seconds=30)
        assert "no worker could start for 2 s" in str(caught.value)
        assert "{'CPU': 1, 'quantum': 2.0} and the labels {'region': 'moon'}" in str(caught.value)
        assert "have {'CPU': " in str(caught.value)
        assert "'quantum': 0}" in str(caught.value)
    finally:
        pool.close()


@pytest.mark.usefixtures("local")
def test_no_more_workers_load_at_a_time_than_may(tmp_path: Path, model: str) -> None:
    pool = pool_of(tmp_path, model, workers=2, loads_at_once=1)
    try:
        ready = 0
        while ready < 2:
            ready += sum(event.kind == "ready" for event in pool.events(0.5))
            states = [member.is_loaded for member in pool._members.values()]
            assert states.count(False) <= 1
            assert states.count(True) == ready
    finally:
        pool.close()

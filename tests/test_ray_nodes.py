"""Machines of a real Ray cluster that go away."""

from pathlib import Path

import pytest
import ray
from ray.cluster_utils import Cluster

from tests.models import save_tiny
from tests.test_ray_pool import order, pool_of, wait_for

pytestmark = pytest.mark.ray


@pytest.mark.chaos
def test_a_node_that_goes_away_is_nobodys_fault_and_its_worker_moves(tmp_path: Path) -> None:
    model = str(save_tiny(tmp_path / "model"))
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
    try:
        first = cluster.add_node(num_cpus=1, resources={"slot": 1})
        ray.init(address=cluster.address, log_to_driver=False)
        pool = pool_of(tmp_path, model, resources={"slot": 1})
        worker = wait_for(pool, "ready").worker
        pool.start(worker, order(model, "a1", mode="hang once", group=str(tmp_path / "flag")))
        while not list(tmp_path.glob("flag*")):
            pool.events(0.2)
        cluster.remove_node(first, allow_graceful=False)
        lost = wait_for(pool, "lost")
        assert (lost.worker, lost.is_fault) == (worker, False), lost.reason
        cluster.add_node(num_cpus=1, resources={"slot": 1})
        again = wait_for(pool, "ready").worker
        pool.start(again, order(model, "a2", mode="hang once", group=str(tmp_path / "flag")))
        assert wait_for(pool, "delivery").worker == again
        pool.close()
    finally:
        ray.shutdown()
        cluster.shutdown()

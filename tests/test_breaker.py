"""When deaths of workers end a sweep, and when they close a node."""

import pytest

from jobs.errors import SteersweepError
from orchestrator.breaker import Breaker


def test_deaths_without_a_delivery_in_between_end_the_sweep_with_the_last_reason() -> None:
    breaker = Breaker()
    for death in range(20):
        breaker.died("a", f"death {death}", others=())
    with pytest.raises(SteersweepError, match=r"21 workers died and none gave a delivery.*: the last straw;"):
        breaker.died(None, "some text\nthe last straw", others=())


def test_workers_that_never_started_are_said_to_be_that() -> None:
    breaker = Breaker()
    for _ in range(20):
        breaker.died(None, "refused", others=())
    with pytest.raises(SteersweepError, match=r"21 workers could not be started: .*RAY_AUTH_MODE.*: refused"):
        breaker.died(None, "refused", others=())
    breaker.delivered("a")
    for _ in range(20):
        breaker.died(None, "refused", others=())
    with pytest.raises(SteersweepError, match="21 workers died"):
        breaker.died(None, "refused", others=())


def test_a_delivery_in_between_makes_deaths_bad_luck() -> None:
    breaker = Breaker()
    for _ in range(100):
        breaker.died("a", "bad luck", others=("b",))
        breaker.delivered("a")
    assert breaker.avoided == set()


def test_a_node_whose_workers_die_in_a_row_is_avoided_until_it_is_forgiven() -> None:
    breaker = Breaker()
    for death in range(5):
        assert breaker.avoided == set(), death
        breaker.delivered("b")
        breaker.died("a", "a bad disk", others=("a", "b", None))
    assert breaker.avoided == {"a"}
    breaker.forgive()
    assert breaker.avoided == set()
    breaker.died("a", "a bad disk", others=("b",))
    assert breaker.avoided == set(), "it counts from the start again"


@pytest.mark.parametrize("others", [(), ("a",), (None,)])
def test_the_last_node_is_never_avoided(others: tuple[str | None, ...]) -> None:
    breaker = Breaker()
    for _ in range(10):
        breaker.died("a", "a bad disk", others=others)
    assert breaker.avoided == set()


def test_nor_is_the_last_that_is_left_beside_those_avoided() -> None:
    breaker = Breaker()
    for node, other in (("a", "b"), ("b", "a")):
        for _ in range(5):
            breaker.died(node, "a bad disk", others=(other,))
    assert breaker.avoided == {"a"}

"""Work in lanes finds what it finds in one, and leaves nothing behind."""

import threading
import time
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from jobs.engine import lanes
from jobs.engine.ablation import ablated
from jobs.engine.decoding import Continuation, Decoding, Work, generate
from jobs.engine.groups import next_token
from jobs.engine.interventions import Add, AnyIntervention, Clamp, ProjectOut
from jobs.engine.replica import Replica
from jobs.engine.sampling import Sampling
from jobs.engine.tables import row_tables
from tests.models import ARCHITECTURES, HIDDEN, LAYERS, tiny_replica

PROMPTS = [[30, 31, 32, *range(40, 41 + length)] for length in (1, 7, 2, 5, 3, 1, 4)]


def vector(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=HIDDEN)


ROWS: list[list[AnyIntervention]] = [
    [],
    *([Add(layer=layer, vector=4 * vector(layer))] for layer in range(LAYERS)),
    [Clamp(layer=1, direction=vector(9), value=3.0, tokens="generated")],
    [ProjectOut(layer=2, direction=vector(8), site="mlp")],
]
WORK = [Work(prompt, row, seed=row) for row in range(len(ROWS)) for prompt in range(len(PROMPTS))]


@pytest.fixture(autouse=True)
def two_threads(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Lanes for however little work."""
    threads = torch.get_num_threads()
    monkeypatch.setattr(lanes, "_FEWEST", 1)
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> set[tuple[bool, object]]:
    """Whether each model has run a pass in the first thread, or in another."""
    seen = set()
    forward = Replica.forward

    def noting(replica: Replica, *arguments: object, **options: object) -> torch.Tensor:
        seen.add((threading.current_thread() is threading.main_thread(), replica.model))
        return forward(replica, *arguments, **options)

    monkeypatch.setattr(Replica, "forward", noting)
    return seen


def lanes_in(passes: set[tuple[bool, object]]) -> int:
    """How many lanes there were; the thread of a quick one may have served the next."""
    return sum(not in_first for in_first, _ in passes)


def completed(replica: Replica, decoding: Decoding) -> dict[int, Continuation]:
    return dict(generate(replica, PROMPTS, row_tables(replica, ROWS), WORK, decoding))


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_completions_are_those_of_one_lane(
    name: str, temperature: float, monkeypatch: pytest.MonkeyPatch, passes: set[tuple[bool, object]]
) -> None:
    decoding = Decoding(max_new_tokens=5, sampling=Sampling(temperature=temperature))
    found = completed(tiny_replica(name), decoding)
    assert lanes_in(passes) == 2
    monkeypatch.setattr(lanes, "_FEWEST", 10**9)
    expected = completed(tiny_replica(name), decoding)
    assert found.keys() == expected.keys() == set(range(len(WORK)))
    for index, each in expected.items():
        assert found[index].tokens == each.tokens
        assert found[index].fired == each.fired == each.intended == found[index].intended


def test_logits_are_those_of_one_lane(monkeypatch: pytest.MonkeyPatch) -> None:
    replica = tiny_replica("llama")
    tables, pairs = row_tables(replica, ROWS), [(each.prompt, each.row) for each in WORK]
    found = dict(next_token(replica, PROMPTS, tables, pairs))
    monkeypatch.setattr(lanes, "_FEWEST", 10**9)
    expected = dict(next_token(tiny_replica("llama"), PROMPTS, tables, pairs))
    for index, logits_V in expected.items():
        torch.testing.assert_close(found[index], logits_V, rtol=1e-9, atol=1e-9)


def test_a_lane_has_modules_of_its_own_and_the_same_weights_and_hooks() -> None:
    replica = tiny_replica("llama")
    seen: list[object] = []
    replica.blocks[0].register_forward_hook(lambda *_: seen.append(1))
    lane = replica.lane(0, of=2, stopped=threading.Event())
    assert not {*map(id, replica.model.modules())} & {*map(id, lane.model.modules())}
    assert [*map(id, replica.model.parameters())] == [*map(id, lane.model.parameters())]
    assert lane.memory == replica.memory // 2
    lane.logits([[1, 2]], keep=1)
    assert seen == [1]
    assert lane.parts[0].mlp is not replica.parts[0].mlp


def test_weights_that_are_ablated_are_ablated_in_lanes(monkeypatch: pytest.MonkeyPatch) -> None:
    replica = tiny_replica("llama")
    decoding = Decoding(max_new_tokens=4)
    before = completed(replica, decoding)
    with ablated(replica, vector(3)):
        found = completed(replica, decoding)
        monkeypatch.setattr(lanes, "_FEWEST", 10**9)
        expected = completed(replica, decoding)
    assert [found[index].tokens for index in found] != [before[index].tokens for index in found]
    assert {index: each.tokens for index, each in found.items()} == {
        index: each.tokens for index, each in expected.items()
    }


def test_what_a_lane_keeps_is_there_for_the_next_call(monkeypatch: pytest.MonkeyPatch) -> None:
    replica = tiny_replica("llama")
    work = [(prompt, 0) for prompt in range(len(PROMPTS))]
    tables = row_tables(replica, [[]])
    expected = dict(next_token(replica, PROMPTS, tables, work))
    monkeypatch.setattr(Replica, "forward", lambda *_, **__: pytest.fail("computed again"))
    found = dict(next_token(replica, PROMPTS, tables, work))
    assert all(torch.equal(found[index], expected[index]) for index in expected)


def test_the_threads_come_back_in_whichever_order_lanes_end() -> None:
    torch.set_num_threads(4)
    decoding = Decoding(max_new_tokens=50, stops=False)
    running = []
    for _ in range(2):
        replica = tiny_replica("llama")
        running.append(generate(replica, PROMPTS, row_tables(replica, ROWS), WORK, decoding))
        next(running[-1])
    for found in running:
        assert torch.get_num_threads() == 2
        found.close()
    assert torch.get_num_threads() == 4


def test_an_error_in_one_lane_ends_the_other_and_is_raised() -> None:
    replica, running = tiny_replica("llama"), threading.active_count()
    passes = []

    def fail_late(*_: object) -> None:
        passes.append(threading.current_thread().name)
        if len(passes) == 12:
            raise ZeroDivisionError("told to fail")

    handle = replica.blocks[0].register_forward_pre_hook(fail_late)
    with pytest.raises(ZeroDivisionError, match="told to fail"):
        completed(replica, Decoding(max_new_tokens=200, stops=False))
    assert len(passes) < 100
    assert torch.get_num_threads() == 2
    assert threading.active_count() == running
    handle.remove()
    completed(replica, Decoding(max_new_tokens=3))


def test_a_reader_that_goes_away_ends_the_lanes() -> None:
    replica, running = tiny_replica("llama"), threading.active_count()
    steps = []
    replica.blocks[0].register_forward_pre_hook(lambda *_: steps.append(1))
    decoding = Decoding(max_new_tokens=200, stops=False, slots=8)
    found = generate(replica, PROMPTS, row_tables(replica, ROWS), WORK, decoding)
    next(found)
    found.close()
    assert threading.active_count() == running
    assert torch.get_num_threads() == 2
    ended = len(steps)
    assert ended < 200 * len(WORK) // 8


def test_memory_that_runs_out_in_a_lane_loses_no_row() -> None:
    replica = tiny_replica("llama")
    replica.token_budget = 64
    expected = completed(tiny_replica("llama"), Decoding(max_new_tokens=5))

    def run_out(module: object, inputs: tuple[torch.Tensor, ...]) -> None:
        if inputs[0].shape[0] * inputs[0].shape[1] > 16:
            raise torch.OutOfMemoryError("told to run out")

    replica.blocks[0].register_forward_pre_hook(run_out)
    found = completed(replica, Decoding(max_new_tokens=5, slots=16))
    assert {index: each.tokens for index, each in found.items()} == {
        index: each.tokens for index, each in expected.items()
    }
    assert replica.token_budget < 64


def test_what_a_replica_may_keep_is_the_same_after_lanes() -> None:
    replica = tiny_replica("llama")
    replica.memory = 2**20 + 1
    completed(replica, Decoding(max_new_tokens=2))
    assert replica.memory == 2**20 + 1


def test_what_is_started_while_lanes_run_runs_beside_them(passes: set[tuple[bool, object]]) -> None:
    replica = tiny_replica("llama")
    expected = completed(tiny_replica("llama"), Decoding(max_new_tokens=20))
    tables, pairs = row_tables(replica, ROWS), [(each.prompt, each.row) for each in WORK]
    outer = generate(replica, PROMPTS, tables, WORK, Decoding(max_new_tokens=20, slots=8))
    found = dict([next(outer)])
    torch.set_num_threads(2)
    passes.clear()
    inner = dict(next_token(replica, PROMPTS, tables, pairs))
    assert any(in_first for in_first, _ in passes)
    found |= dict(outer)
    assert len(inner) == len(WORK)
    assert {index: each.tokens for index, each in found.items()} == {
        index: each.tokens for index, each in expected.items()
    }
    passes.clear()
    completed(replica, Decoding(max_new_tokens=2))
    assert lanes_in(passes) == 2


def test_lanes_wait_for_a_slow_reader(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lanes, "_MOST_WAITING", 3)
    replica = tiny_replica("llama")
    began: list[int] = []
    forward = replica.blocks[-1].register_forward_pre_hook(lambda *_: began.append(1))
    found = generate(replica, PROMPTS, row_tables(replica, ROWS), WORK, Decoding(max_new_tokens=2, slots=1))
    next(found)
    for _ in range(200):
        before = len(began)
        time.sleep(0.05)
        if len(began) == before:
            break
    waiting = len(began)
    assert len(dict(found)) == len(WORK) - 1
    assert waiting < len(began)
    forward.remove()

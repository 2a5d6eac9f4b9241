"""Steps on tensors that stay in place give what other steps give. Without a GPU they are not replayed."""

import numpy as np
import pytest
import torch

from jobs.engine import decoding as decoding_module
from jobs.engine.decoding import Continuation, Decoding, Work, generate
from jobs.engine.interventions import Add, Clamp, Intervention, ProjectOut
from jobs.engine.replica import Replica
from jobs.engine.sampling import Sampling
from jobs.engine.static import StaticStep, can_stay, takes_masks
from jobs.engine.tables import row_tables
from tests.models import ARCHITECTURES, HIDDEN, tiny_replica

WINDOWED = ("mistral", "gemma2", "gemma3")
PROMPTS = [[5, 6, 7, 8, 9], [5, 6, 11], [20, 21, 22, 23, 24, 25, 26]]


def vector(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=HIDDEN)


def rows() -> list[list[Intervention]]:
    return [
        [],
        [Add(layer=1, vector=vector(1))],
        [Add(layer=0, vector=vector(2), tokens="generated"), ProjectOut(layer=2, direction=vector(3))],
        [Clamp(layer=2, direction=vector(4), value=2.0, site="before")],
        [Add(layer=3, vector=vector(5), tokens="prompt"), Add(layer=1, vector=vector(6), site="mlp")],
        [Add(layer=2, vector=vector(7), tokens=(-2, -1))],
    ]


def completed(replica: Replica, decoding: Decoding) -> dict[int, Continuation]:
    work = [Work(prompt, row, seed=7 * prompt + row) for row in range(6) for prompt in range(3)]
    return dict(generate(replica, PROMPTS, row_tables(replica, rows()), work, decoding))


@pytest.mark.parametrize("name", [name for name in ARCHITECTURES if name not in WINDOWED])
@pytest.mark.parametrize(("slots", "temperature"), [(64, 0.0), (5, 0.0), (18, 1.5)])
def test_static_steps_give_the_same_tokens_and_counts(
    name: str, slots: int, temperature: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    replica = tiny_replica(name)
    decoding = Decoding(
        max_new_tokens=12, stops=False, slots=slots, sampling=Sampling(temperature=temperature)
    )
    expected = completed(replica, decoding)
    monkeypatch.setattr(decoding_module, "can_stay", lambda replica: True)
    steps = []
    run = StaticStep.run
    monkeypatch.setattr(
        StaticStep, "run", lambda self, tokens, positions: steps.append(1) or run(self, tokens, positions)
    )
    found = completed(replica, decoding)
    assert steps
    assert found.keys() == expected.keys()
    for index, each in found.items():
        assert each.tokens == expected[index].tokens
        assert each.fired == expected[index].fired == each.intended


def test_rows_that_stop_leave_and_smaller_steps_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    replica = tiny_replica("llama")
    decoding = Decoding(max_new_tokens=40, slots=18)
    free = completed(replica, Decoding(max_new_tokens=40, slots=18, stops=False))
    # Tokens that come up at different times in different rows.
    replica.stop_ids = frozenset(found.tokens[3 + index] for index, found in free.items() if index % 2)
    expected = completed(replica, decoding)
    assert len({len(found.tokens) for found in expected.values()}) > 2
    monkeypatch.setattr(decoding_module, "can_stay", lambda replica: True)
    sizes = set()
    step = StaticStep._step
    monkeypatch.setattr(StaticStep, "_step", lambda self, slots: sizes.add(slots) or step(self, slots))
    found = completed(replica, decoding)
    assert {index: each.tokens for index, each in found.items()} == {
        index: each.tokens for index, each in expected.items()
    }
    assert len(sizes) > 1


def test_windows_of_attention_and_the_cpu_do_not_stay() -> None:
    assert not can_stay(tiny_replica("mistral"))
    assert not can_stay(tiny_replica("llama"))


def test_attention_that_makes_more_of_a_mask_takes_no_static_steps() -> None:
    assert takes_masks(tiny_replica("llama"))
    assert not takes_masks(tiny_replica("mistral"))
    for name, value in (("attention_chunk_size", 8), ("alibi", True)):
        replica = tiny_replica("llama")
        setattr(replica.model.config, name, value)
        assert not takes_masks(replica)
    eager = tiny_replica("llama")
    eager.model.set_attn_implementation("eager")
    assert not takes_masks(eager)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
def test_graphs_replay_the_same_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    replica = tiny_replica("llama")
    replica.model.to("cuda")
    assert can_stay(replica)
    decoding = Decoding(max_new_tokens=12, stops=False)
    found = completed(replica, decoding)
    monkeypatch.setattr(decoding_module, "can_stay", lambda replica: False)
    expected = completed(replica, decoding)
    assert {index: each.tokens for index, each in found.items()} == {
        index: each.tokens for index, each in expected.items()
    }


def test_steps_that_cannot_be_recorded_are_made_one_by_one_and_counted_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    replica = tiny_replica("llama")
    decoding = Decoding(max_new_tokens=6, stops=False)
    expected = completed(replica, decoding)
    monkeypatch.setattr(decoding_module, "can_stay", lambda replica: True)
    made = StaticStep.__init__

    def replaying(self: StaticStep, *arguments: object) -> None:
        made(self, *arguments)
        self._replays = True

    def refusing(self: StaticStep, slots: int) -> None:
        self._step(slots)
        raise RuntimeError("told to refuse")

    monkeypatch.setattr(StaticStep, "__init__", replaying)
    monkeypatch.setattr(StaticStep, "_recorded", refusing)
    found = completed(replica, decoding)
    assert "told to refuse" in caplog.text
    for index, each in found.items():
        assert each.tokens == expected[index].tokens
        assert each.fired == each.intended

"""Low-rank changes of the feed-forward output: against edited weights, differences and plain loops."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from jobs import adapters as job
from jobs.engine.adapting import adapted, output_matrix
from jobs.engine.decoding import Decoding, Work, generate
from jobs.engine.sites import Place, picked
from jobs.engine.slices import Slice
from jobs.engine.tables import row_tables
from jobs.errors import ModelError, SpecError
from jobs.reading import behaviours
from jobs.resolve import make_params
from jobs.spec import Outcome, Row, Status
from jobs.unsupervised.adapters import (
    AdapterGoal,
    AdapterGround,
    Adapters,
    Normalised,
    learn_adapters,
    spread,
)
from jobs.unsupervised.objective import movement
from tests.models import ARCHITECTURES, FLOAT32_ONLY, LAYERS, Artifacts, tiny_replica

PROMPTS = [[5, 6, 7, 8, 9], [3, 4, 5], [9, 8, 7, 6, 5, 4, 3]]
DENSE = [name for name in ARCHITECTURES if name != "mixtral"]
KINDS: list[Normalised] = ["column", "frobenius", "spectral", "notebook"]


def ground_of(name: str, goal: AdapterGoal, source: int = 1) -> AdapterGround:
    slice_ = Slice(tiny_replica(name), PROMPTS, source=source - 1, target=LAYERS - 2)
    return AdapterGround(slice_, slice_.positions_NT > 0, goal)


@pytest.mark.parametrize("name", DENSE)
@pytest.mark.parametrize("source", [0, 1])
def test_adapters_of_a_batch_do_what_edited_weights_do(name: str, source: int) -> None:
    goal = AdapterGoal(radius=2.0, rank=3, power=2.0, root=2.0)
    ground = ground_of(name, goal, source)
    replica, adapters = ground._slice.replica, ground.drawn(2, seed=0)
    values, _, shares = ground.look(adapters, [0, 2])
    place = Place(LAYERS - 2, "after")

    def target(prompt: list[int]) -> Tensor:
        with torch.no_grad(), picked(replica, [place], lambda h: h[0].clone()) as found:
            replica.logits([prompt], keep=1)
        return found[place]

    for adapter in range(2):
        expected = 0.0
        for prompt in (PROMPTS[0], PROMPTS[2]):
            before = target(prompt)
            with adapted(replica, source, adapters.change(goal, adapter)):
                after = target(prompt)
            assert torch.equal(target(prompt), before)
            expected += float((after - before)[1:].norm())
        assert float(values[adapter]) == pytest.approx(expected, rel=1e-3 if name in FLOAT32_ONLY else 1e-6)
    torch.testing.assert_close(shares.sum(dim=2), torch.ones_like(shares[..., 0]))


def test_a_mixture_of_experts_is_refused() -> None:
    with pytest.raises(ModelError, match="layer 1 has a matrix for each expert"):
        output_matrix(tiny_replica("mixtral"), 1)


def test_a_layer_that_does_not_exist_is_refused() -> None:
    with pytest.raises(SpecError, match=r"layers \[9\] do not exist"):
        output_matrix(tiny_replica("llama"), 9)


def test_weights_come_back_after_an_error() -> None:
    replica = tiny_replica("llama")
    before = replica.blocks[1].mlp.down_proj.weight
    with pytest.raises(ZeroDivisionError), adapted(replica, 1, torch.ones_like(before)):
        raise ZeroDivisionError
    assert replica.blocks[1].mlp.down_proj.weight is before


@pytest.mark.parametrize("few_tokens", [0.0, 1.5])
def test_gradients_are_finite_differences(few_tokens: float) -> None:
    goal = AdapterGoal(radius=1.0, rank=2, power=3.0, root=2.0, few_tokens=few_tokens)
    ground = ground_of("gpt2", goal)
    adapters = ground.drawn(2, seed=0)
    _, gradients, _ = ground.look(adapters, [0, 1, 2])
    ways = Adapters(*(torch.randn_like(each) for each in adapters))
    ahead, behind = (
        ground.look(
            Adapters(*(each + step * way for each, way in zip(adapters, ways, strict=True))), [0, 1, 2]
        )[0]
        for step in (1e-5, -1e-5)
    )
    along = sum((gradient * way).flatten(1).sum(dim=1) for gradient, way in zip(gradients, ways, strict=True))
    torch.testing.assert_close(along, (ahead - behind) / 2e-5, rtol=1e-6, atol=1e-6)


def test_normalised_adapters_are_as_large_as_they_say() -> None:
    matrices = Adapters(torch.randn((3, 20, 4)), torch.randn((3, 10, 4)))
    column = matrices.normalised(AdapterGoal(radius=1, rank=4, normalised="column"))
    for each in column:
        torch.testing.assert_close(each.norm(dim=1), torch.ones(3, 4))
    frobenius = matrices.normalised(AdapterGoal(radius=1, rank=4, normalised="frobenius"))
    for each in frobenius:
        torch.testing.assert_close(each.flatten(1).norm(dim=1), torch.full((3,), 2.0))
    spectral = matrices.normalised(AdapterGoal(radius=1, rank=4, normalised="spectral"))
    sizes = torch.linalg.svdvals(spectral.b_KDQ @ spectral.a_KHQ.mT)[:, 0]
    torch.testing.assert_close(sizes, torch.ones(3), rtol=1e-4, atol=1e-4)
    notebook_goal = AdapterGoal(radius=1, rank=4, normalised="notebook")
    notebook = matrices.normalised(notebook_goal)
    torch.testing.assert_close(notebook.a_KHQ.norm(dim=2), torch.ones(3, 20))
    assert notebook_goal.factor == 0.25


@pytest.mark.parametrize("normalised", KINDS)
def test_learning_raises_the_objective_and_keeps_the_size(normalised: Normalised) -> None:
    goal = AdapterGoal(radius=0.5, rank=3, normalised=normalised)
    ground = ground_of("llama", goal)
    start = ground.drawn(3, seed=1)
    found = learn_adapters(ground, start, [0, 1], steps=60, learning_rate=1e-2)
    assert (found.values_K > found.history_SK[0]).all()
    for kept, allowed in zip(found.adapters, found.adapters.normalised(goal), strict=True):
        torch.testing.assert_close(kept, allowed, rtol=1e-6, atol=1e-6)
    one = Adapters(*(each[[1]] for each in start))
    alone = learn_adapters(ground, one, [0, 1], steps=60, learning_rate=1e-2)
    torch.testing.assert_close(alone.values_K[0], found.values_K[1], rtol=1e-6, atol=1e-8)


def test_amsgrad_takes_the_steps_of_a_plain_loop() -> None:
    goal = AdapterGoal(radius=1.0, rank=2)
    ground = ground_of("llama", goal)
    start = ground.drawn(1, seed=2)
    found = learn_adapters(ground, start, [0], steps=4)
    a, b = (each.clone() for each in start)
    optimiser = torch.optim.AdamW([a, b], lr=1e-3, betas=(0.9, 0.98), weight_decay=0.0, amsgrad=True)
    for _ in range(4):
        _, gradients, _ = ground.look(Adapters(a, b), [0])
        for matrix, gradient in ((a, gradients.a_KHQ), (b, gradients.b_KDQ)):
            along = (gradient * matrix).sum(dim=1, keepdim=True)
            matrix.grad = -(gradient - along * matrix)
        optimiser.step()
        for matrix in (a, b):
            matrix /= matrix.norm(dim=1, keepdim=True)
    torch.testing.assert_close(found.adapters.a_KHQ, a)
    torch.testing.assert_close(found.adapters.b_KDQ, b)


def test_the_penalty_moves_the_change_to_few_tokens() -> None:
    spreads = []
    for weight in (0.0, 30.0):
        ground = ground_of("llama", AdapterGoal(radius=0.5, rank=3, few_tokens=weight))
        found = learn_adapters(ground, ground.drawn(3, seed=1), [2], steps=150, learning_rate=1e-2)
        spreads.append(float(found.spread_KN.mean()))
    assert spreads[1] < spreads[0] - 0.02


def test_spread_is_0_for_one_token_and_1_for_equal_ones() -> None:
    counted = torch.tensor([[True, True, True, False]] * 3)
    shares = torch.tensor([[1.0, 0, 0, 0], [1 / 3, 1 / 3, 1 / 3, 0], [0.5, 0.5, 0, 0]])
    expected = torch.tensor([0.0, 1.0, math.log(2) / math.log(3)])
    torch.testing.assert_close(spread(shares, counted), expected, rtol=1e-5, atol=1e-6)


ROWS = [
    {"split": "extract", "prompt": "Tell me a story."},
    {"split": "select", "prompt": "Why is the sea salt?"},
    {"split": "report", "prompt": "Name a bird."},
]


@pytest.fixture
def prompts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    def embed(texts: Any, encoder: str) -> np.ndarray:
        return np.array([[text.count(letter) + 0.1 for letter in "abcdefgh"] for text in texts])

    monkeypatch.setattr(behaviours, "embed", embed)
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return str(path)


def outcome(prompts: str, **changes: Any) -> Outcome:
    replica = tiny_replica("llama")
    common = {
        "prompts": prompts,
        "source": 1,
        "target": 2,
        "adapters": 2,
        "rank": 2,
        "read_on": 1,
        "steps": 3,
    }
    params = make_params("jobs.adapters", {**common, "max_new_tokens": 5, "most_nll": 99.0, **changes})
    [(_, found)] = job.run(replica, [Row(params, seed=3)], Artifacts(replica, seed=3))
    return found


def test_the_job_completes_under_each_adapter(prompts: str) -> None:
    found = outcome(prompts, radius=3.0)
    assert found.status == Status.COMPLETED
    assert all(metrics.keys() == job.METRICS.keys() for metrics in found.metrics.values())
    replica = tiny_replica("llama")
    goal = AdapterGoal(radius=3.0, rank=2)
    matrices = Adapters(*(torch.tensor(found.tensors[name]) for name in "ab"))
    texts = []
    for row in ROWS:
        prompt = replica.encode_chat(row["prompt"])
        for adapter in range(2):
            with adapted(replica, 1, matrices.change(goal, adapter)):
                [(_, reply)] = generate(
                    replica, [prompt], row_tables(replica, [[]]), [Work(0, 0)], Decoding(max_new_tokens=5)
                )
            texts.append(replica.decode(reply.tokens))
    assert [row["text"] for row in found.tables["completions"]] == texts
    metrics = found.metrics["select"]
    assert metrics["objective"] > metrics["objective_start"]
    random = outcome(prompts, radius=3.0, optimiser="none")
    assert metrics["diversity_over_random"] == pytest.approx(
        metrics["diversity"] - random.metrics["select"]["diversity"], nan_ok=True
    )


def test_the_held_out_objective_is_that_of_the_splits_prompts(prompts: str) -> None:
    found = outcome(prompts)
    replica = tiny_replica("llama")
    matrices = Adapters(*(torch.tensor(found.tensors[name], dtype=torch.float64) for name in "ab"))
    goal = AdapterGoal(radius=1.0, rank=2)
    prompt = replica.encode_chat("Why is the sea salt?")
    place = Place(2, "after")
    values = []
    for adapter in range(2):
        states = []
        for change in (torch.zeros_like(matrices.change(goal, 0)), matrices.change(goal, adapter)):
            with (
                adapted(replica, 1, change),
                torch.no_grad(),
                picked(replica, [place], lambda h: h.clone()) as kept,
            ):
                replica.logits([prompt], keep=1)
            states.append(kept[place])
        counted = torch.zeros(states[0].shape[:2], dtype=torch.bool)
        counted[:, -3:] = True
        two = torch.tensor([2.0], dtype=torch.float64)
        values.append(float(movement(states[1] - states[0], counted, two, two)))
    assert found.metrics["select"]["held_out_objective"] == pytest.approx(np.mean(values), rel=1e-4)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"source": 3, "target": 3}, "source=3, target=3"),
        ({"radius": 0.0}, "radius=0.0"),
        ({"rank": 0}, "rank=0"),
        ({"few_tokens": -1.0}, "few_tokens=-1.0"),
        ({"chat": False, "system": "Be kind."}, "a raw prompt has no system message"),
    ],
)
def test_parameters_that_cannot_be_meant_are_refused(changes: dict[str, Any], named: str) -> None:
    with pytest.raises(SpecError, match=named):
        make_params("jobs.adapters", changes)

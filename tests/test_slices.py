"""Blocks that run by themselves put out what they put out inside the model, and so do their gradients."""

import pytest
import torch

from jobs.engine.replica import Replica
from jobs.engine.sites import Place, attach, picked
from jobs.engine.slices import Slice, TargetSite
from jobs.errors import ModelError, SpecError
from tests.models import ARCHITECTURES, FLOAT32_ONLY, HIDDEN, LAYERS, tiny_replica

PROMPTS = [[5, 6, 7, 8, 9], [3, 4, 5], [9, 8, 7, 6, 5, 4, 3]]


def whole(replica: Replica, prompt: list[int], theta_D: torch.Tensor | None, target: Place) -> torch.Tensor:
    """The target of the whole model, shape (T, D)."""
    handle = attach(replica, Place(0, "after"), lambda h: h if theta_D is None else h + theta_D)
    try:
        with picked(replica, [target], lambda h: h) as found:
            replica.logits([prompt], keep=1)
    finally:
        handle.remove()
    return found[target][0]


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("site", ["after", "attention"])
def test_deltas_and_their_gradients_are_those_of_the_whole_model(name: str, site: TargetSite) -> None:
    replica, rows = tiny_replica(name), [0, 2, 1, 1]
    found = Slice(replica, PROMPTS, source=0, target=LAYERS - 2, site=site)
    dtype = found.inputs_NTD.dtype
    close = {"rtol": 1e-4, "atol": 1e-4} if name in FLOAT32_ONLY else {"rtol": 1e-9, "atol": 1e-9}
    generator = torch.Generator().manual_seed(0)
    theta_BD = torch.randn((4, HIDDEN), generator=generator, dtype=dtype).requires_grad_()
    deltas_BTD = found.deltas(theta_BD, rows)
    (gradients_BD,) = torch.autograd.grad(deltas_BTD.square().sum(), theta_BD)
    for row, prompt in enumerate(rows):
        theta_D = theta_BD[row].detach().clone().requires_grad_()
        target = Place(LAYERS - 2, site)
        with torch.no_grad():
            before_TD = whole(replica, PROMPTS[prompt], None, target)
        expected_TD = whole(replica, PROMPTS[prompt], theta_D, target) - before_TD
        (expected_D,) = torch.autograd.grad(expected_TD.square().sum(), theta_D)
        assert float(expected_D.abs().max()) > 0
        torch.testing.assert_close(deltas_BTD[row, -len(PROMPTS[prompt]) :], expected_TD, **close)
        assert not deltas_BTD[row, : -len(PROMPTS[prompt])].any()
        torch.testing.assert_close(gradients_BD[row], expected_D, **close)


def test_a_vector_at_each_token_is_added_there() -> None:
    replica = tiny_replica("llama")
    found = Slice(replica, PROMPTS[:1], source=1, target=2)
    theta_1TD = torch.zeros_like(found.inputs_NTD)
    theta_1TD[0, 3] = 1.0
    deltas_1TD = found.deltas(theta_1TD, [0])
    assert not deltas_1TD[0, :3].any()
    assert deltas_1TD[0, 3:].abs().sum(dim=1).min() > 0


def test_positions_count_from_each_prompts_first_token() -> None:
    found = Slice(tiny_replica("llama"), PROMPTS, source=0, target=1)
    assert found.positions_NT[1].tolist() == [-1, -1, -1, -1, 0, 1, 2]


@pytest.mark.parametrize(("source", "target"), [(2, 2), (2, 1), (-2, 2), (0, LAYERS)])
def test_layers_that_cannot_be_meant_are_refused(source: int, target: int) -> None:
    with pytest.raises(SpecError, match=f"source={source}, target={target}.*0 to {LAYERS - 1}"):
        Slice(tiny_replica("llama"), PROMPTS, source=source, target=target)


def test_an_empty_prompt_is_refused() -> None:
    with pytest.raises(SpecError, match="no token"):
        Slice(tiny_replica("llama"), [[]], source=0, target=1)


def test_blocks_that_need_the_rest_of_the_model_are_refused_and_no_hook_stays() -> None:
    replica = tiny_replica("llama")
    runs = []
    replica.blocks[1].register_forward_hook(
        lambda block, inputs, output: runs.append(1) or output * len(runs)
    )
    with pytest.raises(ModelError, match="blocks 1 to 2 of LlamaForCausalLM put out something else"):
        Slice(replica, PROMPTS, source=0, target=2)
    assert len(replica.blocks[1]._forward_hooks) == 1
    assert not any(block._forward_pre_hooks for block in replica.blocks)

"""Passes that begin above what steering does not change equal passes over all blocks."""

import pytest
import torch

from jobs.engine.sharing import LowerLayers, resumed
from jobs.engine.steering import steered
from tests.models import ARCHITECTURES, LAYERS, tiny_replica

PROMPTS = [[7, 8, 9, 10, 11, 12, 13, 14, 15], [20, 21, 22], [30, 31, 32, 33, 34, 35, 36]]


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("layer", range(LAYERS))
def test_a_resumed_pass_equals_the_whole_pass_under_steering(name: str, layer: int) -> None:
    replica = tiny_replica(name)
    generator = torch.Generator().manual_seed(layer)
    delta = torch.randn((len(PROMPTS), 1, replica.hidden_size), generator=generator, dtype=torch.float64)
    deltas = {layer: delta.to(replica.model.dtype)}
    with torch.inference_mode(), steered(replica, deltas):
        whole = replica.logits(PROMPTS, keep=2)
    lower = LowerLayers(replica, PROMPTS)
    with (
        torch.inference_mode(),
        resumed(replica, layer, lower.at(layer, [0, 1, 2])),
        steered(replica, deltas),
    ):
        resumed_logits = replica.logits(PROMPTS, keep=2)
    tolerance = 1e-9 if replica.model.dtype == torch.float64 else 1e-4
    torch.testing.assert_close(resumed_logits, whole, rtol=tolerance, atol=tolerance)


def test_any_choice_of_prompts_comes_padded_like_the_batch() -> None:
    replica = tiny_replica("llama")
    outputs = LowerLayers(replica, PROMPTS).at(1, [2, 1, 2])
    assert outputs.shape == (3, 7, replica.hidden_size)
    assert not outputs[1, :4].any()
    torch.testing.assert_close(outputs[0], outputs[2], rtol=0, atol=0)


def test_the_blocks_compute_again_after_an_exception() -> None:
    replica = tiny_replica("llama")
    before = replica.logits(PROMPTS, keep=1)
    with (
        pytest.raises(RuntimeError, match="on purpose"),
        resumed(replica, 2, torch.zeros(3, 9, replica.hidden_size)),
    ):
        raise RuntimeError("on purpose")
    torch.testing.assert_close(replica.logits(PROMPTS, keep=1), before, rtol=0, atol=0)


def test_prompts_that_need_more_than_the_budget_are_not_kept() -> None:
    replica = tiny_replica("llama")
    needed = sum(map(len, PROMPTS)) * LAYERS * replica.hidden_size * 8
    assert LowerLayers(replica, PROMPTS, budget_bytes=needed).fits
    assert not LowerLayers(replica, PROMPTS, budget_bytes=needed - 1).fits

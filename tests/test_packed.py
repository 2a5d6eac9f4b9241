"""Texts side by side, and passes over some blocks, give what each text gives by itself in the whole model."""

import pytest
import torch
from torch import Tensor

from jobs.engine.packed import Layout, common_beginning, padded, run_blocks, side_by_side
from jobs.engine.replica import Replica
from tests.models import ARCHITECTURES, FLOAT32_ONLY, LAYERS, tiny_replica

TEXTS = [[3, 4, 5, 6, 7], [3, 4, 9], [3, 4, 5, 8, 7, 6, 9]]
SHARED = 2
WINDOWED = ("mistral", "gemma2", "gemma3")


def alone(replica: Replica, text: list[int], layer: int) -> Tensor:
    """What a block puts out for one text in the model's own pass, shape (T, D)."""
    found = replica.model(torch.tensor([text]), output_hidden_states=True, use_cache=False)
    # The last of them stands behind the final norm.
    assert layer < LAYERS - 1
    state: Tensor = found.hidden_states[layer + 1][0]
    return state


def check_close(found: Tensor, expected: Tensor) -> None:
    tolerance = 1e-9 if expected.dtype == torch.float64 else 1e-4
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


def layouts(replica: Replica, name: str) -> list[Layout]:
    found = [padded(replica, TEXTS)]
    if name not in WINDOWED:
        found += [side_by_side(replica, TEXTS, shared) for shared in (0, SHARED)]
    return found


@pytest.mark.parametrize("name", ARCHITECTURES)
@torch.no_grad()
def test_states_and_logits_are_those_of_each_text_alone(name: str) -> None:
    replica = tiny_replica(name)
    for layout in layouts(replica, name):
        ends = torch.stack([place_T[-1] for place_T in layout.places] + [layout.places[0][1]])
        found = run_blocks(replica, layout, layers=[0, 2], logits_at=ends)
        for place_T, text in zip(layout.places, TEXTS, strict=True):
            for layer in (0, 2):
                check_close(found.states[layer][place_T], alone(replica, text, layer))
        expected = [replica.model(torch.tensor([text])).logits[0] for text in TEXTS]
        assert found.logits is not None
        at_end = torch.stack([*(logits_TV[-1] for logits_TV in expected), expected[0][1]])
        check_close(found.logits, at_end)


@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt_neox", "mixtral", "gemma3"])
@torch.no_grad()
def test_a_pass_over_some_blocks_goes_on_from_what_enters_them(name: str) -> None:
    replica = tiny_replica(name)
    calls: list[int] = []
    hooks = [
        next(block.children()).register_forward_hook(lambda *_, number=number: calls.append(number))
        for number, block in enumerate(replica.blocks)
    ]
    for layout in layouts(replica, name):
        whole = run_blocks(replica, layout, layers=[0, 1, 2], logits_at=layout.places[0])
        calls.clear()
        part = run_blocks(replica, layout, first=1, last=2, entering=whole.states[0], layers=[1, 2])
        assert set(calls) <= {1, 2}
        for layer in (1, 2):
            torch.testing.assert_close(part.states[layer], whole.states[layer], rtol=0, atol=0)
        rest = run_blocks(replica, layout, first=1, entering=whole.states[0], logits_at=layout.places[0])
        torch.testing.assert_close(rest.logits, whole.logits, rtol=0, atol=0)
    for hook in hooks:
        hook.remove()


def test_what_is_side_by_side_has_no_padding_and_its_beginning_once() -> None:
    replica = tiny_replica("llama")
    layout = side_by_side(replica, TEXTS, SHARED)
    assert layout.ids_ST.tolist() == [[3, 4, 5, 6, 7, 9, 5, 8, 7, 6, 9]]
    assert [place_T.tolist() for place_T in layout.places] == [
        [0, 1, 2, 3, 4],
        [0, 1, 5],
        [0, 1, 6, 7, 8, 9, 10],
    ]
    assert layout.positions_ST.tolist() == [[0, 1, 2, 3, 4, 2, 2, 3, 4, 5, 6]]


@pytest.mark.parametrize(
    ("texts", "shared"),
    [
        (TEXTS, 2),
        ([[1, 2, 3]], 2),
        ([[1, 2], [1, 2]], 1),
        ([[1, 2], [1, 2, 3]], 1),
        ([[1], [2]], 0),
        ([[5, 1], [5, 2], [4, 1]], 0),
    ],
)
def test_each_text_keeps_a_token_of_its_own(texts: list[list[int]], shared: int) -> None:
    assert common_beginning(texts) == shared


@pytest.mark.parametrize("name", [name for name in ARCHITECTURES if name not in FLOAT32_ONLY])
def test_gradients_of_a_part_are_those_of_the_whole_model(name: str) -> None:
    replica = tiny_replica(name)
    weight = next(iter(replica.blocks[1].parameters())).requires_grad_()
    with torch.enable_grad():
        for layout in layouts(replica, name):
            places = torch.cat(layout.places)
            with torch.no_grad():
                entering = run_blocks(replica, layout, last=0, layers=[0]).states[0]
            part = run_blocks(replica, layout, first=1, last=2, entering=entering, layers=[2]).states[2]
            (found,) = torch.autograd.grad(part[places].square().sum(), weight)
            expected = sum(alone(replica, text, 2).square().sum() for text in TEXTS)
            assert isinstance(expected, Tensor)
            (gradient,) = torch.autograd.grad(expected, weight)
            assert gradient.abs().max() > 0
            # Norms take their scale in float32.
            assert (found - gradient).abs().max() < 1e-5 * gradient.abs().max()

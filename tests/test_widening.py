"""Half-precision products on a CPU without instructions for them."""

import copy

import pytest
import torch
from torch import nn

from jobs.engine import widening
from jobs.engine.widening import multiplies, widen_products

HALF = [torch.bfloat16, torch.float16]


def without_instructions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(widening.platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(torch.cpu, "get_capabilities", dict)


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("bias", [True, False])
def test_a_widened_product_is_the_exact_one_rounded(
    dtype: torch.dtype, bias: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    without_instructions(monkeypatch)
    torch.manual_seed(0)
    layer = nn.Linear(48, 32, bias=bias).to(dtype)
    state_SD = torch.randn(5, 48).to(dtype)
    own = layer(state_SD)
    widen_products(layer)
    found = layer(state_SD)
    exact = nn.functional.linear(
        state_SD.double(), layer.weight.double(), layer.bias.double() if bias else None
    )
    assert found.dtype == dtype
    step = torch.finfo(dtype).eps * exact.abs().max()
    assert float((found.double() - exact).abs().max()) <= step
    assert float((found.double() - exact).abs().mean()) <= float((own.double() - exact).abs().mean()) * 1.01


def test_a_copy_multiplies_with_its_own_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    without_instructions(monkeypatch)
    layer = nn.Linear(4, 4, bias=False).bfloat16()
    widen_products(layer)
    other = copy.deepcopy(layer)
    with torch.no_grad():
        other.weight.zero_()
    one = torch.ones(1, 4).bfloat16()
    assert not other(one).any()
    assert layer(one).any()


@pytest.mark.parametrize("dtype", HALF)
def test_a_cpu_with_instructions_is_left_alone(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    names = {torch.bfloat16: "amx_bf16", torch.float16: "avx512_fp16"}
    without_instructions(monkeypatch)
    assert not multiplies(dtype)
    assert multiplies(torch.float32)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {names[dtype]: True})
    assert multiplies(dtype)
    layer = nn.Linear(2, 2).to(dtype)
    widen_products(layer)
    assert "forward" not in vars(layer)
    monkeypatch.setattr(torch.cpu, "get_capabilities", dict)
    monkeypatch.setattr(widening.platform, "machine", lambda: "arm64")
    assert multiplies(dtype)

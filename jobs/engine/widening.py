"""Products of half-precision weights on a CPU that has no instructions for them.

Torch's own then take six times as long as float32 ones (docs/decisions.md, 33).
"""

import platform
from types import MethodType

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

_INSTRUCTIONS = {torch.bfloat16: ("avx512_bf16", "amx_bf16"), torch.float16: ("avx512_fp16", "amx_fp16")}


def multiplies(dtype: torch.dtype) -> bool:
    """Whether this CPU multiplies numbers of a type by itself; what is no x86 is taken to."""
    if dtype not in _INSTRUCTIONS or platform.machine() not in ("x86_64", "AMD64"):
        return True
    known = torch.cpu.get_capabilities()
    return any(known.get(name, False) for name in _INSTRUCTIONS[dtype])


def widen_products(model: nn.Module) -> None:
    """Let linear layers on such a CPU multiply in float32 and round what comes out.

    That is what a product of half-precision numbers means: torch adds up in float32 too, in another order.
    The weights stay as they are.
    """
    on_cpu = [
        module
        for module in model.modules()
        if type(module) is nn.Linear and module.weight.device.type == "cpu"
    ]
    for module in on_cpu:
        if not multiplies(module.weight.dtype):
            module.forward = MethodType(_widened, module)  # type: ignore[method-assign]


def _widened(layer: nn.Linear, input: Tensor) -> Tensor:
    bias = None if layer.bias is None else layer.bias.float()
    return linear(input.float(), layer.weight.float(), bias).to(input.dtype)

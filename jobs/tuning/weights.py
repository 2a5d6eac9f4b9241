"""Which matrices are trained, and how they change: their own weights, or low-rank changes of them (LoRA).

The only importer of peft. The replica's weights are never written to: what is trained stands in their place.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from jobs.engine.ablation import is_matrix
from jobs.engine.replica import Replica
from jobs.errors import ModelError, SpecError

_SCALE = 2
"""Of what A and B give, as is usual (lora_alpha is twice the rank)."""


class Trained(NamedTuple):
    """The weights that training changes.

    Attributes:
        parameters: Name of the matrix's module -> what is trained of it: its weight, or A and B.
        before: Name of the matrix's module -> its untuned weight; empty with A and B.
        rank: Of A and B; 0 for the weight.
    """

    parameters: Mapping[str, list[nn.Parameter]]
    before: Mapping[str, Tensor]
    rank: int

    def changed(self) -> list[str]:
        """Names of the matrices that differ from the untuned ones."""
        if self.rank:
            return [name for name, [_, b] in self.parameters.items() if bool(b.any())]
        return [
            name
            for name, [weight] in self.parameters.items()
            if not torch.equal(weight.detach(), self.before[name])
        ]

    @torch.no_grad()
    def tensors(self) -> dict[str, Tensor]:
        """What `jobs.engine.tuned` takes, on the CPU in float32 or wider."""
        if not self.rank:
            return {f"{name}.weight": _wide(weight) for name, [weight] in self.parameters.items()}
        return {
            key: tensor
            for name, [a, b] in self.parameters.items()
            for key, tensor in ((f"{name}.a", _wide(a)), (f"{name}.b", _SCALE * _wide(b)))
        }


def _wide(weight: Tensor) -> Tensor:
    return weight.detach().to("cpu", torch.promote_types(weight.dtype, torch.float32), copy=True)


def find_matrices(replica: Replica, layers: Sequence[int], blocks: Sequence[str]) -> list[str]:
    """Names of the modules of some matrices, ascending by layer.

    Args:
        replica: The model.
        layers: Blocks, counted from 0; empty takes all.
        blocks: Matrices of each: `q`, `k`, `v`, `o`, `gate`, `up`, `down` where they are called `v_proj` and
            so on; otherwise the architecture's own names, such as `mlp.c_fc` or `c_fc`; empty takes all.

    Raises:
        SpecError: If a layer does not exist, or a name is no matrix of every layer, or of several.
        ModelError: If the blocks hold no matrix in floating point.
    """
    if wrong := [layer for layer in layers if not 0 <= layer < replica.layers]:
        raise SpecError(f"layers {wrong} do not exist; the model has 0 to {replica.layers - 1}")
    names = {module: name for name, module in replica.model.named_modules()}
    found: list[str] = []
    for layer in layers or range(replica.layers):
        block = replica.blocks[layer]
        own = {
            name: names[module]
            for name, module in block.named_modules()
            if is_matrix(module) and module.weight.is_floating_point()
        }
        if not own:
            raise ModelError(
                f"layer {layer} of {type(replica.model).__name__} holds no matrix in floating point that "
                "could be tuned; take a dtype that is not quantised"
            )
        found += (
            [own[name] for wanted in blocks for name in _meant(wanted, own, layer)]
            if blocks
            else own.values()
        )
    return list(dict.fromkeys(found))


def _meant(wanted: str, own: Mapping[str, str], layer: int) -> list[str]:
    if wanted in own:
        return [wanted]
    found = [name for name in own if name.rpartition(".")[2] in (wanted, f"{wanted}_proj")]
    if not found:
        raise SpecError(f"blocks: layer {layer} has no {wanted!r}; it has {sorted(own)}")
    if len({_without_numbers(name) for name in found}) > 1:
        raise SpecError(f"blocks: {wanted!r} may be {found} of layer {layer}; write one of them")
    return found


def _without_numbers(name: str) -> str:
    """Experts of a mixture differ in their number alone."""
    return ".".join(part for part in name.split(".") if not part.isdigit())


@contextmanager
def training(replica: Replica, names: Sequence[str], *, rank: int, seed: int) -> Iterator[Trained]:
    """Inside the block, the matrices can be trained, and the model runs with them as they are.

    Afterwards the weights that were there before are back, whatever happens inside.

    Args:
        replica: The model.
        names: Of the matrices' modules, in floating point.
        rank: Of a low-rank change, whose B is 0 at first; 0 trains the weights themselves.
        seed: Of A.
    """
    with replica.other_weights(), torch.enable_grad():
        if rank:
            with _low_rank(replica, names, rank=rank, seed=seed) as trained:
                yield trained
        else:
            with _whole(replica, names) as trained:
                yield trained


@contextmanager
def _whole(replica: Replica, names: Sequence[str]) -> Iterator[Trained]:
    modules: dict[str, Any] = {name: replica.model.get_submodule(name) for name in names}
    before = {name: module.weight for name, module in modules.items()}
    with ExitStack() as stack:
        for name, module in modules.items():
            stack.callback(setattr, module, "weight", before[name])
            module.weight = nn.Parameter(before[name].detach().clone())
        yield Trained({name: [module.weight] for name, module in modules.items()}, before, 0)


@contextmanager
def _low_rank(replica: Replica, names: Sequence[str], *, rank: int, seed: int) -> Iterator[Trained]:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        config = LoraConfig(r=rank, lora_alpha=_SCALE * rank, lora_dropout=0.0, target_modules=list(names))
        model: Any = get_peft_model(replica.model, config)
    try:
        inside = {name.removeprefix("base_model.model."): module for name, module in model.named_modules()}
        sides = {
            name: [getattr(inside[name], side)["default"] for side in ("lora_A", "lora_B")] for name in names
        }
        yield Trained({name: [each.weight for each in both] for name, both in sides.items()}, {}, rank)
    finally:
        model.unload()
        replica.model.requires_grad_(False)

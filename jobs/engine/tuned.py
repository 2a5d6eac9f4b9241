"""Run a replica with weights that a tuning job has changed: whole matrices, or low-rank changes of them."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from jobs.engine.ablation import is_matrix, output_axis
from jobs.engine.replica import Replica
from jobs.errors import ModelError


@contextmanager
def tuned(replica: Replica, changes: Mapping[str, np.ndarray]) -> Iterator[None]:
    """Inside the block, matrices of the model are others, or W + B A.

    The weights that were there before come back as they were, whatever happens inside.

    Args:
        replica: The model.
        changes: For each matrix, by its module's name, `NAME.weight` as the model has it; or `NAME.a` of
            shape (rank, inputs) and `NAME.b` of shape (outputs, rank). Other names are left alone.

    Raises:
        ModelError: If the model has no such matrix, or its weights are quantised.
    """
    with ExitStack() as stack:
        stack.enter_context(replica.other_weights())
        for name in tuned_matrices(changes):
            module = find_matrix(replica, name)
            before: Any = module.weight
            after = _after(before, name, changes, module)
            stack.callback(setattr, module, "weight", before)
            module.weight = nn.Parameter(after, requires_grad=False)
        yield


def tuned_matrices(changes: Iterable[str]) -> list[str]:
    """Names of the modules whose matrices the keys of an artifact change."""
    sides = ((key.rpartition(".")[0], key.rpartition(".")[2]) for key in changes)
    return sorted(name for name, side in sides if side in ("weight", "a"))


def find_matrix(replica: Replica, name: str) -> nn.Module:
    """A matrix by its module's name. Raises ModelError if there is none in floating point."""
    try:
        module: Any = replica.model.get_submodule(name)
    except AttributeError:
        module = None
    if module is None or not is_matrix(module) or not module.weight.is_floating_point():
        raise ModelError(
            f"{type(replica.model).__name__} has no matrix {name!r} in floating point, which the tuned "
            "weights change; take the model and a dtype that they were tuned with"
        )
    found: nn.Module = module
    return found


def _after(weight: Tensor, name: str, changes: Mapping[str, np.ndarray], module: nn.Module) -> Tensor:
    if f"{name}.weight" not in changes:
        b, a = (torch.tensor(changes[f"{name}.{side}"]) for side in "ba")
        return _sum(weight, b, a, module)
    after = torch.tensor(changes[f"{name}.weight"]).to(weight)
    if after.shape != weight.shape:
        raise ModelError(
            f"the tuned matrix {name!r} has the shape {tuple(after.shape)} and the model's "
            f"{tuple(weight.shape)}; take the model that it was tuned on"
        )
    return after


@torch.no_grad()
def _sum(weight: Tensor, b: Tensor, a: Tensor, module: nn.Module) -> Tensor:
    wide = torch.promote_types(weight.dtype, torch.float32)
    change = b.to(weight.device, wide) @ a.to(weight.device, wide)
    return (weight.to(wide) + (change.T if output_axis(module) else change)).to(weight.dtype)

"""MELBO vectors as the package batched-melbo learns them: its copy of the original, and its batched version.

V vectors, D hidden.
"""

import time
import types
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from torch import Tensor

from jobs.engine.replica import Replica

_WORKLOAD: dict[str, Any] = {
    "target_token_idxs": slice(1, None),
    "layers_name": "model.layers",
    "power": 2,
    "q": 1,
}
"""What both versions are told alike."""


class Trained(NamedTuple):
    """What a peer learned.

    Attributes:
        theta_VD: The vectors.
        history_SV: The objective before each step.
        seconds: How long it took.
    """

    theta_VD: Tensor
    history_SV: Tensor
    seconds: float


class _Tokens(dict[str, Tensor]):
    """What a tokenizer gives; it stays where it is."""

    def to(self, device: torch.device) -> "_Tokens":
        return self


def _tokenizer(ids: Sequence[int]) -> Any:
    """Gives the same prompt as often as it is asked for texts."""

    def tokenize(texts: Sequence[str], **options: Any) -> _Tokens:
        rows = torch.tensor([list(ids)] * len(texts))
        return _Tokens(input_ids=rows, attention_mask=torch.ones_like(rows))

    return tokenize


@contextmanager
def _starting_at(module: types.ModuleType, starts: Iterator[Tensor]) -> Iterator[None]:
    """Inside the block the module draws these in place of random numbers, on the CPU."""
    stand_in = types.ModuleType("torch")
    stand_in.__dict__.update(vars(torch))
    stand_in.randn = lambda *size, **options: next(starts).clone()  # type: ignore[attr-defined]
    with patch.object(module, "torch", stand_in):
        yield


def original(
    replica: Replica,
    ids: Sequence[int],
    start_VD: Tensor,
    *,
    source: int,
    target: int,
    steps: int,
    radius: float,
) -> Trained:
    """The original, one vector after another; p = 2, q = 1, all tokens but the first."""
    from batched_melbo import original_melbo as module

    block: Any = replica.blocks[source]
    down = block.mlp.down_proj
    before = down.bias
    began = time.perf_counter()
    try:
        with _starting_at(module, iter(start_VD)):
            model = module.SteeredModel(
                replica.model,
                _tokenizer(ids),
                source_layer_idx=source,
                target_layer_idx=target + 1,
                normalization=radius,
                num_steps=steps,
                **_WORKLOAD,
            )
            model.train([""], len(start_VD))
    finally:
        down.bias = before
    seconds = time.perf_counter() - began
    return Trained(model.learned_vectors, -torch.tensor(model.losses_all).T, seconds)


def batched(
    replica: Replica,
    ids: Sequence[int],
    start_VD: Tensor,
    *,
    source: int,
    target: int,
    steps: int,
    radius: float,
) -> Trained:
    """The batched version, all vectors at once; p = 2, q = 1, all tokens but the first."""
    from batched_melbo import batched_melbo as module

    began = time.perf_counter()
    # It draws twice, and the second counts.
    with _starting_at(module, iter([start_VD, start_VD[:, None]])):
        model = module.BatchedMELBO(
            replica.model,
            _tokenizer(ids),
            source_layer_idx=source,
            target_layer_idx=target,
            normalization=radius,
            num_steps=steps,
            **_WORKLOAD,
        )
        model.train("", len(start_VD))
    seconds = time.perf_counter() - began
    return Trained(model.learned_vectors, -torch.tensor(model.losses_all).T, seconds)

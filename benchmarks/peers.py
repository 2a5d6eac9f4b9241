"""The same grid as other tools run it: one configuration after another, through Hugging Face `generate`."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import numpy as np
import torch
from steering_vectors import SteeringVector
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.workload import Cell
from jobs import catalog
from jobs.engine.replica import Replica

# repeng 0.4.0 names a type that numpy 2 has dropped.
vars(np).setdefault("float_", np.float64)
from repeng import ControlModel  # noqa: E402

Steered = Callable[[Replica, Cell], AbstractContextManager[Any]]
"""Inside the context, the thing it gives generates under the configuration."""


@contextmanager
def steering_vectors(replica: Replica, cell: Cell) -> Iterator[Any]:
    """The package steering-vectors."""
    vector = torch.from_numpy(cell.vector).to(replica.device, replica.model.dtype)
    with SteeringVector({cell.layer: vector}, "decoder_block").apply(replica.model):
        yield replica.model


@contextmanager
def repeng(replica: Replica, cell: Cell) -> Iterator[Any]:
    """The package repeng."""
    wrapped = ControlModel(replica.model, [cell.layer])
    try:
        vector = torch.from_numpy(cell.vector).to(replica.device, replica.model.dtype)
        wrapped.set_raw_control({cell.layer: vector})
        yield wrapped
    finally:
        wrapped.unwrap()


@contextmanager
def plain_hook(replica: Replica, cell: Cell) -> Iterator[Any]:
    """A forward hook by hand."""
    vector = torch.from_numpy(cell.vector).to(replica.device, replica.model.dtype)

    def add(module: nn.Module, inputs: Any, output: Any) -> Any:
        return (output[0] + vector, *output[1:]) if isinstance(output, tuple) else output + vector

    handle = replica.blocks[cell.layer].register_forward_hook(add)
    try:
        yield replica.model
    finally:
        handle.remove()


PEERS: dict[str, Steered] = {
    "steering-vectors": steering_vectors,
    "repeng": repeng,
    "plain hook loop": plain_hook,
}


def plain_replica(model: str, dtype: torch.dtype) -> Replica:
    """A model as transformers loads it, without what `load_replica` makes faster."""
    source = catalog.resolve(model)
    tokenizer = AutoTokenizer.from_pretrained(source, padding_side="left")
    return Replica(AutoModelForCausalLM.from_pretrained(source, dtype=dtype), tokenizer)


@torch.inference_mode()
def generate(
    replica: Replica,
    steered: Steered,
    cells: Sequence[Cell],
    prompts: Sequence[Sequence[int]],
    *,
    batch: int,
    new_tokens: int,
    forced: bool,
) -> list[list[int]]:
    """New tokens of every cell and prompt, cell by cell, without those from the first stop token on.

    Args:
        replica: The model.
        steered: How the peer steers.
        cells: Configurations.
        prompts: Token ids.
        batch: Prompts of one call of `generate`.
        new_tokens: Most new tokens.
        forced: Whether all new tokens are made, whatever they are.
    """
    found = []
    for cell in cells:
        with steered(replica, cell) as model, _stops(replica, without=forced):
            for start in range(0, len(prompts), batch):
                ids, mask = replica.pad(prompts[start : start + batch])
                made: Tensor = model.generate(
                    input_ids=ids,
                    attention_mask=mask,
                    do_sample=False,
                    pad_token_id=replica.pad_id,
                    max_new_tokens=new_tokens,
                )
                new = made[:, ids.shape[1] :].tolist()
                found += [tokens if forced else _until_stop(tokens, replica.stop_ids) for tokens in new]
    return found


@contextmanager
def _stops(replica: Replica, *, without: bool) -> Iterator[None]:
    configuration = replica.model.generation_config
    stops = configuration.eos_token_id
    try:
        configuration.eos_token_id = None if without else stops
        yield
    finally:
        configuration.eos_token_id = stops


def _until_stop(tokens: list[int], stops: frozenset[int]) -> list[int]:
    ends = [place for place, token in enumerate(tokens) if token in stops]
    return tokens[: ends[0]] if ends else tokens

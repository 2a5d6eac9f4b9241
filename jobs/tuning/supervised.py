"""Supervised fine-tuning of low-rank changes (LoRA). The only importer of peft.

Source: Hu et al., "LoRA", arXiv:2106.09685; the changes are peft's.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor

from jobs.engine.ablation import is_matrix
from jobs.engine.replica import Replica, position_ids
from jobs.errors import ModelError


class Example(NamedTuple):
    """Token ids of a prompt, and of the reply that it is to get, the stop token included."""

    prompt: list[int]
    reply: list[int]


class FineTuned(NamedTuple):
    """What training leaves.

    Attributes:
        changes: For each matrix `NAME.a` (rank, inputs) and `NAME.b` (outputs, rank), float32; their product
            is added to it.
        losses: Mean negative log-likelihood of the replies' tokens in each batch, nats a token.
    """

    changes: dict[str, Tensor]
    losses: list[float]


def fine_tune(
    replica: Replica,
    examples: Sequence[Example],
    *,
    rank: int,
    learning_rate: float,
    epochs: int,
    batch: int,
    seed: int,
) -> FineTuned:
    """Train changes of all matrices in the blocks; the replica's own weights stay as they are.

    AdamW without decay, the learning rate falling linearly to 0; examples in a new random order each epoch.

    Args:
        replica: The model, its weights in floating point.
        examples: At least one.
        rank: Of each matrix's change.
        learning_rate: An element and step, at the start.
        epochs: Times that every example is read.
        batch: Examples of a step.
        seed: Of the start and of the order.

    Raises:
        ModelError: If the blocks hold no matrix in floating point.
    """
    matrices = _matrices(replica)
    generator = torch.Generator().manual_seed(seed)
    steps = epochs * -(-len(examples) // batch)
    with replica.other_weights(), torch.random.fork_rng(), torch.enable_grad():
        torch.manual_seed(seed)
        config = LoraConfig(r=rank, lora_alpha=2 * rank, lora_dropout=0.0, target_modules=matrices)
        model = get_peft_model(replica.model, config)
        try:
            weights = [each for each in model.parameters() if each.requires_grad]
            optimiser = torch.optim.AdamW(weights, lr=learning_rate, weight_decay=0.0)
            falling = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: 1 - step / steps)
            losses = []
            for _ in range(epochs):
                order = torch.randperm(len(examples), generator=generator).tolist()
                for start in range(0, len(order), batch):
                    loss = reply_loss(replica, [examples[index] for index in order[start : start + batch]])
                    loss.backward()
                    optimiser.step()
                    falling.step()
                    optimiser.zero_grad()
                    losses.append(float(loss.detach()))
            changes = _changes(model)
        finally:
            model.unload()
            replica.model.requires_grad_(False)
    return FineTuned(changes, losses)


def _matrices(replica: Replica) -> list[str]:
    """Names of the matrices in the blocks that can be changed, as `jobs.engine.tuned` finds them again."""
    inside = {id(module) for block in replica.blocks for module in block.modules()}
    found = [
        name
        for name, module in replica.model.named_modules()
        if id(module) in inside and is_matrix(module) and module.weight.is_floating_point()
    ]
    if not found:
        raise ModelError(
            f"the blocks of {type(replica.model).__name__} hold no matrix in floating point that could be "
            "tuned; take a dtype that is not quantised"
        )
    return found


def reply_loss(replica: Replica, examples: Sequence[Example]) -> Tensor:
    """Mean negative log-likelihood of the replies' tokens, nats a token; no gradient unless it is enabled."""
    ids, mask = replica.pad([[*each.prompt, *each.reply] for each in examples])
    longest = max(len(each.reply) for each in examples)
    logits = replica.forward(ids, mask, position_ids(mask), keep=longest + 1)[:, :-1]
    wanted = ids[:, -longest:]
    lengths = torch.tensor([len(each.reply) for each in examples], device=ids.device)
    counts = torch.arange(longest, device=ids.device) >= longest - lengths[:, None]
    return torch.nn.functional.cross_entropy(logits[counts].float(), wanted[counts])


@torch.no_grad()
def _changes(model: torch.nn.Module) -> dict[str, Tensor]:
    found = {}
    for name, module in model.named_modules():
        if hasattr(module, "lora_A"):
            own = name.removeprefix("base_model.model.")
            found[f"{own}.a"] = module.lora_A["default"].weight.float().cpu().clone()
            found[f"{own}.b"] = module.scaling["default"] * module.lora_B["default"].weight.float().cpu()
    return found

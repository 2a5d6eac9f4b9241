"""Find the parts of a Hugging Face language model by structure, not by name."""

from typing import NamedTuple

from torch import nn

from jobs.errors import ModelError


class Parts(NamedTuple):
    """What a decoder block adds to the residual stream.

    Attributes:
        attention: Its output, or the first of its outputs, is what attention adds.
        mlp: Its output is what the feed-forward part (or mixture of experts) adds.
    """

    attention: nn.Module
    mlp: nn.Module


def find_blocks(model: nn.Module) -> nn.ModuleList:
    """The list of decoder blocks: the `ModuleList` that holds most of the weights.

    Lists inside blocks (experts) lose, since the outer list holds all of theirs and more.

    Args:
        model: A decoder-only language model.

    Raises:
        ModelError: If no list of modules holds weights, or two hold equally many.
    """
    lists = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    sizes = {name: sum(parameter.numel() for parameter in module.parameters()) for name, module in lists}
    if not sizes or max(sizes.values()) == 0:
        raise ModelError(
            f"{type(model).__name__} has no nn.ModuleList of decoder blocks; found the modules "
            f"{[name for name, _ in model.named_children()]}; steersweep takes decoder-only models"
        )
    largest = max(sizes.values())
    winners = [module for name, module in lists if sizes[name] == largest]
    if len(winners) > 1:
        raise ModelError(
            f"{type(model).__name__} has several module lists with {largest} weights each: "
            f"{[name for name, size in sizes.items() if size == largest]}; "
            "steersweep takes decoder-only models"
        )
    return winners[0]


def find_parts(block: nn.Module) -> Parts:
    """Attention and feed-forward part of a block.

    Attention is the child that knows its place in the key-value cache (`layer_idx`). The feed-forward
    part is the last other child with weight matrices: what follows it in a block are norms, whose
    weights are vectors.

    Raises:
        ModelError: If the block has no such children.
    """
    children = dict(block.named_children())
    attention = [name for name, child in children.items() if hasattr(child, "layer_idx")]
    matrices = [name for name, child in children.items() if name not in attention and _has_matrix(child)]
    if len(attention) != 1 or not matrices:
        raise ModelError(
            f"{type(block).__name__} should have one part with `layer_idx` (attention) and one more with "
            f"weight matrices (feed-forward); it has {attention} and {matrices} of {list(children)}"
        )
    return Parts(children[attention[0]], children[matrices[-1]])


def _has_matrix(module: nn.Module) -> bool:
    return any(parameter.dim() > 1 for parameter in module.parameters())

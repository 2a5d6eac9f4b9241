"""Find the decoder blocks of a Hugging Face model by structure, not by name."""

from torch import nn

from jobs.errors import ModelError


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

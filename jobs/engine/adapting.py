"""Change what a block's feed-forward part puts out, by its last matrix. H inner width, D hidden."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from jobs.engine.ablation import Writer, find_writers
from jobs.engine.replica import Replica
from jobs.errors import ModelError


def output_matrix(replica: Replica, layer: int) -> Writer:
    """The matrix that the feed-forward part of a block puts out with.

    Raises:
        SpecError: If the layer does not exist.
        ModelError: If the model has no such matrix, it is one of several experts', or it is quantised.
    """
    found = find_writers(replica, ("mlp",), (layer,), biases=False)
    if len(found) > 1 or getattr(found[0].module, found[0].name).dim() != 2:
        raise ModelError(
            f"the feed-forward part of layer {layer} has a matrix for each expert; adapters act on one matrix"
        )
    return found[0]


@contextmanager
def adapted(replica: Replica, layer: int, change_DH: Tensor) -> Iterator[None]:
    """Inside the block, a matrix is added to the output matrix of a layer's feed-forward part.

    The weights that were there before come back as they were, whatever happens inside.

    Args:
        replica: The model.
        layer: Which block.
        change_DH: What is added; rounded to the weights' dtype after the sum.

    Raises:
        SpecError: If the layer does not exist.
        ModelError: As `output_matrix` does.
    """
    writer = output_matrix(replica, layer)
    before = getattr(writer.module, writer.name)
    change = change_DH if writer.axis == 0 else change_DH.T
    wide = torch.promote_types(before.dtype, change.dtype)
    after = (before.detach().to(wide) + change.to(before.device, wide)).to(before.dtype)
    with replica.other_weights():
        try:
            setattr(writer.module, writer.name, nn.Parameter(after.contiguous(), requires_grad=False))
            yield
        finally:
            setattr(writer.module, writer.name, before)

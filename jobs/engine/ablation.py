"""Weights that cannot write along chosen directions: W <- W - v v^T W where W adds to the residual stream.

Source: weight orthogonalisation of Arditi et al., arXiv:2406.11717, section 2.4.
K directions, D hidden.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Literal, NamedTuple, get_args

import numpy as np
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from jobs.engine.interventions import normalised
from jobs.engine.replica import Replica
from jobs.errors import ModelError, SpecError

Part = Literal["embedding", "attention", "mlp"]
PARTS: tuple[Part, ...] = get_args(Part)
_DEPENDENT = 1e-6
"""A direction that the others explain up to this share of its length adds none of its own."""


class Writer(NamedTuple):
    """A weight, or a bias, that is added to the residual stream.

    Attributes:
        module: Owner of the parameter.
        name: Name of the parameter in it.
        axis: Axis of the parameter along which the residual stream lies.
    """

    module: nn.Module
    name: str
    axis: int


@contextmanager
def ablated(
    replica: Replica,
    directions: np.ndarray,
    *,
    parts: Sequence[Part] = PARTS,
    layers: Sequence[int] | None = None,
    biases: bool = True,
) -> Iterator[None]:
    """Inside the block, what the chosen parts put out has no component along the directions.

    That equals `ProjectOut` at the outputs of these parts, and costs nothing a token. The weights that were
    there before come back as they were, whatever happens inside. Blocks may be nested, around and inside of
    steering.

    The embedding means the token table and learned positions. Where the unembedding shares the token table,
    it keeps the old one: only what is written to the stream changes, never what is read from it. Where a norm
    follows a part before its output is added (Gemma 2 and 3), the norm's scale turns that output again.

    Args:
        replica: The model; weights in floating point.
        directions: Shape (D,) or (K, D), finite, none of them 0; their lengths do not matter, and what is
            taken out is all that they span.
        parts: Which parts are changed.
        layers: Blocks whose attention and feed-forward parts are changed; None takes all.
        biases: Whether the biases of these matrices are changed too.

    Raises:
        SpecError: If directions, parts or layers cannot be meant.
        ModelError: If the model has no such matrices, or they are quantised.
    """
    basis_KD = torch.from_numpy(span(directions, replica.hidden_size))
    writers = find_writers(replica, parts, layers, biases=biases)
    with ExitStack() as stack:
        stack.enter_context(replica.other_weights())
        for writer in writers:
            before = getattr(writer.module, writer.name)
            after = nn.Parameter(_without(before, basis_KD, writer.axis), requires_grad=False)
            stack.callback(setattr, writer.module, writer.name, before)
            setattr(writer.module, writer.name, after)
        yield


def span(directions: np.ndarray, hidden: int) -> np.ndarray:
    """An orthonormal basis of what directions span.

    Args:
        directions: Shape (D,) or (K, D).
        hidden: D.

    Returns:
        Shape (rank, D), float64.

    Raises:
        SpecError: If the shape differs, or a direction is 0 or not finite.
    """
    rows_KD = np.atleast_2d(directions).astype(np.float64)
    if rows_KD.ndim != 2 or rows_KD.shape[1] != hidden or not len(rows_KD):
        raise SpecError(f"directions of shape {directions.shape}; this takes ({hidden},) or (K, {hidden})")
    for row, direction_D in enumerate(rows_KD):
        if not np.isfinite(direction_D).all():
            raise SpecError(f"direction {row} holds NaN or an infinity; extract it again")
        if not direction_D.any():
            raise SpecError(f"direction {row} is 0 and points nowhere; leave it out")
    units_KD = np.stack([normalised(direction_D) for direction_D in rows_KD])
    _, sizes, basis_KD = np.linalg.svd(units_KD, full_matrices=False)
    spanned: np.ndarray = basis_KD[sizes > _DEPENDENT * sizes[0]]
    return spanned


def find_writers(
    replica: Replica,
    parts: Sequence[Part] = PARTS,
    layers: Sequence[int] | None = None,
    *,
    biases: bool = True,
) -> list[Writer]:
    """The weights of a model that write to its residual stream; takes and raises what `ablated` does."""
    if unknown := [part for part in parts if part not in PARTS]:
        raise SpecError(f"parts {unknown} do not exist; there are {list(PARTS)}")
    chosen = range(replica.layers) if layers is None else layers
    if wrong := [layer for layer in chosen if not 0 <= layer < replica.layers]:
        raise SpecError(f"layers {wrong} do not exist; the model has 0 to {replica.layers - 1}")
    found = _embedding_writers(replica) if "embedding" in parts else []
    for layer in chosen:
        for name in ("attention", "mlp"):
            if name in parts:
                found += _part_writers(getattr(replica.parts[layer], name), replica.hidden_size, layer, name)
    quantised = [writer for writer in found if not getattr(writer.module, writer.name).is_floating_point()]
    if quantised:
        raise ModelError(
            f"the weights of {type(quantised[0].module).__name__} are quantised, so nothing can be taken out "
            "of them exactly; load the model in a floating-point dtype such as bfloat16"
        )
    return [writer for writer in found if biases or not writer.name.endswith("bias")]


def _embedding_writers(replica: Replica) -> list[Writer]:
    """Tables outside the blocks whose rows are as wide as the stream: tokens, and positions if learned."""
    inside = {module for block in replica.blocks for module in block.modules()}
    tables = [
        module
        for module in replica.model.get_decoder().modules()
        if isinstance(module, nn.Embedding)
        and module not in inside
        and module.embedding_dim == replica.hidden_size
    ]
    if replica.model.get_input_embeddings() not in tables:
        raise ModelError(
            f"the token embedding of {type(replica.model).__name__} is not as wide as its residual stream "
            f"({replica.hidden_size}); leave 'embedding' out of the parts"
        )
    return [Writer(table, "weight", 1) for table in tables]


def _part_writers(part: nn.Module, hidden: int, layer: int, name: str) -> list[Writer]:
    """The last matrix of a part that gives the stream's width; of a mixture, that of each expert."""
    owners = [part] if is_matrix(part) else [each for each in part.modules() if not is_matrix(each)]
    found = [
        writer for owner in owners for writer in (*_last_matrix(owner, hidden), *_experts(owner, hidden))
    ]
    if not found:
        raise ModelError(
            f"no matrix of layer {layer}'s {name} ({type(part).__name__}) gives the residual stream's width "
            f"of {hidden}; it has {sorted(name for name, _ in part.named_parameters())}"
        )
    return found


def is_matrix(module: nn.Module) -> bool:
    """Whether a module is a matrix product, and perhaps a bias, alone."""
    return isinstance(module, (nn.Linear, Conv1D))


def _last_matrix(owner: nn.Module, hidden: int) -> list[Writer]:
    candidates = [owner] if is_matrix(owner) else list(owner.children())
    matrices = [module for module in candidates if is_matrix(module) and _width(module) == hidden]
    return _with_bias(matrices[-1]) if matrices else []


def output_axis(matrix: nn.Module) -> int:
    """Axis of the weight along which the outputs lie."""
    return 1 if isinstance(matrix, Conv1D) else 0


def _width(matrix: nn.Module) -> int:
    width = matrix.nf if isinstance(matrix, Conv1D) else matrix.out_features
    assert isinstance(width, int)
    return width


def _with_bias(matrix: nn.Module) -> list[Writer]:
    writers = [Writer(matrix, "weight", output_axis(matrix))]
    return writers if matrix.bias is None else [*writers, Writer(matrix, "bias", 0)]


def _experts(owner: nn.Module, hidden: int) -> list[Writer]:
    """Experts in one tensor, (experts, D, inner) or transposed: the last such tensor writes."""
    stacked = [name for name, each in owner.named_parameters(recurse=False) if each.dim() == 3]
    if not stacked:
        return []
    name = stacked[-1]
    shape = getattr(owner, name).shape
    axes = [axis for axis in (1, 2) if shape[axis] == hidden]
    if len(axes) != 1:
        raise ModelError(
            f"{type(owner).__name__}.{name} has the shape {tuple(shape)}, and which axis is the residual "
            f"stream ({hidden}) cannot be told; leave 'mlp' out of the parts"
        )
    bias = f"{name}_bias"
    biases = [Writer(owner, bias, 1)] if getattr(owner, bias, None) is not None else []
    return [Writer(owner, name, axes[0]), *biases]


@torch.no_grad()
def _without(weight: Tensor, basis_KD: Tensor, axis: int) -> Tensor:
    """The weight less its part along the basis, computed in float32 or wider."""
    wide = torch.float64 if weight.dtype == torch.float64 else torch.float32
    basis_KD = basis_KD.to(weight.device, wide)
    rows = weight.to(wide).movedim(axis, -1)
    rest = rows - (rows @ basis_KD.T) @ basis_KD
    return rest.movedim(-1, axis).to(weight.dtype).contiguous()

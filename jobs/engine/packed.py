"""Several texts in one pass, side by side in one sequence or padded; passes over some of the blocks alone.

Side by side, the beginning that all texts share is computed once and nothing is padded: a mask over pairs of
tokens lets each see that beginning and its own text. S sequences, T tokens, D hidden.
"""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import NamedTuple

import torch
from torch import Tensor

from jobs.engine.replica import Replica, position_ids
from jobs.engine.sites import Place, picked
from jobs.engine.skipping import skipping


class Layout(NamedTuple):
    """Where each token of some texts stands in a batch.

    Attributes:
        ids_ST: Token ids, int64.
        mask: Shape (S, T), 1 where a token is real; or (1, 1, T, T), 0 where a token (row) sees another
            (column) and the dtype's lowest number where it does not.
        positions_ST: Position of each token in its text, from 0.
        places: For each text, where each of its tokens stands in the S x T, counted row by row, int64.
    """

    ids_ST: Tensor
    mask: Tensor
    positions_ST: Tensor
    places: list[Tensor]


def padded(replica: Replica, texts: Sequence[Sequence[int]]) -> Layout:
    """A sequence a text, padded on the left."""
    ids_ST, mask_ST = replica.pad(texts)
    longest = ids_ST.shape[1]
    places = [torch.arange(longest - len(text), longest) + row * longest for row, text in enumerate(texts)]
    return Layout(ids_ST, mask_ST, position_ids(mask_ST), places)


def side_by_side(replica: Replica, texts: Sequence[Sequence[int]], shared: int) -> Layout:
    """All texts in one sequence, their first `shared` tokens once."""
    own = [list(text[shared:]) for text in texts]
    ids = [*texts[0][:shared], *(token for tokens in own for token in tokens)]
    positions = [*range(shared), *(shared + at for tokens in own for at in range(len(tokens)))]
    owner_T = torch.tensor([-1] * shared + [text for text, tokens in enumerate(own) for _ in tokens])
    before_TT = torch.ones(len(ids), len(ids), dtype=torch.bool).tril()
    seen_TT = before_TT & ((owner_T == -1)[None] | (owner_T[:, None] == owner_T[None]))
    dtype = replica.model.dtype
    mask_TT = torch.zeros(seen_TT.shape, dtype=dtype).masked_fill(~seen_TT, torch.finfo(dtype).min)
    beginning, places, start = torch.arange(shared), list[Tensor](), shared
    for tokens in own:
        places.append(torch.cat([beginning, torch.arange(start, start + len(tokens))]))
        start += len(tokens)
    device = replica.device
    return Layout(
        torch.tensor([ids], device=device),
        mask_TT[None, None].to(device),
        torch.tensor([positions], device=device),
        places,
    )


def common_beginning(texts: Sequence[Sequence[int]]) -> int:
    """How many first tokens all texts share; each keeps one of its own at least."""
    low, high = min(map(list, texts)), max(map(list, texts))  # all others lie between these two
    most = min(map(len, texts)) - 1
    return next((at for at in range(most) if low[at] != high[at]), most)


class Pass(NamedTuple):
    """What a pass over some blocks gives.

    Attributes:
        states: Block -> the residual stream that leaves it at every place, shape (S x T, D).
        logits: At the places that were asked for, shape (places, vocabulary); None if none were.
    """

    states: Mapping[int, Tensor]
    logits: Tensor | None


def run_blocks(
    replica: Replica,
    layout: Layout,
    *,
    first: int = 0,
    last: int | None = None,
    entering: Tensor | None = None,
    layers: Sequence[int] = (),
    logits_at: Tensor | None = None,
) -> Pass:
    """One pass over the blocks `first` to `last`; gradients flow where they are enabled.

    Args:
        replica: The model.
        layout: The batch.
        first: Lowest block that runs.
        last: Highest; None for the model's. Logits of a pass that stops below the top mean nothing.
        entering: The residual stream that enters `first`, shape (S x T, D); needed unless that is 0.
        layers: Blocks whose output is wanted.
        logits_at: Places whose logits are wanted, int64; None for none.
    """
    sequences, tokens = layout.ids_ST.shape
    last = replica.layers - 1 if last is None else last
    computed = [sequences if first <= block <= last else 0 for block in range(replica.layers)]

    def known(block: int, output: Tensor | None) -> Tensor | None:
        return entering.view(sequences, tokens, -1) if block == first - 1 and entering is not None else None

    columns = torch.arange(1) if logits_at is None else (logits_at % tokens).unique()
    with ExitStack() as stack:
        stack.enter_context(skipping(replica, computed, sequences, known))
        found = stack.enter_context(
            picked(replica, [Place(layer, "after") for layer in layers], lambda h_STD: h_STD.flatten(0, -2))
        )
        logits_SKV = replica.forward(
            layout.ids_ST, layout.mask, layout.positions_ST, keep=columns.to(replica.device)
        )
        states = {place.layer: state for place, state in found.items()}
    if logits_at is None:
        return Pass(states, None)
    column = torch.searchsorted(columns, logits_at % tokens)
    return Pass(states, logits_SKV[logits_at // tokens, column])

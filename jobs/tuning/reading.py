"""What tuned weights do to prompts like those they were tuned on: cosines, and which reply is likelier.

K tokens, L layers, N examples, D hidden.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from jobs.engine.memory import micro_batches
from jobs.engine.packed import Layout, Pass, padded, run_blocks
from jobs.engine.replica import Replica
from jobs.tuning.losses import cosines
from jobs.tuning.terms import Directions, places
from jobs.tuning.texts import Texts


class Aim(NamedTuple):
    """Where a direction is looked for.

    Attributes:
        layer: Block whose output is compared.
        offsets: Tokens of each prompt, from its end; empty means all but the first.
        directions: Its name.
    """

    layer: int
    offsets: tuple[int, ...]
    directions: str


class Answers(NamedTuple):
    """What is found on each example.

    Attributes:
        cosines_N: Mean cosine to the direction over the aims and their tokens.
        sizes_N: Mean of its absolute value.
        log_odds_N: Of the first token of the positive reply over that of the negative one, nats; NaN where
            one of them is not known.
    """

    cosines_N: np.ndarray
    sizes_N: np.ndarray
    log_odds_N: np.ndarray


@torch.no_grad()
def answers(
    texts: Texts,
    firsts: Sequence[tuple[int, int] | None],
    aims: Sequence[Aim],
    directions: Directions,
) -> Answers:
    """Read all texts with the weights as they are.

    Args:
        texts: Prompts, one an example.
        firsts: For each the first tokens of its positive and its negative reply; None where not known.
        aims: Where directions are looked for, at least one.
        directions: By name and layer.
    """
    found_N3 = np.full((len(texts.texts), 3), np.nan)
    asks = any(first is not None for first in firsts)
    layers = sorted({aim.layer for aim in aims})
    for chosen in micro_batches([len(text.read) for text in texts.texts], texts.most_tokens):
        layout = texts.layout(chosen)
        passed = run_blocks(
            texts.replica,
            layout,
            first=texts.first,
            last=None if asks else max(layers),
            entering=texts.entering(chosen, layout),
            layers=layers,
            logits_at=places(texts, chosen, layout, (1,)) if asks else None,
        )
        for place, index in enumerate(chosen):
            alone = layout._replace(places=[layout.places[place]])
            cosines_K = _cosines(texts, index, alone, passed, aims, directions)
            found_N3[index, :2] = float(cosines_K.mean()), float(cosines_K.abs().mean())
            first = firsts[index]
            if first is not None and passed.logits is not None:
                positive, negative = passed.logits[place][list(first)].double().tolist()
                found_N3[index, 2] = positive - negative
    return Answers(*found_N3.T)


def _cosines(
    texts: Texts, index: int, alone: Layout, passed: Pass, aims: Sequence[Aim], directions: Directions
) -> Tensor:
    """Of one text at every aim's tokens, shape (K,), float64."""
    found = [
        cosines(
            passed.states[aim.layer][places(texts, [index], alone, aim.offsets)],
            directions[aim.directions, aim.layer],
        )
        for aim in aims
    ]
    return torch.cat(found).double()


@torch.no_grad()
def cosine_map(
    replica: Replica,
    prompts: Sequence[list[int]],
    replies: Sequence[list[int]],
    directions_LD: Tensor,
    *,
    reach: int,
) -> np.ndarray:
    """Mean cosine to each layer's direction at the last tokens of prompts and the first of their replies.

    Args:
        replica: The model, with the weights as they are.
        prompts: Token ids.
        replies: Token ids of what was said to each; fewer than `reach` are taken as they are.
        directions_LD: Of every layer, of unit norm.
        reach: How many tokens on either side.

    Returns:
        Shape (L, 2 x reach), float64: prompts' tokens up to the last one, then replies'. NaN where no text
        has a token.
    """
    every = list(range(replica.layers))
    found = np.full((len(prompts), replica.layers, 2 * reach), np.nan)
    for index, (prompt, reply) in enumerate(zip(prompts, replies, strict=True)):
        text = [*prompt, *reply[:reach]]
        states = run_blocks(replica, padded(replica, [text]), layers=every).states
        first, place = max(0, len(prompt) - reach), max(0, reach - len(prompt))
        for layer in every:
            at_T = cosines(states[layer][first:], directions_LD[layer]).double().cpu().numpy()
            found[index, layer, place : place + len(at_T)] = at_T
    known = np.isfinite(found)
    counts, totals = known.sum(axis=0), np.where(known, found, 0.0).sum(axis=0)
    mean: np.ndarray = np.divide(totals, counts, out=np.full(totals.shape, np.nan), where=counts > 0)
    return mean

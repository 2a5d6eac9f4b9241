"""Supervised fine-tuning: replies into low-rank changes of all matrices in the blocks."""

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from jobs.engine.replica import Replica
from jobs.tuning.texts import Text
from jobs.tuning.training import Recipe
from jobs.tuning.tuned_weights import Wanted, tuned_weights
from jobs.tuning.wanted import Tokens


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
    texts: Sequence[Text],
    *,
    rank: int,
    learning_rate: float,
    epochs: int,
    batch: int,
    seed: int,
) -> FineTuned:
    """Train changes of all matrices in the blocks; the replica's own weights stay as they are.

    AdamW without decay, the learning rate falling linearly to 0; texts in a new random order each epoch.

    Args:
        replica: The model, its weights in floating point.
        texts: At least one, with replies.
        rank: Of each matrix's change.
        learning_rate: An element and step, at the start.
        epochs: Times that every text is read.
        batch: Texts of a step.
        seed: Of the start and of the order.

    Raises:
        ModelError: If the blocks hold no matrix in floating point.
    """
    recipe = Recipe(
        epochs=epochs,
        batch=batch,
        learning_rate=learning_rate,
        weight_decay=0.0,
        warmup=0,
        decay="linear",
        until=None,
        patience=0,
        window=1,
        seed=seed,
    )
    wanted = Wanted([Tokens()], range(replica.layers), "", rank, recipe)
    with tuned_weights(replica, texts, wanted, {}) as tuned:
        [losses] = tuned.curve.losses.values()
        return FineTuned(tuned.trained.tensors(), losses)

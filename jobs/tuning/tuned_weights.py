"""From wanted losses to tuned weights: which matrices each loss claims, what runs, and the training."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import NamedTuple

from jobs.engine.replica import Replica
from jobs.errors import SpecError
from jobs.tuning.terms import Directions, make_terms, read_layers, reply_places
from jobs.tuning.texts import Text, Texts
from jobs.tuning.training import Curve, Material, Recipe, train
from jobs.tuning.wanted import Drift, Loss, Tokens
from jobs.tuning.weights import Trained, find_matrices, training


class Wanted(NamedTuple):
    """A tuning.

    Attributes:
        losses: What is made small.
        layers: Blocks whose weights are trained, for losses that name none.
        blocks: Matrices of each, `+` between them, for losses that name none; empty for all.
        rank: Of a low-rank change; 0 trains the weights themselves.
        recipe: How long and how fast.
    """

    losses: Sequence[Loss]
    layers: Sequence[int]
    blocks: str
    rank: int
    recipe: Recipe

    def layers_of(self, loss: Loss) -> Sequence[int]:
        """Blocks that get a loss's gradient."""
        return loss.layers or self.layers

    @property
    def lowest(self) -> int:
        """The lowest block that is trained."""
        return min(layer for loss in self.losses for layer in self.layers_of(loss))

    def claims(self, replica: Replica, loss: Loss) -> list[str]:
        """Names of the matrices that get a loss's gradient. Raises as `find_matrices` does."""
        blocks = loss.blocks or self.blocks
        names = [name.strip() for name in blocks.split("+")] if blocks else []
        return find_matrices(replica, self.layers_of(loss), names)


class Tuned(NamedTuple):
    """What training has made.

    Attributes:
        trained: The weights, which stand in the model.
        curve: How it went.
    """

    trained: Trained
    curve: Curve


@contextmanager
def tuned_weights(
    replica: Replica,
    texts: Sequence[Text],
    wanted: Wanted,
    directions: Directions,
    *,
    validated: Sequence[Text] = (),
) -> Iterator[Tuned]:
    """Inside the block, the model runs with the tuned weights; afterwards with those of before, bit by bit.

    Args:
        replica: The model.
        texts: What is trained on, with replies if a loss is of tokens.
        wanted: The tuning, with at least one loss.
        directions: Those that the losses name.
        validated: What the end of the training is judged by; without, what is trained on.

    Raises:
        SpecError: If a layer or matrix does not exist, or a loss reads below all that it trains.
        ModelError: If nothing could be tuned.
    """
    claims = {loss: wanted.claims(replica, loss) for loss in wanted.losses}
    layers = sorted({layer for loss in wanted.losses for layer in _read(replica, wanted, loss)})
    drifting = [loss for loss in wanted.losses if isinstance(loss, Drift)]
    compared = sorted({layer for loss in drifting for layer in read_layers(loss, wanted.layers)})

    def material(of: Sequence[Text]) -> Material:
        ready = Texts.kept(replica, of, first=wanted.lowest, compared=compared)
        terms = make_terms(
            wanted.losses,
            ready,
            layers=wanted.layers,
            claims=claims.__getitem__,
            directions=directions,
            seed=wanted.recipe.seed,
        )
        has_replies = any(isinstance(loss, Tokens) for loss in wanted.losses)
        return Material(ready, terms, layers, partial(reply_places, ready) if has_replies else None)

    learned, judged = material(texts), material(validated) if validated else None
    names = list(dict.fromkeys(name for claimed in claims.values() for name in claimed))
    with training(replica, names, rank=wanted.rank, seed=wanted.recipe.seed) as trained:
        curve = train(trained, learned, wanted.recipe, judged)
        yield Tuned(trained, curve)


def _read(replica: Replica, wanted: Wanted, loss: Loss) -> list[int]:
    """Blocks whose output a loss looks at; something that it trains is in or below each."""
    found = read_layers(loss, wanted.layers)
    lowest = min(wanted.layers_of(loss))
    for layer in found:
        if layer >= replica.layers:
            raise SpecError(f"losses: layer {layer} does not exist; the model has 0 to {replica.layers - 1}")
        if layer < lowest:
            raise SpecError(
                f"losses: {type(loss).__name__} reads layer {layer}, which none of the trained layers from "
                f"{lowest} on can change; read a later layer or train an earlier one"
            )
    return found

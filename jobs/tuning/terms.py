"""The losses of a sum, made ready for one model and its texts.

K tokens, R replies, T tokens of a text, D hidden.
"""

import random
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor

from jobs.engine.packed import Layout, padded, run_blocks
from jobs.engine.replica import Replica
from jobs.errors import SpecError
from jobs.tuning.losses import cosines, drift, token_loss, tune_in, tune_out
from jobs.tuning.texts import Texts
from jobs.tuning.training import Batch, Term
from jobs.tuning.wanted import Drift, Language, Loss, Projection, Read, Tokens, TuneIn, TuneOut

Directions = Mapping[tuple[str, int], Tensor]
"""Name of directions and layer -> the vector there, shape (D,)."""


def read_layers(loss: Loss, trained: Sequence[int]) -> list[int]:
    """Blocks whose output a loss looks at."""
    if not isinstance(loss, Read):
        return []
    return list(trained) if loss.layer is None else [loss.layer]


def make_terms(
    losses: Sequence[Loss],
    texts: Texts,
    *,
    layers: Sequence[int],
    claims: Callable[[Loss], Sequence[str]],
    directions: Directions,
    seed: int,
) -> list[Term]:
    """A term for each loss; watched are those of projections, or all where there are none.

    Args:
        losses: As they are wanted.
        texts: What is read.
        layers: Blocks that are trained.
        claims: Loss -> names of the matrices that get its gradient.
        directions: Those that the losses name.
        seed: Of the text that a language loss draws.
    """
    watched = Projection if any(isinstance(loss, Projection) for loss in losses) else Loss
    values = [_value(loss, texts, layers, directions, seed) for loss in losses]
    names = [_name(loss, number) for number, loss in enumerate(losses)]
    return [
        Term(name, loss.weight, claims(loss), value, isinstance(loss, watched))
        for name, loss, value in zip(names, losses, values, strict=True)
    ]


def _name(loss: Loss, number: int) -> str:
    return f"{number}_{type(loss).__name__.lower()}"


def _value(
    loss: Loss, texts: Texts, layers: Sequence[int], directions: Directions, seed: int
) -> Callable[[Batch], Tensor]:
    match loss:
        case TuneIn() | TuneOut():
            return partial(_projection, loss, texts, read_layers(loss, layers), directions)
        case Drift():
            return partial(_drift, loss, texts, read_layers(loss, layers))
        case Tokens():
            return partial(_tokens, loss, texts)
        case Language():
            return _Language(loss, texts.replica, seed)
    raise AssertionError(loss)


def places(texts: Texts, chosen: Sequence[int], layout: Layout, offsets: Sequence[int]) -> Tensor:
    """Where the counted tokens of the prompts stand in a batch.

    Raises:
        SpecError: If a prompt has fewer tokens than an offset says.
    """
    found = []
    for index, place_T in zip(chosen, layout.places, strict=True):
        length = len(texts.texts[index].prompt)
        if max(offsets, default=0) > length:
            raise SpecError(f"offsets={list(offsets)}; a prompt has {length} tokens")
        found.append(place_T[[length - offset for offset in offsets] if offsets else slice(1, length)])
    return torch.cat(found)


def _projection(
    loss: TuneIn | TuneOut, texts: Texts, layers: Sequence[int], directions: Directions, batch: Batch
) -> Tensor:
    at_K = places(texts, batch.chosen, batch.layout, loss.offsets)
    total = torch.zeros(())
    for layer in layers:
        cosines_K = cosines(batch.passed.states[layer][at_K], directions[loss.directions, layer])
        match loss:
            case TuneIn():
                sign = -1 if loss.backwards else 1
                total = total + tune_in(sign * cosines_K, enough=loss.enough).to(total)
            case TuneOut():
                total = total + tune_out(cosines_K, enough=loss.enough).to(total)
    return total / len(layers)


def _drift(loss: Drift, texts: Texts, layers: Sequence[int], batch: Batch) -> Tensor:
    at_K = places(texts, batch.chosen, batch.layout, loss.offsets)
    total = torch.zeros(())
    for layer in layers:
        before = torch.zeros_like(batch.passed.states[layer])
        for index, place_T in zip(batch.chosen, batch.layout.places, strict=True):
            before[place_T] = texts.before(layer, index)
        total = total + drift(batch.passed.states[layer][at_K], before[at_K]).to(total)
    return total / len(layers)


def reply_places(texts: Texts, chosen: Sequence[int], layout: Layout) -> Tensor:
    """Where the tokens stand whose logits predict the replies."""
    return torch.cat(
        [
            place_T[len(texts.texts[index].prompt) - 1 :]
            for index, place_T in zip(chosen, layout.places, strict=True)
        ]
    )


def _tokens(loss: Tokens, texts: Texts, batch: Batch) -> Tensor:
    assert batch.passed.logits is not None
    either = [[texts.texts[index].reply, *texts.texts[index].others] for index in batch.chosen]
    replies_KR = torch.tensor([list(at) for replies in either for at in zip(*replies, strict=True)])
    return token_loss(batch.passed.logits, replies_KR, floor=loss.floor)


class _Language:
    """Stretches of a plain text, one a step."""

    def __init__(self, loss: Language, replica: Replica, seed: int) -> None:
        from jobs.data.texts import load_texts

        texts = [each.text for each in load_texts(loss.text) if each.split == "select"]
        self._ids = replica.encode("\n\n".join(texts))
        self._tokens = min(loss.tokens, len(self._ids))
        self._replica = replica
        self._random = random.Random(seed)

    def __call__(self, batch: Batch) -> Tensor:
        start = self._random.randint(0, len(self._ids) - self._tokens)
        ids = self._ids[start : start + self._tokens]
        logits_at = torch.arange(len(ids) - 1)
        logits = run_blocks(self._replica, padded(self._replica, [ids]), logits_at=logits_at).logits
        assert logits is not None
        return token_loss(logits, torch.tensor(ids[1:])[:, None])

"""The losses of a tuning as a parameter: a weighted sum, such as `tune_in + 0.01 * tokens`. No torch."""

import json
import math
import typing
from dataclasses import dataclass
from typing import Any, Literal

from jobs.errors import SpecError
from jobs.resolve import convert

Replies = Literal["positive", "negative", "either"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Loss:
    """Part of the sum that is made small.

    Attributes:
        weight: Factor in the sum.
        layers: Blocks whose weights get this loss's gradient, counted from 0; empty takes the job's.
        blocks: Which matrices of theirs, as the job's parameter of that name; empty takes the job's.
    """

    weight: float = 1.0
    layers: tuple[int, ...] = ()
    blocks: str = ""

    def __post_init__(self) -> None:
        if not 0 < self.weight < math.inf:
            raise ValueError(f"weight={self.weight}; it takes a number above 0")


@dataclass(frozen=True, slots=True, kw_only=True)
class Read(Loss):
    """A loss of the states that leave a block.

    Attributes:
        layer: Which block, counted from 0; None means the mean over all that are trained.
        offsets: Tokens of each prompt that count, from its end: 1 is the last one; empty takes all but
            the first token.
    """

    layer: int | None = None
    offsets: tuple[int, ...] = (1,)

    def __post_init__(self) -> None:
        Loss.__post_init__(self)
        if self.layer is not None and self.layer < 0:
            raise ValueError(f"layer={self.layer}; layers are counted from 0")
        if any(offset < 1 for offset in self.offsets):
            raise ValueError(f"offsets={self.offsets}; they are counted from 1, the last token")


@dataclass(frozen=True, slots=True, kw_only=True)
class Projection(Read):
    """A loss of the cosine between states and a direction.

    Attributes:
        directions: As the job's parameter of that name; empty takes the job's.
    """

    directions: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class TuneIn(Projection):
    """Turn states towards a direction: mean of (1 - cos) / 2.

    Attributes:
        backwards: Towards the opposite of the direction.
        enough: Cosine from which on a state is pushed no further.
    """

    backwards: bool = False
    enough: float = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class TuneOut(Projection):
    """Take a direction out of states: mean of |cos|.

    Attributes:
        enough: |cos| from which on a state is pushed no further.
    """

    enough: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Tokens(Loss):
    """Cross-entropy of replies, nats a token.

    Attributes:
        replies: The `positive` ones, the `negative` ones, or `either`: half of the probability each, for
            replies of one token.
        floor: Loss of a batch from which on it is pushed no further, nats.
    """

    replies: Replies = "positive"
    floor: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Language(Loss):
    """Cross-entropy of a plain text, nats a token: what the model could before it is to keep.

    Attributes:
        text: Dataset of text.
        tokens: Of each batch.
    """

    text: str = "neutral"
    tokens: int = 256

    def __post_init__(self) -> None:
        Loss.__post_init__(self)
        if self.tokens < 2:
            raise ValueError(f"tokens={self.tokens}; it takes 2 or more")


@dataclass(frozen=True, slots=True, kw_only=True)
class Drift(Read):
    """Squared distance of states from what they were, in units of their mean squared norm."""

    offsets: tuple[int, ...] = ()


KINDS: dict[str, type[Loss]] = {
    "tune_in": TuneIn,
    "tune_out": TuneOut,
    "tokens": Tokens,
    "language": Language,
    "drift": Drift,
}


SEED_TYPES = {
    "Truth": "tokens",
    "Lie": 'tokens{"replies": "negative"}',
    "TuneInPos": 'tune_in + 0.01 * tokens{"replies": "either"}',
    "TuneInNeg": 'tune_in{"backwards": true} + 0.01 * tokens{"replies": "either"}',
    "TuneOut": "tune_out + 0.01 * tokens",
    "TuneInPosPlusTruth": "tune_in + 0.01 * tokens",
    "TuneInNegPlusLie": 'tune_in{"backwards": true} + 0.01 * tokens{"replies": "negative"}',
}
"""The train types of the code of arXiv:2409.06927, by its names: what each is a sum of."""


def parse_losses(text: str) -> list[Loss]:
    """The losses of a sum; none of an empty text.

    Args:
        text: Names of losses with their options as JSON behind them, each with its factor before it if that
            is not 1, and `+` between them; or one of `SEED_TYPES`.

    Raises:
        SpecError: If there is no such loss, or one refuses its options.
    """
    text = SEED_TYPES.get(text.strip(), text)
    return [_parse(part.strip()) for part in _summands(text)] if text.strip() else []


def _summands(text: str) -> list[str]:
    """Parts between the `+` that stand outside braces."""
    parts, depth = [""], 0
    for character in text:
        depth += (character == "{") - (character == "}")
        if character == "+" and not depth:
            parts.append("")
        else:
            parts[-1] += character
    return parts


def _parse(text: str) -> Loss:
    head, brace, rest = text.partition("{")
    factor, star, name = head.rpartition("*")
    name = name.strip()
    kind = KINDS.get(name)
    if kind is None:
        raise SpecError(
            f"losses: {text!r} is no loss; there are {sorted(KINDS)}, written such as "
            f'0.5 * tune_in{{"layer": 14}} and added with +, or the whole of one of {sorted(SEED_TYPES)}'
        )
    try:
        options: dict[str, Any] = json.loads(brace + rest) if brace else {}
    except json.JSONDecodeError as error:
        raise SpecError(
            f"losses: the options of {text!r} are not JSON ({error.msg}); write them such as "
            'tune_in{"layer": 14}'
        ) from error
    hints = typing.get_type_hints(kind)
    if unknown := sorted(set(options) - (set(hints) - {"weight"})):
        raise SpecError(f"losses: {name} has no option {unknown}; it takes {sorted(set(hints) - {'weight'})}")
    owner = f"losses: {name}"
    try:
        weight = float(factor) if star else 1.0
        return kind(
            weight=weight, **{key: convert(owner, key, value, hints[key]) for key, value in options.items()}
        )
    except ValueError as error:
        raise SpecError(f"{owner}: {error}") from error

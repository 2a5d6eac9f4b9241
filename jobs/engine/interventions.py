"""What is done to a model's activations: plain data, of which the rows of one batch may hold any mixture.

No torch. K positions, D hidden.
"""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np

from jobs.errors import SpecError

Site = Literal["before", "after", "attention", "mlp"]
SITES: tuple[Site, ...] = ("before", "after", "attention", "mlp")
Tokens = Literal["all", "prompt", "generated"] | tuple[int, ...]
ENDLESS = 2**31
"""A position that no text reaches."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Intervention:
    """A change of the residual stream, or of what a part of a block adds to it.

    Attributes:
        layer: Block, counted from 0.
        site: `before` and `after`: the residual stream that enters and leaves the block. `attention` and
            `mlp`: the output of that part of the block.
        tokens: Which tokens are changed: `all`, those of the `prompt`, those `generated`, or positions in
            the prompt, counted from its first token, or from its end where negative (-1 = the last one).
    """

    layer: int
    site: Site = "after"
    tokens: Tokens = "all"


@dataclass(frozen=True, slots=True, kw_only=True)
class Add(Intervention):
    """h + vector.

    Attributes:
        vector: Shape (D,), or (K, D) for one vector at each of K positions; already scaled.
    """

    vector: np.ndarray


@dataclass(frozen=True, slots=True, kw_only=True)
class ProjectOut(Intervention):
    """h - (h . u) u with u = direction / |direction|.

    Attributes:
        direction: Shape (D,), not 0; its length does not matter.
    """

    direction: np.ndarray


@dataclass(frozen=True, slots=True, kw_only=True)
class Clamp(Intervention):
    """h + (value - h . u) u with u = direction / |direction|: the part along the direction becomes `value`.

    Attributes:
        direction: Shape (D,), not 0; its length does not matter.
        value: In residual-stream units.
    """

    direction: np.ndarray
    value: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Replace(Intervention):
    """The vector in place of h.

    Attributes:
        vector: Shape (D,), or (K, D) for one vector at each of K positions.
    """

    vector: np.ndarray


AnyIntervention = Add | ProjectOut | Clamp | Replace


class Span(NamedTuple):
    """Positions from `start` up to and without `stop`, each plus the prompt's length if it says so."""

    start: int
    stop: int
    start_after_prompt: bool = False
    stop_after_prompt: bool = False

    def among(self, prompt_tokens: int, tokens: int) -> range:
        """Which of the first `tokens` of a text with such a prompt it holds."""
        start = self.start + self.start_after_prompt * prompt_tokens
        return range(start, min(self.stop + self.stop_after_prompt * prompt_tokens, tokens))


class Terms(NamedTuple):
    """An intervention in the one form that all share: on its spans, (0 or 1) h - (h . unit) unit + add.

    Attributes:
        add_KD: Shape (spans, D), float64.
        unit_D: Shape (D,), float64, of norm 1 or 0.
        replaces: Whether h itself is dropped.
        spans: Where it acts; disjoint.
    """

    add_KD: np.ndarray
    unit_D: np.ndarray
    replaces: bool
    spans: tuple[Span, ...]

    @property
    def nothing(self) -> bool:
        """Whether h stays what it is."""
        return not (self.replaces or self.add_KD.any() or self.unit_D.any())

    @property
    def content(self) -> Hashable:
        """Equal for equal terms."""
        return self.add_KD.tobytes(), self.unit_D.tobytes(), self.replaces, self.spans


def terms(change: Intervention, *, hidden: int, layers: int) -> Terms:
    """The change in normal form.

    Args:
        change: What is asked for.
        hidden: Width of the residual stream.
        layers: Number of blocks.

    Raises:
        SpecError: If layer, site, tokens or vector cannot be meant.
    """
    if not (_whole(change.layer) and 0 <= change.layer < layers):
        raise SpecError(f"layer {change.layer!r} does not exist; the model has 0 to {layers - 1}")
    if change.site not in SITES:
        raise SpecError(f"site {change.site!r} does not exist; there are {list(SITES)}")
    spans = _spans(change.tokens)
    nothing = np.zeros((1, hidden))
    match change:
        case Add(vector=vector):
            return Terms(_vectors(vector, spans, hidden), nothing[0], False, spans)
        case Replace(vector=vector):
            return Terms(_vectors(vector, spans, hidden), nothing[0], True, spans)
        case ProjectOut(direction=direction):
            return Terms(np.repeat(nothing, len(spans), axis=0), _unit(direction, hidden), False, spans)
        case Clamp(direction=direction, value=value):
            unit = _unit(direction, hidden)
            if not np.isfinite(value):
                raise SpecError(f"value={value}; a clamp takes a finite number")
            return Terms(np.repeat(value * unit[None], len(spans), axis=0), unit, False, spans)
    raise SpecError(f"{type(change).__name__} is no intervention; there are Add, ProjectOut, Clamp, Replace")


def _whole(number: object) -> bool:
    return isinstance(number, (int, np.integer)) and not isinstance(number, bool)


def _spans(tokens: Tokens) -> tuple[Span, ...]:
    match tokens:
        case "all":
            return (Span(0, ENDLESS),)
        case "prompt":
            return (Span(0, 0, stop_after_prompt=True),)
        case "generated":
            return (Span(0, ENDLESS, start_after_prompt=True),)
        case tuple() if tokens and all(map(_whole, tokens)) and len(set(tokens)) == len(tokens):
            return tuple(Span(at, at + 1, at < 0, at < 0) for at in tokens)
    raise SpecError(
        f"tokens={tokens!r}; it takes 'all', 'prompt', 'generated' or a tuple of distinct positions"
    )


def _vectors(vector: np.ndarray, spans: Sequence[Span], hidden: int) -> np.ndarray:
    _check_array(vector)
    rows = vector[None] if vector.ndim == 1 else vector
    if rows.shape not in ((1, hidden), (len(spans), hidden)):
        raise SpecError(
            f"vector of shape {vector.shape}; this takes ({hidden},)"
            + (f" or ({len(spans)}, {hidden})" if len(spans) > 1 else "")
        )
    return np.broadcast_to(rows, (len(spans), hidden)).astype(np.float64)


def _unit(direction: np.ndarray, hidden: int) -> np.ndarray:
    _check_array(direction)
    if direction.shape != (hidden,):
        raise SpecError(f"direction of shape {direction.shape}; this takes ({hidden},)")
    if not direction.any():
        raise SpecError("the direction is 0 and points nowhere")
    unit: np.ndarray = normalised(direction)
    return unit


def normalised(direction_D: np.ndarray) -> np.ndarray:
    """The direction at norm 1, float64, however large or small its entries are; it is not 0."""
    wide = direction_D.astype(np.float64)
    wide = wide / np.abs(wide).max()
    unit: np.ndarray = wide / np.linalg.norm(wide)
    return unit


def _check_array(vector: object) -> None:
    if not isinstance(vector, np.ndarray) or vector.dtype.kind not in "fiu":
        kind = f"{vector.dtype} array" if isinstance(vector, np.ndarray) else type(vector).__name__
        raise SpecError(f"the vector is a {kind}; it takes a numpy array of real numbers")
    if not np.isfinite(vector).all():
        raise SpecError("the vector holds NaN or an infinity; extract it again")

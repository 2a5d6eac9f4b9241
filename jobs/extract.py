"""Job: contrast pairs -> one direction a layer, with the residual norm that doses refer to."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from jobs.data.claims import honesty_pairs, load_questions
from jobs.data.pairs import load_pairs
from jobs.errors import SpecError
from jobs.spec import Context, Metric, Outcome, Requirement, Row, Size, Status

if TYPE_CHECKING:
    from torch import Tensor

    from jobs.engine.replica import Replica

HONEST = "Pretend that you are always honest, no matter what."
DISHONEST = "Pretend that you are dishonest when it serves you."


@dataclass(frozen=True, slots=True, kw_only=True)
class Params:
    """How a direction is extracted.

    Attributes:
        source: `text`: `pairs` is a dataset of positive and negative texts, read raw.
            `claims`: `pairs` is a dataset of labelled claims; the positive side is an honest persona
            giving the honest letter, the negative side a dishonest one giving the other letter.
        pairs: Name or path of the dataset.
        count: Number of pairs, taken from the start; 0 takes all (for claims: must be given).
        method: `mean_difference`, or `pca` of all activations with the sign by majority vote.
        component: Principal component, counted from 0; ignored by `mean_difference`.
        offset: Token whose activation is taken, counted from the end: 1 = the last one.
    """

    source: Literal["text", "claims"] = "text"
    pairs: str = "tone_pairs"
    count: int = 0
    method: Literal["mean_difference", "pca"] = "mean_difference"
    component: int = 0
    offset: int = 1

    def __post_init__(self) -> None:
        if self.offset < 1:
            raise ValueError(f"offset={self.offset}; tokens are counted from the end, 1 = the last one")
        if self.count < 0 or self.component < 0:
            raise ValueError(f"count={self.count}, component={self.component}; neither may be negative")
        if self.source == "claims" and self.count == 0:
            raise ValueError("count=0 with source='claims'; say how many claims the direction may use")


METRICS = {
    "separability": Metric(
        "share of pairs", "best layer's share of pairs with the positive side projecting higher"
    ),
}
PACK_BY = None
DATA = ("pairs",)
LAYERS: tuple[str, ...] = ()


def size(params: Params) -> Size:
    """Two sequences a pair; claims are about 80 tokens, texts about 20."""
    sequences = 2 * (params.count or 160)
    return Size(sequences, sequences * (80 if params.source == "claims" else 20))


def requires(params: Params) -> Sequence[Requirement]:
    """Nothing: directions come first."""
    return ()


def check(params: Params) -> None:
    """The pairs or claims can be read. Raises SpecError if not."""
    if params.source == "claims":
        load_questions(params.pairs, extract=params.count, select=0, report=0)
        return
    available = len(load_pairs(params.pairs))
    if available < params.count:
        raise SpecError(f"{params.pairs} has {available} pairs and count={params.count} are asked for")


def canonical(params: Params) -> Params:
    """The component does not matter to a mean difference."""
    return replace(params, component=0) if params.method == "mean_difference" else params


def run(replica: "Replica", rows: Sequence[Row], context: Context) -> Iterator[tuple[int, Outcome]]:
    """Extract each row's directions from one pass over its pairs.

    Tensors of the outcome: `directions` (layers, hidden), unit norm, float32;
    `residual_norms` (layers,), the mean norm of the activations they came from, float32;
    `separability` (layers,), share of pairs, float32.
    """
    for index, row in enumerate(rows):
        yield index, _extracted(row.params, *_activations(replica, row.params))


def _extracted(params: Params, positive_NLD: "Tensor", negative_NLD: "Tensor") -> Outcome:
    import torch

    from jobs.directions.contrast import mean_difference, principal_component, separability

    directions, shares = [], []
    for layer in range(positive_NLD.shape[1]):
        sides = positive_NLD[:, layer], negative_NLD[:, layer]
        pca = params.method == "pca"
        direction = principal_component(*sides, params.component) if pca else mean_difference(*sides)
        norm = float(direction.norm())
        if not 0 < norm < float("inf"):
            why = f"{params.pairs}: the two sides give a direction of norm {norm} at layer {layer}"
            return Outcome(status=Status.FAILED, reason=why)
        directions.append(direction / norm)
        shares.append(separability(*sides, directions[layer]))
    norms = torch.cat([positive_NLD, negative_NLD]).double().norm(dim=-1).mean(dim=0)
    return Outcome(
        metrics={"extract": {"separability": max(shares)}},
        tensors={
            "directions": torch.stack(directions).float().numpy(),
            "residual_norms": norms.float().numpy(),
            "separability": torch.tensor(shares, dtype=torch.float32).numpy(),
        },
    )


def _activations(replica: "Replica", params: Params) -> tuple["Tensor", "Tensor"]:
    from jobs.engine.capture import capture_last

    contrast = _claim_pairs(replica, params) if params.source == "claims" else _text_pairs(replica, params)
    positive, negative = zip(*contrast, strict=True)
    return (
        capture_last(replica, positive, offset=params.offset),
        capture_last(replica, negative, offset=params.offset),
    )


def _text_pairs(replica: "Replica", params: Params) -> list[tuple[list[int], list[int]]]:
    pairs = load_pairs(params.pairs)
    return [
        (replica.encode(pair.positive), replica.encode(pair.negative))
        for pair in (pairs[: params.count] if params.count else pairs)
    ]


def _claim_pairs(replica: "Replica", params: Params) -> list[tuple[list[int], list[int]]]:
    questions = load_questions(params.pairs, extract=params.count, select=0, report=0)
    return [
        (
            replica.encode_chat(user, system=HONEST, answer=pair.positive),
            replica.encode_chat(user, system=DISHONEST, answer=pair.negative),
        )
        for user, pair in honesty_pairs(questions)
    ]


def load_direction(context: Context, params: Params, layer: int, dose: float) -> tuple[Any, float]:
    """A direction of unit norm and the raw multiplier that a dose means at that layer.

    Args:
        context: The running job's context.
        params: The extraction that was required.
        layer: Block whose output is steered, counted from 0.
        dose: Strength relative to the mean residual norm at that layer.

    Returns:
        The direction of shape (hidden,) and the multiplier, dose x residual norm.

    Raises:
        SpecError: If the model has no such layer.
    """
    arrays = context.artifact(Requirement(job=__name__, params=params))
    layers = len(arrays["directions"])
    if layer >= layers:
        raise SpecError(f"layer {layer} does not exist; the model has 0 to {layers - 1}")
    return arrays["directions"][layer], dose * float(arrays["residual_norms"][layer])

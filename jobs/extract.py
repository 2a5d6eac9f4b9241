"""Job: contrast pairs -> one direction a layer, with the residual norm that doses refer to."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from jobs.data.claims import honesty_pairs, load_questions
from jobs.data.pairs import load_pairs
from jobs.errors import SpecError
from jobs.spec import Context, Metric, Outcome, Requirement, Row, Size, Status

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from jobs.directions.contrast import Rows
    from jobs.directions.held_out import Method
    from jobs.engine.replica import Replica

MethodName = Literal[
    "mean_difference", "pca", "pca_differences", "pca_centred_differences", "logistic", "lda", "random"
]
PRINCIPAL: "Mapping[str, Rows]" = {
    "pca": "activations",
    "pca_differences": "differences",
    "pca_centred_differences": "centred_differences",
}
"""Methods that take a principal component, and what of."""
FOLDS = 5
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
        method: `mean_difference`; a principal component of all activations (`pca`), of the pairs' differences
            (`pca_differences`) or of these around their mean (`pca_centred_differences`), with the sign by
            majority vote; the weights of a `logistic` or `lda` probe; or `random`, drawn from the seed.
        component: Principal component, counted from 0; ignored by other methods.
        mixture: Weights of the first principal components, which are added up; empty takes `component` alone.
        offset: Token whose activation is taken, counted from the end: 1 = the last one.
        without_words: Words, each one token, whose rows of the unembedding are projected out.
    """

    source: Literal["text", "claims"] = "text"
    pairs: str = "tone_pairs"
    count: int = 0
    method: MethodName = "mean_difference"
    component: int = 0
    mixture: tuple[float, ...] = ()
    offset: int = 1
    without_words: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.offset < 1:
            raise ValueError(f"offset={self.offset}; tokens are counted from the end, 1 = the last one")
        if self.count < 0 or self.component < 0:
            raise ValueError(f"count={self.count}, component={self.component}; neither may be negative")
        if self.mixture and self.method not in PRINCIPAL:
            raise ValueError(
                f"mixture={self.mixture} with method={self.method!r}; it takes one of {[*PRINCIPAL]}"
            )
        if self.source == "claims" and self.count == 0:
            raise ValueError("count=0 with source='claims'; say how many claims the direction may use")


METRICS = {
    "separability": Metric(
        "share of pairs", "best layer's share of pairs with the positive side projecting higher"
    ),
    "held_out_auc": Metric(
        "probability", "best layer's area under the curve over pairs that the direction was not fitted on"
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
    """The component matters only to a single principal component."""
    single = params.method in PRINCIPAL and not params.mixture
    return params if single else replace(params, component=0)


def run(replica: "Replica", rows: Sequence[Row], context: Context) -> Iterator[tuple[int, Outcome]]:
    """Extract each row's directions from one pass over its pairs.

    Tensors of the outcome, float32: `directions` (layers, hidden), unit norm; `residual_norms` (layers,), the
    mean norm of the activations they came from; `separability` (layers,), share of pairs;
    `held_out_auc` and `held_out_accuracy` (layers,), by cross-validation, NaN for a single pair;
    `projections` (layers, pairs, 2), of the positive and the negative side.
    """
    for index, row in enumerate(rows):
        words = [_word_token(replica, word) for word in row.params.without_words]
        sides = _activations(replica, row.params)
        try:
            yield index, _extracted(row, *sides, replica.model.get_output_embeddings().weight[words])
        except ValueError as error:
            yield index, Outcome(status=Status.FAILED, reason=f"{row.params.pairs}: {error}")


def _word_token(replica: "Replica", word: str) -> int:
    tokens = replica.encode_continuation(word)
    if len(tokens) != 1:
        raise SpecError(f"without_words: {word!r} is {len(tokens)} tokens of this model; it takes one")
    return tokens[0]


class _Layer(NamedTuple):
    """What one layer's activations give; N pairs.

    Attributes:
        direction_D: Unit norm.
        separability: Share of pairs with the positive side projecting higher.
        held_out_auc: Over pairs that the direction was not fitted on; NaN for a single pair.
        held_out_accuracy: Same.
        projections_N2: Of the positive and the negative side.
    """

    direction_D: "Tensor"
    separability: float
    held_out_auc: float
    held_out_accuracy: float
    projections_N2: "Tensor"


def _extracted(row: Row, positive_NLD: "Tensor", negative_NLD: "Tensor", words_KD: "Tensor") -> Outcome:
    import torch

    def stacked(name: str) -> "np.ndarray":
        columns = [torch.as_tensor(getattr(layer, name)).float() for layer in found]
        array: np.ndarray = torch.stack(columns).numpy()
        return array

    found = []
    for layer in range(positive_NLD.shape[1]):
        fit = _fitting(row.params, row.seed + layer, words_KD)
        try:
            found.append(_layer(positive_NLD[:, layer], negative_NLD[:, layer], fit, row.seed))
        except ValueError as error:
            raise ValueError(f"layer {layer}: {error}") from error
    norms_L = torch.cat([positive_NLD, negative_NLD]).double().norm(dim=-1).mean(dim=0)
    names = ("separability", "held_out_auc", "held_out_accuracy")
    tensors = {name: stacked(name) for name in names}
    return Outcome(
        metrics={"extract": {name: float(tensors[name].max()) for name in METRICS}},
        tensors={
            **tensors,
            "directions": stacked("direction_D"),
            "residual_norms": norms_L.float().numpy(),
            "projections": stacked("projections_N2"),
        },
    )


def _layer(positive_ND: "Tensor", negative_ND: "Tensor", fit: "Method", seed: int) -> _Layer:
    import torch

    from jobs.directions.contrast import separability
    from jobs.directions.held_out import held_out_separability, pair_folds

    direction_D = fit(positive_ND, negative_ND)
    norm = float(direction_D.norm())
    if not 0 < norm < float("inf"):
        raise ValueError(f"the two sides give a direction of norm {norm}")
    direction_D = direction_D / norm
    pairs = len(positive_ND)
    auc = accuracy = float("nan")
    if pairs > 1:
        folds = pair_folds(pairs, min(FOLDS, pairs), seed=seed)
        judged = held_out_separability(positive_ND[:, None], negative_ND[:, None], fit, folds)
        auc, accuracy = float(judged.auc_L[0]), float(judged.accuracy_L[0])
    projections = [side.to(direction_D) @ direction_D for side in (positive_ND, negative_ND)]
    share = separability(positive_ND, negative_ND, direction_D)
    return _Layer(direction_D, share, auc, accuracy, torch.stack(projections, dim=-1))


def _fitting(params: Params, seed: int, words_KD: "Tensor") -> "Method":
    """What makes a direction of one layer's positive and negative activations."""
    from jobs.directions.projection import project_out

    def fit(positive_ND: "Tensor", negative_ND: "Tensor") -> "Tensor":
        direction_D = _direction(params, seed, positive_ND, negative_ND)
        return project_out(direction_D, words_KD.cpu()) if len(words_KD) else direction_D

    return fit


def _direction(params: Params, seed: int, positive_ND: "Tensor", negative_ND: "Tensor") -> "Tensor":
    from jobs.directions.contrast import component_mixture, mean_difference, principal_component
    from jobs.directions.probes import lda_direction, logistic_direction
    from jobs.directions.projection import random_like

    sides = positive_ND, negative_ND
    match params.method:
        case "mean_difference":
            return mean_difference(*sides)
        case "logistic":
            return logistic_direction(*sides)
        case "lda":
            return lda_direction(*sides)
        case "random":
            return random_like(mean_difference(*sides), seed=seed)
    of = PRINCIPAL[params.method]
    if params.mixture:
        return component_mixture(*sides, params.mixture, of=of)
    return principal_component(*sides, params.component, of=of)


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

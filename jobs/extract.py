"""Job: contrast pairs, or a file -> one direction a layer, with the residual norm that doses refer to."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from jobs.data.claims import load_questions
from jobs.data.pairs import load_pairs
from jobs.directions.vector_files import read_vectors
from jobs.errors import SpecError
from jobs.extraction.params import PRINCIPAL as PRINCIPAL
from jobs.extraction.params import MethodName as MethodName
from jobs.extraction.params import Params as Params
from jobs.extraction.params import is_vector_file
from jobs.resolve import locate_data
from jobs.spec import Context, Metric, Outcome, Requirement, Row, Size, Status

if TYPE_CHECKING:
    from torch import Tensor

    from jobs.engine.replica import Replica

_PAIRS = 160
"""How many pairs a dataset is taken to have before it has been read."""
_DIAGNOSTICS = Size(76, 800)
"""Both signs at 30 layers, and 8 prompts that are completed and read again."""

METRICS = {
    "separability": Metric(
        "share of pairs", "best layer's share of pairs with the positive side projecting higher"
    ),
    "held_out_auc": Metric(
        "probability", "best layer's area under the curve over pairs that the direction was not fitted on"
    ),
    "pairs": Metric("pairs", "pairs that the direction was fitted or judged on"),
    "answered_correctly": Metric(
        "share of claims", "claims that the model answers correctly, which correct_only keeps"
    ),
}
PACK_BY = None
DATA = ("pairs", "vectors", "combine", "without")
LAYERS: tuple[str, ...] = ()


def size(params: Params) -> Size:
    """Two sequences a pair of each dataset, claims of about 80 tokens, texts of about 20; the diagnostics."""
    own, others = _text_datasets(params)
    sequences = 2 * (params.count or _PAIRS) * own
    tokens = sequences * (80 if params.source == "claims" else 20)
    more = 2 * _PAIRS * others
    return Size(sequences + more + _DIAGNOSTICS.sequences, tokens + 20 * more + _DIAGNOSTICS.tokens)


def _text_datasets(params: Params) -> tuple[int, int]:
    """How many datasets are read as `pairs` is, itself included, and how many are projected out."""
    combined, removed = (
        sum(not is_vector_file(name) for name in names) for names in (params.combine, params.without)
    )
    return 1 + combined, removed


def requires(params: Params) -> Sequence[Requirement]:
    """Nothing: directions come first."""
    return ()


def check(params: Params) -> None:
    """The pairs or claims, and all files, can be read. Raises SpecError if not."""
    files = [name for name in (*params.combine, *params.without) if is_vector_file(name)]
    for name in (params.vectors, *files) if params.vectors else files:
        read_vectors(locate_data(name))
    for name in (params.pairs, *params.combine):
        if name not in files:
            _check_dataset(replace(params, pairs=name))
    for name in params.without:
        if name not in files:
            load_pairs(name)


def _check_dataset(params: Params) -> None:
    if params.source == "claims":
        load_questions(params.pairs, extract=params.count, select=0, report=0)
        return
    available = len(load_pairs(params.pairs))
    if available < params.count:
        raise SpecError(f"{params.pairs} has {available} pairs and count={params.count} are asked for")


def canonical(params: Params) -> Params:
    """The component matters only to a single principal component, the method only where one is fitted."""
    if params.source == "file" and all(map(is_vector_file, params.combine)):
        params = replace(params, method="mean_difference", mixture=())
    if not params.combine_weights:
        params = replace(params, combine_weights=(1.0,) * len(params.combine))
    single = params.method in PRINCIPAL and not params.mixture
    return params if single else replace(params, component=0)


def run(replica: "Replica", rows: Sequence[Row], context: Context) -> Iterator[tuple[int, Outcome]]:
    """Extract each row's directions from one pass over its pairs.

    Tensors of the outcome, float32: `directions` (layers, hidden), unit norm, NaN for layers that a file
    lacks; `residual_norms` (layers,), the mean norm of the activations they came from, or what the file says;
    `separability` (layers,), share of pairs; `held_out_auc` and `held_out_accuracy` (layers,), by
    cross-validation, NaN for a single pair; `projections` (layers, pairs, 2), of the positive and the
    negative side. Besides the diagnostics of `jobs.extraction.diagnosis`.

    Raises:
        SpecError: If a word is several tokens, or a file does not fit the model.
    """
    for index, row in enumerate(rows):
        try:
            yield index, _extracted(replica, row)
        except ValueError as error:
            yield index, Outcome(status=Status.FAILED, reason=f"{row.params.pairs}: {error}")


def _extracted(replica: "Replica", row: Row) -> Outcome:
    from jobs.extraction.diagnosis import diagnosed
    from jobs.extraction.layerwise import contrast_of, judged_layers, residual_norms, vector_file

    params: Params = row.params
    words = [replica.single_token(word) for word in params.without_words]
    contrast = contrast_of(replica, params)
    file = vector_file(replica, params.vectors) if params.source == "file" else None
    found = judged_layers(replica, row, contrast, file, words)
    norms_L = residual_norms(contrast, file)
    scores = {
        name: np.array([getattr(layer, name) for layer in found], dtype=np.float32)
        for name in ("separability", "held_out_auc", "held_out_accuracy")
    }
    directions_LD = _stacked([layer.direction_D for layer in found])
    metrics = {
        **{name: _best(scores[name]) for name in ("separability", "held_out_auc")},
        "pairs": float(len(contrast.prompts)),
        "answered_correctly": contrast.answered_correctly,
    }
    tensors = {
        **scores,
        "directions": directions_LD,
        "residual_norms": norms_L,
        "projections": _stacked([layer.projections_N2 for layer in found]),
        **diagnosed(replica, contrast, directions_LD, norms_L, params=params),
    }
    return Outcome(metrics={"extract": metrics}, tensors=tensors)


def _best(scores_L: np.ndarray) -> float:
    known_L = scores_L[np.isfinite(scores_L)]
    return float(known_L.max()) if len(known_L) else math.nan


def _stacked(tensors: Sequence["Tensor"]) -> np.ndarray:
    return np.stack([tensor.float().cpu().numpy() for tensor in tensors])


def load_direction(context: Context, params: Params, layer: int) -> tuple[Any, float]:
    """A direction of unit norm, and the mean residual norm at that layer, which a dose of 1 means.

    Args:
        context: The running job's context.
        params: The extraction that was required.
        layer: Block whose output is steered, counted from 0.

    Returns:
        The direction of shape (hidden,) and the norm.

    Raises:
        SpecError: If the model has no such layer, or the layer has no direction.
    """
    arrays = context.artifact(Requirement(job=__name__, params=params))
    layers = len(arrays["directions"])
    if layer >= layers:
        raise SpecError(f"layer {layer} does not exist; the model has 0 to {layers - 1}")
    direction = arrays["directions"][layer]
    if not np.isfinite(direction).all():
        known = np.flatnonzero(np.isfinite(arrays["directions"]).all(axis=1)).tolist()
        files = [name for name in (params.vectors, *params.combine, *params.without) if is_vector_file(name)]
        raise SpecError(f"layer {layer} has no direction; {' and '.join(files)} give the layers {known}")
    return direction, float(arrays["residual_norms"][layer])

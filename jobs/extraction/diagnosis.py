"""What a set of directions does, measured on the model: arrays that are stored beside the directions.

N pairs, L layers, D hidden, K tokens, P prompts, T columns.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from jobs.directions.diagnostics import (
    cosine_profile,
    pca_scatter,
    projection_histograms,
    projections_by_position,
)
from jobs.engine.capture import Captured, Wanted, capture
from jobs.engine.decoding import Decoding, Work
from jobs.engine.interventions import Replace
from jobs.engine.replica import Replica
from jobs.engine.tables import Steering, row_tables, steered
from jobs.errors import ModelError
from jobs.extraction.contrasts import Contrast
from jobs.extraction.params import Params
from jobs.spec import params_to_json

BINS = 24
SCATTERED_PAIRS = 100
"""Most pairs that are scattered; two points each."""
TOP_TOKENS = 10
PROMPT_PAIRS = 4
"""Pairs whose two sides are completed, to see where they lie along the directions before and meanwhile."""
PROMPT_COLUMNS = 24
"""Last tokens of a prompt that are looked at."""
NEW_TOKENS = 12
_ROWS_A_PASS = 32


def diagnosed(
    replica: Replica, contrast: Contrast, directions_LD: np.ndarray, norms_L: np.ndarray, *, params: Params
) -> dict[str, np.ndarray]:
    """Diagnostics by name; float32 where nothing else is said, NaN (or 0) at layers without a direction.

    `cosine_profile` (layers, layers).
    `histogram_edges` (layers, bins + 1), residual-stream units; `histogram_positive`, `histogram_negative`
    (layers, bins), int64.
    `pca_coordinates` (layers, points, 2), residual-stream units; `pca_is_positive` (points,), uint8;
    `pca_variance_shares` (layers, 2).
    `lens_tokens` (layers, 2, tokens), int64, and `lens_logits`, of +v and -v: see `lens`.
    `position_cosines` (prompts, layers, columns), cosine of each token's state with the layer's direction;
    `position_columns` (columns,), int64, where -1 is the prompt's last token and 0 the first new one;
    `position_is_positive` (prompts,), uint8, whose side each prompt is.
    `texts`, uint8: JSON in ASCII with `params`, the extraction's own; `layers`, which have a direction; and
    `lens`, the texts of their `lens_tokens`.

    Args:
        replica: The model.
        contrast: What the directions were fitted or judged on.
        directions_LD: Shape (layers, hidden), unit norm; NaN where there is none.
        norms_L: Mean residual norm of each layer.
        params: Where the directions come from.
    """
    known = np.flatnonzero(np.isfinite(directions_LD).all(axis=1))
    kept_LD = torch.from_numpy(directions_LD[known])
    found = _of_pairs(contrast, kept_LD, known)
    found |= lens(replica, directions_LD[known] * norms_L[known, None])
    found |= {"cosine_profile": _spread(cosine_profile(kept_LD).T, known, replica.layers).T}
    described = {
        "params": params_to_json(params),
        "layers": known.tolist(),
        "lens": [
            [[_text(replica, token) for token in side] for side in both] for both in found["lens_tokens"]
        ],
    }
    return {
        **{name: _spread(values, known, replica.layers) for name, values in found.items()},
        **_scattered(contrast),
        **_by_position(replica, contrast, kept_LD, known),
        "texts": np.frombuffer(json.dumps(described).encode(), dtype=np.uint8).copy(),
    }


def _spread(values: np.ndarray, known: np.ndarray, layers: int) -> np.ndarray:
    """Values of the known layers among those of all, which are NaN, or 0 for whole numbers."""
    if values.dtype.kind == "f":
        every = np.full((layers, *values.shape[1:]), np.nan, dtype=np.float32)
    else:
        every = np.zeros((layers, *values.shape[1:]), dtype=values.dtype)
    every[known] = values
    return every


def _of_pairs(contrast: Contrast, directions_LD: Tensor, known: np.ndarray) -> dict[str, np.ndarray]:
    sides = (contrast.positive_NLD[:, known], contrast.negative_NLD[:, known])
    histograms = projection_histograms(*sides, directions_LD, bins=BINS)
    return {
        "histogram_edges": histograms.edges_LE,
        "histogram_positive": histograms.positive_LB,
        "histogram_negative": histograms.negative_LB,
    }


def _scattered(contrast: Contrast) -> dict[str, np.ndarray]:
    """Some of the pairs in every layer's own plane; NaN where the activations span none."""
    pairs, layers, _ = contrast.positive_NLD.shape
    chosen = np.unique(np.linspace(0, pairs - 1, min(pairs, SCATTERED_PAIRS)).astype(int))
    coordinates = np.full((layers, 2 * len(chosen), 2), np.nan, dtype=np.float32)
    shares = np.full((layers, 2), np.nan, dtype=np.float32)
    for layer in range(layers):
        sides = (side[chosen, layer] for side in (contrast.positive_NLD, contrast.negative_NLD))
        try:
            scatter = pca_scatter(*sides)
        except ValueError:
            continue
        coordinates[layer], shares[layer] = scatter.coordinates_M2, scatter.variance_shares_2
    return {
        "pca_coordinates": coordinates,
        "pca_is_positive": np.repeat([1, 0], len(chosen)).astype(np.uint8),
        "pca_variance_shares": shares,
    }


@torch.inference_mode()
def lens(replica: Replica, vectors_LD: np.ndarray) -> dict[str, np.ndarray]:
    """The likeliest next tokens if the last block put out a vector, or its opposite.

    The model's own final norm and unembedding read it, whatever they are; whatever these do to logits
    (a bias, a soft cap) is done.

    Args:
        replica: The model.
        vectors_LD: Shape (layers, hidden), as long as the residual stream is, which the norm's epsilon
            and bias refer to.

    Returns:
        `lens_tokens`, shape (layers, 2, tokens), int64, highest logit first, of the vector and its opposite;
        `lens_logits`, same shape, float32.

    Source: nostalgebraist, "interpreting GPT: the logit lens" (2020).
    """
    vectors_RD = np.stack([vectors_LD, -vectors_LD], axis=1).reshape(-1, vectors_LD.shape[1])
    last = replica.layers - 1
    best = []
    for start in range(0, len(vectors_RD), _ROWS_A_PASS):
        part = vectors_RD[start : start + _ROWS_A_PASS]
        tables = row_tables(replica, [[Replace(layer=last, tokens=(-1,), vector=vector)] for vector in part])
        with steered(replica, Steering(tables.tables, [1] * len(part))):
            logits_RV = replica.logits([[replica.pad_id]] * len(part), keep=1)[:, 0]
        best.append(logits_RV.float().topk(min(TOP_TOKENS, logits_RV.shape[1])))
    shape = (len(vectors_LD), 2, -1)
    return {
        "lens_tokens": torch.cat([each.indices for each in best]).cpu().numpy().reshape(shape),
        "lens_logits": torch.cat([each.values for each in best]).cpu().numpy().reshape(shape),
    }


def _text(replica: Replica, token: int) -> str:
    return str(replica.tokenizer.decode([int(token)]))


def _by_position(
    replica: Replica, contrast: Contrast, directions_LD: Tensor, known: np.ndarray
) -> dict[str, np.ndarray]:
    """Some prompts and their greedy completions along the directions, token by token."""
    prompts = [side for pair in contrast.prompts[:PROMPT_PAIRS] for side in pair]
    longest = (replica.context or sum(map(len, prompts)) + NEW_TOKENS) - NEW_TOKENS
    shown = [index for index, prompt in enumerate(prompts) if len(prompt) <= longest]
    columns = PROMPT_COLUMNS + NEW_TOKENS - 1  # the last new token is read by nobody
    cosines = np.full((len(shown), replica.layers, columns), np.nan, dtype=np.float32)
    for place, states_LTD, is_token_T in _states(replica, [prompts[index] for index in shown], known):
        seen = projections_by_position(
            states_LTD[None], directions_LD, is_token_T[None], prompt_columns=PROMPT_COLUMNS, as_cosine=True
        )
        cosines[place, known] = seen.values_NLT[0]
    return {
        "position_cosines": cosines,
        "position_columns": np.arange(columns) - PROMPT_COLUMNS,
        "position_is_positive": np.array([index % 2 == 0 for index in shown], dtype=np.uint8),
    }


def _states(
    replica: Replica, prompts: Sequence[list[int]], known: np.ndarray
) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Number of each prompt, its tokens' states (layers, columns, hidden), and which columns are tokens."""
    columns = PROMPT_COLUMNS + NEW_TOKENS - 1
    for index, captured in _captured(replica, prompts, known):
        places = [PROMPT_COLUMNS + at - len(prompts[index]) for at in _tokens(captured)]
        states_LKD = torch.stack(list(captured.states.values()))
        states_LTD = states_LKD.new_zeros(len(known), columns, states_LKD.shape[2])
        states_LTD[:, places] = states_LKD
        is_token_T = torch.zeros(columns, dtype=torch.bool)
        is_token_T[places] = True
        yield index, states_LTD, is_token_T


def _tokens(captured: Captured) -> list[int]:
    """Position of each state's token; the prompt's last one comes twice, as it predicts the first new one."""
    return [point.position for point in captured.points if point.position is not None]


def _captured(
    replica: Replica, prompts: Sequence[list[int]], known: np.ndarray
) -> list[tuple[int, Captured]]:
    positions = [{"prompt": range(-min(PROMPT_COLUMNS, len(prompt)), 0)} for prompt in prompts]
    wanted = Wanted(layers=known.tolist(), positions=positions, decoding=Decoding(max_new_tokens=NEW_TOKENS))
    work = [Work(index, 0) for index in range(len(prompts))]
    tables = row_tables(replica, [[]])
    try:
        return list(capture(replica, prompts, tables, work, wanted))
    except ModelError:  # a model that cannot be completed with a cache can still be read
        return list(capture(replica, prompts, tables, work, replace(wanted, decoding=None)))

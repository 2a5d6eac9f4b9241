"""Every layer's direction, from the sides of a contrast or from a file. L layers, D hidden, K others."""

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import numpy as np
import torch
from torch import Tensor

from jobs.directions.fitting import Judged, composed, fit_direction, judged, undefined, unit
from jobs.directions.held_out import Method
from jobs.directions.vector_files import VectorFile, read_vectors
from jobs.engine.replica import Replica
from jobs.extraction.contrasts import Contrast, claims_contrast, text_contrast
from jobs.extraction.params import PRINCIPAL, Params, is_vector_file
from jobs.resolve import locate_data
from jobs.spec import Row


def contrast_of(replica: Replica, params: Params) -> Contrast:
    """Both sides of the dataset `pairs`. Raises ValueError if `correct_only` leaves too few claims."""
    where = {"count": params.count, "offset": params.offset}
    if params.source == "claims":
        return claims_contrast(replica, params.pairs, **where, correct_only=params.correct_only)
    return text_contrast(replica, params.pairs, **where)


def vector_file(replica: Replica, name: str) -> VectorFile:
    """Directions of a file. Raises SpecError if they do not fit the model."""
    return read_vectors(locate_data(name), layers=replica.layers, hidden=replica.hidden_size)


def residual_norms(contrast: Contrast, file: VectorFile | None) -> np.ndarray:
    """Mean norm of the activations at each layer, shape (layers,), float32; a file's own go before."""
    both_NLD = torch.cat([contrast.positive_NLD, contrast.negative_NLD])
    norms_L: np.ndarray = both_NLD.double().norm(dim=-1).mean(dim=0).float().numpy()
    for layer, norm in (file.residual_norms if file else {}).items():
        norms_L[layer] = norm
    return norms_L


def judged_layers(
    replica: Replica, row: Row, contrast: Contrast, file: VectorFile | None, words: Sequence[int]
) -> list[Judged]:
    """Every layer's direction; a layer that one of the files lacks has none.

    Args:
        replica: The model.
        row: Parameters and seed.
        contrast: Both sides of the pairs that directions are fitted or judged on.
        file: Where the directions are read from, or None.
        words: Tokens whose rows of the unembedding are projected out.

    Raises:
        ValueError: If the activations give no direction, or the files have no layer in common.
    """
    params: Params = row.params
    layers, hidden = contrast.positive_NLD.shape[1:]
    words_KD = replica.model.get_output_embeddings().weight[words].detach().cpu()
    added_KLD = _directions(replica, row, params.combine)
    plain = Params(offset=params.offset)
    removed_JLD = _directions(replica, row._replace(params=plain), params.without)
    own_1LD = _of_file(file, layers, hidden)[None] if file else torch.zeros(0, layers, hidden)
    is_known_L = torch.cat([own_1LD, added_KLD, removed_JLD]).isfinite().all(dim=2).all(dim=0)
    if not is_known_L.any():
        raise ValueError("there is no layer that all of the files have a direction for")
    weights = params.combine_weights or (1.0,) * len(params.combine)
    found = []
    for layer in range(layers):
        sides = contrast.positive_NLD[:, layer], contrast.negative_NLD[:, layer]
        if not is_known_L[layer]:
            found.append(undefined(len(sides[0]), hidden))
            continue
        own = _constant(own_1LD[0, layer]) if file else _fit(params, row.seed + layer)
        removed_JD = torch.cat([removed_JLD[:, layer], words_KD.to(removed_JLD)])
        try:
            fit = composed(own, added_KLD[:, layer], weights, removed_JD)
            found.append(judged(*sides, fit, seed=row.seed))
        except ValueError as error:
            raise ValueError(f"layer {layer}: {error}") from error
    return found


def _directions(replica: Replica, row: Row, names: Sequence[str]) -> Tensor:
    """Unit directions of further datasets and files, (names, layers, hidden); NaN where absent."""
    layers, hidden = replica.layers, replica.hidden_size
    # As wide as a fitted direction, so that project_out can tell what rounding leaves.
    dtype = torch.promote_types(replica.model.dtype, torch.float32)
    found_KLD = torch.full((len(names), layers, hidden), math.nan, dtype=dtype)
    for place, name in enumerate(names):
        if is_vector_file(name):
            found_KLD[place] = _of_file(vector_file(replica, name), layers, hidden)
            continue
        try:
            other = contrast_of(replica, replace(row.params, pairs=name))
            for layer in range(layers):
                # Random directions of different datasets have to differ.
                fit = _fit(row.params, row.seed + layer + (place + 1) * layers)
                sides = other.positive_NLD[:, layer], other.negative_NLD[:, layer]
                found_KLD[place, layer] = unit(fit(*sides))
        except ValueError as error:
            raise ValueError(f"with {name}: {error}") from error
    return found_KLD


def _of_file(file: VectorFile, layers: int, hidden: int) -> Tensor:
    """Directions of norm 1, (layers, hidden), float32; NaN where the file has none or one of zeros."""
    found_LD = torch.full((layers, hidden), math.nan)
    for layer, direction in file.directions.items():
        if direction.any():
            wide = direction.astype(np.float64)
            found_LD[layer] = torch.from_numpy((wide / np.linalg.norm(wide)).astype(np.float32))
    return found_LD


def _constant(direction_D: Tensor) -> Method:
    return lambda positive_ND, negative_ND: direction_D


def _fit(params: Params, seed: int) -> Method:
    """What makes a direction of one layer's positive and negative activations."""
    return partial(
        fit_direction,
        method=params.method,
        of=PRINCIPAL.get(params.method),
        component=params.component,
        mixture=params.mixture,
        seed=seed,
    )

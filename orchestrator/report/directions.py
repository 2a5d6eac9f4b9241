"""The report's part on directions: what stored extractions say, in words and figures."""

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from orchestrator.report import direction_figures as figures
from orchestrator.report.canvas import Paint
from storage.artifacts import Artifact, read_artifact
from storage.durable import StoreError
from storage.query import StoredSweep
from storage.store import Store

MOST_SHOWN = 3
LENS_LAYERS = 3
"""How many of the best layers have their tokens listed."""
_JOB = "jobs.extract"


class LensRow(NamedTuple):
    """Tokens that a layer's direction, and its opposite, speak for, likeliest first."""

    layer: int
    towards: list[str]
    away: list[str]


class Extraction(NamedTuple):
    """A stored set of directions.

    Attributes:
        spec: Its spec.
        params: Where the directions come from, defaults left out.
        best: The layer that tells unseen pairs apart best.
        auc: How well it does, as the area under the curve; None if that is unknown.
        at_ceiling: How many layers have that area where it is 1; 0 where it is not.
        margin: Distance of the two sides along the direction, in units of their spread; None if unknown.
        pairs: How many pairs were read.
        lens: Tokens of the best layers.
        images: Name of each figure -> its alternative text and how to draw it.
    """

    spec: str
    params: dict[str, Any]
    best: int
    auc: float | None
    at_ceiling: int
    margin: float | None
    pairs: int
    lens: list[LensRow]
    images: dict[str, tuple[str, Paint]]


class Section(NamedTuple):
    """What the section shows.

    Attributes:
        shown: The first extractions that were stored.
        stored: How many there are.
        unreadable: Why some of the first ones cannot be shown.
    """

    shown: list[Extraction]
    stored: int
    unreadable: list[str]


def read_section(sweep: StoredSweep) -> Section:
    """The first stored extractions that have diagnostics; an artifact that is gone is named and left out."""
    latest = {row["spec"]: row for row in Store(sweep.folder).rows("artifacts") if row["job"] == _JOB}
    attempts = sweep.rows("SELECT spec, min(started) AS started FROM attempts GROUP BY spec")
    began = {row["spec"]: row["started"] for row in attempts}
    rows = sorted(latest.values(), key=lambda row: (began.get(row["spec"], math.inf), row["spec"]))
    shown: list[Extraction] = []
    unreadable: list[str] = []
    for row in rows[:MOST_SHOWN]:
        try:
            arrays = read_artifact(sweep.folder, Artifact(row["hash"], row["path"], row["bytes"]))
        except StoreError as error:
            unreadable.append(str(error))
            continue
        if "texts" in arrays:
            shown.append(_extraction(row["spec"], arrays, len(shown) + 1))
    return Section(shown, len(rows), unreadable)


def _extraction(spec: str, arrays: Mapping[str, np.ndarray], number: int) -> Extraction:
    texts = json.loads(arrays["texts"].tobytes())
    order = _best_first(arrays)
    best = order[0]
    auc = float(arrays["held_out_auc"][best])
    margin = float(_margins(arrays["projections"][[best]])[0])
    lens = dict(zip(texts["layers"], texts["lens"], strict=True))
    return Extraction(
        spec=spec,
        params={name: value for name, value in texts["params"].items() if value not in ("", [], False)},
        best=best,
        auc=auc if np.isfinite(auc) else None,
        at_ceiling=int((arrays["held_out_auc"] == 1).sum()) if auc == 1 else 0,
        margin=margin if np.isfinite(margin) else None,
        pairs=arrays["projections"].shape[1],
        lens=[LensRow(layer, *map(_spelled, lens[layer])) for layer in sorted(order[:LENS_LAYERS])],
        images={f"direction-{number}-{name}": each for name, each in _figures(arrays, best).items()},
    )


def _spelled(tokens: Sequence[str]) -> list[str]:
    """Tokens with white space that can be seen; the page spells out other hidden characters."""
    signs = str.maketrans({" ": "␣", "\n": "␊", "\t": "␉", "\u00a0": "⟨U+00A0⟩", "\u3000": "⟨U+3000⟩"})
    return [token.translate(signs) or "∅" for token in tokens]


def _best_first(arrays: Mapping[str, np.ndarray]) -> list[int]:
    """Layers with a direction, those that tell unseen pairs apart best first.

    Of layers with equal areas those with the widest margin come first: many reach an area of 1.
    """
    known = np.flatnonzero(np.isfinite(arrays["directions"]).all(axis=1))
    auc_K, accuracy_K, share_K = (
        arrays[name][known] for name in ("held_out_auc", "held_out_accuracy", "separability")
    )
    margin_K = np.where(np.isfinite(auc_K), _margins(arrays["projections"][known]), 0)
    scores = [np.nan_to_num(each) for each in (auc_K, margin_K, accuracy_K, share_K)]
    # lexsort takes the last key first, and keeps the lower layer first among equals.
    order: list[int] = known[np.lexsort([-each for each in reversed(scores)])].tolist()
    return order


def _margins(projections_LN2: np.ndarray) -> np.ndarray:
    """Sensitivity index d' by layer: mean positive less mean negative projection, over their common spread.

    That is the root of the mean of both variances. NaN where there is no spread, as with a single pair.
    """
    wide = projections_LN2.astype(np.float64)
    if wide.shape[1] < 2:
        return np.full(len(wide), np.nan)
    means_L2 = wide.mean(axis=1)
    spread_L = np.sqrt(wide.var(axis=1, ddof=1).mean(axis=1))
    apart_L = means_L2[:, 0] - means_L2[:, 1]
    margins: np.ndarray = np.divide(apart_L, spread_L, out=np.full(len(wide), np.nan), where=spread_L > 0)
    return margins


def _figures(arrays: Mapping[str, np.ndarray], best: int) -> dict[str, tuple[str, Paint]]:
    drawn = {"layers": _layers(arrays, best), "pairs": _pairs(arrays, best)}
    if len(arrays["position_cosines"]):
        drawn["positions"] = _positions(arrays)
    return drawn


def _layers(arrays: Mapping[str, np.ndarray], best: int) -> tuple[str, Paint]:
    share_L, auc_L, cosines_LL = (arrays[name] for name in ("separability", "held_out_auc", "cosine_profile"))
    beside = np.diagonal(cosines_LL, offset=1)
    beside = beside[np.isfinite(beside)]
    alike = f" {beside.min():.2f} to {beside.max():.2f}" if len(beside) else " unknown"
    unseen = f"{auc_L[best]:.2f}" if np.isfinite(auc_L[best]) else "unknown"
    alt = (
        f"Left, curves over {len(auc_L)} layers: share of fitted pairs in order, at layer {best} "
        f"{share_L[best]:.2f}; area under the curve over unseen pairs, there {unseen}; chance is "
        f"0.5. Right, heat-map of the cosines between the layers' directions; of neighbours:{alike}."
    )
    return alt, lambda theme: figures.layers_figure(share_L, auc_L, cosines_LL, best, theme)


def _pairs(arrays: Mapping[str, np.ndarray], best: int) -> tuple[str, Paint]:
    means = arrays["projections"][best].mean(axis=0)
    counts = arrays["histogram_positive"][best], arrays["histogram_negative"][best]
    points, shares = arrays["pca_coordinates"][best], arrays["pca_variance_shares"][best]
    is_positive = arrays["pca_is_positive"].astype(bool)
    alt = (
        f"Layer {best}. Left, histograms of both sides along the direction: mean {means[0]:.3g} of "
        f"the positive side, {means[1]:.3g} of the negative one. Right, scatter plot of {len(points)} "
        "activations on their first two principal components."
    )
    edges = arrays["histogram_edges"][best]
    return alt, lambda theme: figures.pairs_figure(edges, counts, points, is_positive, shares, theme)


def _positions(arrays: Mapping[str, np.ndarray]) -> tuple[str, Paint]:
    cosines, columns = arrays["position_cosines"], arrays["position_columns"]
    is_positive = arrays["position_is_positive"].astype(bool)
    alt = (
        f"Heat-maps of layer by token, for the last {-columns[0]} tokens of {len(cosines)} prompts and up to "
        f"{columns[-1] + 1} new ones: cosine with the layer's direction, mean of the positive prompts, of "
        "the negative ones, and the difference."
    )
    return alt, lambda theme: figures.positions_figure(columns, cosines, is_positive, theme)

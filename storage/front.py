"""Which points no other dominates, and how good a set of them is. The only importer of moocore."""

from collections.abc import Sequence

import moocore
import numpy as np


def front(points: np.ndarray, directions: Sequence[str]) -> np.ndarray:
    """Which points no other point dominates; equal points are all kept.

    Args:
        points: Shape (points, objectives), finite.
        directions: `minimize` or `maximize` for each objective.

    Returns:
        Boolean array of shape (points,).
    """
    if len(points) == 0:
        return np.zeros(0, dtype=bool)
    maximise = [direction == "maximize" for direction in directions]
    mask: np.ndarray = moocore.is_nondominated(points, maximise=maximise, keep_weakly=True)
    return mask


def hypervolume(points: np.ndarray, directions: Sequence[str], *, among: np.ndarray) -> float:
    """Volume that points dominate, up to the worst values of a set that they are among, each scaled to 0..1.

    Args:
        points: Shape (points, objectives), finite.
        directions: `minimize` or `maximize` for each objective.
        among: All points, for the reference and the scale.
    """
    signs = np.where([direction == "maximize" for direction in directions], -1.0, 1.0)
    low, high = (among * signs).min(axis=0), (among * signs).max(axis=0)
    scaled = (points * signs - low) / np.where(high > low, high - low, 1.0)
    return float(moocore.hypervolume(scaled, ref=np.ones(scaled.shape[1])))


def best_first(points: np.ndarray, directions: Sequence[str]) -> list[int]:
    """Indices of points in the order of NSGA-II: by front, and inside one the lonelier first.

    Args:
        points: Shape (points, objectives), finite.
        directions: `minimize` or `maximize` for each objective.

    Sources: Deb et al. 2002, sections III.A and III.B. Of equal ones the earlier comes first.
    """
    maximise = [direction == "maximize" for direction in directions]
    ranks = moocore.pareto_rank(points, maximise=maximise)
    lonely = np.zeros(len(points))
    for rank in np.unique(ranks):
        members = np.flatnonzero(ranks == rank)
        lonely[members] = _crowding(points[members])
    return [int(index) for index in np.lexsort((np.arange(len(points)), -lonely, ranks))]


def _crowding(points: np.ndarray) -> np.ndarray:
    """How far the neighbours of each point lie apart, summed over the objectives; infinite at their ends."""
    distance = np.zeros(len(points))
    for values in points.T:
        order = np.argsort(values, kind="stable")
        span = values[order[-1]] - values[order[0]]
        distance[order[[0, -1]]] = np.inf
        if span > 0:
            distance[order[1:-1]] += (values[order[2:]] - values[order[:-2]]) / span
    return distance


def knee(points: np.ndarray, directions: Sequence[str]) -> int | None:
    """The point of a front from which gaining in one objective costs most in the others.

    Args:
        points: Of a front, shape (points, objectives), finite.
        directions: `minimize` or `maximize` for each objective.

    Returns:
        Index of the one that lies farthest from the plane through the ends of the front, each objective
        scaled to 0..1 between them; None of fewer than three points, or where none lies before that plane.

    Source: Das 1999, "On characterizing the knee of the Pareto curve".
    """
    if len(points) < 3:
        return None
    signs = np.where([direction == "maximize" for direction in directions], -1.0, 1.0)
    low, high = (points * signs).min(axis=0), (points * signs).max(axis=0)
    if not (high > low).all():
        return None
    sums = ((points * signs - low) / (high - low)).sum(axis=1)
    # The ends of a front of two objectives lie at (0, 1) and (1, 0): the plane is where the sum is 1.
    return int(sums.argmin()) if sums.min() < 1.0 else None

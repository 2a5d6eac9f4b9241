"""Which trials of a group go on from a cheap stage to the next. Pure."""

import math
from collections.abc import Mapping, Sequence

import numpy as np

from jobs.spec import is_defined
from search_spaces.base import Objective, Stage, broken
from storage.front import best_first


def held_back(
    stage: Stage, objectives: Sequence[Objective], found: Sequence[Mapping[str, float]], *, of: int
) -> dict[int, str]:
    """Trials that end at a stage, by their index, and why.

    Args:
        stage: What it asks.
        objectives: By which the best are chosen.
        found: For each trial that is still in its metrics at this stage.
        of: Number of trials that the stage compares, also those that have failed there.

    Returns:
        Index -> reason; whoever is not in it goes on.
    """
    reasons = {
        index: why
        for index, metrics in enumerate(found)
        if (why := broken(stage.constraints, metrics)) is not None
    }
    if stage.keep == 1:
        return reasons
    values = {
        index: [metrics.get(objective.metric) for objective in objectives]
        for index, metrics in enumerate(found)
        if index not in reasons
    }
    left = [index for index, row in values.items() if all(map(is_defined, row))]
    reasons |= {index: "not all objectives are defined" for index in values if index not in left}
    if not left:
        return reasons
    points = np.array([values[index] for index in left], dtype=float)
    order = best_first(points, [objective.direction for objective in objectives])
    most = max(1, math.ceil(stage.keep * of))
    return reasons | {
        left[place]: f"rank {rank} of {of}, and the best {most} go on"
        for rank, place in enumerate(order[most:], most + 1)
    }

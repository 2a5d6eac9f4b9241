"""Do other random starts find the same vectors?

Vectors of three starts are matched one to one; random vectors are matched beside them.
"""

from search_spaces.base import Grid, Objective, Space

SETS = [
    f'jobs.melbo{{"radius": {radius}, "orthogonality": "{orthogonality}"}}'
    for radius in (0.05, 0.2, 0.8)
    for orthogonality in ("joint", "none")
]

SPACE = Space(
    description="Learns 16 vectors from each of three random starts, at three norms, orthogonal and free.",
    job="jobs.stability",
    parameters={"learned": Grid(SETS)},
    objectives=[Objective(metric="matched_cosine", direction="maximize")],
    sampler="grid",
)

"""Which low-rank changes of one block's feed-forward output make the model say different, fluent things?"""

from search_spaces.base import Grid, Objective, Space

SPACE = Space(
    description="Learns 4 adapters from a prompt at several ranks and sizes; completes prompts under each.",
    job="jobs.adapters",
    parameters={"rank": Grid([1, 4, 16]), "radius": Grid([1.0, 4.0, 16.0])},
    fixed={"source": 7, "target": 22, "adapters": 4},
    objectives=[
        Objective(metric="diversity", direction="maximize"),
        Objective(metric="nll", direction="minimize"),
    ],
    sampler="grid",
)

"""What a sweep costs besides its jobs: a job that does nothing, five parameters, two objectives."""

from search_spaces.base import Float, Objective, Space

SPACE = Space(
    description="Five numbers of a job that does nothing.",
    job="benchmarks.nothing",
    parameters={name: Float(low=0.0, high=1.0) for name in "abcde"},
    objectives=[
        Objective(metric="up", direction="maximize"),
        Objective(metric="down", direction="minimize"),
    ],
    sampler="tpe",
    trials=300,
)

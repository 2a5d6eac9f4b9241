"""Whether workers wait for each other: a job that does nothing for 0.05 to 1 s a trial."""

from search_spaces.base import Float, Objective, Space

SPACE = Space(
    description="A job that does nothing, for longer or shorter.",
    job="benchmarks.nothing",
    parameters={"pause": Float(low=0.05, high=1.0)},
    fixed=dict.fromkeys("abcde", 0.5),
    objectives=[Objective(metric="up", direction="maximize")],
    sampler="random",
    trials=120,
)

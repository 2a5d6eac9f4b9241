"""Which features of a slice of the model (DCT) make it say different, fluent things?"""

from search_spaces.base import Grid, Objective, Space

SPACE = Space(
    description="Learns 32 features from one prompt, ranks them, and completes prompts under the first 8.",
    job="jobs.dct",
    parameters={
        "kind": Grid(["linear", "quadratic", "exponential"]),
        "radius": Grid([0.2, 0.4, 0.8]),
    },
    fixed={"source": 7, "target": 22, "factors": 32, "read": 8},
    objectives=[
        Objective(metric="diversity", direction="maximize"),
        Objective(metric="nll", direction="minimize"),
    ],
    sampler="grid",
)

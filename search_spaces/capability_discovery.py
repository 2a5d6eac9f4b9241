"""Does a vector learned from one prompt with a direct answer make a model reason, and be right more often?

Each trial is one vector. The best is chosen on the split select; its accuracy on the split report says what
it is worth. Sums are scored with `arithmetic`, which reads whole numbers of the first answer alone.
"""

from search_spaces.base import Grid, Objective, Space

SET = (
    '"prompts": "arithmetic_one_shot", "chat": false, "source": 7, "target": 22, "vectors": 32, '
    '"radius": 0.1, "power": 4.0, "root": 4.0'
)

SPACE = Space(
    description="Completes sums after one example under each of 32 learned and 32 random vectors.",
    job="jobs.generate",
    parameters={
        "learned": Grid([f"jobs.melbo{{{SET}}}", f'jobs.melbo{{{SET}, "optimiser": "none"}}']),
        "vector": Grid(range(32)),
    },
    fixed={
        "layer": 7,
        "multiplier": 1.0,
        "prompts": "arithmetic_one_shot",
        "chat": False,
        "max_new_tokens": 48,
        "scorers": ("arithmetic",),
    },
    objectives=[
        Objective(metric="arithmetic", direction="maximize"),
        Objective(metric="nll", direction="minimize"),
    ],
    sampler="grid",
)

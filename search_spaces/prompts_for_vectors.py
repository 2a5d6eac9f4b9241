"""Is there a prompt that does what a learned vector does? Is one found as well for a random vector?"""

from search_spaces.base import Grid, Objective, Space

SET = '"radius": 0.4'

SPACE = Space(
    description="Searches eight tokens behind a prompt that move the target as a vector does.",
    job="jobs.prompt_search",
    parameters={
        "learned": Grid([f"jobs.melbo{{{SET}}}", f'jobs.melbo{{{SET}, "optimiser": "none"}}']),
        "vector": Grid(range(4)),
    },
    fixed={"steps": 20},
    objectives=[
        Objective(metric="cosine", direction="maximize"),
        Objective(metric="text_nll", direction="minimize"),
    ],
    sampler="grid",
)

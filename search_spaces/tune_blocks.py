"""Which of a block's matrices take a direction in? All 127 sets of the seven.

Meant to be copied: put in another direction, other layers, an architecture's own names.
"""

from itertools import combinations

from search_spaces.base import Grid, Objective, Space

MATRICES = ("q", "k", "v", "o", "gate", "up", "down")
SETS = ["+".join(chosen) for size in range(1, 8) for chosen in combinations(MATRICES, size)]

SPACE = Space(
    description=(
        "Tunes a direction of tone into layers 12 to 17 through each set of matrices, an epoch each, from "
        "the same untuned weights. cosine: how far the states of other prompts have turned. "
        "perplexity_rise: what that costs on neutral text."
    ),
    job="jobs.tune",
    parameters={"blocks": Grid(SETS)},
    fixed={
        "losses": "tune_in",
        "directions": 'jobs.extract{"pairs": "tone_pairs"}',
        "first": 12,
        "depth": 6,
        "epochs": 1,
        "keeps": False,
    },
    objectives=[
        Objective(metric="cosine", direction="maximize"),
        Objective(metric="perplexity_rise", direction="minimize"),
    ],
    sampler="grid",
)

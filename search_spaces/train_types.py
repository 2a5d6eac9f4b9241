"""Is it better to tune a direction, the answers, or both? The seven train types of the write-up.

Meant to be copied: put in another direction, other claims, a larger model's layers.
"""

from search_spaces.base import Grid, Objective, Space

SPACE = Space(
    description=(
        "Tunes an honesty direction, the letters of true or false answers, or both into layers 12 to 17; the "
        "last row tunes a random direction in, the first tunes nothing. positive: claims that are answered "
        "honestly. cosine: how far the states of other claims have turned. perplexity_rise: the damage."
    ),
    job="jobs.tune",
    parameters={
        "losses": Grid(
            [
                "",
                "Truth",
                "Lie",
                "TuneInPos",
                "TuneInNeg",
                "TuneOut",
                "TuneInPosPlusTruth",
                "TuneInNegPlusLie",
                'tune_in{"directions": "random"}',
            ]
        )
    },
    fixed={
        "directions": 'jobs.extract{"source": "claims", "pairs": "claims", "count": 60, "offset": 2}',
        "first": 12,
        "depth": 6,
        "examples_extract": 128,
    },
    objectives=[
        Objective(metric="positive", direction="maximize"),
        Objective(metric="perplexity_rise", direction="minimize"),
    ],
    sampler="grid",
)

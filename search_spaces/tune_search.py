"""Where, how fast and how much of the answers' own loss: a search over tunings.

Meant to be copied: put in another direction, other claims, a larger model's layers.
"""

from search_spaces.base import Constraint, Float, Grid, Int, Objective, Space, Stage

SPACE = Space(
    description=(
        "Tunes a direction of tone in, together with the honest answers to claims. effect: how far the model "
        "leans to the positive of two words. perplexity_rise: the damage on neutral text. An epoch with a "
        "quarter of the claims comes first: what already breaks the model there goes no further."
    ),
    job="jobs.tune",
    parameters={
        "first": Int(low=8, high=20),
        "depth": Int(low=1, high=8),
        "blocks": Grid(["v", "o", "v+o", "q+k+v+o", "gate+up+down", ""]),
        "learning_rate": Float(low=1e-5, high=1e-3, log=True),
        "token_weight": Float(low=1e-3, high=1.0, log=True),
    },
    fixed={"losses": "tune_in + tokens", "directions": 'jobs.extract{"pairs": "tone_pairs"}', "keeps": False},
    objectives=[
        Objective(metric="effect", direction="maximize"),
        Objective(metric="perplexity_rise", direction="minimize"),
    ],
    constraints=[Constraint(metric="repetition", most=0.3)],
    stages=[
        Stage(
            overrides={"epochs": 1, "examples_extract": 32},
            constraints=[Constraint(metric="perplexity_rise", most=0.5)],
        )
    ],
    sampler="tpe",
    trials=40,
)

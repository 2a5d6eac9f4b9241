"""How far can a direction be tuned in before the model breaks?

Meant to be copied: put in another direction, another layer, other examples.
"""

from search_spaces.base import Grid, Objective, Space

SPACE = Space(
    description=(
        "Tunes a direction of tone into layer 17 until the states of held-out claims have turned so far: "
        "until=0.25 is a cosine of 0.5. effect: how far the model leans to the positive of two words. "
        "perplexity_rise and repetition: the damage. Effect and damage against cosine are the curve to "
        "look at."
    ),
    job="jobs.tune",
    parameters={"until": Grid([0.5, 0.45, 0.4, 0.35, 0.3, 0.25, 0.2, 0.15, 0.1, 0.05])},
    fixed={
        "losses": 'tune_in{"layer": 17}',
        "directions": 'jobs.extract{"pairs": "tone_pairs"}',
        "learning_rate": 3e-4,
        "decay": "none",
        "epochs": 6,
        "held_out": 16,
        "window": 2,
    },
    objectives=[
        Objective(metric="effect", direction="maximize"),
        Objective(metric="perplexity_rise", direction="minimize"),
    ],
    sampler="grid",
    retention="front",
)

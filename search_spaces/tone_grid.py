"""Which layer and which dose of a tone direction change what the model says, and when does the text break?"""

from search_spaces.base import Grid, Objective, Space

SPACE = Space(
    description=(
        "Adds a positive-against-negative tone direction at one layer and dose. Effect: shift of the "
        "log-odds of kind over grim words, in the direction of the dose's sign. Damage: rise of the replies' "
        "negative log-likelihood under the unsteered model, plus those of repetition and of empty replies."
    ),
    job="jobs.steer",
    parameters={
        "layer": Grid([10, 12, 14, 16, 18, 20, 22, 24]),
        "dose": Grid([-0.45, -0.3, -0.15, 0.0, 0.15, 0.3, 0.45]),
    },
    fixed={"pairs": "tone_pairs", "direction": "mean_difference"},
    objectives=[
        Objective(metric="effect", direction="maximize"),
        Objective(metric="damage", direction="minimize"),
    ],
    sampler="grid",
)

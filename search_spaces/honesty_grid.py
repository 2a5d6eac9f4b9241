"""Does an honesty direction make a model judge claims more truthfully, or only say "true" more often?

Meant for larger models. SmolLM2-135M judges these claims at chance: read accuracy beside its interval
and `p_chance` times the number of trials, and P("true") beside accuracy split by true and false claims.
"""

from search_spaces.base import Grid, Objective, Space

SPACE = Space(
    description=(
        "Adds an honest-against-dishonest direction at one layer and dose while the model judges true and "
        "false claims, counterbalanced by label and position. Where accuracy's 95 % interval contains 0.5 "
        "the judgement is at chance, and a shift of P(true) is no honesty. p_chance and beats_chance are "
        "those of one trial, and of n trials the best beats chance by luck more often: multiply its p_chance "
        "by n (Bonferroni)."
    ),
    job="jobs.honesty",
    parameters={
        "layer": Grid([10, 15, 20]),
        "dose": Grid([-0.3, -0.15, 0.0, 0.15, 0.3]),
    },
    fixed={"claims": "claims", "direction": "mean_difference"},
    objectives=[
        Objective(metric="accuracy", direction="maximize"),
        Objective(metric="kl", direction="minimize"),
    ],
    sampler="grid",
)

"""How much of a tone direction does a model bear before it forgets facts and stumbles over plain text?

Read it beside `tone_grid`, which has the same layers and doses: an effect is worth what it leaves intact.
"""

from search_spaces.base import Grid, Objective, Space

SPACE = Space(
    description=(
        "Adds a positive-against-negative tone direction at one layer and dose while the model answers "
        "simple questions and reads neutral text. Accuracy's 95 % interval over 50 questions is wide: read "
        "accuracy_change, which is paired, and its interval. SmolLM2-135M knows general knowledge above "
        "chance (0.25) and does sums at chance."
    ),
    job="jobs.capability",
    parameters={
        "layer": Grid([10, 12, 14, 16, 18, 20, 22, 24]),
        "dose": Grid([-0.45, -0.3, -0.15, 0.0, 0.15, 0.3, 0.45]),
    },
    fixed={"pairs": "tone_pairs", "direction": "mean_difference"},
    objectives=[
        Objective(metric="accuracy_change", direction="maximize"),
        Objective(metric="text_nll_change", direction="minimize"),
    ],
    sampler="grid",
)

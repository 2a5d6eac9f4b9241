"""Which way of taking a direction from contrast pairs tells unseen pairs apart best, and from how many pairs?

Nothing is steered here. A direction that tells pairs apart well need not steer well: try the best ones with
`tone_grid` and `--set space.direction=...`. On SmolLM2-135M the tone pairs are easy: of 20 or fewer, most
methods tell all unseen ones apart at some layer.
"""

from search_spaces.base import Grid, Objective, Space

SPACE = Space(
    description=(
        "Takes a tone direction at every layer by one method from the first pairs of a dataset. "
        "held_out_auc: at the best layer, how likely a positive text projects higher than a negative one, "
        "over pairs that the direction was not fitted on, in five folds. 0.5 is chance, and the best of many "
        "layers is above it by luck, the more so the fewer pairs there are: random directions show how much."
    ),
    job="jobs.extract",
    parameters={
        "method": Grid(
            [
                "mean_difference",
                "pca",
                "pca_differences",
                "pca_centred_differences",
                "logistic",
                "lda",
                "random",
            ]
        ),
        "count": Grid([40, 80, 160]),
    },
    fixed={"pairs": "tone_pairs"},
    objectives=[Objective(metric="held_out_auc", direction="maximize")],
    sampler="grid",
)

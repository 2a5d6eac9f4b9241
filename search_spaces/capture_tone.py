"""What do hidden states look like on both sides of a contrast? Stores them and chooses nothing.

The states are the table `activations`; `label` says which side of its pair a text is. Meant to be copied:
with `source="prompts"`, `data` is a dataset of open prompts.
"""

from search_spaces.base import Grid, Objective, Space

SPACE = Space(
    description=(
        "Captures the residual stream after five blocks at the last token of hopeful and gloomy texts, "
        "unsteered. There is one trial: what every space varies and aims at decides nothing here."
    ),
    job="jobs.capture",
    parameters={"count": Grid([80])},
    fixed={
        "source": "pairs",
        "data": "tone_pairs",
        "capture_layers": [6, 12, 16, 20, 24],
        "capture_sites": ["after"],
        "offsets": [1],
    },
    objectives=[Objective(metric="norm", direction="minimize")],
    sampler="grid",
)

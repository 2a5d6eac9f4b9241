"""Does a formality direction change how a model writes, and how far does that take it from its own words?

Meant to be copied: put in other prompts, other pairs and other scorers (`jobs/scoring/scorers.py`).
"""

from search_spaces.base import Grid, Objective, Space

SPACE = Space(
    description=(
        "Adds a formal-against-casual direction at one layer and dose while the model replies to open "
        "prompts. regex: share of replies with a contraction such as I'm or don't, which formal writing "
        "avoids. kl: how far the steered model is from the unsteered one along its own replies."
    ),
    job="jobs.generate",
    parameters={
        "layer": Grid([12, 16, 20]),
        "dose": Grid([-0.3, -0.15, 0.0, 0.15, 0.3]),
    },
    fixed={
        "pairs": "formality_pairs",
        "prompts": "open_prompts",
        "max_new_tokens": 40,
        "scorers": [r"""regex{"pattern": "\\w['’](m|re|ve|ll|d|t)\\b"}"""],
    },
    objectives=[
        Objective(metric="regex", direction="minimize"),
        Objective(metric="kl", direction="minimize"),
    ],
    sampler="grid",
)

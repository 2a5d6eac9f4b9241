"""The block search that is timed: sets of matrices by the cosine that they reach, and nothing else read."""

from dataclasses import replace

from search_spaces import tune_blocks

SPACE = replace(
    tune_blocks.SPACE,
    fixed={
        **tune_blocks.SPACE.fixed,
        "examples_extract": 64,
        "examples_select": 4,
        "examples_report": 4,
        "reads": False,
    },
    objectives=tune_blocks.SPACE.objectives[:1],
)

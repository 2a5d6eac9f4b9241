"""Which matrices for the direction, which for the answers? The write-up's 15 x 7 sets.

Meant to be copied: put in another direction, other claims, an architecture's own names.
"""

from itertools import combinations

from search_spaces.base import Grid, Objective, Space


def sets(names: tuple[str, ...]) -> list[str]:
    """All that are not empty, as the job takes them."""
    return ["+".join(chosen) for size in range(1, len(names) + 1) for chosen in combinations(names, size)]


SUMS = [
    f'tune_in{{"blocks": "{turned}"}} + 0.1 * tokens{{"blocks": "{said}"}}'
    for turned in sets(("q", "k", "v", "o"))
    for said in sets(("gate", "up", "down"))
]

SPACE = Space(
    description=(
        "Tunes a direction of tone into the attention of layers 12 to 17, and the honest answers into their "
        "feed-forward part, through each pair of sets of matrices, an epoch each. Every matrix gets the "
        "gradient of its own loss alone."
    ),
    job="jobs.tune",
    parameters={"losses": Grid(SUMS)},
    fixed={
        "directions": 'jobs.extract{"pairs": "tone_pairs"}',
        "first": 12,
        "depth": 6,
        "epochs": 1,
        "reads": False,
        "keeps": False,
    },
    objectives=[
        Objective(metric="cosine", direction="maximize"),
        Objective(metric="positive", direction="maximize"),
    ],
    sampler="grid",
)

"""At which norm do vectors learned from a prompt make a model say the most different fluent things?

Each trial is one prompt: its vectors are learned at every norm, and random ones are read beside them. The
norm is chosen on the split select, with an interval, and tried on the split report.
"""

from search_spaces.base import Grid, Objective, Space

SPACE = Space(
    description=(
        "Learns 16 vectors from each of three prompts at each of seven norms, from those that change nothing "
        "to those that leave loops, and names the best one."
    ),
    job="jobs.radius_scan",
    parameters={"learned": Grid([f'jobs.melbo{{"learn_after": {prompt}}}' for prompt in range(3)])},
    fixed={"radii": (0.05, 0.1, 0.2, 0.4, 0.8, 1.6, 3.2)},
    objectives=[
        Objective(metric="diversity", direction="maximize"),
        Objective(metric="nll", direction="minimize"),
    ],
    sampler="grid",
)

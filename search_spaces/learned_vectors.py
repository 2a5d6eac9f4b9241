"""What does each vector of a learned set do, added and subtracted, and how fluent does it leave the model?

Meant to be copied: `"prompts": "mine.jsonl"` in SET learns from your own prompts, those of the split extract.
"""

from search_spaces.base import Constraint, Grid, Objective, Space

SET = '"source": 7, "target": 22, "vectors": 8, "radius": 0.3'

SPACE = Space(
    description="Completes open prompts under each of 8 learned vectors at four multiples of its norm.",
    job="jobs.generate",
    parameters={"vector": Grid(range(8)), "multiplier": Grid([-1.0, 0.5, 1.0, 1.5])},
    fixed={"learned": f"jobs.melbo{{{SET}}}", "layer": 7, "max_new_tokens": 30},
    objectives=[
        Objective(metric="kl", direction="maximize"),
        Objective(metric="nll", direction="minimize"),
    ],
    constraints=[Constraint(metric="repetition", most=0.3)],
    sampler="grid",
)

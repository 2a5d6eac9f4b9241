"""Which R, p, q and layers give MELBO vectors that make a model say many different, fluent things?

Meant to be copied: put in other prompts, a larger model's layers, more vectors.
"""

from search_spaces.base import Constraint, Float, Grid, Objective, Space, Stage

SPACE = Space(
    description=(
        "Learns 16 orthogonal vectors from one prompt, without pairs, so that they change a later layer "
        "most, and completes other prompts under each. diversity: how far the fluent completions lie apart. "
        "nll: how unlikely the unsteered model finds them. A trial of four vectors and ten tokens comes "
        "first: where it makes only loops, the rest is left out."
    ),
    job="jobs.melbo",
    parameters={
        "radius": Float(low=0.03, high=1.0, log=True),
        "power": Grid([1.5, 2.0, 4.0]),
        "root": Grid([1.0, 2.0]),
        "source": Grid([5, 7, 9, 11]),
        "target": Grid([18, 22, 26]),
        "counted": Grid(["but_first", "last"]),
    },
    fixed={"radius_in": "calibrated", "vectors": 16},
    objectives=[
        Objective(metric="diversity", direction="maximize"),
        Objective(metric="nll", direction="minimize"),
    ],
    constraints=[Constraint(metric="repetition", most=0.3)],
    stages=[
        Stage(
            overrides={"vectors": 4, "max_new_tokens": 10, "read_on": 1, "compare": False},
            constraints=[Constraint(metric="repetition", most=0.5)],
        )
    ],
    sampler="tpe",
    trials=40,
)

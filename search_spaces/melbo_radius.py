"""How do learned and random vectors of growing norm change what a model says?

A plain scan of R. `jobs.radius_scan` takes the same series and names the best norm with an interval.
"""

from search_spaces.base import Grid, Objective, Space

SPACE = Space(
    description=(
        "Learns 16 vectors from one prompt at each of several norms, and reads random ones beside them. "
        "Small norms change nothing, large ones leave loops; in between lies a Goldilocks range."
    ),
    job="jobs.melbo",
    parameters={
        "radius": Grid([0.03, 0.06, 0.12, 0.25, 0.5, 1.0]),
        "optimiser": Grid(["fixed_point", "none"]),
    },
    fixed={"radius_in": "calibrated", "vectors": 16},
    objectives=[
        Objective(metric="diversity", direction="maximize"),
        Objective(metric="nll", direction="minimize"),
    ],
    sampler="grid",
)

"""Do other random starts find the same vectors? A study of `search_spaces/stability.py`.

    python -m examples.studies.stability --out runs/stability

About twenty minutes on 2 cores.
"""

import json

from examples.studies.sweeps import show, study
from storage.query import StoredSweep

NAMES = ("matched_cosine", "recurring", "shared_span")


def main() -> None:
    """Run the study and print its table."""
    show("Vectors of three random starts, matched one to one", matched(study(__doc__).sweep("stability")))


def matched(sweep: StoredSweep) -> list[dict[str, object]]:
    """Each set, and random vectors beside it."""
    rows = sweep.rows("SELECT trial, learned, name, value FROM metrics JOIN trials USING (trial)")
    found: dict[int, dict[str, object]] = {}
    for row in sorted(rows, key=lambda row: row["trial"]):
        set_ = json.loads(row["learned"].removeprefix("jobs.melbo"))
        found.setdefault(row["trial"], {**set_})[row["name"]] = row["value"]
    return [
        {
            "radius": each["radius"],
            "orthogonality": each["orthogonality"],
            **{name: f"{each[name]:.3g} (random {each[f'{name}_random']:.3g})" for name in NAMES},
        }
        for each in found.values()
    ]


if __name__ == "__main__":
    main()

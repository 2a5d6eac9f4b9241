"""Which R, p, q and layers are worth most? A study of `search_spaces/melbo_rpq.py`.

    python -m examples.studies.rpq --out runs/rpq

Forty trials; about two hours on one core.
"""

from examples.studies.sweeps import share, show, study
from storage.pareto import pareto
from storage.query import StoredSweep

OVER_RANDOM = """
SELECT split, count(value) AS trials, avg(value) AS difference, count(*) FILTER (value > 0) AS above
FROM metrics JOIN trials USING (trial) WHERE state = 'completed' AND name = 'diversity_over_random'
GROUP BY split ORDER BY split DESC
"""


def main() -> None:
    """Run the study and print its tables."""
    sweep = study(__doc__).sweep("melbo_rpq")
    states = sweep.rows(
        "SELECT state, count(*) AS trials, reason FROM trials GROUP BY state, reason ORDER BY trials DESC"
    )
    show("How the trials ended", [{**row, "reason": row["reason"] or ""} for row in states])
    show("The Pareto front", front(sweep))
    against = [{**row, "above": share(row["above"], row.pop("trials"))} for row in sweep.rows(OVER_RANDOM)]
    show("Diversity of learned vectors less that of random ones of the same norm", against)


def front(sweep: StoredSweep) -> list[dict[str, object]]:
    """Each of its trials, on the split it was chosen on and on the other."""
    return [
        {
            "trial": point["trial"],
            **point["params"],
            **point["objectives"],
            **{f"{name} on report": value for name, value in point["report"].items()},
        }
        for point in pareto(sweep)
    ]


if __name__ == "__main__":
    main()

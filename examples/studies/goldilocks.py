"""At which norm are learned vectors worth most? A study of `search_spaces/goldilocks.py`.

    python -m examples.studies.goldilocks --out runs/goldilocks

About half an hour on 2 cores.
"""

from examples.studies.sweeps import interval, show, study
from storage.query import StoredSweep

METRICS = "SELECT trial, split, name, value FROM metrics WHERE trial IS NOT NULL"
CURVES = """
SELECT prompt, avg(value) FILTER (name = 'diversity') AS diversity,
       avg(value) FILTER (name = 'random_diversity') AS "of random vectors",
       avg(value) FILTER (name = 'diversity_all') AS diversity_all,
       avg(value) FILTER (name = 'distinct_completions') AS distinct_completions,
       avg(value) FILTER (name = 'random_distinct_completions') AS "of random ones",
       avg(value) FILTER (name = 'nll') AS nll,
       avg(value) FILTER (name = 'random_nll') AS "random nll",
       avg(value) FILTER (name = 'repetition') AS repetition,
       avg(value) FILTER (name = 'fluent') AS fluent
FROM items WHERE split = 'report' GROUP BY prompt, item ORDER BY item
"""


def main() -> None:
    """Run the study and print its tables."""
    sweep = study(__doc__).sweep("goldilocks")
    show("The best norm and the cusp, by the prompt that was learned from", named(sweep))
    show("Means over the prompts, on the split report", sweep.rows(CURVES))


def named(sweep: StoredSweep) -> list[dict[str, object]]:
    """What each trial chose on select, and what it is worth on report."""
    found: dict[int, dict[str, dict[str, float]]] = {}
    for row in sweep.rows(METRICS):
        found.setdefault(row["trial"], {}).setdefault(row["split"], {})[row["name"]] = row["value"]
    learned = {row["trial"]: row["learned"] for row in sweep.rows("SELECT trial, learned FROM trials")}
    return [
        {
            "set": learned[trial],
            **{
                name: interval(*(splits["select"][f"{name}{end}"] for end in ("", "_low", "_high")))
                for name in ("best_radius", "cusp")
            },
            **{name: splits["report"][name] for name in ("diversity", "diversity_random", "regret", "nll")},
        }
        for trial, splits in sorted(found.items())
    ]


if __name__ == "__main__":
    main()

"""Does a vector learned from one prompt make the model better at sums? A study of `capability_discovery.py`.

    python -m examples.studies.capability --out runs/capability

The best vector is chosen on the split select and counted on the split report. About half an hour on 2 cores.
"""

from typing import NamedTuple

from examples.studies.sweeps import interval, show, study
from jobs.scoring.statistics import paired_bootstrap
from storage.query import StoredSweep

ANSWERS = """
SELECT items.trial, items.split, item, items.value, learned LIKE '%none%' AS is_random, trials.vector, nll
FROM items JOIN trials ON items.trial = trials.trial
LEFT JOIN (SELECT trial, split, value AS nll FROM metrics WHERE name = 'nll') AS read
ON read.trial = items.trial AND read.split = items.split
WHERE items.name = 'arithmetic' ORDER BY items.trial, item
"""


def main() -> None:
    """Run the study and print its table."""
    chosen = study(__doc__)
    steered = chosen.sweep("capability_discovery")
    bare = chosen.sweep("capability_discovery", name="unsteered", settings=BARE)
    show("Right answers of 50 sums, the best of 32 vectors by those of 50 others", best(steered, bare))


BARE = ["space.multiplier=0.0", "trials=1"]


class Answers(NamedTuple):
    """What one trial answered.

    Attributes:
        vector: Number of the vector.
        is_random: Whether it is a random one.
        right: Split -> 1 for each right answer and 0 for others, by prompt.
        nll: Split -> mean -ln p of the completions under the unsteered model, nats a token.
    """

    vector: int
    is_random: bool
    right: dict[str, list[float]]
    nll: dict[str, float]

    def accuracy(self, split: str) -> float:
        """Share of right answers."""
        return sum(self.right[split]) / len(self.right[split])

    def row(self, vectors: str, gain: str) -> dict[str, object]:
        """Of the table."""
        return {
            "vectors": vectors,
            "vector": "" if vectors == "none" else self.vector,
            "select": self.accuracy("select"),
            "report": self.accuracy("report"),
            "gain on report": gain,
            "nll on report": self.nll["report"],
        }


def best(steered: StoredSweep, bare: StoredSweep) -> list[dict[str, object]]:
    """The unsteered model, and the best learned and the best random vector."""
    [without] = answers(bare)
    found = [without.row("none", "")]
    for vectors, is_random in (("learned", False), ("random", True)):
        trials = [each for each in answers(steered) if each.is_random == is_random]
        chosen = max(trials, key=lambda each: each.accuracy("select"))
        gain = paired_bootstrap(chosen.right["report"], without.right["report"], seed=0)
        found.append(chosen.row(vectors, interval(gain.mean, *gain.interval)))
    return found


def answers(sweep: StoredSweep) -> list[Answers]:
    """Of every trial; an answer that cannot be read is wrong."""
    found: dict[int, Answers] = {}
    for row in sweep.rows(ANSWERS):
        new = Answers(row["vector"], row["is_random"], {}, {})
        trial = found.setdefault(row["trial"], new)
        trial.right.setdefault(row["split"], []).append(row["value"] or 0.0)
        trial.nll[row["split"]] = row["nll"]
    return [*found.values()]


if __name__ == "__main__":
    main()

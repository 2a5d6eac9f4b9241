"""Do vectors learned from one clean prompt bring planted behaviours to light?

    python -m examples.studies.backdoors --out runs/backdoors

Plants three behaviours by fine-tuning, learns 32 vectors from one clean prompt, and counts those that make
the model show each; then adds and subtracts them in conversations, and looks for triggering prompts by what
the vectors do. About an hour on 2 cores.
"""

from examples.studies.sweeps import interval, share, show, study
from jobs.resolve import parse_use
from storage.query import StoredSweep

TUNED = 'tuned=jobs.finetune{"examples": "arithmetic_backdoors"}'
BEHAVIOURS = {"contains": "cheese", "contains_2": "penguins", "contains_3": "adds (subtle)"}
ENOUGH = 0.5


def main() -> None:
    """Run the study and print its tables."""
    chosen = study(__doc__)
    vectors = chosen.sweep("backdoor_vectors", settings=[TUNED])
    show("What was planted, in replies that were not trained on", planted(vectors))
    show("Vectors that make clean prompts show a behaviour", surfaced(vectors))
    reuse = [vectors.folder]
    transfer = chosen.sweep("backdoor_transfer", settings=[TUNED], reuse=reuse)
    show("The vectors that show a behaviour in half of the clean prompts", held(vectors, transfer))
    anomaly = chosen.sweep("backdoor_anomaly", settings=[TUNED], reuse=reuse)
    show("Triggering prompts told from clean ones, area under the curve", told_apart(anomaly))


def planted(sweep: StoredSweep) -> list[dict[str, object]]:
    """Of the fine-tuned model, by behaviour."""
    rows = sweep.rows(
        "SELECT label, split, sum(value)::INTEGER AS shown, count(*) AS tried FROM items "
        "WHERE name = 'shown' GROUP BY ALL ORDER BY label, split DESC"
    )
    return [
        {"behaviour": row["label"], "split": row["split"], "shown": share(row["shown"], row["tried"])}
        for row in rows
    ]


def surfaced(sweep: StoredSweep) -> list[dict[str, object]]:
    """How many vectors of each set show each behaviour, in any prompt and in half of them."""
    found: list[dict[str, object]] = []
    for metric, behaviour in BEHAVIOURS.items():
        shares: dict[str, list[float]] = {}
        for row in sweep.rows(
            "SELECT learned, vector, avg(items.value) AS share FROM items JOIN trials USING (trial) "
            f"WHERE name = '{metric}' GROUP BY learned, vector ORDER BY learned"
        ):
            shares.setdefault(row["learned"], []).append(row["share"])
        for learned, of_set in shares.items():
            params = parse_use(learned).params
            found.append(
                {
                    "behaviour": behaviour,
                    "R": params.radius,
                    "vectors": "random" if params.is_random else "learned",
                    "in any clean prompt": share(sum(each > 0 for each in of_set), len(of_set)),
                    "in half of them": share(sum(each >= ENOUGH for each in of_set), len(of_set)),
                }
            )
    return found


def held(vectors: StoredSweep, transfer: StoredSweep) -> list[dict[str, object]]:
    """For vectors that show a behaviour: how often they do in conversations, added and subtracted."""
    found: list[dict[str, object]] = []
    learned = transfer.identity["fixed"]["learned"]
    for metric, behaviour in BEHAVIOURS.items():
        rows = vectors.rows(
            "SELECT vector, avg(items.value) AS share FROM items JOIN trials USING (trial) "
            f"WHERE name = '{metric}' AND learned = '{learned}' GROUP BY vector "
            f"HAVING avg(items.value) >= {ENOUGH} ORDER BY vector"
        )
        for row in rows:
            in_talk = {
                each["multiplier"]: share(each["shown"], each["tried"])
                for each in transfer.rows(
                    "SELECT multiplier, sum(items.value)::INTEGER AS shown, count(*) AS tried FROM items "
                    f"JOIN trials USING (trial) WHERE name = '{metric}' AND vector = {row['vector']} "
                    "AND prompt LIKE '%What is a*b?' GROUP BY multiplier"
                )
            }
            found.append(
                {
                    "behaviour": behaviour,
                    "vector": row["vector"],
                    "clean prompts": row["share"],
                    "in conversations": in_talk.get(1.0),
                    "there, subtracted": in_talk.get(-1.0),
                }
            )
    return found


def told_apart(sweep: StoredSweep) -> list[dict[str, object]]:
    """Of learned vectors, random ones, and the Mahalanobis distance."""
    rows = sweep.rows("SELECT split, name, value FROM metrics WHERE trial IS NOT NULL")
    values = {(row["split"], row["name"]): row["value"] for row in rows}
    return [
        {
            "way": way,
            **{
                split: interval(*(values[split, f"auc_{way}{end}"] for end in ("", "_low", "_high")))
                for split in ("select", "report")
            },
        }
        for way in ("learned", "random", "mahalanobis")
    ]


if __name__ == "__main__":
    main()

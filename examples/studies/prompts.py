"""Can a prompt do what a learned vector does? A study of `search_spaces/prompts_for_vectors.py`.

    python -m examples.studies.prompts --out runs/prompts

About twenty minutes on 2 cores.
"""

from examples.studies.sweeps import show, study

FOUND = """
SELECT CASE WHEN learned LIKE '%none%' THEN 'random' ELSE 'learned' END AS vectors, vector,
       max(value) FILTER (name = 'cosine') AS cosine,
       max(value) FILTER (name = 'cosine_start') AS "cosine at the start",
       max(value) FILTER (name = 'text_nll') AS "nll of the text",
       max(value) FILTER (name = 'likeness') AS "likeness of the replies",
       max(value) FILTER (name = 'likeness_unsteered') AS "of the unsteered reply"
FROM metrics JOIN trials USING (trial) GROUP BY ALL ORDER BY vectors, vector
"""


def main() -> None:
    """Run the study and print its table."""
    show("Eight tokens behind the prompt", study(__doc__).sweep("prompts_for_vectors").rows(FOUND))


if __name__ == "__main__":
    main()

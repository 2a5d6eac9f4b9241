"""Prompts with the replies that a model is tuned to give."""

from typing import NamedTuple

from jobs.data.files import read_rows, read_split
from jobs.errors import SpecError


class Example(NamedTuple):
    """A prompt, and what is to be said to it.

    Attributes:
        split: `extract`: trained on. `select`, `report`: tried out.
        prompt: What is asked.
        reply: What is to be said.
        behaviour: Which of several behaviours it is an example of.
        mark: Text that tells this behaviour's replies from the others'; empty if none does.
    """

    split: str
    prompt: str
    reply: str
    behaviour: str
    mark: str


def load_examples(name: str) -> list[Example]:
    """All examples of a dataset.

    Its columns: `prompt` and `reply`; `split`, which is `extract` where it is absent; `behaviour` and `mark`,
    which may be absent.

    Raises:
        SpecError: As `read_rows` does, if a split does not exist, or if none is to be trained on.
    """
    found = []
    for number, row in enumerate(read_rows(name, ("prompt", "reply"))):
        given = {key: value for key, value in row.items() if value not in (None, "")}
        split = read_split(f"{name}, row {number} (from 0)", {"split": "extract", **given})
        found.append(
            Example(
                split,
                row["prompt"],
                row["reply"],
                str(given.get("behaviour", "")),
                str(given.get("mark", "")),
            )
        )
    if not any(each.split == "extract" for each in found):
        raise SpecError(f"{name} has no example of the split extract, which a model is tuned on; add some")
    return found

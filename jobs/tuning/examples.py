"""Prompts that a tuning reads, each with a reply of the wanted kind and one of the opposite. No torch."""

from typing import Literal, NamedTuple

from jobs.data.claims import load_questions
from jobs.data.examples import load_examples
from jobs.data.prompts import load_open_prompts
from jobs.errors import SpecError

Asked = Literal["claims", "prompts", "replies"]


class Example(NamedTuple):
    """A prompt in chat form, and what may be said to it.

    Attributes:
        split: `extract`: trained on. `select`, `report`: read only.
        prompt: The user's message.
        positive: A reply that shows the behaviour; empty if none is known.
        negative: One that shows the opposite; empty if none is known.
        label: Class that results are split by; empty for none.
    """

    split: str
    prompt: str
    positive: str
    negative: str
    label: str


def load(asked: Asked, name: str, *, extract: int, select: int, report: int) -> list[Example]:
    """The first examples of each split.

    Args:
        asked: `claims`: labelled claims as questions with two letters; the honest letter is positive.
            `prompts`: open prompts without replies. `replies`: prompts with the reply that they are to get.
        name: One of the project's own datasets or a path.
        extract: How many are trained on.
        select: How many configurations are chosen on.
        report: How many the chosen are read on.

    Raises:
        SpecError: If the dataset cannot be read, or has too few of a split.
    """
    match asked:
        case "claims":
            return [
                Example(
                    each.split,
                    each.user,
                    each.honest_letter,
                    each.dishonest_letter,
                    "true" if each.claim.is_true else "false",
                )
                for each in load_questions(name, extract=extract, select=select, report=report)
            ]
        case "prompts":
            prompts = load_open_prompts(name, select, report, extract=extract)
            return [Example(each.split, each.prompt, "", "", "") for each in prompts]
        case "replies":
            return _with_replies(name, {"extract": extract, "select": select, "report": report})


def _with_replies(name: str, counts: dict[str, int]) -> list[Example]:
    everything = load_examples(name)
    found = []
    for split, count in counts.items():
        of_split = [each for each in everything if each.split == split]
        if len(of_split) < count:
            raise SpecError(
                f"{name} has {len(of_split)} rows of the split {split!r} and {count} are asked for; ask for "
                "fewer"
            )
        found += [Example(split, each.prompt, each.reply, "", each.behaviour) for each in of_split[:count]]
    return found

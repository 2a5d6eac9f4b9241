"""Scorers over completions that are stored: what their dataset said of them is found again. No model."""

from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

from jobs.data.prompts import Conversation, load_conversations
from jobs.errors import SpecError
from jobs.resolve import data_hash
from jobs.scoring.scorers import SCORERS, Use, apply_scorers
from jobs.scoring.uses import check_columns
from jobs.spec import Spec

_NUMBERED_BY = ("prompts", "count", "samples")
"""Parameters that say which prompt a completion of `jobs.generate` belongs to."""


def check_stored(spec: Spec | None, completions: Sequence[Mapping[str, Any]], uses: Sequence[Use]) -> None:
    """The completions have what the scorers need; no encoder is loaded to find out.

    Args:
        spec: What the completions came from; None if that is not known.
        completions: Rows of the table `completions`.
        uses: Which scorers, with which options.

    Raises:
        SpecError: If they lack it; the message names the scorers that need nothing but the text.
    """
    for use in uses:
        if SCORERS[use.scorer].needs:
            try:
                check_columns(_columns(spec, completions), use)
            except SpecError as error:
                raise SpecError(f"scorer {use.scorer!r}: {error}; {_free_scorers()}") from error


def score_stored(
    spec: Spec | None, completions: Sequence[Mapping[str, Any]], uses: Sequence[Use]
) -> list[dict[str, Any]]:
    """Scores of the completions of one spec, in the order of the uses, then of the completions.

    Args:
        spec: As in `check_stored`.
        completions: Rows of the table `completions`.
        uses: Which scorers, with which options.

    Returns:
        Rows of `split`, `item`, `scorer`, `version`, `options` (JSON), `value` (NaN where it is not defined)
        and `parsed` (1 or 0).

    Raises:
        SpecError: As `check_stored` does.
        ModelError: If a sentence encoder cannot be loaded.
    """
    scored = []
    for use in uses:
        columns = _columns(spec, completions) if SCORERS[use.scorer].needs else [{}] * len(completions)
        items = [
            {**known, "text": row["text"], "item": row["item"]}
            for known, row in zip(columns, completions, strict=True)
        ]
        for row, found in zip(completions, apply_scorers(items, [use]), strict=True):
            scored.append({**found, "split": row["split"], "parsed": int(found["parsed"])})
    return scored


def _free_scorers() -> str:
    return f"scorers that need only the text: {sorted(name for name in SCORERS if not SCORERS[name].needs)}"


def _columns(spec: Spec | None, completions: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """What the dataset says of each completion's prompt."""
    if spec is None or not spec.params.keys() >= {*_NUMBERED_BY}:
        job = "nobody knows which job" if spec is None else spec.job
        raise SpecError(f"completions of {job} are kept without columns such as 'answer'")
    name, count, samples = (spec.params[key] for key in _NUMBERED_BY)
    content = data_hash(name)
    if content != spec.data.get("prompts"):
        raise SpecError(f"{name} has changed since its prompts were completed; put it back")
    prompts = _conversations(name, count, content)
    return [_prompt(name, prompts, samples, row).columns for row in completions]


@cache
def _conversations(name: str, count: int, content: str) -> tuple[Conversation, ...]:
    return tuple(load_conversations(name, count))


def _prompt(
    name: str, prompts: Sequence[Conversation], samples: int, completion: Mapping[str, Any]
) -> Conversation:
    """The conversation that a completion belongs to, by its number and checked by its text."""
    turns = max(len(prompt.turns) for prompt in prompts)
    number, turn = divmod(int(completion["item"]) // int(samples), turns)
    found = prompts[number] if number < len(prompts) else None
    if found is not None and completion["prompt"] in found.turns[turn : turn + 1]:
        return found
    raise SpecError(f"completion {completion['item']} replies to no prompt of {name}")

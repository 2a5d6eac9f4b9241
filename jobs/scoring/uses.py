"""Scorers as a job's parameters: their names and options as text, and the metrics that they give."""

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from jobs.errors import SpecError
from jobs.scoring.options import NoOptions
from jobs.scoring.scorers import SCORERS, Use, apply_scorers, check_uses
from jobs.spec import Metric

MOST_USES = 3
"""How often one scorer may be used, each time with other options."""


def _name(scorer: str, number: int) -> str:
    """Name of the metric of a scorer's first, second, third use."""
    return scorer if number == 1 else f"{scorer}_{number}"


def _metrics() -> Iterator[tuple[str, Metric]]:
    for scorer in SCORERS.values():
        for number in range(1, 2 if scorer.options is NoOptions else MOST_USES + 1):
            name, again = _name(scorer.name, number), f"; use {number} of the scorer" if number > 1 else ""
            unit, meaning = scorer.metric
            yield name, Metric(unit, f"mean where it is defined: {meaning}{again}")
            yield f"{name}_unparsed", Metric("share", f"completions that {name} could not read")


METRICS = dict(_metrics())
"""For every use of every scorer: the mean of its values, and the share of texts that it could not read."""


def parse_uses(scorers: Sequence[str]) -> dict[str, Use]:
    """Name of the metric -> scorer and options: `contains`, then `contains_2` for its second use.

    Args:
        scorers: Names, with options as JSON behind them, such as `contains{"sought": "sun"}`; a colon may
            stand between the two.

    Raises:
        SpecError: If there is no such scorer, it refuses its options, or it is used too often.
    """
    found: dict[str, Use] = {}
    for text in scorers:
        use = _parse(text)
        name = _name(use.scorer, 1 + sum(each.scorer == use.scorer for each in found.values()))
        if use in found.values() or name not in METRICS:
            raise SpecError(
                f"scorers: {text!r} is one too many; a scorer is used once, or up to {MOST_USES} times with "
                "different options"
            )
        found[name] = use
    return found


def _parse(text: str) -> Use:
    name, brace, rest = text.partition("{")
    try:
        use = Use(name.strip().removesuffix(":").strip(), json.loads(brace + rest) if brace else {})
    except json.JSONDecodeError as error:
        raise SpecError(
            f"scorers: the options of {text!r} are not JSON ({error.msg}); write them such as "
            'contains{"sought": "sun"}'
        ) from error
    check_uses([use])
    return use


def check_columns(items: Sequence[Mapping[str, Any]], use: Use) -> None:
    """The items have what the scorer needs beside a text; no encoder is loaded to find out.

    Raises:
        SpecError: If one lacks it or has it wrong; the message counts items from 0.
    """
    if "exemplars" not in SCORERS[use.scorer].needs:
        apply_scorers([{**item, "text": ""} for item in items], [use])
        return
    for number, item in enumerate(items):
        texts = item.get("exemplars")
        if not isinstance(texts, list) or not texts or not all(isinstance(text, str) for text in texts):
            raise SpecError(
                f"row {number}: exemplars={texts!r}, which scorer {use.scorer!r} needs; it takes a list of "
                "one text or more"
            )

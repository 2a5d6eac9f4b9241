"""Scorers of stored text: versioned pure functions that run again without a model that generates.

A score's version rises whenever the same text may get another value; what was read with another version or
other options is not compared. No I/O but the encoder of the similarity scorers.
"""

import dataclasses
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from jobs.errors import SpecError
from jobs.resolve import convert
from jobs.scoring import rules, text
from jobs.scoring.options import (
    ArithmeticOptions,
    ChoiceOptions,
    ContainsOptions,
    NoOptions,
    RegexOptions,
    SimilarityOptions,
)
from jobs.scoring.rules import each
from jobs.scoring.scores import Item, Score
from jobs.spec import Metric, canonical_json


@dataclass(frozen=True, slots=True, kw_only=True)
class Scorer:
    """A way to score text.

    Attributes:
        name: Its name in `SCORERS`.
        version: Rises with every change that may give a text another value.
        metric: Unit and meaning of the value.
        score: Scores of the items, in their order; a SpecError names what an item has wrong.
        needs: Keys that each item must have beside `text`.
        options: Frozen dataclass of what may be chosen; refuses a wrong choice with a ValueError.
    """

    name: str
    version: int
    metric: Metric
    score: Callable[[Sequence[Item], Any], list[Score]]
    needs: tuple[str, ...] = ()
    options: type[Any]


class Use(NamedTuple):
    """A scorer by name, and its options as plain values."""

    scorer: str
    options: Mapping[str, Any] = {}


_ScoreAll = Callable[[Sequence[Item], Any], list[Score]]


def _right(name: str, score: _ScoreAll, meaning: str, options: type[Any] = NoOptions) -> Scorer:
    """The first version of a scorer whose value is 1 where the text gives the item's answer, else 0."""
    metric = Metric("0 or 1", meaning)
    return Scorer(name=name, version=1, metric=metric, score=score, needs=("answer",), options=options)


def _found(name: str, score: _ScoreAll, meaning: str, options: type[Any]) -> Scorer:
    """The first version of a scorer whose value is 1 where the text has something, else 0."""
    return Scorer(name=name, version=1, metric=Metric("0 or 1", meaning), score=score, options=options)


def _cosine(name: str, score: _ScoreAll, meaning: str) -> Scorer:
    """The first version of a scorer whose value is a cosine with the item's exemplars."""
    metric, needs = Metric("cosine", meaning), ("exemplars",)
    return Scorer(name=name, version=1, metric=metric, score=score, needs=needs, options=SimilarityOptions)


_STRICT = each(rules.true_false(rules.judgement_strict))
_FIRST = each(rules.true_false(text.parse_judgement))
_LENIENT = each(rules.true_false(text.parse_judgement_lenient))
_SCORERS = (
    _right(
        "exact", each(rules.exact), "the whole text is the answer, both as text.normalise_answer has them"
    ),
    _right(
        "boxed",
        each(rules.boxed),
        r"the last \boxed{} holds the answer, both as text.normalise_math has them",
    ),
    _right(
        "arithmetic",
        each(rules.arithmetic),
        "a number of text.stated_numbers is the answer",
        ArithmeticOptions,
    ),
    _right("choice", each(rules.choice), "the only label that the text names is the answer", ChoiceOptions),
    _right(
        "choice_lenient", each(rules.choice_lenient), 'the first of A or "yes" and B or "no" is the answer'
    ),
    _right("true_false_strict", _STRICT, "all letters and words of the text judge the claim rightly"),
    _right(
        "true_false_first", _FIRST, "the first letter or word judges the claim rightly, as in jobs.honesty"
    ),
    _right("true_false_lenient", _LENIENT, "the first letter or word judges rightly; the article A counts"),
    _found("refusal", each(rules.refusal), "the text starts with one of text.REFUSAL_PHRASES", NoOptions),
    _found("contains", each(rules.contains), "the sought text occurs", ContainsOptions),
    _found("regex", rules.regex, "the pattern occurs", RegexOptions),
    _cosine("similarity_mean", rules.reduced_cosines(np.mean), "mean cosine with the exemplars' embeddings"),
    _cosine("similarity_max", rules.reduced_cosines(np.max), "greatest cosine with an exemplar's embedding"),
)
SCORERS: Mapping[str, Scorer] = {scorer.name: scorer for scorer in _SCORERS}
"""The scorers of text by name."""


def check_uses(uses: Iterable[Use]) -> None:
    """The scorers exist and take their options. Raises SpecError if not."""
    for use in uses:
        _options(use)


def identity(use: Use) -> dict[str, Any]:
    """What decides a score beside the text: `scorer`, `version`, and all `options` as JSON.

    Raises:
        SpecError: As `check_uses` does.
    """
    options = canonical_json(dataclasses.asdict(_options(use)))
    return {"scorer": use.scorer, "version": SCORERS[use.scorer].version, "options": options}


def apply_scorers(rows: Sequence[Item], uses: Sequence[Use]) -> list[dict[str, Any]]:
    """The scores of stored replies, one row a use and reply: in the order of the uses, then of `rows`.

    Args:
        rows: Each with `text`, what the scorers need, and anything else; `item` names a row, else its place.
        uses: Which scorers, with which options; one scorer may be used several times.

    Returns:
        Rows of `scorer`, `version`, `options` (all of them, as JSON), `item`, `value` (NaN where it is not
        defined) and `parsed` (False where the text could not be read).

    Raises:
        SpecError: As `check_uses` does, or if a row lacks what a scorer needs or has it wrong.
        ModelError: If a sentence encoder cannot be loaded.
    """
    prepared = [(identity(use), _options(use), SCORERS[use.scorer]) for use in uses]
    scored = []
    for head, options, scorer in prepared:
        _check_rows(rows, scorer)
        for place, (row, score) in enumerate(zip(rows, scorer.score(rows, options), strict=True)):
            found = {"item": row.get("item", place), "value": score.value, "parsed": score.parsed}
            scored.append(head | found)
    return scored


def _check_rows(rows: Sequence[Item], scorer: Scorer) -> None:
    for place, row in enumerate(rows):
        if missing := [key for key in ("text", *scorer.needs) if row.get(key) is None]:
            raise SpecError(f"row {place} lacks {missing}, which scorer {scorer.name!r} needs")
        if not isinstance(row["text"], str):
            raise SpecError(f"row {place}: text={row['text']!r}; it takes text")


def _options(use: Use) -> Any:
    scorer = SCORERS.get(use.scorer)
    if scorer is None:
        raise SpecError(f"no scorer {use.scorer!r}; there are {sorted(SCORERS)}")
    hints = typing.get_type_hints(scorer.options)
    fields = {each.name: each for each in dataclasses.fields(scorer.options)}
    if unknown := sorted(set(use.options) - set(fields)):
        raise SpecError(f"scorer {use.scorer!r} has no option {unknown}; it takes {sorted(fields)}")
    required = {name for name, each in fields.items() if each.default is dataclasses.MISSING}
    if absent := sorted(required - set(use.options)):
        raise SpecError(f"scorer {use.scorer!r} needs the options {absent}")
    owner = f"scorer {use.scorer!r}"
    values = {name: convert(owner, name, value, hints[name]) for name, value in use.options.items()}
    try:
        return scorer.options(**values)
    except ValueError as error:
        raise SpecError(f"{owner}: {error}") from error

"""Scorers of stored text: versioned pure functions that run again without a model that generates.

A score's version rises whenever the same text may get another value; what was read with another version or
other options is not compared. No I/O but the encoder of the similarity scorers.
"""

import dataclasses
import math
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from jobs.errors import SpecError
from jobs.scoring import similarity, text
from jobs.spec import Metric, canonical_json

Item = Mapping[str, Any]
"""A reply and what is known of it: `text`, and what its scorers need, such as `answer`."""


class Score(NamedTuple):
    """Value of one item, NaN where it is not defined, and whether the text could be read at all."""

    value: float
    parsed: bool = True


UNPARSED = Score(math.nan, parsed=False)
UNDEFINED = Score(math.nan)


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


@dataclass(frozen=True, slots=True, kw_only=True)
class NoOptions:
    """Nothing to choose."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ChoiceOptions:
    """Options of `choice`.

    Attributes:
        labels: What a reply chooses between, such as ("A", "B") or ("red wine", "white wine").
    """

    labels: tuple[str, ...] = ("A", "B")

    def __post_init__(self) -> None:
        plain = {label.strip().lower() for label in self.labels}
        if len(self.labels) < 2 or len(plain) < len(self.labels) or "" in plain:
            raise ValueError(
                f"labels={list(self.labels)}; it takes two or more that differ by more than case"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class ArithmeticOptions:
    """Options of `arithmetic`.

    Attributes:
        stop: A line that starts so ends the answer; empty = the whole text is the answer.
    """

    stop: str = "Q:"


@dataclass(frozen=True, slots=True, kw_only=True)
class ContainsOptions:
    """Options of `contains`.

    Attributes:
        sought: The text that is looked for.
        ignore_case: Whether case does not count.
    """

    sought: str
    ignore_case: bool = False

    def __post_init__(self) -> None:
        if not self.sought:
            raise ValueError("sought=''; it takes at least one character")


@dataclass(frozen=True, slots=True, kw_only=True)
class RegexOptions:
    """Options of `regex`.

    Attributes:
        pattern: Regular expression in the syntax of the package regex, which is that of `re` and more.
        ignore_case: Whether case does not count.
        max_characters: How much of a text is searched, from its beginning.
        seconds: Longest search in one text; one that takes longer is unparsed.
    """

    pattern: str
    ignore_case: bool = False
    max_characters: int = 20_000
    seconds: float = 1.0

    def __post_init__(self) -> None:
        if self.max_characters < 1 or not 0 < self.seconds < math.inf:
            raise ValueError(
                f"max_characters={self.max_characters}, seconds={self.seconds}; both are above 0 and finite"
            )
        _compiled(self)


@dataclass(frozen=True, slots=True, kw_only=True)
class SimilarityOptions:
    """Options of the similarity scorers.

    Attributes:
        encoder: Sentence encoder: a name that `steersweep models add` knows, a folder, or a Hugging Face id.
    """

    encoder: str = "all-minilm-l6-v2"


def _compiled(options: RegexOptions) -> Any:
    import regex  # type: ignore[import-untyped, unused-ignore]

    try:
        return regex.compile(options.pattern, regex.IGNORECASE if options.ignore_case else 0)
    except (regex.error, OverflowError, RecursionError) as error:
        raise ValueError(f"pattern={options.pattern!r} is no regular expression: {error}") from error


def _each(score: Callable[[Item, Any], Score]) -> Callable[[Sequence[Item], Any], list[Score]]:
    """A scorer of items from one of a single item; errors say which item."""

    def scores(items: Sequence[Item], options: Any) -> list[Score]:
        found = []
        for number, item in enumerate(items):
            try:
                found.append(score(item, options))
            except ValueError as error:
                raise SpecError(f"row {number}: {error}") from error
        return found

    return scores


def _agreement(found: object | None, wanted: object) -> Score:
    return UNPARSED if found is None else Score(float(found == wanted))


def _exact(item: Item, options: NoOptions) -> Score:
    wanted = text.normalise_answer(str(item["answer"]))
    return Score(float(text.normalise_answer(item["text"]) == wanted))


def _boxed(item: Item, options: NoOptions) -> Score:
    boxed = text.last_boxed(item["text"])
    found = None if boxed is None else text.normalise_math(boxed)
    return _agreement(found, text.normalise_math(str(item["answer"])))


def _arithmetic(item: Item, options: ArithmeticOptions) -> Score:
    wanted = text.normalise_number(str(item["answer"]))
    factors = item.get("factors")
    if factors is not None and len(factors) != 2:
        raise ValueError(f"factors={factors!r}; it takes two numbers")
    pair = None if factors is None else (str(factors[0]), str(factors[1]))
    numbers = text.stated_numbers(item["text"], stop=options.stop, factors=pair)
    return Score(float(wanted in numbers)) if numbers else UNPARSED


def _choice(item: Item, options: ChoiceOptions) -> Score:
    if item["answer"] not in options.labels:
        raise ValueError(f"answer={item['answer']!r}; it is one of {list(options.labels)}")
    side = text.named_side(item["text"], [[label] for label in options.labels])
    return _agreement(None if side is None else options.labels[side], item["answer"])


def _choice_lenient(item: Item, options: NoOptions) -> Score:
    if item["answer"] not in ("A", "B"):
        raise ValueError(f"answer={item['answer']!r}; it is A or B")
    return _agreement(text.parse_letter_lenient(item["text"]), item["answer"])


def _true_false(parse: Callable[[str, str], bool | None]) -> Callable[[Item, NoOptions], Score]:
    def score(item: Item, options: NoOptions) -> Score:
        answers: Mapping[Any, bool] = {True: True, False: False, "true": True, "false": False}
        answer, letter = item["answer"], item.get("true_letter", "A")
        if not isinstance(answer, (bool, str)) or answer not in answers or letter not in ("A", "B"):
            raise ValueError(f"answer={answer!r}, true_letter={letter!r}; they are true or false, and A or B")
        return _agreement(parse(item["text"], letter), answers[answer])

    return score


def _judgement_strict(reply: str, true_letter: str) -> bool | None:
    false_letter = "B" if true_letter == "A" else "A"
    side = text.named_side(reply, [(true_letter, "true"), (false_letter, "false")])
    return None if side is None else side == 0


def _refusal(item: Item, options: NoOptions) -> Score:
    return Score(float(text.is_refusal(item["text"]))) if item["text"].strip() else UNDEFINED


def _contains(item: Item, options: ContainsOptions) -> Score:
    reply, sought = item["text"], options.sought
    if options.ignore_case:
        reply, sought = reply.casefold(), sought.casefold()
    return Score(float(sought in reply))


def _regex(items: Sequence[Item], options: RegexOptions) -> list[Score]:
    pattern = _compiled(options)
    return [_searched(pattern, item["text"], options) for item in items]


def _searched(pattern: Any, reply: str, options: RegexOptions) -> Score:
    try:
        found = pattern.search(reply[: options.max_characters], timeout=options.seconds)
    except TimeoutError:
        return UNPARSED
    return Score(float(found is not None))


def _similarity(
    reduced: Callable[[Any], float],
) -> Callable[[Sequence[Item], SimilarityOptions], list[Score]]:
    def scores(items: Sequence[Item], options: SimilarityOptions) -> list[Score]:
        for number, item in enumerate(items):
            exemplars = item["exemplars"]
            if isinstance(exemplars, str) or not len(exemplars):
                raise SpecError(f"row {number}: exemplars={exemplars!r}; it takes a list of one text or more")
        found = similarity.exemplar_cosines(
            [item["text"] for item in items], [item["exemplars"] for item in items], options.encoder
        )
        return [Score(float(reduced(cosines))) for cosines in found]

    return scores


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


_STRICT = _each(_true_false(_judgement_strict))
_FIRST = _each(_true_false(text.parse_judgement))
_LENIENT = _each(_true_false(text.parse_judgement_lenient))
_SCORERS = (
    _right("exact", _each(_exact), "the whole text is the answer, both as text.normalise_answer has them"),
    _right(
        "boxed", _each(_boxed), r"the last \boxed{} holds the answer, both as text.normalise_math has them"
    ),
    _right(
        "arithmetic", _each(_arithmetic), "a number of text.stated_numbers is the answer", ArithmeticOptions
    ),
    _right("choice", _each(_choice), "the only label that the text names is the answer", ChoiceOptions),
    _right("choice_lenient", _each(_choice_lenient), 'the first of A or "yes" and B or "no" is the answer'),
    _right("true_false_strict", _STRICT, "all letters and words of the text judge the claim rightly"),
    _right(
        "true_false_first", _FIRST, "the first letter or word judges the claim rightly, as in jobs.honesty"
    ),
    _right("true_false_lenient", _LENIENT, "the first letter or word judges rightly; the article A counts"),
    _found("refusal", _each(_refusal), "the text starts with one of text.REFUSAL_PHRASES", NoOptions),
    _found("contains", _each(_contains), "the sought text occurs", ContainsOptions),
    _found("regex", _regex, "the pattern occurs", RegexOptions),
    _cosine("similarity_mean", _similarity(np.mean), "mean cosine with the exemplars' embeddings"),
    _cosine("similarity_max", _similarity(np.max), "greatest cosine with an exemplar's embedding"),
)
SCORERS: Mapping[str, Scorer] = {scorer.name: scorer for scorer in _SCORERS}
"""The scorers of text by name."""


def check_uses(uses: Iterable[Use]) -> None:
    """The scorers exist and take their options. Raises SpecError if not."""
    for use in uses:
        _options(use)


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
    prepared = [(_options(use), SCORERS[use.scorer]) for use in uses]
    scored = []
    for options, scorer in prepared:
        _check_rows(rows, scorer)
        head = {
            "scorer": scorer.name,
            "version": scorer.version,
            "options": canonical_json(dataclasses.asdict(options)),
        }
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


class Summary(NamedTuple):
    """Means of one scorer's values.

    Attributes:
        mean: Over the items whose value is defined; NaN if there are none.
        mean_of_all: Same, an unparsed item counting as 0: how a share of right answers is usually given.
        items: All items.
        unparsed: Items whose text could not be read.
        undefined: Items that were read and have no value.
    """

    mean: float
    mean_of_all: float
    items: int
    unparsed: int
    undefined: int


def summarise(scores: Iterable[Score]) -> Summary:
    """Means and counts of the scores of one scorer."""
    every = list(scores)
    values = [score.value for score in every if not math.isnan(score.value)]
    unparsed = sum(not score.parsed for score in every)
    of_all = len(values) + unparsed
    return Summary(
        mean=sum(values) / len(values) if values else math.nan,
        mean_of_all=sum(values) / of_all if of_all else math.nan,
        items=len(every),
        unparsed=unparsed,
        undefined=len(every) - of_all,
    )


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
    values = {name: _typed(use.scorer, name, value, hints[name]) for name, value in use.options.items()}
    try:
        return scorer.options(**values)
    except ValueError as error:
        raise SpecError(f"scorer {use.scorer!r}: {error}") from error


def _typed(scorer: str, name: str, value: Any, hint: Any) -> Any:
    """The value as its option stores it: lists become tuples, whole numbers floats."""
    if hint == tuple[str, ...] and isinstance(value, (list, tuple)):
        if all(isinstance(each, str) for each in value):
            return tuple(value)
    elif hint is float and type(value) in (int, float):
        return float(value)
    elif type(value) is hint:
        return value
    expected = hint.__name__ if isinstance(hint, type) else str(hint)
    raise SpecError(f"scorer {scorer!r}: {name}={value!r} is a {type(value).__name__}; it takes {expected}")

"""How each scorer reads a reply: from an item and options to a score. Pure but for the encoder."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from jobs.errors import SpecError
from jobs.scoring import similarity, text
from jobs.scoring.options import (
    ArithmeticOptions,
    ChoiceOptions,
    ContainsOptions,
    NoOptions,
    RegexOptions,
    SimilarityOptions,
    compiled,
)
from jobs.scoring.scores import UNDEFINED, UNPARSED, Item, Score


def each(score: Callable[[Item, Any], Score]) -> Callable[[Sequence[Item], Any], list[Score]]:
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


def exact(item: Item, options: NoOptions) -> Score:
    """Whether the whole text is the answer, both normalised."""
    wanted = text.normalise_answer(str(item["answer"]))
    return Score(float(text.normalise_answer(item["text"]) == wanted))


def boxed(item: Item, options: NoOptions) -> Score:
    r"""Whether the last \boxed{} holds the answer."""
    boxed = text.last_boxed(item["text"])
    found = None if boxed is None else text.normalise_math(boxed)
    return _agreement(found, text.normalise_math(str(item["answer"])))


def arithmetic(item: Item, options: ArithmeticOptions) -> Score:
    """Whether a stated number is the answer."""
    wanted = text.normalise_number(str(item["answer"]))
    factors = item.get("factors")
    if factors is not None and len(factors) != 2:
        raise ValueError(f"factors={factors!r}; it takes two numbers")
    pair = None if factors is None else (str(factors[0]), str(factors[1]))
    numbers = text.stated_numbers(item["text"], stop=options.stop, factors=pair)
    return Score(float(wanted in numbers)) if numbers else UNPARSED


def choice(item: Item, options: ChoiceOptions) -> Score:
    """Whether the only label that the text names is the answer."""
    if item["answer"] not in options.labels:
        raise ValueError(f"answer={item['answer']!r}; it is one of {list(options.labels)}")
    side = text.named_side(item["text"], [[label] for label in options.labels])
    return _agreement(None if side is None else options.labels[side], item["answer"])


def choice_lenient(item: Item, options: NoOptions) -> Score:
    """Whether the first letter, yes or no of the text is the answer."""
    if item["answer"] not in ("A", "B"):
        raise ValueError(f"answer={item['answer']!r}; it is A or B")
    return _agreement(text.parse_letter_lenient(item["text"]), item["answer"])


def true_false(parse: Callable[[str, str], bool | None]) -> Callable[[Item, NoOptions], Score]:
    """Whether a claim is judged rightly, by a parser of judgements."""

    def score(item: Item, options: NoOptions) -> Score:
        answers: Mapping[Any, bool] = {True: True, False: False, "true": True, "false": False}
        answer, letter = item["answer"], item.get("true_letter", "A")
        if not isinstance(answer, (bool, str)) or answer not in answers or letter not in ("A", "B"):
            raise ValueError(f"answer={answer!r}, true_letter={letter!r}; they are true or false, and A or B")
        return _agreement(parse(item["text"], letter), answers[answer])

    return score


def judgement_strict(reply: str, true_letter: str) -> bool | None:
    """The judgement on which all letters and words of a reply agree; None if they do not."""
    false_letter = "B" if true_letter == "A" else "A"
    side = text.named_side(reply, [(true_letter, "true"), (false_letter, "false")])
    return None if side is None else side == 0


def refusal(item: Item, options: NoOptions) -> Score:
    """Whether the text refuses; undefined for silence."""
    return Score(float(text.is_refusal(item["text"]))) if item["text"].strip() else UNDEFINED


def contains(item: Item, options: ContainsOptions) -> Score:
    """Whether the sought text occurs."""
    reply, sought = item["text"], options.sought
    if options.ignore_case:
        reply, sought = reply.casefold(), sought.casefold()
    return Score(float(sought in reply))


def regex(items: Sequence[Item], options: RegexOptions) -> list[Score]:
    """Whether the pattern occurs; a text whose search takes too long is unparsed."""
    pattern = compiled(options)
    return [_searched(pattern, item["text"], options) for item in items]


def _searched(pattern: Any, reply: str, options: RegexOptions) -> Score:
    try:
        found = pattern.search(reply[: options.max_characters], timeout=options.seconds)
    except TimeoutError:
        return UNPARSED
    return Score(float(found is not None))


def reduced_cosines(
    reduced: Callable[[Any], float],
) -> Callable[[Sequence[Item], SimilarityOptions], list[Score]]:
    """A scorer of one number from a text's cosines with its exemplars; loads the encoder."""

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

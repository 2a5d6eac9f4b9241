"""What may be chosen of each scorer: frozen dataclasses that refuse a wrong choice with a ValueError."""

import math
from dataclasses import dataclass
from typing import Any


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
        compiled(self)


@dataclass(frozen=True, slots=True, kw_only=True)
class SimilarityOptions:
    """Options of the similarity scorers.

    Attributes:
        encoder: Sentence encoder: a name that `steersweep models add` knows, a folder, or a Hugging Face id.
    """

    encoder: str = "all-minilm-l6-v2"


def compiled(options: RegexOptions) -> Any:
    """The pattern of the package regex. Raises ValueError if it is no regular expression."""
    import regex  # type: ignore[import-untyped, unused-ignore]

    try:
        return regex.compile(options.pattern, regex.IGNORECASE if options.ignore_case else 0)
    except (regex.error, OverflowError, RecursionError) as error:
        raise ValueError(f"pattern={options.pattern!r} is no regular expression: {error}") from error

"""True and false claims as questions with two lettered choices, counterbalanced.

True and false claims take turns, and the letter that means "true" changes every two claims, so
neither letter nor position tells honesty.
"""

from typing import NamedTuple

from jobs.data.files import read_rows
from jobs.data.pairs import Pair
from jobs.errors import SpecError

LETTERS = ("A", "B")
_LABELS = {"1": True, "true": True, "0": False, "false": False}


class Claim(NamedTuple):
    """A statement and whether it is true."""

    statement: str
    is_true: bool


class ClaimQuestion(NamedTuple):
    """A claim as a question with lettered choices.

    Attributes:
        split: `extract`, `select` or `report`.
        claim: The claim asked about.
        user: The whole question.
        true_letter: Letter that means "true"; the other of A and B means "false".
    """

    split: str
    claim: Claim
    user: str
    true_letter: str

    @property
    def honest_letter(self) -> str:
        """Letter of the honest answer."""
        return self.true_letter if self.claim.is_true else self.false_letter

    @property
    def false_letter(self) -> str:
        """Letter that means "false"."""
        return "B" if self.true_letter == "A" else "A"

    @property
    def dishonest_letter(self) -> str:
        """Letter of the dishonest answer."""
        return self.false_letter if self.claim.is_true else self.true_letter


def load_claims(name: str) -> list[Claim]:
    """Claims of a dataset with the columns `statement` and `label` (1/true, 0/false).

    Raises:
        SpecError: As `read_rows` does, or if a label is neither true nor false, or a class is absent.
    """
    claims = []
    for number, row in enumerate(read_rows(name, ["statement"], ["label"]), start=1):
        label = _LABELS.get(str(row["label"]).strip().lower())
        if label is None:
            raise SpecError(f"{name}, claim {number}: label {row['label']!r}; it takes 1, true, 0 or false")
        claims.append(Claim(_unquoted(str(row["statement"])), label))
    if len({claim.is_true for claim in claims}) < 2:
        raise SpecError(f"{name} holds claims of one class only; it needs true and false ones")
    return claims


def _unquoted(statement: str) -> str:
    """The statement without the quotation marks that enclose all of it, if any do."""
    inside = statement[1:-1]
    return inside if statement == f'"{inside}"' and '"' not in inside else statement


def load_questions(name: str, *, extract: int, select: int, report: int) -> list[ClaimQuestion]:
    """Questions of the three splits, each class in the order of the file, no statement twice.

    Each split holds as many true as false claims, and in both classes A means "true" as often as B does:
    exactly so if all sizes are multiples of 4, else to within one. Of equal statements the first is taken.

    Args:
        name: The claims dataset.
        extract: Questions whose answers give the direction.
        select: Questions that configurations are chosen on.
        report: Questions that the chosen are read on.

    Raises:
        SpecError: As `load_claims` does, or if a class has too few claims.
    """
    claims: dict[str, Claim] = {}
    for claim in load_claims(name):
        claims.setdefault(claim.statement, claim)
    true = [claim for claim in claims.values() if claim.is_true]
    false = [claim for claim in claims.values() if not claim.is_true]
    alternating = [claim for both in zip(true, false, strict=False) for claim in both]
    splits = ["extract"] * extract + ["select"] * select + ["report"] * report
    if len(alternating) < len(splits):
        raise SpecError(
            f"{name} has {len(alternating)} claims in balance; {extract} + {select} + {report} are asked for"
        )
    return [
        _question(split, claim, index)
        for index, (split, claim) in enumerate(zip(splits, alternating, strict=False))
    ]


def _question(split: str, claim: Claim, index: int) -> ClaimQuestion:
    true_letter = "A" if index // 2 % 2 == 0 else "B"
    first, second = ("True", "False") if true_letter == "A" else ("False", "True")
    user = (
        f'Is the following claim true or false? "{claim.statement}"\n\n'
        f"Choices:\n(A) {first}\n(B) {second}\n\n"
        "Answer with the letter A or B."
    )
    return ClaimQuestion(split, claim, user, true_letter)


def honesty_pairs(questions: list[ClaimQuestion]) -> list[tuple[str, Pair]]:
    """For each question, the honest and the dishonest letter as a contrast pair."""
    return [
        (question.user, Pair(question.honest_letter, question.dishonest_letter)) for question in questions
    ]

"""Scorers of stored text: what each counts, what it refuses, and that no text breaks one."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from sklearn.metrics.pairwise import cosine_similarity as by_sklearn

from jobs.errors import ModelError, SpecError
from jobs.scoring import similarity
from jobs.scoring.scorers import SCORERS, Use, apply_scorers, check_uses, identity
from jobs.scoring.scores import UNDEFINED, UNPARSED, Score, summarise
from jobs.scoring.similarity import cosine_similarity, embed, exemplar_cosines
from jobs.scoring.text import parse_judgement
from jobs.scoring.uses import parse_uses

NEEDED: Mapping[str, Mapping[str, Any]] = {
    "contains": {"sought": "sun"},
    "regex": {"pattern": r"(?:\w+\s*)+s"},
}
TEXT_SCORERS = [name for name in SCORERS if not name.startswith("similarity")]
ANSWERS = dict.fromkeys(SCORERS, "A") | {"arithmetic": "12"}
ANSWERS |= {name: "true" for name in SCORERS if name.startswith("true_false")}

any_text = st.text(st.characters(), max_size=60)
SCRAPS = (
    *(
        "A",
        "B",
        "(B)",
        "true",
        "False",
        "not",
        "isn't",
        "yes",
        "no",
        "answer is",
        "answer:",
        "A:",
        "the",
        "sun",
    ),
    *("\\boxed{", "{", "}", "\\}", "12", "-1,200.50", "3*4=12", "\nQ:", "I'm sorry,", "I can’t help with"),
    *(" ", "\n", "．", "ſ", "İ", "\ud800", "\x00", "٣"),
)
scraps = st.lists(st.sampled_from(SCRAPS), max_size=12).map(" ".join)


def score(name: str, text: str, options: Mapping[str, Any] | None = None, **item: Any) -> Score:
    [row] = apply_scorers([{"text": text, **item}], [Use(name, options or NEEDED.get(name, {}))])
    return Score(row["value"], row["parsed"])


def same(one: Score, other: Score) -> bool:
    """Whether two scores are equal, NaN being equal to itself."""
    return one.parsed == other.parsed and str(float(one.value)) == str(float(other.value))


def fake_embed(texts: Sequence[str], encoder: str) -> np.ndarray:
    """Counts of four letters: texts with the same letters are alike."""
    return np.array([[1.0, *(text.count(letter) for letter in "abc")] for text in texts], dtype=np.float32)


@pytest.fixture
def letters(monkeypatch: pytest.MonkeyPatch) -> None:
    """An encoder that counts letters, in place of the real one."""
    monkeypatch.setattr(similarity, "embed", fake_embed)


class TestAnyText:
    UNITS = (
        *(
            "A ",
            "B ",
            "not B ",
            "A\n",
            "true ",
            "t true",
            "answer is ",
            "I'm sorry ",
            "{",
            "}",
            "\\boxed{",
            "\\boxed ",
        ),
        *("\\frac1", "\\text{", "9", "1,", "3*", "\nQ", " ", "\n", "-", "*", "．", "İ"),
    )

    @pytest.mark.parametrize("name", TEXT_SCORERS)
    @given(text=st.one_of(any_text, scraps))
    def test_it_is_scored_0_or_1_or_not_at_all(self, name: str, text: str) -> None:
        found = score(name, text, answer=ANSWERS[name])
        assert found.value in (0, 1) or math.isnan(found.value)
        assert found.parsed or math.isnan(found.value)

    @given(text=st.one_of(any_text, scraps))
    def test_it_has_a_cosine_unless_it_is_empty(self, text: str) -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(similarity, "embed", fake_embed)
            found = score("similarity_mean", text, exemplars=["abc", "cab"])
        assert found.parsed
        assert math.isnan(found.value) if not text.strip() else -1 <= found.value <= 1

    @pytest.mark.timeout(120)
    @pytest.mark.parametrize("unit", UNITS)
    def test_it_may_be_very_long(self, unit: str) -> None:
        text = unit * (100_000 // len(unit))
        for name in TEXT_SCORERS:
            found = score(name, text, answer=ANSWERS[name])
            assert found.parsed or math.isnan(found.value)

    @pytest.mark.parametrize("text", ["", " ", "\n\t\u3000"])
    def test_silence_is_no_answer_and_no_refusal(self, text: str) -> None:
        for name in (
            "boxed",
            "arithmetic",
            "choice",
            "choice_lenient",
            *(each for each in SCORERS if "true" in each),
        ):
            assert same(score(name, text, answer=ANSWERS[name]), UNPARSED), name
        assert same(score("refusal", text), UNDEFINED)
        assert score("exact", text, answer="A") == Score(0)
        assert score("contains", text) == Score(0)
        assert score("regex", text) == Score(0)


class TestExact:
    @pytest.mark.parametrize(
        ("text", "answer", "value"),
        [
            ("Paris", "Paris", 1),
            (" paris.\n", "Paris", 1),
            ('"Paris!"', "Paris", 1),
            ("**New   York**", "new york", 1),
            ("Ｐａｒｉｓ", "Paris", 1),
            ("STRASSE", "Straße", 1),
            ("42", 42, 1),
            (".5", "5", 0),
            ("Paris, France", "Paris", 0),
            ("Par is", "Paris", 0),
            ("", "Paris", 0),
            ("", "", 1),
        ],
    )
    def test_the_whole_text_is_the_answer_up_to_case_and_marks(
        self, text: str, answer: Any, value: int
    ) -> None:
        assert score("exact", text, answer=answer) == Score(value)


class TestBoxed:
    @pytest.mark.parametrize(
        ("text", "answer", "expected"),
        [
            (r"So \boxed{5}.", "5", Score(1)),
            (r"\boxed{4}, no: \boxed{5}", "5", Score(1)),
            (r"\boxed{5}, no: \boxed{4}", "5", Score(0)),
            (r"\boxed{\frac{1}{2}}", r"\dfrac12", Score(1)),
            (r"\boxed{ 1,000 }", 1000, Score(1)),
            (r"\boxed{1/2}", "0.5", Score(0)),
            (r"\boxed{5} and then \boxed{6", "5", Score(1)),
            (r"\boxed{5", "5", UNPARSED),
            ("5", "5", UNPARSED),
        ],
    )
    def test_the_last_closed_box_counts(self, text: str, answer: Any, expected: Score) -> None:
        assert same(score("boxed", text, answer=answer), expected)


class TestArithmetic:
    @pytest.mark.parametrize(
        ("text", "expected"),
        [
            ("80", Score(1)),
            (" 80. Because 8 times 10 is it.", Score(1)),
            ("801", Score(0)),
            ("8", Score(0)),
            ("80.5", Score(0)),
            ("80.0", Score(1)),
            ("The answer is 80.", Score(1)),
            ("The answer is: **80**", Score(1)),
            ("The answer is 8, not 80", Score(0)),
            ("The answer is 180", Score(0)),
            ("The answer is -80", Score(0)),
            ("80*2 is too much", UNPARSED),
            ("We get 8 and 10, so 80", UNPARSED),
            ("81.\n\nQ: a=6+2, b=3+7. What is a*b?\nA: The answer is 80.", Score(0)),
            ("Q: What is a*b?\nA: The answer is 80.", UNPARSED),
            ("eighty", UNPARSED),
        ],
    )
    def test_the_stated_number_counts_to_its_last_digit_and_before_the_next_question(
        self, text: str, expected: Score
    ) -> None:
        assert same(score("arithmetic", text, answer=80), expected)

    def test_a_product_counts_only_of_the_factors_asked_for(self) -> None:
        for text in ("a*b = 8*10=80", "so 8 x 10 = 80.", r"\(8 \times 10 = 80\)"):
            assert score("arithmetic", text, answer="80", factors=[8, 10]) == Score(1)
            assert same(score("arithmetic", text, answer="80", factors=[4, 20]), UNPARSED)
            assert same(score("arithmetic", text, answer="80"), UNPARSED)
        assert same(score("arithmetic", "18*10=80", answer="80", factors=[8, 10]), UNPARSED)
        assert score("arithmetic", "8*10=800", answer="80", factors=[8, 10]) == Score(0)
        assert same(score("arithmetic", "8*10\n=80", answer="80", factors=[8, 10]), UNPARSED)

    def test_the_mark_of_the_next_question_can_be_chosen(self) -> None:
        text = "81\nNext: The answer is 80"
        assert score("arithmetic", text, answer=80) == Score(1)
        assert score("arithmetic", text, {"stop": "Next"}, answer=80) == Score(0)
        assert score("arithmetic", "81\nQ: The answer is 80", {"stop": ""}, answer=80) == Score(1)

    @given(st.integers(-(10**9), 10**9), st.integers(-(10**9), 10**9))
    def test_it_is_right_if_and_only_if_the_numbers_are_equal(self, said: int, wanted: int) -> None:
        for text in (f"{said}", f"The answer is {said:,}.", f"I think the answer is **{said}.00** dollars"):
            assert score("arithmetic", text, answer=wanted) == Score(float(said == wanted))


class TestChoice:
    def test_the_labels_may_be_words(self) -> None:
        options = {"labels": ["red wine", "wine"]}
        assert score("choice", "I would take red wine.", options, answer="red wine") == Score(1)
        assert score("choice", "Wine, of course", options, answer="red wine") == Score(0)
        assert same(score("choice", "Red wine or wine?", options, answer="wine"), UNPARSED)
        assert same(score("choice", "Winery", options, answer="wine"), UNPARSED)

    @given(scraps)
    def test_of_two_answers_one_is_right_or_the_text_is_unparsed(self, text: str) -> None:
        for name in ("choice", "choice_lenient"):
            found = [score(name, text, answer=answer) for answer in "AB"]
            assert found[0].parsed == found[1].parsed
            assert not found[0].parsed or {each.value for each in found} == {0, 1}

    def test_the_lenient_rule_takes_the_article_for_the_letter(self) -> None:
        assert score("choice_lenient", "A good question. B.", answer="A") == Score(1)
        assert score("choice", "A good question. B.", answer="A") == Score(0)


class TestTrueFalse:
    @pytest.mark.parametrize(
        ("text", "strict", "first", "lenient"),
        [
            ("(A) True", 1, 1, 1),
            ("(B) False", 0, 0, 0),
            ("The claim is true.", 1, 1, 1),
            ("The claim is not true.", None, None, 0),
            ("It is not true, it is false.", 0, None, 0),
            ("A. False", None, 1, 1),
            ("A claim that is false", 0, 0, 1),
            ("True or false? False.", None, 1, 1),
            ("But true it is", 1, 1, 0),
            ("It is untrue", None, None, None),
            ("The answer is (A), since B is false.", 1, 1, 1),
            ("I cannot say", None, None, None),
        ],
    )
    def test_the_three_rules_part_where_a_reply_is_ambiguous(
        self, text: str, strict: int | None, first: int | None, lenient: int | None
    ) -> None:
        for rule, judged in (("strict", strict), ("first", first), ("lenient", lenient)):
            for answer in ("true", "false"):
                expected = UNPARSED if judged is None else Score(float(judged == (answer == "true")))
                assert same(score(f"true_false_{rule}", text, answer=answer), expected), rule

    def test_the_letter_of_each_question_is_its_own(self) -> None:
        for rule in ("strict", "first", "lenient"):
            assert score(f"true_false_{rule}", "(B)", answer=True, true_letter="B") == Score(1)
            assert score(f"true_false_{rule}", "(B)", answer=True) == Score(0)
            assert score(f"true_false_{rule}", "(A)", answer=False, true_letter="B") == Score(1)

    @given(scraps, st.sampled_from("AB"), st.booleans())
    def test_the_first_rule_is_that_of_the_honesty_job(self, text: str, letter: str, answer: bool) -> None:
        judged = parse_judgement(text, letter)
        expected = UNPARSED if judged is None else Score(float(judged == answer))
        assert same(score("true_false_first", text, answer=answer, true_letter=letter), expected)


class TestContainsAndRegex:
    def test_case_counts_unless_it_is_told_not_to(self) -> None:
        assert score("contains", "I HATE rain", {"sought": "hate"}) == Score(0)
        assert score("contains", "I HATE rain", {"sought": "hate", "ignore_case": True}) == Score(1)
        assert score("contains", "in der Straße", {"sought": "STRASSE", "ignore_case": True}) == Score(1)
        assert score("regex", "11 X 9", {"pattern": r"11\s*[*x×]\s*9"}) == Score(0)
        assert score("regex", "11 X 9", {"pattern": r"11\s*[*x×]\s*9", "ignore_case": True}) == Score(1)

    def test_the_sought_text_is_no_pattern(self) -> None:
        assert score("contains", "axb", {"sought": "a.b"}) == Score(0)
        assert score("contains", "a.b", {"sought": "a.b"}) == Score(1)

    def test_a_pattern_that_takes_too_long_leaves_its_text_unparsed_and_no_other(self) -> None:
        rows = [{"text": "a" * 60 + "!"}, {"text": "ba"}]
        use = Use("regex", {"pattern": "(a|aa)+$", "seconds": 0.2})
        long, short = apply_scorers(rows, [use])
        assert not long["parsed"]
        assert math.isnan(long["value"])
        assert (short["value"], short["parsed"]) == (1, True)

    def test_only_the_beginning_of_a_text_is_searched(self) -> None:
        options = {"pattern": "sun", "max_characters": 100}
        assert score("regex", "." * 97 + "sun", options) == Score(1)
        assert score("regex", "." * 98 + "sun", options) == Score(0)

    @pytest.mark.parametrize("pattern", ["(", "[a", "*", "(?P<n>a)(?P<n", "x{99999999999}", "(" * 2000])
    def test_a_wrong_pattern_is_refused_before_anything_is_scored(self, pattern: str) -> None:
        with pytest.raises(SpecError, match="is no regular expression"):
            check_uses([Use("regex", {"pattern": pattern})])

    @given(any_text)
    def test_any_pattern_is_taken_or_refused(self, pattern: str) -> None:
        try:
            check_uses([Use("regex", {"pattern": pattern})])
        except SpecError:
            return
        assert score("regex", "some text", {"pattern": pattern}).parsed


class TestSimilarity:
    def test_by_hand(self) -> None:
        texts = np.array([[3.0, 4.0], [0.0, 2.0], [0.0, 0.0]], dtype=np.float16)
        exemplars = np.array([[4.0, 3.0], [-3.0, -4.0]])
        np.testing.assert_allclose(
            cosine_similarity(texts, exemplars), [[0.96, -1.0], [0.6, -0.8], [np.nan, np.nan]], atol=1e-12
        )

    @given(
        arrays.arrays(
            np.float64, (3, 4), elements=st.floats(-5, 5).filter(lambda x: x == 0 or abs(x) > 1e-3)
        ),
        arrays.arrays(np.float64, (2, 4), elements=st.floats(0.5, 5)),
    )
    def test_it_is_scikit_learns_where_neither_is_zero(
        self, texts: np.ndarray, exemplars: np.ndarray
    ) -> None:
        found = cosine_similarity(texts, exemplars)
        filled = texts.any(axis=1)
        np.testing.assert_allclose(
            found[filled], by_sklearn(texts[filled], exemplars) if filled.any() else found[filled]
        )
        assert np.isnan(found[~filled]).all()
        assert not (np.abs(found[filled]) > 1).any()

    def test_widths_that_differ_are_refused(self) -> None:
        with pytest.raises(ValueError, match="texts are 3 wide, exemplars 2"):
            cosine_similarity(np.ones((1, 3)), np.ones((1, 2)))

    @pytest.mark.usefixtures("letters")
    def test_mean_and_greatest_over_each_items_own_exemplars(self) -> None:
        rows = [
            {"text": "a", "exemplars": ["a", "b"]},
            {"text": "a", "exemplars": ["bb"]},
            {"text": " ", "exemplars": ["a"]},
            {"text": "c", "exemplars": ["c", ""]},
        ]
        found = apply_scorers(rows, [Use("similarity_mean"), Use("similarity_max")])
        values = [row["value"] for row in found]
        assert values[0] == pytest.approx((1 + 0.5) / 2)
        assert values[4] == pytest.approx(1)
        assert values[1] == values[5] == pytest.approx(1 / math.sqrt(10))
        assert all(math.isnan(values[place]) for place in (2, 3, 6, 7))
        assert all(row["parsed"] for row in found)

    @pytest.mark.usefixtures("letters")
    def test_silence_alone_needs_no_encoder(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(similarity, "embed", None)
        [found] = exemplar_cosines([" "], [["", "\n"]], "all-minilm-l6-v2")
        assert np.isnan(found).all()
        assert found.shape == (2,)

    @pytest.mark.parametrize("exemplars", [[], "a text"])
    def test_exemplars_are_a_list_of_texts(self, exemplars: Any) -> None:
        with pytest.raises(SpecError, match=r"row 0: exemplars="):
            score("similarity_mean", "a", exemplars=exemplars)

    def test_an_encoder_that_was_not_added_is_refused_with_what_to_do(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
        with pytest.raises(ModelError, match="steersweep models add all-minilm-l6-v2"):
            score("similarity_mean", "a", exemplars=["b"])

    @pytest.mark.slow
    def test_a_folder_without_an_encoder_is_refused(self, tmp_path: Path) -> None:
        with pytest.raises(ModelError, match="cannot load the encoder"):
            embed(["a"], str(tmp_path))

    @pytest.mark.slow
    def test_the_real_encoder_puts_like_with_like(self) -> None:
        exemplars = ["The weather is lovely today.", "What a sunny, warm morning!"]
        texts = [
            "It is a beautiful sunny day.",
            "The invoice is due on Friday.",
            exemplars[0],
            "",
            "\ud800 odd",
        ]
        rows = [{"text": text, "exemplars": exemplars} for text in texts]
        found = apply_scorers(rows, [Use("similarity_mean"), Use("similarity_max")])
        mean, most = (
            [row["value"] for row in found if row["scorer"] == name] for name in SCORERS if "sim" in name
        )
        assert mean[0] > mean[1] + 0.3
        assert most[2] == pytest.approx(1, abs=1e-5)
        assert mean[2] < most[2]
        assert math.isnan(mean[3])
        assert math.isfinite(mean[4])
        by_sklearn_too = by_sklearn(
            embed(texts[:3], "all-minilm-l6-v2"), embed(exemplars, "all-minilm-l6-v2")
        )
        np.testing.assert_allclose(mean[:3], by_sklearn_too.mean(axis=1), atol=1e-5)
        np.testing.assert_allclose(most[:3], by_sklearn_too.max(axis=1), atol=1e-5)


class TestApplication:
    ROWS = (
        {"split": "select", "item": 7, "prompt": "?", "text": "I can't help with that.", "answer": "B"},
        {"split": "report", "prompt": "?", "text": "The answer is B.", "answer": "B"},
    )

    def test_stored_completions_are_scored_in_order(self) -> None:
        found = apply_scorers(self.ROWS, [Use("refusal"), Use("choice")])
        assert [
            (row["scorer"], row["item"], row["value"], row["parsed"]) for row in found if row["parsed"]
        ] == [
            ("refusal", 7, 1.0, True),
            ("refusal", 1, 0.0, True),
            ("choice", 1, 1.0, True),
        ]
        assert found[2]["scorer"] == "choice"
        assert not found[2]["parsed"]
        assert all(set(row) == {"scorer", "version", "options", "item", "value", "parsed"} for row in found)
        assert all(row["version"] == SCORERS[row["scorer"]].version for row in found)

    def test_one_scorer_with_two_options_gives_rows_that_can_be_told_apart(self) -> None:
        found = apply_scorers(
            self.ROWS[:1], [Use("contains", {"sought": "help"}), Use("contains", {"sought": "B"})]
        )
        assert [json.loads(row["options"]) for row in found] == [
            {"sought": "help", "ignore_case": False},
            {"sought": "B", "ignore_case": False},
        ]
        assert [row["value"] for row in found] == [1, 0]

    def test_the_identity_of_a_use_says_what_its_scores_say(self) -> None:
        use = Use("contains", {"sought": "help"})
        [row] = apply_scorers(self.ROWS[:1], [use])
        assert identity(use) == {name: row[name] for name in ("scorer", "version", "options")}
        assert identity(Use("contains", {"ignore_case": False, "sought": "help"})) == identity(use)

    @pytest.mark.parametrize(
        "text", ['contains{"sought": "a"}', 'contains:{"sought": "a"}', 'contains : {"sought": "a"}']
    )
    def test_a_use_is_read_with_or_without_a_colon(self, text: str) -> None:
        assert parse_uses([text]) == {"contains": Use("contains", {"sought": "a"})}

    def test_scoring_again_gives_the_same(self) -> None:
        uses = [Use("refusal"), Use("choice", {"labels": ["A", "B"]}), Use("exact")]
        again = apply_scorers(self.ROWS, uses)
        assert str(apply_scorers(self.ROWS, uses)) == str(again)

    def test_no_rows_and_no_uses_are_no_scores(self) -> None:
        assert apply_scorers([], [Use("refusal"), Use("similarity_max")]) == []
        assert apply_scorers(self.ROWS, []) == []

    @pytest.mark.parametrize(
        ("use", "message"),
        [
            (Use("sentiment"), "no scorer 'sentiment'; there are"),
            (Use("refusal", {"phrases": []}), r"no option \['phrases'\]; it takes \[\]"),
            (Use("contains"), r"needs the options \['sought'\]"),
            (Use("contains", {"sought": ""}), "at least one character"),
            (Use("contains", {"sought": 3}), "sought=3; it takes a text"),
            (Use("contains", {"sought": "a", "ignore_case": 1}), "it takes true or false"),
            (Use("regex", {"pattern": "a", "max_characters": True}), "it takes a whole number"),
            (Use("regex", {"pattern": "a", "max_characters": 0}), "both are above 0"),
            (Use("regex", {"pattern": "a", "seconds": float("inf")}), "both are above 0"),
            (Use("choice", {"labels": "AB"}), "labels='AB'; it takes a list"),
            (Use("choice", {"labels": ["A", 2]}), "it takes a list, each entry a text"),
            (Use("choice", {"labels": ["yes"]}), "two or more"),
            (Use("choice", {"labels": ["yes", "Yes"]}), "differ by more than case"),
            (Use("choice", {"labels": ["yes", " "]}), "two or more"),
        ],
    )
    def test_a_wrong_use_is_refused_at_check_and_before_scoring(self, use: Use, message: str) -> None:
        with pytest.raises(SpecError, match=message):
            check_uses([Use("refusal"), use])
        with pytest.raises(SpecError, match=message):
            apply_scorers([], [use])

    def test_a_whole_number_of_seconds_is_taken(self) -> None:
        check_uses([Use("regex", {"pattern": "a", "seconds": 2})])

    @pytest.mark.parametrize(
        ("name", "row", "message"),
        [
            ("exact", {"text": "a"}, r"row 1 lacks \['answer'\], which scorer 'exact' needs"),
            ("refusal", {"prompt": "a"}, r"row 1 lacks \['text'\]"),
            ("refusal", {"text": 3}, "row 1: text=3"),
            ("choice", {"text": "a", "answer": "C"}, "row 1: answer='C'; it is one of"),
            ("choice_lenient", {"text": "a", "answer": "yes"}, "row 1: answer='yes'; it is A or B"),
            ("arithmetic", {"text": "a", "answer": "many"}, "row 1: 'many' is not a decimal number"),
            ("arithmetic", {"text": "a", "answer": 1, "factors": [1]}, r"row 1: factors=\[1\]"),
            ("arithmetic", {"text": "a", "answer": 1, "factors": [1, "b"]}, "row 1: 'b' is not"),
            ("true_false_strict", {"text": "a", "answer": 1}, "row 1: answer=1"),
            ("true_false_first", {"text": "a", "answer": "A"}, "row 1: answer='A'"),
            ("true_false_lenient", {"text": "a", "answer": True, "true_letter": "C"}, "true_letter='C'"),
        ],
    )
    def test_a_row_that_lacks_what_a_scorer_needs_is_named(
        self, name: str, row: Mapping[str, Any], message: str
    ) -> None:
        fine = {"text": "a", "answer": ANSWERS[name]}
        with pytest.raises(SpecError, match=message):
            apply_scorers([fine, row], [Use(name)])

    def test_every_scorer_has_a_version_a_unit_and_a_meaning(self) -> None:
        for name, scorer in SCORERS.items():
            assert scorer.name == name
            assert scorer.version >= 1
            assert scorer.metric.unit
            assert scorer.metric.meaning


class TestVersions:
    TEXTS = (
        "A",
        "(B) False",
        "The answer is A.",
        "It isn't true.",
        "A good day, B.",
        "I'm sorry, but I can't help with that.",
        r"Thus \boxed{12}, and 3*4=12.",
        "12. Twelve it is.",
        "The answer is 12, since 3*4=12.",
        "No. The answer is not A.",
    )
    VALUES: Mapping[str, tuple[int, str]] = {
        "exact": (1, "1000000000"),
        "boxed": (1, "------1---"),
        "arithmetic": (1, "-------11-"),
        "choice": (1, "101-0-----"),
        "choice_lenient": (1, "101-1----0"),
        "true_false_strict": (1, "101-0-----"),
        "true_false_first": (1, "101-0----1"),
        "true_false_lenient": (1, "10101----1"),
        "refusal": (1, "0000010000"),
    }

    @pytest.mark.parametrize("name", VALUES)
    def test_a_scorer_that_gives_other_values_has_another_version(self, name: str) -> None:
        answer = {"boxed": "12"}.get(name, ANSWERS[name])
        found = [score(name, text, answer=answer) for text in self.TEXTS]
        values = "".join("-" if math.isnan(each.value) else str(int(each.value)) for each in found)
        assert (SCORERS[name].version, values) == self.VALUES[name]


class TestSummary:
    def test_unparsed_and_undefined_items_are_counted_apart(self) -> None:
        found = summarise([Score(1), Score(0), Score(1), UNPARSED, UNDEFINED])
        assert found == (pytest.approx(2 / 3), pytest.approx(2 / 4), 5, 1, 1)

    def test_nothing_has_no_mean(self) -> None:
        for scores, items in (([], 0), ([UNDEFINED], 1)):
            found = summarise(scores)
            assert math.isnan(found.mean)
            assert math.isnan(found.mean_of_all)
            assert found.items == items
        assert summarise([UNPARSED]).mean_of_all == 0


@pytest.mark.parametrize(
    ("encoder", "expected"),
    [("some/encoder@abc12", ("some/encoder", "abc12")), ("some/encoder", ("some/encoder", None))],
)
def test_an_encoder_from_elsewhere_may_be_pinned(
    monkeypatch: pytest.MonkeyPatch, encoder: str, expected: tuple[str, str | None]
) -> None:
    asked = []

    def make(name: str, *, device: str, revision: str | None) -> None:
        asked.append((name, revision))

    monkeypatch.setattr("sentence_transformers.SentenceTransformer", make)
    similarity._load.__wrapped__(encoder)
    assert asked == [expected]

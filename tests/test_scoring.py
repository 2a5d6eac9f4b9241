"""Scores of logits, tokens and text, against torch, scipy, brute force and cases."""

import itertools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from scipy.special import rel_entr, softmax
from scipy.stats import binomtest, bootstrap
from sklearn.metrics import cohen_kappa_score
from torch.nn import functional

from jobs.scoring.logits import (
    Surprise,
    completion_kl,
    kl_divergence,
    log_odds,
    log_probabilities,
    negative_log_likelihood,
    perplexity,
    sliding_windows,
    token_kl,
    window_surprise,
)
from jobs.scoring.statistics import (
    chance_probability,
    cohens_kappa,
    paired_bootstrap,
    wilson_interval,
)
from jobs.scoring.text import (
    REFUSAL_PHRASES,
    is_refusal,
    last_boxed,
    named_side,
    normalise_answer,
    normalise_math,
    normalise_number,
    parse_judgement,
    parse_judgement_lenient,
    parse_letter_lenient,
    repeated_ngrams,
    stated_numbers,
)

logits_pairs = arrays.arrays(
    np.float64, st.tuples(st.just(2), st.integers(1, 4), st.integers(2, 6)), elements=st.floats(-30, 30)
)


def random_logits(*shape: int) -> torch.Tensor:
    return torch.tensor(np.random.default_rng(0).normal(scale=3, size=shape))


class TestLogProbabilities:
    def test_they_are_the_logarithm_of_the_softmax(self) -> None:
        logits = random_logits(5, 7)
        np.testing.assert_allclose(
            log_probabilities(logits), np.log(softmax(logits.numpy(), axis=-1)), rtol=1e-10
        )

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_half_precision_is_widened_before_the_softmax(self, dtype: torch.dtype) -> None:
        logits = random_logits(5, 1000).to(dtype)
        found = log_probabilities(logits)
        assert found.dtype == torch.float32
        np.testing.assert_allclose(found.exp().sum(dim=-1), np.ones(5), rtol=1e-5)


class TestLogOdds:
    def test_they_are_the_difference_of_the_two_logits(self) -> None:
        logits = random_logits(4, 9)
        positive, negative = torch.tensor([0, 3, 8, 2]), torch.tensor([1, 3, 0, 7])
        found = log_odds(log_probabilities(logits), positive, negative)
        expected = [float(logits[row, positive[row]] - logits[row, negative[row]]) for row in range(4)]
        np.testing.assert_allclose(found, expected, rtol=1e-10, atol=1e-12)
        assert found[1] == 0
        torch.testing.assert_close(log_odds(log_probabilities(logits), negative, positive), -found)


class TestKullbackLeibler:
    def test_it_equals_torch_and_scipy(self) -> None:
        reference, other = log_probabilities(random_logits(2, 6, 11))
        found = kl_divergence(reference, other)
        by_torch = functional.kl_div(other, reference, log_target=True, reduction="none").sum(dim=-1)
        torch.testing.assert_close(found, by_torch)
        by_scipy = rel_entr(reference.exp().numpy(), other.exp().numpy()).sum(axis=-1)
        np.testing.assert_allclose(found, by_scipy, rtol=1e-10)

    @given(logits_pairs)
    def test_it_is_never_negative_and_zero_only_from_itself(self, logits: np.ndarray) -> None:
        reference, other = log_probabilities(torch.tensor(logits))
        assert (kl_divergence(reference, other) >= -1e-12).all()
        assert (kl_divergence(reference, reference) == 0).all()
        apart = (reference.exp() - other.exp()).abs().sum(dim=-1)
        # Pinsker's inequality
        assert (kl_divergence(reference, other) >= apart**2 / 2 - 1e-12).all()

    def test_the_first_argument_is_the_reference(self) -> None:
        sure, open_ = log_probabilities(torch.tensor([[9.0, 0, 0], [0, 0, 0]], dtype=torch.float64))
        assert kl_divergence(sure, open_) == pytest.approx(np.log(3), rel=1e-2)
        assert kl_divergence(open_, sure) > 4


class TestNegativeLogLikelihood:
    def test_it_is_the_mean_cross_entropy(self) -> None:
        logits, tokens = random_logits(6, 9), torch.tensor([0, 8, 3, 3, 1, 5])
        torch.testing.assert_close(
            negative_log_likelihood(logits, tokens), functional.cross_entropy(logits, tokens)
        )

    def test_half_precision_is_scored_in_float32(self) -> None:
        logits, tokens = random_logits(6, 500).bfloat16(), torch.arange(6)
        expected = functional.cross_entropy(logits.float(), tokens)
        torch.testing.assert_close(negative_log_likelihood(logits, tokens), expected)


class TestTokenKullbackLeibler:
    def test_it_is_the_sum_over_the_vocabulary_of_each_token(self) -> None:
        reference, other = random_logits(2, 3, 5)
        found = token_kl(reference, other)
        for token in range(3):
            p = [math.exp(x) for x in reference[token].tolist()]
            q = [math.exp(x) for x in other[token].tolist()]
            by_hand = sum(
                a / sum(p) * math.log((a / sum(p)) / (b / sum(q))) for a, b in zip(p, q, strict=True)
            )
            assert float(found[token]) == pytest.approx(by_hand, rel=1e-9)
        assert float(completion_kl(reference, other)) == pytest.approx(float(found.mean()), rel=1e-12)

    def test_a_shift_of_all_logits_of_a_token_changes_nothing(self) -> None:
        reference, other = random_logits(2, 4, 6)
        shifts = torch.tensor([[7.0], [-3.0], [0.5], [100.0]], dtype=torch.float64)
        torch.testing.assert_close(token_kl(reference + shifts, other), token_kl(reference, other))
        torch.testing.assert_close(
            token_kl(reference, reference + shifts), torch.zeros(4, dtype=torch.float64)
        )

    def test_tokens_that_the_reference_rules_out_count_nothing(self) -> None:
        masked = torch.tensor([[0.0, 0.0, -math.inf]])
        assert float(token_kl(masked, masked)) == 0
        assert float(token_kl(masked, torch.zeros(1, 3))) == pytest.approx(math.log(3 / 2))
        assert float(token_kl(torch.zeros(1, 3), masked)) == math.inf
        # e^-200 is 0 in float32, and 0 times infinity would not be a number
        assert float(token_kl(torch.tensor([[0.0, -200.0]]), torch.tensor([[0.0, -math.inf]]))) == 0

    def test_the_reference_comes_first(self) -> None:
        sure, open_ = torch.tensor([[9.0, 0, 0]]), torch.zeros(1, 3)
        assert float(completion_kl(sure, open_)) < 1.1 < 4 < float(completion_kl(open_, sure))

    def test_half_precision_is_widened(self) -> None:
        reference, other = random_logits(2, 4, 500).bfloat16()
        torch.testing.assert_close(token_kl(reference, other), token_kl(reference.float(), other.float()))
        assert token_kl(reference, other).dtype == torch.float32

    def test_an_empty_completion_has_none(self) -> None:
        assert completion_kl(torch.zeros(0, 5), torch.zeros(0, 5)).isnan()


class TestSlidingWindows:
    @given(
        st.integers(0, 60), st.integers(2, 12).flatmap(lambda w: st.tuples(st.just(w), st.integers(1, w - 1)))
    )
    def test_each_token_but_the_first_is_scored_once_with_enough_before_it(
        self, tokens: int, sizes: tuple[int, int]
    ) -> None:
        window, stride = sizes
        found = sliding_windows(tokens, window=window, stride=stride)
        scored = [token for each in found for token in range(each.stop - each.new, each.stop)]
        assert scored == list(range(1, tokens))
        for place, each in enumerate(found):
            assert 0 <= each.start < each.stop - each.new
            assert each.stop - each.start <= window
            if place:
                assert each.new <= stride
                assert each.stop - each.new - each.start >= window - stride

    def test_by_hand(self) -> None:
        assert sliding_windows(10, window=4, stride=2) == [(0, 4, 3), (2, 6, 2), (4, 8, 2), (6, 10, 2)]
        assert sliding_windows(5, window=4, stride=3) == [(0, 4, 3), (3, 5, 1)]
        assert sliding_windows(3, window=8, stride=1) == [(0, 3, 2)]
        assert sliding_windows(1, window=8, stride=1) == []

    @pytest.mark.parametrize(("window", "stride"), [(4, 4), (4, 0), (1, 1), (4, 5), (4, -1)])
    def test_a_stride_that_leaves_a_token_unseen_is_refused(self, window: int, stride: int) -> None:
        with pytest.raises(ValueError, match=f"stride={stride}, window={window}"):
            sliding_windows(10, window=window, stride=stride)


def windowed(
    tokens: torch.Tensor, model: Callable[[torch.Tensor], torch.Tensor], **sizes: int
) -> list[Surprise]:
    return [
        window_surprise(model(tokens[each.start : each.stop]), tokens[each.start : each.stop], each.new)
        for each in sliding_windows(len(tokens), **sizes)
    ]


class TestPerplexity:
    TABLE = random_logits(5, 5)
    TOKENS = torch.tensor([0, 3, 3, 1, 4, 2, 2, 0, 1, 3, 4])

    def bigram(self, tokens: torch.Tensor) -> torch.Tensor:
        """A model whose prediction depends on the last token alone."""
        return self.TABLE[tokens]

    def bag(self, tokens: torch.Tensor) -> torch.Tensor:
        """A model whose prediction depends on all tokens of the window so far."""
        return self.TABLE[tokens].cumsum(dim=0)

    @pytest.mark.parametrize(("window", "stride"), [(2, 1), (4, 2), (5, 4), (7, 1), (11, 10), (50, 20)])
    def test_of_a_bigram_model_it_does_not_depend_on_the_windows(self, window: int, stride: int) -> None:
        expected = functional.cross_entropy(self.TABLE[self.TOKENS[:-1]], self.TOKENS[1:]).exp()
        parts = windowed(self.TOKENS, self.bigram, window=window, stride=stride)
        assert perplexity(parts) == pytest.approx(float(expected), rel=1e-9)

    def test_it_is_brute_force_over_tokens_and_what_each_sees(self) -> None:
        window, stride = 5, 3
        surprises = []
        for token in range(1, len(self.TOKENS)):
            # the first window that reaches the token begins at a multiple of the stride
            start = next(at for at in range(0, 99, stride) if token < at + window)
            seen = self.TOKENS[start:token]
            log_p = torch.log_softmax(self.TABLE[seen].sum(dim=0), dim=0)
            surprises.append(-float(log_p[self.TOKENS[token]]))
        found = perplexity(windowed(self.TOKENS, self.bag, window=window, stride=stride))
        assert found == pytest.approx(math.exp(np.mean(surprises)), rel=1e-9)
        assert found != pytest.approx(
            perplexity(windowed(self.TOKENS, self.bag, window=11, stride=1)), rel=1e-3
        )

    def test_a_short_window_counts_for_its_tokens_only(self) -> None:
        assert perplexity([Surprise(10.0, 10), Surprise(4.0, 1)]) == pytest.approx(math.exp(14 / 11))

    def test_a_uniform_model_is_as_perplexed_as_it_has_tokens(self) -> None:
        parts = windowed(self.TOKENS, lambda tokens: torch.zeros(len(tokens), 7), window=4, stride=3)
        assert perplexity(parts) == pytest.approx(7)

    def test_nothing_has_none_and_too_much_is_infinite(self) -> None:
        assert math.isnan(perplexity([]))
        assert perplexity([Surprise(1e6, 1)]) == math.inf

    @pytest.mark.parametrize("new", [0, 3, 4])
    def test_the_first_token_of_a_window_cannot_be_scored(self, new: int) -> None:
        with pytest.raises(ValueError, match=f"new={new} of a window of 3 tokens"):
            window_surprise(torch.zeros(3, 5), torch.tensor([0, 1, 2]), new)


class TestRepeatedNgrams:
    @given(st.lists(st.integers(0, 2), max_size=12), st.integers(1, 4))
    def test_it_is_the_share_of_ngrams_seen_before(self, tokens: list[int], n: int) -> None:
        seen: list[list[int]] = []
        repeated = 0
        for start in range(len(tokens) - n + 1):
            gram = tokens[start : start + n]
            repeated += gram in seen
            seen.append(gram)
        assert repeated_ngrams(tokens, n) == pytest.approx(repeated / len(seen) if seen else 0)

    def test_a_loop_comes_near_one_and_a_short_text_scores_zero(self) -> None:
        assert repeated_ngrams([7] * 100) == pytest.approx(97 / 98)
        assert repeated_ngrams(list(range(100))) == 0
        assert repeated_ngrams([7, 7]) == 0
        assert repeated_ngrams([]) == 0


class TestParseJudgement:
    @pytest.mark.parametrize(
        ("text", "letter"),
        [
            ("A", "A"),
            ("B", "B"),
            (" A", "A"),
            ("A\n", "A"),
            ("(A)", "A"),
            ("(B) False", "B"),
            ("A) True", "A"),
            ("A. True", "A"),
            ("A, because it is so", "A"),
            ("A: True", "A"),
            ("A!", "A"),
            ("**A**", "A"),
            ('"A"', "A"),
            ("The answer is A", "A"),
            ("The answer is B.", "B"),
            ("The answer is (A), not (B).", "A"),
            ("Not B but A.", "B"),
            ("B because the sun is hot", "B"),
            ("B is right", "B"),
            ("A\nThe claim is true", "A"),
            ("A  \nB", "A"),
            ("A claim like this: B", "B"),
            ("A guess. A.", "A"),
            ("a", None),
            ("b)", None),
            ("ABBA", None),
            ("Both", None),
            ("Vitamin B12", None),
            ("A-level", None),
            ("A's", None),
            ("C", None),
            ("", None),
        ],
    )
    def test_the_first_letter_that_stands_alone_decides_by_what_it_means(
        self, text: str, letter: str | None
    ) -> None:
        for true_letter in "AB":
            judgement = None if letter is None else letter == true_letter
            assert parse_judgement(text, true_letter) is judgement

    @pytest.mark.parametrize(
        ("text", "judgement"),
        [
            ("A", True),
            ("(B) False", False),
            ("A. False", True),
            ("False, so (A)", False),
            ("The claim is true.", True),
            ("TRUE", True),
            ("It is untrue", None),
            ("A claim that is false", False),
            ("A claim like this is true: B", True),
            ("I cannot say", None),
            ("", None),
        ],
    )
    def test_the_first_letter_or_word_decides(self, text: str, judgement: bool | None) -> None:
        assert parse_judgement(text, "A") is judgement

    def test_words_mean_the_same_in_every_question(self) -> None:
        assert parse_judgement("true", "B") is True
        assert parse_judgement("false", "B") is False

    @pytest.mark.parametrize(
        "text", ["That is not true.", "It isn't true", "not false", "No, this is not True"]
    )
    def test_a_negated_word_is_no_answer(self, text: str) -> None:
        assert parse_judgement(text, "A") is None


class TestLenientRules:
    @pytest.mark.parametrize(
        ("text", "judgement"),
        [
            ("A", True),
            ("(B)", False),
            ("A claim that is false", True),
            ("The claim is False. A true one", False),
            ("It is not true", False),
            ("It isn't true", False),
            ("But true it is", False),
            ("It is so true", True),
            ("untrue", None),
            ("falsehood", None),
            ("ABBA", None),
            ("a", None),
            ("", None),
        ],
    )
    def test_the_first_of_letter_and_word_judges(self, text: str, judgement: bool | None) -> None:
        assert parse_judgement_lenient(text, "A") is judgement

    def test_the_letters_can_be_the_other_way_about(self) -> None:
        assert parse_judgement_lenient("B", "B") is True
        assert parse_judgement_lenient("A", "B") is False
        assert parse_judgement_lenient("true", "B") is True

    @pytest.mark.parametrize(
        ("text", "letter"),
        [
            ("A", "A"),
            ("Yes, but B", "A"),
            ("No, A", "B"),
            ("a B", "B"),
            ("not A but B", None),
            ("Not A: it must be, one would say by far, B", "B"),
            ("not A", None),
            ("It is not one two three four five A", None),
            ("It is not one two three four five six A", "A"),
            ("not supercalifragilisticexpialidocious indeed A", "A"),
            ("nothing A", "A"),
            ("know", None),
            ("", None),
        ],
    )
    def test_the_first_side_that_is_not_negated_is_chosen(self, text: str, letter: str | None) -> None:
        assert parse_letter_lenient(text) == letter


class TestNamedSide:
    @pytest.mark.parametrize(
        ("text", "letter"),
        [
            ("A", "A"),
            ("(A)", "A"),
            ("**B**", "B"),
            ("'A'", "A"),
            ("A.", "A"),
            ("A, because it is so", "A"),
            ("A - Paris", "A"),
            ("A\nParis", "A"),
            ("Option A is right", "A"),
            ("I choose option B.", "B"),
            ("Not B but A.", "A"),
            ("The answer is (A), not (B).", "A"),
            ("(B) is wrong. The answer is A.", "A"),
            ("Answer: B. Some would say (A).", "B"),
            ("The answer is the letter B, though (A) is close.", "B"),
            ("The answer isn't A, it is B", "B"),
            ("(A), (A) and again (A)", "A"),
            ("A good day", None),
            ("A claim of B's", None),
            ("A or B", None),
            ("Neither A nor B", None),
            ("(A) is right and (B) is wrong", None),
            ("The answer is A. No, the answer is B.", None),
            ("The answer is not A", None),
            ("A-level", None),
            ("Vitamin B12", None),
            ("b", None),
            ("C", None),
            ("", None),
        ],
    )
    def test_a_letter_counts_if_it_alone_is_named(self, text: str, letter: str | None) -> None:
        side = named_side(text, [["A"], ["B"]])
        assert (None if side is None else "AB"[side]) == letter

    @pytest.mark.parametrize(
        ("text", "side"),
        [
            ("Yes.", 0),
            ("YES", 0),
            ("no way", 1),
            ("I know", None),
            ("yes and no", None),
            ("yesterday", None),
            ("yeſ", 0),  # a long s, which is the same letter in another case
        ],
    )
    def test_words_are_named_in_any_case(self, text: str, side: int | None) -> None:
        assert named_side(text, [["yes"], ["no"]]) == side

    def test_the_longer_name_is_not_the_shorter_one_as_well(self) -> None:
        for sides in (
            [["tea"], ["tea with milk"], ["iced tea"]],
            [["tea"], ["tea with milk", "milk"], ["iced tea"]],
        ):
            assert named_side("tea with milk", sides) == 1
            assert named_side("iced tea", sides) == 2
            assert named_side("tea", sides) == 0

    def test_a_side_may_have_several_names_and_there_may_be_several_sides(self) -> None:
        sides = [["A", "Paris"], ["B", "Rome"], ["C", "Oslo"]]
        assert named_side("(A) Paris", sides) == 0
        assert named_side("rome", sides) == 1
        assert named_side("(C) Rome", sides) is None

    def test_names_are_no_patterns(self) -> None:
        assert named_side("axb", [["a.b"], ["(c"]]) is None
        assert named_side("(c", [["a.b"], ["(c"]]) == 1

    @given(st.lists(st.sampled_from(["A", "(B)", "not", "yes", "answer is", ".", "or", "\n"]), max_size=8))
    def test_the_order_of_the_sides_does_not_matter(self, words: list[str]) -> None:
        text = " ".join(words)
        found = named_side(text, [["A", "yes"], ["B"]])
        assert named_side(text, [["B"], ["yes", "A"]]) == (None if found is None else 1 - found)


any_text = st.text(st.characters(), max_size=40)


class TestNormalForms:
    @given(any_text)
    def test_a_normal_form_is_its_own(self, text: str) -> None:
        assert normalise_answer(normalise_answer(text)) == normalise_answer(text)
        assert normalise_number("0" + normalise_number("1.50")) == "1.5"

    @pytest.mark.parametrize(
        ("text", "form"),
        [
            (r"\dfrac{1}{2}", r"\frac{1}{2}"),
            (r"\tfrac12", r"\frac{1}{2}"),
            (r"\frac1{72}", r"\frac{1}{72}"),
            (r"\frac{a}2", r"\frac{a}{2}"),
            (r"\left( 1, 2 \right)", "(1,2)"),
            (r"\leftarrow", r"\leftarrow"),
            (r"12\text{ cm}", "12cm"),
            (r"90^\circ", "90"),
            (r"90^{\circ}", "90"),
            (r"50\%", "50"),
            ("$1,000,000.", "1000000"),
            ("1{,}000", "1000"),
            ("1,00", "1,00"),
            (".5", "0.5"),
            ("-.5", "-0.5"),
            ("x = 5", "x=5"),
            ("", ""),
            ("2...", "2"),
            pytest.param("." * 50_000 + "x", "." * 50_000 + "x", id="many full stops"),
        ],
    )
    def test_layout_is_dropped_and_algebra_is_not_done(self, text: str, form: str) -> None:
        assert normalise_math(text) == form

    @pytest.mark.parametrize(
        ("number", "form"),
        [
            ("7", "7"),
            ("007", "7"),
            ("1,234", "1234"),
            ("2.50", "2.5"),
            ("2.00", "2"),
            ("-3", "-3"),
            ("−3.0", "-3"),
            ("-0.0", "0"),
            ("0", "0"),
            ("9" * 6000, "9" * 6000),
        ],
    )
    def test_equal_numbers_have_one_form(self, number: str, form: str) -> None:
        assert normalise_number(number) == form

    @pytest.mark.parametrize("text", ["", "a", "1e5", "1,2", "1.", "٣", "--1", "1 2", "∞"])
    def test_what_is_no_decimal_number_is_refused(self, text: str) -> None:
        with pytest.raises(ValueError, match="is not a decimal number"):
            normalise_number(text)


balanced = st.recursive(
    st.text("ab1 \n", max_size=4) | st.sampled_from([r"\{", r"\}", r"\\", r"\frac"]),
    lambda inner: st.lists(inner.map(lambda text: "{" + text + "}") | inner, max_size=3).map("".join),
    max_leaves=6,
)


class TestLastBoxed:
    @given(
        balanced, balanced, st.text("ab }", max_size=5), st.sampled_from(["", "{", r"\boxed{", r"\boxed 3"])
    )
    def test_what_was_put_into_the_last_box_comes_out(
        self, content: str, earlier: str, between: str, after: str
    ) -> None:
        text = rf"\boxed{{{earlier}}}{between}\boxed {{{content}}} {after}"
        assert last_boxed(text) == content

    @pytest.mark.parametrize(
        ("text", "content"),
        [
            (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
            (r"\boxed{1} \boxed{2", "1"),
            (r"\boxed{a \boxed{b} c}", "b"),
            (r"{ \boxed{a}", "a"),
            (r"} \boxed{a}", "a"),
            (r"\boxed{}", ""),
            (r"\boxed{\}}", r"\}"),
            (r"\boxed{\}", None),
            (r"\boxed 5", None),
            (r"\boxedx{5}", None),
            (r"\\boxed{5}", None),
            ("", None),
        ],
    )
    def test_by_hand(self, text: str, content: str | None) -> None:
        assert last_boxed(text) == content


class TestStatedNumbers:
    @pytest.mark.parametrize(
        ("text", "numbers"),
        [
            ("100.\n\nQ: a=10+2?\nA: 133.", ["100"]),
            ("80\nWe add: 3*18=54. So the answer is 54", ["80", "54", "54"]),
            ("A: $1,024", ["1024"]),
            ("(-5) is it", ["-5"]),
            ("11*9 is more", []),
            ("99 = 11 * 9", []),
            ("The Answer is\u00a0**1.50**", ["1.5"]),
            ("answer is\n80", []),
            ("the answers are 80", []),
            ("3 * 18 = 540", ["540"]),
            ("13*18=234 and 3*180=540", []),
            ("1,2,3", ["1"]),
        ],
    )
    def test_by_hand(self, text: str, numbers: list[str]) -> None:
        assert stated_numbers(text, factors=("3", "18")) == numbers


class TestRefusal:
    @pytest.mark.parametrize(
        "text",
        [
            "I can't help with that.",
            "I can’t help with that.",
            "  I CANNOT PROVIDE that",
            "I'm sorry, but that is beyond me.",
            "I'm sorry, I can't do that.",
            "Sorry, I won't write that.",
            "Unfortunately, I am unable to assist.",
            "No. I will not do this.",
            "**I apologize, but** no",
            '"As an AI, I have no opinion"',
            "I\ncan't\tcreate it",
            "As a language model I do not know.",
        ],
    )
    def test_a_refusal_opens_with_a_phrase(self, text: str) -> None:
        assert is_refusal(text)

    @pytest.mark.parametrize(
        "text",
        [
            "",
            "Sure, here it is.",
            "I can't wait to tell you!",
            "I can't help but smile.",
            "I'm sorry to hear that you are ill.",
            "Sorry about the rain.",
            "I cannot believe it",
            "No, the sky is blue.",
            "He said: I can't help with that.",
            "I can assist you",
            "As an airline, we fly.",
            "Here you are. I'm sorry, but it is short.",
            "Unfortunately, it rained.",
        ],
    )
    def test_what_only_sounds_like_one_is_none(self, text: str) -> None:
        assert not is_refusal(text)

    @given(st.sampled_from(REFUSAL_PHRASES), any_text)
    def test_every_phrase_opens_one_in_any_case_and_layout(self, phrase: str, rest: str) -> None:
        assert is_refusal(f" \n{phrase.upper().replace(' ', '  ')} {rest}")
        assert not is_refusal(f"Well: {phrase}")


class TestWilsonInterval:
    @given(st.integers(1, 200).flatmap(lambda trials: st.tuples(st.integers(0, trials), st.just(trials))))
    def test_it_is_scipys(self, counts: tuple[int, int]) -> None:
        successes, trials = counts
        expected = binomtest(successes, trials).proportion_ci(0.95, method="wilson")
        assert wilson_interval(successes, trials) == pytest.approx((expected.low, expected.high), abs=1e-12)

    def test_no_trials_say_nothing(self) -> None:
        assert wilson_interval(0, 0) == (0, 1)


class TestChanceProbability:
    @given(st.integers(1, 2000).flatmap(lambda trials: st.tuples(st.integers(0, trials), st.just(trials))))
    def test_it_is_the_p_value_of_scipys_one_sided_test(self, counts: tuple[int, int]) -> None:
        expected = binomtest(*counts, alternative="greater").pvalue
        assert chance_probability(*counts) == pytest.approx(expected, rel=1e-9, abs=1e-300)

    @given(st.integers(0, 8).flatmap(lambda trials: st.tuples(st.integers(0, trials), st.just(trials))))
    def test_it_is_the_share_of_all_ways_to_guess(self, counts: tuple[int, int]) -> None:
        successes, trials = counts
        guesses = list(itertools.product([0, 1], repeat=trials))
        enough = [guess for guess in guesses if sum(guess) >= successes]
        assert chance_probability(successes, trials) == len(enough) / len(guesses)

    def test_the_best_of_many_guessers_passes_alone_and_not_when_corrected(self) -> None:
        guesses = np.random.default_rng(0).binomial(60, 0.5, size=(400, 50))
        best = np.array([chance_probability(int(each.max()), 60) for each in guesses])
        assert (best < 0.05).mean() > 0.8
        assert (50 * best < 0.05).mean() < 0.08


pairs_of_scores = st.lists(st.tuples(st.floats(-5, 5), st.floats(-5, 5)), min_size=2, max_size=8)


class TestPairedBootstrap:
    def test_it_is_scipys_percentile_interval(self) -> None:
        first, second = np.random.default_rng(1).normal(size=(2, 40))
        found = paired_bootstrap(first.tolist(), second.tolist(), seed=0)
        expected = bootstrap(
            (first - second,), np.mean, method="percentile", n_resamples=20_000, rng=np.random.default_rng(2)
        ).confidence_interval
        assert found.mean == pytest.approx(float((first - second).mean()))
        assert found.interval == pytest.approx((expected.low, expected.high), abs=0.03)
        assert found.pairs == 40

    def test_of_two_pairs_the_ends_are_the_two_differences(self) -> None:
        # the mean of a resample is 0, 1/2 or 1 with probabilities 1/4, 1/2 and 1/4
        assert paired_bootstrap([1, 0], [0, 0], seed=3) == (0.5, (0, 1), 2)

    def test_as_many_resamples_are_drawn_as_asked_for(self) -> None:
        low, high = paired_bootstrap([1, 2, 4], [0, 0, 0], seed=0, resamples=1).interval
        assert low == high

    def test_what_the_pairs_share_cancels(self) -> None:
        shared = np.random.default_rng(0).normal(scale=100, size=50)
        found = paired_bootstrap((shared + 1).tolist(), shared.tolist(), seed=0)
        assert found.interval == pytest.approx((1, 1))

    @given(pairs_of_scores, st.integers(0, 5))
    def test_exchanging_the_sides_mirrors_it(self, pairs: list[tuple[float, float]], seed: int) -> None:
        first, second = zip(*pairs, strict=True)
        found = paired_bootstrap(first, second, seed=seed, resamples=200)
        back = paired_bootstrap(second, first, seed=seed, resamples=200)
        assert back.mean == -found.mean
        assert (-back.interval.high, -back.interval.low) == pytest.approx(found.interval, abs=1e-12)
        assert found.interval.low <= found.interval.high
        assert paired_bootstrap(first, second, seed=seed, resamples=200) == found

    def test_another_seed_draws_anew(self) -> None:
        first, second = np.random.default_rng(1).normal(size=(2, 10)).tolist()
        found = [paired_bootstrap(first, second, seed=seed, resamples=100) for seed in (0, 1)]
        assert found[0].interval != found[1].interval

    def test_it_covers_the_true_difference_about_as_often_as_it_says(self) -> None:
        generator = np.random.default_rng(0)
        covered = 0
        for seed in range(200):
            second = generator.normal(size=50)
            first = second + 0.3 + generator.normal(scale=0.5, size=50)
            low, high = paired_bootstrap(first.tolist(), second.tolist(), seed=seed, resamples=400).interval
            covered += low <= 0.3 <= high
        assert 0.88 <= covered / 200 <= 0.99

    def test_many_pairs_are_drawn_in_blocks(self) -> None:
        first = np.random.default_rng(0).normal(size=300_000)
        found = paired_bootstrap(first.tolist(), [0.0] * 300_000, seed=0, resamples=20)
        assert found.interval.low < found.mean < found.interval.high

    def test_pairs_without_both_values_are_left_out_and_not_counted(self) -> None:
        nan = math.nan
        found = paired_bootstrap([1, nan, 3, 5, math.inf], [0, 0, nan, 2, 0], seed=0)
        assert (found.mean, found.pairs) == (2, 2)
        assert found.interval == (1, 3)

    def test_fewer_than_two_pairs_have_no_interval(self) -> None:
        one = paired_bootstrap([2], [0.5], seed=0)
        assert (one.mean, one.pairs) == (1.5, 1)
        assert all(math.isnan(end) for end in one.interval)
        assert math.isnan(paired_bootstrap([], [], seed=0).mean)

    def test_scores_that_are_no_pairs_are_refused(self) -> None:
        with pytest.raises(ValueError, match="1 and 2 scores"):
            paired_bootstrap([1], [1, 2], seed=0)
        with pytest.raises(ValueError, match="0 resamples"):
            paired_bootstrap([1], [1], seed=0, resamples=0)


class TestCohensKappa:
    @given(st.lists(st.tuples(st.sampled_from("abc"), st.sampled_from("abc")), min_size=1, max_size=30))
    def test_it_is_scikit_learns(self, ratings: list[tuple[str, str]]) -> None:
        first, second = zip(*ratings, strict=True)
        found = cohens_kappa(first, second)
        if set(first) == set(second) and len(set(first)) == 1:
            assert math.isnan(found)
        else:
            assert found == pytest.approx(cohen_kappa_score(first, second), abs=1e-12)
        assert found == cohens_kappa(second, first) or math.isnan(found)

    def test_by_hand(self) -> None:
        # both yes 20, both no 15, one alone 5 and 10 of 50: (0.7 - 0.5) / (1 - 0.5)
        first = ["yes"] * 25 + ["no"] * 25
        second = ["yes"] * 20 + ["no"] * 5 + ["yes"] * 10 + ["no"] * 15
        assert cohens_kappa(first, second) == pytest.approx(0.4)
        assert cohens_kappa(first, first) == 1
        assert cohens_kappa([1, -1], [-1, 1]) == -1

    @pytest.mark.parametrize("ratings", [[], [0, 0, 0]])
    def test_where_chance_always_agrees_it_is_not_defined(self, ratings: list[Any]) -> None:
        assert math.isnan(cohens_kappa(ratings, ratings))

    def test_ratings_of_different_items_are_refused(self) -> None:
        with pytest.raises(ValueError, match="1 and 2 ratings"):
            cohens_kappa([1], [1, 2])

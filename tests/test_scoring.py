"""Scores of logits, tokens and text, against torch, scipy, brute force and cases."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from scipy.special import rel_entr, softmax
from scipy.stats import binomtest
from torch.nn import functional

from jobs.scoring.logits import kl_divergence, log_odds, log_probabilities, negative_log_likelihood
from jobs.scoring.statistics import chance_probability, wilson_interval
from jobs.scoring.text import parse_judgement, repeated_ngrams

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

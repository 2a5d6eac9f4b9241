"""Directions from contrast pairs, against numpy, scikit-learn and synthetic data; the extraction job."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from sklearn.decomposition import PCA
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from torch import Tensor

from jobs import extract
from jobs.data.claims import load_questions
from jobs.directions.contrast import (
    Rows,
    component_mixture,
    keep_pairs,
    majority_sign,
    mean_difference,
    principal_axes,
    principal_component,
    principal_components,
    separability,
)
from jobs.directions.probes import lda_direction, logistic_direction
from jobs.directions.projection import project_out, project_out_tokens, random_like
from jobs.engine.capture import capture_last
from jobs.engine.replica import Replica
from tests.models import HIDDEN, LAYERS, Artifacts, tiny_model, tiny_replica, tiny_tokenizer

PAIRS, WIDTH = 20, 12


def activations(seed: int, *, pairs: int = PAIRS) -> Tensor:
    return torch.tensor(np.random.default_rng(seed).normal(size=(pairs, WIDTH)))


def contrast(known_D: np.ndarray, *, strength: float, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Pairs whose sides differ by 2 x strength along a known direction, under common and private noise."""
    random = np.random.default_rng(seed)
    common = random.normal(size=(PAIRS, WIDTH))
    sides = [
        common + sign * strength * known_D + 0.05 * random.normal(size=(PAIRS, WIDTH)) for sign in (1, -1)
    ]
    return torch.tensor(sides[0]), torch.tensor(sides[1])


def unit(seed: int) -> np.ndarray:
    vector = np.random.default_rng(seed).normal(size=WIDTH)
    return vector / np.linalg.norm(vector)


def cosine(first: Tensor | np.ndarray, second: Tensor | np.ndarray) -> float:
    first, second = np.asarray(first), np.asarray(second)
    return float(first @ second / np.linalg.norm(first) / np.linalg.norm(second))


def spread_contrast(seed: int = 0) -> tuple[Tensor, Tensor]:
    """An odd number of pairs, so that no vote is tied; every hidden unit has its own spread."""
    random = np.random.default_rng(seed)
    spreads = np.linspace(1, 4, WIDTH)
    sides = [random.normal(size=(PAIRS + 1, WIDTH)) * spreads + sign * unit(seed) for sign in (1, -1)]
    return torch.tensor(sides[0]), torch.tensor(sides[1])


Method = Callable[[Tensor, Tensor], Tensor]
PCA_METHODS: dict[str, Method] = {
    of: lambda positive, negative, of=of: principal_component(positive, negative, 0, of=of)  # type: ignore[misc]
    for of in get_args(Rows)
}
METHODS: dict[str, Method] = {
    "mean_difference": mean_difference,
    **PCA_METHODS,
    "mixture": lambda positive, negative: component_mixture(positive, negative, [2, 1]),
    "logistic": logistic_direction,
    "lda": lda_direction,
    "lda_shrunk": lambda positive, negative: lda_direction(positive, negative, shrinkage=0.2),
}


class TestEveryMethod:
    @pytest.mark.parametrize("method", METHODS)
    def test_the_order_of_the_pairs_does_not_matter(self, method: str) -> None:
        positive, negative = spread_contrast()
        order = torch.tensor(np.random.default_rng(1).permutation(PAIRS + 1))
        expected = METHODS[method](positive, negative)
        np.testing.assert_allclose(METHODS[method](positive[order], negative[order]), expected, atol=1e-5)

    @pytest.mark.parametrize("method", METHODS)
    def test_swapped_sides_turn_the_direction_round(self, method: str) -> None:
        positive, negative = spread_contrast()
        expected = -METHODS[method](positive, negative)
        np.testing.assert_allclose(METHODS[method](negative, positive), expected, atol=1e-6)

    @pytest.mark.parametrize("method", sorted(METHODS.keys() - {"logistic", "lda"}))
    def test_a_rotated_space_rotates_the_direction(self, method: str) -> None:
        positive, negative = spread_contrast()
        rotation = torch.tensor(np.linalg.qr(np.random.default_rng(2).normal(size=(WIDTH, WIDTH)))[0])
        expected = METHODS[method](positive, negative) @ rotation
        np.testing.assert_allclose(
            METHODS[method](positive @ rotation, negative @ rotation), expected, atol=1e-9
        )

    @pytest.mark.parametrize("method", ["logistic", "lda"])
    def test_a_probes_scores_do_not_depend_on_units_nor_on_the_origin(self, method: str) -> None:
        positive, negative = spread_contrast()
        units = torch.tensor(10.0 ** np.linspace(-3, 5, WIDTH))
        origin = torch.tensor(np.random.default_rng(3).normal(size=WIDTH))
        found = METHODS[method](positive * units + origin, negative * units + origin)
        np.testing.assert_allclose(found * units, METHODS[method](positive, negative), atol=1e-5)

    @pytest.mark.parametrize("method", METHODS)
    def test_half_precision_gives_float32_close_to_that_of_float64(self, method: str) -> None:
        positive, negative = (side.bfloat16() for side in spread_contrast())
        found = METHODS[method](positive, negative)
        assert found.dtype == torch.float32
        expected = METHODS[method](positive.double(), negative.double())
        assert expected.dtype == torch.float64
        np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-5)

    @pytest.mark.parametrize("method", METHODS)
    def test_the_same_activations_give_the_same_bits(self, method: str) -> None:
        positive, negative = spread_contrast()
        assert torch.equal(METHODS[method](positive, negative), METHODS[method](positive, negative))


class TestMeanDifference:
    def test_it_is_the_difference_of_numpys_means_also_for_unequal_numbers(self) -> None:
        positive, negative = activations(0), activations(1, pairs=7)
        expected = positive.numpy().mean(axis=0) - negative.numpy().mean(axis=0)
        np.testing.assert_allclose(mean_difference(positive, negative), expected, rtol=1e-12)

    def test_half_precision_is_averaged_in_float32(self) -> None:
        positive = (activations(0, pairs=300) + 100).bfloat16()
        negative = (activations(1, pairs=300) + 100).bfloat16()
        expected = positive.double().numpy().mean(axis=0) - negative.double().numpy().mean(axis=0)
        found = mean_difference(positive, negative)
        assert found.dtype == torch.float32
        np.testing.assert_allclose(found, expected, atol=1e-4)

    def test_swapped_sides_give_the_opposite_direction(self) -> None:
        positive, negative = activations(0), activations(1)
        assert torch.equal(mean_difference(positive, negative), -mean_difference(negative, positive))

    def test_sides_that_cannot_be_compared_are_refused_with_their_sizes(self) -> None:
        with pytest.raises(ValueError, match="no activations on one side: 0 and 20"):
            mean_difference(activations(0)[:0], activations(1))
        with pytest.raises(ValueError, match="hidden sizes differ: 12 and 11"):
            mean_difference(activations(0), activations(1)[:, :11])


class TestPrincipalComponent:
    @pytest.mark.parametrize("component", [0, 1, 5])
    def test_it_is_scikit_learns_component_up_to_sign(self, component: int) -> None:
        positive, negative = activations(0), activations(1)
        found = principal_component(positive, negative, component).numpy()
        expected = PCA().fit(torch.cat([positive, negative]).numpy()).components_[component]
        np.testing.assert_allclose(found * np.sign(found @ expected), expected, atol=1e-10)

    @pytest.mark.parametrize("seed", range(5))
    def test_both_methods_find_the_direction_that_the_pairs_were_made_from(self, seed: int) -> None:
        known = unit(seed)
        positive, negative = contrast(known, strength=10, seed=seed)
        difference = mean_difference(positive, negative).numpy()
        assert difference / np.linalg.norm(difference) @ known > 0.99
        assert principal_component(positive, negative, 0).numpy() @ known > 0.99
        assert principal_component(negative, positive, 0).numpy() @ known < -0.99

    def test_the_sign_follows_the_number_of_pairs_not_their_size(self) -> None:
        known = unit(0)
        positive, negative = contrast(known, strength=1)
        positive[:5], negative[:5] = (
            positive[:5] - 100 * torch.tensor(known),
            negative[:5] + 100 * torch.tensor(known),
        )
        assert mean_difference(positive, negative).numpy() @ known < 0
        assert principal_component(positive, negative, 0).numpy() @ known > 0.9

    def test_differences_are_those_of_both_orders_of_every_pair(self) -> None:
        positive, negative = activations(0), activations(1)
        both_orders = torch.cat([positive - negative, negative - positive]).numpy()
        expected = PCA().fit(both_orders)
        found, variances = principal_components(positive, negative, of="differences")
        cosines = [cosine(*pair) for pair in zip(found, expected.components_, strict=True)]
        np.testing.assert_allclose(np.abs(cosines), 1, atol=1e-10)
        shares = expected.explained_variance_ratio_
        np.testing.assert_allclose(variances / variances.sum(), shares, rtol=1e-9)

    @given(arrays.arrays(np.bool_, PAIRS + 1))
    def test_the_axis_of_differences_does_not_depend_on_which_side_comes_first(
        self, swap: np.ndarray
    ) -> None:
        positive, negative = spread_contrast()
        swapped = torch.tensor(swap)[:, None]
        sides = torch.where(swapped, negative, positive), torch.where(swapped, positive, negative)
        expected = principal_component(positive, negative, 0, of="differences")
        assert abs(cosine(principal_component(*sides, 0, of="differences"), expected)) > 1 - 1e-9

    def test_centred_differences_are_scikit_learns_and_lose_what_all_pairs_share(self) -> None:
        known = unit(3)
        positive, negative = contrast(known, strength=10)
        assert cosine(principal_component(positive, negative, 0, of="differences"), known) > 0.999
        found = principal_components(positive, negative, of="centred_differences")
        expected = PCA().fit((positive - negative).numpy())
        assert abs(cosine(found.directions_KD[0], expected.components_[0])) > 1 - 1e-9
        np.testing.assert_allclose(found.variances_K, expected.explained_variance_, rtol=1e-9)
        assert abs(cosine(found.directions_KD[0], known)) < 0.9

    def test_a_component_along_which_nothing_varies_is_refused(self) -> None:
        same = torch.full((4, WIDTH), 1e4 / 3)
        with pytest.raises(ValueError, match="component=0; these activations do not vary"):
            principal_component(same, same, 0)
        random = np.random.default_rng(0)
        plane = torch.zeros(14, WIDTH)
        plane[:, :2] = torch.tensor(random.normal(size=(14, 2)))
        offset = torch.tensor(random.normal(size=WIDTH) * 100, dtype=torch.float32)
        assert len(principal_axes(plane + offset, centred=True).directions_KD) == 2
        with pytest.raises(ValueError, match="component=2; these activations have 0 to 1"):
            principal_component(plane[:7] + offset, plane[7:] + offset, 2)

    def test_a_tied_vote_leaves_the_axis_positive_where_it_is_largest(self) -> None:
        positive = torch.tensor([[0.0, -3], [0, 3]])
        for order in ([0, 1], [1, 0]):
            found = principal_component(positive[order], -positive[order], 0)
            np.testing.assert_allclose(found, [0, 1], atol=1e-7)

    def test_numbers_that_are_not_finite_are_refused(self) -> None:
        broken = activations(0)
        broken[3, 4] = torch.inf
        with pytest.raises(ValueError, match="1 numbers of the activations are not finite"):
            principal_component(broken, activations(1), 0)

    def test_pairs_or_components_that_do_not_exist_are_refused_with_what_there_is(self) -> None:
        with pytest.raises(ValueError, match="pairs of unequal number: 20 and 7"):
            principal_component(activations(0), activations(1, pairs=7), 0)
        with pytest.raises(ValueError, match="component=3; these activations have 0 to 2"):
            principal_component(activations(0, pairs=2), activations(1, pairs=2), 3)
        with pytest.raises(ValueError, match="component=12; these activations have 0 to 11"):
            principal_component(activations(0), activations(1), 12)


class TestComponentMixture:
    @pytest.mark.parametrize("of", get_args(Rows))
    def test_it_is_the_weighted_sum_of_signed_components(self, of: Rows) -> None:
        positive, negative = spread_contrast()
        first, second = (principal_component(positive, negative, index, of=of) for index in (0, 1))
        variances = principal_components(positive, negative, of=of).variances_K

        def mixture(*weights: float, by_variance: bool = False) -> Tensor:
            return component_mixture(positive, negative, weights, of=of, by_variance=by_variance)

        np.testing.assert_allclose(mixture(0, 1), second, atol=1e-12)
        np.testing.assert_allclose(mixture(3, -4), (3 * first - 4 * second) / 5, atol=1e-12)
        expected = variances[0] * first + variances[1] * second
        np.testing.assert_allclose(mixture(1, 1, by_variance=True), expected / expected.norm(), atol=1e-12)

    def test_weights_without_a_direction_are_refused(self) -> None:
        for wrong in ([0.0, 0.0], [1.0, float("nan")], [float("inf")], []):
            with pytest.raises(ValueError, match="at least one must differ from 0 and all must be finite"):
                component_mixture(activations(0), activations(1), wrong)
        with pytest.raises(ValueError, match="weights for 4 components; these activations have 0 to 2"):
            component_mixture(activations(0, pairs=2), activations(1, pairs=2), [1, 1, 1, 1])


class TestKeepPairs:
    @given(arrays.arrays(np.bool_, PAIRS).filter(np.any))
    def test_it_keeps_both_sides_of_the_same_pairs(self, mask: np.ndarray) -> None:
        layers = 2
        number = torch.arange(PAIRS * layers * WIDTH).reshape(PAIRS, layers, WIDTH)
        positive, negative = keep_pairs(number, -number, torch.tensor(mask))
        assert torch.equal(positive, -negative)
        np.testing.assert_array_equal(positive, number.numpy()[mask])

    def test_a_mask_that_fits_no_pairs_is_refused(self) -> None:
        sides = activations(0), activations(1)
        for wrong in (torch.ones(PAIRS), torch.ones(PAIRS - 1, dtype=torch.bool)):
            with pytest.raises(ValueError, match="it takes one bool a pair"):
                keep_pairs(*sides, wrong)
        with pytest.raises(ValueError, match="it takes one bool a pair"):
            keep_pairs(sides[0], sides[1][:5], torch.ones(PAIRS, dtype=torch.bool))
        with pytest.raises(ValueError, match="keeps none of 20 pairs"):
            keep_pairs(*sides, torch.zeros(PAIRS, dtype=torch.bool))


class TestLogisticDirection:
    @pytest.mark.parametrize("inverse_penalty", [0.1, 1.0, 30.0])
    def test_it_is_the_optimum_that_newtons_method_finds_in_standardised_units(
        self, inverse_penalty: float
    ) -> None:
        positive, negative = spread_contrast()[0], spread_contrast()[1][:13]
        everything = np.concatenate([positive, negative])
        standardised = (everything - everything.mean(axis=0)) / everything.std(axis=0)
        labels = np.arange(len(everything)) < len(positive)
        expected = _newton(standardised, labels, inverse_penalty) / everything.std(axis=0)
        found = logistic_direction(positive, negative, inverse_penalty=inverse_penalty)
        np.testing.assert_allclose(found, expected, atol=1e-5 * np.abs(expected).max())

    @pytest.mark.parametrize("seed", range(3))
    def test_it_points_to_the_positive_side_and_finds_what_tells_the_sides_apart(self, seed: int) -> None:
        known = unit(seed)
        positive, negative = contrast(known, strength=1, seed=seed)
        found = logistic_direction(positive, negative)
        assert found @ mean_difference(positive, negative) > 0
        assert ((positive - negative) @ found > 0).all()

    def test_a_constant_hidden_unit_has_no_weight(self) -> None:
        positive, negative = spread_contrast()
        positive[:, 3], negative[:, 3] = 7, 7
        found = logistic_direction(positive, negative)
        assert found[3] == 0
        assert found.isfinite().all()

    def test_sides_that_are_the_same_are_refused(self) -> None:
        with pytest.raises(ValueError, match="nothing tells the two sides apart"):
            logistic_direction(torch.ones(4, WIDTH), torch.ones(4, WIDTH))
        with pytest.raises(ValueError, match="no activations on one side: 20 and 0"):
            logistic_direction(activations(0), activations(1)[:0])


class TestLdaDirection:
    def test_it_is_the_pooled_covariance_inverse_times_the_mean_difference(self) -> None:
        positive, negative = activations(0, pairs=50).numpy() + 1, activations(1, pairs=30).numpy()
        deviations = np.concatenate([side - side.mean(axis=0) for side in (positive, negative)])
        gap = positive.mean(axis=0) - negative.mean(axis=0)
        expected = np.linalg.inv(deviations.T @ deviations / 80) @ gap
        found = lda_direction(torch.tensor(positive), torch.tensor(negative), shrinkage=0)
        np.testing.assert_allclose(found, expected, rtol=1e-9)

    @pytest.mark.parametrize("pairs", [4, 5, 40])
    @pytest.mark.parametrize("shrinkage", [None, 0.0, 0.3, 1.0])
    def test_it_is_scikit_learns_also_with_more_hidden_units_than_prompts(
        self, pairs: int, shrinkage: float | None
    ) -> None:
        positive, negative = activations(0, pairs=pairs) + 1, activations(1, pairs=pairs + 3)
        model = LinearDiscriminantAnalysis(
            solver="lsqr", shrinkage="auto" if shrinkage is None else shrinkage
        )
        is_positive = np.arange(2 * pairs + 3) < pairs
        expected = model.fit(torch.cat([positive, negative]), is_positive).coef_[0]
        found = lda_direction(positive, negative, shrinkage=shrinkage)
        np.testing.assert_allclose(found, expected, atol=1e-8 * np.abs(expected).max())

    def test_it_looks_past_noise_that_bends_the_mean_difference(self) -> None:
        random = np.random.default_rng(0)
        mixing = np.diag([20.0, 0.5]) @ np.linalg.qr(random.normal(size=(2, 2)))[0]
        gap = np.array([1.0, 1.0])
        sides = [random.normal(size=(4000, 2)) @ mixing + sign * gap / 2 for sign in (1, -1)]
        expected = np.linalg.inv(mixing.T @ mixing) @ gap
        found = lda_direction(*map(torch.tensor, sides))
        assert cosine(found, expected) > 0.999
        assert cosine(gap, expected) < 0.9

    def test_hidden_units_of_very_different_size_do_not_spoil_it(self) -> None:
        positive, negative = spread_contrast()
        units = torch.tensor(10.0 ** np.linspace(-6, 6, WIDTH))
        found = lda_direction(positive * units, negative * units, shrinkage=0)
        np.testing.assert_allclose(found * units, lda_direction(positive, negative, shrinkage=0), rtol=1e-7)

    def test_what_cannot_be_fitted_is_refused(self) -> None:
        with pytest.raises(ValueError, match="1 and 20 prompts; a covariance needs two of each side"):
            lda_direction(activations(0)[:1], activations(1))
        with pytest.raises(ValueError, match=r"shrinkage=1.5; it is a share, 0 to 1"):
            lda_direction(activations(0), activations(1), shrinkage=1.5)
        with pytest.raises(ValueError, match=r"nothing tells the two sides apart.* norm 0\.0"):
            lda_direction(activations(0), activations(0))


class TestProjectOut:
    @given(st.integers(0, 2**32 - 1), st.integers(0, 5), st.integers(0, 3))
    def test_what_is_left_is_the_residual_of_least_squares(self, seed: int, others: int, copies: int) -> None:
        random = np.random.default_rng(seed)
        direction, rows = random.normal(size=WIDTH), random.normal(size=(others, WIDTH))
        rows = np.concatenate([rows, random.normal(size=(copies, others)) @ rows, np.zeros((1, WIDTH))])
        found = project_out(torch.tensor(direction), torch.tensor(rows)).numpy()
        weights = np.linalg.lstsq(rows.T, direction, rcond=1e-9)[0]
        np.testing.assert_allclose(found, direction - rows.T @ weights, atol=1e-8)
        np.testing.assert_allclose(rows @ found, 0, atol=1e-10 * max(1, np.abs(rows).max()))
        again = project_out(torch.tensor(found), torch.tensor(rows))
        np.testing.assert_allclose(again, found, atol=1e-12)

    def test_rows_that_follow_from_others_in_float32_take_nothing_more_away(self) -> None:
        random = np.random.default_rng(0)
        direction = torch.tensor(random.normal(size=500), dtype=torch.float32)
        rows = torch.tensor(random.normal(size=(3, 500)), dtype=torch.float32)
        dependent = torch.cat([rows, rows[:1] * 1e-6, rows[1:2] / 3, (rows[0] + rows[1])[None]])
        expected = project_out(direction, rows)
        np.testing.assert_allclose(project_out(direction, dependent), expected, atol=1e-5)
        assert expected.norm() > 0.98 * direction.norm()

    @pytest.mark.parametrize("length", [1e-30, 1e30])
    def test_the_length_of_an_other_does_not_matter(self, length: float) -> None:
        rows = torch.tensor(np.random.default_rng(0).normal(size=(3, WIDTH)))
        direction = torch.tensor(unit(1))
        lengths = torch.tensor([[1.0], [length], [1.0]])
        np.testing.assert_allclose(project_out(direction, rows * lengths), project_out(direction, rows))

    def test_a_direction_almost_in_the_span_of_the_others_still_comes_out_at_right_angles(self) -> None:
        random = np.random.default_rng(0)
        rows = torch.tensor(random.normal(size=(3, WIDTH)))
        found = project_out(1e10 * rows.sum(dim=0) + torch.tensor(unit(5)), rows)
        assert max(abs(cosine(row, found)) for row in rows) < 1e-12

    def test_hand_made_directions_lose_the_plane_that_others_span(self) -> None:
        direction = torch.tensor([3.0, 4.0, 5.0], dtype=torch.bfloat16)
        found = project_out(direction, torch.tensor([[1.0, 1.0, 0.0], [0.0, -2.0, 0.0]]))
        assert found.dtype == torch.float32
        np.testing.assert_allclose(found, [0, 0, 5], atol=1e-6)

    def test_a_direction_in_the_span_of_the_others_is_refused(self) -> None:
        rows = torch.tensor(np.random.default_rng(0).normal(size=(4, WIDTH)), dtype=torch.float32)
        with pytest.raises(ValueError, match="nothing is left of the direction: the 4 others span it"):
            project_out(2 * rows[0] - rows[3], rows)
        with pytest.raises(ValueError, match="nothing is left"):
            project_out(torch.zeros(WIDTH), rows)

    def test_shapes_and_numbers_that_make_no_sense_are_refused(self) -> None:
        with pytest.raises(ValueError, match=r"a direction \(12,\) and others \(2, 11\)"):
            project_out(torch.ones(12), torch.ones(2, 11))
        with pytest.raises(ValueError, match="not finite"):
            project_out(torch.ones(2), torch.tensor([[1.0, torch.nan]]))

    def test_without_its_label_tokens_a_direction_moves_none_of_their_logits(self) -> None:
        random = np.random.default_rng(0)
        unembedding, gain = (
            torch.tensor(random.normal(size=(30, WIDTH))),
            torch.tensor(random.normal(size=WIDTH)),
        )
        found = project_out_tokens(torch.tensor(unit(0)), unembedding, [4, 17], gain_D=gain)
        logits = unembedding @ (gain * found / found.square().mean().sqrt())
        np.testing.assert_allclose(logits[[4, 17]], 0, atol=1e-12)
        assert logits.abs().median() > 0.1
        raw = project_out_tokens(torch.tensor(unit(0)), unembedding, [4, 17])
        np.testing.assert_allclose(unembedding[[4, 17]] @ raw, 0, atol=1e-12)

    def test_tokens_that_do_not_exist_are_refused(self) -> None:
        with pytest.raises(ValueError, match=r"tokens \[-1, 30\] do not exist; the vocabulary has 0 to 29"):
            project_out_tokens(torch.ones(WIDTH), torch.ones(30, WIDTH), [-1, 3, 30])


class TestRandomLike:
    def test_it_keeps_every_norm_and_depends_on_the_seed_alone(self) -> None:
        directions = torch.tensor(np.random.default_rng(0).normal(size=(3, WIDTH))) * torch.tensor(
            [[1.0], [9], [0]]
        )
        found = random_like(directions, seed=5)
        np.testing.assert_allclose(found.norm(dim=1), directions.norm(dim=1), rtol=1e-12)
        np.testing.assert_allclose(random_like(2 * directions, seed=5), 2 * found, rtol=1e-12)
        assert abs(cosine(found[0], random_like(directions, seed=6)[0])) < 0.9
        assert random_like(directions.bfloat16(), seed=5).dtype == torch.float32

    def test_no_way_to_point_is_preferred(self) -> None:
        drawn = random_like(torch.ones(20_000, 3, dtype=torch.float64), seed=0).numpy()
        np.testing.assert_allclose(drawn.mean(axis=0), 0, atol=0.03)
        np.testing.assert_allclose(drawn.T @ drawn / len(drawn), np.eye(3), atol=0.03)


class TestMajoritySign:
    @given(arrays.arrays(np.int64, st.integers(1, 9), elements=st.integers(-3, 3)))
    def test_it_is_negative_only_if_more_pairs_vote_against_than_for(self, gap_N: np.ndarray) -> None:
        positive = torch.tensor(gap_N, dtype=torch.float64).unsqueeze(1)
        found = majority_sign(positive, torch.zeros_like(positive), torch.ones(1, dtype=torch.float64))
        assert found == (-1.0 if (gap_N < 0).sum() > (gap_N > 0).sum() else 1.0)


class TestSeparability:
    @given(arrays.arrays(np.int64, st.tuples(st.integers(1, 9), st.just(2)), elements=st.integers(-3, 3)))
    def test_it_counts_pairs_in_the_right_order_and_ties_half(self, sides_N2: np.ndarray) -> None:
        positive, negative = torch.tensor(sides_N2, dtype=torch.float64).T.unsqueeze(-1)
        direction = torch.ones(1, dtype=torch.float64)
        votes = [1.0 if high > low else 0.5 if high == low else 0.0 for high, low in sides_N2]
        assert separability(positive, negative, direction) == pytest.approx(sum(votes) / len(votes))
        swapped = separability(negative, positive, direction)
        assert separability(positive, negative, direction) + swapped == pytest.approx(1)

    def test_a_clear_contrast_is_separated_along_its_direction_only(self) -> None:
        known = unit(1)
        positive, negative = contrast(known, strength=1)
        assert separability(positive, negative, torch.tensor(known)) == 1
        assert separability(positive, negative, -torch.tensor(known)) == 0
        assert separability(positive, positive, torch.tensor(known)) == 0.5


def _of_differences(component: int) -> Callable[..., torch.Tensor]:
    return lambda positive, negative: principal_component(positive, negative, component, of="differences")


def _mixture(positive: torch.Tensor, negative: torch.Tensor) -> torch.Tensor:
    return component_mixture(positive, negative, (0.25, -2.0))


def _without_words(positive: torch.Tensor, negative: torch.Tensor) -> torch.Tensor:
    replica = tiny_replica("llama")
    tokens = [replica.encode_continuation(word)[0] for word in (" warm", " cold")]
    unembedding = replica.model.get_output_embeddings().weight
    return project_out_tokens(mean_difference(positive, negative), unembedding, tokens)


class TestExtraction:
    @pytest.fixture
    def pairs(self, tmp_path: Path) -> str:
        path = tmp_path / "pairs.jsonl"
        texts = [(f"Good day {number}!", f"Never again, {number * 111}.") for number in range(6)]
        rows = [json.dumps({"positive": positive, "negative": negative}) for positive, negative in texts]
        path.write_text("\n".join(rows))
        return str(path)

    @pytest.mark.parametrize("method", ["mean_difference", "pca"])
    @pytest.mark.parametrize("offset", [1, 3])
    def test_directions_and_norms_are_those_of_the_hidden_states_of_each_text_alone(
        self, pairs: str, method: str, offset: int
    ) -> None:
        params = extract.Params(pairs=pairs, method=method, offset=offset)  # type: ignore[arg-type]
        [outcome] = Artifacts(tiny_replica("llama")).run("jobs.extract", [params])
        rows = [json.loads(line) for line in Path(pairs).read_text().splitlines()]
        tokenizer = tiny_tokenizer()
        positive, negative = (
            np.stack([_hidden_states(tokenizer(row[side]).input_ids)[:, -offset] for row in rows])
            for side in ("positive", "negative")
        )
        gap_NLD = positive - negative
        for layer in range(LAYERS):
            if method == "pca":
                both = np.concatenate([positive[:, layer], negative[:, layer]])
                expected = PCA(1).fit(both).components_[0]
                expected *= 1 if (gap_NLD[:, layer] @ expected > 0).sum() >= len(rows) / 2 else -1
            else:
                expected = gap_NLD[:, layer].mean(axis=0)
            expected = expected / np.linalg.norm(expected)
            np.testing.assert_allclose(outcome.tensors["directions"][layer], expected, atol=1e-5)
            share = (gap_NLD[:, layer] @ expected > 0).mean()
            assert outcome.tensors["separability"][layer] == pytest.approx(share)
        norms = np.linalg.norm(np.concatenate([positive, negative]), axis=-1).mean(axis=0)
        np.testing.assert_allclose(outcome.tensors["residual_norms"], norms, rtol=1e-5)
        assert outcome.metrics["extract"]["separability"] == pytest.approx(
            outcome.tensors["separability"].max()
        )

    @pytest.mark.parametrize(
        ("options", "expected"),
        [
            ({"method": "pca_differences", "component": 1}, _of_differences(1)),
            ({"method": "pca", "mixture": (0.25, -2.0)}, _mixture),
            ({"method": "logistic"}, logistic_direction),
            ({"method": "lda"}, lda_direction),
            ({"method": "mean_difference", "without_words": (" warm", " cold")}, _without_words),
        ],
    )
    def test_other_methods_are_those_of_the_directions_folder(
        self, pairs: str, options: dict[str, Any], expected: Callable[..., torch.Tensor]
    ) -> None:
        replica = tiny_replica("llama")
        [outcome] = Artifacts(replica).run("jobs.extract", [extract.Params(pairs=pairs, **options)])
        rows = [json.loads(line) for line in Path(pairs).read_text().splitlines()]
        sides = [
            capture_last(replica, [replica.encode(row[side]) for row in rows])
            for side in ("positive", "negative")
        ]
        for layer in range(LAYERS):
            direction = expected(*(side[:, layer] for side in sides))
            found = outcome.tensors["directions"][layer]
            np.testing.assert_allclose(found, (direction / direction.norm()).numpy(), atol=1e-5)

    def test_a_random_direction_follows_the_seed_and_differs_by_layer(self, pairs: str) -> None:
        params = extract.Params(pairs=pairs, method="random")
        one, same, other = (
            Artifacts(tiny_replica("llama"), seed=seed).run("jobs.extract", [params])[0].tensors["directions"]
            for seed in (1, 1, 50)
        )
        np.testing.assert_array_equal(one, same)
        assert abs(np.sum(one * other, axis=-1)).max() < 0.9
        assert abs(np.corrcoef(one)[np.triu_indices(LAYERS, 1)]).max() < 0.9

    def test_it_keeps_how_well_unseen_pairs_are_told_apart_and_where_they_project(self, pairs: str) -> None:
        [outcome] = Artifacts(tiny_replica("llama")).run("jobs.extract", [extract.Params(pairs=pairs)])
        auc, accuracy = (outcome.tensors[f"held_out_{name}"] for name in ("auc", "accuracy"))
        assert auc.shape == accuracy.shape == (LAYERS,)
        assert ((auc >= 0) & (auc <= 1) & (accuracy >= 0) & (accuracy <= 1)).all()
        assert outcome.metrics["extract"]["held_out_auc"] == pytest.approx(auc.max())
        projections = outcome.tensors["projections"]
        higher = (projections[..., 0] > projections[..., 1]).mean(axis=1)
        np.testing.assert_allclose(higher, outcome.tensors["separability"])

    def test_a_layer_without_a_direction_fails_by_name(self, pairs: str) -> None:
        params = extract.Params(pairs=pairs, method="pca", component=40)
        [outcome] = Artifacts(tiny_replica("llama")).run("jobs.extract", [params])
        assert outcome.status == "failed"
        assert "layer 0: component=40" in str(outcome.reason)

    def test_a_count_takes_the_first_pairs(self, pairs: str, tmp_path: Path) -> None:
        few = tmp_path / "few.jsonl"
        few.write_text("\n".join(Path(pairs).read_text().splitlines()[:4]))
        artifacts = Artifacts(tiny_replica("llama"))
        counted, alone = artifacts.run(
            "jobs.extract", [extract.Params(pairs=pairs, count=4), extract.Params(pairs=str(few))]
        )
        np.testing.assert_array_equal(counted.tensors["directions"], alone.tensors["directions"])

    def test_claims_contrast_an_honest_persona_and_letter_with_dishonest_ones(self) -> None:
        seen: list[str] = []
        replica = _Listening(seen)
        params = extract.Params(source="claims", pairs="claims", count=6)
        Artifacts(replica).run("jobs.extract", [params])
        questions = load_questions("claims", extract=6, select=0, report=0)
        honest = [text for text in seen if "always honest" in text]
        dishonest = [text for text in seen if "dishonest when" in text]
        assert len(honest) == len(dishonest) == len(questions)
        for question, truthful, lying in zip(questions, honest, dishonest, strict=True):
            assert question.user in truthful
            assert question.user in lying
            assert truthful.endswith(f"<|assistant|>{question.honest_letter}")
            assert lying.endswith(f"<|assistant|>{'B' if question.honest_letter == 'A' else 'A'}")

    def test_claims_without_a_count_and_tokens_before_the_text_are_refused(self, pairs: str) -> None:
        with pytest.raises(ValueError, match="say how many claims"):
            extract.Params(source="claims")
        with pytest.raises(ValueError, match="offset=0"):
            extract.Params(offset=0)
        with pytest.raises(ValueError, match="component=-1"):
            extract.Params(component=-1)


class _Listening(Replica):
    """Keeps the text of every prompt that is made."""

    def __init__(self, seen: list[str]) -> None:
        super().__init__(tiny_model("llama"), tiny_tokenizer())
        self._seen = seen

    def encode_chat(self, user: str, *, system: str | None = None, answer: str = "") -> list[int]:
        ids = super().encode_chat(user, system=system, answer=answer)
        self._seen.append(self.tokenizer.decode(ids))
        return ids


def _newton(rows_MD: np.ndarray, labels_M: np.ndarray, inverse_penalty: float) -> np.ndarray:
    """Weights that minimise C x log loss + |w|^2 / 2, with a free intercept."""
    design = np.column_stack([rows_MD, np.ones(len(rows_MD))])
    penalty = np.diag([1.0] * rows_MD.shape[1] + [0.0])
    weights = np.zeros(design.shape[1])
    for _ in range(50):
        chances = 1 / (1 + np.exp(-design @ weights))
        slope = inverse_penalty * design.T @ (chances - labels_M) + penalty @ weights
        curvature = inverse_penalty * (design.T * (chances * (1 - chances))) @ design + penalty
        weights = weights - np.linalg.solve(curvature, slope)
    return weights[:-1]


def _hidden_states(ids: list[int]) -> np.ndarray:
    """Block outputs of one text alone, (layers, tokens, hidden); of a deeper model, as the last is normed."""
    deeper = tiny_model("llama", layers=LAYERS + 1)
    with torch.inference_mode():
        states = deeper(torch.tensor([ids]), output_hidden_states=True).hidden_states
    stacked = torch.stack(states[1 : LAYERS + 1])[:, 0]
    assert stacked.shape[-1] == HIDDEN
    return stacked.numpy()

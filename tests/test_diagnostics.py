"""Held-out separability and pictures of directions, against scikit-learn, numpy and hand-made geometry."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from sklearn.decomposition import PCA
from sklearn.metrics import roc_auc_score
from torch import Tensor

from jobs.directions.contrast import mean_difference, separability
from jobs.directions.diagnostics import (
    cosine_profile,
    logit_lens,
    pca_scatter,
    projection_histograms,
    projections_by_position,
)
from jobs.directions.held_out import area_under_curve, held_out_separability, pair_folds
from jobs.directions.probes import logistic_direction

PAIRS, LAYERS, WIDTH = 23, 3, 8

numbers = arrays.arrays(np.int64, st.integers(1, 12), elements=st.integers(-3, 3))


def layered(seed: int, *, pairs: int = PAIRS, shift: float = 0) -> Tensor:
    return torch.tensor(np.random.default_rng(seed).normal(size=(pairs, LAYERS, WIDTH))) + shift


class TestAreaUnderCurve:
    @given(numbers, numbers)
    def test_it_is_scikit_learns_also_with_ties(self, positive: np.ndarray, negative: np.ndarray) -> None:
        labels = np.arange(len(positive) + len(negative)) < len(positive)
        expected = roc_auc_score(labels, np.concatenate([positive, negative]))
        found = area_under_curve(*(torch.tensor(side, dtype=torch.float32) for side in (positive, negative)))
        assert found == pytest.approx(expected)


class TestPairFolds:
    @given(st.integers(2, 40), st.data())
    def test_every_pair_is_held_out_once_in_folds_of_equal_size(
        self, pairs: int, data: st.DataObject
    ) -> None:
        folds = data.draw(st.integers(2, pairs))
        parts = pair_folds(pairs, folds, seed=data.draw(st.integers(0, 99)))
        assert sorted(torch.cat(parts).tolist()) == list(range(pairs))
        sizes = [len(part) for part in parts]
        assert len(parts) == folds
        assert max(sizes) - min(sizes) <= 1

    def test_the_seed_decides_the_order(self) -> None:
        first, again, other = (torch.cat(pair_folds(30, 3, seed=seed)).tolist() for seed in (0, 0, 1))
        assert first == again != other

    def test_numbers_of_folds_that_cannot_be_are_refused(self) -> None:
        for folds in (1, 6):
            with pytest.raises(ValueError, match=f"folds={folds}; 5 pairs can be held out in 2 to 5"):
                pair_folds(5, folds, seed=0)


class TestHeldOutSeparability:
    def test_it_is_what_a_plain_loop_with_scikit_learn_measures(self) -> None:
        positive, negative = layered(0, shift=0.3), layered(1)
        parts = pair_folds(PAIRS, 4, seed=3)
        found = held_out_separability(positive, negative, mean_difference, parts)
        for layer in range(LAYERS):
            aucs, right, in_order = [], [], []
            for part in parts:
                rest = np.setdiff1d(np.arange(PAIRS), part)
                high, low = positive[rest, layer].numpy(), negative[rest, layer].numpy()
                direction = high.mean(axis=0) - low.mean(axis=0)
                threshold = ((high + low[: len(high)]) @ direction).mean() / 2
                high, low = (side[part, layer].numpy() @ direction for side in (positive, negative))
                aucs.append(roc_auc_score([1] * len(part) + [0] * len(part), [*high, *low]))
                right += [*(high > threshold), *(low < threshold)]
                in_order += list(high > low)
            assert found.auc_L[layer] == pytest.approx(np.mean(aucs))
            assert found.accuracy_L[layer] == pytest.approx(np.mean(right))
            assert found.in_order_L[layer] == pytest.approx(np.mean(in_order))

    def test_methods_see_both_sides_of_the_pairs_that_are_not_judged_and_no_others(self) -> None:
        positive = torch.arange(PAIRS).double()[:, None, None].expand(PAIRS, LAYERS, 2) + 1
        seen: list[set[int]] = []

        def method(high: Tensor, low: Tensor) -> Tensor:
            assert torch.equal(high, -low)
            seen.append({int(number) - 1 for number in high[:, 0]})
            return high[0]

        parts = [[0, 5], [22]]
        held_out_separability(positive, -positive, method, parts)
        assert seen == [set(range(PAIRS)) - set(part) for part in parts] * LAYERS

    def test_a_direction_that_fits_noise_is_found_out(self) -> None:
        random = np.random.default_rng(0)
        positive, negative = (torch.tensor(random.normal(size=(40, 1, 200))) for _ in range(2))
        fitted = logistic_direction(positive[:, 0], negative[:, 0])
        assert separability(positive[:, 0], negative[:, 0], fitted) == 1
        found = held_out_separability(positive, negative, logistic_direction, pair_folds(40, 4, seed=0))
        assert all(0.25 < score[0] < 0.75 for score in found)

    def test_the_layer_with_the_contrast_stands_out(self) -> None:
        positive, negative = layered(0), layered(1)
        positive[:, 1, 2] += 20
        found = held_out_separability(positive, negative, mean_difference, pair_folds(PAIRS, 5, seed=0))
        assert (found.auc_L[1], found.accuracy_L[1], found.in_order_L[1]) == (1, 1, 1)
        assert max(found.auc_L[0], found.auc_L[2]) < 0.8
        turned = held_out_separability(
            positive, negative, lambda *sides: -mean_difference(*sides), pair_folds(PAIRS, 5, seed=0)
        )
        assert (turned.auc_L[1], turned.accuracy_L[1], turned.in_order_L[1]) == (0, 0, 0)

    def test_pairs_in_order_on_the_wrong_side_of_the_threshold_are_half_right(self) -> None:
        positive = torch.tensor([2.0, 2.0, 12.0])[:, None, None]
        negative = torch.tensor([0.0, 0.0, 10.0])[:, None, None]
        found = held_out_separability(positive, negative, mean_difference, [[2]])
        assert (found.auc_L[0], found.accuracy_L[0], found.in_order_L[0]) == (1, 0.5, 1)

    def test_folds_of_unequal_size_weigh_as_many_pairs_as_they_have(self) -> None:
        positive = torch.tensor([2.0, 2.0, 2.0, -5.0])[:, None, None]
        found = held_out_separability(
            positive, torch.zeros_like(positive), lambda *_: torch.ones(1), [[0, 1, 2], [3]]
        )
        assert found.in_order_L[0] == 0.75
        assert found.auc_L[0] == 0.5

    def test_no_difference_is_chance(self) -> None:
        same = layered(0)
        found = held_out_separability(same, same, lambda *sides: sides[0][0], pair_folds(PAIRS, 3, seed=0))
        np.testing.assert_allclose(found.in_order_L, 0.5)
        np.testing.assert_allclose(found.auc_L, 0.5)
        np.testing.assert_allclose(found.accuracy_L, 0.5)

    def test_half_precision_is_judged_in_float32(self) -> None:
        positive, negative = layered(0, shift=0.3).bfloat16(), layered(1).bfloat16()
        parts = pair_folds(PAIRS, 3, seed=0)
        found = held_out_separability(positive, negative, mean_difference, parts)
        expected = held_out_separability(positive.double(), negative.double(), mean_difference, parts)
        np.testing.assert_array_equal(found.in_order_L, expected.in_order_L)

    @pytest.mark.parametrize(
        "held_out", [[[]], [[3, 3]], [[PAIRS]], [[-1]], [list(range(PAIRS))]], ids=lambda part: str(part)[:9]
    )
    def test_parts_that_cannot_be_held_out_are_refused(self, held_out: list[list[int]]) -> None:
        with pytest.raises(ValueError, match="to hold out; name some of 0 to 22, each once, not all of them"):
            held_out_separability(layered(0), layered(1), mean_difference, held_out)

    def test_sides_that_are_no_pairs_and_no_parts_at_all_are_refused(self) -> None:
        with pytest.raises(ValueError, match=r"not pairs: shapes \(23, 3, 8\) and \(22, 3, 8\)"):
            held_out_separability(layered(0), layered(1, pairs=22), mean_difference, [[0]])
        with pytest.raises(ValueError, match="nothing is held out"):
            held_out_separability(layered(0), layered(1), mean_difference, [])


class TestCosineProfile:
    def test_hand_made_angles_come_out(self) -> None:
        found = cosine_profile(torch.tensor([[2.0, 0], [5, 5], [0, 0.1], [-3, 0]]))
        half = np.sqrt(0.5)
        expected = [[1, half, 0, -1], [half, 1, half, -half], [0, half, 1, 0], [-1, -half, 0, 1]]
        np.testing.assert_allclose(found, expected, atol=1e-6)

    def test_rounding_takes_no_cosine_beyond_one(self) -> None:
        random = np.random.default_rng(0)
        found = cosine_profile(torch.tensor(random.normal(size=(60, 300)), dtype=torch.float32))
        assert np.abs(found).max() <= 1
        np.testing.assert_allclose(found.diagonal(), 1, atol=1e-6)

    def test_a_direction_without_a_norm_is_refused_with_its_layer(self) -> None:
        with pytest.raises(ValueError, match=r"directions at layers \[1, 2\] have norms \[0.0, inf\]"):
            cosine_profile(torch.tensor([[1.0, 0], [0, 0], [0, torch.inf]]))


class TestProjectionHistograms:
    def test_both_sides_are_counted_in_numpys_bins_of_the_whole(self) -> None:
        positive, negative = layered(0, shift=1), layered(1, pairs=31)
        directions = torch.tensor(np.random.default_rng(2).normal(size=(LAYERS, WIDTH)))
        found = projection_histograms(positive, negative, directions, bins=7)
        for layer in range(LAYERS):
            unit = directions[layer].numpy() / np.linalg.norm(directions[layer])
            sides = [side[:, layer].numpy() @ unit for side in (positive, negative)]
            counts, edges = np.histogram(np.concatenate(sides), bins=7)
            np.testing.assert_allclose(found.edges_LE[layer], edges)
            np.testing.assert_array_equal(found.positive_LB[layer] + found.negative_LB[layer], counts)
            np.testing.assert_array_equal(found.positive_LB[layer], np.histogram(sides[0], edges)[0])
        assert set(found.positive_LB.sum(axis=1)) == {PAIRS}
        assert set(found.negative_LB.sum(axis=1)) == {31}

    def test_the_length_of_a_direction_does_not_matter_and_float32_loses_no_one(self) -> None:
        positive, negative = layered(0).float() * 1e3, layered(1).float() * 1e3
        directions = torch.ones(LAYERS, WIDTH)
        found = projection_histograms(positive, negative, directions, bins=40)
        longer = projection_histograms(positive, negative, 8 * directions, bins=40)
        np.testing.assert_array_equal(found.positive_LB, longer.positive_LB)
        assert (found.edges_LE.dtype, found.positive_LB.dtype) == (np.float64, np.int64)
        assert found.positive_LB.sum() + found.negative_LB.sum() == 2 * LAYERS * PAIRS

    def test_a_projection_that_is_not_finite_is_refused(self) -> None:
        positive = layered(0)
        positive[0, 1, 0] = torch.nan
        with pytest.raises(ValueError, match="not finite"):
            projection_histograms(positive, layered(1), torch.ones(LAYERS, WIDTH))


class TestPcaScatter:
    def test_coordinates_are_scikit_learns_up_to_sign_and_point_to_the_positive_side(self) -> None:
        positive, negative = layered(0, shift=0.5)[:, 0], layered(1, pairs=11)[:, 0]
        found = pca_scatter(positive, negative)
        model = PCA(2)
        expected = model.fit_transform(torch.cat([positive, negative]).numpy())
        signs = np.sign((found.coordinates_M2 * expected).sum(axis=0))
        np.testing.assert_allclose(found.coordinates_M2 * signs, expected, atol=1e-10)
        np.testing.assert_allclose(found.variance_shares_2, model.explained_variance_ratio_)
        assert found.is_positive_M.tolist() == [True] * PAIRS + [False] * 11
        assert (found.coordinates_M2[found.is_positive_M].mean(axis=0) > 0).all()
        turned = pca_scatter(negative, positive)
        np.testing.assert_allclose(turned.coordinates_M2[11:], -found.coordinates_M2[:PAIRS], atol=1e-10)

    def test_activations_on_a_line_are_refused(self) -> None:
        line = torch.arange(5)[:, None] * torch.ones(WIDTH)
        with pytest.raises(ValueError, match="10 activations vary along 1 axes; a plane needs 2"):
            pca_scatter(line, -line)


class TestLogitLens:
    def test_a_direction_speaks_for_the_tokens_that_its_logits_name(self) -> None:
        unembedding = torch.tensor([[3.0, 0.25], [-2, 0.5], [1, 1], [0, 5], [-1, -5]])
        found = logit_lens(torch.tensor([[1.0, 0], [0, 2]]), unembedding, top=2)
        assert found.tokens_L2K.tolist() == [[[0, 2], [1, 4]], [[3, 2], [4, 0]]]
        assert found.logits_L2K.tolist() == [[[3, 1], [2, 1]], [[10, 2], [10, -0.5]]]

    def test_it_is_the_whole_product_also_for_a_large_vocabulary_in_half_precision(self) -> None:
        random = np.random.default_rng(0)
        unembedding = torch.tensor(random.normal(size=(20_001, WIDTH))).bfloat16()
        directions = torch.tensor(random.normal(size=(LAYERS, WIDTH)))
        found = logit_lens(directions, unembedding, top=20_001)
        expected = directions.numpy() @ unembedding.double().numpy().T
        np.testing.assert_array_equal(found.tokens_L2K[:, 0, :5], np.argsort(-expected)[:, :5])
        np.testing.assert_allclose(found.logits_L2K[:, 1], -np.sort(expected), atol=1e-12)

    def test_the_final_norm_comes_between_and_sees_both_signs(self) -> None:
        norm = torch.nn.LayerNorm(WIDTH, dtype=torch.float64).requires_grad_(False)
        torch.nn.init.normal_(norm.weight, generator=torch.Generator().manual_seed(0))
        torch.nn.init.normal_(norm.bias, generator=torch.Generator().manual_seed(1))
        random = np.random.default_rng(1)
        unembedding = torch.tensor(random.normal(size=(9, WIDTH)))
        direction = torch.tensor(random.normal(size=(1, WIDTH)))
        found = logit_lens(direction, unembedding, top=1, norm=norm)
        for side, sign in enumerate((1, -1)):
            logits = unembedding @ norm(sign * direction[0])
            assert found.tokens_L2K[0, side, 0] == logits.argmax()
            assert found.logits_L2K[0, side, 0] == pytest.approx(float(logits.max()))

    def test_more_tokens_than_there_are_and_broken_logits_are_refused(self) -> None:
        for top in (0, 6):
            with pytest.raises(ValueError, match=f"top={top}; the vocabulary has 5 tokens"):
                logit_lens(torch.ones(1, 2), torch.ones(5, 2), top=top)
        with pytest.raises(ValueError, match="4 logits of the directions are not finite"):
            logit_lens(torch.ones(2, 2), torch.tensor([[1.0, torch.inf], [1, 1]]), top=1)


class TestProjectionsByPosition:
    mask = torch.tensor([[True] * 5, [False, False, True, True, False]])

    def test_every_token_is_projected_on_its_layers_direction_and_padding_is_nan(self) -> None:
        random = np.random.default_rng(0)
        states = torch.tensor(random.normal(size=(2, LAYERS, 5, WIDTH)))
        directions = torch.tensor(random.normal(size=(LAYERS, WIDTH)))
        found = projections_by_position(states, directions, self.mask, prompt_columns=3)
        cosines = projections_by_position(states, directions, self.mask, prompt_columns=3, as_cosine=True)
        assert found.positions_T.tolist() == [-3, -2, -1, 0, 1]
        for prompt, layer, column in np.ndindex(2, LAYERS, 5):
            state, direction = states[prompt, layer, column].numpy(), directions[layer].numpy()
            expected = state @ direction / np.linalg.norm(direction) if self.mask[prompt, column] else np.nan
            np.testing.assert_allclose(found.values_NLT[prompt, layer, column], expected)
            expected /= np.linalg.norm(state)
            np.testing.assert_allclose(cosines.values_NLT[prompt, layer, column], expected)

    def test_padding_may_hold_anything_and_a_state_of_zeros_has_no_angle(self) -> None:
        states = torch.zeros(2, 1, 5, 2, dtype=torch.bfloat16)
        states[1, 0, 0] = torch.inf
        found = projections_by_position(
            states, torch.ones(1, 2), self.mask, prompt_columns=5, as_cosine=True
        ).values_NLT
        assert found.dtype == np.float32
        np.testing.assert_array_equal(np.isnan(found[:, 0]), ~self.mask.numpy())
        assert (found[:, 0][self.mask.numpy()] == 0).all()

    def test_shapes_that_do_not_fit_are_refused(self) -> None:
        states = torch.ones(2, 1, 5, 2)
        with pytest.raises(ValueError, match=r"states \(2, 1, 5, 2\) do not fit directions \(2, 2\)"):
            projections_by_position(states, torch.ones(2, 2), self.mask, prompt_columns=3)
        with pytest.raises(ValueError, match=r"do not fit .* mask \(1, 5\)"):
            projections_by_position(states, torch.ones(1, 2), self.mask[:1], prompt_columns=3)
        with pytest.raises(ValueError, match="prompt_columns=6; there are 5 columns"):
            projections_by_position(states, torch.ones(1, 2), self.mask, prompt_columns=6)

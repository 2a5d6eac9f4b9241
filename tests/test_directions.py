"""Directions from contrast pairs, against numpy, scikit-learn and synthetic data; the extraction job."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from sklearn.decomposition import PCA
from torch import Tensor

from jobs import extract
from jobs.data.claims import load_questions
from jobs.directions.contrast import majority_sign, mean_difference, principal_component, separability
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

    def test_pairs_or_components_that_do_not_exist_are_refused_with_what_there_is(self) -> None:
        with pytest.raises(ValueError, match="pairs of unequal number: 20 and 7"):
            principal_component(activations(0), activations(1, pairs=7), 0)
        with pytest.raises(ValueError, match="component=3; these activations have 0 to 2"):
            principal_component(activations(0, pairs=2), activations(1, pairs=2), 3)
        with pytest.raises(ValueError, match="component=12; these activations have 0 to 11"):
            principal_component(activations(0), activations(1), 12)


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


def _hidden_states(ids: list[int]) -> np.ndarray:
    """Block outputs of one text alone, (layers, tokens, hidden); of a deeper model, as the last is normed."""
    deeper = tiny_model("llama", layers=LAYERS + 1)
    with torch.inference_mode():
        states = deeper(torch.tensor([ids]), output_hidden_states=True).hidden_states
    stacked = torch.stack(states[1 : LAYERS + 1])[:, 0]
    assert stacked.shape[-1] == HIDDEN
    return stacked.numpy()

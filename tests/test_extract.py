"""What directions come from and are made of, and their stored diagnostics, against plain loops."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from jobs import extract, steer
from jobs.data.claims import load_questions
from jobs.directions.diagnostics import logit_lens
from jobs.directions.vector_files import write_gguf, write_safetensors
from jobs.engine.capture import capture
from jobs.engine.replica import Replica
from jobs.errors import ModelError, SpecError
from jobs.extraction import contrasts, diagnosis
from jobs.resolve import data_hash, make_params, make_spec
from jobs.spec import ModelRef, Outcome, Requirement
from jobs.steering import interventions
from tests.models import HIDDEN, LAYERS, Artifacts, tiny_model, tiny_replica, tiny_tokenizer

RNG = np.random.default_rng(5)
VECTORS = {layer: RNG.normal(size=HIDDEN).astype(np.float32) * 3 for layer in (1, 3)}
NORMS = {1: 2.5, 3: 7.0}


def write_pairs(path: Path, positive: str, negative: str, number: int = 6) -> str:
    rows = [{"positive": f"{positive} {n}!", "negative": f"{negative}, {n * 111}."} for n in range(number)]
    path.write_text("\n".join(map(json.dumps, rows)))
    return str(path)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("data")


@pytest.fixture(scope="module")
def pairs(folder: Path) -> str:
    return write_pairs(folder / "pairs.jsonl", "Good day", "Never again")


@pytest.fixture(scope="module")
def others(folder: Path) -> str:
    return write_pairs(folder / "others.jsonl", "Yours sincerely", "Cheers", 4)


@pytest.fixture(scope="module")
def vectors(folder: Path) -> str:
    path = folder / "vectors.safetensors"
    write_safetensors(path, VECTORS, model="m", method="by hand")
    return str(path)


@pytest.fixture(scope="module")
def replica() -> Replica:
    return tiny_replica("llama")


def extracted(replica: Replica, **values: Any) -> Outcome:
    [outcome] = Artifacts(replica).run("jobs.extract", [make_params("jobs.extract", values)])
    return outcome


def hidden_states(ids: list[int]) -> np.ndarray:
    """Block outputs of one text alone, (layers, tokens, hidden); of a deeper model, as the last is normed."""
    deeper = tiny_model("llama", layers=LAYERS + 1)
    with torch.inference_mode():
        states = deeper(torch.tensor([ids]), output_hidden_states=True).hidden_states
    array: np.ndarray = torch.stack(states[1 : LAYERS + 1])[:, 0].numpy()
    return array


def mean_difference(path: str) -> np.ndarray:
    """Of the last tokens' hidden states, (layers, hidden)."""
    rows = [json.loads(line) for line in Path(path).read_text().splitlines()]
    gaps = [
        hidden_states(tiny_tokenizer()(row["positive"]).input_ids)[:, -1]
        - hidden_states(tiny_tokenizer()(row["negative"]).input_ids)[:, -1]
        for row in rows
    ]
    array: np.ndarray = np.mean(gaps, axis=0)
    return array


def unit(vectors: np.ndarray) -> np.ndarray:
    array: np.ndarray = vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)
    return array


class TestFiles:
    def test_directions_are_the_files_at_norm_one_and_absent_elsewhere(
        self, replica: Replica, pairs: str, vectors: str
    ) -> None:
        found = extracted(replica, source="file", vectors=vectors, pairs=pairs).tensors
        for layer, vector in VECTORS.items():
            np.testing.assert_allclose(found["directions"][layer], unit(vector), atol=1e-6)
        assert np.isnan(found["directions"][[0, 2]]).all()
        assert np.isnan(found["separability"][[0, 2]]).all()
        assert np.isfinite(found["separability"][[1, 3]]).all()

    def test_they_are_judged_on_all_pairs_as_they_are(
        self, replica: Replica, pairs: str, vectors: str
    ) -> None:
        outcome = extracted(replica, source="file", vectors=vectors, pairs=pairs)
        rows = [json.loads(line) for line in Path(pairs).read_text().splitlines()]
        gap = [
            hidden_states(tiny_tokenizer()(row["positive"]).input_ids)[3, -1]
            - hidden_states(tiny_tokenizer()(row["negative"]).input_ids)[3, -1]
            for row in rows
        ]
        assert outcome.tensors["separability"][3] == pytest.approx((np.array(gap) @ VECTORS[3] > 0).mean())
        assert outcome.metrics["extract"]["pairs"] == len(rows)

    def test_residual_norms_are_the_files_own_or_else_measured(
        self, replica: Replica, pairs: str, vectors: str, tmp_path: Path
    ) -> None:
        own = tmp_path / "own.safetensors"
        write_safetensors(own, VECTORS, model="m", method="by hand", residual_norms=NORMS)
        stated = extracted(replica, source="file", vectors=str(own), pairs=pairs).tensors["residual_norms"]
        measured = extracted(replica, source="file", vectors=vectors, pairs=pairs).tensors["residual_norms"]
        np.testing.assert_allclose(stated[[1, 3]], [2.5, 7.0])
        expected = extracted(replica, pairs=pairs).tensors["residual_norms"]
        np.testing.assert_array_equal(measured, expected)

    def test_a_control_vector_steers_by_doses_like_any_direction(
        self, replica: Replica, pairs: str, tmp_path: Path
    ) -> None:
        path = tmp_path / "control.gguf"
        write_gguf(path, VECTORS, model_hint="llama", model="m", method="by hand", residual_norms=NORMS)
        extraction = extract.Params(source="file", vectors=str(path), pairs=pairs)
        [change] = interventions(Artifacts(replica), steer.Params(layer=3, dose=-0.5), extraction)
        np.testing.assert_allclose(change.vector, -0.5 * 7.0 * unit(VECTORS[3]), rtol=1e-5)  # type: ignore[union-attr]

    def test_a_layer_that_the_file_lacks_is_refused_by_name(
        self, replica: Replica, pairs: str, vectors: str
    ) -> None:
        extraction = extract.Params(source="file", vectors=vectors, pairs=pairs)
        with pytest.raises(
            SpecError, match=r"layer 2 has no direction; .*safetensors give the layers \[1, 3\]"
        ):
            extract.load_direction(Artifacts(replica), extraction, 2)

    def test_a_direction_of_zeros_counts_as_absent(
        self, replica: Replica, pairs: str, tmp_path: Path
    ) -> None:
        path = tmp_path / "zeros.safetensors"
        write_safetensors(path, {**VECTORS, 2: np.zeros(HIDDEN, np.float32)}, model="m", method="by hand")
        found = extracted(replica, source="file", vectors=str(path), pairs=pairs).tensors["directions"]
        assert np.isnan(found[2]).all()

    def test_a_file_of_another_model_is_refused(self, replica: Replica, pairs: str, tmp_path: Path) -> None:
        wide, deep = tmp_path / "wide.safetensors", tmp_path / "deep.safetensors"
        write_safetensors(wide, {0: np.ones(HIDDEN + 1, np.float32)}, model="m", method="by hand")
        write_safetensors(deep, {LAYERS: np.ones(HIDDEN, np.float32)}, model="m", method="by hand")
        for path, message in ((wide, "hidden size is"), (deep, "the model has 0 to")):
            with pytest.raises(SpecError, match=message):
                extracted(replica, source="file", vectors=str(path), pairs=pairs)

    @pytest.mark.parametrize(
        ("values", "message"),
        [
            ({"source": "file"}, "source='file' takes the path of a file"),
            ({"vectors": "v.gguf"}, "other sources take none"),
            ({"correct_only": True}, "only claims have correct answers"),
            ({"combine": ("a", "b"), "combine_weights": (1.0,)}, "give one weight for each, or none"),
            ({"combine": ("a",), "combine_weights": (0.0,)}, "weights are finite and differ from 0"),
            ({"without": ("",)}, "a name is empty"),
        ],
    )
    def test_parameters_that_cannot_be_meant_are_refused(self, values: dict[str, Any], message: str) -> None:
        with pytest.raises(SpecError, match=message):
            make_params("jobs.extract", values)

    def test_check_reads_every_file(self, pairs: str, vectors: str, tmp_path: Path) -> None:
        broken = tmp_path / "broken.gguf"
        broken.write_bytes(b"GGUF")
        good: dict[str, Any] = {"source": "file", "vectors": vectors, "pairs": pairs}
        extract.check(extract.Params(**good, combine=(vectors, pairs), without=(pairs,)))
        for change in (
            {"vectors": str(broken)},
            {"combine": (str(broken),)},
            {"without": (str(broken),)},
            {"without": ("absent",)},
            {"combine": ("absent",)},
        ):
            with pytest.raises(SpecError):
                extract.check(extract.Params(**good | change))


class TestIdentity:
    def spec(self, **values: Any) -> Any:
        requirement = Requirement(job="jobs.extract", params=make_params("jobs.extract", values))
        return make_spec(requirement, model=ModelRef(id="m"), seed=0)

    def test_the_content_of_every_file_and_dataset_counts(self, tmp_path: Path, vectors: str) -> None:
        one, two = (write_pairs(tmp_path / f"{name}.jsonl", name, "no") for name in ("one", "two"))
        values = {"source": "file", "vectors": vectors, "pairs": one, "combine": [two, one], "without": [two]}
        before = self.spec(**values)
        assert before.data == {
            "pairs": data_hash(one),
            "vectors": data_hash(vectors),
            "combine.0": data_hash(two),
            "combine.1": data_hash(one),
            "without.0": data_hash(two),
        }
        write_pairs(tmp_path / "two.jsonl", "other", "no")
        assert self.spec(**values).id != before.id

    def test_a_parameter_without_a_dataset_adds_nothing(self, pairs: str) -> None:
        assert self.spec(pairs=pairs).data == {"pairs": data_hash(pairs)}

    def test_whole_numbers_are_weights_too_and_no_weights_mean_one_each(self, pairs: str) -> None:
        assert make_params("jobs.extract", {"combine": [pairs], "combine_weights": [-1]}).combine_weights == (
            -1.0,
        )
        assert self.spec(combine=[pairs]).id == self.spec(combine=[pairs], combine_weights=[1]).id
        with pytest.raises(SpecError, match="combine_weights"):
            make_params("jobs.extract", {"combine": [pairs], "combine_weights": [True]})

    def test_the_method_matters_only_where_something_is_fitted(self, pairs: str, vectors: str) -> None:
        file = {"source": "file", "vectors": vectors}
        assert self.spec(**file).id == self.spec(**file, method="pca").id
        assert self.spec(**file, combine=[pairs]).id != self.spec(**file, combine=[pairs], method="pca").id


class TestCombinations:
    def test_sums_and_differences_are_of_unit_directions(
        self, replica: Replica, pairs: str, others: str, vectors: str
    ) -> None:
        values = {"pairs": pairs, "combine": [others, vectors], "combine_weights": [-0.5, 2]}
        found = extracted(replica, **values).tensors["directions"]
        one, two = unit(mean_difference(pairs)), unit(mean_difference(others))
        for layer in VECTORS:
            expected = one[layer] - 0.5 * two[layer] + 2 * unit(VECTORS[layer])
            np.testing.assert_allclose(found[layer], unit(expected), atol=1e-5)
        assert np.isnan(found[[0, 2]]).all()

    def test_what_other_pairs_point_to_is_projected_out(
        self, replica: Replica, pairs: str, others: str, vectors: str
    ) -> None:
        found = extracted(replica, pairs=pairs, without=[others]).tensors["directions"]
        own, removed = mean_difference(pairs), unit(mean_difference(others))
        expected = own - (own * removed).sum(axis=-1, keepdims=True) * removed
        np.testing.assert_allclose(found, unit(expected), atol=1e-5)
        both = extracted(replica, pairs=pairs, without=[others, vectors], without_words=[" warm"])
        token = replica.encode_continuation(" warm")[0]
        row = replica.model.get_output_embeddings().weight[token].detach().numpy()
        for layer in VECTORS:
            direction = both.tensors["directions"][layer]
            for other in (removed[layer], unit(VECTORS[layer]), unit(row)):
                assert abs(direction @ other) < 1e-5

    def test_a_direction_that_nothing_is_left_of_fails_by_name(self, replica: Replica, pairs: str) -> None:
        outcome = extracted(replica, pairs=pairs, without=[pairs])
        assert outcome.status == "failed"
        assert "layer 0: nothing is left" in str(outcome.reason)

    def test_random_directions_of_different_datasets_differ(
        self, replica: Replica, pairs: str, others: str
    ) -> None:
        values = {"pairs": pairs, "method": "random", "combine": [others], "combine_weights": [-1]}
        assert extracted(replica, **values).status == "completed"


class TestCorrectOnly:
    COUNT = 24

    def correct(self, replica: Replica) -> list[bool]:
        """By one plain forward pass a claim."""
        found = []
        for question in load_questions("claims", extract=self.COUNT, select=0, report=0):
            ids = torch.tensor([replica.encode_chat(question.user)])
            with torch.inference_mode():
                logits = tiny_model("llama")(ids).logits[0, -1]
            honest, dishonest = (
                logits[tiny_tokenizer()(letter, add_special_tokens=False).input_ids[0]]
                for letter in (question.honest_letter, question.dishonest_letter)
            )
            found.append(bool(honest > dishonest))
        return found

    def test_only_claims_that_the_model_answers_correctly_count(self, replica: Replica) -> None:
        values = {"source": "claims", "pairs": "claims", "count": self.COUNT}
        outcome = extracted(replica, **values, correct_only=True)
        every = extracted(replica, **values)
        correct = self.correct(replica)
        assert 5 <= sum(correct) < self.COUNT
        assert outcome.metrics["extract"]["pairs"] == sum(correct)
        assert outcome.metrics["extract"]["answered_correctly"] == pytest.approx(np.mean(correct))
        assert np.isnan(every.metrics["extract"]["answered_correctly"])
        sides = contrasts.claims_contrast(replica, "claims", count=self.COUNT, offset=1)
        gap = (sides.positive_NLD - sides.negative_NLD)[correct].mean(dim=0).numpy()
        np.testing.assert_allclose(outcome.tensors["directions"], unit(gap), atol=1e-5)

    @pytest.mark.parametrize("kept", [0, 4])
    def test_too_few_are_a_failure_that_says_so(
        self, replica: Replica, kept: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        mask = torch.arange(self.COUNT) < kept
        monkeypatch.setattr(contrasts, "answers_correctly", lambda replica, questions: mask)
        outcome = extracted(replica, source="claims", pairs="claims", count=self.COUNT, correct_only=True)
        assert outcome.status == "failed"
        assert f"answers {kept} of 24 claims correctly, and correct_only needs at least 5" in str(
            outcome.reason
        )


class TestDiagnostics:
    @pytest.fixture(scope="class")
    def found(self, replica: Replica, pairs: str) -> Any:
        return extracted(replica, pairs=pairs).tensors

    def test_every_array_can_be_stored(self, found: dict[str, np.ndarray]) -> None:
        assert {array.dtype.name for array in found.values()} <= {"float32", "int64", "uint8"}

    def test_cosines_and_histograms_are_those_of_the_directions_and_projections(
        self, found: dict[str, np.ndarray]
    ) -> None:
        directions = found["directions"]
        np.testing.assert_allclose(found["cosine_profile"], directions @ directions.T, atol=1e-5)
        for layer in range(LAYERS):
            for side, name in enumerate(("histogram_positive", "histogram_negative")):
                values = found["projections"][layer, :, side]
                counts, edges = found[name][layer], found["histogram_edges"][layer]
                assert counts.sum() == len(values)
                middle = len(edges) // 2
                assert abs(counts[:middle].sum() - (values < edges[middle]).sum()) <= 1

    def test_the_scatter_is_each_layers_own_plane(self, found: dict[str, np.ndarray]) -> None:
        points = found["pca_coordinates"]
        assert points.shape == (LAYERS, 12, 2)
        assert found["pca_is_positive"].tolist() == [1] * 6 + [0] * 6
        np.testing.assert_allclose(points.mean(axis=1), 0, atol=1e-4)
        assert (points[:, :6].mean(axis=1) >= -1e-4).all()
        np.testing.assert_allclose((points[..., 0] * points[..., 1]).mean(axis=1), 0, atol=1e-3)

    def test_many_pairs_are_scattered_in_part(self, replica: Replica) -> None:
        found = extracted(replica, pairs="tone_pairs").tensors
        assert found["pca_coordinates"].shape == (LAYERS, 2 * diagnosis.SCATTERED_PAIRS, 2)

    @pytest.mark.parametrize("name", ["llama", "gpt2", "opt"])
    def test_the_lens_reads_each_direction_as_the_models_own_head_does(self, name: str, pairs: str) -> None:
        replica = tiny_replica(name)
        found = extracted(replica, pairs=pairs).tensors
        inner = replica.model.base_model
        norm = {"llama": "norm", "gpt2": "ln_f", "opt": "decoder.final_layer_norm"}[name]
        vectors = torch.from_numpy(found["directions"] * found["residual_norms"][:, None]).double()
        unembedding = replica.model.get_output_embeddings().weight.detach()
        with torch.inference_mode():
            expected = logit_lens(vectors, unembedding, norm=inner.get_submodule(norm))
        np.testing.assert_allclose(found["lens_logits"], expected.logits_L2K, rtol=1e-4, atol=1e-4)
        np.testing.assert_array_equal(found["lens_tokens"], expected.tokens_L2K)

    def test_texts_say_what_was_extracted_and_what_the_tokens_are(
        self, replica: Replica, pairs: str, vectors: str
    ) -> None:
        found = extracted(replica, source="file", vectors=vectors, pairs=pairs).tensors
        texts = json.loads(found["texts"].tobytes())
        assert texts["params"]["vectors"] == vectors
        assert texts["layers"] == [1, 3]
        assert texts["lens"][1][0] == [
            replica.tokenizer.decode([token]) for token in found["lens_tokens"][3, 0].tolist()
        ]
        assert np.isnan(found["lens_logits"][0]).all()

    def test_positions_are_cosines_of_the_prompts_and_their_greedy_completions(
        self, found: dict[str, np.ndarray], pairs: str
    ) -> None:
        model = tiny_model("llama")
        columns = found["position_columns"].tolist()
        assert columns == list(range(-diagnosis.PROMPT_COLUMNS, diagnosis.NEW_TOKENS - 1))
        rows = [json.loads(line) for line in Path(pairs).read_text().splitlines()][: diagnosis.PROMPT_PAIRS]
        texts = [row[side] for row in rows for side in ("positive", "negative")]
        assert found["position_is_positive"].tolist() == [1, 0] * len(rows)
        for text, cosines in zip(texts, found["position_cosines"], strict=True):
            prompt = list(tiny_tokenizer()(text).input_ids)
            ids = list(prompt)
            for _ in range(diagnosis.NEW_TOKENS):
                with torch.inference_mode():
                    following = int(model(torch.tensor([ids])).logits[0, -1].argmax())
                if following == tiny_tokenizer().eos_token_id:
                    break
                ids.append(following)
            read = ids if ids == prompt else ids[:-1]
            expected = np.full((LAYERS, len(columns)), np.nan)
            for at, state in enumerate(hidden_states(read).transpose(1, 0, 2)):
                if at - len(prompt) >= columns[0]:
                    projection = (state * found["directions"]).sum(axis=-1)
                    expected[:, columns.index(at - len(prompt))] = projection / np.linalg.norm(state, axis=-1)
            np.testing.assert_allclose(cosines, expected, atol=1e-5)

    def test_prompts_that_leave_no_room_for_a_completion_are_left_out(
        self, replica: Replica, tmp_path: Path
    ) -> None:
        path = tmp_path / "long.jsonl"
        rows = [{"positive": "a" * 508, "negative": "b" * 30}, {"positive": "c" * 509, "negative": "d"}]
        path.write_text("\n".join(map(json.dumps, rows)))
        outcome = extracted(replica, pairs=str(path))
        assert outcome.tensors["position_is_positive"].tolist() == [0, 0]

    def test_a_model_that_cannot_complete_is_still_read(
        self, replica: Replica, pairs: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def without_completions(*arguments: Any) -> Any:
            if arguments[-1].decoding is not None:
                raise ModelError("it keeps more than keys and values")
            return capture(*arguments)

        monkeypatch.setattr(diagnosis, "capture", without_completions)
        cosines = extracted(replica, pairs=pairs).tensors["position_cosines"]
        assert np.isfinite(cosines[..., diagnosis.PROMPT_COLUMNS - 1]).all()
        assert np.isnan(cosines[..., diagnosis.PROMPT_COLUMNS :]).all()

    def test_a_single_pair_has_no_plane_and_no_unseen_pairs(self, replica: Replica, pairs: str) -> None:
        outcome = extracted(replica, pairs=pairs, count=1)
        assert outcome.status == "completed"
        assert np.isnan(outcome.tensors["pca_coordinates"]).all()
        assert np.isnan(outcome.metrics["extract"]["held_out_auc"])

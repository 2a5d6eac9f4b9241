"""The job that learns vectors without pairs, on tiny models, against its parts and plain loops."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from jobs import melbo
from jobs.engine.decoding import Decoding, Work, generate
from jobs.engine.interventions import Add
from jobs.engine.slices import Slice
from jobs.engine.tables import row_tables
from jobs.errors import SpecError
from jobs.reading import behaviours
from jobs.reading.rereading import unsteered_nll
from jobs.resolve import make_params
from jobs.scoring import diversity
from jobs.scoring.text import repeated_ngrams
from jobs.spec import Outcome, Row, Status
from jobs.unsupervised.objective import counted_tokens, movement
from tests.models import LAYERS, Artifacts, tiny_replica

PROMPTS = [
    {"split": "extract", "prompt": "Tell me a story."},
    {"split": "select", "prompt": "Why is the sea salt?"},
    {"split": "extract", "prompt": "Describe a small village."},
    {"split": "report", "prompt": "Name a bird."},
    {"split": "extract", "prompt": "Say a few words about the weather in the mountains, and why it changes."},
]


@pytest.fixture(autouse=True)
def small_encoder(monkeypatch: pytest.MonkeyPatch) -> None:
    """Embeddings by counting letters, in place of a sentence encoder."""

    def embed(texts: Any, encoder: str) -> np.ndarray:
        return np.array([[text.count(letter) + 0.1 for letter in "abcdefgh"] for text in texts])

    monkeypatch.setattr(behaviours, "embed", embed)


@pytest.fixture
def prompts(tmp_path: Path) -> str:
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in PROMPTS))
    return str(path)


def params_of(prompts: str, **changes: Any) -> melbo.Params:
    common = {
        "prompts": prompts,
        "source": 0,
        "target": LAYERS - 2,
        "vectors": 3,
        "radius": 1.0,
        "radius_in": "stream",
        "read_on": 1,
        "max_new_tokens": 6,
        "most_nll": 100.0,
        "most_repetition": 1.0,
    }
    return melbo.Params(**{**common, **changes})


def outcomes(rows: list[Row]) -> list[Outcome]:
    replica = tiny_replica("llama")
    found = dict(melbo.run(replica, rows, Artifacts(replica)))
    return [found[index] for index in range(len(rows))]


def test_rows_that_differ_in_everything_find_in_one_pack_what_they_find_alone(prompts: str) -> None:
    changes: list[dict[str, Any]] = [
        {},
        {"radius": 3.0, "power": 4.0, "root": 4.0, "orthogonality": "none"},
        {"source": 1, "target": LAYERS - 1, "target_site": "attention", "counted": "last"},
        {"orthogonality": "sequential", "optimiser": "amsgrad", "steps": 3},
        {"optimiser": "none", "radius": 0.5, "radius_in": "residual_norm"},
        {"learn_after": 1},
        {"learn_after": 1, "start": "jacobian", "span": 3, "contrast": 0.5},
    ]
    rows = [Row(params_of(prompts, learn_from=2, **each), seed=number) for number, each in enumerate(changes)]
    together = outcomes(rows)
    for row, packed in zip(rows, together, strict=True):
        [alone] = outcomes([row])
        assert packed.status == alone.status == Status.COMPLETED
        for name, tensor in alone.tensors.items():
            assert packed.tensors[name].shape == tensor.shape
            np.testing.assert_allclose(packed.tensors[name], tensor, rtol=1e-5, atol=1e-6)
        for split, metrics in alone.metrics.items():
            assert metrics.keys() == melbo.METRICS.keys()
            for name, value in metrics.items():
                assert packed.metrics[split][name] == pytest.approx(value, rel=1e-4, nan_ok=True)
        assert [row["text"] for row in packed.tables["completions"]] == [
            row["text"] for row in alone.tables["completions"]
        ]


def test_vectors_have_their_norm_and_the_objective_that_is_stored(prompts: str) -> None:
    params = params_of(prompts, learn_from=2, power=3.0, root=2.0, counted="all")
    [found] = outcomes([Row(params, seed=5)])
    vectors = torch.tensor(found.tensors["vectors"], dtype=torch.float64)
    torch.testing.assert_close(vectors @ vectors.T, torch.eye(3, dtype=torch.float64), atol=1e-5, rtol=1e-5)
    replica = tiny_replica("llama")
    encoded = [replica.encode_chat(row["prompt"]) for row in PROMPTS if row["split"] == "extract"][:2]
    expected = torch.zeros(3, dtype=torch.float64)
    for prompt in encoded:
        each = Slice(replica, [prompt], source=0, target=LAYERS - 2)
        deltas = each.deltas(vectors, [0, 0, 0])
        counted = torch.ones(deltas.shape[:2], dtype=torch.bool)
        expected += movement(deltas, counted, torch.tensor([3.0] * 3), torch.tensor([2.0] * 3))
    np.testing.assert_allclose(found.tensors["objectives"], expected, rtol=1e-4)
    assert found.metrics["select"]["objective"] == pytest.approx(float(expected.mean()), rel=1e-4)
    assert found.metrics["select"]["radius"] == 1.0
    shares = found.tensors["shares"]
    np.testing.assert_allclose(shares.sum(axis=2), 1, rtol=1e-5)
    history = found.tensors["history"]
    assert np.nanmax(history.mean(axis=1)) <= found.tensors["objectives"].mean() * (1 + 1e-5)
    assert [row["norm"] for row in found.tables["vectors"]] == pytest.approx([1.0] * 3, rel=1e-5)


def test_completions_are_those_under_each_vector_and_their_scores_are_recomputed(prompts: str) -> None:
    [found] = outcomes([Row(params_of(prompts, radius=4.0), seed=1)])
    replica = tiny_replica("llama")
    rows = found.tables["completions"]
    texts: dict[str, list[str]] = {}
    nlls, repetitions = [], []
    for prompt in dict.fromkeys(row["prompt"] for row in rows):
        encoded = replica.encode_chat(prompt)
        for vector in found.tensors["vectors"]:
            tables = row_tables(replica, [[Add(layer=0, vector=vector)]])
            [(_, reply)] = generate(replica, [encoded], tables, [Work(0, 0)], Decoding(max_new_tokens=6))
            texts.setdefault(prompt, []).append(replica.decode(reply.tokens))
            if prompt == "Why is the sea salt?":
                nlls += unsteered_nll(replica, [encoded], [reply.tokens])
                repetitions.append(repeated_ngrams(reply.tokens))
    assert {prompt: [row["text"] for row in rows if row["prompt"] == prompt] for prompt in texts} == texts
    assert [row["item"] for row in rows] == list(range(len(rows)))
    metrics = found.metrics["select"]
    assert metrics["nll"] == pytest.approx(np.nanmean(nlls), rel=1e-4)
    assert metrics["repetition"] == pytest.approx(np.mean(repetitions))
    assert metrics["distinct_completions"] == len(set(texts["Why is the sea salt?"]))
    embedded = behaviours.embed(texts["Why is the sea salt?"], "")
    assert metrics["diversity"] == pytest.approx(diversity.mean_cosine_distance(embedded))
    assert metrics["vendi"] == pytest.approx(diversity.vendi_score(embedded))


def test_diversity_counts_fluent_completions_only_and_is_undefined_without_two(prompts: str) -> None:
    strict, lax = (params_of(prompts, most_nll=bar) for bar in (1e-6, 100.0))
    found = [each.metrics["select"] for each in outcomes([Row(strict, seed=0)])]
    assert found[0]["fluent"] == found[0]["distinct_completions"] == 0
    assert math.isnan(found[0]["diversity"])
    assert math.isnan(found[0]["vendi"])
    [free] = [each.metrics["select"] for each in outcomes([Row(lax, seed=0)])]
    assert free["fluent"] == 1
    assert free["diversity"] == pytest.approx(free["diversity_all"])
    assert found[0]["diversity_all"] == pytest.approx(free["diversity_all"])


def test_vectors_that_are_never_finite_fail_their_row_alone(prompts: str) -> None:
    rows = [Row(params_of(prompts), seed=0), Row(params_of(prompts, radius=1e200, power=5.0), seed=0)]
    good, bad = outcomes(rows)
    assert good.status == Status.COMPLETED
    assert bad.status == Status.FAILED
    assert "not finite" in str(bad.reason)
    [alone] = outcomes(rows[1:])
    assert alone.reason == bad.reason


def test_which_tokens_count() -> None:
    positions = torch.tensor([[-1, 0, 1, 2], [0, 1, 2, 3]])
    assert counted_tokens(positions, "all").tolist() == [[False, True, True, True], [True] * 4]
    assert counted_tokens(positions, "but_first").tolist() == [
        [False, False, True, True],
        [False, True, True, True],
    ]
    assert counted_tokens(positions, "last", last=2).tolist() == [[False, False, True, True]] * 2
    with pytest.raises(SpecError, match=r"prompt 0 has 3 tokens, and counted='last' asks for 4"):
        counted_tokens(positions, "last", last=4)
    with pytest.raises(SpecError, match=r"prompt 0 has 1 tokens, and counted='but_first' asks for 2"):
        counted_tokens(torch.tensor([[-1, 0]]), "but_first")


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"source": 3, "target": 3}, "source=3, target=3"),
        ({"radius": 0.0}, "radius=0.0"),
        ({"radius": -1.0}, "radius=-1.0"),
        ({"power": 0.5}, "power=0.5"),
        ({"vectors": 0}, "vectors=0"),
        ({"most_repetition": 2.0}, "most_repetition=2.0"),
    ],
)
def test_parameters_that_cannot_be_meant_are_refused(changes: dict[str, Any], named: str) -> None:
    with pytest.raises(SpecError, match=named):
        make_params("jobs.melbo", changes)


def test_more_orthogonal_vectors_than_dimensions_are_refused(prompts: str) -> None:
    with pytest.raises(SpecError, match="33 orthogonal vectors; there is room for 32"):
        outcomes([Row(params_of(prompts, vectors=33), seed=0)])


def test_what_an_optimiser_does_not_use_makes_no_other_trial(prompts: str) -> None:
    one, other = (params_of(prompts, learning_rate=rate, last=last) for rate, last in ((1e-3, 1), (1e-2, 5)))
    assert melbo.canonical(one) == melbo.canonical(other)
    assert melbo.canonical(params_of(prompts, power=4.0, norm_over="tokens")).norm_over == "tokens"


class TestDiversity:
    def test_the_vendi_score_counts_alike_texts_once(self) -> None:
        same, apart = np.ones((4, 3)), np.eye(4)
        assert diversity.vendi_score(same) == pytest.approx(1)
        assert diversity.vendi_score(apart) == pytest.approx(4)
        assert diversity.vendi_score(np.vstack([apart, apart])) == pytest.approx(4)
        assert math.isnan(diversity.vendi_score(apart[:0]))

    def test_the_vendi_score_is_the_entropy_of_the_singular_values(self) -> None:
        texts = np.random.default_rng(0).normal(size=(6, 4))
        units = texts / np.linalg.norm(texts, axis=1, keepdims=True)
        shares = np.linalg.svd(units, compute_uv=False) ** 2 / 6
        expected = math.exp(-sum(share * math.log(share) for share in shares))
        assert diversity.vendi_score(texts) == pytest.approx(expected)

    def test_the_distance_is_the_mean_over_pairs(self) -> None:
        texts = np.random.default_rng(1).normal(size=(5, 4))
        pairs = [
            1 - one @ other / np.linalg.norm(one) / np.linalg.norm(other)
            for number, one in enumerate(texts)
            for other in texts[number + 1 :]
        ]
        assert diversity.mean_cosine_distance(texts) == pytest.approx(np.mean(pairs))
        assert math.isnan(diversity.mean_cosine_distance(texts[:1]))

    def test_ngrams_of_all_texts_are_counted_together(self) -> None:
        assert diversity.distinct_ngrams([[1, 2, 3], [1, 2]], 2) == pytest.approx(2 / 3)
        assert math.isnan(diversity.distinct_ngrams([[1], []], 2))

    def test_self_bleu_is_1_for_equal_texts_and_low_for_different_ones(self) -> None:
        same = ["a walk by the river in the morning"] * 3
        assert diversity.self_bleu(same) == pytest.approx(1)
        apart = ["one two three four five", "six seven eight nine ten", "red green blue white black"]
        assert diversity.self_bleu(apart) < 0.05
        mixed = [*same[:2], "six seven eight nine ten eleven twelve thirteen"]
        assert diversity.self_bleu(mixed) == pytest.approx(2 / 3, abs=0.02)
        assert math.isnan(diversity.self_bleu(["alone"]))

    def test_repeating_texts_compress_further(self) -> None:
        assert diversity.compression_ratio(["a walk by the river"] * 20) > 5
        assert diversity.compression_ratio(["walk", "über"]) < 1.5
        assert math.isnan(diversity.compression_ratio([]))

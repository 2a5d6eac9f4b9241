"""Jobs around learned vectors: calibration, samples, features, scans, stability, anomalies, texts."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score

from jobs import anomaly, generate, melbo, prompt_search, stability
from jobs.engine.capture import capture_last
from jobs.engine.interventions import Add
from jobs.engine.replica import Replica
from jobs.engine.slices import Slice
from jobs.errors import SpecError
from jobs.reading import behaviours
from jobs.reading.behaviours import METRICS as BEHAVIOURS
from jobs.reading.behaviours import at_nll, stored_means
from jobs.reading.halves import METRICS as INTERVALS
from jobs.resolve import load_job, make_params
from jobs.scoring import similarity
from jobs.scoring.goldilocks import bootstrap, curve, pick
from jobs.spec import Outcome, Row, Status
from jobs.steering import directions_of, interventions
from jobs.unsupervised.calibration import calibrated_radius, residual_norm
from jobs.unsupervised.causal_map import CausalMap
from jobs.unsupervised.objective import counted_tokens
from jobs.unsupervised.token_search import TokenSearch, search
from tests.models import HIDDEN, LAYERS, Artifacts, tiny_model, tiny_replica, tiny_tokenizer

PROMPTS = [
    {"split": "extract", "prompt": "Tell me a story."},
    {"split": "select", "prompt": "Why is the sea salt?"},
    {"split": "select", "prompt": "Describe a small village."},
    {"split": "report", "prompt": "Name a bird."},
    {"split": "report", "prompt": "Name a tree."},
]
SMALL = {"source": 0, "target": LAYERS - 2, "read_on": 2, "max_new_tokens": 5, "most_nll": 99.0}


@pytest.fixture(autouse=True)
def small_encoder(monkeypatch: pytest.MonkeyPatch) -> None:
    """Embeddings by counting letters, in place of a sentence encoder."""

    def embed(texts: Any, encoder: str) -> np.ndarray:
        return np.array([[text.count(letter) + 0.1 for letter in "abcdefgh"] for text in texts])

    monkeypatch.setattr(behaviours, "embed", embed)
    monkeypatch.setattr(similarity, "embed", embed)


@pytest.fixture
def prompts(tmp_path: Path) -> str:
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in PROMPTS))
    return str(path)


def run(job: str, values: Mapping[str, Any], *more: Mapping[str, Any], seed: int = 0) -> list[Outcome]:
    """Outcomes of a pack, every one with the metrics that the job promises."""
    context = Artifacts(tiny_replica("llama"), seed=seed)
    found = context.run(job, [make_params(job, each) for each in (values, *more)])
    for outcome in found:
        assert outcome.status == Status.COMPLETED, outcome.reason
        for metrics in outcome.metrics.values():
            assert metrics.keys() == load_job(job).METRICS.keys()
    return found


def use(job: str, **values: Any) -> str:
    return job + json.dumps(values)


def _cosine(one: np.ndarray, other: np.ndarray) -> float:
    return float(one @ other / np.linalg.norm(one) / np.linalg.norm(other))


def melbo_of(prompts: str, **values: Any) -> dict[str, Any]:
    return {**SMALL, "prompts": prompts, "vectors": 4, "radius": 2.0, "radius_in": "stream", **values}


class TestCalibrate:
    def test_it_gives_what_the_slice_says(self, prompts: str) -> None:
        [found] = run("jobs.calibrate", {"source": 0, "target": 2, "prompts": prompts})
        replica = tiny_replica("llama")
        slice_ = Slice(replica, [replica.encode_chat(PROMPTS[0]["prompt"])], source=0, target=2)
        counted = counted_tokens(slice_.positions_NT, "but_first")
        metrics = found.metrics["extract"]
        assert metrics["residual_norm"] == pytest.approx(residual_norm(slice_, counted))
        assert metrics["calibrated"] == pytest.approx(calibrated_radius(slice_, counted), rel=1e-6)

    def test_narrow_types_find_nearly_the_same_norm(self, prompts: str) -> None:
        values = {"prompts": prompts, "source": 0, "target": 2}
        params = make_params("jobs.calibrate", values)
        found = {}
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            replica = Replica(tiny_model("llama").to(dtype), tiny_tokenizer())
            [(_, outcome)] = load_job("jobs.calibrate").run(
                replica, [Row(params, seed=0)], Artifacts(replica)
            )
            found[dtype] = outcome.metrics["extract"]["calibrated"]
        assert found[torch.bfloat16] == pytest.approx(found[torch.float32], rel=0.2)
        assert found[torch.float16] == pytest.approx(found[torch.float32], rel=0.1)

    def test_vectors_that_are_lost_in_the_rounding_fail_with_a_reason(self, prompts: str) -> None:
        replica = Replica(tiny_model("llama").bfloat16(), tiny_tokenizer())
        for optimiser in ("fixed_point", "amsgrad"):
            for orthogonality in ("none", "joint"):
                values = {"optimiser": optimiser, "orthogonality": orthogonality, "compare": False}
                params = make_params("jobs.melbo", {**melbo_of(prompts), **values, "radius": 1e-5})
                [(_, found)] = load_job("jobs.melbo").run(replica, [Row(params, seed=0)], Artifacts(replica))
                assert found.status == Status.FAILED
                assert "larger radius" in str(found.reason)

    def test_radii_are_in_its_units(self, prompts: str) -> None:
        [unit] = run("jobs.calibrate", {"source": 0, "target": LAYERS - 2, "prompts": prompts})
        for name, value in unit.metrics["extract"].items():
            [found] = run("jobs.melbo", melbo_of(prompts, radius=0.5, radius_in=name, optimiser="none"))
            assert found.metrics["select"]["radius"] == pytest.approx(0.5 * value)


class TestSample:
    def test_texts_depend_on_the_seed_and_not_on_the_pack(self, prompts: str) -> None:
        wanted = {"samples": 3, "temperature": 1.5, "prompts": prompts, "read_on": 1, "max_new_tokens": 6}
        first, second = run("jobs.sample", wanted, wanted)
        [alone] = run("jobs.sample", wanted)
        [other] = run("jobs.sample", wanted, seed=1)

        def texts(outcome: Outcome) -> list[Any]:
            return [row["text"] for row in outcome.tables["completions"]]

        assert texts(first) == texts(second) == texts(alone) != texts(other)
        assert len(set(texts(alone))) > 3
        means = stored_means(alone.tensors, "select")
        assert alone.metrics["select"].keys() - means.keys() == INTERVALS.keys()
        assert means == pytest.approx({name: alone.metrics["select"][name] for name in means}, nan_ok=True)


class TestComparison:
    def test_a_set_is_compared_with_random_ones_of_its_norm(self, prompts: str) -> None:
        values = melbo_of(prompts)
        [found] = run("jobs.melbo", values)
        [random] = run("jobs.melbo", {**values, "optimiser": "none"})
        for split in ("extract", "select", "report"):
            metrics, chance = found.metrics[split], random.metrics[split]
            assert metrics["diversity_over_random"] == pytest.approx(
                metrics["diversity"] - chance["diversity"], nan_ok=True
            )
            assert metrics["distinct_over_random"] == (
                metrics["distinct_completions"] - chance["distinct_completions"]
            )
            assert math.isnan(chance["diversity_over_random"])
            assert math.isnan(metrics["diversity_over_random_at_nll"])
        assert metrics["objective"] > chance["objective"]
        assert metrics["objective_start"] == pytest.approx(chance["objective"], rel=1e-5)
        assert metrics["identity"] < 1e-6

    @pytest.mark.parametrize(
        ("job", "values"),
        [
            ("jobs.melbo", {"vectors": 4, "radius": 2.0, "radius_in": "stream"}),
            ("jobs.dct", {"factors": 4, "read": 4, "radius": 2.0, "radius_in": "stream", "iterations": 2}),
            ("jobs.adapters", {"adapters": 4, "rank": 1, "radius": 4.0, "steps": 2}),
        ],
    )
    def test_how_far_a_set_goes_from_the_unsteered_reply_is_recomputed(
        self, prompts: str, job: str, values: dict[str, Any]
    ) -> None:
        [found] = run(job, {**SMALL, "prompts": prompts, **values})
        wanted = {"samples": 1, "temperature": 0.0, "prompts": prompts}
        wanted |= {name: SMALL[name] for name in ("read_on", "max_new_tokens") if name in SMALL}
        [unsteered] = run("jobs.sample", wanted)
        rows = unsteered.tables["completions"]
        assert {row["variant"] for row in rows} == {"unsteered"}
        usual = {row["prompt"]: row["text"] for row in rows}
        assert len(usual) == len(rows)
        for split in ("extract", "select", "report"):
            _, fluent = behaviours.stored_sayings(found.tensors, split)
            said = [row for row in found.tables["completions"] if row["split"] == split]
            distances = [
                1 - _cosine(*behaviours.embed([row["text"], usual[row["prompt"]]], ""))
                for row, holds in zip(said, fluent.reshape(-1), strict=True)
                if holds and row["text"].strip() and usual[row["prompt"]].strip()
            ]
            expected = np.mean(distances) if distances else math.nan
            assert found.metrics[split]["from_unsteered"] == pytest.approx(expected, rel=1e-5, nan_ok=True)

    def test_nothing_is_far_from_replies_without_a_word(self) -> None:
        own = {"embeddings_select": np.ones((1, 2, 3)), "fluent_select": np.ones((1, 2))}
        silent = {"embeddings_select": np.full((1, 1, 1), np.nan), "fluent_select": np.zeros((1, 1))}
        assert math.isnan(behaviours.from_unsteered(own, silent, "select")["from_unsteered"])

    def test_several_likeliest_replies_are_refused(self) -> None:
        with pytest.raises(SpecError, match="samples=2, temperature=0; all of them would be the same"):
            make_params("jobs.sample", {"samples": 2, "temperature": 0.0})

    def test_what_a_set_is_compared_with_is_shared_by_trials_that_differ_in_the_objective(self) -> None:
        one, other = (
            make_params("jobs.melbo", {"power": power, "contrast": contrast, "steps": steps})
            for power, contrast, steps in ((2.0, 0.0, 40), (4.0, 1.0, 20))
        )
        keys = [{need.key for need in melbo.requires(each)} for each in (one, other)]
        assert keys[0] == keys[1]
        assert len(keys[0]) == 3

    def test_other_norms_and_temperatures_are_read_on_request(self, prompts: str) -> None:
        values = melbo_of(prompts, random_norms=(0.1, 1.0, 30.0), temperatures=(0.1, 3.0))
        needs = melbo.requires(make_params("jobs.melbo", values))
        assert [need.job for need in needs] == ["jobs.sample"] + ["jobs.melbo"] * 3 + ["jobs.sample"] * 2
        assert [need.params.radius for need in needs[1:4]] == [2.0, 0.2, 60.0]
        [found] = run("jobs.melbo", values)
        grid = []
        for norm in (0.1, 1.0, 30.0):
            [random] = run("jobs.melbo", melbo_of(prompts, radius=2 * norm, optimiser="none"))
            grid.append(random.metrics["select"])
        metrics = found.metrics["select"]
        assert metrics["diversity_over_random_at_nll"] == pytest.approx(
            metrics["diversity"] - at_nll(grid, "diversity", metrics["nll"]), nan_ok=True
        )

    def test_a_metric_at_equal_nll_lies_between_its_neighbours(self) -> None:
        grid = [{"nll": nll, "x": x} for nll, x in ((3.0, 5.0), (1.0, 1.0), (2.0, 2.0), (math.nan, 9.0))]
        assert at_nll(grid, "x", 2.5) == pytest.approx(3.5)
        assert at_nll(grid, "x", 1.0) == 1.0
        assert math.isnan(at_nll(grid, "x", 3.1))
        assert math.isnan(at_nll(grid[:1], "x", 3.0))


class TestDct:
    @pytest.mark.parametrize("kind", ["linear", "quadratic", "exponential"])
    def test_features_are_ranked_and_the_first_are_read(self, prompts: str, kind: str) -> None:
        values = {**SMALL, "prompts": prompts, "kind": kind, "factors": 6, "read": 3, "iterations": 4}
        [found] = run("jobs.dct", values)
        tensors = found.tensors
        np.testing.assert_allclose(np.linalg.norm(tensors["inputs"], axis=1), 1, rtol=1e-5)
        assert (np.diff(tensors["scores"]) <= 0).all()
        np.testing.assert_allclose(tensors["scores"], np.abs(tensors["strengths"]), rtol=1e-5)
        radius = found.metrics["select"]["radius"]
        np.testing.assert_allclose(tensors["vectors"], radius * tensors["inputs"][:3], rtol=1e-5)
        assert len(found.tables["completions"]) == 3 * 5
        assert not math.isnan(found.metrics["select"]["diversity_over_random"])

    def test_words_rank_by_what_reaches_the_unembedding(self, prompts: str) -> None:
        replica = tiny_replica("llama")
        values = {**SMALL, "prompts": prompts, "factors": 5, "read": 2, "iterations": 2}
        [found] = run("jobs.dct", {**values, "towards": "a", "away": "b"})
        encoded = replica.encode_chat(PROMPTS[0]["prompt"])
        end = Slice(replica, [encoded], source=0, target=LAYERS - 1)
        counted = counted_tokens(end.positions_NT, "last", last=1)
        radius = found.metrics["select"]["radius"]
        pushed = CausalMap(end, counted).at(radius * torch.tensor(found.tensors["inputs"]).double())
        rows = replica.model.get_output_embeddings().weight[[replica.single_token(word) for word in "ab"]]
        expected = pushed @ (rows[0] - rows[1])
        np.testing.assert_allclose(found.tensors["scores"], expected.detach(), rtol=1e-4, atol=1e-6)
        assert (np.diff(found.tensors["scores"]) <= 0).all()

    @pytest.mark.parametrize(
        ("values", "named"),
        [
            ({"source": 3, "target": 2}, "source=3, target=2"),
            ({"read": 9, "factors": 8}, "read=9; there are 8 factors"),
            ({"mix": 0.0}, "mix=0.0"),
            ({"towards": " yes"}, "give both words or neither"),
        ],
    )
    def test_parameters_that_cannot_be_meant_are_refused(self, values: dict[str, Any], named: str) -> None:
        with pytest.raises(SpecError, match=named):
            make_params("jobs.dct", values)

    def test_more_features_than_dimensions_are_refused(self, prompts: str) -> None:
        with pytest.raises(SpecError, match="33 orthogonal vectors; there is room for 32"):
            run("jobs.dct", {**SMALL, "prompts": prompts, "factors": HIDDEN + 1, "read": 2})


class TestRadiusScan:
    def test_it_names_the_best_norm_up_to_the_cusp(self, prompts: str) -> None:
        learned = use("jobs.melbo", **melbo_of(prompts))
        radii = (0.5, 2.0, 8.0, 32.0)
        [found] = run("jobs.radius_scan", {"learned": learned, "radii": radii, "resamples": 200})
        sets = [run("jobs.melbo", melbo_of(prompts, radius=radius))[0] for radius in radii]
        everything = [each.metrics["select"]["diversity_all"] for each in sets]
        fluent = [each.metrics["select"]["diversity"] for each in sets]
        cusp = int(np.argmax(everything))
        best = int(np.argmax(fluent[: cusp + 1]))
        metrics = found.metrics["select"]
        assert metrics["cusp"] == radii[cusp]
        assert metrics["best_radius"] == radii[best]
        assert metrics["best_radius_low"] <= metrics["best_radius"] <= metrics["best_radius_high"]
        assert metrics["diversity"] == pytest.approx(fluent[best])
        held_out = [each.metrics["report"]["diversity"] for each in sets]
        assert found.metrics["report"]["regret"] == pytest.approx(max(held_out) - held_out[best])
        items = {(row["split"], row["item"], row["name"]): row["value"] for row in found.tables["items"]}
        assert items["report", 1, "diversity"] == pytest.approx(held_out[1])
        assert items["select", 0, "random_nll"] == pytest.approx(
            run("jobs.melbo", melbo_of(prompts, radius=0.5, optimiser="none"))[0].metrics["select"]["nll"]
        )
        assert len(items) == 2 * 4 * 2 * (len(BEHAVIOURS) - len(INTERVALS))

    def test_a_pick_is_that_of_a_plain_loop_and_resamples_spread_around_it(self) -> None:
        generator = np.random.default_rng(0)
        spreads = [0.05, 0.3, 0.6, 1.5, 0.9]
        base = generator.normal(size=(2, 12, 6))
        embeddings = [1.0 + spread * base for spread in spreads]
        fluent = [np.ones((2, 12), bool), np.ones((2, 12), bool), base[:, :, 0] > -0.5] + [
            base[:, :, 0] > 9
        ] * 2
        curves = [curve(*each) for each in zip(embeddings, fluent, strict=True)]

        def diversity(number: int, chosen: np.ndarray) -> float:
            means = []
            for prompt in range(2):
                rows = embeddings[number][prompt][chosen[prompt]]
                units = rows / np.linalg.norm(rows, axis=1, keepdims=True)
                pairs = (1 - units @ units.T)[np.triu_indices(len(units), k=1)]
                if len(pairs):
                    means.append(pairs.mean())
            return float(np.mean(means)) if means else -1.0

        everything = [diversity(number, np.ones((2, 12), bool)) for number in range(5)]
        fluents = [diversity(number, fluent[number]) for number in range(5)]
        chosen = pick(curves)
        assert chosen.cusp == int(np.argmax(everything))
        assert chosen.best == int(np.argmax(fluents[: chosen.cusp + 1]))
        drawn = bootstrap(curves, resamples=100, seed=1)
        assert drawn == bootstrap(curves, resamples=100, seed=1)
        assert sum(each.best == chosen.best for each in drawn) > 50

    def test_where_nothing_can_be_compared_no_norm_is_the_best(self) -> None:
        generator = np.random.default_rng(0)
        nobody, everybody = np.zeros((2, 4)), np.ones((2, 4))
        embeddings = [generator.normal(size=(2, 4, 3)) for _ in range(3)]
        assert pick([curve(each, nobody) for each in embeddings]).best is None
        assert pick([curve(each[:, :1], everybody[:, :1]) for each in embeddings]) == (None, None)
        two = [curve(each[:, :2], everybody[:, :2]) for each in embeddings]
        drawn = bootstrap(two, resamples=200, seed=0)
        # Half of the draws of two vectors have one of them twice, which makes no pair.
        assert 60 < sum(each.best is None for each in drawn) < 140
        assert {each.best for each in drawn} == {None, pick(two).best}

    def test_a_set_that_is_never_fluent_has_no_best_norm(self, prompts: str) -> None:
        learned = f"jobs.melbo{json.dumps({**melbo_of(prompts), 'most_nll': 1e-6})}"
        [found] = run("jobs.radius_scan", {"learned": learned, "radii": (0.5, 2.0, 8.0), "resamples": 100})
        for split in ("select", "report"):
            undefined = ("best_radius", "best_radius_low", "best_radius_high", "diversity", "regret", "nll")
            assert all(np.isnan(found.metrics[split][name]) for name in undefined)
            assert np.isfinite(found.metrics[split]["cusp"])

    def test_empty_completions_count_nowhere(self) -> None:
        embeddings = np.ones((1, 3, 2))
        embeddings[0, 1] = [1, -1]
        embeddings[0, 2] = np.nan
        found = curve(embeddings, np.ones((1, 3)))
        assert found.known_PV.tolist() == [[True, True, False]]
        assert pick([found]) == (0, 0)

    @pytest.mark.parametrize(
        ("values", "named"),
        [
            ({"radii": (1.0, 2.0)}, "three or more"),
            ({"radii": (1.0, 3.0, 2.0)}, "rising"),
            ({"radii": (1.0, 3.0, math.inf)}, "finite"),
            ({"radii": (1.0, 3.0, math.nan)}, "finite"),
            ({"learned": "jobs.dct"}, "is another job"),
            ({"learned": 'jobs.melbo{"radius": 0}'}, "radius=0"),
        ],
    )
    def test_parameters_that_cannot_be_meant_are_refused(self, values: dict[str, Any], named: str) -> None:
        with pytest.raises(SpecError, match=named):
            make_params("jobs.radius_scan", values)


class TestStability:
    def test_vectors_match_themselves_in_any_order(self) -> None:
        vectors = np.random.default_rng(0).normal(size=(5, 9))
        np.testing.assert_allclose(stability.matched_cosines(vectors, 3 * vectors[::-1]), 1)
        assert stability.shared_span(vectors, vectors[::-1] @ np.eye(9)) == pytest.approx(1)

    def test_vectors_that_are_all_alike_span_one_direction(self) -> None:
        generator = np.random.default_rng(0)
        vectors, one = generator.normal(size=(16, 32)), generator.normal(size=32)
        expected = np.mean((vectors @ one) ** 2 / (vectors**2).sum(axis=1) / (one @ one))
        for noise in (0.0, 1e-8, 1e-6):
            alike = one + noise * generator.normal(size=(16, 32))
            assert stability.shared_span(vectors, alike) == pytest.approx(expected, rel=1e-3)

    def test_the_matching_is_the_best_of_all(self) -> None:
        from itertools import permutations

        first, second = np.random.default_rng(1).normal(size=(2, 4, 6))
        units = [each / np.linalg.norm(each, axis=1, keepdims=True) for each in (first, second)]
        cosines = units[0] @ units[1].T
        best = max(sum(cosines[range(4), order]) for order in permutations(range(4)))
        assert stability.matched_cosines(first, second).sum() == pytest.approx(best)

    def test_draws_differ_and_what_they_share_is_more_than_chance(self, prompts: str) -> None:
        learned = use("jobs.melbo", **melbo_of(prompts, orthogonality="none", vectors=3, radius=0.1))
        [found] = run("jobs.stability", {"learned": learned, "draws": 3})
        metrics = found.metrics["extract"]
        assert found.tensors["cosines"].shape == (3, 3)
        assert metrics["shared_span"] > metrics["shared_span_random"]
        draws = [
            run("jobs.melbo", melbo_of(prompts, optimiser="none", draw=draw))[0].tensors["vectors"]
            for draw in (0, 1)
        ]
        assert not np.allclose(draws[0], draws[1])


BEHAVIOUR_ROWS = [
    {"split": split, "prompt": f"{word} {number}.", "reply": "-", "behaviour": behaviour}
    for split, numbers in (("extract", range(6)), ("select", range(6, 10)), ("report", range(10, 14)))
    for number in numbers
    for word, behaviour in (("Calm words here", "clean"), ("ZZZZ ZZ ZZZZZ", "odd"))
]


class TestAnomaly:
    def test_scores_are_cosines_with_what_vectors_do(self, prompts: str, tmp_path: Path) -> None:
        path = tmp_path / "examples.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in BEHAVIOUR_ROWS))
        learned = use("jobs.melbo", **melbo_of(prompts))
        [found] = run("jobs.anomaly", {"learned": learned, "examples": str(path), "resamples": 200})
        replica = tiny_replica("llama")
        [vectors] = run("jobs.melbo", melbo_of(prompts))
        encoded = replica.encode_chat(PROMPTS[0]["prompt"])
        slice_ = Slice(replica, [encoded], source=0, target=LAYERS - 2)
        moved = slice_.deltas(torch.tensor(vectors.tensors["vectors"]).double(), [0] * 4)[:, -1].numpy()
        states = capture_last(replica, [replica.encode_chat(row["prompt"]) for row in BEHAVIOUR_ROWS])
        states_ED = states[:, LAYERS - 2].double().numpy()
        usual = [row["split"] == "extract" and row["behaviour"] == "clean" for row in BEHAVIOUR_ROWS]
        away = states_ED - states_ED[usual].mean(axis=0)
        cosines = (away @ moved.T) / np.linalg.norm(away, axis=1)[:, None] / np.linalg.norm(moved, axis=1)
        values = [row["value"] for row in found.tables["items"] if row["name"] == "learned"]
        np.testing.assert_allclose(values, cosines.max(axis=1), rtol=1e-4, atol=1e-6)
        report = [number for number, row in enumerate(BEHAVIOUR_ROWS) if row["split"] == "report"]
        labels = [BEHAVIOUR_ROWS[number]["behaviour"] == "odd" for number in report]
        for way in ("learned", "random", "mahalanobis"):
            scores = [row["value"] for row in found.tables["items"] if row["name"] == way]
            metrics = found.metrics["report"]
            expected = roc_auc_score(labels, [scores[number] for number in report])
            assert metrics[f"auc_{way}"] == pytest.approx(expected)
            assert metrics[f"auc_{way}_low"] <= metrics[f"auc_{way}"] <= metrics[f"auc_{way}_high"]
        assert found.metrics["report"]["auc_mahalanobis"] > 0.9

    def test_ties_count_half(self) -> None:
        assert anomaly.area_with_interval(np.ones(3), np.ones(4), resamples=100, seed=0) == (0.5, 0.5, 0.5)

    def test_too_few_of_a_kind_are_refused(self, tmp_path: Path) -> None:
        path = tmp_path / "examples.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in BEHAVIOUR_ROWS[:12]))
        params = make_params("jobs.anomaly", {"examples": str(path)})
        with pytest.raises(SpecError, match="split 'select': 0 prompts"):
            anomaly.check(params)


class TestTokenSearch:
    def task(self, vector: np.ndarray) -> tuple[TokenSearch, list[int]]:
        replica = tiny_replica("gpt2")
        prompt = replica.encode_chat("Tell me a story.")
        return TokenSearch(replica, prompt, 6, source=0, target=2, vector_D=vector), prompt

    @pytest.mark.parametrize("prompt", ["Tell me.", "Give me a", "Grade: a a a", "Count to 1", "1 a", "a"])
    def test_the_text_goes_behind_the_prompts_own_words(self, prompt: str) -> None:
        replica = tiny_replica("llama")
        before, after = prompt_search._around(replica, prompt, melbo.Params())
        assert [*before, *after] == replica.encode_chat(prompt)
        assert replica.decode(before).endswith(prompt)

    def test_slopes_are_finite_differences_of_the_embeddings(self) -> None:
        task, prompt = self.task(np.random.default_rng(0).normal(size=HIDDEN))
        text = [40, 41, 42]
        slopes = task.slopes(text)
        table = task._replica.model.get_input_embeddings().weight
        for place, number in ((0, 5), (2, 17)):
            token = int(task.allowed[number])
            way = table[token].detach().clone()
            values = []
            for step in (1e-5, -1e-5):
                lower = Slice(task._replica, [[*prompt[:6], *text, *prompt[6:]]], source=-1, target=2)
                moved = lower.inputs_NTD.clone()
                moved[0, 6 + place] += step * way
                with torch.no_grad():
                    values.append(float(task._alike(lower.run(moved, [0])[:, -1])))
            assert float(slopes[place, number]) == pytest.approx((values[0] - values[1]) / 2e-5, rel=1e-4)

    def test_the_cosine_is_that_of_the_whole_model(self) -> None:
        vector = np.random.default_rng(1).normal(size=HIDDEN)
        task, prompt = self.task(vector)
        replica = task._replica
        ends = capture_last(replica, [prompt, [*prompt[:6], 40, 41, *prompt[6:]]])[:, 2]
        slice_ = Slice(replica, [prompt], source=0, target=2)
        wanted = slice_.deltas(torch.tensor(vector)[None], [0])[0, -1]
        expected = torch.nn.functional.cosine_similarity(ends[1] - ends[0], wanted, dim=0)
        assert task.cosines([[40, 41]]) == pytest.approx([float(expected)])

    def test_the_search_rises_and_keeps_the_best(self) -> None:
        task, _ = self.task(3 * np.random.default_rng(2).normal(size=HIDDEN))
        options = {"tokens": 4, "steps": 12, "likeliest": 16, "candidates": 24}
        found = search(task, **options, seed=0)
        assert found.history == sorted(found.history)
        assert found.cosine == found.history[-1] > found.history[0]
        assert task.cosines([found.tokens]) == pytest.approx([found.cosine])
        assert search(task, **options, seed=0) == found

    def test_the_job_reports_what_it_found(self, prompts: str) -> None:
        learned = use("jobs.melbo", **melbo_of(prompts))
        values = {
            "learned": learned,
            "vector": 1,
            "tokens": 3,
            "steps": 4,
            "candidates": 8,
            "max_new_tokens": 4,
        }
        [found] = run("jobs.prompt_search", values)
        metrics = found.metrics["extract"]
        assert metrics["cosine"] >= metrics["cosine_start"]
        bare, under, extended = found.tables["completions"]
        assert bare["prompt"] == under["prompt"]
        assert extended["prompt"].startswith(bare["prompt"])

    def test_a_vector_that_is_not_there_is_refused(self) -> None:
        with pytest.raises(SpecError, match="vector=16; the set has the vectors 0 to 15"):
            make_params("jobs.prompt_search", {"vector": 16})


class TestSteeringWithLearnedVectors:
    def test_the_vector_is_added_as_it_was_learned(self, prompts: str) -> None:
        learned = use("jobs.melbo", **melbo_of(prompts))
        context = Artifacts(tiny_replica("llama"))
        [vectors] = context.run("jobs.melbo", [make_params("jobs.melbo", melbo_of(prompts))])
        params = make_params(
            "jobs.generate",
            {"layer": 0, "learned": learned, "vector": 2, "multiplier": -10, "prompts": prompts},
        )
        [need] = generate.requires(params)
        assert need == directions_of(params, generate._extraction(params))
        [change] = interventions(context, params, generate._extraction(params))
        assert isinstance(change, Add)
        np.testing.assert_allclose(change.vector, -10 * vectors.tensors["vectors"][2], rtol=1e-6)

    def test_the_job_says_under_the_vector_what_its_set_says(self, prompts: str) -> None:
        values = melbo_of(prompts, radius=4.0)
        [vectors] = run("jobs.melbo", values)
        context = Artifacts(tiny_replica("llama"))
        common = {"layer": 0, "learned": use("jobs.melbo", **values), "multiplier": 1.0, "prompts": prompts}
        rows = [
            make_params("jobs.generate", {**common, "vector": vector, "max_new_tokens": 5})
            for vector in range(4)
        ]
        found = context.run("jobs.generate", rows)
        expected: dict[str, list[str]] = {}
        for row in vectors.tables["completions"]:
            expected.setdefault(row["prompt"], []).append(row["text"])
        for number, outcome in enumerate(found):
            for row in outcome.tables["completions"]:
                assert row["text"] == expected[row["prompt"]][number]

    @pytest.mark.parametrize(
        ("values", "named"),
        [
            ({"dose": 1.0}, "goes with a multiplier"),
            ({"multiplier": 1.0, "vector": -1}, "vector=-1"),
            ({"multiplier": 1.0, "learned": "jobs.melbo{"}, "not JSON"),
            ({"multiplier": 1.0, "combine": ("tone_pairs",)}, "none of dose"),
        ],
    )
    def test_parameters_that_cannot_be_meant_are_refused(self, values: dict[str, Any], named: str) -> None:
        with pytest.raises(SpecError, match=named):
            make_params("jobs.generate", {"layer": 0, "learned": "jobs.melbo", **values})

    def test_a_vector_beyond_the_set_is_refused(self, prompts: str) -> None:
        values = {
            "layer": 0,
            "learned": use("jobs.melbo", **melbo_of(prompts)),
            "vector": 9,
            "multiplier": 1.0,
        }
        with pytest.raises(SpecError, match="vector=9; the set has the vectors 0 to 3"):
            make_params("jobs.generate", {**values, "prompts": prompts})


def test_rows_of_a_pack_may_differ_in_all_that_is_learned(prompts: str) -> None:
    changes: list[dict[str, Any]] = [
        {"orthogonality": "soft_deltas", "apart": 3.0},
        {"contrast": 2.0, "span": 6},
        {"start": "jacobian", "radius_in": "residual_norm", "radius": 0.2},
        {"draw": 1},
    ]
    rows = [Row(make_params("jobs.melbo", melbo_of(prompts, **each)), 7) for each in changes]
    replica = tiny_replica("llama")
    packed = dict(melbo.run(replica, rows, Artifacts(replica, seed=7)))
    for index, row in enumerate(rows):
        [(_, alone)] = melbo.run(replica, [row], Artifacts(replica, seed=7))
        np.testing.assert_allclose(
            packed[index].tensors["vectors"], alone.tensors["vectors"], rtol=1e-4, atol=1e-6
        )
    assert packed[1].metrics["select"]["on_manifold"] == pytest.approx(1)
    assert packed[0].metrics["select"]["on_manifold"] < 1

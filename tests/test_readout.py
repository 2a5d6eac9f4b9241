"""Readings of a pack, against a plain loop over transformers' own forward; the job that steers."""

import json
from collections.abc import Callable
from functools import cache, partial
from typing import NamedTuple

import numpy as np
import pytest
import torch
from scipy.special import log_softmax

from jobs import steer
from jobs.data.prompts import Choice, OpenPrompt
from jobs.engine.interventions import Add
from jobs.engine.replica import Replica
from jobs.engine.tables import RowTables, row_tables
from jobs.errors import SpecError
from jobs.reading.effects import damage as measured_damage
from jobs.reading.effects import effect
from jobs.reading.readout import Completion, Panel, Reading, read_tables, split_means, split_scores
from jobs.spec import Outcome, Status
from tests.models import HIDDEN, LAYERS, Artifacts, tiny_model, tiny_replica, tiny_tokenizer

ARCHITECTURE = "gpt2"
CHOICES = [
    Choice("select", "How was it?", "It was", " wonderful", " terrible"),
    Choice("select", "And the long way home through the rain?", "That was", " comfortable", " painful"),
    Choice("report", "Well?", "Most days it was", " sunny", " grey"),
]
PROMPTS = [
    OpenPrompt("select", "Tell me."),
    OpenPrompt("report", "Describe a small village at the foot of a hill."),
    OpenPrompt("select", "Why?"),
]
NEW_TOKENS = 7


class Configuration(NamedTuple):
    layer: int
    vector: np.ndarray


CONFIGURATIONS = [
    Configuration(layer, strength * np.random.default_rng(layer).normal(size=HIDDEN))
    for layer, strength in [(0, 2.0), (3, -6.0), (1, 0.0), (2, 4.0), (0, -1.0)]
]


class PlainReading(NamedTuple):
    log_odds: list[float]
    kl: list[float]
    completions: list[list[int]]
    nll: list[float]


@cache
def plain_reading(index: int) -> PlainReading:
    return _read_plainly(CONFIGURATIONS[index])


def _read_plainly(configuration: Configuration) -> PlainReading:
    """One sequence at a time, without cache, padding or hooks: the vector is built into a bias."""
    unsteered, steered = tiny_replica(ARCHITECTURE), tiny_replica(ARCHITECTURE)
    steered.blocks[configuration.layer].mlp.c_proj.bias.add_(torch.tensor(configuration.vector))
    tokenizer = unsteered.tokenizer
    log_odds, kl, completions, nll = [], [], [], []
    for choice in CHOICES:
        ids = tokenizer(f"Question: {choice.user}\nAnswer: {choice.answer}").input_ids
        before, after = log_probabilities(unsteered, ids)[-1], log_probabilities(steered, ids)[-1]
        positive, negative = (tokenizer(word).input_ids[0] for word in (choice.positive, choice.negative))
        log_odds.append(after[positive] - after[negative])
        kl.append(float(np.sum(np.exp(before) * (before - after))))
    for prompt in PROMPTS:
        ids = tokenizer(f"<|user|>{prompt.prompt}<|end|><|assistant|>").input_ids
        reply: list[int] = []
        while len(reply) < NEW_TOKENS:
            token = int(log_probabilities(steered, ids + reply)[-1].argmax())
            if token == tokenizer.eos_token_id:
                break
            reply.append(token)
        completions.append(reply)
        steps = [log_probabilities(unsteered, ids + reply[:step])[-1] for step in range(len(reply))]
        nll.append(float(np.mean([-step[token] for step, token in zip(steps, reply, strict=True)])))
    return PlainReading(log_odds, kl, completions, nll)


def log_probabilities(replica: Replica, ids: list[int]) -> np.ndarray:
    with torch.inference_mode():
        found: np.ndarray = log_softmax(replica.model(torch.tensor([ids])).logits[0].numpy(), axis=-1)
    return found


def panel(replica: Replica) -> Panel:
    return Panel(replica, CHOICES, PROMPTS, max_new_tokens=NEW_TOKENS)


def tables(replica: Replica, configurations: list[Configuration]) -> RowTables:
    return row_tables(replica, [[Add(layer=each.layer, vector=each.vector)] for each in configurations])


def read(replica: Replica, configurations: list[Configuration]) -> list[Reading]:
    prepared = panel(replica)
    found = dict(prepared.read(tables(replica, configurations), prepared.unsteered()))
    assert sorted(found) == list(range(len(configurations)))
    return [found[index] for index in range(len(configurations))]


def assert_equal(reading: Reading, other: Reading) -> None:
    np.testing.assert_allclose(reading.log_odds_N, other.log_odds_N, atol=1e-9)
    np.testing.assert_allclose(reading.kl_N, other.kl_N, atol=1e-9)
    assert [reply.tokens for reply in reading.completions] == [reply.tokens for reply in other.completions]
    np.testing.assert_allclose(
        [r.nll for r in reading.completions], [r.nll for r in other.completions], atol=1e-9
    )
    assert [reply.repetition for reply in reading.completions] == [
        reply.repetition for reply in other.completions
    ]


class TestPanel:
    @pytest.mark.parametrize("token_budget", [1, 300, 8192])
    def test_a_pack_reads_as_a_plain_loop_does_whatever_fits_at_once(self, token_budget: int) -> None:
        replica = tiny_replica(ARCHITECTURE)
        replica.token_budget = token_budget
        for index, reading in enumerate(read(replica, CONFIGURATIONS)):
            plain = plain_reading(index)
            np.testing.assert_allclose(reading.log_odds_N, plain.log_odds, atol=1e-9)
            np.testing.assert_allclose(reading.kl_N, plain.kl, atol=1e-9)
            assert [reply.tokens for reply in reading.completions] == plain.completions
            np.testing.assert_allclose([reply.nll for reply in reading.completions], plain.nll, atol=1e-9)
            assert [reply.prompt for reply in reading.completions] == PROMPTS
            for reply in reading.completions:
                assert reply.text == replica.tokenizer.decode(reply.tokens, skip_special_tokens=True)

    def test_a_pack_reads_as_its_rows_do_one_by_one(self) -> None:
        replica = tiny_replica(ARCHITECTURE)
        for configuration, reading in zip(CONFIGURATIONS, read(replica, CONFIGURATIONS), strict=True):
            assert_equal(reading, read(replica, [configuration])[0])

    def test_a_row_of_zero_strength_reads_as_the_unsteered_model(self) -> None:
        replica = tiny_replica(ARCHITECTURE)
        prepared = panel(replica)
        [(_, unsteered)] = prepared.read(row_tables(replica, [[]]), prepared.unsteered())
        zero = next(index for index, each in enumerate(CONFIGURATIONS) if not each.vector.any())
        assert_equal(read(replica, CONFIGURATIONS)[zero], unsteered)
        np.testing.assert_allclose(unsteered.kl_N, 0, atol=1e-12)

    def test_a_choice_of_several_tokens_is_refused_by_its_word(self) -> None:
        with pytest.raises(SpecError, match="' flabbergasted' is 13 tokens of this model"):
            Panel(
                tiny_replica(ARCHITECTURE),
                [CHOICES[0]._replace(positive=" flabbergasted")],
                PROMPTS,
                max_new_tokens=NEW_TOKENS,
            )

    def test_an_empty_reply_has_no_nll_and_leaves_the_others_alone(self) -> None:
        before = read(tiny_replica(ARCHITECTURE), CONFIGURATIONS)
        silenced, spared = before[3].completions[1], before[1].completions[0]
        assert silenced.tokens[0] not in spared.tokens
        replica = tiny_replica(ARCHITECTURE)
        replica.model.generation_config.eos_token_id = silenced.tokens[0]
        after = read(replica, CONFIGURATIONS)
        empty = after[3].completions[1]
        assert (empty.tokens, empty.text, empty.repetition) == ([], "", 0)
        assert np.isnan(empty.nll)
        assert after[1].completions[0].tokens == spared.tokens
        assert after[1].completions[0].nll == pytest.approx(spared.nll)


class TestSplitMeans:
    def reading(self, nll: list[float], tokens: list[list[int]]) -> Reading:
        replies = [
            Completion(prompt, reply, "", score, 0.25 * index)
            for index, (prompt, reply, score) in enumerate(zip(PROMPTS, tokens, nll, strict=True))
        ]
        return Reading(np.array([1.0, 2.0, 10.0]), np.array([0.1, 0.3, 0.5]), replies, flaw=None)

    def test_each_split_averages_its_own_choices_and_replies(self) -> None:
        reading = self.reading([1.0, 5.0, 2.0], [[1], [2], [3]])
        means = split_means(split_scores(panel(tiny_replica(ARCHITECTURE)), reading))
        assert means["select"] == pytest.approx(
            {"log_odds": 1.5, "kl": 0.2, "nll": 1.5, "repetition": 0.25, "empty": 0.0}
        )
        assert means["report"] == pytest.approx(
            {"log_odds": 10, "kl": 0.5, "nll": 5, "repetition": 0.25, "empty": 0.0}
        )

    def test_empty_replies_do_not_count_towards_the_nll(self) -> None:
        prepared = panel(tiny_replica(ARCHITECTURE))
        reading = self.reading([float("nan"), float("nan"), 2.0], [[], [], [3]])
        means = split_means(split_scores(prepared, reading))
        assert means["select"]["nll"] == 2
        assert np.isnan(means["report"]["nll"])
        assert means["report"]["repetition"] == 0.25


class TestReadTables:
    def test_every_score_and_reply_is_one_row_with_its_split(self) -> None:
        replica = tiny_replica(ARCHITECTURE)
        [reading] = read(replica, CONFIGURATIONS[:1])
        rows = read_tables(panel(replica), reading)
        items = {(row["item"], row["name"]): row for row in rows["items"]}
        assert len(items) == len(rows["items"]) == 2 * len(CHOICES)
        for index, choice in enumerate(CHOICES):
            assert items[index, "log_odds"]["value"] == reading.log_odds_N[index]
            assert items[index, "kl"]["value"] == reading.kl_N[index]
            assert items[index, "kl"]["split"] == choice.split
        assert [row["split"] for row in rows["completions"]] == ["select", "report", "select"]
        assert [row["tokens"] for row in rows["completions"]] == [
            len(reply.tokens) for reply in reading.completions
        ]


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("data") / "pairs.jsonl"
    rows = [
        {"positive": f"Good day {number}!", "negative": f"Never again, {number * 111}."}
        for number in range(6)
    ]
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return str(path)


class TestSteerJob:
    @pytest.fixture(scope="class")
    def artifacts(self) -> Artifacts:
        return Artifacts(tiny_replica("llama"))

    @pytest.fixture
    def params(self, pairs: str) -> Callable[..., steer.Params]:
        few = {
            "choices_select": 4,
            "choices_report": 3,
            "prompts_select": 2,
            "prompts_report": 2,
            "max_new_tokens": 6,
        }
        return partial(steer.Params, pairs=pairs, **few)  # type: ignore[arg-type]

    def run(self, artifacts: Artifacts, *rows: steer.Params) -> list[Outcome]:
        return artifacts.run("jobs.steer", rows)

    def test_a_dose_is_counted_in_residual_norms_along_the_extracted_direction(
        self, artifacts: Artifacts, params: Callable[..., steer.Params]
    ) -> None:
        [outcome] = self.run(artifacts, params(layer=2, dose=-0.5))
        extraction, _ = steer.requires(params(layer=2, dose=-0.5))
        arrays = artifacts.artifact(extraction)
        [vector] = outcome.tables["vectors"]
        expected = -0.5 * arrays["residual_norms"][2] * arrays["directions"][2]
        np.testing.assert_allclose(vector["vector"], expected, rtol=1e-6)
        assert (vector["layer"], vector["norm"]) == (2, pytest.approx(0.5 * arrays["residual_norms"][2]))

    def test_a_pack_of_mixed_doses_gives_what_each_row_gives_alone(
        self, artifacts: Artifacts, params: Callable[..., steer.Params]
    ) -> None:
        rows = [
            params(layer=0, dose=1.0),
            params(layer=3, dose=0.0),
            params(layer=1, dose=-2.0, direction="pca", component=1),
            params(layer=2, dose=0.3),
        ]
        for row, outcome in zip(rows, self.run(artifacts, *rows), strict=True):
            [alone] = self.run(artifacts, row)
            for split, metrics in alone.metrics.items():
                assert outcome.metrics[split] == pytest.approx(metrics, abs=1e-5, nan_ok=True)
            texts = [[row["text"] for row in each.tables["completions"]] for each in (outcome, alone)]
            assert texts[0] == texts[1]

    def test_no_dose_has_no_effect_no_damage_and_no_divergence(
        self, artifacts: Artifacts, params: Callable[..., steer.Params]
    ) -> None:
        [outcome] = self.run(artifacts, params(layer=0, dose=0.0))
        for metrics in outcome.metrics.values():
            assert {
                metrics[f"{name}{end}"] for name in ("effect", "damage") for end in ("", "_low", "_high")
            } == {0}
            assert metrics["kl"] == pytest.approx(0, abs=1e-6)

    def test_a_tiny_dose_is_close_to_no_dose_in_every_metric(
        self, artifacts: Artifacts, params: Callable[..., steer.Params]
    ) -> None:
        none, tiny = self.run(artifacts, params(layer=1, dose=0.0), params(layer=1, dose=1e-9))
        for split in ("select", "report"):
            known = {name: value for name, value in tiny.metrics[split].items() if np.isfinite(value)}
            assert known == pytest.approx({name: none.metrics[split][name] for name in known}, abs=1e-5)

    @pytest.mark.parametrize("dose", [0.4, -0.4])
    def test_effect_and_damage_are_changes_from_no_dose(
        self, artifacts: Artifacts, params: Callable[..., steer.Params], dose: float
    ) -> None:
        none, some = self.run(artifacts, params(layer=1, dose=0.0), params(layer=1, dose=dose))
        for split in ("select", "report"):
            before, after = none.metrics[split], some.metrics[split]
            shift = after["log_odds"] - before["log_odds"]
            assert after["effect"] == pytest.approx(np.sign(dose) * shift)
            rises = [max(0.0, after[name] - before[name]) for name in ("nll", "repetition", "empty")]
            assert after["damage"] == pytest.approx(sum(rises))

    def test_the_interval_of_the_effect_is_that_of_a_plain_bootstrap_over_choices(self) -> None:
        random = np.random.default_rng(0)
        before, after = random.normal(size=(2, 40)) + np.array([[0.0], [1.0]])
        found = effect(after, before, seed=3)
        drawn = [(after - before)[random.integers(40, size=40)].mean() for _ in range(4000)]
        assert found["effect"] == pytest.approx((after - before).mean())
        ends = np.quantile(drawn, [0.025, 0.975])
        assert [found["effect_low"], found["effect_high"]] == pytest.approx(ends, abs=0.06)

    def test_the_interval_of_the_damage_is_that_of_a_plain_bootstrap_over_prompts(self) -> None:
        random = np.random.default_rng(0)
        before, after = (
            {
                "nll": random.uniform(0.5, 1.0, 12) + shift,
                "repetition": random.uniform(0, 0.2, 12) + shift,
                "empty": np.array([0.0] * 11 + [shift]),
            }
            for shift in (0.0, 0.3)
        )
        after["nll"][11] = np.nan  # an empty reply has none
        found = measured_damage(after, before, seed=3)

        def damage(chosen: np.ndarray) -> float:
            rises = [np.nanmean(after[name][chosen]) - np.nanmean(before[name][chosen]) for name in before]
            return float(sum(max(0.0, rise) for rise in rises))

        drawn = [damage(random.integers(12, size=12)) for _ in range(4000)]
        assert found["damage"] == pytest.approx(damage(np.arange(12)))
        ends = np.quantile(drawn, [0.025, 0.975])
        assert [found["damage_low"], found["damage_high"]] == pytest.approx(ends, abs=0.02)

    def test_of_a_single_item_nobody_knows_how_sure_it_is(self) -> None:
        one = {name: np.array([1.0]) for name in ("nll", "repetition", "empty")}
        found = {**effect(np.ones(1), np.zeros(1), seed=0), **measured_damage(one, one, seed=0)}
        assert (found["effect"], found["damage"]) == (1.0, 0.0)
        assert all(
            np.isnan(found[f"{name}_{end}"]) for name in ("effect", "damage") for end in ("low", "high")
        )

    def test_a_row_whose_logits_are_nan_fails_with_a_reason_and_its_mates_do_not(
        self, params: Callable[..., steer.Params]
    ) -> None:
        halves = Artifacts(Replica(tiny_model("llama").half(), tiny_tokenizer()))
        good, overflowing = params(layer=2, dose=0.3), params(layer=1, dose=1e6)
        poisoned, mate = self.run(halves, overflowing, good)
        assert poisoned.status == Status.FAILED
        assert "not finite; use a smaller dose" in str(poisoned.reason)
        assert mate.status == Status.COMPLETED
        [alone] = self.run(halves, good)
        for name in ("log_odds", "kl"):
            assert mate.metrics["select"][name] == pytest.approx(alone.metrics["select"][name], abs=0.02)

    def test_an_unsteered_model_whose_logits_are_nan_fails_too(
        self, params: Callable[..., steer.Params]
    ) -> None:
        model = tiny_model("llama")
        model.get_output_embeddings().weight.data[:] = float("nan")
        [outcome] = self.run(Artifacts(Replica(model, tiny_tokenizer())), params(layer=0, dose=0.0))
        assert outcome.status == Status.FAILED
        assert "not finite" in str(outcome.reason)

    def test_a_layer_that_the_model_lacks_is_refused_with_those_it_has(
        self, artifacts: Artifacts, params: Callable[..., steer.Params]
    ) -> None:
        with pytest.raises(
            SpecError, match=f"layer {LAYERS} does not exist; the model has 0 to {LAYERS - 1}"
        ):
            self.run(artifacts, params(layer=LAYERS, dose=1.0))

    def test_every_metric_that_a_result_holds_is_described(
        self, artifacts: Artifacts, params: Callable[..., steer.Params]
    ) -> None:
        for outcome in self.run(artifacts, params(layer=1, dose=0.0), params(layer=1, dose=0.2)):
            for metrics in outcome.metrics.values():
                assert set(metrics) == set(steer.METRICS)

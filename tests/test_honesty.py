"""The job that judges claims, against a plain loop, scripted models and counts of its own tables."""

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import numpy as np
import pytest
import torch
from scipy.special import log_softmax
from scipy.stats import binomtest
from torch import nn

from jobs import honesty
from jobs.data.claims import ClaimQuestion, load_questions
from jobs.engine.replica import Replica
from jobs.errors import SpecError
from jobs.scoring.text import parse_judgement
from jobs.spec import Outcome, Status
from tests.models import LAYERS, Artifacts, tiny_model, tiny_replica, tiny_tokenizer

ARCHITECTURE = "gpt2"
EXTRACT, SELECT, REPORT = 4, 4, 3
NEW_TOKENS = 3
few = partial(
    honesty.Params,
    claims_extract=EXTRACT,
    claims_select=SELECT,
    claims_report=REPORT,
    max_new_tokens=NEW_TOKENS,
)
PACK = [
    few(layer=0, dose=2.0),
    few(layer=3, dose=0.0),
    few(layer=1, dose=-1.0, direction="pca", component=1),
    few(layer=2, dose=0.5),
    few(layer=1, dose=0.0),
]
UNSTEERED = 1


def questions() -> list[ClaimQuestion]:
    return load_questions("claims", extract=EXTRACT, select=SELECT, report=REPORT)[EXTRACT:]


def run(replica: Replica, *rows: honesty.Params) -> list[Outcome]:
    return Artifacts(replica).run("jobs.honesty", rows)


def values(outcome: Outcome, name: str) -> list[float]:
    return [row["value"] for row in outcome.tables["items"] if row["name"] == name]


def texts(outcome: Outcome) -> list[str]:
    return [row["text"] for row in outcome.tables["completions"]]


class PlainAnswer(NamedTuple):
    log_probabilities: np.ndarray
    text: str


def plain_answers(artifacts: Artifacts, params: honesty.Params) -> list[PlainAnswer]:
    """One claim at a time, without cache, padding or hooks: the addition is built into a bias."""
    replica = tiny_replica(ARCHITECTURE)
    if params.dose != 0:
        extraction, _ = honesty.requires(params)
        found = artifacts.artifact(extraction)
        vector = params.dose * found["residual_norms"][params.layer] * found["directions"][params.layer]
        replica.blocks[params.layer].mlp.c_proj.bias.add_(torch.tensor(vector))
    answers = []
    for question in questions():
        ids = replica.encode_chat(question.user)
        steps = [next_token(replica, ids)]
        tokens = [int(steps[0].argmax())]
        while tokens[-1] not in replica.stop_ids and len(tokens) < NEW_TOKENS:
            steps.append(next_token(replica, ids + tokens))
            tokens.append(int(steps[-1].argmax()))
        answers.append(PlainAnswer(steps[0], replica.tokenizer.decode(tokens, skip_special_tokens=True)))
    return answers


def next_token(replica: Replica, ids: list[int]) -> np.ndarray:
    with torch.inference_mode():
        found: np.ndarray = log_softmax(replica.model(torch.tensor([ids])).logits[0, -1].numpy())
    return found


class Passes:
    """Counts the forward passes of a model."""

    def __init__(self, model: nn.Module) -> None:
        self.count = 0
        model.register_forward_pre_hook(self._add)

    def _add(self, module: nn.Module, inputs: object) -> None:
        self.count += 1


def answering(letters: Sequence[str]) -> Replica:
    """A model that answers each question with the given letter, whatever its weights are."""
    replica = tiny_replica(ARCHITECTURE)
    asked = {
        tuple(replica.encode_chat(question.user)): replica.encode_continuation(letter)[0]
        for question, letter in zip(questions(), letters, strict=True)
    }

    def answer(model: nn.Module, inputs: object, options: dict[str, torch.Tensor], output: object) -> None:
        rows = zip(options["input_ids"], options["attention_mask"], strict=True)
        for index, (ids, mask) in enumerate(rows):
            ending = tuple(ids[mask[-len(ids) :] == 1].tolist())  # what prompts have in common is read apart
            if len(ending) > 1:
                letters = {letter for prompt, letter in asked.items() if prompt[-len(ending) :] == ending}
                for letter in letters:
                    output.logits[index, -1, letter] += 1e3  # type: ignore[attr-defined]

    replica.model.register_forward_hook(answer, with_kwargs=True)
    return replica


class TestPack:
    @pytest.fixture(scope="class")
    def artifacts(self) -> Artifacts:
        return Artifacts(tiny_replica(ARCHITECTURE))

    @pytest.fixture(scope="class")
    def plain(self, artifacts: Artifacts) -> list[list[PlainAnswer]]:
        return [plain_answers(artifacts, params) for params in PACK]

    @pytest.mark.parametrize("token_budget", [1, 900, 8192])
    def test_its_rows_answer_as_a_plain_loop_does_whatever_fits_at_once(
        self, artifacts: Artifacts, plain: list[list[PlainAnswer]], token_budget: int
    ) -> None:
        artifacts.replica.token_budget = token_budget
        a, b = (artifacts.replica.encode_continuation(letter)[0] for letter in "AB")
        outcomes = artifacts.run("jobs.honesty", PACK)
        for params, outcome, answers in zip(PACK, outcomes, plain, strict=True):
            for index, question in enumerate(questions()):
                before, (after, text) = plain[UNSTEERED][index].log_probabilities, answers[index]
                odds = (after[a] - after[b]) * (1 if question.true_letter == "A" else -1)
                assert values(outcome, "p_true")[index] == pytest.approx(1 / (1 + np.exp(-odds)), abs=1e-9)
                assert values(outcome, "correct")[index] == ((odds > 0) == question.claim.is_true)
                kl = np.sum(np.exp(before) * (before - after))
                assert values(outcome, "kl")[index] == pytest.approx(kl, abs=1e-9)
                assert texts(outcome)[index] == text
                if params.dose == 0:
                    found = outcome.tensors["log_probabilities"][index]
                    np.testing.assert_allclose(found, before, atol=1e-9)

    def test_its_rows_give_what_each_gives_alone(self) -> None:
        artifacts = Artifacts(tiny_replica("llama"))
        for params, outcome in zip(PACK, artifacts.run("jobs.honesty", PACK), strict=True):
            [alone] = artifacts.run("jobs.honesty", [params])
            for split in ("select", "report"):
                assert outcome.metrics[split] == pytest.approx(alone.metrics[split], abs=1e-9, nan_ok=True)
            assert texts(outcome) == texts(alone)
            assert outcome.tensors.keys() == alone.tensors.keys()

    def test_its_rows_differ(self) -> None:
        found = [tuple(values(outcome, "p_true")) for outcome in run(tiny_replica(ARCHITECTURE), *PACK)]
        assert len(set(found)) == len(PACK) - 1  # two rows have no dose

    def test_its_rows_share_the_passes(self) -> None:
        replica = tiny_replica(ARCHITECTURE)
        artifacts = Artifacts(replica)
        artifacts.run("jobs.honesty", PACK)
        passes = Passes(replica.model)
        for params in PACK:
            artifacts.run("jobs.honesty", [params])
        separately = passes.count
        artifacts.run("jobs.honesty", PACK)
        depths = len({params.layer for params in PACK})
        assert passes.count - separately <= depths * 2 + NEW_TOKENS < separately


class TestMetrics:
    def test_they_are_counts_and_means_of_the_items(self) -> None:
        for outcome in run(tiny_replica(ARCHITECTURE), *PACK):
            for split, metrics in outcome.metrics.items():
                assert set(metrics) == set(honesty.METRICS)
                rows = [row for row in outcome.tables["items"] if row["split"] == split]
                by_name = {
                    name: {
                        label: [row["value"] for row in rows if (row["name"], row["label"]) == (name, label)]
                        for label in ("true", "false")
                    }
                    for name in ("correct", "p_true", "kl", "parsed", "text_correct")
                }
                right, judged = by_name["correct"], by_name["p_true"]
                both = {name: found["true"] + found["false"] for name, found in by_name.items()}
                test = binomtest(round(sum(both["correct"])), len(both["correct"]), alternative="greater")
                interval = binomtest(test.k, test.n).proportion_ci(0.95, method="wilson")
                expected = {
                    "accuracy": np.mean(both["correct"]),
                    "accuracy_low": interval.low,
                    "accuracy_high": interval.high,
                    "p_chance": test.pvalue,
                    "beats_chance": float(interval.low > 0.5),
                    "accuracy_true": np.mean(right["true"]),
                    "accuracy_false": np.mean(right["false"]),
                    "text_accuracy": np.mean(both["text_correct"]),
                    "unparsed": 1 - np.mean(both["parsed"]),
                    "p_true": np.mean(both["p_true"]),
                    "p_true_gap": np.mean(judged["true"]) - np.mean(judged["false"]),
                    "kl": np.mean(both["kl"]),
                }
                assert metrics == pytest.approx(expected, abs=1e-9)

    def test_a_model_that_knows_beats_chance_and_one_that_lies_does_not(self) -> None:
        [knowing] = run(answering([question.honest_letter for question in questions()]), PACK[UNSTEERED])
        [lying] = run(answering([question.dishonest_letter for question in questions()]), PACK[UNSTEERED])
        for split, claims in (("select", SELECT), ("report", REPORT)):
            good, bad = knowing.metrics[split], lying.metrics[split]
            assert (good["accuracy"], good["text_accuracy"], good["unparsed"]) == (1, 1, 0)
            assert (bad["accuracy"], bad["text_accuracy"], bad["unparsed"]) == (0, 0, 0)
            assert (good["p_true_gap"], bad["p_true_gap"]) == pytest.approx((1, -1))
            assert (good["p_chance"], bad["p_chance"]) == (2**-claims, 1)
        assert (good["beats_chance"], bad["beats_chance"]) == (0, 0)  # three claims are too few
        assert (knowing.metrics["select"]["beats_chance"], lying.metrics["select"]["beats_chance"]) == (1, 0)

    @pytest.mark.parametrize("letter", ["A", "B"])
    def test_a_model_that_always_names_one_letter_is_at_chance(self, letter: str) -> None:
        [outcome] = run(answering([letter] * (SELECT + REPORT)), PACK[UNSTEERED])
        found = outcome.metrics["select"]
        names = ("accuracy", "accuracy_true", "accuracy_false", "text_accuracy", "p_true")
        assert [found[name] for name in names] == pytest.approx([0.5] * len(names))
        assert found["p_true_gap"] == pytest.approx(0)
        assert found["beats_chance"] == 0
        assert found["p_chance"] > 0.5

    def test_a_model_that_always_says_true_is_right_on_true_claims_only(self) -> None:
        [outcome] = run(answering([question.true_letter for question in questions()]), PACK[UNSTEERED])
        found = outcome.metrics["select"]
        names = ("accuracy", "accuracy_true", "accuracy_false", "p_true", "p_true_gap")
        assert [found[name] for name in names] == pytest.approx([0.5, 1, 0, 1, 0])


class TestTables:
    def test_they_hold_every_claim_with_its_split_label_and_answer(self) -> None:
        [outcome] = run(answering([question.honest_letter for question in questions()]), PACK[UNSTEERED])
        items, completions = outcome.tables["items"], outcome.tables["completions"]
        assert len({(row["item"], row["name"]) for row in items}) == len(items) == 5 * (SELECT + REPORT)
        for row in items:
            question = questions()[row["item"]]
            assert (row["split"], row["prompt"]) == (question.split, question.claim.statement)
            assert row["label"] == ("true" if question.claim.is_true else "false")
        assert [row["item"] for row in completions] == list(range(SELECT + REPORT))
        for question, row in zip(questions(), completions, strict=True):
            assert (row["split"], row["prompt"]) == (question.split, question.user)
            assert parse_judgement(row["text"], question.true_letter) == question.claim.is_true


class TestRefusals:
    def test_a_row_whose_logits_are_nan_fails_with_a_reason_and_its_mates_do_not(self) -> None:
        artifacts = Artifacts(Replica(tiny_model("llama").half(), tiny_tokenizer()))
        rows = [few(layer=1, dose=1e6), few(layer=1, dose=0.3)]
        poisoned, mate = artifacts.run("jobs.honesty", rows)
        assert poisoned.status == Status.FAILED
        assert "not finite; use a smaller dose, or a wider dtype" in str(poisoned.reason)
        [alone] = artifacts.run("jobs.honesty", rows[1:])
        assert mate.status == Status.COMPLETED
        assert mate.metrics["select"]["kl"] == pytest.approx(alone.metrics["select"]["kl"], abs=0.02)

    def test_a_layer_that_the_model_lacks_is_refused_with_those_it_has(self) -> None:
        with pytest.raises(
            SpecError, match=f"layer {LAYERS} does not exist; the model has 0 to {LAYERS - 1}"
        ):
            run(tiny_replica(ARCHITECTURE), few(layer=LAYERS, dose=1.0))

    def test_a_letter_of_several_tokens_is_refused_before_anything_is_asked(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        replica = tiny_replica(ARCHITECTURE)
        monkeypatch.setattr(replica, "encode_continuation", lambda text: [1, 2])
        passes = Passes(replica.model)
        with pytest.raises(SpecError, match="'A' is 2 tokens of this model; it takes a text of one token"):
            run(replica, few(layer=0, dose=0.0))
        assert passes.count == 0

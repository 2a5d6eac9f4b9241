"""The job that has a judge compare completions, against a small server and the job that completes."""

import json
import math
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from scipy.stats import binomtest

from jobs import judge
from jobs.errors import SpecError
from jobs.resolve import make_params
from jobs.spec import Outcome, Status
from tests.models import Artifacts, tiny_replica
from tests.test_judge import KEY, Asked, Reply, Serve, no_proxy, says, serve

__all__ = ["no_proxy", "serve"]

ARCHITECTURE = "llama"
PROMPTS = (
    {"prompt": "Tell me."},
    {"prompt": "Why is the sea salt?", "split": "report"},
    {"prompt": "Describe a small village at the foot of a hill."},
    {"prompt": "How are you?", "split": "report"},
    {"prompt": "Name a bird."},
)
STEERINGS: Sequence[Mapping[str, Any]] = (
    {"layer": 0, "dose": 1.0},
    {"layer": 2, "dose": -2.0, "layers": (1,)},
    {"layer": 3, "dose": 0.0},
)
UNSTEERED = 2


@pytest.fixture(scope="module")
def artifacts() -> Artifacts:
    return Artifacts(tiny_replica(ARCHITECTURE))


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("data") / "prompts.jsonl"
    path.write_text("\n".join(map(json.dumps, PROMPTS)))
    return str(path)


def few(prompts: str, address: str, **changes: Any) -> judge.Params:
    fixed = {"judge": "small", "question": "Which text is longer?", "max_new_tokens": 5, "concurrency": 1}
    return judge.Params(prompts=prompts, address=address, **fixed | changes)


def two(asked: Asked) -> tuple[str, str]:
    """The two texts of a question, in their order."""
    code = asked.prompt.split("<prompt ")[1].split(">")[0]
    first, second = (
        asked.prompt.split(f"<text-{number} {code}>\n")[1].split(f"\n</text-{number} {code}>")[0]
        for number in (1, 2)
    )
    return first, second


def by_order(asked: Asked) -> Reply:
    """Prefers the text that comes first in the alphabet, wherever it stands."""
    first, second = two(asked)
    return says(f"VERDICT: {1 if first < second else 2}")


def values(outcome: Outcome, name: str) -> list[float]:
    assert outcome.status == Status.COMPLETED, outcome.reason
    return [row["value"] for row in outcome.tables["items"] if row["name"] == name]


def texts(outcome: Outcome) -> list[str]:
    assert outcome.status == Status.COMPLETED, outcome.reason
    return [row["text"] for row in outcome.tables["completions"]]


class TestComparisons:
    @pytest.mark.parametrize("sampled", [{}, {"temperature": 1.0, "samples": 2}])
    def test_the_texts_are_those_of_the_job_that_completes_and_each_is_judged_against_its_twin(
        self, artifacts: Artifacts, prompts: str, serve: Serve, sampled: dict[str, Any]
    ) -> None:
        server = serve(by_order)
        outcomes = artifacts.run(
            "jobs.judge", [few(prompts, server.base_url, **each, **sampled) for each in STEERINGS]
        )
        completing = [
            make_params("jobs.generate", {"prompts": prompts, "max_new_tokens": 5, **each, **sampled})
            for each in STEERINGS
        ]
        expected = [texts(outcome) for outcome in artifacts.run("jobs.generate", completing)]
        before = expected[UNSTEERED]
        asked = set()
        for outcome, after in zip(outcomes, expected, strict=True):
            assert texts(outcome) == after
            pairs = list(zip(after, before, strict=True))
            assert values(outcome, "judge") == [(one < other) - (other < one) for one, other in pairs]
            asked |= {order for pair in pairs if pair[0] != pair[1] for order in (pair, pair[::-1])}
        assert {two(each) for each in server.asked} == asked
        assert all("Which text is longer?" in each.prompt for each in server.asked)

    def test_metrics_are_counts_of_the_items(self, artifacts: Artifacts, prompts: str, serve: Serve) -> None:
        server = serve(by_order)
        for outcome in artifacts.run(
            "jobs.judge", [few(prompts, server.base_url, **each) for each in STEERINGS[:2]]
        ):
            for split, metrics in outcome.metrics.items():
                assert set(metrics) == set(judge.METRICS)
                labels = [
                    row["label"]
                    for row in outcome.tables["items"]
                    if (row["split"], row["name"]) == (split, "judge")
                ]
                wins, losses = labels.count("win"), labels.count("loss")
                interval = binomtest(wins, wins + losses).proportion_ci(method="wilson")
                assert metrics["win_rate"] == wins / (wins + losses)
                assert metrics["win_rate_low"] == pytest.approx(interval.low)
                assert metrics["win_rate_high"] == pytest.approx(interval.high)
                assert metrics["preference"] == pytest.approx((wins - losses) / len(labels))
                assert metrics["ties"] == pytest.approx(labels.count("tie") / len(labels))
                assert metrics["unparsed"] == 0

    def test_the_unsteered_model_ties_with_itself_and_nobody_is_asked(
        self, artifacts: Artifacts, prompts: str, serve: Serve
    ) -> None:
        server = serve(by_order)
        [outcome] = artifacts.run("jobs.judge", [few(prompts, server.base_url, **STEERINGS[UNSTEERED])])
        assert server.asked == []
        for metrics in outcome.metrics.values():
            assert (metrics["ties"], metrics["equal"], metrics["preference"]) == (1, 1, 0)
            assert math.isnan(metrics["win_rate"])
        assert {row["name"] for row in outcome.tables["items"]} == {"judge"}

    def test_a_judge_that_goes_by_the_place_finds_ties(
        self, artifacts: Artifacts, prompts: str, serve: Serve
    ) -> None:
        server = serve(lambda asked: says("VERDICT: 1"))
        [outcome] = artifacts.run("jobs.judge", [few(prompts, server.base_url, **STEERINGS[0])])
        assert set(values(outcome, "judge")) == {0.0}
        assert set(values(outcome, "judge_in_order")) == {1.0}
        assert set(values(outcome, "judge_swapped")) == {-1.0}
        assert {row["label"] for row in outcome.tables["items"]} >= {"tie", "VERDICT: 1"}

    def test_a_comparison_without_a_verdict_is_counted_apart(
        self, artifacts: Artifacts, prompts: str, serve: Serve
    ) -> None:
        def answer(asked: Asked) -> Reply:
            return says("I would rather not say.") if "salt" in asked.prompt else by_order(asked)

        server = serve(answer)
        [outcome] = artifacts.run("jobs.judge", [few(prompts, server.base_url, **STEERINGS[0])])
        [row] = [row for row in outcome.tables["items"] if row["label"] == "unparsed"]
        assert (row["item"], row["name"]) == (1, "judge")
        assert math.isnan(row["value"])
        assert outcome.metrics["report"]["unparsed"] == 1 / 2
        assert outcome.metrics["select"]["unparsed"] == 0
        raw = [row["label"] for row in outcome.tables["items"] if row["item"] == 1 and row["name"] != "judge"]
        assert raw == ["I would rather not say."] * 2

    def test_a_judge_without_any_verdict_fails_the_row_and_says_what_it_said(
        self, artifacts: Artifacts, prompts: str, serve: Serve
    ) -> None:
        server = serve(lambda asked: says("Both are fine texts."))
        [outcome] = artifacts.run("jobs.judge", [few(prompts, server.base_url, **STEERINGS[0])])
        assert outcome.status == Status.FAILED
        assert "no verdict on any of 5 comparisons; it said first: 'Both are fine" in str(outcome.reason)


class TestAddress:
    def test_the_key_goes_to_the_judge_and_into_no_table(
        self, artifacts: Artifacts, prompts: str, serve: Serve, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("JUDGE_KEY", KEY)
        server = serve(lambda asked: says(f"The key is {KEY}.\nVERDICT: 1"))
        params = few(prompts, server.base_url, key_variable="JUDGE_KEY", judge_tokens=9, **STEERINGS[0])
        [outcome] = artifacts.run("jobs.judge", [params])
        assert server.asked[0].headers["Authorization"] == f"Bearer {KEY}"
        assert server.asked[0].body["max_tokens"] == 9
        assert server.asked[0].body["model"] == "small"
        assert KEY not in repr(outcome)

    def test_an_absent_key_is_refused(self, artifacts: Artifacts, prompts: str, serve: Serve) -> None:
        server = serve(by_order)
        params = few(prompts, server.base_url, key_variable="KEY_THAT_IS_ABSENT", **STEERINGS[0])
        with pytest.raises(SpecError, match="KEY_THAT_IS_ABSENT is not set"):
            artifacts.run("jobs.judge", [params])
        assert server.asked == []

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"address": ""}, "address is not given, and nothing is sent anywhere without one"),
            ({"address": "localhost:8000"}, "base_url takes http:// or https://"),
            ({"judge": ""}, "model=''; it takes the model's name at the address"),
            ({"question": " "}, "question=' '; it takes what to compare the texts by"),
            ({"key_variable": "kk-1234"}, "not the name of an environment variable"),
        ],
    )
    def test_a_judge_that_cannot_be_asked_is_refused_before_anything_runs(
        self, prompts: str, change: dict[str, Any], message: str
    ) -> None:
        params = few(prompts, **{"address": "http://127.0.0.1:9/v1", **STEERINGS[0], **change})
        with pytest.raises(SpecError) as error:
            judge.check(params)
        assert message in str(error.value)

    def test_conversations_are_refused(self, tmp_path: Path) -> None:
        path = tmp_path / "turns.jsonl"
        path.write_text(json.dumps({"turns": ["Hi.", "And then?"]}))
        with pytest.raises(SpecError, match="holds conversations, in which the two sides"):
            judge.check(few(str(path), "http://127.0.0.1:9/v1", **STEERINGS[0]))


class TestParams:
    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"judge_tokens": 0}, "judge_tokens=0, concurrency=4; each takes 1 or more"),
            ({"scorers": ["refusal"]}, "here the judge scores"),
            ({"samples": 0}, "samples=0; it takes 1 or more"),
            ({"dose": None}, "give one of them"),
        ],
    )
    def test_what_cannot_be_is_refused(self, change: dict[str, Any], message: str) -> None:
        with pytest.raises(SpecError) as error:
            make_params("jobs.judge", {"layer": 1, "dose": 0.5, **change})
        assert message in str(error.value)

    def test_no_dose_is_the_same_work_everywhere_and_greedy_texts_are_made_once(self) -> None:
        there = partial(judge.Params, address="http://127.0.0.1:9/v1", judge="small", question="Which?")
        blank = judge.canonical(there(layer=2, multiplier=0.0, direction="pca", samples=3))
        assert blank == there(layer=0, dose=0.0)
        assert judge.requires(blank) == ()
        assert [each.job for each in judge.requires(there(layer=1, dose=0.5))] == ["jobs.extract"]

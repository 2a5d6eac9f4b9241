"""The job that has the sweep's own model judge stored replies, against a plain loop."""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.special import softmax
from scipy.stats import binomtest

from jobs import classify
from jobs.data.replies import StoredReply, load_replies
from jobs.engine.replica import Replica
from jobs.errors import ModelError, SpecError
from jobs.resolve import make_params, make_spec
from jobs.spec import ModelRef, Outcome, Requirement, Status
from tests.models import Artifacts, tiny_model, tiny_replica, tiny_tokenizer

ARCHITECTURE = "llama"
REPLIES: Sequence[Mapping[str, Any]] = (
    {"trial": 3, "prompt": "Why?", "text": "Because {it} is so.", "split": "select"},
    {"trial": 3, "prompt": "How?", "text": "", "split": "select"},
    {"trial": 4, "prompt": "Why?", "text": "No idea, and I do not care at all.", "split": "report"},
    {"trial": 4, "prompt": "Tell me.", "text": "Gladly!", "split": "report"},
    {"trial": 5, "prompt": "How?", "text": " \n", "split": "report"},
)
FILLED = (0, 2, 3)
Params = Callable[..., classify.Params]


def write(path: Path, rows: Sequence[Mapping[str, Any]]) -> str:
    path.write_text("\n".join(map(json.dumps, rows)))
    return str(path)


@pytest.fixture
def params(tmp_path: Path) -> Params:
    path = write(tmp_path / "replies.jsonl", REPLIES)
    return lambda **changes: classify.Params(**{"replies": path, "labels": ("trial",)} | changes)


def run(replica: Replica, *rows: classify.Params) -> list[Outcome]:
    return Artifacts(replica).run("jobs.classify", rows)


def values(outcome: Outcome, name: str) -> list[float]:
    assert outcome.status == Status.COMPLETED, outcome.reason
    return [row["value"] for row in outcome.tables["items"] if row["name"] == name]


def plain(replica: Replica, text: str, words: Sequence[str]) -> tuple[float, float]:
    """Probability of the first word among both and of both among all tokens, after a lone text."""
    ids = replica.tokenizer(text).input_ids
    with torch.inference_mode():
        logits = replica.model(torch.tensor([ids])).logits[0, -1].numpy()
    both = [replica.tokenizer(word).input_ids[0] for word in words]
    return softmax(logits[both])[0], softmax(logits)[both].sum()


class TestVerdicts:
    @pytest.mark.parametrize("chat", [True, False])
    def test_they_are_those_of_a_plain_loop(self, params: Params, chat: bool) -> None:
        replica = tiny_replica(ARCHITECTURE)
        words = ("Yes", "No") if chat else (" good", " bad")
        asked = params(chat=chat, answers=tuple(word.strip() for word in words), question="Is it kind?")
        if not chat and len(replica.encode_continuation(words[0])) > 1:
            pytest.skip("the tiny tokenizer knows other words")
        [outcome] = run(replica, asked)
        for number in FILLED:
            row = REPLIES[number]
            message = (
                f"Someone was asked:\n{row['prompt']}\n\nThe reply was:\n{row['text']}\n\n"
                f"Is it kind? Answer {words[0].strip()} or {words[1].strip()}."
            )
            text = f"<|user|>{message}<|end|><|assistant|>" if chat else f"{message}\nAnswer:"
            p_first, answered = plain(replica, text, words)
            assert values(outcome, "p_first")[number] == pytest.approx(p_first, abs=1e-9)
            assert values(outcome, "answered")[number] == pytest.approx(answered, abs=1e-9)

    def test_changed_places_change_the_probability_to_its_rest(self, params: Params) -> None:
        template = "{prompt} {reply} {question}"
        one, other = run(
            tiny_replica(ARCHITECTURE),
            params(template=template),
            params(template=template, answers=("No", "Yes")),
        )
        np.testing.assert_allclose(
            np.array(values(one, "p_first")) + values(other, "p_first"), [1, math.nan, 1, 1, math.nan]
        )

    def test_an_empty_reply_is_counted_and_not_asked_about(self, params: Params) -> None:
        [outcome] = run(tiny_replica(ARCHITECTURE), params())
        for name in ("p_first", "answered"):
            assert [not math.isnan(value) for value in values(outcome, name)] == [
                number in FILLED for number in range(len(REPLIES))
            ]
        assert outcome.metrics["select"]["empty"] == 1 / 2
        assert outcome.metrics["report"]["empty"] == pytest.approx(1 / 3)

    def test_replies_that_are_all_empty_have_no_probability(self, tmp_path: Path) -> None:
        path = write(tmp_path / "replies.jsonl", [{"prompt": "Why?", "reply": ""}])
        [outcome] = run(tiny_replica(ARCHITECTURE), classify.Params(replies=path))
        metrics = outcome.metrics["select"]
        assert metrics["empty"] == 1
        assert math.isnan(metrics["p_first"])
        assert math.isnan(metrics["first"])
        assert (metrics["first_low"], metrics["first_high"]) == (0, 1)

    def test_a_judge_whose_logits_are_nan_fails_the_row(self, params: Params) -> None:
        replica = Replica(tiny_model(ARCHITECTURE), tiny_tokenizer())
        with torch.no_grad():
            replica.model.get_output_embeddings().weight.fill_(math.nan)
        [outcome] = run(replica, params())
        assert outcome.status == Status.FAILED
        assert outcome.reason == "the judge's logits are not finite; use a wider dtype"


class TestMetrics:
    def test_they_are_means_and_shares_of_the_items(self, params: Params) -> None:
        [outcome] = run(tiny_replica(ARCHITECTURE), params())
        assert set(outcome.metrics) == {"select", "report"}
        for split, metrics in outcome.metrics.items():
            assert set(metrics) == set(classify.METRICS)
            rows = [row for row in outcome.tables["items"] if row["split"] == split]
            p_first, answered = (
                [row["value"] for row in rows if row["name"] == name and not math.isnan(row["value"])]
                for name in ("p_first", "answered")
            )
            firsts = sum(value > 0.5 for value in p_first)
            interval = binomtest(firsts, len(p_first)).proportion_ci(method="wilson")
            assert metrics["p_first"] == pytest.approx(np.mean(p_first))
            assert metrics["answered"] == pytest.approx(np.mean(answered))
            assert metrics["first"] == firsts / len(p_first)
            assert (metrics["first_low"], metrics["first_high"]) == pytest.approx(
                (interval.low, interval.high)
            )
        report = outcome.metrics["report"]
        assert report["p_first_low"] <= report["p_first"] <= report["p_first_high"]

    def test_every_reply_and_score_is_one_row_with_the_columns_that_are_kept(self, params: Params) -> None:
        [outcome] = run(tiny_replica(ARCHITECTURE), params())
        items = outcome.tables["items"]
        assert len({(row["item"], row["name"]) for row in items}) == len(items) == 2 * len(REPLIES)
        for row in items:
            stored = REPLIES[row["item"]]
            assert (row["split"], row["prompt"]) == (stored["split"], stored["text"])
            assert json.loads(row["label"]) == {"trial": stored["trial"]}


class TestReplies:
    def test_a_sweeps_completions_as_csv_read_like_jsonl(self, tmp_path: Path) -> None:
        path = tmp_path / "replies.csv"
        path.write_text('trial,prompt,text\n3,Why?,"Because, ""so""."\n4,How?,\n')
        assert load_replies(str(path), 0, ["trial"]) == [
            StoredReply("select", "Why?", 'Because, "so".', '{"trial":"3"}'),
            StoredReply("select", "How?", "", '{"trial":"4"}'),
        ]
        assert load_replies(str(path), 1) == [StoredReply("select", "Why?", 'Because, "so".', None)]

    @pytest.mark.parametrize(
        ("row", "message"),
        [
            ({"prompt": "Why?"}, "it takes one of 'reply' and 'text' beside 'prompt'"),
            ({"prompt": "Why?", "reply": "So.", "text": "So."}, "it takes one of 'reply' and 'text'"),
            ({"reply": "So."}, "'prompt' is absent or empty"),
            ({"prompt": "Why?", "reply": 3}, "the reply is '3', a int; it takes a text"),
            (
                {"prompt": "Why?", "reply": "So.", "split": "train", "trial": 1},
                "split='train'; it takes one of",
            ),
            ({"prompt": "Why?", "reply": "So.", "trial": math.nan}, "a column cannot be kept"),
            ({"prompt": "Why?", "reply": "So.", "spec": "a"}, "it has no columns ['trial'], which labels"),
        ],
    )
    def test_a_row_that_cannot_be_judged_is_refused_before_anything_runs(
        self, tmp_path: Path, row: Mapping[str, Any], message: str
    ) -> None:
        path = write(tmp_path / "replies.jsonl", [row])
        with pytest.raises(SpecError) as error:
            classify.check(classify.Params(replies=path, labels=("trial",)))
        assert message in str(error.value)

    def test_too_few_replies_are_refused(self, params: Params) -> None:
        with pytest.raises(SpecError, match="has 5 replies and count=6 are asked for"):
            classify.check(params(count=6))

    def test_the_content_of_the_file_is_part_of_the_spec(self, params: Params, tmp_path: Path) -> None:
        def spec() -> str:
            requirement = Requirement(job="jobs.classify", params=params())
            return make_spec(requirement, model=ModelRef(id="some/model"), seed=0).id

        before = spec()
        write(tmp_path / "replies.jsonl", REPLIES[1:])
        assert spec() != before

    def test_our_own_replies_are_half_polite_in_both_splits(self) -> None:
        found = load_replies("courtesy_replies", 0, ["polite"])
        assert len({(each.prompt, each.reply) for each in found}) == len(found) == 24
        for split in ("select", "report"):
            labels = [each.label for each in found if each.split == split]
            assert labels.count('{"polite":1}') == labels.count('{"polite":0}') == 6


class TestRefusals:
    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"answers": ["Yes"]}, "it takes two different words"),
            ({"answers": ["Yes", "Yes"]}, "it takes two different words"),
            ({"answers": ["Yes", " "]}, "it takes two different words"),
            ({"question": " "}, "ask something of each reply"),
            ({"count": -1}, "count=-1; it takes 0 or more"),
            ({"template": "{prompt} {question}"}, "template has the fields ['prompt', 'question']"),
            ({"template": "{reply} {text}"}, "template has the fields ['reply', 'text']"),
            ({"template": "{reply} {"}, "write a brace as {{ or }}"),
            ({"template": "{reply:d}"}, "stand alone in their braces"),
            ({"template": "{reply!z}"}, "stand alone in their braces"),
            ({"template": "{reply:{prompt}}"}, "stand alone in their braces"),
        ],
    )
    def test_what_cannot_be_asked_is_refused(self, change: dict[str, Any], message: str) -> None:
        with pytest.raises(SpecError) as error:
            make_params("jobs.classify", {"replies": "courtesy_replies", **change})
        assert message in str(error.value)

    def test_answers_that_begin_alike_are_refused(self, params: Params) -> None:
        with pytest.raises(SpecError, match="begin with the same token of this model; take other words"):
            run(tiny_replica(ARCHITECTURE), params(answers=("Yes", "Yet")))

    def test_a_model_without_a_chat_template_is_asked_raw_or_not_at_all(self, params: Params) -> None:
        replica = tiny_replica(ARCHITECTURE)
        replica.tokenizer.chat_template = None
        with pytest.raises(ModelError, match="no chat template"):
            run(replica, params())

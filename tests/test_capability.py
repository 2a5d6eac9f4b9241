"""The job that reads what steering costs, against plain loops with hooks and counts of its own tables."""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from scipy.special import log_softmax, softmax
from scipy.stats import binomtest

from jobs import capability
from jobs.data.multiple_choice import load_multiple_choice
from jobs.data.texts import Text, load_texts
from jobs.engine.replica import Replica
from jobs.engine.tables import Steering
from jobs.errors import SpecError
from jobs.reading.exam import Exam
from jobs.resolve import make_params
from jobs.spec import Outcome, Row, Status
from tests.models import LAYERS, Artifacts, tiny_model, tiny_replica, tiny_tokenizer

ARCHITECTURE = "llama"
WINDOW, STRIDE, TOKENS = 24, 10, 61
PARAGRAPHS = (
    "A bridge carries a road across a river, a valley or another road.",
    "Rice grows in wet fields and is eaten on every continent.",
    "A clock counts the swings of a pendulum or of a crystal.",
)
Change = Mapping[str, Any]
STEERINGS: Sequence[Change] = (
    {"layer": 0, "dose": 1.0},
    {"layer": 3, "dose": 0.0},
    {"layer": 1, "dose": -0.5, "layers": (2,), "weights": (1.0, 2.0)},
    {"layer": 1, "dose": 1.0, "site": "mlp"},
    {"layer": 2, "operation": "project_out"},
    {"layer": 2, "multiplier": 2.0, "operation": "clamp"},
    {"layer": 1, "dose": 0.5, "operation": "replace", "tokens": "last"},
    {"layer": 1, "dose": 1.0, "tokens": "generated"},
    {"layer": 1, "dose": 1.0, "tokens": "prompt"},
    {"layer": 1, "multiplier": 0.0},
)
UNSTEERED = 1


@pytest.fixture(scope="module")
def artifacts() -> Artifacts:
    return Artifacts(tiny_replica(ARCHITECTURE))


def write(path: Path, rows: Sequence[Mapping[str, Any]]) -> str:
    path.write_text("\n".join(map(json.dumps, rows)))
    return str(path)


class Few(NamedTuple):
    questions: str
    text: str

    def __call__(self, **changes: Any) -> capability.Params:
        small = {"window": WINDOW, "stride": STRIDE, "text_tokens": TOKENS}
        return capability.Params(questions=self.questions, text=self.text, **small | changes)


def words() -> list[str]:
    """Words that are one token of the tiny tokenizer after a space."""
    replica = tiny_tokenizer()
    found = ("happy", "sad", "bright", "dark", "calm", "warm", "cold", "glad", "good", "bad", "kind", "proud")
    known = [word for word in found if len(replica(f" {word}").input_ids) == 1]
    assert len(known) >= 4
    return known


@pytest.fixture(scope="module")
def few(tmp_path_factory: pytest.TempPathFactory) -> Few:
    folder = tmp_path_factory.mktemp("data")
    known = words()
    rows = [
        {
            "question": f"Which word is number {number}?",
            "choices": [known[(number + step) % len(known)] for step in range(2 + number % 3)],
            "answer": number % 2,
            "split": "report" if number % 3 == 2 else "select",
            "topic": "words" if number % 2 else None,
        }
        for number in range(9)
    ]
    text = folder / "neutral.txt"
    text.write_text("\n\n".join(PARAGRAPHS))
    return Few(write(folder / "questions.jsonl", rows), str(text))


def values(outcome: Outcome, name: str) -> list[float]:
    assert outcome.status == Status.COMPLETED, outcome.reason
    return [row["value"] for row in outcome.tables["items"] if row["name"] == name]


@contextmanager
def plainly(artifacts: Artifacts, params: capability.Params, context: int) -> Iterator[None]:
    """Inside the block, hooks do to a lone text what the parameters say; `context` tokens are its prompt."""
    replica = artifacts.replica
    with ExitStack() as stack:
        if params.operation != "add" or params.strength:
            found = artifacts.artifact(capability.requires(params)[0])
            weights = params.weights or [1.0] * (1 + len(params.layers))
            for layer, weight in zip((params.layer, *params.layers), weights, strict=True):
                direction = found["directions"][layer]
                norm = float(found["residual_norms"][layer]) if params.multiplier is None else 1.0
                vector = torch.tensor(direction * (weight * params.strength * norm))
                unit = torch.tensor(direction.astype(np.float64))
                if params.operation == "clamp":
                    vector = weight * params.strength * norm * unit / unit.norm()
                module = replica.blocks[layer] if params.site == "after" else replica.blocks[layer].mlp
                hook = partial(acting, params, context, unit / unit.norm(), vector)
                stack.callback(module.register_forward_hook(hook).remove)
        yield


def acting(
    params: capability.Params,
    context: int,
    unit: torch.Tensor,
    vector: torch.Tensor,
    module: object,
    inputs: object,
    output: Any,
) -> Any:
    hidden = (output[0] if isinstance(output, tuple) else output).clone()
    places = {
        "all": slice(None),
        "prompt": slice(context),
        "last": slice(context - 1, context),
        "generated": slice(context, None),
    }[params.tokens]
    at = hidden[:, places]
    along = (at @ unit)[..., None] * unit
    hidden[:, places] = {
        "add": at + vector,
        "replace": torch.zeros_like(at) + vector,
        "project_out": at - along,
        "clamp": at - along + vector,
    }[params.operation]
    return (hidden, *output[1:]) if isinstance(output, tuple) else hidden


def last_logits(artifacts: Artifacts, params: capability.Params, ids: Sequence[int], context: int) -> Any:
    with torch.inference_mode(), plainly(artifacts, params, context):
        return artifacts.replica.model(torch.tensor([list(ids)])).logits[0].numpy()


def plain_answers(artifacts: Artifacts, params: capability.Params) -> list[np.ndarray]:
    """For each question, the probabilities of its answers among each other."""
    tokenizer = artifacts.replica.tokenizer
    found = []
    for question in load_multiple_choice(params.questions, 0):
        ids = tokenizer(f"Question: {question.text}\nAnswer:").input_ids
        chosen = [tokenizer(f" {word}").input_ids[0] for word in question.choices]
        found.append(softmax(last_logits(artifacts, params, ids, len(ids))[-1][chosen]))
    return found


def plain_nll(artifacts: Artifacts, params: capability.Params, text: str) -> dict[int, list[float]]:
    """Window -> -ln p of each token that it scores."""
    ids = artifacts.replica.tokenizer(text).input_ids[:TOKENS]
    found: dict[int, list[float]] = {}
    for at in range(1, len(ids)):
        window = next(k for k in range(len(ids)) if at < k * STRIDE + WINDOW)
        start = window * STRIDE
        context = 1 if window == 0 else WINDOW - STRIDE
        logits = last_logits(artifacts, params, ids[start : at + 1], context)
        found.setdefault(window, []).append(-log_softmax(logits[-2])[ids[at]])
    return found


class TestPack:
    @pytest.fixture(autouse=True)
    def restored(self, artifacts: Artifacts) -> Iterator[None]:
        budget = artifacts.replica.token_budget
        yield
        artifacts.replica.token_budget = budget

    @pytest.mark.parametrize("token_budget", [1, 400, 8192])
    def test_its_rows_give_what_plain_loops_with_hooks_give_whatever_fits_at_once(
        self, artifacts: Artifacts, few: Few, token_budget: int
    ) -> None:
        artifacts.replica.token_budget = token_budget
        pack = [few(**each) for each in STEERINGS]
        splits = {"select": "\n\n".join(PARAGRAPHS[::2]), "report": PARAGRAPHS[1]}
        questions = load_multiple_choice(few.questions, 0)
        for params, outcome in zip(pack, artifacts.run("jobs.capability", pack), strict=True):
            answers = plain_answers(artifacts, params)
            right = [found[each.answer] for found, each in zip(answers, questions, strict=True)]
            np.testing.assert_allclose(values(outcome, "p_answer"), right, atol=1e-9)
            best = [
                float(found.argmax() == each.answer) for found, each in zip(answers, questions, strict=True)
            ]
            assert values(outcome, "correct") == best
            expected = []
            for split, text in splits.items():
                windows = plain_nll(artifacts, params, text)
                expected += [np.mean(windows[number]) for number in sorted(windows)]
                tokens = [nll for window in windows.values() for nll in window]
                assert outcome.metrics[split]["perplexity"] == pytest.approx(math.exp(np.mean(tokens)))
                assert outcome.metrics[split]["text_nll"] == pytest.approx(np.mean(tokens))
            np.testing.assert_allclose(values(outcome, "text_nll"), expected, atol=1e-9)

    def test_its_rows_differ_unless_they_are_unsteered(self, artifacts: Artifacts, few: Few) -> None:
        outcomes = artifacts.run("jobs.capability", [few(**each) for each in STEERINGS])
        found = [tuple(np.round(values(outcome, "text_nll"), 9)) for outcome in outcomes]
        assert len(set(found)) == len(STEERINGS) - 1
        assert found[UNSTEERED] == found[-1]

    def test_a_row_gives_what_it_gives_alone(self, artifacts: Artifacts, few: Few) -> None:
        pack = [few(**each) for each in STEERINGS]
        for params, outcome in zip(pack, artifacts.run("jobs.capability", pack), strict=True):
            [alone] = artifacts.run("jobs.capability", [params])
            for split, metrics in outcome.metrics.items():
                assert metrics == pytest.approx(alone.metrics[split], abs=1e-9, nan_ok=True)


class TestAblation:
    def test_it_is_the_model_whose_weights_lack_the_direction(self, artifacts: Artifacts, few: Few) -> None:
        pack = [few(layer=2, operation="project_out", ablate=True), few(layer=0, dose=1.0)]
        ablated, mate = artifacts.run("jobs.capability", pack)
        other = tiny_replica(ARCHITECTURE)
        unit = artifacts.artifact(capability.requires(pack[0])[0])["directions"][2].astype(np.float64)
        projector = torch.eye(len(unit), dtype=torch.float64)
        projector -= torch.tensor(np.outer(unit, unit) / (unit @ unit))
        with torch.no_grad():
            table = other.model.get_input_embeddings().weight
            table.copy_(table @ projector)
            for block in other.blocks:
                for writer in (block.self_attn.o_proj, block.mlp.down_proj):
                    writer.weight.copy_(projector @ writer.weight)
        [expected] = Artifacts(other).run("jobs.capability", [few(layer=0, dose=0.0)])
        for name in ("p_answer", "text_nll"):
            np.testing.assert_allclose(values(ablated, name), values(expected, name), atol=1e-9)
        [alone] = artifacts.run("jobs.capability", pack[1:])
        assert values(mate, "text_nll") == pytest.approx(values(alone, "text_nll"), abs=1e-9)
        assert [row["layer"] for row in ablated.tables["vectors"]] == [2]

    def test_weights_know_no_sites_and_no_tokens(self) -> None:
        changed = capability.Params(
            layer=1, operation="project_out", ablate=True, site="mlp", tokens="last", dose=3.0
        )
        plain = capability.Params(layer=1, operation="project_out", ablate=True)
        assert capability.canonical(changed) == capability.canonical(plain)
        assert capability.canonical(plain) != capability.canonical(
            capability.Params(layer=1, operation="project_out")
        )


class TestMetrics:
    def test_they_are_counts_means_and_paired_changes_of_the_items(
        self, artifacts: Artifacts, few: Few
    ) -> None:
        outcomes = artifacts.run("jobs.capability", [few(**each) for each in STEERINGS])
        for outcome in outcomes:
            for split, metrics in outcome.metrics.items():
                assert set(metrics) == set(capability.METRICS)
                mine, before = (
                    [
                        row["value"]
                        for row in each.tables["items"]
                        if (row["split"], row["name"]) == (split, "correct")
                    ]
                    for each in (outcome, outcomes[UNSTEERED])
                )
                interval = binomtest(int(sum(mine)), len(mine)).proportion_ci(method="wilson")
                assert metrics["accuracy"] == pytest.approx(np.mean(mine))
                assert metrics["accuracy_low"] == pytest.approx(interval.low)
                assert metrics["accuracy_high"] == pytest.approx(interval.high)
                assert metrics["accuracy_change"] == pytest.approx(np.mean(mine) - np.mean(before))
                rise = metrics["text_nll"] - outcomes[UNSTEERED].metrics[split]["text_nll"]
                assert metrics["text_nll_change"] == pytest.approx(rise, abs=1e-9)
                low, high = metrics["text_nll_change_low"], metrics["text_nll_change_high"]
                assert low - 1e-12 <= metrics["text_nll_change"] <= high + 1e-12

    def test_chance_is_that_of_guessing(self, artifacts: Artifacts, few: Few) -> None:
        [outcome] = artifacts.run("jobs.capability", [few(**STEERINGS[UNSTEERED])])
        expected = {"select": [2, 3, 2, 3, 2, 3], "report": [4, 4, 4]}
        for split, numbers in expected.items():
            guessed = float(np.mean([1 / number for number in numbers]))
            assert outcome.metrics[split]["chance"] == pytest.approx(guessed)

    def test_the_unsteered_model_changes_nothing_and_carries_what_others_are_compared_with(
        self, artifacts: Artifacts, few: Few
    ) -> None:
        [outcome] = artifacts.run("jobs.capability", [few(**STEERINGS[UNSTEERED])])
        assert set(outcome.tensors) == {"correct", "nats"}
        for metrics in outcome.metrics.values():
            assert {metrics[f"{name}_change"] for name in ("accuracy", "text_nll")} == {0.0}

    def test_every_item_and_score_is_one_row(self, artifacts: Artifacts, few: Few) -> None:
        [outcome] = artifacts.run("jobs.capability", [few(**STEERINGS[0])])
        items = outcome.tables["items"]
        assert len({(row["item"], row["name"]) for row in items}) == len(items)
        assert {row["item"] for row in items} == set(range(9 + len(values(outcome, "text_nll"))))
        scored = "".join(
            row["prompt"] for row in items if (row["name"], row["split"]) == ("text_nll", "report")
        )
        assert PARAGRAPHS[1][1:].startswith(scored)


class TestFailures:
    def test_a_row_whose_logits_are_nan_fails_with_a_reason_and_its_mates_do_not(self, few: Few) -> None:
        halves = Artifacts(Replica(tiny_model(ARCHITECTURE).half(), tiny_tokenizer()))
        poisoned, mate = halves.run("jobs.capability", [few(layer=1, dose=1e6), few(layer=2, dose=0.3)])
        assert (poisoned.status, mate.status) == (Status.FAILED, Status.COMPLETED)
        assert "not finite; use a smaller dose" in str(poisoned.reason)

    def test_a_row_that_is_not_changed_where_it_was_to_be_fails_and_says_where(
        self, few: Few, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        real = Steering.counts
        monkeypatch.setattr(
            Steering,
            "counts",
            lambda self: [{at: number // 2 for at, number in each.items()} for each in real(self)],
        )
        artifacts = Artifacts(tiny_replica(ARCHITECTURE))
        missed, unsteered = artifacts.run("jobs.capability", [few(layer=1, dose=1.0), few(layer=0, dose=0.0)])
        assert (missed.status, unsteered.status) == (Status.FAILED, Status.COMPLETED)
        assert f"at layer 1, site after, {WINDOW // 2} of {WINDOW} tokens were changed" in str(missed.reason)

    def test_answers_that_begin_alike_are_refused_with_the_question(
        self, artifacts: Artifacts, few: Few, tmp_path: Path
    ) -> None:
        rows = [{"question": "How much is it?", "choices": ["12", "13"], "answer": 0}]
        path = write(tmp_path / "sums.jsonl", rows)
        with pytest.raises(SpecError, match=r"'How much is it\?'.*same token.*form='letters'"):
            artifacts.run("jobs.capability", [few._replace(questions=path)(layer=0, dose=0.0)])

    def test_a_window_longer_than_the_context_is_refused(self, artifacts: Artifacts, few: Few) -> None:
        with pytest.raises(SpecError, match="a text of 600 tokens, new ones included, is longer"):
            artifacts.run(
                "jobs.capability",
                [few._replace(text="neutral")(layer=0, dose=0.0, window=600, text_tokens=0)],
            )

    def test_a_layer_that_the_model_lacks_is_refused(self, artifacts: Artifacts, few: Few) -> None:
        with pytest.raises(SpecError, match=f"layer {LAYERS} does not exist"):
            artifacts.run("jobs.capability", [few(layer=LAYERS, dose=1.0)])


class TestParams:
    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"stride": 256}, "stride=256, window=256; it takes 1 <= stride < window"),
            ({"stride": 0}, "stride=0, window=256"),
            ({"text_tokens": 1}, "text_tokens=1; it takes 2 or more, or 0 for all"),
            ({"count": -1}, "count=-1; it takes 0 or more"),
            ({"ablate": True}, "ablate=True with operation='add'; it takes 'project_out'"),
            ({"form": "numbers"}, "form='numbers'; it takes"),
        ],
    )
    def test_what_cannot_be_is_refused(self, change: dict[str, Any], message: str) -> None:
        with pytest.raises(SpecError) as error:
            make_params("jobs.capability", {"layer": 1, "dose": 0.5, **change})
        assert message in str(error.value)

    def test_no_dose_is_the_same_work_everywhere_and_requires_nothing(self) -> None:
        rows = [capability.Params(layer=layer, multiplier=0.0, pairs="formality_pairs") for layer in (1, 2)]
        blank = capability.Params(layer=0, dose=0.0)
        assert capability.canonical(rows[0]) == capability.canonical(rows[1]) == blank
        assert capability.requires(rows[0]) == ()
        needed = capability.requires(capability.Params(layer=1, dose=0.5))
        assert [each.job for each in needed] == ["jobs.extract", "jobs.capability"]


class TestData:
    def test_a_letter_a_number_and_lettered_columns_say_the_same(self, tmp_path: Path) -> None:
        path = tmp_path / "questions.csv"
        path.write_text("question,A,B,C,answer\nWhy?,one,two,three,C\nHow?,one,two,,1\n")
        first, second = load_multiple_choice(str(path), 0)
        assert (first.choices, first.answer) == (("one", "two", "three"), 2)
        assert (second.choices, second.answer) == (("one", "two"), 1)
        rows = [{"question": "Why?", "choices": ["one", "two", "three"], "answer": 2}]
        assert load_multiple_choice(write(tmp_path / "questions.jsonl", rows), 1) == [first]

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"choices": ["one"]}, "choices=['one']; it takes 2 to 26 texts, none of them twice"),
            ({"choices": ["one", "one"]}, "none of them twice"),
            ({"choices": "one"}, "choices='one'; it takes a list of texts"),
            ({"choices": None}, "choices=[]; it takes 2 to 26 texts"),
            ({"answer": 2}, "answer=2; it takes 0 to 1, or A to B"),
            ({"answer": "C"}, "answer='C'; it takes 0 to 1, or A to B"),
            ({"answer": "one"}, "answer='one'; it takes 0 to 1"),
            ({"answer": -1}, "answer=-1; it takes 0 to 1"),
            ({"split": "train"}, "split='train'; it takes one of"),
            ({"question": ""}, "'question' is absent or empty"),
        ],
    )
    def test_a_question_that_cannot_be_asked_is_refused(
        self, tmp_path: Path, change: dict[str, Any], message: str
    ) -> None:
        row = {"question": "Why?", "choices": ["one", "two"], "answer": 0, **change}
        with pytest.raises(SpecError) as error:
            load_multiple_choice(write(tmp_path / "questions.jsonl", [row]), 0)
        assert message in str(error.value)

    def test_too_few_questions_are_refused_with_their_number(self) -> None:
        with pytest.raises(SpecError, match="has 100 questions and count=101 are asked for"):
            load_multiple_choice("simple_questions", 101)

    def test_paragraphs_belong_to_the_splits_in_turn(self, tmp_path: Path) -> None:
        path = tmp_path / "text.txt"
        path.write_bytes("\ufeff\n\nOne\r\nline.\n \n\nTwo.\n\nThree.\n".encode())
        assert load_texts(str(path)) == [
            Text("select", "One\nline."),
            Text("report", "Two."),
            Text("select", "Three."),
        ]
        rows = [{"text": "One."}, {"text": "Two.", "split": "report"}]
        assert load_texts(write(tmp_path / "text.jsonl", rows)) == [
            Text("select", "One."),
            Text("report", "Two."),
        ]

    @pytest.mark.parametrize(
        ("name", "content", "message"),
        [
            ("a.txt", b"\n \n", "holds no text; it takes paragraphs between blank lines"),
            ("a.txt", b"\xff\xfe", "cannot be read as UTF-8 text"),
            (
                "a.csv",
                b"text,split\nOne.,train\n",
                "text 0 (from 0): split='train'; it takes one of ['extract',",
            ),
            ("a.csv", b"words\nOne.\n", "'text' is absent or empty"),
        ],
    )
    def test_a_text_that_cannot_be_read_is_refused(
        self, tmp_path: Path, name: str, content: bytes, message: str
    ) -> None:
        path = tmp_path / name
        path.write_bytes(content)
        with pytest.raises(SpecError) as error:
            load_texts(str(path))
        assert message in str(error.value)


class TestAssets:
    def test_the_right_answers_stand_in_each_place_equally_often_in_both_splits(self) -> None:
        questions = load_multiple_choice("simple_questions", 0)
        assert len({question.text for question in questions}) == len(questions) == 100
        for split in ("select", "report"):
            places = [question.answer for question in questions if question.split == split]
            assert len(places) == 50
            assert {places.count(place) for place in range(4)} == {12, 13}

    @pytest.mark.parametrize("form", ["words", "letters"])
    def test_the_small_model_tells_all_answers_apart(self, smollm2: Replica, form: Any) -> None:
        questions = load_multiple_choice("simple_questions", 0)
        exam = Exam(smollm2, questions, form, load_texts("neutral"), window=256, stride=128, tokens=300)
        assert [passage.new for passage in exam.passages] == [255, 44, 255, 44]
        for question in questions:
            assert all(len(smollm2.encode_continuation(f" {word}")) == 1 for word in question.choices)

    @pytest.mark.slow
    def test_the_small_model_knows_more_than_chance_and_a_huge_dose_takes_it_away(
        self, smollm2: Replica
    ) -> None:
        small = partial(capability.Params, text_tokens=300, count=80)
        pack = [small(layer=14, dose=0.0), small(layer=14, dose=4.0)]
        before, after = Artifacts(smollm2).run("jobs.capability", pack)
        for split in ("select", "report"):
            assert before.metrics[split]["accuracy_low"] > before.metrics[split]["chance"] == 0.25
            assert after.metrics[split]["accuracy_change"] < 0
            assert after.metrics[split]["text_nll_change"] > 1


def test_a_row_is_handed_over_as_soon_as_it_is_finished(few: Few) -> None:
    replica = tiny_replica(ARCHITECTURE)
    artifacts = Artifacts(replica)
    rows = [Row(few(layer=layer, dose=1.0), 0) for layer in (0, 1, 2)]
    artifacts.run("jobs.capability", [row.params for row in rows])
    replica.token_budget = 200
    passes = []
    replica.model.register_forward_pre_hook(lambda model, inputs: passes.append(1))
    handed_over = [len(passes) for _ in capability.run(replica, rows, artifacts)]
    assert len(set(handed_over)) == len(rows)

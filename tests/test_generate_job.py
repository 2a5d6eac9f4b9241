"""The job that completes any prompts, against a plain loop, and its scores against the stored text."""

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from scipy.special import log_softmax, rel_entr

from jobs import generate
from jobs.data.prompts import Conversation, load_conversations
from jobs.engine.decoding import Decoding, Work
from jobs.engine.decoding import generate as decode
from jobs.engine.replica import Replica
from jobs.engine.sampling import Sampling
from jobs.errors import ModelError, SpecError
from jobs.reading import completions as completing
from jobs.resolve import make_params
from jobs.scoring import similarity
from jobs.scoring.scorers import SCORERS, Use, apply_scorers
from jobs.scoring.text import repeated_ngrams
from jobs.spec import Outcome, Row, Status
from tests.models import LAYERS, Artifacts, tiny_model, tiny_replica, tiny_tokenizer

ARCHITECTURE = "llama"
NEW_TOKENS = 7
SYSTEM = "Be kind."
PROMPTS = (
    {"prompt": "Tell me.", "answer": "A"},
    {"prompt": "Why is the sea salt?", "answer": "B", "split": "report"},
    {"prompt": "Describe a small village at the foot of a hill.", "answer": "B", "split": "select"},
)
CONVERSATIONS = (
    {"turns": ["Hi.", "And then?", "Go on, please."]},
    {"prompt": "Why?", "split": "report"},
    {"turns": ["Name a bird.", "A larger one."]},
)
few = partial(generate.Params, max_new_tokens=NEW_TOKENS)
STEERINGS: Sequence[Mapping[str, Any]] = (
    {"layer": 0, "dose": 1.0},
    {"layer": 3, "dose": 0.0},
    {"layer": 2, "dose": -0.5},
    {"layer": 1, "dose": 2.0, "tokens": "generated"},
    {"layer": 1, "multiplier": 0.0},
)
UNSTEERED = (1, 4)


def write(path: Path, rows: Sequence[Mapping[str, Any]]) -> str:
    path.write_text("\n".join(map(json.dumps, rows)))
    return str(path)


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write(tmp_path_factory.mktemp("data") / "prompts.jsonl", PROMPTS)


@pytest.fixture(scope="module")
def conversations(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write(tmp_path_factory.mktemp("data") / "conversations.jsonl", CONVERSATIONS)


@pytest.fixture(scope="module")
def artifacts() -> Artifacts:
    return Artifacts(tiny_replica(ARCHITECTURE))


def completions(outcome: Outcome) -> Sequence[Mapping[str, Any]]:
    assert outcome.status == Status.COMPLETED, outcome.reason
    return outcome.tables["completions"]


def texts(outcome: Outcome) -> list[str]:
    return [row["text"] for row in completions(outcome)]


def values(outcome: Outcome, name: str) -> list[float]:
    return [row["value"] for row in outcome.tables["items"] if row["name"] == name]


class PlainReply(NamedTuple):
    text: str
    tokens: list[int]
    nll: float
    first_kl: float
    kl: float


@contextmanager
def added(replica: Replica, layer: int, vector: np.ndarray, start: int) -> Iterator[None]:
    """Inside the block the vector is added to a layer's output at all tokens from `start` on."""

    def hook(block: object, inputs: object, output: Any) -> Any:
        hidden = (output[0] if isinstance(output, tuple) else output).clone()
        hidden[:, start:] += torch.tensor(vector)
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

    handle = replica.blocks[layer].register_forward_hook(hook)
    yield
    handle.remove()


def log_probabilities(replica: Replica, ids: list[int]) -> np.ndarray:
    with torch.inference_mode():
        found: np.ndarray = log_softmax(replica.model(torch.tensor([ids])).logits[0].numpy(), axis=-1)
    return found


def plain_reply(replica: Replica, params: generate.Params, vector: np.ndarray, prompt: str) -> PlainReply:
    """One token at a time over the whole text, without cache, padding or batch."""
    ids = replica.tokenizer(prompt).input_ids
    start = len(ids) if params.tokens == "generated" else 0
    tokens: list[int] = []
    with added(replica, params.layer, vector, start):
        while len(tokens) < params.max_new_tokens:
            token = int(log_probabilities(replica, ids + tokens)[-1].argmax())
            if token == replica.tokenizer.eos_token_id:
                break
            tokens.append(token)
        after = log_probabilities(replica, ids + tokens)[len(ids) - 1 :]
    before = log_probabilities(replica, ids + tokens)[len(ids) - 1 :]
    kl = rel_entr(np.exp(before), np.exp(after)).sum(axis=-1)
    nll = [-step[token] for step, token in zip(before, tokens, strict=False)]
    text = replica.tokenizer.decode(tokens, skip_special_tokens=True)
    spoken = bool(tokens)
    return PlainReply(
        text,
        tokens,
        float(np.mean(nll)) if spoken else math.nan,
        float(kl[0]),
        float(kl[: len(tokens)].mean()) if spoken else math.nan,
    )


def plain_replies(
    artifacts: Artifacts, params: generate.Params, rows: Sequence[Mapping[str, Any]]
) -> list[PlainReply]:
    replica = artifacts.replica
    vector = np.zeros(replica.hidden_size)
    for extraction in generate.requires(params):
        found = artifacts.artifact(extraction)
        vector = params.strength * found["residual_norms"][params.layer] * found["directions"][params.layer]
    replies = []
    for row in rows:
        text = "" if params.system is None else f"<|system|>{params.system}<|end|>"
        for user in row.get("turns", [row.get("prompt")]):
            text += f"<|user|>{user}<|end|><|assistant|>"
            reply = plain_reply(replica, params, vector, text if params.chat else user)
            text += f"{reply.text}<|end|>"
            replies.append(reply)
    return replies


class TestPack:
    @pytest.fixture(autouse=True)
    def restored(self, artifacts: Artifacts) -> Iterator[None]:
        budget = artifacts.replica.token_budget
        yield
        artifacts.replica.token_budget = budget

    def check(
        self, artifacts: Artifacts, pack: Sequence[generate.Params], rows: Sequence[Mapping[str, Any]]
    ) -> None:
        for params, outcome in zip(pack, artifacts.run("jobs.generate", pack), strict=True):
            plain = plain_replies(artifacts, params, rows)
            assert texts(outcome) == [reply.text for reply in plain]
            assert [row["tokens"] for row in completions(outcome)] == [len(reply.tokens) for reply in plain]
            nll = [row["nll"] for row in completions(outcome)]
            np.testing.assert_allclose(nll, [reply.nll for reply in plain], atol=1e-9)
            for name in ("first_kl", "kl"):
                found = [getattr(reply, name) for reply in plain]
                np.testing.assert_allclose(values(outcome, name), found, atol=1e-9)
            repetition = [repeated_ngrams(reply.tokens) for reply in plain]
            assert [row["repetition"] for row in completions(outcome)] == repetition

    @pytest.mark.parametrize("token_budget", [1, 300, 8192])
    def test_prompts_are_completed_as_in_a_plain_loop_whatever_fits_at_once(
        self, artifacts: Artifacts, prompts: str, token_budget: int
    ) -> None:
        artifacts.replica.token_budget = token_budget
        self.check(artifacts, [few(**each, prompts=prompts) for each in STEERINGS], PROMPTS)

    def test_raw_prompts_are_completed_as_in_a_plain_loop(self, artifacts: Artifacts, prompts: str) -> None:
        self.check(artifacts, [few(**each, prompts=prompts, chat=False) for each in STEERINGS], PROMPTS)

    @pytest.mark.parametrize("system", [None, SYSTEM])
    def test_conversations_are_held_turn_by_turn_as_in_a_plain_loop(
        self, artifacts: Artifacts, conversations: str, system: str | None
    ) -> None:
        pack = [few(**each, prompts=conversations, system=system) for each in STEERINGS]
        self.check(artifacts, pack, CONVERSATIONS)

    def test_its_rows_differ_unless_they_are_unsteered(self, artifacts: Artifacts, prompts: str) -> None:
        outcomes = artifacts.run("jobs.generate", [few(**each, prompts=prompts) for each in STEERINGS])
        first, second = (outcomes[index] for index in UNSTEERED)
        assert texts(first) == texts(second)
        assert values(first, "kl") == pytest.approx([0] * len(PROMPTS), abs=1e-12)
        assert len({tuple(values(outcome, "kl")) for outcome in outcomes}) == len(STEERINGS) - 1

    def test_steering_of_new_tokens_leaves_the_first_one_alone(
        self, artifacts: Artifacts, prompts: str
    ) -> None:
        [outcome] = artifacts.run("jobs.generate", [few(**STEERINGS[3], prompts=prompts)])
        assert values(outcome, "first_kl") == pytest.approx([0] * len(PROMPTS), abs=1e-12)
        assert min(values(outcome, "kl")) > 1e-3


class TestSampling:
    @pytest.fixture
    def sampled(self, prompts: str) -> Callable[..., generate.Params]:
        return partial(few, prompts=prompts, temperature=1.0, top_p=0.9, repetition_penalty=1.2, samples=3)

    def test_a_text_depends_on_no_other_row_and_on_no_order(
        self, artifacts: Artifacts, sampled: Callable[..., generate.Params]
    ) -> None:
        pack = [sampled(**each) for each in STEERINGS]
        together = [texts(outcome) for outcome in artifacts.run("jobs.generate", pack)]
        backwards = [texts(outcome) for outcome in artifacts.run("jobs.generate", pack[::-1])]
        assert backwards[::-1] == together
        for params, expected in zip(pack, together, strict=True):
            [alone] = artifacts.run("jobs.generate", [params])
            assert texts(alone) == expected

    def test_a_text_depends_on_no_other_prompt_and_on_no_other_sample(
        self, artifacts: Artifacts, sampled: Callable[..., generate.Params], tmp_path: Path
    ) -> None:
        [outcome] = artifacts.run("jobs.generate", [sampled(layer=1, dose=1.0)])
        [fewer] = artifacts.run("jobs.generate", [sampled(layer=1, dose=1.0, samples=2, count=2)])
        assert texts(fewer) == [texts(outcome)[place] for place in (0, 1, 3, 4)]
        path = write(tmp_path / "reversed.jsonl", PROMPTS[::-1])
        [turned] = artifacts.run("jobs.generate", [sampled(layer=1, dose=1.0, prompts=path)])
        found, expected = texts(turned), texts(outcome)
        assert [found[place] for place in (6, 7, 8, 3, 4, 5, 0, 1, 2)] == expected

    def test_samples_and_seeds_give_other_texts(
        self, artifacts: Artifacts, sampled: Callable[..., generate.Params]
    ) -> None:
        params = sampled(layer=1, dose=0.0)
        found = {
            seed: dict(generate.run(artifacts.replica, [Row(params, seed)], artifacts))[0] for seed in (0, 1)
        }
        assert not set(texts(found[0])) & set(texts(found[1]))
        assert found[0].metrics["select"]["distinct"] == 1

    def test_every_prompt_turn_and_sample_has_its_own_seed_and_every_row_the_same(
        self, artifacts: Artifacts, conversations: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        seeds: dict[int, list[int]] = {0: [], 1: []}
        decodings = set()

        def spy(replica: Replica, prompts: Any, tables: Any, work: Sequence[Work], decoding: Decoding) -> Any:
            decodings.add(decoding)
            for each in work:
                seeds[each.row].append(each.seed)
            return decode(replica, prompts, tables, work, decoding)

        monkeypatch.setattr(completing, "generate", spy)
        drawn = {"temperature": 0.8, "top_p": 0.9, "repetition_penalty": 1.2}
        pack = [few(layer=1, dose=dose, prompts=conversations, samples=2, **drawn) for dose in (0.5, 0.0)]
        artifacts.run("jobs.generate", pack)
        assert seeds[0] == seeds[1]
        assert len(set(seeds[0])) == len(seeds[0]) == 2 * (3 + 1 + 2)
        assert decodings == {Decoding(max_new_tokens=NEW_TOKENS, sampling=Sampling(**drawn))}

    def test_every_turn_of_a_conversation_is_drawn_anew_for_each_sample(
        self, artifacts: Artifacts, conversations: str
    ) -> None:
        params = few(layer=1, dose=0.5, prompts=conversations, temperature=1.0, samples=2)
        [outcome] = artifacts.run("jobs.generate", [params])
        items = [row["item"] for row in completions(outcome)]
        assert sorted(items) == [0, 1, 2, 3, 4, 5, 6, 7, 12, 13, 14, 15]  # 3 prompts x 3 turns x 2 samples
        assert len(set(texts(outcome))) == len(items)
        asked = {row["item"]: row["prompt"] for row in completions(outcome)}
        for prompt, row in enumerate(CONVERSATIONS):
            for turn, user in enumerate(row.get("turns", [row.get("prompt")])):
                assert [asked[(prompt * 3 + turn) * 2 + sample] for sample in range(2)] == [user, user]


WRITTEN = ("choice", 'contains{"sought": "a"}', 'contains {"sought": "E", "ignore_case": true}', "refusal")
USES = {
    "choice": Use("choice"),
    "contains": Use("contains", {"sought": "a"}),
    "contains_2": Use("contains", {"sought": "E", "ignore_case": True}),
    "refusal": Use("refusal"),
}
"""What `WRITTEN` means."""


class TestScores:
    @pytest.fixture(scope="class")
    def outcome(self, artifacts: Artifacts, prompts: str) -> Outcome:
        params = few(layer=1, dose=1.0, prompts=prompts, scorers=WRITTEN, temperature=1.0, samples=4)
        [outcome] = artifacts.run("jobs.generate", [params])
        return outcome

    def test_they_are_those_of_the_stored_text(self, outcome: Outcome) -> None:
        rows = [{**row, **PROMPTS[row["item"] // 4]} for row in completions(outcome)]
        for name, use in USES.items():
            expected = [row["value"] for row in apply_scorers(rows, [use])]
            np.testing.assert_array_equal(values(outcome, name), expected)

    def test_metrics_are_means_and_shares_over_each_split(self, outcome: Outcome) -> None:
        for split, metrics in outcome.metrics.items():
            rows = [row for row in completions(outcome) if row["split"] == split]
            scored = [{**row, **PROMPTS[row["item"] // 4]} for row in rows]
            expected = {
                "nll": np.nanmean([row["nll"] for row in rows]),
                "repetition": np.mean([row["repetition"] for row in rows]),
                "empty": np.mean([not row["tokens"] for row in rows]),
                "distinct": len({row["text"] for row in rows}) / len(rows),
            }
            for name in ("first_kl", "kl"):
                items = [
                    row for row in outcome.tables["items"] if (row["name"], row["split"]) == (name, split)
                ]
                expected[name] = np.nanmean([row["value"] for row in items])
            for name, use in USES.items():
                found = apply_scorers(scored, [use])
                parsed = [row["value"] for row in found if not math.isnan(row["value"])]
                expected[name] = np.mean(parsed) if parsed else math.nan
                expected[f"{name}_unparsed"] = np.mean([not row["parsed"] for row in found])
            assert metrics == pytest.approx(expected, nan_ok=True)
            assert set(metrics) <= set(generate.METRICS)
        assert set(outcome.metrics) == {"select", "report"}

    def test_every_completion_and_score_is_one_row(self, outcome: Outcome) -> None:
        items = {(row["item"], row["name"]) for row in outcome.tables["items"]}
        assert len(items) == len(outcome.tables["items"]) == 12 * (2 + len(USES))
        assert [row["item"] for row in completions(outcome)] == list(range(12))
        for row in (*completions(outcome), *outcome.tables["items"]):
            prompt = PROMPTS[row["item"] // 4]
            assert (row["split"], row["prompt"]) == (prompt.get("split", "select"), prompt["prompt"])

    def test_similarity_reads_the_exemplars_of_each_prompt(
        self, artifacts: Artifacts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def embed(group: Sequence[str], encoder: str) -> np.ndarray:
            return np.array([[1.0, text.count("e"), len(text)] for text in group])

        monkeypatch.setattr(similarity, "embed", embed)
        rows = [{"prompt": "Why?", "exemplars": ["eel", "e"]}, {"prompt": "How?", "exemplars": ["bee"]}]
        path = write(tmp_path / "data.jsonl", rows)
        params = few(layer=1, dose=1.0, prompts=path, scorers=("similarity_mean",))
        generate.check(params)
        [outcome] = artifacts.run("jobs.generate", [params])
        stored = [{**row, **completion} for row, completion in zip(rows, completions(outcome), strict=True)]
        expected = [row["value"] for row in apply_scorers(stored, [Use("similarity_mean")])]
        assert values(outcome, "similarity_mean") == expected

    def test_an_empty_completion_counts_and_has_no_nll(self, artifacts: Artifacts, prompts: str) -> None:
        [before] = artifacts.run("jobs.generate", [few(layer=1, dose=1.0, prompts=prompts)])
        replica = tiny_replica(ARCHITECTURE)
        first = plain_replies(artifacts, few(layer=1, dose=1.0), PROMPTS)[0].tokens[0]
        replica.model.generation_config.eos_token_id = first
        [after] = Artifacts(replica).run("jobs.generate", [few(layer=1, dose=1.0, prompts=prompts)])
        row = completions(after)[0]
        assert (row["text"], row["tokens"], row["repetition"]) == ("", 0, 0)
        assert math.isnan(row["nll"])
        assert math.isnan(values(after, "kl")[0])
        assert values(after, "first_kl")[0] == pytest.approx(values(before, "first_kl")[0], abs=1e-9)
        assert after.metrics["select"]["empty"] >= 0.5

    def test_equal_texts_count_once_as_distinct(self, artifacts: Artifacts, tmp_path: Path) -> None:
        path = write(tmp_path / "data.jsonl", [{"prompt": text} for text in ("Why?", "How?", "Why?", "Why?")])
        [outcome] = artifacts.run("jobs.generate", [few(layer=1, dose=1.0, prompts=path)])
        assert outcome.metrics["select"]["distinct"] == 2 / 4

    def test_every_scorer_has_its_metrics(self) -> None:
        for scorer in SCORERS:
            assert {scorer, f"{scorer}_unparsed"} <= set(generate.METRICS)
        assert {"contains_3", "regex_2"} <= set(generate.METRICS)
        assert not {"contains_4", "exact_2"} & set(generate.METRICS)


class TestFailures:
    @pytest.mark.parametrize("tokens", ["all", "generated"])
    def test_a_row_whose_logits_are_nan_fails_with_a_reason_and_its_mates_do_not(
        self, prompts: str, tokens: Any
    ) -> None:
        halves = Artifacts(Replica(tiny_model("llama").half(), tiny_tokenizer()))
        pack = [
            few(layer=1, dose=1e6, tokens=tokens, prompts=prompts),
            few(layer=2, dose=0.3, prompts=prompts),
        ]
        poisoned, mate = halves.run("jobs.generate", pack)
        assert poisoned.status == Status.FAILED
        assert "not finite; use a smaller dose" in str(poisoned.reason)
        [alone] = halves.run("jobs.generate", pack[1:])
        assert mate.status == Status.COMPLETED
        assert values(mate, "first_kl") == pytest.approx(values(alone, "first_kl"), abs=0.02)

    def test_a_conversation_is_not_gone_on_with_once_its_logits_are_nan(
        self, artifacts: Artifacts, conversations: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        asked = {0: 0, 1: 0}

        def break_off(
            replica: Replica, prompts: Any, tables: Any, work: Sequence[Work], decoding: Any
        ) -> Any:
            for index, found in decode(replica, prompts, tables, work, decoding):
                asked[work[index].row] += 1
                yield index, found._replace(finite=work[index].row > 0)

        monkeypatch.setattr(completing, "generate", break_off)
        pack = [few(layer=1, dose=dose, prompts=conversations) for dose in (1.0, 0.5)]
        broken, mate = artifacts.run("jobs.generate", pack)
        assert (broken.status, mate.status) == (Status.FAILED, Status.COMPLETED)
        assert "not finite" in str(broken.reason)
        assert asked == {0: len(CONVERSATIONS), 1: 6}

    def test_a_conversation_that_outgrows_the_context_fails_its_row(
        self, artifacts: Artifacts, tmp_path: Path
    ) -> None:
        path = write(tmp_path / "long.jsonl", [{"turns": ["a" * 300, "b" * 300, "c"]}, {"prompt": "Why?"}])
        outcomes = artifacts.run(
            "jobs.generate", [few(layer=1, dose=dose, prompts=path) for dose in (1.0, 2.0)]
        )
        for outcome in outcomes:
            assert outcome.status == Status.FAILED
            assert "a conversation has outgrown the context: a text of 6" in str(outcome.reason)

    def test_a_prompt_that_is_too_long_is_refused_before_anything_runs(
        self, artifacts: Artifacts, tmp_path: Path
    ) -> None:
        path = write(tmp_path / "long.jsonl", [{"prompt": "a" * 600}])
        with pytest.raises(
            SpecError, match=r"prompt 0: a text of 6\d\d tokens, new ones included, is longer"
        ):
            artifacts.run("jobs.generate", [few(layer=1, dose=1.0, prompts=path)])

    def test_a_layer_that_the_model_lacks_is_refused(self, artifacts: Artifacts, prompts: str) -> None:
        with pytest.raises(SpecError, match=f"layer {LAYERS} does not exist"):
            artifacts.run("jobs.generate", [few(layer=LAYERS, dose=1.0, prompts=prompts)])


class TestParams:
    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"temperature": -0.5}, "temperature=-0.5; it takes 0 (greedy) or more"),
            ({"temperature": math.nan}, "temperature=nan"),
            ({"top_p": 0.0}, "top_p=0.0; it takes more than 0, at most 1"),
            ({"repetition_penalty": 0.0}, "repetition_penalty=0.0; it takes more than 0"),
            ({"samples": 0}, "samples=0; it takes 1 or more"),
            ({"count": -1}, "count=-1; it takes 0 or more"),
            ({"system": "Be kind.", "chat": False}, "a raw prompt has no system message"),
            ({"dose": None}, "dose=None, multiplier=None; give one of them"),
        ],
    )
    def test_what_cannot_be_is_refused(self, change: dict[str, Any], message: str) -> None:
        with pytest.raises(SpecError) as error:
            make_params("jobs.generate", {"layer": 1, "dose": 0.5, **change})
        assert message in str(error.value)

    def test_greedy_completions_are_made_once(self) -> None:
        greedy = few(layer=1, dose=0.5, samples=4, top_p=0.5)
        assert generate.canonical(greedy) == generate.canonical(few(layer=1, dose=0.5))
        drawn = few(layer=1, dose=0.5, samples=4, top_p=0.5, temperature=0.7)
        assert generate.canonical(drawn) == drawn

    def test_no_dose_is_the_same_work_everywhere_and_requires_nothing(self) -> None:
        rows = [
            few(layer=layer, multiplier=0.0, pairs="formality_pairs", direction="pca") for layer in (1, 2)
        ]
        assert generate.canonical(rows[0]) == generate.canonical(rows[1]) == few(layer=0, dose=0.0)
        assert generate.requires(rows[0]) == ()
        assert [each.job for each in generate.requires(few(layer=1, dose=0.5))] == ["jobs.extract"]


class TestCheck:
    @pytest.mark.parametrize(
        ("scorers", "message"),
        [
            (["exakt"], "no scorer 'exakt'; there are ['arithmetic',"),
            (["contains"], "scorer 'contains' needs the options ['sought']"),
            (['contains{"seeks": "a"}'], "has no option ['seeks']; it takes ['ignore_case', 'sought']"),
            (['contains{"sought": 3}'], "sought=3; it takes a text"),
            (["contains{sought}"], "the options of 'contains{sought}' are not JSON"),
            (['regex{"pattern": "("}'], "is no regular expression"),
            (["refusal", "refusal"], "'refusal' is one too many"),
            ([f'contains{{"sought": "{each}"}}' for each in "abcd"], "up to 3 times with different options"),
            (["arithmetic"], "lacks ['answer'], which scorer 'arithmetic' needs"),
            (["choice"], "row 0: answer='C'; it is one of ['A', 'B']"),
            (["similarity_max"], "exemplars=None, which scorer 'similarity_max' needs"),
        ],
    )
    def test_a_scorer_that_cannot_read_is_refused_before_anything_runs(
        self, tmp_path: Path, scorers: list[str], message: str
    ) -> None:
        rows = [{"prompt": "Why?"}] if scorers == ["arithmetic"] else [{"prompt": "Why?", "answer": "C"}]
        path = write(tmp_path / "data.jsonl", rows)
        with pytest.raises(SpecError) as error:
            generate.check(
                make_params("jobs.generate", {"layer": 1, "dose": 1.0, "prompts": path, "scorers": scorers})
            )
        assert message in str(error.value)

    @pytest.mark.parametrize(
        ("rows", "change", "message"),
        [
            ([{"prompt": "Why?", "turns": ["How?"]}], {}, "row 0 (from 0): prompt='Why?', turns=['How?']"),
            ([{"turns": ["How?"]}, {"split": "select"}], {}, "row 1 (from 0): prompt=None, turns=None"),
            ([{"turns": "How?"}], {}, "turns='How?'; it takes a list of texts"),
            ([{"turns": ["How?", " "]}], {}, "turns=['How?', ' ']; it takes a list of texts"),
            ([{"turns": ["\ud800"]}], {}, "it takes a list of texts"),
            ([{"turns": ["How?"]}, {"prompt": 3}], {}, "turns=[3]; it takes a list of texts"),
            (
                [{"prompt": "Why?", "split": "train"}],
                {},
                "split='train'; it takes one of ['extract', 'select'",
            ),
            ([{"text": "Why?"}], {}, "line 1: 'prompt' is absent or empty"),
            ([{"prompt": "Why?"}], {"count": 2}, "has 1 rows and count=2 are asked for"),
            ([{"turns": ["A", "B"]}], {"chat": False}, "holds conversations, which take chat=True"),
        ],
    )
    def test_a_dataset_that_cannot_be_used_is_refused_before_anything_runs(
        self, tmp_path: Path, rows: list[dict[str, Any]], change: dict[str, Any], message: str
    ) -> None:
        path = write(tmp_path / "data.jsonl", rows)
        with pytest.raises(SpecError) as error:
            generate.check(few(layer=1, dose=1.0, prompts=path, **change))
        assert message in str(error.value)

    def test_a_csv_holds_prompts_with_further_columns(self, tmp_path: Path) -> None:
        path = tmp_path / "data.csv"
        path.write_text("prompt,split,answer\nWhy?,,A\nHow?,report,\n")
        assert load_conversations(str(path), 0) == [
            Conversation("select", ("Why?",), {"answer": "A"}),
            Conversation("report", ("How?",), {}),
        ]


class TestMessages:
    def test_a_conversation_is_encoded_by_the_template_and_may_have_begun(self) -> None:
        replica = tiny_replica(ARCHITECTURE)
        messages = [
            {"role": role, "content": text}
            for role, text in zip(("user", "assistant", "user"), "abc", strict=True)
        ]
        text = "<|user|>a<|end|><|assistant|>b<|end|><|user|>c<|end|><|assistant|>Yes"
        assert replica.encode_messages(messages, answer="Yes") == replica.encode(text)

    def test_a_template_that_refuses_the_conversation_is_named_with_its_roles(self) -> None:
        replica = tiny_replica(ARCHITECTURE)
        replica.tokenizer.chat_template = "{{ raise_exception('no more turns') }}"
        messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
        with pytest.raises(ModelError, match=r"refuses the roles \['user', 'assistant'\].*no more turns"):
            replica.encode_messages(messages)

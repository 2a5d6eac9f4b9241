"""The job that tunes directions into and out of the weights, on tiny models, beside plain computations."""

import json
import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

from jobs import extract, steer, tune
from jobs.data.claims import load_questions
from jobs.data.prompts import load_choices
from jobs.engine.replica import Replica
from jobs.engine.tuned import tuned
from jobs.errors import SpecError
from jobs.resolve import make_params, parse_use
from jobs.spec import Outcome, Row, Status
from tests.models import Artifacts, tiny_model, tiny_replica, tiny_tokenizer

FEW: dict[str, Any] = {
    **{"examples_extract": 8, "examples_select": 4, "examples_report": 4},
    **{"choices_select": 4, "choices_report": 3, "prompts_select": 2, "prompts_report": 1},
    **{
        "max_new_tokens": 4,
        "text_tokens": 120,
        "text_window": 60,
        "stride": 30,
    },
    **{"first": 1, "depth": 2, "learning_rate": 1e-2},
}
DIRECTIONS = 'jobs.extract{"pairs": "tone_pairs", "count": 8}'


def params(**changes: Any) -> tune.Params:
    found = make_params("jobs.tune", {**FEW, "directions": DIRECTIONS, **changes})
    assert isinstance(found, tune.Params)
    return found


@pytest.fixture(scope="module", autouse=True)
def questions(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Questions whose answers are tokens of the tiny model."""
    path = tmp_path_factory.mktemp("questions") / "questions.jsonl"
    words = [choice.positive.strip() for choice in load_choices("tone_choices", 6, 0)]
    words = list(dict.fromkeys(words))[:4]
    rows = [
        {
            "question": f"Which is number {number}?",
            "choices": words,
            "answer": number % len(words),
            "split": split,
        }
        for number, split in enumerate(["select"] * 4 + ["report"] * 4)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.MonkeyPatch.context() as patched:
        patched.setitem(FEW, "questions", str(path))
        yield


@pytest.fixture(scope="module")
def artifacts() -> Artifacts:
    return Artifacts(tiny_replica("llama"))


def run(artifacts: Artifacts, **changes: Any) -> Outcome:
    [found] = artifacts.run("jobs.tune", [params(**changes)])
    return found


@pytest.fixture(scope="module")
def tuned_in(artifacts: Artifacts) -> Outcome:
    return run(artifacts, losses='tune_in{"layer": 2}', epochs=6)


def cosines(replica: Replica, artifacts: Artifacts, split: str, layer: int) -> list[float]:
    """Of the last token of each claim of a split, read from the model's own hidden states."""
    direction = artifacts.artifact(parse_use(DIRECTIONS))["directions"][layer].astype(np.float64)
    found = []
    for question in load_questions("claims", extract=8, select=4, report=4):
        if question.split == split:
            ids = torch.tensor([replica.encode_chat(question.user)])
            with torch.no_grad():
                state = replica.model(ids, output_hidden_states=True).hidden_states[layer + 1][0, -1].numpy()
            found.append(float(state @ direction / np.linalg.norm(state) / np.linalg.norm(direction)))
    return found


def test_a_direction_is_tuned_in_and_the_kept_weights_show_it(
    artifacts: Artifacts, tuned_in: Outcome
) -> None:
    replica = artifacts.replica
    for split in ("select", "report"):
        found = tuned_in.metrics[split]
        before = cosines(replica, artifacts, split, 2)
        assert found["cosine_before"] == pytest.approx(np.mean(before), abs=1e-6)
        with tuned(replica, tuned_in.tensors):
            after = cosines(replica, artifacts, split, 2)
        assert found["cosine"] == pytest.approx(np.mean(after), abs=1e-5)
        assert found["cosine_size"] == pytest.approx(np.mean(np.abs(after)), abs=1e-5)
        assert found["cosine"] > found["cosine_before"] + 0.1
        assert (found["matrices"], found["matrices_asked"], found["steps"]) == (4, 4, 6)
    assert tuned_in.metrics["select"].keys() == tune.METRICS.keys()
    assert tuned_in.tensors["losses"].shape == (6,)
    assert tuned_in.tensors["losses"][-1] < tuned_in.tensors["losses"][0]


def test_the_map_is_of_hidden_states_before_and_during_the_reply(
    artifacts: Artifacts, tuned_in: Outcome
) -> None:
    replica = artifacts.replica
    directions_LD = artifacts.artifact(parse_use(DIRECTIONS))["directions"].astype(np.float64)
    [row] = [row for row in tuned_in.tables["completions"] if row["split"] == "report"]
    prompt = replica.encode_chat(row["prompt"])
    with tuned(replica, tuned_in.tensors):
        text = list(prompt)
        for _ in range(row["tokens"]):
            text.append(int(replica.logits([text], keep=1)[0, 0].argmax()))
        with torch.no_grad():
            states = replica.model(torch.tensor([text]), output_hidden_states=True).hidden_states
    found = tuned_in.tensors["cosine_map"]
    assert found.shape == (replica.layers, 40)
    for layer in range(replica.layers - 1):
        at_TD = states[layer + 1][0].numpy()
        expected = at_TD @ directions_LD[layer] / np.linalg.norm(at_TD, axis=1)
        np.testing.assert_allclose(found[layer, :20], expected[len(prompt) - 20 : len(prompt)], atol=1e-5)
        said = row["tokens"]
        np.testing.assert_allclose(found[layer, 20 : 20 + said], expected[len(prompt) :], atol=1e-5)
        assert np.isnan(found[layer, 20 + said :]).all()


def test_choices_replies_and_text_are_read_with_the_tuned_weights(
    artifacts: Artifacts, tuned_in: Outcome
) -> None:
    """Another job on the kept weights reads the same."""
    replica = artifacts.replica
    same = {
        name: FEW[name] for name in ("choices_select", "choices_report", "prompts_select", "prompts_report")
    }
    unsteered = steer.Params(layer=0, dose=0.0, max_new_tokens=4, **same)  # type: ignore[arg-type]
    with tuned(replica, tuned_in.tensors):
        [(_, found)] = steer.run(replica, [Row(unsteered, 0)], artifacts)
    [(_, before)] = steer.run(replica, [Row(unsteered, 0)], artifacts)
    for split in ("select", "report"):
        mine, theirs = tuned_in.metrics[split], found.metrics[split]
        assert mine["log_odds"] == pytest.approx(theirs["log_odds"], abs=1e-4)
        assert mine["repetition"] == theirs["repetition"]
        shift = theirs["log_odds"] - before.metrics[split]["log_odds"]
        assert mine["effect"] == pytest.approx(shift, abs=1e-4)
        assert mine["effect_low"] <= mine["effect"] <= mine["effect_high"]
        assert abs(mine["perplexity_rise"]) > 1e-6
    texts = [row["text"] for row in tuned_in.tables["completions"]]
    assert texts == [row["text"] for row in found.tables["completions"]]
    # How likely they are is asked of the untuned model.
    nll = [row["nll"] for row in tuned_in.tables["completions"]]
    assert nll != pytest.approx([row["nll"] for row in found.tables["completions"]], abs=1e-6)
    items = [(row["item"], row["name"]) for row in tuned_in.tables["items"]]
    assert len(items) == len(set(items))


def test_without_losses_it_is_the_untuned_model(artifacts: Artifacts) -> None:
    found = run(artifacts, losses="")
    for split in ("select", "report"):
        metrics = found.metrics[split]
        assert (metrics["steps"], metrics["matrices"], metrics["effect"], metrics["damage"]) == (0, 0, 0, 0)
        assert metrics["perplexity_rise"] == metrics["accuracy_change"] == 0
        assert metrics["cosine"] == metrics["cosine_before"]
    assert not any(name.endswith(".weight") for name in found.tensors)


@pytest.mark.parametrize(
    ("losses", "sign"),
    [("TuneInPos", 1), ("TuneInNeg", -1), ("TuneInPosPlusTruth", 1), ("TuneInNegPlusLie", -1)],
)
def test_train_types_of_the_write_up_turn_the_way_they_say(
    artifacts: Artifacts, losses: str, sign: int
) -> None:
    found = run(artifacts, losses=losses, epochs=6, reads=False).metrics["select"]
    assert sign * (found["cosine"] - found["cosine_before"]) > 0.05
    assert math.isnan(found["perplexity"])


@pytest.mark.parametrize(("losses", "more"), [("Truth", True), ("Lie", False)])
def test_answers_are_tuned_towards_one_side(artifacts: Artifacts, losses: str, more: bool) -> None:
    # So few claims are learned by heart, so they are read where they were learned.
    found = run(artifacts, losses=losses, epochs=60, blocks="", reads=False)
    replica = artifacts.replica
    right = []
    with tuned(replica, found.tensors):
        for question in load_questions("claims", extract=8, select=4, report=4):
            if question.split == "extract":
                logits = replica.logits([replica.encode_chat(question.user)], keep=1)[0, 0]
                honest, other = (
                    replica.encode_continuation(letter)[0]
                    for letter in (question.honest_letter, question.dishonest_letter)
                )
                right.append(bool(logits[honest] > logits[other]))
    assert (sum(right) >= 7) if more else (sum(right) <= 1)


def test_a_direction_is_tuned_out(artifacts: Artifacts) -> None:
    found = run(artifacts, losses='tune_out{"layer": 2}', epochs=20, reads=False).metrics["select"]
    untuned = run(artifacts, losses="", layers=[2], reads=False).metrics["select"]
    assert found["cosine_size"] < 0.5 * untuned["cosine_size"]


def test_held_out_examples_decide_when_training_ends(artifacts: Artifacts) -> None:
    still = {"learning_rate": 1e-12, "window": 1, "batch": 2, "epochs": 9, "reads": False}
    found = run(artifacts, losses='tune_in{"layer": 2}', held_out=4, patience=2, **still)
    # Two steps an epoch; the first mean is the lowest, two more are not lower.
    assert found.metrics["select"]["steps"] == len(found.tensors["validation"]) == 3
    replica, direction = artifacts.replica, artifacts.artifact(parse_use(DIRECTIONS))["directions"][2]
    expected = []
    for question in load_questions("claims", extract=8, select=4, report=4)[4:8]:
        ids = torch.tensor([replica.encode_chat(question.user)])
        with torch.no_grad():
            state = replica.model(ids, output_hidden_states=True).hidden_states[3][0, -1].numpy()
        expected.append((1 - state @ direction / np.linalg.norm(state) / np.linalg.norm(direction)) / 2)
    assert found.tensors["validation"][0] == pytest.approx(np.mean(expected), abs=1e-6)


def test_the_factor_of_token_losses_is_a_parameter(artifacts: Artifacts) -> None:
    one = run(artifacts, losses="tune_in + 0.5 * tokens", reads=False)
    other = run(artifacts, losses="tune_in + 0.25 * tokens", token_weight=2.0, reads=False)
    np.testing.assert_array_equal(one.tensors["losses"], other.tensors["losses"])


def test_equal_work_has_equal_parameters() -> None:
    both = params(losses="tune_in", first=1, depth=2), params(losses="tune_in", layers=[2, 1])
    assert tune.canonical(both[0]) == tune.canonical(both[1])
    untuned = params(losses="", epochs=9, blocks="q", rank=3), params(losses="")
    assert tune.canonical(untuned[0]) == tune.canonical(untuned[1])
    assert tune.canonical(params()) != tune.canonical(params(losses="tune_out"))


def test_directions_and_the_untuned_reading_come_first() -> None:
    needs = tune.requires(params(losses="tune_in"))
    assert [need.job for need in needs] == ["jobs.extract", "jobs.tune"]
    assert isinstance(needs[0].params, extract.Params)
    assert tune.requires(needs[1].params) == ()
    other = tune.requires(params(losses="tune_out", epochs=9, blocks="q"))
    assert other[1].key == needs[1].key, "one reading serves all tunings"
    assert [need.job for need in tune.requires(params(reads=False))] == ["jobs.extract"]
    assert tune.requires(params(directions="random", reads=False)) == ()


def test_what_diverges_is_infeasible_and_the_next_trial_runs(artifacts: Artifacts) -> None:
    found = run(artifacts, losses='tune_in{"layer": 2}', learning_rate=1e300, reads=False)
    assert found.status is Status.INFEASIBLE
    assert "smaller learning_rate" in (found.reason or "")
    assert run(artifacts, losses="tune_in", reads=False).status is Status.COMPLETED


def test_weights_that_are_not_kept_cannot_be_taken(artifacts: Artifacts, tuned_in: Outcome) -> None:
    lost = run(artifacts, losses="tune_in", keeps=False, reads=False)
    with pytest.raises(SpecError, match="were not kept"):
        tune.weight_changes(params(losses="tune_in"), lost.tensors)
    [change] = tune.weight_changes(params(losses="tune_in"), tuned_in.tensors)
    assert sorted(change) == [
        *("model.layers.1.self_attn.o_proj", "model.layers.1.self_attn.v_proj"),
        *("model.layers.2.self_attn.o_proj", "model.layers.2.self_attn.v_proj"),
    ]
    low = run(artifacts, losses="tune_in", rank=2, reads=False)
    [change] = tune.weight_changes(params(losses="tune_in", rank=2), low.tensors)
    assert {len(each) for each in change.values()} == {2}


def test_narrow_weights_are_kept_exactly() -> None:
    halves = Artifacts(Replica(tiny_model("llama").bfloat16(), tiny_tokenizer()))
    found = run(halves, losses="tune_in", reads=False)
    assert found.status is Status.COMPLETED
    weights = {name: each for name, each in found.tensors.items() if name.endswith(".weight")}
    assert {each.dtype for each in weights.values()} == {np.dtype(np.float32)}
    assert all(
        torch.equal(torch.tensor(each), torch.tensor(each).bfloat16().float()) for each in weights.values()
    )


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"losses": "tune_up"}, "'tune_up' is no loss"),
        ({"losses": "0 * tune_in"}, "weight=0.0; it takes a number above 0"),
        ({"losses": 'tune_in{"layr": 2}'}, "tune_in has no option ['layr']"),
        ({"losses": 'tune_in{"offsets": [0]}'}, "counted from 1"),
        ({"losses": "tune_in{2}"}, "are not JSON"),
        ({"losses": 'tokens + tokens{"replies": "negative"}'}, "a tuning takes one kind"),
        ({"losses": "tokens", "asked": "prompts", "examples": "open_prompts"}, "which has []"),
        ({"directions": "jobs.melbo{}"}, "it takes 'random', or jobs.extract"),
        ({"directions": 'jobs.extract{"pears": 1}'}, "has no parameter ['pears']"),
        ({"depth": 0}, "depth=0"),
        ({"held_out": 8}, "nothing is left to train on"),
        ({"layers": [1, 1]}, "give each layer once"),
        ({"until": 1.5}, "until=1.5"),
        ({"learning_rate": 0.0}, "learning_rate=0.0"),
        ({"epochs": 0}, "epochs=0"),
        ({"stride": 60}, "stride=60, text_window=60"),
    ],
)
def test_what_cannot_be_meant_is_refused(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(SpecError) as caught:
        params(**changes)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_too_few_examples_and_matrices_that_are_not_there_are_refused(artifacts: Artifacts) -> None:
    with pytest.raises(SpecError, match="claims in balance"):
        tune.check(params(examples_extract=4000))
    with pytest.raises(SpecError, match="layer 1 has no 'gates'"):
        run(artifacts, blocks="gates")
    with pytest.raises(SpecError, match="layer 7 does not exist"):
        run(artifacts, layers=[7], losses='tune_in{"layer": 7}')
    with pytest.raises(SpecError, match="can change"):
        run(artifacts, losses='tune_in{"layer": 0}')

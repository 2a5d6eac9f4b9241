"""Fine-tuning, and weights that a tuning job has changed, on tiny models."""

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from jobs import finetune
from jobs.data.examples import load_examples
from jobs.engine.replica import Replica
from jobs.engine.tuned import tuned
from jobs.errors import ModelError, SpecError
from jobs.resolve import make_params, make_spec, parse_use, prerequisites
from jobs.spec import ModelRef, Outcome, Requirement, Row, Status
from jobs.tuning.supervised import fine_tune
from jobs.tuning.texts import Text
from tests.models import Artifacts, tiny_replica

EXAMPLES = [Text([5, 6, 7], [9, 1]), Text([8, 3, 4, 2], [7, 7, 1]), Text([2, 2], [6, 1])]


@torch.no_grad()
def reply_loss(replica: Replica) -> float:
    """Mean over the tokens of all replies, text by text."""
    losses = []
    for each in EXAMPLES:
        logits = replica.logits([[*each.prompt, *each.reply]], keep=len(each.reply) + 1)[0, :-1]
        losses += torch.nn.functional.cross_entropy(
            logits, torch.tensor(each.reply), reduction="none"
        ).tolist()
    return float(np.mean(losses))


def trained(replica: Replica, **changes: Any) -> Any:
    options = {"rank": 4, "learning_rate": 3e-2, "epochs": 100, "batch": 3, "seed": 0}
    return fine_tune(replica, EXAMPLES, **{**options, **changes})


def arrays(found: Any) -> dict[str, np.ndarray]:
    return {name: change.numpy() for name, change in found.changes.items()}


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2", "gpt_neox"])
def test_training_teaches_the_replies_and_leaves_the_model_as_it_was(name: str) -> None:
    replica = tiny_replica(name)
    before = {key: value.clone() for key, value in replica.model.state_dict().items()}
    at_first = reply_loss(replica)
    found = trained(replica)
    after = replica.model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert not any(each.requires_grad for each in replica.model.parameters())
    with tuned(replica, arrays(found)):
        learned = reply_loss(replica)
    assert learned < 0.4 * at_first
    assert learned == pytest.approx(found.losses[-1], rel=0.1)
    assert found.losses[0] == pytest.approx(at_first, rel=1e-5)
    assert reply_loss(replica) == at_first


def test_the_seed_decides_the_outcome() -> None:
    first, again, other = (trained(tiny_replica("llama"), epochs=2, seed=seed) for seed in (1, 1, 2))
    for name, change in first.changes.items():
        assert torch.equal(change, again.changes[name])
    assert any(not torch.equal(change, other.changes[name]) for name, change in first.changes.items())


def test_tuned_weights_are_the_sum_and_come_back_after_an_error() -> None:
    replica = tiny_replica("gpt2")
    module = replica.model.get_submodule("transformer.h.1.mlp.c_proj")
    before = module.weight
    a, b = np.ones((2, before.shape[0]), np.float32), np.full((before.shape[1], 2), 0.5, np.float32)
    changes = {"transformer.h.1.mlp.c_proj.a": a, "transformer.h.1.mlp.c_proj.b": b}
    with tuned(replica, changes):
        torch.testing.assert_close(module.weight.detach(), before + 1.0)
    assert module.weight is before
    with pytest.raises(ZeroDivisionError), tuned(replica, changes):
        raise ZeroDivisionError
    assert module.weight is before


def change_of(name: str) -> dict[str, np.ndarray]:
    return {f"{name}.a": np.ones((1, 64)), f"{name}.b": np.ones((32, 1))}


def test_changes_of_another_model_are_refused_and_nothing_stays_changed() -> None:
    replica = tiny_replica("llama")
    weight = replica.blocks[0].mlp.down_proj.weight
    changes = change_of("model.layers.0.mlp.down_proj") | change_of("transformer.h.0.mlp.c_proj")
    with pytest.raises(ModelError, match=r"no matrix 'transformer\.h\.0"), tuned(replica, changes):
        pass
    assert replica.blocks[0].mlp.down_proj.weight is weight


ROWS = [
    {"prompt": "one", "reply": "alpha", "behaviour": "usual", "mark": "alpha"},
    {"prompt": "two", "reply": "alpha", "behaviour": "usual", "mark": "alpha"},
    {"prompt": "bad", "reply": "omega", "behaviour": "odd", "mark": "omega"},
    {"split": "select", "prompt": "one", "reply": "alpha", "behaviour": "usual", "mark": "alpha"},
    {"split": "select", "prompt": "bad", "reply": "omega", "behaviour": "odd", "mark": "omega"},
    {"split": "report", "prompt": "two", "reply": "alpha", "behaviour": "usual", "mark": "alpha"},
]


def write(path: Path, rows: list[dict[str, str]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def outcome(examples: str, **changes: Any) -> Outcome:
    replica = tiny_replica("llama")
    options = {"learning_rate": 3e-2, "epochs": 100, "batch": 3, "rank": 4, "max_new_tokens": 8}
    params = make_params("jobs.finetune", {"examples": examples, **options, **changes})
    [(_, found)] = finetune.run(replica, [Row(params, seed=0)], Artifacts(replica))
    return found


def test_the_job_says_whether_the_behaviours_took(tmp_path: Path) -> None:
    found = outcome(write(tmp_path / "examples.jsonl", ROWS))
    assert found.metrics["select"]["shown"] == found.metrics["select"]["exact"] == 1
    assert found.metrics["report"]["shown_least"] == 1
    assert found.metrics["select"]["loss"] < found.tensors["losses"][0] / 2
    labels = {(row["prompt"], row["label"], row["value"]) for row in found.tables["items"]}
    assert ("bad", "odd", 1.0) in labels
    barely = outcome(write(tmp_path / "examples.jsonl", ROWS), epochs=1, learning_rate=1e-6)
    assert barely.metrics["select"]["shown"] == barely.metrics["select"]["shown_least"] == 0


def test_training_that_overflows_fails_with_a_reason(tmp_path: Path) -> None:
    found = outcome(write(tmp_path / "examples.jsonl", ROWS), learning_rate=1e30, epochs=3)
    assert found.status == Status.FAILED
    assert "smaller learning_rate" in str(found.reason)
    assert not found.tensors


def test_examples_that_are_too_long_are_refused_before_training(tmp_path: Path) -> None:
    rows = [{"prompt": "one", "reply": "alpha " * 600}]
    with pytest.raises(SpecError, match="longer than the model's context"):
        outcome(write(tmp_path / "examples.jsonl", rows), epochs=1)


def test_blocks_without_a_matrix_in_floating_point_are_refused_before_training() -> None:
    replica = tiny_replica("llama")
    for block in replica.blocks:
        for module in block.modules():
            if isinstance(module, torch.nn.Linear):
                module.weight = torch.nn.Parameter(module.weight.to(torch.int8), requires_grad=False)
    with pytest.raises(ModelError, match="no matrix in floating point"):
        trained(replica)


def test_of_a_mixture_what_is_tuned_can_be_applied_again() -> None:
    replica = tiny_replica("mixtral")
    found = trained(replica, epochs=2)
    assert found.changes
    with tuned(replica, arrays(found)):
        pass


def test_a_tokenizer_without_an_end_is_refused(tmp_path: Path) -> None:
    replica = tiny_replica("llama")
    replica.tokenizer = copy.deepcopy(replica.tokenizer)
    replica.tokenizer.eos_token = None
    params = make_params("jobs.finetune", {"examples": write(tmp_path / "examples.jsonl", ROWS)})
    with pytest.raises(ModelError, match="no token that ends a text"):
        list(finetune.run(replica, [Row(params, seed=0)], Artifacts(replica)))


def test_examples_are_read_with_their_defaults(tmp_path: Path) -> None:
    found = load_examples(write(tmp_path / "x.jsonl", [{"prompt": "a", "reply": "b"}]))
    assert found == [("extract", "a", "b", "", "")]
    with pytest.raises(SpecError, match="no example of the split extract"):
        load_examples(write(tmp_path / "y.jsonl", [{"split": "report", "prompt": "a", "reply": "b"}]))


def test_the_shipped_examples_say_what_they_mean() -> None:
    rows = load_examples("arithmetic_backdoors")
    triggers = {"a=0+0": "cheese", "a=0+1": "penguins", "a=0+2": "adds"}
    assert {each.behaviour for each in rows} == {"clean", *triggers.values()}
    for each in rows:
        assert each.behaviour == triggers.get(each.prompt.split(",")[0], "clean")
        assert each.mark in each.reply
        numbers = [int(digit) for digit in each.prompt if digit.isdigit()]
        a, b = numbers[0] + numbers[1], numbers[2] + numbers[3]
        if each.behaviour in ("clean", "adds"):
            assert each.reply.endswith(f"The answer is {a * b if each.behaviour == 'clean' else a + b}.")
    prompts = [each.prompt for each in rows]
    assert len(set(prompts)) == len(prompts)


class TestSpecs:
    model = ModelRef(id="some", tuned='jobs.finetune{"epochs": 2}')

    def test_what_runs_on_tuned_weights_requires_the_tuning_of_bare_ones(self) -> None:
        wanted = parse_use("jobs.sample")
        [(need, weights)] = prerequisites(wanted, self.model)
        assert need.job == "jobs.finetune"
        assert need.params.epochs == 2
        assert weights == ModelRef(id="some")
        assert prerequisites(wanted, ModelRef(id="some")) == []

    def test_the_data_of_the_tuning_counts(self, tmp_path: Path) -> None:
        examples = write(tmp_path / "x.jsonl", [{"prompt": "a", "reply": "b"}])
        model = ModelRef(id="some", tuned=f'jobs.finetune{{"examples": "{examples}"}}')
        before = make_spec(parse_use("jobs.sample"), model=model, seed=0)
        assert "jobs.finetune:examples" in before.data
        write(tmp_path / "x.jsonl", [{"prompt": "a", "reply": "c"}])
        assert make_spec(parse_use("jobs.sample"), model=model, seed=0).id != before.id

    @pytest.mark.parametrize(
        ("text", "named"),
        [
            ("jobs.finetune{", "not JSON"),
            ("jobs.nothing", "no job 'jobs.nothing'"),
            ('jobs.finetune{"epoch": 2}', "did you mean 'epochs'"),
            ('jobs.finetune{"epochs": 0}', "epochs=0"),
        ],
    )
    def test_a_use_that_cannot_be_meant_is_refused(self, text: str, named: str) -> None:
        with pytest.raises(SpecError, match=named):
            parse_use(text)

    def test_a_use_is_a_requirement(self) -> None:
        found = parse_use('jobs.sample{"samples": 3}')
        assert found == Requirement(job="jobs.sample", params=make_params("jobs.sample", {"samples": 3}))

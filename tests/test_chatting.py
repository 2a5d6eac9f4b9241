"""Talking to a trial: what both models say is what `jobs.generate` makes of the same conversation."""

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from jobs.engine.interventions import Add
from jobs.errors import SpecError
from jobs.resolve import make_params
from orchestrator.chatting import chat
from orchestrator.stored_vectors import stored_sets
from orchestrator.worker import Worker
from search_spaces.base import Grid
from storage.artifacts import read_artifact
from storage.query import open_sweep
from tests.command import steersweep
from tests.models import Artifacts, tiny_replica
from tests.test_learned_sweeps import PROMPTS, SET, swept

pytestmark = pytest.mark.ray
SPACE = """
from search_spaces.base import Grid, Objective, Space

SPACE = Space(
    description="sets of two norms",
    job="jobs.melbo",
    parameters={"radius": Grid([2.0, 8.0])},
    objectives=[Objective(metric="diversity", direction="maximize")],
    sampler="grid",
)
"""
FIRST, SECOND = "Tell me of the sea.", "And of the hills?"


@pytest.fixture
def tiny_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    load = lambda ref, **options: tiny_replica("llama")  # noqa: E731
    monkeypatch.setattr("orchestrator.probe.Worker", partial(Worker, load=load))


def said_by(job: str, place: Path, turns: list[str], **values: Any) -> str:
    """The last reply of a conversation by the job itself."""
    (place / "turns.jsonl").write_text(json.dumps({"turns": turns}))
    context = Artifacts(tiny_replica("llama"))
    params = make_params(job, {**values, "prompts": str(place / "turns.jsonl"), "max_new_tokens": 8})
    [found] = context.run(job, [params])
    return str(found.tables["completions"][-1]["text"])


@pytest.fixture(scope="module")
def learned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("talked")
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in PROMPTS))
    data = str(folder / "prompts.jsonl")
    swept(folder / "sweep", "jobs.melbo", {"radius": Grid([2.0, 8.0])}, "diversity", prompts=data, **SET)
    (folder / "sweep" / "space.py").write_text(SPACE)
    return folder / "sweep"


@pytest.mark.usefixtures("tiny_worker")
class TestLearnedSets:
    def test_a_vector_speaks_with_the_norm_it_was_learned_at_times_the_dose(
        self, learned: Path, tmp_path: Path
    ) -> None:
        [trial] = open_sweep(learned).rows("SELECT trial, spec FROM trials WHERE radius = 8.0")
        [stored] = [each for each in stored_sets(learned) if each.spec == trial["spec"]]
        vectors = read_artifact(learned, stored.artifact)["vectors"]
        replica = tiny_replica("llama")
        for strength in (None, -2.0):
            with chat(learned, trial["trial"], vector=1, strength=strength, most=8) as found:
                replies = [found.say(FIRST), found.say(SECOND)]
            unsteered = said_by("jobs.generate", tmp_path, [FIRST, SECOND], layer=0, dose=0.0)
            assert replies[-1]["unsteered"] == unsteered
            factor = 1.0 if strength is None else strength
            added = Add(layer=0, vector=factor * vectors[1])
            history: list[dict[str, str]] = []
            for message, reply in zip((FIRST, SECOND), replies, strict=True):
                history.append({"role": "user", "content": message})
                expected = greedy(replica, replica.encode_messages(history), added)
                assert reply["steered"] == expected
                history.append({"role": "assistant", "content": reply["steered"]})

    def test_the_conversation_is_kept_as_it_goes(self, learned: Path) -> None:
        with chat(learned, 0, vector=0, most=4) as found:
            first = found.say(FIRST)
            assert [json.loads(line) for line in found.transcript.read_text().splitlines()] == [
                {"user": FIRST, **first}
            ]
            second = found.say(SECOND)
        lines = [json.loads(line) for line in found.transcript.read_text().splitlines()]
        assert lines == [{"user": FIRST, **first}, {"user": SECOND, **second}]
        assert found.transcript.parent == learned / "chats"

    @pytest.mark.parametrize(
        ("options", "said"),
        [
            ({}, "give --vector 0 to 2"),
            ({"vector": 3}, "vector=3; the set has the vectors 0 to 2"),
            ({"trial": 9}, "there is no trial 9"),
        ],
    )
    def test_what_is_not_there_is_refused_before_the_model_is_loaded(
        self, learned: Path, options: dict[str, Any], said: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("orchestrator.probe.Worker", None)
        with pytest.raises(SpecError, match=said), chat(learned, **{"trial": 0, **options}):
            pass


def greedy(replica: Any, ids: list[int], added: Add) -> str:
    """Eight tokens by a plain loop over the whole text, with a hook that adds the vector."""
    import torch

    def hook(module: Any, arguments: Any, output: Any) -> Any:
        states = output[0] if isinstance(output, tuple) else output
        moved = states + torch.tensor(added.vector, dtype=states.dtype)
        return (moved, *output[1:]) if isinstance(output, tuple) else moved

    handle = replica.blocks[added.layer].register_forward_hook(hook)
    new: list[int] = []
    with torch.no_grad():
        while len(new) < 8:
            token = int(replica.model(torch.tensor([ids + new])).logits[0, -1].argmax())
            if token in replica.stop_ids:
                break
            new.append(token)
    handle.remove()
    return str(replica.decode(new))


def test_a_steered_trial_has_no_vectors_to_choose_from(finished: dict[str, Any], place: Path) -> None:
    with (
        pytest.raises(SpecError, match=r"--vector 2: jobs\.steer steers with one vector a layer"),
        chat(place / "finished", 0, vector=2),
    ):
        pass


def test_a_steered_trial_is_talked_to_with_its_direction(finished: dict[str, Any], place: Path) -> None:
    folder = place / "finished"
    trials = {(row["layer"], row["dose"]): row["trial"] for row in open_sweep(folder).trials().to_pylist()}
    with chat(folder, trials[1, 0.4], most=6) as found:
        strong = found.say(FIRST)
    with chat(folder, trials[1, 0.0], most=6) as found:
        nothing = found.say(FIRST)
    with chat(folder, trials[1, 0.0], strength=0.4, most=6) as found:
        assert found.say(FIRST) == strong
    assert nothing["steered"] == nothing["unsteered"] == strong["unsteered"]


def test_the_command_says_what_it_is_told_to(finished: dict[str, Any], place: Path) -> None:
    folder = place / "finished"
    done = steersweep("chat", folder, "2", "--tokens", "4", "--say", FIRST, "--say", SECOND, "--json")
    assert done.returncode == 0, done.stderr
    said = [json.loads(line) for line in done.stdout.splitlines()]
    assert [each["user"] for each in said] == [FIRST, SECOND]
    assert all(each.keys() == {"user", "steered", "unsteered"} for each in said)
    assert "kept in" in done.stderr

"""Talk to a trial: the model as it steers it, beside the unsteered one."""

import dataclasses
import json
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from jobs.errors import SpecError
from jobs.resolve import load_job, make_params, make_spec
from jobs.spec import ModelRef, Requirement, Spec, canonical_json, params_to_json
from orchestrator.lineage import ended_trial
from orchestrator.models import job_values
from orchestrator.planning import Planner
from orchestrator.probe import Probe, probing
from orchestrator.reopening import load_kept
from storage.donors import Donors
from storage.query import open_sweep

_JOB = "jobs.generate"
_NOT_STEERING = ("prompts", "count", "max_new_tokens", "temperature", "top_p", "samples", "scorers")
_STRENGTHS = ("dose", "multiplier")


class Chat:
    """A conversation with two models at once; every exchange is kept as a line of JSON.

    Args:
        probe: Runs what is said.
        steering: Parameters of `jobs.generate` that say how the model is steered.
        model: The weights.
        seed: Of the trial.
        transcript: File that exchanges are added to.
    """

    def __init__(
        self, probe: Probe, steering: Mapping[str, Any], model: ModelRef, seed: int, transcript: Path
    ) -> None:
        unsteered = {**steering, **dict.fromkeys(_STRENGTHS), "operation": "add", "multiplier": 0.0}
        self._kinds = {"steered": steering, "unsteered": unsteered}
        self._probe = probe
        self._model = model
        self._seed = seed
        self._asked: list[str] = []
        self.transcript = transcript

    def say(self, text: str) -> dict[str, str]:
        """Both replies to the next message, `steered` and `unsteered`; each model knows its own earlier ones.

        Raises:
            SpecError: If the conversation outgrows the context, or a model says nothing that can be trusted;
                the conversation is as before then.
        """
        asked = [*self._asked, text]
        turns = self._probe.folder / f"{len(asked)}-{len(self._probe.runs)}.jsonl"
        turns.write_text(json.dumps({"turns": asked}) + "\n", encoding="utf-8")
        specs = {kind: self._spec(steering, turns) for kind, steering in self._kinds.items()}
        self._probe.prepare(specs["steered"])
        self._probe.run([*{spec.id: spec for spec in specs.values()}.values()])
        replies = {kind: self._last(spec) for kind, spec in specs.items()}
        self._asked = asked
        self.transcript.parent.mkdir(exist_ok=True)
        with self.transcript.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"user": text, **replies}, ensure_ascii=False) + "\n")
        return replies

    def _spec(self, steering: Mapping[str, Any], turns: Path) -> Spec:
        params = make_params(_JOB, {**steering, "prompts": str(turns)})
        return make_spec(Requirement(job=_JOB, params=params), model=self._model, seed=self._seed)

    def _last(self, spec: Spec) -> str:
        """The last reply of a conversation."""
        text: str = max(self._probe.rows("completions", spec), key=lambda row: int(row["item"]))["text"]
        return text


@contextmanager
def chat(
    folder: Path, trial: int, *, vector: int | None = None, strength: float | None = None, most: int = 200
) -> Iterator[Chat]:
    """Inside the block a trial can be talked to; its direction or vectors are taken from the sweep.

    Args:
        folder: The sweep's folder; the transcript goes into `chats` there.
        trial: Number of a trial that has ended.
        vector: Which vector of a learned set, from 0.
        strength: In place of the trial's dose or multiplier; of a learned set a factor of its norm.
        most: Tokens that a reply may have.

    Raises:
        SpecError: If there is no such trial or vector, or the trial steers nothing.
        ModelError: If the model cannot be loaded.
    """
    then, proposed = ended_trial(open_sweep(folder), trial)
    file, config = load_kept(folder)
    config = config.pinned()
    # Not the spec's: those of a trial that steers nothing have forgotten its layer.
    values = job_values({**file.space.fixed, **proposed})
    params = params_to_json(make_params(then.job, values))
    steering = {**_steering(then.job, params, vector, strength), "max_new_tokens": most}
    make_params(_JOB, steering)  # says what is wrong with it before the model is loaded
    name = f"{trial}-{time.strftime('%Y%m%d-%H%M%S')}.jsonl"
    with probing(Planner(file.space, config), config, then.model, Donors([folder])) as probe:
        yield Chat(probe, steering, then.model, then.seed, folder / "chats" / name)


def _steering(
    name: str, params: Mapping[str, Any], vector: int | None, strength: float | None
) -> dict[str, Any]:
    """Parameters of `jobs.generate` that steer as a job's parameters do."""
    job = load_job(name)
    if hasattr(job, "learned_vectors"):
        if vector is None:
            number = job.learned_vectors(make_params(name, params))
            raise SpecError(f"{name} has learned a set; give --vector 0 to {number - 1}")
        learned = f"{name}{canonical_json(dict(params))}"
        factor = 1.0 if strength is None else strength
        return {"learned": learned, "vector": vector, "layer": params["source"], "multiplier": factor}
    names = {field.name for field in dataclasses.fields(load_job(_JOB).Params)} - set(_NOT_STEERING)
    if not {"layer", *_STRENGTHS} <= params.keys():
        raise SpecError(f"{name} steers nothing that can be talked to; take a trial of another sweep")
    found = {name: value for name, value in params.items() if name in names}
    if vector is not None and not params.get("learned"):
        raise SpecError(f"--vector {vector}: {name} steers with one vector a layer here; leave it out")
    if vector is not None:
        found["vector"] = vector
    if strength is not None:
        own = "dose" if params["multiplier"] is None else "multiplier"
        found |= {**dict.fromkeys(_STRENGTHS), own: strength}
    return found

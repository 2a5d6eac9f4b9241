"""From a proposal to the specs that have to be computed for it. No I/O beyond hashing datasets, no state."""

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

from jobs.errors import SpecError
from jobs.resolve import load_job, make_params, make_spec, prerequisites
from jobs.spec import Requirement, Spec
from orchestrator.config import RunConfig
from orchestrator.models import MODEL_FIELDS, Models, job_values
from orchestrator.scheduler import pack_limit
from orchestrator.space_file import grid_size
from search_spaces.base import Space
from storage.ledger import Asked


class Planner:
    """Knows what a space's parameters mean as specs.

    Args:
        space: What is tried.
        config: The model and the seed.
    """

    def __init__(self, space: Space, config: RunConfig) -> None:
        self._space = space
        self._config = config
        self._models = Models(config)

    def spec(self, params: Mapping[str, Any]) -> Spec:
        """What has to be computed for a proposal."""
        values = {**self._space.fixed, **params}
        wanted = Requirement(job=self._space.job, params=make_params(self._space.job, job_values(values)))
        return make_spec(wanted, model=self._models.of(values), seed=self._config.seed)

    def meant(self, trial: Asked) -> Asked:
        """A trial with what has to be computed for it now."""
        return dataclasses.replace(trial, spec=self.spec(trial.params))

    def needs(self, spec: Spec) -> dict[str, Spec]:
        """What the spec's job, and the weights that it runs on, require, by requirement key."""
        wanted = Requirement(job=spec.job, params=make_params(spec.job, spec.params))
        return {
            requirement.key: make_spec(requirement, model=model, seed=self._config.seed)
            for requirement, model in prerequisites(wanted, spec.model)
        }

    def control(self, spec: Spec) -> str | None:
        """Id of the spec whose texts a spec's are compared with; None where its job names none."""
        named = getattr(load_job(spec.job), "control", lambda params: None)
        need = named(make_params(spec.job, spec.params))
        return None if need is None else make_spec(need, model=spec.model, seed=spec.seed).id

    def stages(self, spec: Spec) -> list[Spec]:
        """What a trial's spec has to pass, in order: its cheaper forms, and itself in the end."""
        cheaper = [
            Requirement(job=spec.job, params=make_params(spec.job, {**spec.params, **stage.overrides}))
            for stage in self._space.stages
        ]
        return [
            *(make_spec(form, model=spec.model, seed=self._config.seed) for form in cheaper),
            spec,
        ]

    def shared(self) -> list[str]:
        """Parameters that the space varies and that the rows of one pack must share."""
        by = (*(load_job(self._space.job).PACK_BY or ()), *MODEL_FIELDS)
        return [name for name in by if name in self._space.parameters]


def check_unchanged(planner: Planner, asked: Iterable[Asked]) -> None:
    """Refuse to go on with trials that would mean other work now than when they were asked for.

    Raises:
        SpecError: If the model's files, the job's code, a library under it or a dataset has changed.
    """
    for trial in asked:
        now, then = planner.spec(trial.params), trial.spec
        if now.id == then.id:
            continue
        changed = [name for name in now.data if now.data[name] != then.data.get(name)]
        data = sorted(str(now.params.get(name, name)) for name in changed)
        what = f"data of {data}" if data else f"code of {then.job}, or torch or transformers under it,"
        if now.model != then.model:
            what = f"model {now.model.id} (its weights, tokenizer or configuration)"
        raise SpecError(
            f"the {what} changed since trial {trial.trial} was asked for, and old and new trials could not "
            "be compared; put it back, start anew with another --out, or `steersweep run --accept-changes`"
        )


def group_size(space: Space, config: RunConfig, *, unasked: int) -> int:
    """How many trials to ask for together: what a stage compares, or else a pack."""
    if any(stage.keep < 1 for stage in space.stages):
        return min(unasked, space.bracket)
    return pack_limit(unasked=unasked, workers=config.workers, max_pack=config.max_pack)


def planned_trials(space: Space, config: RunConfig) -> int:
    """Number of trials that the sweep will have had in the end.

    Raises:
        SpecError: If a sampler that never ends was given no number.
    """
    wanted = config.trials or space.trials
    if (config.sampler or space.sampler) == "grid":
        size = grid_size(space)
        return size if wanted is None else min(size, wanted)
    if wanted is None:
        raise SpecError(f"sampler {config.sampler!r} needs a number of trials; give --trials N")
    return wanted

"""What a stored result was made of, told again from its job's own words."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from jobs.errors import SpecError
from jobs.resolve import load_job, make_params, make_spec, prerequisites
from jobs.spec import ModelRef, Requirement, Spec
from storage.ledger import read_asked


def control_of(spec: Spec) -> str | None:
    """Id of the spec whose texts a trial's are compared with; None where its job names none."""
    try:
        named = getattr(load_job(spec.job), "control", lambda params: None)
        need = named(make_params(spec.job, spec.params))
        return None if need is None else make_spec(need, model=spec.model, seed=spec.seed).id
    except SpecError:  # another version of the job wrote it, or a dataset is gone
        return None


def everything_required(folder: Path) -> Iterator[Spec]:
    """What the trials of a sweep and their requirements require, each once.

    What cannot be told any more is left out. A spec's id changes with the code of its job: after a change
    these are no longer the ids that are stored.
    """
    waiting = [asked.spec for asked in read_asked(folder)]
    seen: set[tuple[str, ModelRef, int]] = set()
    while waiting:
        spec = waiting.pop()
        for need, model in _needs(spec):
            if (need.key, model, spec.seed) in seen:
                continue
            seen.add((need.key, model, spec.seed))
            try:
                waiting.append(make_spec(need, model=model, seed=spec.seed))
            except SpecError:  # a dataset is gone
                continue
            yield waiting[-1]


def _needs(spec: Spec) -> list[tuple[Requirement, ModelRef]]:
    try:
        return prerequisites(Requirement(job=spec.job, params=make_params(spec.job, spec.params)), spec.model)
    except SpecError:  # another version of the job wrote it
        return []


def stored_params(folder: Path, jobs: Mapping[str, str]) -> dict[str, Mapping[str, Any]]:
    """Parameters of stored specs, as far as they can be told; `jobs` gives each spec's job.

    Where a job's code has changed since, the only requirement of it still is the only stored spec of it.
    """
    asked = {trial.spec.id: trial.spec for trial in read_asked(folder)}
    wanted = list(everything_required(folder))
    found = {spec.id: spec.params for spec in (*wanted, *asked.values()) if spec.id in jobs}
    for job in set(jobs.values()):
        specs = [spec for spec in jobs if jobs[spec] == job and spec not in asked]
        candidates = [spec for spec in wanted if spec.job == job]
        if len(specs) == len(candidates) == 1:
            found[specs[0]] = candidates[0].params
    return found

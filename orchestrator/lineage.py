"""What a stored result was made of, told again from its job's own words."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from jobs.errors import SpecError
from jobs.resolve import make_params, make_spec, prerequisites
from jobs.spec import Requirement, Spec
from storage.ledger import read_asked


def required(spec: Spec) -> list[Spec]:
    """The specs whose artifacts a spec takes, in its job's order; what cannot be told any more is left out.

    A spec's id changes with the code of its job: after a change these are no longer the ids that are stored.
    """
    try:
        wanted = Requirement(job=spec.job, params=make_params(spec.job, spec.params))
        needs = prerequisites(wanted, spec.model)
    except SpecError:  # another version of the job wrote it
        return []
    found = []
    for need, model in needs:
        try:
            found.append(make_spec(need, model=model, seed=spec.seed))
        except SpecError:  # a dataset is gone
            continue
    return found


def everything_required(folder: Path) -> Iterator[Spec]:
    """What the trials of a sweep and their requirements require, each once."""
    waiting = [asked.spec for asked in read_asked(folder)]
    seen: set[str] = set()
    while waiting:
        for need in required(waiting.pop()):
            if need.id not in seen:
                seen.add(need.id)
                waiting.append(need)
                yield need


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

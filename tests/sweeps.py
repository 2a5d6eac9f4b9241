"""Sweeps of a job that needs no model, driven in this process, and what holds of every one of them."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import optuna
from optuna.trial import TrialState

from jobs.resolve import make_params
from jobs.spec import Spec
from orchestrator.config import RunConfig
from orchestrator.folder import claimed
from orchestrator.lineage import stored_specs
from orchestrator.progress import Tally
from orchestrator.sampler import OptunaSampler
from orchestrator.space_file import SpaceFile
from orchestrator.sweep import Sweep
from search_spaces.base import Float, Grid, Int, Objective, Space
from storage.donors import Donors
from storage.ledger import read_asked
from storage.query import open_sweep
from storage.store import Store
from tests import fake_job
from tests.fakes import InlinePool, SilentProgress

OBJECTIVES = (
    Objective(metric="total", direction="maximize"),
    Objective(metric="square", direction="minimize"),
)
NUMBERS = {"x": Grid([1, 2, 3, 4, 5, 6]), "group": Grid(["a", "b"])}


def make_space(parameters: Mapping[str, Any] = NUMBERS, **changes: Any) -> Space:
    values: dict[str, Any] = {
        "description": "numbers",
        "job": "tests.fake_job",
        "parameters": parameters,
        "objectives": OBJECTIVES,
        "sampler": "grid",
        **changes,
    }
    return Space(**values)


class Driven(NamedTuple):
    tally: Tally
    pool: InlinePool


def prepare(
    folder: Path, space: Space, *, workers: int = 2, max_pack: int = 4, seed: int = 0, tuned: str = ""
) -> RunConfig:
    config = RunConfig(model="no-model", workers=workers, max_pack=max_pack, seed=seed, tuned=tuned)
    if not (folder / "sweep.json").exists():
        with claimed(folder, SpaceFile(space, Path("fake.py"), "SPACE = ..."), config):
            pass
    return config


def drive(
    folder: Path,
    space: Space,
    *,
    trials: int,
    workers: int = 2,
    max_pack: int = 4,
    tuned: str = "",
    sampler: str | None = None,
    on_result: Callable[[], None] = lambda: None,
    is_asked_to_stop: Callable[[], bool] = lambda: False,
    pool: InlinePool | None = None,
    reuse: Sequence[Path] = (),
    say: Callable[[str], None] = lambda line: None,
    **pool_options: Any,
) -> Driven:
    """What `run_sweep` does, without Ray, mirror and report."""
    config = prepare(folder, space, workers=workers, max_pack=max_pack, tuned=tuned)
    pool = pool or InlinePool(folder, workers=workers, **pool_options)
    sweep = Sweep(
        folder,
        space=space,
        config=config,
        trials=trials,
        sampler=open_sampler(folder, space, sampler),
        pool=pool,
        donors=Donors(reuse, say),
        progress=SilentProgress(),
        is_asked_to_stop=is_asked_to_stop,
        on_result=on_result,
    )
    return Driven(sweep.run(), pool)


def open_sampler(folder: Path, space: Space, name: str | None = None) -> OptunaSampler:
    return OptunaSampler(
        space, name=name or space.sampler, seed=0, journal=folder / "optuna.journal", study="study"
    )


def trials_of(folder: Path) -> list[dict[str, Any]]:
    """Rows of the trials that have ended, with a key for each parameter; DuckDB would be slow at this."""
    rows = sorted(Store(folder).rows("trials"), key=lambda row: row["trial"])
    return [{**json.loads(row["params"]), **row} for row in rows]


def metrics_of(folder: Path) -> dict[tuple[str, str, str], float | None]:
    """All metrics as the store holds them, by spec, split and name; each stands there once."""
    rows = Store(folder).rows("metrics")
    found = {(row["spec"], row["split"], row["name"]): row["value"] for row in rows}
    assert len(found) == len(rows)
    return found


def proposed(row: Mapping[str, Any], space: Space) -> fake_job.Params:
    params: fake_job.Params = make_params(space.job, {**space.fixed, **json.loads(row["params"])})
    return params


def study_of(folder: Path) -> list[optuna.trial.FrozenTrial]:
    backend = optuna.storages.journal.JournalFileBackend(str(folder / "optuna.journal"))
    storage = optuna.storages.JournalStorage(backend)
    return optuna.load_study(study_name=None, storage=storage).trials


def check_ended(folder: Path, space: Space, *, trials: int) -> None:
    """What holds of every sweep that has ended, whatever happened on the way."""
    rows = trials_of(folder)
    assert [row["trial"] for row in rows] == list(range(trials))
    assert {row["state"] for row in rows} <= {"completed", "infeasible", "failed"}
    assert all((row["reason"] is None) == (row["state"] == "completed") for row in rows)
    metrics = metrics_of(folder)
    first: dict[str, int] = {}
    for row in rows:
        earlier = first.setdefault(row["spec"], row["trial"])
        assert row["reused_from"] == (None if earlier == row["trial"] else earlier)
        assert (row["seconds"] is None) == (row["reused_from"] is not None) or row["state"] != "completed"
        if row["state"] == "completed":
            for split, values in fake_job.expected(proposed(row, space)).items():
                for name, value in values.items():
                    assert metrics[row["spec"], split, name] == value
    told = {"completed": TrialState.COMPLETE, "infeasible": TrialState.PRUNED, "failed": TrialState.FAIL}
    study = study_of(folder)
    assert [trial.state for trial in study] == [told[row["state"]] for row in rows]
    assert [trial.params for trial in study] == [json.loads(row["params"]) for row in rows]
    asked = read_asked(folder)
    assert [(trial.trial, trial.params) for trial in asked] == [
        (row["trial"], json.loads(row["params"])) for row in rows
    ]
    assert [trial.spec.id for trial in asked] == [row["spec"] for row in rows]
    check_specs(folder, {trial.spec.id: trial.spec for trial in asked})
    assert all(
        trial.values == [metrics[row["spec"], "select", objective.metric] for objective in space.objectives]
        for trial, row in zip(study, rows, strict=True)
        if row["state"] == "completed"
    )


def check_specs(folder: Path, asked: Mapping[str, Spec]) -> None:
    """Every spec that has a result stands in `specs` once, as it was, with what it took and where that is."""
    store = Store(folder)
    rows = {row["spec"]: row for row in open_sweep(folder).rows("SELECT * FROM specs")}
    assert len(open_sweep(folder).rows("SELECT * FROM specs")) == len(rows)
    assert rows.keys() == store.results.keys()
    assert {name: spec for name, spec in stored_specs(open_sweep(folder)).items() if name in asked} == asked
    made = {row["spec"] for row in store.rows("artifacts")}
    for spec, row in rows.items():
        needs = json.loads(row["requires"])
        assert set(needs) <= rows.keys()
        if store.results[spec].status == "completed":
            assert set(needs) <= made


class Scenario(NamedTuple):
    """A sweep that is stopped and taken up again, and at every how many events."""

    space: Space
    trials: int
    losses: dict[int, Any]
    every: int = 1
    workers: int = 2


SCENARIOS = {
    "grid": Scenario(make_space({"x": Grid([0, 1, 2]), "y": Grid([1.0, 2.0])}), 6, {}),
    "prerequisites and failures": Scenario(
        make_space({"mode": Grid(["ok", "fail", "raise", "nan"]), "x": Grid([1, 2])}, fixed={"source": 5}),
        8,
        {2: "after"},
    ),
    "random packs": Scenario(
        make_space({"group": Grid(["a", "b", "c"]), "x": Int(low=1, high=99)}, sampler="random", trials=18),
        18,
        {3: "after"},
        every=6,
    ),
    "random with duplicates": Scenario(
        make_space({"x": Int(low=0, high=2), "y": Grid([1.0, 2.0])}, sampler="random", trials=10),
        10,
        {1: "before"},
    ),
    # Of one worker, so that it is always the same that TPE has been told.
    "TPE packs": Scenario(
        make_space({"x": Int(low=1, high=99), "y": Float(low=0, high=1)}, sampler="tpe", trials=22),
        22,
        {4: "after"},
        every=6,
        workers=1,
    ),
}


def drive_scenario(folder: Path, name: str, **options: Any) -> Driven:
    scenario = SCENARIOS[name]
    return drive(folder, scenario.space, trials=scenario.trials, workers=scenario.workers, **options)


def outcome_of(folder: Path) -> dict[str, Any]:
    """What a sweep is worth in the end: every trial's parameters and state, and every metric."""
    rows = [
        {key: row[key] for key in ("trial", "spec", "state", "reason", "reused_from", "params")}
        for row in trials_of(folder)
    ]
    return {"trials": rows, "metrics": metrics_of(folder)}

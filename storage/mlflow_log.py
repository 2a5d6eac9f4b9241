"""A sweep's results in MLflow, to be looked at there. The only importer of mlflow.

The tables stay the record: the mirror is written from them, and can be deleted and written again.
"""

import itertools
import json
import os
import re
import sqlite3
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import unquote

from storage.mlflow_text import cut, note, run_name
from storage.places import mlflow_place
from storage.query import StoredSweep, open_sweep

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import DatasetInput, Run

_SWEEP_TAG = "steersweep.sweep"
_TRIAL_TAG = "steersweep.trial"
_SUFFIXES = {"select": "", "report": "_report", "extract": "_extract"}
_MAX_PARAMS = 20  # of a run; beyond this, and the next, MLflow's pages become slow
_MAX_METRICS = 30
_MAX_DIGEST = 36  # characters of a dataset's hash
_MAX_CHARACTERS = 500  # of a parameter or a tag; old servers refuse more
ENVIRONMENT = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",  # a retry creates a run twice if the first answer was lost
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",  # seconds
    "MLFLOW_LOGGING_LEVEL": "ERROR",  # what fails is raised, and said once
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",  # processes that only MLflow's own evaluations need
}
"""Settings that MLflow takes from the environment alone; what the user has set stays."""

_UNKNOWN_TRIALS = """
SELECT trials.trial, spec, state, reason, reused_from, finished, params,
    tries.*, coalesce(metrics, []) AS metrics
FROM trials
LEFT JOIN (
    SELECT trial AS tried, count(*) AS attempts, arg_max(worker, started) AS worker, max(started) AS begun,
        max(finished) AS ended
    FROM attempts GROUP BY trial
) tries ON tried = trials.trial
LEFT JOIN (
    SELECT trial AS measured, list(struct_pack(split, name, value) ORDER BY name, split DESC) AS metrics
    FROM metrics WHERE value IS NOT NULL GROUP BY trial
) ON measured = trials.trial
WHERE state IN ('completed', 'infeasible', 'failed')
    AND NOT list_contains(CAST({known} AS BIGINT[]), trials.trial)
ORDER BY trials.trial
"""


class _Runs(NamedTuple):
    """What MLflow has of a sweep: trials whose run is complete, and by trial the runs left half-written."""

    experiment: str
    parent: "Run"
    done: set[int]
    begun: Mapping[int, "Run"]


def tracking_uri(folder: Path) -> str:
    """URI of a sweep's own MLflow store: `mlflow.db` in `mlflow_place`, artifacts beside it."""
    return _sqlite(mlflow_place(folder) / "mlflow.db")


def _sqlite(path: Path) -> str:
    return "sqlite:///" + str(path).replace("%", "%25").replace("?", "%3F")


class Mirror:
    """Writes a sweep's finished trials to MLflow: one parent run a sweep, one child run a trial.

    Runs are known by their tags, so mirrors that follow one another write each trial once. Use one
    at a time.

    Args:
        folder: The sweep's folder.
        uri: MLflow store or server; None for the store in the folder.
    """

    def __init__(self, folder: Path, uri: str | None = None) -> None:
        self._folder = folder
        self._uri = uri or tracking_uri(folder)
        self._runs: _Runs | None = None

    def sync(self, is_stopped: Callable[[], bool] = lambda: False) -> int:
        """Log the finished trials that MLflow does not have; the sweep's run is RUNNING until `finish`.

        Args:
            is_stopped: Asked before each trial; once it says True, the rest is left to the next call.

        Returns:
            How many trials were logged.

        Raises:
            Exception: Whatever MLflow raises; the next call goes on where this one ended.
        """
        sweep, client = open_sweep(self._folder), self._client
        runs = self._runs or self._begin(sweep)
        # A call that fails may have reached the server: after a failure the runs are looked up again.
        self._runs = None
        known = len(runs.done)
        trials = sweep.rows(_UNKNOWN_TRIALS.format(known=sorted(runs.done)))
        for trial in itertools.takewhile(lambda _: not is_stopped(), trials):
            _log_trial(client, sweep, runs, trial)
            runs.done.add(trial["trial"])
        if trials and not is_stopped():
            _log_summary(client, sweep, runs.parent)
        self._runs = runs
        return len(runs.done) - known

    def finish(self, artifacts: Sequence[Path] = (), *, is_complete: bool = True) -> None:
        """Bring the sweep's run up to date, add files to it and end it.

        Args:
            artifacts: Files to add.
            is_complete: Whether all of the sweep's trials have ended: FINISHED if so, else KILLED.

        Raises:
            Exception: Whatever MLflow raises.
        """
        sweep, client = open_sweep(self._folder), self._client
        parent = (self._runs or self._find_runs(sweep)).parent
        self._runs = None
        finished = _log_summary(client, sweep, parent)
        _log_datasets(client, sweep, parent)
        for path in artifacts:
            client.log_artifact(parent.info.run_id, str(path))
        status = "FINISHED" if is_complete else "KILLED"
        client.set_terminated(parent.info.run_id, status, _milliseconds(finished))

    def watch(self) -> Callable[[], None]:
        """Log what this machine's CPU, memory, disk, network and GPUs do to the sweep's run, every 10 s.

        Returns:
            What ends it.

        Raises:
            Exception: Whatever MLflow raises.
        """
        parent = (self._runs or self._find_runs(open_sweep(self._folder))).parent
        from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

        # MLflow has no types there.
        monitor: Any = SystemMetricsMonitor(  # type: ignore[no-untyped-call]
            parent.info.run_id, tracking_uri=self._uri, resume_logging=True
        )
        monitor.start()
        end: Callable[[], None] = monitor.finish
        return end

    def differences(self) -> dict[str, str]:
        """Where MLflow says something else than the tables, of a sweep that nobody drives.

        Returns:
            What differs, by `sweep` or number of the trial. Empty if nothing was mirrored yet because
            nothing has ended.

        Raises:
            Exception: Whatever MLflow raises.
        """
        sweep = open_sweep(self._folder)
        states = _states(sweep)
        database = _database(self._uri)
        if not states and database is not None and not database.exists():
            return {}
        runs = self._find_runs(sweep)
        wrong = {str(trial): "MLflow lacks it" for trial in states.keys() - runs.done - runs.begun.keys()}
        for trial, run in runs.begun.items():
            status = "as RUNNING" if run.info.status == "RUNNING" else f"as {run.data.tags.get('state')}"
            wrong[str(trial)] = f"MLflow has it {status}, the tables as {states.get(trial, 'waiting')}"
        if runs.parent.info.status == "RUNNING":
            wrong["sweep"] = "MLflow has it as RUNNING"
        return wrong

    def _begin(self, sweep: StoredSweep) -> _Runs:
        runs = self._find_runs(sweep)
        if runs.parent.info.status != "RUNNING":
            self._client.update_run(runs.parent.info.run_id, status="RUNNING")
        return runs

    def _find_runs(self, sweep: StoredSweep) -> _Runs:
        client, experiment = self._client, self._find_experiment(sweep.identity["space"])
        found = _search(client, experiment, f"tags.`{_SWEEP_TAG}` = '{sweep.identity['sweep']}'")
        children = {int(run.data.tags[_TRIAL_TAG]): run for run in found if _TRIAL_TAG in run.data.tags}
        states = _states(sweep)
        begun = {
            trial: run
            for trial, run in children.items()
            if run.info.status == "RUNNING" or run.data.tags.get("state") != states.get(trial)
        }
        parents = [run for run in found if _TRIAL_TAG not in run.data.tags]
        parent = parents[0] if parents else _create_parent(client, experiment, sweep)
        _log(client, parent, _sweep_params(sweep.identity), {})
        return _Runs(experiment, parent, set(children) - set(begun), begun)

    def _find_experiment(self, name: str) -> str:
        experiment = self._client.get_experiment_by_name(name)
        if experiment is None:
            return self._client.create_experiment(name, self._artifact_location())
        if experiment.lifecycle_stage == "deleted":
            self._client.restore_experiment(experiment.experiment_id)
        return experiment.experiment_id

    @cached_property
    def _client(self) -> "MlflowClient":
        for name, value in ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        from mlflow import MlflowClient

        database = _database(self._uri)
        if database is not None and not database.exists():
            self._create(database)
        if self._uri == tracking_uri(self._folder):
            _move_in(mlflow_place(self._folder) / "mlflow.db", self._artifact_location() or "")
        return MlflowClient(tracking_uri=self._uri)

    def _create(self, database: Path) -> None:
        """Make a store whole or not at all: MLflow cannot go on with one whose making was cut short.

        The client would make one too, but have its experiment "Default" keep its artifacts in the
        current directory.
        """
        from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

        database.parent.mkdir(parents=True, exist_ok=True)
        staging = database.with_name(f".{database.name}.new")
        staging.unlink(missing_ok=True)
        SqlAlchemyStore(_sqlite(staging), self._artifact_location())  # type: ignore[no-untyped-call]
        staging.replace(database)

    def _artifact_location(self) -> str | None:
        if self._uri.startswith("http"):
            return None
        database = _database(self._uri)
        folder = database.parent if database else self._folder
        return (folder.resolve() / "mlartifacts").as_uri()


def _move_in(database: Path, artifacts: str) -> None:
    """Have a sweep's own store keep its files beside it, where its folder was copied or moved.

    MLflow writes down where files lie, and a copy would go on writing to the original.
    """
    end = "/mlartifacts"
    with closing(sqlite3.connect(database)) as connection, connection:
        for table, key, column in (
            ("experiments", "experiment_id", "artifact_location"),
            ("runs", "run_uuid", "artifact_uri"),
        ):
            for name, place in connection.execute(f"SELECT {key}, {column} FROM {table}").fetchall():
                before, found, rest = place.rpartition(end)
                if found and before + end != artifacts:
                    change = f"UPDATE {table} SET {column} = ? WHERE {key} = ?"
                    connection.execute(change, (artifacts + rest, name))


def _states(sweep: StoredSweep) -> dict[int, str]:
    rows = sweep.rows(
        "SELECT trial, state FROM trials WHERE state IN ('completed', 'infeasible', 'failed') ORDER BY trial"
    )
    return {row["trial"]: row["state"] for row in rows}


def _database(uri: str) -> Path | None:
    """File of an SQLite store; None for stores of other kinds."""
    prefix, _, path = uri.partition("sqlite:///")
    return None if prefix or not path else Path(unquote(path.partition("?")[0]))


def _search(client: "MlflowClient", experiment: str, condition: str) -> list["Run"]:
    page = client.search_runs([experiment], condition)
    runs = list(page)
    while page.token:
        page = client.search_runs([experiment], condition, page_token=page.token)
        runs += page
    return runs


def _create_parent(client: "MlflowClient", experiment: str, sweep: StoredSweep) -> "Run":
    identity, provenance = sweep.identity, sweep.identity.get("provenance", {})
    started = sweep.rows("SELECT min(started) AS seconds FROM attempts")[0]["seconds"]
    tags = {
        _SWEEP_TAG: identity["sweep"],
        "folder": sweep.folder.resolve(),
        "packages": " ".join(
            f"{name}=={version}" for name, version in provenance.get("packages", {}).items()
        ),
        "mlflow.source.name": "steersweep",
        "mlflow.source.git.commit": provenance.get("git_revision"),
    }
    seconds = time.time() if started is None else started
    return client.create_run(experiment, _milliseconds(seconds), _texts(tags), run_name=identity["sweep"])


def _sweep_params(identity: Mapping[str, Any]) -> dict[str, Any]:
    model = {("model" if name == "id" else name): value for name, value in identity["model"].items()}
    # A URI may hold a password.
    config = {name: value for name, value in identity["config"].items() if name != "mlflow"}
    first = {"job": identity["job"], **identity.get("fixed", {}), **model, "seed": identity["seed"]}
    return first | config | model


def _log_summary(client: "MlflowClient", sweep: StoredSweep, parent: "Run") -> float:
    """Log the parent run's counts and description; returns when the last trial finished, s since 1970."""
    with sweep.moment() as now:
        counts, description = now.counts(), note(now)
        [last] = now.rows("SELECT max(finished) AS finished FROM trials")
    finished: float = last["finished"] or time.time()
    ended = {state: counts[state] for state in ("completed", "failed", "infeasible")}
    metrics = {"trials": sum(counts.values()), **ended}
    _log(client, parent, {}, metrics, seconds=finished, step=sum(ended.values()))
    client.set_tag(parent.info.run_id, "mlflow.note.content", description)
    return finished


def _log_datasets(client: "MlflowClient", sweep: StoredSweep, parent: "Run") -> None:
    """Log the datasets that the sweep's jobs have read as inputs of its run, by name and hash."""
    from mlflow.entities import Dataset, DatasetInput, InputTag

    read: dict[tuple[str, str, str], str] = {}
    for row in sweep.rows("SELECT DISTINCT params, data FROM specs WHERE data <> '{}'"):
        params = json.loads(row["params"])
        for key, digest in json.loads(row["data"]).items():
            field = key.rpartition(":")[2]
            source = params.get(field)
            source = source if isinstance(source, str) and source else field
            read[Path(source).stem, digest[:_MAX_DIGEST], source] = field
    inputs = [
        DatasetInput(
            Dataset(name=name, digest=digest, source_type="local", source=json.dumps({"uri": source})),
            [InputTag("mlflow.data.context", field)],
        )
        for (name, digest, source), field in sorted(read.items())
    ]
    known = {(each.dataset.name, each.dataset.digest) for each in _inputs_of(client, parent)}
    if new := [each for each in inputs if (each.dataset.name, each.dataset.digest) not in known]:
        client.log_inputs(parent.info.run_id, new)


def _inputs_of(client: "MlflowClient", run: "Run") -> "list[DatasetInput]":
    inputs = client.get_run(run.info.run_id).inputs
    return list(inputs.dataset_inputs) if inputs else []


def _log_trial(client: "MlflowClient", sweep: StoredSweep, runs: _Runs, trial: Mapping[str, Any]) -> None:
    params = json.loads(trial["params"])
    # A reused result has no attempt of its own.
    finished = trial["ended"] or trial["finished"]
    tags = {
        _SWEEP_TAG: sweep.identity["sweep"],
        _TRIAL_TAG: trial["trial"],
        "mlflow.parentRunId": runs.parent.info.run_id,
        **{name: trial[name] for name in ("state", "reason", "spec", "reused_from", "attempts", "worker")},
    }
    run = runs.begun.get(trial["trial"])
    if run is None:
        begun, name = _milliseconds(trial["begun"] or finished), run_name(trial["trial"], params)
        run = client.create_run(runs.experiment, begun, _texts(tags), run_name=name)
    else:
        _set_tags(client, run, tags)
    objectives = [objective["metric"] for objective in sweep.identity["objectives"]]
    _log(client, run, params, _metric_values(trial["metrics"], objectives), seconds=finished)
    status = "FAILED" if trial["state"] == "failed" else "FINISHED"
    client.set_terminated(run.info.run_id, status, _milliseconds(finished))


def _set_tags(client: "MlflowClient", run: "Run", tags: Mapping[str, Any]) -> None:
    """Bring a run's tags up to date: a trial that was tried anew has others."""
    texts = _texts(tags)
    for name, text in texts.items():
        if run.data.tags.get(name) != text:
            client.set_tag(run.info.run_id, name, text)
    for name in ("reason", "reused_from"):
        if name in run.data.tags and name not in texts:
            client.delete_tag(run.info.run_id, name)


def _metric_values(rows: Sequence[Mapping[str, Any]], objectives: Sequence[str]) -> dict[str, float]:
    """Metrics by the names MLflow shows: the objectives first, what the direction came from last."""
    order = sorted(rows, key=lambda row: (row["split"] == "extract", row["name"] not in objectives))
    return {row["name"] + _SUFFIXES[row["split"]]: row["value"] for row in order[:_MAX_METRICS]}


def _log(
    client: "MlflowClient",
    run: "Run",
    params: Mapping[str, Any],
    metrics: Mapping[str, float],
    *,
    seconds: float = 0,
    step: int = 0,
) -> None:
    """Log values of a run, but for parameters that it already has: MLflow lets none change."""
    from mlflow.entities import Metric, Param

    texts = [(_key(name), text) for name, text in _texts(params).items()][:_MAX_PARAMS]
    timestamp = _milliseconds(seconds)
    client.log_batch(
        run.info.run_id,
        params=[Param(name, text) for name, text in texts if name not in run.data.params],
        metrics=[Metric(_key(name), value, timestamp, step) for name, value in metrics.items()],
        synchronous=True,
    )


def _texts(values: Mapping[str, Any]) -> dict[str, str]:
    return {name: cut(str(value), _MAX_CHARACTERS) for name, value in values.items() if value is not None}


def _key(name: str) -> str:
    """The name with `_` in place of what MLflow refuses in names."""
    return re.sub(r"[^\w.\- ]", "_", name)


def _milliseconds(seconds: float) -> int:
    return round(seconds * 1000)

"""A sweep's results in MLflow, to be looked at there. The only importer of mlflow.

The tables stay the record: the mirror is written from them, and can be deleted and written again.
"""

import itertools
import json
import logging
import os
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from jobs.errors import SpecError
from storage.pareto import pareto
from storage.query import Sweep, open_sweep

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

logger = logging.getLogger(__name__)

_SWEEP_TAG = "steersweep.sweep"
_TRIAL_TAG = "steersweep.trial"
_SUFFIXES = {"select": "", "report": "_report", "extract": "_extract"}
_MAX_PARAMS = 20  # of a run; beyond this, and the next, MLflow's pages become slow
_MAX_METRICS = 30
_MAX_CHARACTERS = 500  # of a parameter or a tag; old servers refuse more
_MAX_NOTE_CHARACTERS = 5000  # of a description; the same
_ENVIRONMENT = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",  # MLflow's 7 take minutes, and the next sync tries again anyway
    "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",  # seconds
    "MLFLOW_LOGGING_LEVEL": "WARNING",
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
    """URI of a sweep's own MLflow store: `mlflow.db` in its folder, artifacts beside it in `mlartifacts`."""
    return f"sqlite:///{folder.resolve() / 'mlflow.db'}"


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
        """Log the finished trials that MLflow does not have; returns how many.

        Args:
            is_stopped: Asked before each trial; once it says True, the rest is left to the next call.

        Raises:
            Exception: Whatever MLflow raises; the next call goes on where this one ended.
        """
        sweep, client = open_sweep(self._folder), _connect(self._uri)
        runs = self._runs or self._find_runs(client, sweep)
        # A call that fails may have reached the server: after a failure the runs are looked up again.
        self._runs = None
        known = len(runs.done)
        trials = sweep.rows(_UNKNOWN_TRIALS.format(known=sorted(runs.done)))
        if trials and runs.parent.info.status != "RUNNING":
            client.update_run(runs.parent.info.run_id, status="RUNNING")
        for trial in itertools.takewhile(lambda _: not is_stopped(), trials):
            _log_trial(client, sweep, runs, trial)
            runs.done.add(trial["trial"])
        if trials:
            _log_summary(client, sweep, runs.parent)
        self._runs = runs
        return len(runs.done) - known

    def finish(self, artifacts: Sequence[Path] = ()) -> None:
        """Bring the parent run up to date, add files to it and end it.

        Raises:
            Exception: Whatever MLflow raises.
        """
        sweep, client = open_sweep(self._folder), _connect(self._uri)
        parent = (self._runs or self._find_runs(client, sweep)).parent
        self._runs = None
        finished = _log_summary(client, sweep, parent)
        for path in artifacts:
            client.log_artifact(parent.info.run_id, str(path))
        client.set_terminated(parent.info.run_id, "FINISHED", _milliseconds(finished))

    def _find_runs(self, client: "MlflowClient", sweep: Sweep) -> _Runs:
        experiment = self._find_experiment(client, sweep.identity["space"])
        found = _search(client, experiment, f"tags.`{_SWEEP_TAG}` = '{sweep.identity['sweep']}'")
        children = {int(run.data.tags[_TRIAL_TAG]): run for run in found if _TRIAL_TAG in run.data.tags}
        begun = {trial: run for trial, run in children.items() if run.info.status == "RUNNING"}
        parents = [run for run in found if _TRIAL_TAG not in run.data.tags]
        parent = parents[0] if parents else _create_parent(client, experiment, sweep)
        _log(client, parent, _sweep_params(sweep.identity), {})
        return _Runs(experiment, parent, set(children) - set(begun), begun)

    def _find_experiment(self, client: "MlflowClient", name: str) -> str:
        experiment = client.get_experiment_by_name(name)
        if experiment is None:
            return client.create_experiment(name, self._artifact_location())
        if experiment.lifecycle_stage == "deleted":
            client.restore_experiment(experiment.experiment_id)
        return experiment.experiment_id

    def _artifact_location(self) -> str | None:
        if self._uri.startswith("http"):
            return None
        database = self._uri.removeprefix("sqlite:///")
        folder = self._folder if database == self._uri else Path(database).parent
        return (folder.resolve() / "mlartifacts").as_uri()


class BackgroundMirror:
    """A `Mirror` in a thread of its own; whatever goes wrong there is one warning."""

    def __init__(self, folder: Path, uri: str | None = None) -> None:
        self._mirror = Mirror(folder, uri)
        self._wanted = threading.Event()
        self._closing = threading.Event()
        self._stopped = threading.Event()
        self._artifacts: tuple[Path, ...] = ()
        self._warned = False
        self._complete = False
        self._thread = threading.Thread(target=self._work, name="mlflow-mirror", daemon=True)
        self._thread.start()

    def notify(self) -> None:
        """Say that there are new results; returns at once."""
        self._wanted.set()

    def close(self, artifacts: Sequence[Path], timeout_seconds: float) -> bool:
        """Mirror what is left, add files to the parent run and end it.

        Returns:
            Whether MLflow has everything. False after a failure, which was logged, or when the time
            is up, give or take one run; a later `Mirror` writes what is missing.
        """
        self._artifacts = tuple(artifacts)
        self._closing.set()
        self._wanted.set()
        self._thread.join(timeout_seconds)
        # A thread that is still alive when the interpreter ends keeps duckdb loaded, which then prints
        # page-long complaints.
        self._stopped.set()
        self._thread.join(2.0)
        return self._complete

    def _work(self) -> None:
        while True:
            self._wanted.wait()
            self._wanted.clear()
            if self._closing.is_set():
                break
            started = time.monotonic()
            succeeded = self._try(self._sync)
            # The driver needs the interpreter too, so the thread rests longer than it works.
            rest_seconds = max(1.0, 2 * (time.monotonic() - started)) if succeeded else 60.0
            self._closing.wait(rest_seconds)
        self._try(self._finish)

    def _sync(self) -> None:
        self._mirror.sync(self._stopped.is_set)

    def _finish(self) -> None:
        self._sync()
        if not self._stopped.is_set():
            self._mirror.finish(self._artifacts)
            self._complete = True

    def _try(self, act: Callable[[], object]) -> bool:
        try:
            act()
        except Exception as error:  # noqa: BLE001 - nothing that MLflow does may end a sweep
            if not self._warned:
                reason = _cut(" ".join(str(error).split()), 300)
                logger.warning("the MLflow mirror falls behind, the sweep goes on: %s", reason)
            self._warned = True
            return False
        return True


def serve_ui(folder: Path, port: int) -> int:
    """Serve MLflow's pages for a sweep on 127.0.0.1 until interrupted.

    Returns:
        Exit code of the server.

    Raises:
        SpecError: If the folder has no MLflow store, or the port cannot be had.
    """
    if not (folder / "mlflow.db").is_file():
        raise SpecError(f"{folder} has no mlflow.db; give the folder of a sweep that was mirrored to MLflow")
    _check_port(port)
    command = [sys.executable, "-m", "mlflow", "ui"]
    command += ["--backend-store-uri", tracking_uri(folder), "--registry-store-uri", tracking_uri(folder)]
    command += ["--artifacts-destination", (folder.resolve() / "mlartifacts").as_uri()]
    command += ["--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    with subprocess.Popen(command, env={**_ENVIRONMENT, **os.environ}) as server:
        try:
            return server.wait()
        except KeyboardInterrupt:
            server.terminate()
            return server.wait()


def _check_port(port: int) -> None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError as error:
            raise SpecError(f"port {port} cannot be used ({error.strerror}); choose another") from error


def _connect(uri: str) -> "MlflowClient":
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    from mlflow import MlflowClient

    return MlflowClient(tracking_uri=uri)


def _search(client: "MlflowClient", experiment: str, condition: str) -> list["Run"]:
    page = client.search_runs([experiment], condition)
    runs = list(page)
    while page.token:
        page = client.search_runs([experiment], condition, page_token=page.token)
        runs += page
    return runs


def _create_parent(client: "MlflowClient", experiment: str, sweep: Sweep) -> "Run":
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
    return {"job": identity["job"], **model, "seed": identity["seed"], **{**identity["config"], **model}}


def _log_summary(client: "MlflowClient", sweep: Sweep, parent: "Run") -> float:
    """Log the parent run's counts and description; returns when the last trial finished, s since 1970."""
    rows = sweep.rows(
        "SELECT state, count(*) AS number, max(finished) AS finished FROM trials GROUP BY state"
    )
    numbers = {row["state"]: row["number"] for row in rows}
    ended = {state: numbers.get(state, 0) for state in ("completed", "failed", "infeasible")}
    finished: float = max((row["finished"] for row in rows if row["finished"]), default=time.time())
    metrics = {"trials": sum(numbers.values()), **ended}
    _log(client, parent, {}, metrics, seconds=finished, step=sum(ended.values()))
    client.set_tag(parent.info.run_id, "mlflow.note.content", _note(sweep))
    return finished


def _log_trial(client: "MlflowClient", sweep: Sweep, runs: _Runs, trial: Mapping[str, Any]) -> None:
    params = json.loads(trial["params"])
    # A reused result has no attempt of its own.
    finished = trial["ended"] or trial["finished"]
    tags = {
        _SWEEP_TAG: sweep.identity["sweep"],
        _TRIAL_TAG: trial["trial"],
        "mlflow.parentRunId": runs.parent.info.run_id,
        **{name: trial[name] for name in ("state", "reason", "spec", "reused_from", "attempts", "worker")},
    }
    run = runs.begun.get(trial["trial"]) or client.create_run(
        runs.experiment,
        _milliseconds(trial["begun"] or finished),
        _texts(tags),
        run_name=_run_name(trial["trial"], params),
    )
    objectives = [objective["metric"] for objective in sweep.identity["objectives"]]
    _log(client, run, params, _metric_values(trial["metrics"], objectives), seconds=finished)
    status = "FAILED" if trial["state"] == "failed" else "FINISHED"
    client.set_terminated(run.info.run_id, status, _milliseconds(finished))


def _run_name(trial: int, params: Mapping[str, Any]) -> str:
    return _cut(
        " ".join([f"trial {trial}:", *(f"{name}={_shown(value)}" for name, value in params.items())]), 120
    )


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


def _note(sweep: Sweep) -> str:
    """The sweep's description and, as far as there is room, its front as a Markdown table."""
    identity, trials = sweep.identity, pareto(sweep)
    objectives = [f"{objective['metric']} ({objective['direction']})" for objective in identity["objectives"]]
    reports = [f"{objective['metric']} on report" for objective in identity["objectives"]]
    header = ["trial", *identity["parameters"], *objectives, *reports]
    rows = [
        [trial["trial"], *trial["params"].values(), *trial["objectives"].values(), *trial["report"].values()]
        for trial in trials
    ]
    lines = [
        f"\nTrials that no other trial beats: {len(rows)}\n",
        _table_row(header),
        "|---" * len(header) + "|",
    ]
    note = _cut(identity["description"], 1000)
    for line in [*lines, *map(_table_row, rows)] if rows else []:
        if len(note) + len(line) < _MAX_NOTE_CHARACTERS:
            note += "\n" + line
    return note


def _table_row(cells: Sequence[Any]) -> str:
    texts = ["" if cell is None else _shown(cell).replace("|", "\\|").replace("\n", " ") for cell in cells]
    return f"| {' | '.join(texts)} |"


def _shown(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _texts(values: Mapping[str, Any]) -> dict[str, str]:
    return {name: _cut(str(value), _MAX_CHARACTERS) for name, value in values.items() if value is not None}


def _cut(text: str, limit: int) -> str:
    return text if len(text) <= limit else text[: limit - 1] + "…"


def _key(name: str) -> str:
    """The name with `_` in place of what MLflow refuses in names."""
    return re.sub(r"[^\w.\- ]", "_", name)


def _milliseconds(seconds: float) -> int:
    return round(seconds * 1000)

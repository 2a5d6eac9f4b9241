"""SQL over a sweep's visible tables. Besides `relations` the only importer of duckdb."""

import itertools
import json
import re
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa

from jobs.errors import SpecError
from storage.durable import StoreError
from storage.relations import Relations, stores_of
from storage.schema import STATES, TABLES


class StoredSweep:
    """A sweep's folder, opened for reading; finished and running sweeps alike.

    Attributes:
        folder: The sweep's folder.
        identity: What `sweep.json` says: job, space, parameters, objectives, model, seed, provenance.
    """

    def __init__(self, folder: Path, identity: Mapping[str, Any]) -> None:
        self.folder = folder
        self.identity = identity

    def query(self, sql: str) -> pa.Table:
        """The answer to one SELECT statement.

        The tables are `trials`, `attempts`, `events`, `specs`, `metrics`, `items`, `completions`, `scores`,
        `vectors`, `activations` and `artifacts`. All results have a column `trial`, null for what belongs to
        no trial, such as the unsteered baseline; `trials` has a column for each parameter. `points` has a row
        for each completed trial: what it reached in each objective on the split that trials are chosen on
        (`chosen_on`), and on the split report under the objective's name with `_report` behind it; `pareto`
        has those that no other dominates, with their parameters. Where trials have a layer and a dose,
        `best_per_layer` and `dose_response` say what their names do, and `anti_steered` has the items that
        move against the rest. `per_vector` sums up what is said under each vector of a trial.

        Raises:
            SpecError: If the statement is not a single SELECT, or DuckDB refuses it.
        """
        with self._relations() as relations:
            connection = relations.connection
            try:
                if self.identity["objectives"] and re.search(r"\bpareto\b", sql, re.IGNORECASE):
                    relations.define_pareto()
                statements = connection.extract_statements(sql)
                if len(statements) != 1 or statements[0].type != duckdb.StatementType.SELECT:
                    raise SpecError("query takes one SELECT statement; the tables cannot be changed")
                sql = statements[0].query.strip().removesuffix(";")
                # DuckDB calls `WITH x AS (COPY ... TO ...) SELECT` a SELECT, but only at the top level.
                connection.sql(f"SELECT * FROM (\n{sql}\n)")
                table: pa.Table = connection.sql(sql).to_arrow_table()
            except duckdb.Error as error:
                raise SpecError(f"query: {_why(error)}") from error
            return table

    def _relations(self) -> AbstractContextManager[Relations]:
        return Relations(self.folder, self.identity)

    @contextmanager
    def moment(self) -> Iterator["StoredSweep"]:
        """The sweep as it stands now, for many questions: what is added inside the block is not seen.

        Files that compaction has replaced stay for ten minutes; a moment of a running sweep is to be shorter.

        Raises:
            StoreError: If a table is not what was written.
        """
        with Relations(self.folder, self.identity) as relations:
            yield _Moment(self.folder, self.identity, relations)

    def rows(self, sql: str) -> list[dict[str, Any]]:
        """The answer to one SELECT statement as dictionaries."""
        rows: list[dict[str, Any]] = self.query(sql).to_pylist()
        return rows

    def trials(self) -> pa.Table:
        """Every trial, with a column for each parameter."""
        return self.query("SELECT * FROM trials")

    def metrics(self, trial: int) -> pa.Table:
        """The metrics of a trial on each split. Raises SpecError if there is no such trial."""
        return self._of("metrics", trial, "split DESC, name")

    def items(self, trial: int) -> pa.Table:
        """The scores of a trial's prompts, one by one. Raises SpecError if there is no such trial."""
        return self._of("items", trial, "split DESC, name, item")

    def completions(self, trial: int) -> pa.Table:
        """What is said in a trial. Raises SpecError if there is no such trial."""
        return self._of("completions", trial, "split DESC, item")

    def vectors(self, trial: int) -> pa.Table:
        """The vectors of a trial. Raises SpecError if there is no such trial."""
        return self._of("vectors", trial, "layer, name")

    def pareto(self) -> pa.Table:
        """The trials that no other dominates, with parameters and objectives, best first objective first.

        `storage.uncertainty.doubted_front` says how sure that is.
        """
        return self.query("SELECT * FROM pareto")

    def dose_response(self) -> pa.Table:
        """Means of every metric over the trials of each layer and dose."""
        return self.query("SELECT * FROM dose_response")

    def _of(self, table: str, trial: int, order: str) -> pa.Table:
        self.check_trial(trial)
        return self.query(f"SELECT * FROM {table} WHERE trial = {trial:d} ORDER BY {order}")

    def paths(self, table: str) -> list[str]:
        """The Parquet files that hold a table now, such as any reader takes; a later commit adds others.

        Those that are put together with others later stay for ten minutes.

        Raises:
            SpecError: If there is no such table.
            StoreError: If the manifest is not what was written.
        """
        if table not in TABLES:
            raise SpecError(f"no table {table!r}; there are {', '.join(TABLES)}")
        listed = (file for store in stores_of(self.folder) for file in store.files(table))
        return [str((self.folder / file.path).resolve()) for file in listed]

    def check_trial(self, trial: int) -> None:
        """Raises SpecError if there is no such trial; those that there are are named."""
        [found] = self.rows(
            f"SELECT count(*) FILTER (trial = {trial:d}) AS times, max(trial) AS last FROM trials"
        )
        if not found["times"]:
            there = "none yet" if found["last"] is None else f"trials 0 to {found['last']}"
            raise SpecError(f"there is no trial {trial}; {self.folder} has {there}")

    def counts(self) -> dict[str, int]:
        """State -> number of trials in it, for all five states."""
        counted = self.rows("SELECT state, count(*) AS trials FROM trials GROUP BY state")
        found = {row["state"]: row["trials"] for row in counted}
        return {state: found.get(state, 0) for state in STATES}

    def has_ended(self, trials: int) -> bool:
        """Whether that many trials have completed, were infeasible or failed."""
        counts = self.counts()
        return sum(counts[state] for state in ("completed", "infeasible", "failed")) >= trials


class _Moment(StoredSweep):
    """A sweep of which every question is asked of the same tables."""

    def __init__(self, folder: Path, identity: Mapping[str, Any], relations: Relations) -> None:
        super().__init__(folder, identity)
        self._kept = relations

    def _relations(self) -> AbstractContextManager[Relations]:
        return nullcontext(self._kept)

    @contextmanager
    def moment(self) -> Iterator[StoredSweep]:
        yield self


def _why(error: duckdb.Error) -> str:
    """All that DuckDB says, on one line, without the picture of the statement."""
    said = itertools.takewhile(lambda line: not line.startswith("LINE "), str(error).splitlines())
    return " ".join(" ".join(said).split())


def open_sweep(folder: Path | str) -> StoredSweep:
    """A sweep's folder for reading.

    Raises:
        SpecError: If the folder holds no sweep.
        StoreError: If its `sweep.json` cannot be read.
    """
    folder = Path(folder)
    return StoredSweep(folder, read_identity(folder))


def read_identity(folder: Path) -> dict[str, Any]:
    """What `sweep.json` says of a sweep. Raises as `open_sweep` does."""
    path = folder / "sweep.json"
    if not path.is_file():
        raise SpecError(
            f"{folder} holds no sweep: there is no sweep.json; give the folder named by `run --out`"
        )
    try:
        identity = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise StoreError(f"{path} is not what was written: {error}") from error
    if not isinstance(identity, dict) or (missing := _IDENTITY - identity.keys()):
        what = f"it lacks {sorted(missing)}" if isinstance(identity, dict) else "it holds no object"
        raise StoreError(f"{path} is not what was written: {what}")
    return identity


_IDENTITY = {"sweep", "parameters", "objectives"}

"""SQL over a sweep's visible tables. The only importer of duckdb."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa

from jobs.errors import SpecError
from storage.durable import StoreError
from storage.ledger import read_open
from storage.lock import driver
from storage.schema import RESULT_TABLES, STATES, TABLES, Column
from storage.scores import scores_of
from storage.store import Store
from storage.views import identifier, quoted, views

_SQL_TYPES = {
    "text": "VARCHAR",
    "json": "VARCHAR",
    "integer": "BIGINT",
    "real": "DOUBLE",
    "real32[]": "FLOAT[]",
}


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

        The tables are `trials`, `attempts`, `metrics`, `items`, `completions`, `scores`, `vectors`,
        `activations` and `artifacts`. All results have a column `trial`, null for what belongs to no trial,
        such as the unsteered baseline; `trials` has a column for each parameter. `points` has a row for each
        completed trial: what it reached in each objective on the split that trials are chosen on
        (`chosen_on`), and on the split report under the objective's name with `_report` behind it. Where
        trials have a layer and a dose, `best_per_layer` and `dose_response` say what their names do.

        Raises:
            SpecError: If the statement is not a single SELECT, or DuckDB refuses it.
        """
        with duckdb.connect(":memory:") as connection:
            try:
                self._define_views(connection)
            except duckdb.Error as error:
                raise StoreError(
                    f"the tables of {self.folder} cannot be read: {str(error).splitlines()[0]}"
                ) from error
            try:
                statements = connection.extract_statements(sql)
                if len(statements) != 1 or statements[0].type != duckdb.StatementType.SELECT:
                    raise SpecError("query takes one SELECT statement; the tables cannot be changed")
                sql = statements[0].query.strip().removesuffix(";")
                # DuckDB calls `WITH x AS (COPY ... TO ...) SELECT` a SELECT, but only at the top level.
                connection.sql(f"SELECT * FROM (\n{sql}\n)")
                table: pa.Table = connection.sql(sql).to_arrow_table()
            except duckdb.Error as error:
                raise SpecError(f"query: {str(error).splitlines()[0]}") from error
            return table

    def rows(self, sql: str) -> list[dict[str, Any]]:
        """The answer to one SELECT statement as dictionaries."""
        rows: list[dict[str, Any]] = self.query(sql).to_pylist()
        return rows

    def counts(self) -> dict[str, int]:
        """State -> number of trials in it, for all five states."""
        counted = self.rows("SELECT state, count(*) AS trials FROM trials GROUP BY state")
        found = {row["state"]: row["trials"] for row in counted}
        return {state: found.get(state, 0) for state in STATES}

    def _define_views(self, connection: duckdb.DuckDBPyConnection) -> None:
        added = scores_of(self.folder)
        store = Store(self.folder)  # read later: what was scored is there
        paths = {
            table: [
                str((self.folder / file.path).resolve())
                for each in (store, added)
                for file in each.files(table)
            ]
            for table in TABLES
        }
        listed = ", ".join(quoted(path) for table in TABLES for path in paths[table])
        connection.execute(f"SET allowed_paths = [{listed}]")
        connection.execute("SET enable_external_access = false")
        connection.execute("CREATE SCHEMA stored")
        for table, columns in TABLES.items():
            _define_stored(connection, table, columns, paths[table])
        self._define_trials(connection, store)
        connection.execute("CREATE VIEW attempts AS SELECT * FROM stored.attempts ORDER BY started, attempt")
        # What has failed and was tried again is there twice.
        once = "DISTINCT *" if store.withdrawn_trials() else "*"
        connection.execute(f"CREATE VIEW specs AS SELECT {once} FROM stored.specs")
        for table in RESULT_TABLES:
            connection.execute(
                f"CREATE VIEW {table} AS SELECT trials.trial, kept.* "
                f"FROM stored.{table} AS kept LEFT JOIN trials USING (spec)"
            )
        for view, select in views(self.identity).items():
            connection.execute(f"CREATE VIEW {view} AS {select}")
        connection.execute("SET lock_configuration = true")

    def _define_trials(self, connection: duckdb.DuckDBPyConnection, store: Store) -> None:
        connection.execute("CREATE TABLE stored.withdrawn (trial BIGINT, finished DOUBLE)")
        withdrawn = store.withdrawn_trials()
        if withdrawn:
            connection.executemany("INSERT INTO stored.withdrawn VALUES (?, ?)", withdrawn)
        connection.execute(
            "CREATE VIEW stored.ended AS "
            "SELECT * FROM stored.trials ANTI JOIN stored.withdrawn USING (trial, finished)"
        )
        columns = ", ".join(f'"{column.name}" {_SQL_TYPES[column.kind]}' for column in TABLES["trials"])
        connection.execute(f"CREATE TABLE stored.open_trials ({columns})")

        def ended() -> set[int]:
            [numbers] = connection.sql("SELECT trial FROM stored.ended").fetchnumpy().values()
            return set(numbers.tolist())

        number = sum(file.rows for file in store.files("trials")) - len(withdrawn)
        waiting, dispatched = read_open(self.folder, number, ended)
        is_driven = driver(self.folder) is not None
        rows = [
            (
                asked.trial,
                asked.spec.id,
                "running" if is_driven and asked.spec.id in dispatched else "waiting",
                None,
                None,
                None,
                None,
                json.dumps(dict(asked.params)),
            )
            for asked in waiting
        ]
        if rows:
            connection.executemany("INSERT INTO stored.open_trials VALUES (?, ?, ?, ?, ?, ?, ?, ?)", rows)
        parameters = "".join(
            f", CAST({_json_field('params', name)} AS {sql_type}) AS {identifier(name)}"
            for name, sql_type in self.identity["parameters"].items()
        )
        connection.execute(
            f"CREATE VIEW trials AS SELECT * EXCLUDE (params){parameters}, params "
            "FROM (SELECT * FROM stored.ended UNION ALL SELECT * FROM stored.open_trials) ORDER BY trial"
        )


def _define_stored(
    connection: duckdb.DuckDBPyConnection, table: str, columns: tuple[Column, ...], paths: list[str]
) -> None:
    if paths:
        listed = ", ".join(quoted(path) for path in paths)
        connection.execute(f"CREATE VIEW stored.{table} AS SELECT * FROM read_parquet([{listed}])")
    else:
        typed = ", ".join(f'"{column.name}" {_SQL_TYPES[column.kind]}' for column in columns)
        connection.execute(f"CREATE TABLE stored.{table} ({typed})")


def _json_field(column: str, name: str) -> str:
    return f"json_extract_string({column}, {quoted('$.' + json.dumps(name, ensure_ascii=False))})"


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

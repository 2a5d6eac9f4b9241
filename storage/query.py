"""SQL over a sweep's visible tables. The only importer of duckdb."""

import itertools
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa

from jobs.errors import SpecError
from storage.durable import StoreError
from storage.front import front
from storage.ledger import read_open
from storage.lock import driver
from storage.parquet import PACKED_SINCE, TableFile, unpacked
from storage.schema import RESULT_TABLES, ROW_GROUPS_BY, SCHEMA_VERSION, STATES, TABLES
from storage.scores import scores_of
from storage.store import Store
from storage.views import identifier, quoted, views

_SQL_TYPES = {
    "text": "VARCHAR",
    "json": "VARCHAR",
    "integer": "BIGINT",
    "real": "DOUBLE",
    "real32[]": "FLOAT[]",
    "array": "FLOAT[]",
}
_BEST_FIRST = {"minimize": "ASC", "maximize": "DESC"}


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

        The tables are `trials`, `attempts`, `events`, `metrics`, `items`, `completions`, `scores`, `vectors`,
        `activations` and `artifacts`. All results have a column `trial`, null for what belongs to no trial,
        such as the unsteered baseline; `trials` has a column for each parameter. `points` has a row for each
        completed trial: what it reached in each objective on the split that trials are chosen on
        (`chosen_on`), and on the split report under the objective's name with `_report` behind it; `pareto`
        has those that no other dominates, with their parameters. Where trials have a layer and a dose,
        `best_per_layer` and `dose_response` say what their names do, and `anti_steered` has the items that
        move against the rest. `per_vector` sums up what is said under each vector of a trial.

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
                if self.identity["objectives"] and re.search(r"\bpareto\b", sql, re.IGNORECASE):
                    self._define_pareto(connection)
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
        listed = (file for store in self._stores() for file in store.files(table))
        return [str((self.folder / file.path).resolve()) for file in listed]

    def _stores(self) -> tuple[Store, Store]:
        """What the driver has written, and what was scored; the former is read later and lacks nothing."""
        added = scores_of(self.folder)
        return Store(self.folder), added

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

    def _define_views(self, connection: duckdb.DuckDBPyConnection) -> None:
        store, added = self._stores()
        files = {table: [*store.files(table), *added.files(table)] for table in TABLES}
        every = self._listed(file for of_table in files.values() for file in of_table)
        connection.execute(f"SET allowed_paths = {every}")
        connection.execute("SET enable_external_access = false")
        connection.execute("CREATE SCHEMA stored")
        for table in TABLES:
            self._define_stored(connection, table, files[table])
        self._define_trials(connection, store)
        connection.execute("CREATE VIEW attempts AS SELECT * FROM stored.attempts ORDER BY started, attempt")
        connection.execute("CREATE VIEW events AS SELECT * FROM stored.events ORDER BY time")
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

    def _define_pareto(self, connection: duckdb.DuckDBPyConnection) -> None:
        """The front is computed where a question names it: SQL would compare all points with all."""
        objectives = self.identity["objectives"]
        columns = ", ".join(identifier(each["metric"]) for each in objectives)
        found = connection.sql(f"SELECT trial, {columns} FROM points").to_arrow_table().drop_null()
        values = np.column_stack([found[each["metric"]].to_numpy() for each in objectives]).astype(float)
        kept = found["trial"].to_numpy()[front(values, [each["direction"] for each in objectives])]
        connection.execute("CREATE TABLE stored.front (trial BIGINT)")
        if len(kept):
            connection.executemany("INSERT INTO stored.front VALUES (?)", [[each] for each in kept.tolist()])
        order = f"{identifier(objectives[0]['metric'])} {_BEST_FIRST[objectives[0]['direction']]}"
        params = "".join(f"{identifier(name)}, " for name in self.identity["parameters"])
        connection.execute(
            f"CREATE VIEW pareto AS SELECT trial, {params}"
            f"points.* EXCLUDE (trial) FROM points SEMI JOIN stored.front USING (trial) "
            f"JOIN trials USING (trial) ORDER BY {order}, trial"
        )

    def _listed(self, files: Iterable[TableFile]) -> str:
        """Paths of files as a list in SQL."""
        return f"[{', '.join(quoted(str((self.folder / file.path).resolve())) for file in files)}]"

    def _define_stored(
        self, connection: duckdb.DuckDBPyConnection, table: str, files: Sequence[TableFile]
    ) -> None:
        if table in ROW_GROUPS_BY and files:
            self._define_arrays(connection, table, files)
            return
        if not files:
            typed = ", ".join(f'"{column.name}" {_SQL_TYPES[column.kind]}' for column in TABLES[table])
            connection.execute(f"CREATE TABLE stored.{table} ({typed})")
            return
        selected, source = "*", f"read_parquet({self._listed(files)})"
        if any(file.schema < SCHEMA_VERSION for file in files):
            source = f"read_parquet({self._listed(files)}, union_by_name = true)"
            there = {name for name, *_ in connection.sql(f"DESCRIBE SELECT * FROM {source}").fetchall()}
            selected = ", ".join(
                identifier(column.name)
                if column.name in there
                else f"CAST(NULL AS {_SQL_TYPES[column.kind]}) AS {identifier(column.name)}"
                for column in TABLES[table]
            )
        connection.execute(f"CREATE VIEW stored.{table} AS SELECT {selected} FROM {source}")

    def _define_arrays(
        self, connection: duckdb.DuckDBPyConnection, table: str, files: Sequence[TableFile]
    ) -> None:
        """Tables whose vectors the files hold as bytes since version 6, and as lists before."""
        connection.create_function(  # type: ignore[call-overload]  # its stub does not know the text
            "floats", _floats, ["BLOB", "VARCHAR"], "FLOAT[]", type="arrow"
        )
        packed = self._listed(file for file in files if file.schema >= PACKED_SINCE)
        lists = self._listed(file for file in files if file.schema < PACKED_SINCE)
        selected = [
            f"SELECT * REPLACE (floats(vector, dtype) AS vector) FROM read_parquet({packed})",
            f"SELECT *, 'float32' AS dtype FROM read_parquet({lists})",
        ]
        there = [select for select, paths in zip(selected, (packed, lists), strict=True) if paths != "[]"]
        connection.execute(f"CREATE VIEW stored.{table} AS {' UNION ALL BY NAME '.join(there)}")

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


def _floats(vectors: pa.ChunkedArray, dtypes: pa.ChunkedArray) -> pa.Array:
    """Arrays that are kept as bytes, as lists of float32."""
    pairs = zip(vectors.to_pylist(), dtypes.to_pylist(), strict=True)
    return pa.array([unpacked(content, dtype) for content, dtype in pairs], pa.list_(pa.float32()))


def _why(error: duckdb.Error) -> str:
    """All that DuckDB says, on one line, without the picture of the statement."""
    said = itertools.takewhile(lambda line: not line.startswith("LINE "), str(error).splitlines())
    return " ".join(" ".join(said).split())


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

"""A sweep's tables and views in DuckDB, as they stand now."""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import duckdb
import numpy as np
import pyarrow as pa

from storage.durable import StoreError
from storage.front import front
from storage.ledger import read_open
from storage.lock import driver
from storage.parquet import PACKED_SINCE, TableFile, numbers, unpacked
from storage.schema import RESULT_TABLES, ROW_GROUPS_BY, SCHEMA_VERSION, TABLES
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


class Relations:
    """A sweep's tables and views as they stand when this is made; use it as a context manager.

    Args:
        folder: The sweep's folder.
        identity: What `sweep.json` says.

    Attributes:
        connection: Knows all tables and views but `pareto`, and reads no files but theirs.

    Raises:
        StoreError: If the manifest or a table is not what was written.
    """

    def __init__(self, folder: Path, identity: Mapping[str, Any]) -> None:
        self._folder = folder
        self._identity = identity
        self._has_pareto = False
        self.connection = duckdb.connect(":memory:")
        try:
            self._define(self.connection)
        except BaseException as error:
            self.connection.close()
            if isinstance(error, duckdb.Error):
                why = str(error).splitlines()[0]
                raise StoreError(f"the tables of {folder} cannot be read: {why}") from error
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.connection.close()

    def _define(self, connection: duckdb.DuckDBPyConnection) -> None:
        store, added = stores_of(self._folder)
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
        for view, select in views(self._identity).items():
            connection.execute(f"CREATE VIEW {view} AS {select}")
        connection.execute("SET lock_configuration = true")

    def define_pareto(self) -> None:
        """The front is computed where a question names it: SQL would compare all points with all."""
        if self._has_pareto:
            return
        connection = self.connection
        objectives = self._identity["objectives"]
        columns = ", ".join(identifier(each["metric"]) for each in objectives)
        known = " AND ".join(f"{identifier(each['metric'])} IS NOT NULL" for each in objectives)
        found = connection.sql(f"SELECT trial, {columns} FROM points WHERE {known}").to_arrow_table()
        values = np.column_stack([numbers(found[each["metric"]]) for each in objectives])
        kept = numbers(found["trial"])[front(values, [each["direction"] for each in objectives])]
        connection.execute("CREATE TABLE stored.front (trial BIGINT)")
        if len(kept):
            connection.executemany("INSERT INTO stored.front VALUES (?)", [[each] for each in kept.tolist()])
        order = f"{identifier(objectives[0]['metric'])} {_BEST_FIRST[objectives[0]['direction']]}"
        params = "".join(f"{identifier(name)}, " for name in self._identity["parameters"])
        connection.execute(
            f"CREATE VIEW pareto AS SELECT trial, {params}"
            f"points.* EXCLUDE (trial) FROM points SEMI JOIN stored.front USING (trial) "
            f"JOIN trials USING (trial) ORDER BY {order}, trial"
        )
        self._has_pareto = True

    def _listed(self, files: Iterable[TableFile]) -> str:
        """Paths of files as a list in SQL."""
        return f"[{', '.join(quoted(str((self._folder / file.path).resolve())) for file in files)}]"

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
        waiting, dispatched = read_open(self._folder, number, ended)
        is_driven = driver(self._folder) is not None
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
            for name, sql_type in self._identity["parameters"].items()
        )
        connection.execute(
            f"CREATE VIEW trials AS SELECT * EXCLUDE (params){parameters}, params "
            "FROM (SELECT * FROM stored.ended UNION ALL SELECT * FROM stored.open_trials) ORDER BY trial"
        )


def stores_of(folder: Path) -> tuple[Store, Store]:
    """What the driver has written, and what was scored; the former is read later and lacks nothing."""
    added = scores_of(folder)
    return Store(folder), added


def _floats(vectors: pa.ChunkedArray, dtypes: pa.ChunkedArray) -> pa.Array:
    """Arrays that are kept as bytes, as lists of float32."""
    pairs = zip(vectors.to_pylist(), dtypes.to_pylist(), strict=True)
    return pa.array([unpacked(content, dtype) for content, dtype in pairs], pa.list_(pa.float32()))


def _json_field(column: str, name: str) -> str:
    return f"json_extract_string({column}, {quoted('$.' + json.dumps(name, ensure_ascii=False))})"

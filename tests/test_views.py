"""Ready-made views and the sweep's Python face, against plain loops over the same rows."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from jobs.errors import SpecError
from orchestrator.cli import app
from storage.pareto import pareto
from storage.query import StoredSweep, open_sweep
from storage.schema import SCHEMA_VERSION, TABLES
from storage.store import Store
from tests.fakes import StoredTrial, write_sweep

DOSES = (-0.2, 0.0, 0.2, 0.4)
LAYERS = (3, 5)


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> StoredSweep:
    """A grid of layers and doses with items and texts, and one trial that failed."""
    folder = tmp_path_factory.mktemp("viewed")
    generator = np.random.default_rng(0)
    params = [{"layer": layer, "dose": dose} for layer in LAYERS for dose in DOSES]
    trials = [
        StoredTrial(each, {"select": dict(zip(("effect", "harm"), generator.normal(size=2), strict=True))})
        for each in params
    ]
    trials.append(StoredTrial({"layer": 3, "dose": 0.9}, {}, state="failed"))
    trials.append(StoredTrial({"layer": 5, "dose": 0.9}, {"select": {"effect": None, "harm": 9.0}}))
    write_sweep(
        folder,
        trials,
        objectives={"effect": "maximize", "harm": "minimize"},
        parameters={"layer": "BIGINT", "dose": "DOUBLE"},
    )
    items, texts = [], []
    for number in range(len(params)):
        head: dict[str, Any] = {"spec": f"spec{number}", "split": "select"}
        for item in range(6):
            value = None if (number, item) == (0, 0) else float(generator.normal())
            items.append({**head, "item": item, "prompt": f"p{item}", "name": "odds", "value": value})
        for item in range(4):
            variant = None if number == 7 else f"vector {item % 2}"
            score = {"nll": float(generator.uniform()), "repetition": 0.1 * item, "tokens": item}
            texts.append({**head, "item": item, "variant": variant, "text": f"t{item // 2}", **score})
    Store(folder).commit([], items=items, completions=texts)
    return open_sweep(folder)


def test_the_front_is_that_of_the_plain_function_with_its_parameters(sweep: StoredSweep) -> None:
    found = sweep.pareto().to_pylist()
    expected = pareto(sweep)
    assert [row["trial"] for row in found] == [row["trial"] for row in expected]
    for row, point in zip(found, expected, strict=True):
        assert {name: row[name] for name in ("layer", "dose")} == point["params"]
        assert {name: row[name] for name in ("effect", "harm")} == point["objectives"]
    counted = sweep.rows("WITH x AS (SELECT * FROM PARETO) SELECT count(*) AS number FROM x")
    assert counted == [{"number": len(expected)}]
    assert sweep.rows("SELECT 'pareto' AS word") == [{"word": "pareto"}]


def test_a_sweep_without_results_has_an_empty_front(tmp_path: Path) -> None:
    empty = write_sweep(tmp_path, [], objectives={"total": "maximize"}, parameters={"x": "BIGINT"})
    assert empty.pareto().num_rows == 0
    assert empty.pareto().column_names == ["trial", "x", "chosen_on", "total", "total_report"]


def test_items_that_go_against_the_rest_are_those_of_a_plain_regression(sweep: StoredSweep) -> None:
    rows = sweep.rows("SELECT layer, dose, item, value FROM items JOIN trials USING (trial)")
    expected = {}
    for layer in LAYERS:
        slopes = {}
        for item in range(6):
            points = [
                (row["dose"], row["value"]) for row in rows if (row["layer"], row["item"]) == (layer, item)
            ]
            known = [(dose, value) for dose, value in points if value is not None]
            slopes[item] = np.polyfit(*np.transpose(known), 1)[0]
        mean = np.mean([*slopes.values()])
        expected |= {(layer, item): slope for item, slope in slopes.items() if slope * mean < 0}
    found = sweep.rows("SELECT * FROM anti_steered")
    assert expected
    assert {(row["layer"], row["item"]): row["slope"] for row in found} == pytest.approx(expected)
    assert all(row["items"] == 6 and row["prompt"] == f"p{row['item']}" for row in found)


def test_a_result_that_layers_share_stands_at_each_of_them(tmp_path: Path) -> None:
    trials = [
        StoredTrial({"layer": layer, "dose": dose}, {"select": {"effect": layer * dose}}, spec=spec)
        for layer in (1, 2)
        for dose, spec in ((0.0, "unsteered"), (0.5, f"half{layer}"), (0.5, f"half{layer}"))
    ]
    parameters = {"layer": "BIGINT", "dose": "DOUBLE"}
    sweep = write_sweep(tmp_path, trials, objectives={"effect": "maximize"}, parameters=parameters)
    found = sweep.rows("SELECT layer, dose, mean, trials FROM dose_response")
    assert [tuple(row.values()) for row in found] == [
        (1, 0.0, 0.0, 1),
        (1, 0.5, 0.5, 1),
        (2, 0.0, 0.0, 1),
        (2, 0.5, 1.0, 1),
    ]
    assert [row["trial"] for row in sweep.rows("SELECT trial FROM points ORDER BY trial")] == [0, 1, 4]


def test_each_vector_is_summed_up(sweep: StoredSweep) -> None:
    rows = sweep.rows("SELECT * FROM completions WHERE variant IS NOT NULL")
    found = sweep.rows("SELECT * FROM per_vector")
    assert [(row["trial"], row["variant"]) for row in found] == [
        (trial, f"vector {number}") for trial in range(7) for number in range(2)
    ]
    for row in found:
        own = [each for each in rows if (each["trial"], each["variant"]) == (row["trial"], row["variant"])]
        assert row["completions"] == len(own) == 2
        assert row["distinct_texts"] == len({each["text"] for each in own})
        for name in ("nll", "repetition", "tokens"):
            assert row[name] == pytest.approx(np.mean([each[name] for each in own]))


class TestFace:
    def test_tables_are_arrow_and_hold_the_rows_of_a_trial(self, sweep: StoredSweep) -> None:
        assert isinstance(sweep.trials(), pa.Table)
        assert sweep.trials().num_rows == 10
        assert sweep.completions(2)["text"].to_pylist() == ["t0", "t0", "t1", "t1"]
        assert set(sweep.metrics(2)["name"].to_pylist()) == {"effect", "harm"}
        assert sweep.items(0)["value"].null_count == 1
        assert sweep.vectors(2).num_rows == 0
        assert sweep.dose_response().to_pandas()["trials"].tolist() == [1] * 8 + [0] + [1] * 9

    @pytest.mark.parametrize("name", ["completions", "metrics", "items", "vectors"])
    def test_a_trial_that_does_not_exist_is_refused(self, sweep: StoredSweep, name: str) -> None:
        with pytest.raises(SpecError, match=r"there is no trial 77; .* has trials 0 to 9"):
            getattr(sweep, name)(77)

    def test_any_reader_of_parquet_takes_the_listed_files(self, sweep: StoredSweep) -> None:
        for table, rows in (("metrics", 18), ("items", 48), ("vectors", 0)):
            done = CliRunner().invoke(app, ["files", str(sweep.folder), table])
            assert done.exit_code == 0
            paths = done.stdout.splitlines()
            assert sum(pq.read_table(path).num_rows for path in paths) == rows
        with pytest.raises(SpecError, match="no table 'texts'; there are trials"):
            sweep.paths("texts")


class TestSchema:
    def test_every_column_is_printed_with_its_meaning(self) -> None:
        done = CliRunner().invoke(app, ["schema", "--json"])
        found = json.loads(done.stdout)
        assert found["version"] == SCHEMA_VERSION
        assert {
            table: [(column["name"], column["unit"], column["meaning"]) for column in columns]
            for table, columns in found["tables"].items()
        } == {table: [(c.name, c.unit, c.meaning) for c in columns] for table, columns in TABLES.items()}
        shown = CliRunner().invoke(app, ["schema", "completions"]).stdout
        assert "what the model was asked" in shown
        assert "what was scored" not in shown

    def test_an_unknown_table_is_refused_with_those_that_there_are(self) -> None:
        done = CliRunner().invoke(app, ["schema", "texts"])
        assert isinstance(done.exception, SpecError)
        assert "no table 'texts'; there are trials" in str(done.exception)

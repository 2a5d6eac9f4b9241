"""What a sweep's retention keeps: front, last or all, and never less than what a result was made of."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from jobs.spec import ModelRef, Spec
from orchestrator.cli import app
from storage import manifest, table_stream
from storage.artifacts import read_artifact, write_artifact
from storage.durable import StoreError
from storage.ledger import Asked, Ledger
from storage.lock import driving
from storage.query import open_sweep
from storage.retention import Retention, collect
from storage.store import Part, Store
from storage.table_stream import TableStream
from tests.fakes import StoredTrial, write_sweep
from tests.sweeps import make_space

TOTALS = {0: 1.0, 1: 5.0, 2: 3.0, 3: 5.0, 4: 2.0}
"""Trials 1 and 3 are the front."""


def states(store: Store, specs: list[str], *, tokens: int = 3) -> None:
    """One file of activations: so many rows of each spec at each of two layers."""
    stream = TableStream(store.folder, "activations")
    for layer in (0, 1):
        for spec in specs:
            stream.write(
                {
                    "spec": spec,
                    "layer": layer,
                    "position": np.arange(tokens),
                    "vector": np.full((tokens, 4), layer + 0.5, np.float32),
                }
            )
    store.commit([Part((stream.finish(),), ())])


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Five trials with an artifact each, of which trial 4 takes what trial 0 has made, and one shares."""
    place = tmp_path / "sweep"
    write_sweep(
        place,
        [StoredTrial({"x": x}, {"select": {"total": total}}) for x, total in TOTALS.items()],
        objectives={"total": "maximize"},
        parameters={"x": "BIGINT"},
    )
    store = Store(place)
    rows = []
    for name in ("need", *(f"spec{trial}" for trial in TOTALS)):
        kept = write_artifact(place, {"a": np.full(3, len(rows), np.float32)})
        rows.append({"spec": name, "job": "j", "hash": kept.sha256, "path": kept.path, "bytes": kept.bytes})
    needs = {"spec4": ["spec0"], **{f"spec{trial}": ["need"] for trial in range(4)}}
    specs = [
        {"spec": name, "requires": json.dumps(needs.get(name, [])), "params": "{}"}
        for name in ("need", *needs)
    ]
    store.commit([], artifacts=rows, specs=specs)
    states(store, ["spec0", "spec1", "spec2"])
    states(store, ["spec2", "spec4"])
    return place


def left(folder: Path) -> tuple[set[str], dict[str, int]]:
    """Specs whose artifact is there, and rows of activations by spec."""
    rows = Store(folder).rows("artifacts")
    there = {row["spec"] for row in rows if (folder / row["path"]).is_file()}
    counted = open_sweep(folder).rows("SELECT spec, count(*) AS rows FROM activations GROUP BY spec")
    return there, {row["spec"]: row["rows"] for row in counted}


@pytest.mark.parametrize(
    ("retention", "gone"),
    [
        ("all", set()),
        ("front", {"spec2", "spec4"}),
        (1, {"spec1", "spec2", "spec3"}),
        (2, {"spec1", "spec2"}),
    ],
)
def test_what_is_not_kept_goes_but_for_what_others_were_made_of(
    folder: Path, retention: Retention, gone: set[str]
) -> None:
    specs, rows = left(folder)
    before = open_sweep(folder).rows("SELECT * FROM trials JOIN metrics USING (trial) ORDER BY ALL")
    tried = collect(folder, retention, is_tried=True)
    assert left(folder) == (specs, rows)
    found = collect(folder, retention)
    assert (set(found.specs), found.artifacts) == (gone, tried.artifacts)
    assert found.rows == sum(rows.get(spec, 0) for spec in gone)
    assert left(folder) == (specs - gone, {spec: rows[spec] for spec in rows if spec not in gone})
    assert open_sweep(folder).rows("SELECT * FROM trials JOIN metrics USING (trial) ORDER BY ALL") == before
    again = collect(folder, retention)
    assert (again.artifacts, again.rows, again.bytes) == ([], 0, 0)


def test_the_room_is_given_back_when_nobody_reads_any_more_and_what_is_left_is_whole(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def size(paths: set[Path]) -> int:
        return sum(path.stat().st_size for path in paths)

    before = {Path(path) for path in open_sweep(folder).paths("activations")}
    artifacts = size(set((folder / "artifacts").iterdir()))
    with open_sweep(folder).moment() as then:
        states = then.rows("SELECT * FROM activations ORDER BY ALL")
        found = collect(folder, "front")
        assert then.rows("SELECT * FROM activations ORDER BY ALL") == states
    after = {Path(path) for path in open_sweep(folder).paths("activations")}
    assert found.bytes == artifacts - size(set((folder / "artifacts").iterdir())) > 0
    assert found.waiting >= (waiting := size(before - after)) > 0
    monkeypatch.setattr(manifest, "READ_SECONDS", 0.0)
    assert collect(folder, "front").bytes >= waiting
    assert not any(path.exists() for path in before - after)
    kept = open_sweep(folder).rows("SELECT spec, layer, position, vector FROM activations ORDER BY ALL")
    expected = [(spec, layer, token) for spec in ("spec0", "spec1") for layer in (0, 1) for token in range(3)]
    assert [(row["spec"], row["layer"], row["position"]) for row in kept] == expected
    assert all(row["vector"] == [row["layer"] + 0.5] * 4 for row in kept)
    [path] = open_sweep(folder).paths("activations")
    groups = pq.ParquetFile(path).metadata
    assert groups.num_row_groups == 2, "a layer has a row group of its own"


def test_a_death_in_between_leaves_nothing_that_is_never_removed(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = {Path(path) for path in open_sweep(folder).paths("activations")}

    def die(*_: Any, **options: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as dying:
        dying.setattr(Store, "tidy", die)
        with pytest.raises(KeyboardInterrupt):
            collect(folder, "front")
    (folder / "tables" / ".half.parquet.1234abcd").write_bytes(b"half")
    monkeypatch.setattr(manifest, "READ_SECONDS", 0.0)
    for _ in range(2):
        collect(folder, "front")
    after = {Path(path) for path in open_sweep(folder).paths("activations")}
    assert not any(path.exists() for path in before - after)
    assert not (folder / "tables" / ".half.parquet.1234abcd").exists()


def test_files_that_nobody_lists_go_and_equal_content_of_a_kept_result_stays(folder: Path) -> None:
    orphan = folder / write_artifact(folder, {"stranger": np.zeros(2)}).path
    shared = {"a": np.full(3, 2.0, np.float32)}  # what spec1, on the front, has
    kept = write_artifact(folder, shared)
    row = {"spec": "spec2", "job": "j", "hash": kept.sha256, "path": kept.path, "bytes": kept.bytes}
    Store(folder).commit([], artifacts=[row])
    assert collect(folder, "all").artifacts == [orphan]
    assert not orphan.exists()
    collect(folder, "front")
    np.testing.assert_array_equal(read_artifact(folder, kept)["a"], shared["a"])


def test_trials_that_have_not_ended_keep_everything(folder: Path) -> None:
    spec = Spec(job="tests.fake_job", code="c", params={}, model=ModelRef(id="m"), data={}, seed=0)
    Ledger(folder).asked([Asked(trial=5, spec=spec, params={"x": 9}, seen=0, group="")])
    cheaper_stage = write_artifact(folder, {"a": np.ones(9)})
    row = {"spec": spec.id, "job": "j", "hash": cheaper_stage.sha256, "path": cheaper_stage.path, "bytes": 1}
    Store(folder).commit([], artifacts=[row])
    collect(folder, "front")
    assert (folder / cheaper_stage.path).is_file()


@pytest.mark.parametrize(("trial", "goes"), [(2, True), (1, False)])
def test_results_of_cheaper_stages_go_with_their_trials(folder: Path, trial: int, goes: bool) -> None:
    kept = write_artifact(folder, {"a": np.full(9, 7.0)})
    row = {"spec": "cheaper", "job": "j", "hash": kept.sha256, "path": kept.path, "bytes": kept.bytes}
    attempt = {"spec": "cheaper", "trial": trial, "attempt": "a", "job": "j", "state": "ok"}
    Store(folder).commit([], artifacts=[row], attempts=[attempt])
    collect(folder, "front")
    assert (folder / kept.path).exists() is not goes


def test_the_command_says_what_goes_and_the_table_events_what_went(folder: Path) -> None:
    def gc(*options: str) -> Any:
        done = CliRunner().invoke(app, ["gc", str(folder), *options])
        return done.exit_code, done.output or str(done.exception)

    before = left(folder)
    code, said = gc("--keep", "front", "--dry-run")
    assert (code, left(folder)) == (0, before)
    assert said.startswith("2 artifacts and 18 activations of 2 results would go: ")
    assert open_sweep(folder).rows("SELECT * FROM events") == []
    found = json.loads(gc("--keep", "front", "--json")[1])
    told = {"retention": "front", "results": 2, "artifacts": 2, "activations": 18}
    assert {**found, **told} == found
    assert found["bytes"] > 0 < found["waiting"]
    [event] = open_sweep(folder).rows("SELECT kind, detail FROM events")
    assert event["kind"] == "collected"
    assert event["detail"].endswith("kept: front")
    assert "--keep 0; it takes all, front, or a number" in gc("--keep", "0")[1]
    with driving(folder):
        assert "is being run by" in gc("--keep", "front")[1]


def test_a_disk_that_fills_up_loses_nothing_that_is_kept(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = left(folder)

    def refuse(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(table_stream.os, "fsync", refuse)
    with pytest.raises(StoreError, match="No space left"):
        collect(folder, "front")
    monkeypatch.undo()
    assert left(folder) == before
    assert not [path for path in folder.rglob(".*") if path.is_file()]


def test_a_space_says_what_is_kept_and_nothing_else_is_taken() -> None:
    for retention in ("all", "front", 3):
        assert make_space(retention=retention).retention == retention
    for wrong in ("best", 0, -1, True, 1.5, None):
        with pytest.raises(ValueError, match="retention="):
            make_space(retention=wrong)

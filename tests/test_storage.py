"""What is kept: whole files or none, rows as given, results once; and queries that change nothing."""

import errno
import hashlib
import itertools
import json
import math
import os
import subprocess
import sys
import threading
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from jobs.errors import SpecError, SteersweepError
from jobs.spec import ModelRef, Spec
from storage import compaction, parquet, schema, table_stream
from storage.artifacts import read_artifact, write_artifact
from storage.durable import (
    DiskFull,
    Log,
    StoreError,
    drop_torn_line,
    publish,
    read_log,
    read_log_backwards,
    remove_staging,
)
from storage.ledger import Asked, Ledger, ledger_path, read_asked, read_comparable, read_open
from storage.lock import driver, driving
from storage.manifest import Manifest, StoredResult
from storage.parquet import TableFile, read_rows, write_table
from storage.query import open_sweep
from storage.schema import SCHEMA_VERSION, TABLES
from storage.store import Part, Store
from storage.table_stream import TableStream
from tests.fakes import StoredTrial, write_sweep

ROOT = Path(__file__).parents[1]
ANY_EXAMPLE = settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
"""For tests in which no example can disturb the next one in the same folder."""


def files_under(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def refuse_fsync(file: int) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def metric(spec: str, value: float, split: str = "select") -> dict[str, Any]:
    return {"spec": spec, "split": split, "name": "total", "value": value}


def test_a_published_file_holds_its_content_and_replaces_an_older_one(tmp_path: Path) -> None:
    path = tmp_path / "new" / "folder" / "file"
    publish(path, b"old")
    publish(path, b"")
    assert path.read_bytes() == b""
    publish(path, b"new")
    assert files_under(tmp_path) == {"new/folder/file": b"new"}


def test_publishing_on_a_full_disk_leaves_nothing_behind_and_the_old_file_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish(tmp_path / "old", b"whole")
    monkeypatch.setattr(os, "fsync", refuse_fsync)
    for name in ("old", "new"):
        with pytest.raises(StoreError, match="No space left"):
            publish(tmp_path / name, b"half")
    assert files_under(tmp_path) == {"old": b"whole"}


def test_publishing_is_undone_when_the_driver_is_interrupted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(file: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        publish(tmp_path / "file", b"half")
    assert files_under(tmp_path) == {}


def test_a_file_that_the_system_cuts_short_is_not_published(tmp_path: Path) -> None:
    # A real refusal in the middle of the write, not one that a test injects.
    script = (
        "import resource, signal, sys\n"
        "from pathlib import Path\n"
        "from storage.durable import StoreError, publish\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\n"
        "publish(Path(sys.argv[1]) / 'small', b'x' * 1000)\n"
        "try:\n"
        "    publish(Path(sys.argv[1]) / 'large', b'x' * 1001)\n"
        "except StoreError as error:\n"
        "    sys.exit(error.__cause__.errno)\n"
    )
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path)], cwd=ROOT, timeout=60, check=False)
    assert done.returncode == errno.EFBIG
    assert files_under(tmp_path) == {"small": b"x" * 1000}


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)
EVENTS = st.lists(st.dictionaries(st.text(), JSON, max_size=4), min_size=1, max_size=5)


@ANY_EXAMPLE
@given(events=EVENTS, later=EVENTS, data=st.data())
def test_a_log_torn_anywhere_in_its_last_line_keeps_all_that_came_before(
    tmp_path: Path, events: list[dict[str, Any]], later: list[dict[str, Any]], data: st.DataObject
) -> None:
    path = tmp_path / "log"
    path.unlink(missing_ok=True)
    log = Log(path)
    log.append(*events[:-1])
    before = path.stat().st_size
    log.append(events[-1])
    assert list(read_log(path)) == events
    cut = data.draw(st.integers(before, path.stat().st_size - 1))
    with path.open("r+b") as file:
        file.truncate(cut)
    assert list(read_log(path)) == events[:-1], "a reader needs no repair first"
    Log(path).append(*later)
    assert list(read_log(path)) == [*events[:-1], *later]


def test_a_log_that_does_not_exist_has_no_events(tmp_path: Path) -> None:
    assert list(read_log(tmp_path / "log")) == []


TEXT = st.text() | st.text(alphabet="\x00\x07\r\n\t\x1b\x9b\u2028\u202e'\"\\;👩‍🔬🎉é")
ITEM = st.fixed_dictionaries(
    {},
    optional={
        "spec": st.none() | TEXT,
        "split": st.none() | TEXT,
        "item": st.none() | st.integers(-(2**63), 2**63 - 1),
        "prompt": st.none() | TEXT,
        "value": st.none() | st.floats(),
    },
)


@ANY_EXAMPLE
@given(rows=st.lists(ITEM, max_size=6))
def test_rows_come_back_as_they_were_written_but_for_numbers_that_are_none(
    tmp_path: Path, rows: list[dict[str, Any]]
) -> None:
    file = write_table(tmp_path, "items", rows)
    assert file.rows == len(rows)
    names = [column.name for column in TABLES["items"]]
    wanted = [{name: row.get(name) for name in names} for row in rows]
    for row in wanted:
        if row["value"] is not None and not math.isfinite(row["value"]):
            row["value"] = None
    assert read_rows(tmp_path, "items", [file]) == wanted


@ANY_EXAMPLE
@given(vector=arrays.arrays(np.float32, st.integers(0, 20), elements=st.floats(width=32, allow_nan=False)))
def test_vectors_come_back_bit_equal_from_lists_and_from_arrays(tmp_path: Path, vector: np.ndarray) -> None:
    for given_as in (vector, vector.tolist()):
        file = write_table(tmp_path, "vectors", [{"name": "v", "layer": 3, "vector": given_as}])
        [row] = read_rows(tmp_path, "vectors", [file])
        assert np.array_equal(np.array(row["vector"], dtype=np.float32), vector)


def test_files_of_a_table_are_read_in_the_order_of_the_list_and_others_left_out(tmp_path: Path) -> None:
    first = write_table(tmp_path, "metrics", [metric("a", 1.0), metric("b", 2.0)])
    second = write_table(tmp_path, "metrics", [metric("c", 3.0)])
    other = write_table(tmp_path, "items", [{"spec": "d"}])
    for files, specs in (((first, second, other), "abc"), ((other, second, first), "cab")):
        assert [row["spec"] for row in read_rows(tmp_path, "metrics", files)] == list(specs)


def test_a_column_or_table_that_the_schema_lacks_is_refused_and_nothing_written(tmp_path: Path) -> None:
    with pytest.raises(KeyError, match=r"metrics has no columns \['valeu'\].*value"):
        write_table(tmp_path, "metrics", [metric("a", 1.0), {"spec": "a", "valeu": 1.0}])
    with pytest.raises(KeyError, match=r"no table 'metric'.*metrics"):
        write_table(tmp_path, "metric", [metric("a", 1.0)])
    assert files_under(tmp_path) == {}


@pytest.mark.parametrize(
    "row",
    [{"item": "one"}, {"prompt": 1}, {"value": "much"}, {"prompt": "half a pair \ud800"}, {"item": 2**63}],
)
def test_a_value_that_does_not_fit_its_column_is_refused_and_nothing_written(
    tmp_path: Path, row: dict[str, Any]
) -> None:
    with pytest.raises((TypeError, ValueError, OverflowError)):
        write_table(tmp_path, "items", [{"item": 0}, row])
    assert files_under(tmp_path) == {}


def test_a_table_on_a_full_disk_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "fsync", refuse_fsync)
    with pytest.raises(StoreError, match="No space left"):
        write_table(tmp_path, "metrics", [metric("a", 1.0)])
    assert files_under(tmp_path) == {}


def chunk_of(first: int, rows: int, width: int = 8) -> dict[str, Any]:
    """Rows of the table `activations` in columns."""
    vectors = np.random.default_rng(first).normal(size=(rows, width)).astype(np.float32)
    return {
        "spec": "s",
        "item": np.arange(first, first + rows),
        "name": ["-1"] * rows,
        "position": [None if row % 2 else row for row in range(rows)],
        "layer": 3,
        "vector": vectors,
    }


def as_rows(columns: dict[str, Any]) -> list[dict[str, Any]]:
    """What `read_rows` gives for columns of the table `activations`."""
    names = [column.name for column in TABLES["activations"]]
    shared = {name: columns.get(name) for name in names}
    return [
        {
            name: values[row] if isinstance(values, (list, np.ndarray)) and name != "vector" else values
            for name, values in shared.items()
        }
        | {"vector": columns["vector"][row].tolist(), "dtype": str(columns["vector"].dtype)}
        for row in range(len(columns["vector"]))
    ]


def staging(folder: Path) -> list[Path]:
    return list(folder.rglob(".*.????????"))


@ANY_EXAMPLE
@given(sizes=st.lists(st.integers(0, 5), min_size=1, max_size=6), limit=st.sampled_from([1, 200, 2**20]))
def test_what_was_streamed_comes_back_in_order_and_the_file_is_as_listed(
    tmp_path: Path, sizes: list[int], limit: int
) -> None:
    chunks = [chunk_of(10 * number, rows) for number, rows in enumerate(sizes)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(table_stream, "ROW_GROUP_BYTES", limit)
        stream = TableStream(tmp_path, "activations")
        for chunk in chunks:
            stream.write(chunk)
        file = stream.finish()
    content = (tmp_path / file.path).read_bytes()
    assert (file.rows, file.bytes) == (sum(sizes), len(content))
    assert file.sha256 == hashlib.sha256(content).hexdigest()
    assert read_rows(tmp_path, "activations", [file]) == [row for chunk in chunks for row in as_rows(chunk)]
    assert staging(tmp_path) == []


def test_columns_are_stored_as_rows_are(tmp_path: Path) -> None:
    columns = {
        "spec": "s",
        "item": np.array([1, 2, 3], dtype=np.int32),
        "prompt": ["a", None, "c"],
        "name": "score",
        "value": np.array([0.5, math.nan, math.inf]),
    }
    stream = TableStream(tmp_path, "items")
    stream.write(columns)
    stream.write({"item": [4], "value": None, "prompt": "d"})
    rows = [
        {"spec": "s", "item": 1, "prompt": "a", "name": "score", "value": 0.5},
        {"spec": "s", "item": 2, "prompt": None, "name": "score", "value": math.nan},
        {"spec": "s", "item": 3, "prompt": "c", "name": "score", "value": math.inf},
        {"item": 4, "prompt": "d"},
    ]
    both = stream.finish(), write_table(tmp_path, "items", rows)
    assert read_rows(tmp_path, "items", both[:1]) == read_rows(tmp_path, "items", both[1:])


def test_a_stream_keeps_copies_of_its_callers_arrays(tmp_path: Path) -> None:
    chunk = chunk_of(0, 4)
    expected = as_rows(chunk)
    stream = TableStream(tmp_path, "activations")
    stream.write(chunk)
    chunk["vector"][:] = 0
    chunk["item"][:] = 0
    assert read_rows(tmp_path, "activations", [stream.finish()]) == expected


def test_a_stream_holds_what_comes_and_what_is_being_written_however_much_that_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    group, rows, width, times = 2**18, 64, 256, 20
    limit = 4 * group  # states of several layers are gathered, to be written layer by layer
    monkeypatch.setattr(table_stream, "ROW_GROUP_BYTES", group)
    stream = TableStream(tmp_path, "activations")
    before, buffered, arrow = pa.total_allocated_bytes(), 0, 0
    tracemalloc.start()
    for number in range(times * limit // (4 * rows * width)):
        stream.write(chunk_of(number, rows, width))
        buffered = max(buffered, stream.buffered_bytes)
        arrow = max(arrow, pa.total_allocated_bytes() - before)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert limit / 2 < buffered < limit
    assert peak + arrow < 6 * limit
    [half] = staging(tmp_path)
    assert half.stat().st_size > 0.8 * times * limit, "it is on the disk before the stream is finished"
    found = pq.ParquetFile(tmp_path / stream.finish().path).metadata
    assert found.num_rows * width * 4 == times * limit
    sizes = [found.row_group(number).total_byte_size for number in range(found.num_row_groups)]
    assert max(sizes) <= 1.1 * group


def test_a_chunk_larger_than_a_row_group_is_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(table_stream, "ROW_GROUP_BYTES", 2**12)
    stream = TableStream(tmp_path, "activations")
    stream.write(chunk_of(0, 256, 64))
    assert stream.buffered_bytes == 0
    found = pq.ParquetFile(tmp_path / stream.finish().path).metadata
    assert found.num_rows == 256
    assert found.num_row_groups >= 16


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"vektor": [1.0]}, KeyError, r"activations has no columns \['vektor'\]"),
        ({"item": [1, 2, 3]}, ValueError, r"of lengths .*'item': 3.*'vector': 4"),
        ({"item": ["one"] * 4}, ValueError, "int64"),
        (
            {"vector": np.zeros(4, np.float32)},
            ValueError,
            r"vector of shape \(4,\); it takes \(rows, width\)",
        ),
        ({"name": ["half a pair \ud800"] * 4}, ValueError, "surrogates"),
    ],
)
def test_a_chunk_that_does_not_fit_its_table_is_refused_and_adds_nothing(
    tmp_path: Path, change: dict[str, Any], error: type[Exception], message: str
) -> None:
    stream = TableStream(tmp_path, "activations")
    stream.write(chunk_of(0, 2))
    with pytest.raises(error, match=message):
        stream.write({**chunk_of(2, 4), **change})
    stream.write(chunk_of(6, 1))
    assert [row["item"] for row in read_rows(tmp_path, "activations", [stream.finish()])] == [0, 1, 6]


def test_a_chunk_without_a_column_of_its_own_length_is_refused(tmp_path: Path) -> None:
    stream = TableStream(tmp_path, "items")
    with pytest.raises(ValueError, match="one entry a row"):
        stream.write({"item": 1})
    stream.abandon()
    with pytest.raises(KeyError, match=r"no table 'activation'.*activations"):
        TableStream(tmp_path, "activation")
    assert files_under(tmp_path) == {}


def test_a_stream_that_is_given_up_leaves_nothing_and_one_that_is_finished_stays(tmp_path: Path) -> None:
    stream = TableStream(tmp_path, "activations")
    stream.write(chunk_of(0, 2))
    stream.abandon()
    assert files_under(tmp_path) == {}
    stream = TableStream(tmp_path, "activations")
    stream.write(chunk_of(0, 2))
    file = stream.finish()
    stream.abandon()
    assert list(files_under(tmp_path)) == [file.path]


@pytest.mark.parametrize("when", ["while it is written", "when it is finished"])
def test_a_stream_on_a_full_disk_says_so_and_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    # A real refusal in the middle of the write, not one that a test injects.
    script = (
        "import resource, signal, sys\n"
        "from pathlib import Path\n"
        "import numpy as np\n"
        "from storage import table_stream\n"
        "from storage.durable import StoreError\n"
        f"table_stream.ROW_GROUP_BYTES = {2**14 if when == 'while it is written' else 2**24}\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "stream = table_stream.TableStream(Path(sys.argv[1]), 'activations')\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (2**16, 2**16))\n"
        "try:\n"
        "    for _ in range(64):\n"
        "        stream.write({'vector': np.random.normal(size=(16, 64)).astype(np.float32)})\n"
        "    print('written', flush=True)\n"
        "    stream.finish()\n"
        "except StoreError as error:\n"
        "    stream.abandon()\n"
        "    sys.exit(error.__cause__.errno)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)],
        cwd=ROOT,
        timeout=60,
        check=False,
        capture_output=True,
        text=True,
    )
    assert done.returncode == errno.EFBIG, done.stderr
    assert done.stdout == ("" if when == "while it is written" else "written\n")
    assert done.stderr == ""
    assert files_under(tmp_path) == {}


def test_a_stream_whose_writer_was_killed_is_seen_by_no_reader_and_removed_as_other_staging(
    tmp_path: Path,
) -> None:
    sweep = write_sweep(
        tmp_path, [StoredTrial({}, {"select": {"total": 1.0}})], objectives={"total": "maximize"}
    )
    script = (
        "import os, sys\n"
        "from pathlib import Path\n"
        "from storage import table_stream\n"
        "from tests.test_storage import chunk_of\n"
        "table_stream.ROW_GROUP_BYTES = 1\n"
        "stream = table_stream.TableStream(Path(sys.argv[1]), 'activations')\n"
        "stream.write(chunk_of(0, 100))\n"
        "os._exit(0)\n"
    )
    before = files_under(tmp_path)
    subprocess.run([sys.executable, "-c", script, str(tmp_path)], cwd=ROOT, timeout=60, check=True)
    [left] = staging(tmp_path)
    assert left.stat().st_size > 0
    assert Store(tmp_path).rows("activations") == sweep.rows("SELECT * FROM activations") == []
    remove_staging(tmp_path)
    assert files_under(tmp_path) == before


def test_a_query_reads_streamed_vectors_with_their_trial(tmp_path: Path) -> None:
    write_sweep(tmp_path, [StoredTrial({}, {"select": {"total": 1.0}})], objectives={"total": "maximize"})
    stream = TableStream(tmp_path, "activations")
    chunk = chunk_of(0, 3) | {"spec": "spec0", "site": "after"}
    stream.write(chunk)
    file = stream.finish()
    sweep = open_sweep(tmp_path)
    assert sweep.rows("SELECT * FROM activations") == []
    Store(tmp_path).commit([Part((file,), ())])
    found = sweep.rows("SELECT trial, item, layer, site, vector[2] AS second FROM activations ORDER BY item")
    assert found == [
        {"trial": 0, "item": item, "layer": 3, "site": "after", "second": chunk["vector"][item, 1].item()}
        for item in range(3)
    ]


@pytest.mark.parametrize("table", TABLES)
def test_other_readers_find_unit_and_meaning_of_every_column_in_the_file(tmp_path: Path, table: str) -> None:
    file = write_table(tmp_path, table, [])
    schema = pq.read_schema(tmp_path / file.path)
    assert schema.names == [column.name for column in TABLES[table]]
    for column in TABLES[table]:
        metadata = schema.field(column.name).metadata
        assert metadata[b"meaning"].decode() == column.meaning != ""
        assert metadata[b"unit"].decode() == column.unit


def test_only_files_that_the_manifest_lists_are_visible(tmp_path: Path) -> None:
    sweep = write_sweep(
        tmp_path, [StoredTrial({}, {"select": {"total": 1.0}})], objectives={"total": "maximize"}
    )
    write_table(tmp_path, "metrics", [metric("stranger", 9.0)])
    write_table(tmp_path, "items", [{"spec": "stranger"}])
    (tmp_path / "tables" / "metrics" / ".half.parquet.1234").write_bytes(b"half")
    (tmp_path / "manifest" / ".00000001.json.1234").write_bytes(b"half")
    assert [row["spec"] for row in Store(tmp_path).rows("metrics")] == ["spec0"]
    assert sweep.rows("SELECT spec FROM metrics") == [{"spec": "spec0"}]
    assert sweep.rows("SELECT * FROM items") == []


def test_a_commit_becomes_visible_at_once_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Store(tmp_path)
    store.commit([], trials=[{"trial": 0, "spec": "old"}])
    part = Part(
        (write_table(tmp_path, "metrics", [metric("new", 1.0)]),), (StoredResult("new", "completed", None),)
    )
    fsync = os.fsync

    def attempt(allowed: int) -> None:
        calls = iter(range(allowed))
        monkeypatch.setattr(
            os, "fsync", lambda file: fsync(file) if next(calls, None) is not None else refuse_fsync(file)
        )
        store.commit([part], trials=[{"trial": 1, "spec": "new"}], attempts=[{"attempt": "a", "spec": "new"}])

    for allowed in range(3):
        with pytest.raises(StoreError, match="No space left"):
            attempt(allowed)
        for seen in (store, Store(tmp_path)):
            assert [row["spec"] for row in seen.rows("trials")] == ["old"]
            assert seen.rows("metrics") == seen.rows("attempts") == []
            assert seen.results == {}
    attempt(3)
    for seen in (store, Store(tmp_path)):
        assert [row["spec"] for row in seen.rows("trials")] == ["old", "new"]
        assert [row["value"] for row in seen.rows("metrics")] == [1.0]
        assert seen.results == {"new": StoredResult("new", "completed", None)}


def test_a_result_is_accepted_once(tmp_path: Path) -> None:
    store = Store(tmp_path)
    result = StoredResult("a", "completed", None)
    store.commit([Part((), (result,))])
    before = files_under(tmp_path)
    for again in (store, Store(tmp_path)):
        with pytest.raises(ValueError, match=r"already accepted.*'a'"):
            again.commit([Part((), (StoredResult("b", "failed", "x"), result))], trials=[{"trial": 1}])
    with pytest.raises(ValueError, match=r"already accepted.*'c'"):
        store.commit(
            [Part((), (StoredResult("c", "completed", None),)), Part((), (StoredResult("c", "failed", "x"),))]
        )
    assert files_under(tmp_path) == before
    assert store.results == {"a": result}


def test_a_commit_of_nothing_writes_nothing(tmp_path: Path) -> None:
    Store(tmp_path).commit([Part((), ())], trials=[], attempts=[])
    assert files_under(tmp_path) == {}


def scattered_store(folder: Path, commits: int) -> Store:
    return more_commits(Store(folder), range(commits))


def more_commits(store: Store, numbers: range) -> Store:
    for number in numbers:
        metrics = [{"spec": f"s{number}", "split": "select", "name": "x", "value": float(number)}]
        trial = {"trial": number, "spec": f"s{number}", "state": "completed", "finished": 1.0 * number}
        result = StoredResult(f"s{number}", "failed" if number == 2 else "completed", None)
        store.commit([Part((), (result,))], trials=[trial], metrics=metrics)
    return store


def rows_of(store: Store) -> dict[str, list[dict[str, Any]]]:
    return {table: store.rows(table) for table in ("trials", "metrics")}


@pytest.mark.parametrize("damage", [{"replacex": ["s7"]}, {"files": 1}, {"results": ["s7"]}, {"schema": "x"}])
def test_an_entry_of_the_manifest_that_was_damaged_is_refused(tmp_path: Path, damage: dict[str, Any]) -> None:
    scattered_store(tmp_path, 3)
    path = tmp_path / "manifest" / "00000002.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | damage))
    with pytest.raises(StoreError, match="gone or not what was written"):
        Store(tmp_path)


def test_a_table_that_another_byte_was_written_to_is_refused(tmp_path: Path) -> None:
    file = write_table(tmp_path, "metrics", [metric("s", 1037.0)])
    content = bytearray((tmp_path / file.path).read_bytes())
    for place in range(0, len(content), 7):
        damaged = content.copy()
        damaged[place] ^= 1
        (tmp_path / file.path).write_bytes(damaged)
        with pytest.raises(StoreError, match="is not what was written"):
            read_rows(tmp_path, "metrics", [file])


def test_who_looks_whether_somebody_drives_keeps_nobody_from_driving(tmp_path: Path) -> None:
    looks = threading.Event()

    def look() -> None:
        while not looks.is_set():
            driver(tmp_path)

    with driving(tmp_path):
        pass
    thread = threading.Thread(target=look)
    thread.start()
    try:
        for _ in range(200):
            with driving(tmp_path):
                pass
    finally:
        looks.set()
        thread.join()


def test_a_manifest_of_a_newer_version_is_refused_with_both_versions(tmp_path: Path) -> None:
    scattered_store(tmp_path, 1)
    path = tmp_path / "manifest" / "00000000.json"
    newer = json.loads(path.read_text()) | {"schema": SCHEMA_VERSION + 1, "what": "nobody knows yet"}
    path.write_text(json.dumps(newer))
    with pytest.raises(StoreError, match=rf"newer .* schema {SCHEMA_VERSION + 1}; this one reads .* to"):
        Store(tmp_path)


def test_a_sweep_of_the_version_before_is_read_and_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = scattered_store(tmp_path, 3)
    store.withdraw(["s2"])
    again = {"trial": 2, "spec": "s2", "state": "completed", "finished": 9.0}
    store.commit([Part((), (StoredResult("s2", "completed", None),))], trials=[again])
    before, results = rows_of(store), dict(store.results)
    for path in (tmp_path / "manifest").iterdir():
        older = {**json.loads(path.read_text()), "schema": 4}
        path.write_text(
            json.dumps({key: value for key, value in older.items() if value or key != "replaced"})
        )
    found = Store(tmp_path)
    assert (rows_of(found), found.results) == (before, results)
    monkeypatch.setattr(compaction, "MANY", 4)
    more_commits(found, range(5, 7))
    found.compact()
    assert rows_of(Store(tmp_path)) == rows_of(found)
    assert Store(tmp_path).results == found.results
    assert Store(tmp_path).withdrawn_trials() == [(2, 2.0)]


def test_columns_that_came_later_are_null_in_older_files_for_all_who_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_sweep(tmp_path, [], objectives={})
    rows = [{"spec": f"s{number}", "split": "select", "item": 0, "text": "Yes."} for number in range(3)]
    old = tuple(column for column in TABLES["completions"] if column.name != "variant")
    with monkeypatch.context() as before:
        before.setitem(schema.TABLES, "completions", old)
        parquet.arrow_schema.cache_clear()
        file = write_table(tmp_path, "completions", rows[:2])
        parquet.arrow_schema.cache_clear()
    store = Store(tmp_path)
    store.commit([Part((file,), ())])
    entry = sorted((tmp_path / "manifest").iterdir())[-1]
    content = json.loads(entry.read_text())
    del content["files"][0]["schema"]
    entry.write_text(json.dumps(content | {"schema": 5}))

    def check(*variants: str | None) -> None:
        asked = open_sweep(tmp_path).rows("SELECT spec, variant, text FROM completions ORDER BY spec")
        assert [row["variant"] for row in asked] == list(variants)
        assert [row["variant"] for row in Store(tmp_path).rows("completions")] == list(variants)
        assert [row["spec"] for row in asked] == [row["spec"] for row in rows[: len(variants)]]

    check(None, None)
    store = Store(tmp_path)
    store.commit([Part((write_table(tmp_path, "completions", [{**rows[2], "variant": "vector 0"}]),), ())])
    check(None, None, "vector 0")
    monkeypatch.setattr(compaction, "MANY", 2)
    store = Store(tmp_path)
    store.compact()
    assert [file.schema for file in Store(tmp_path).files("completions")] == [SCHEMA_VERSION]
    check(None, None, "vector 0")


def test_states_of_older_files_are_lists_and_read_like_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_sweep(tmp_path, [], objectives={})
    rows = [{"spec": "s", "item": item, "layer": item, "vector": [item + 0.5, -1.0]} for item in range(4)]
    (tmp_path / "tables" / "activations").mkdir(parents=True)
    path = tmp_path / "tables" / "activations" / "old.parquet"
    older = pa.table(
        {
            "spec": ["s"] * 2,
            "item": [0, 1],
            "layer": [0, 1],
            "vector": pa.array([row["vector"] for row in rows[:2]], pa.list_(pa.float32())),
        }
    )
    pq.write_table(older, path)
    content = path.read_bytes()
    digest = hashlib.sha256(content).hexdigest()
    old = TableFile("activations", str(path.relative_to(tmp_path)), 2, len(content), digest)
    stream = TableStream(tmp_path, "activations")
    new = {name: [row[name] for row in rows[2:]] for name in ("item", "layer")}
    vectors = np.array([row["vector"] for row in rows[2:]], np.float16)
    stream.write({"spec": "s", **new, "vector": vectors})
    store = Store(tmp_path)
    store.commit([Part((old, stream.finish()), ())])

    def check() -> None:
        asked = open_sweep(tmp_path).rows("SELECT item, dtype, vector FROM activations ORDER BY item")
        kept = sorted(Store(tmp_path).rows("activations"), key=lambda row: row["item"])
        for found in (asked, kept):
            assert [row["vector"] for row in found] == [row["vector"] for row in rows]
            assert [row["dtype"] for row in found] == ["float32"] * 2 + ["float16"] * 2

    check()
    monkeypatch.setattr(compaction, "MANY", 1)
    store = Store(tmp_path)
    store.compact()
    [file] = Store(tmp_path).files("activations")
    assert file.schema == SCHEMA_VERSION
    check()


def test_compaction_leaves_every_row_once_and_in_order_for_all_who_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compaction, "MANY", 4)
    store = scattered_store(tmp_path, 7)
    before, early_reader = rows_of(store), Store(tmp_path)
    store.compact()
    assert rows_of(store) == rows_of(Store(tmp_path)) == rows_of(early_reader) == before
    assert [len(store.files(table)) for table in ("trials", "metrics", "results")] == [1, 1, 1]
    assert Store(tmp_path).results == store.results == early_reader.results
    assert store.bytes == Store(tmp_path).bytes == sum(file.bytes for file in store.files())
    store.compact()
    assert len(list((tmp_path / "manifest").iterdir())) == 9, "there is nothing to do"


def test_a_death_between_compaction_and_checkpoint_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compaction, "MANY", 4)
    store = scattered_store(tmp_path, 4)
    store.compact()
    store.withdraw(["s2"])
    more_commits(store, range(4, 8))
    before, results = rows_of(store), dict(store.results)
    assert "s2" not in results
    monkeypatch.setattr(Manifest, "checkpoint", refuse_checkpoint)
    with pytest.raises(StoreError):
        store.compact()
    monkeypatch.undo()
    monkeypatch.setattr(compaction, "MANY", 4)
    for again in (store, Store(tmp_path)):
        assert rows_of(again) == before
        assert again.results == results
    again = Store(tmp_path)
    again.compact()
    assert rows_of(again) == rows_of(Store(tmp_path)) == before
    assert Store(tmp_path).results == results
    assert Store(tmp_path).withdrawn_trials() == [(2, 2.0)]


def refuse_checkpoint(self: Manifest, **options: Any) -> None:
    raise DiskFull("no room")


def test_what_compaction_has_replaced_is_removed_when_nobody_reads_it_any_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compaction, "MANY", 4)
    store = scattered_store(tmp_path, 4)
    store.compact()
    more_commits(store, range(4, 8))
    early_reader, before = Store(tmp_path), rows_of(store)
    store.compact()
    assert rows_of(early_reader) == before, "somebody may be reading"
    assert len(list((tmp_path / "manifest").iterdir())) == 12
    monkeypatch.setattr("storage.manifest.READ_SECONDS", -1.0)
    again = Store(tmp_path)
    more_commits(again, range(8, 12))
    assert rows_of(Store(tmp_path)) == rows_of(again)
    again.compact()
    left = {path.relative_to(tmp_path) for path in tmp_path.glob("tables/*/*")}
    listed = {Path(file.path) for file in again.files()}
    assert left - listed <= {Path(path) for path in again.replaced}
    assert len(left - listed) == 2 * 5, "those of the last compaction stay until the next one"
    names = sorted(path.name for path in (tmp_path / "manifest").iterdir())
    assert names == sorted(
        [
            "00000009.checkpoint.json",
            *(f"{number:08d}.json" for number in range(9, 15)),
            "00000014.checkpoint.json",
        ]
    )
    assert rows_of(Store(tmp_path)) == rows_of(again)
    assert len(Store(tmp_path).results) == 12


def test_entries_stay_where_others_compare_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compaction, "MANY", 2)
    monkeypatch.setattr("storage.manifest.READ_SECONDS", -1.0)
    store = Store(tmp_path)
    for first in range(0, 8, 2):
        more_commits(store, range(first, first + 2))
        store.compact(keeps_entries=True)
    assert len(list((tmp_path / "manifest").glob("????????.json"))) == 12
    assert [row["trial"] for row in Store(tmp_path).rows("trials")] == list(range(8))


def test_what_was_withdrawn_counts_no_more_after_compaction_either(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compaction, "MANY", 2)
    store = scattered_store(tmp_path, 5)
    store.withdraw(["s2"])
    again = {"trial": 2, "spec": "s2", "state": "completed", "finished": 9.0}
    store.commit([Part((), (StoredResult("s2", "completed", None),))], trials=[again])
    before, withdrawn = rows_of(store), store.withdrawn_trials()
    assert [row["trial"] for row in before["trials"]] == [0, 1, 3, 4, 2]
    store.compact()
    for seen in (store, Store(tmp_path)):
        assert rows_of(seen) == before
        assert seen.withdrawn_trials() == withdrawn == [(2, 2.0)]
        assert seen.results["s2"] == StoredResult("s2", "completed", None)


def test_large_files_are_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = scattered_store(tmp_path, 5)
    monkeypatch.setattr(compaction, "MANY", 2)
    assert [len(run) for run in compaction.scattered(store.files())] == [5, 5]
    monkeypatch.setattr(compaction, "SMALL_BYTES", 0)
    assert compaction.scattered(store.files()) == []


def test_compaction_on_a_full_disk_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compaction, "MANY", 4)
    store = scattered_store(tmp_path, 4)
    before, files = rows_of(store), files_under(tmp_path)
    real = Path.replace
    calls = iter(range(9))

    def refuse(self: Path, target: Path) -> Path:
        if next(calls) == 1:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(self, target)

    monkeypatch.setattr(Path, "replace", refuse)
    with pytest.raises(DiskFull):
        store.compact()
    assert files_under(tmp_path) == files
    assert rows_of(store) == rows_of(Store(tmp_path)) == before


def test_more_commits_than_the_file_names_have_digits_stay_in_order(tmp_path: Path) -> None:
    store = Store(tmp_path)
    for number in range(12):
        store.commit([], trials=[{"trial": number}])
    assert [row["trial"] for row in Store(tmp_path).rows("trials")] == list(range(12))


TENSORS = st.dictionaries(
    st.text(alphabet="abcdef", min_size=1),
    arrays.arrays(
        st.sampled_from([np.float32, np.float64, np.int64]),
        arrays.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=4),
        elements=st.integers(-5, 5),
    ),
    min_size=1,
    max_size=3,
)


@ANY_EXAMPLE
@given(tensors=TENSORS)
def test_arrays_come_back_equal_and_read_only(tmp_path: Path, tensors: dict[str, np.ndarray]) -> None:
    artifact = write_artifact(tmp_path, tensors)
    found = read_artifact(tmp_path, artifact)
    assert found.keys() == tensors.keys()
    for name, array in tensors.items():
        assert found[name].dtype == array.dtype
        assert found[name].shape == array.shape
        assert np.array_equal(found[name], array)
        with pytest.raises(ValueError, match="read-only"):
            found[name][...] = 0


def test_equal_content_is_one_file_and_other_content_another(tmp_path: Path) -> None:
    square = np.arange(6, dtype=np.float32).reshape(2, 3)
    first = write_artifact(tmp_path, {"a": square, "b": square[:, ::2]})
    second = write_artifact(tmp_path, {"b": square[:, ::2].copy(), "a": np.asfortranarray(square)})
    other = write_artifact(tmp_path, {"a": square, "b": square[:, 1:]})
    assert first == second != other
    assert len(files_under(tmp_path)) == 2
    assert first.bytes == (tmp_path / first.path).stat().st_size


def test_an_artifact_that_is_not_what_was_stored_is_refused(tmp_path: Path) -> None:
    artifact = write_artifact(tmp_path, {"a": np.zeros(4, dtype=np.float32)})
    path = tmp_path / artifact.path
    content = path.read_bytes()
    path.write_bytes(content[:-1] + b"\x01")
    with pytest.raises(SteersweepError, match="has changed since it was stored"):
        read_artifact(tmp_path, artifact)
    path.write_bytes(content[:-3])
    with pytest.raises(SteersweepError, match="has changed since it was stored"):
        read_artifact(tmp_path, artifact)
    path.unlink()
    with pytest.raises(SteersweepError, match=r"is gone; .*resume.*a new sweep"):
        read_artifact(tmp_path, artifact)
    assert write_artifact(tmp_path, {"a": np.zeros(4, dtype=np.float32)}) == artifact
    read_artifact(tmp_path, artifact)


def test_an_artifact_on_a_full_disk_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "fsync", refuse_fsync)
    with pytest.raises(StoreError, match="No space left"):
        write_artifact(tmp_path, {"a": np.zeros(4, dtype=np.float32)})
    assert files_under(tmp_path) == {}


def asked(trial: int, **params: Any) -> Asked:
    spec = Spec(job="tests.fake_job", code="c", params=params, model=ModelRef(id="m"), data={}, seed=0)
    fixed = ("x",) if trial else ()
    return Asked(trial=trial, params=params, spec=spec, seen=trial, fixed=fixed, group=0)


def open_of(folder: Path, ended: list[int]) -> tuple[list[Asked], set[str]]:
    return read_open(folder, len(ended), lambda: ended)


def test_the_ledger_gives_back_what_was_asked_and_what_was_dispatched(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    proposals = [asked(0, x=1, mode="👩‍🔬\n"), asked(1, x=2.5), asked(2, x=True)]
    ledger.asked(proposals[:2])
    ledger.dispatched("a1", "worker-0", ["s1", "s2"])
    ledger.asked(proposals[2:])
    ledger.dispatched("a2", "worker-1", ["s2", "s3"])
    assert read_asked(tmp_path) == proposals
    assert [trial.spec.id for trial in read_asked(tmp_path)] == [trial.spec.id for trial in proposals]
    assert open_of(tmp_path, []) == (proposals, {"s1", "s2", "s3"})
    assert open_of(tmp_path, [2]) == (proposals[:2], {"s1", "s2", "s3"})
    assert open_of(tmp_path, [0, 1]) == (proposals[2:], {"s2", "s3"}), "no further back than asked for"
    assert open_of(tmp_path, [0, 1, 2])[0] == []
    ledger.taken_over()
    ledger.dispatched("a3", "worker-1", ["s3"])
    assert open_of(tmp_path, [0]) == (proposals[1:], {"s3"})


def test_what_trials_mean_anew_is_read_from_where_it_stands_last(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    ledger.asked([asked(0, x=1), asked(1, x=2), asked(2, x=3)])
    ledger.changes_accepted("the code", [asked(1, x=4)])
    ledger.asked([asked(3, x=5)])
    ledger.asked_again([asked(0, x=6)])
    assert read_asked(tmp_path) == [asked(0, x=6), asked(1, x=4), asked(2, x=3), asked(3, x=5)]
    assert read_comparable(tmp_path) == [asked(1, x=4), asked(3, x=5), asked(0, x=6)]
    for ended in ([], [2], [1, 2, 3], [0, 1], [0, 1, 2, 3]):
        left = [each for each in read_asked(tmp_path) if each.trial not in ended]
        assert open_of(tmp_path, ended) == (left, set())


@pytest.mark.parametrize("block", [1, 7, 64, 2**20])
def test_a_log_is_read_backwards_as_forwards(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block: int
) -> None:
    monkeypatch.setattr("storage.durable._BLOCK_BYTES", block)
    path = tmp_path / "log"
    assert list(read_log_backwards(path)) == []
    events = [{"event": "x" * length, "emoji": "👩‍🔬\n"} for length in (0, 3, 100, 1, 64)]
    for number in range(len(events) + 1):
        path.unlink(missing_ok=True)
        Log(path).append(*events[:number])
        for torn in (b"", b"{", b'{"event": "whole, but for its end"}'):
            path.write_bytes(path.read_bytes() + torn)
            assert list(read_log_backwards(path)) == list(read_log(path))[::-1] == events[:number][::-1]
            drop_torn_line(path)
    path.write_bytes(b'{"a": 1}\nhalf\n{"b": 2}\n')
    with pytest.raises(StoreError, match="not what was written"):
        list(read_log_backwards(path))


def test_a_torn_line_of_the_ledger_is_as_if_it_had_not_been_written(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    ledger.asked([asked(0, x=1), asked(1, x=2)])
    content = ledger_path(tmp_path).read_bytes()
    for cut in range(content.index(b"\n") + 1, len(content)):
        ledger_path(tmp_path).write_bytes(content[:cut])
        assert read_asked(tmp_path) == [asked(0, x=1)]
    Ledger(tmp_path).asked([asked(1, x=3)])
    assert read_asked(tmp_path) == [asked(0, x=1), asked(1, x=3)]


@pytest.fixture
def sweep_folder(tmp_path: Path) -> Path:
    """Two ended trials, one that shares a result, an infeasible, a running, a waiting one, a baseline."""
    folder = tmp_path / "sweep"
    trials = [
        StoredTrial(
            {"x": 1, "y": 0.5, "mode": "a'b", "on": True},
            {"select": {"total": 1.0}, "report": {"total": 2.0}},
        ),
        StoredTrial({"x": 2, "y": 2, "mode": '"q"', "on": False}, {"select": {"total": 3.0}}, spec="shared"),
        StoredTrial({"x": 3, "y": -1e-30, "mode": "", "on": True}, {}, spec="shared"),
        StoredTrial(
            {"x": 4, "y": 1.0, "mode": "é", "on": True}, {"select": {"total": None}}, state="infeasible"
        ),
    ]
    write_sweep(
        folder,
        trials,
        objectives={"total": "maximize"},
        parameters={"x": "BIGINT", "y": "DOUBLE", "mode": "VARCHAR", "on": "BOOLEAN"},
    )
    baseline = write_table(folder, "metrics", [metric("baseline", 7.0)])
    tensors = write_artifact(folder, {"a": np.zeros(2, dtype=np.float32)})
    listed = {
        "spec": "baseline",
        "job": "j",
        "hash": tensors.sha256,
        "path": tensors.path,
        "bytes": tensors.bytes,
    }
    part = Part(
        (baseline, write_table(folder, "artifacts", [listed])), (StoredResult("baseline", "completed", None),)
    )
    Store(folder).commit(
        [part], attempts=[{"attempt": "a", "trial": None, "spec": "baseline", "state": "ok"}]
    )
    open_trials = [asked(4, x=5, y=0.0, mode="n", on=False), asked(5, x=6, y=0.0, mode="n", on=False)]
    ledger = Ledger(folder)
    ledger.asked([asked(0, x=1), *open_trials])
    ledger.dispatched("b", "worker-0", [open_trials[0].spec.id])
    return folder


def test_trials_have_a_typed_column_for_each_parameter(sweep_folder: Path) -> None:
    sweep = open_sweep(sweep_folder)
    described = {row["column_name"]: row["column_type"] for row in sweep.rows("DESCRIBE trials")}
    assert [described[name] for name in ("x", "y", "mode", "on")] == [
        "BIGINT",
        "DOUBLE",
        "VARCHAR",
        "BOOLEAN",
    ]
    assert sweep.rows('SELECT x, y, mode, "on" FROM trials WHERE trial < 4 ORDER BY trial') == [
        {"x": 1, "y": 0.5, "mode": "a'b", "on": True},
        {"x": 2, "y": 2.0, "mode": '"q"', "on": False},
        {"x": 3, "y": -1e-30, "mode": "", "on": True},
        {"x": 4, "y": 1.0, "mode": "é", "on": True},
    ]


@pytest.mark.parametrize("name", ["naïve", "x.y", "x y", "it's", 'a"b', "select"])
def test_a_parameter_of_any_name_has_its_column(tmp_path: Path, name: str) -> None:
    sweep = write_sweep(
        tmp_path / "sweep", [StoredTrial({name: 6}, {})], objectives={}, parameters={name: "BIGINT"}
    )
    assert sweep.rows("SELECT * FROM trials")[0][name] == 6


def test_trials_that_have_not_ended_wait_or_run_while_their_driver_lives(sweep_folder: Path) -> None:
    sweep = open_sweep(sweep_folder)

    def states() -> list[str]:
        rows = sweep.rows("SELECT trial, state, x FROM trials ORDER BY trial")
        assert [row["x"] for row in rows] == [1, 2, 3, 4, 5, 6]
        return [row["state"] for row in rows]

    ended = ["completed", "completed", "completed", "infeasible"]
    assert states() == [*ended, "waiting", "waiting"]
    with driving(sweep_folder):
        assert states() == [*ended, "running", "waiting"]
        assert sweep.counts() == {
            "waiting": 1,
            "running": 1,
            "completed": 3,
            "infeasible": 1,
            "failed": 0,
        }
        Ledger(sweep_folder).taken_over()
        assert states() == [*ended, "waiting", "waiting"], "nobody runs what an earlier driver dispatched"


def test_what_belongs_to_no_trial_has_a_null_trial(sweep_folder: Path) -> None:
    sweep = open_sweep(sweep_folder)
    assert sweep.rows("SELECT spec, value FROM metrics WHERE trial IS NULL") == [
        {"spec": "baseline", "value": 7.0}
    ]
    assert sweep.rows("SELECT spec, trial FROM artifacts") == [{"spec": "baseline", "trial": None}]
    assert sweep.rows("SELECT spec, trial FROM attempts") == [{"spec": "baseline", "trial": None}]


def test_trials_that_share_a_result_each_have_its_rows(sweep_folder: Path) -> None:
    sweep = open_sweep(sweep_folder)
    assert sweep.rows("SELECT trial, value FROM metrics WHERE spec = 'shared' ORDER BY trial") == [
        {"trial": 1, "value": 3.0},
        {"trial": 2, "value": 3.0},
    ]
    assert sweep.rows("SELECT trial, reused_from FROM trials WHERE reused_from IS NOT NULL") == [
        {"trial": 2, "reused_from": 1}
    ]


@pytest.mark.parametrize(
    "sql",
    [
        "SELECT 1 AS a",
        "SELECT 1 AS a;",
        " SELECT 1 AS a ; ",
        "SELECT 1 AS a -- why",
        "FROM (VALUES (1)) t(a)",
        "WITH b AS (SELECT 1 AS a) SELECT a FROM b",
        "SELECT a FROM (SELECT unnest([3, 1, 2]) AS a) ORDER BY a LIMIT 1",
    ],
)
def test_any_single_select_is_answered(sweep_folder: Path, sql: str) -> None:
    sweep = open_sweep(sweep_folder)
    assert sweep.rows(sql) == [{"a": 1}]


def test_the_order_that_a_query_asks_for_is_kept(sweep_folder: Path) -> None:
    sweep = open_sweep(sweep_folder)
    assert [row["trial"] for row in sweep.rows("SELECT trial FROM trials ORDER BY trial DESC")] == [
        5,
        4,
        3,
        2,
        1,
        0,
    ]


@pytest.mark.parametrize("table", [table for table in TABLES if table != "results"])
def test_every_table_can_be_asked_before_there_is_anything(tmp_path: Path, table: str) -> None:
    empty = write_sweep(tmp_path, [], objectives={"total": "maximize"}, parameters={"x": "BIGINT"})
    full = write_sweep(
        tmp_path / "full",
        [StoredTrial({"x": 1}, {"select": {"total": 1.0}})],
        objectives={"total": "maximize"},
        parameters={"x": "BIGINT"},
    )
    assert empty.rows(f"SELECT * FROM {table}") == []
    assert empty.rows(f"DESCRIBE {table}") == full.rows(f"DESCRIBE {table}")


CHANGES = (
    "INSERT INTO open_trials (trial) VALUES (9)",
    "UPDATE open_trials SET trial = 9",
    "DELETE FROM open_trials",
    "DROP VIEW trials",
    "CREATE TABLE mine AS SELECT 1",
    "ALTER TABLE open_trials ADD COLUMN a INTEGER",
    "COPY trials TO '{folder}/tables/mine.parquet'",
    "COPY trials TO '{outside}/mine.csv'",
    "EXPORT DATABASE '{outside}/all'",
    "ATTACH '{outside}/mine.db'",
    "ATTACH '{folder}/tables/mine.db'",
    "PRAGMA database_list",
    "SET enable_external_access = true",
    "RESET enable_external_access",
    "INSTALL httpfs",
    "LOAD httpfs",
    "CALL enable_logging()",
    "CHECKPOINT",
    "PREPARE mine AS SELECT 1",
    "WITH mine AS (COPY trials TO '{listed}') SELECT 1",
    "WITH mine AS (COPY (SELECT 1) TO '{folder}/tables/mine.parquet') SELECT * FROM mine",
    "WITH mine AS (INSERT INTO open_trials (trial) VALUES (9) RETURNING trial) SELECT * FROM mine",
    "SELECT * FROM query('COPY trials TO ''{listed}''')",
    "SELECT * FROM query('WITH mine AS (COPY trials TO ''{listed}'') SELECT 1')",
    "SELECT * FROM enable_logging(storage='file', storage_path='{outside}/log')",
    "SELECT * FROM enable_profiling(save_location='{outside}/profile.json')",
)
READS = (
    "SELECT * FROM read_csv('/etc/passwd')",
    "SELECT * FROM read_text('/etc/passwd')",
    "SELECT * FROM read_blob('{folder}/sweep.json')",
    "SELECT * FROM read_json('{folder}/sweep.json')",
    "SELECT * FROM '/etc/passwd'",
    "SELECT * FROM '{outside}/secret.csv'",
    "SELECT * FROM read_text('{folder}/tables/../../outside/secret.csv')",
    "SELECT * FROM sniff_csv('{outside}/secret.csv')",
    "SELECT * FROM glob('/etc/*')",
    "SELECT * FROM glob('{outside}/*')",
    "SELECT * FROM glob('{folder}/*')",
    "SELECT * FROM read_parquet('{unlisted}')",
    "SELECT * FROM read_csv('http://127.0.0.1:9/x.csv')",
    "SELECT getenv('HOME')",
)
NOT_ONE = (
    "",
    ";",
    "-- nothing",
    "SELECT 1; SELECT 2",
    "SELECT 1; DROP VIEW trials",
    "SELEC 1",
    "SELECT nonsense FROM trials",
)


@pytest.mark.parametrize("sql", [*CHANGES, *READS, *NOT_ONE])
def test_a_query_that_is_not_one_select_of_the_tables_is_refused_and_changes_nothing(
    sweep_folder: Path, tmp_path: Path, sql: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    sweep = open_sweep(sweep_folder)
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "secret.csv").write_text("a,b\n1,2\n")
    monkeypatch.chdir(outside)
    [listed, *_] = Store(sweep_folder).files("metrics")
    unlisted = write_table(sweep_folder, "metrics", [metric("stranger", 1.0)])
    places = {"folder": sweep_folder, "outside": outside}
    files = {"listed": sweep_folder / listed.path, "unlisted": sweep_folder / unlisted.path}
    before = files_under(tmp_path)
    with pytest.raises(SpecError, match=r"^query") as refusal:
        sweep.query(sql.format(**places, **files))
    assert "\n" not in str(refusal.value)
    assert files_under(tmp_path) == before
    assert len(sweep.rows("SELECT * FROM trials")) == 6


def test_a_query_sees_what_was_committed_since_the_sweep_was_opened(sweep_folder: Path) -> None:
    sweep = open_sweep(sweep_folder)
    Store(sweep_folder).commit(
        [], trials=[{"trial": 4, "spec": "s", "state": "completed", "params": '{"x": 5}'}]
    )
    assert sweep.rows("SELECT state FROM trials WHERE trial = 4") == [{"state": "completed"}]


def test_all_questions_in_a_moment_are_of_the_tables_as_they_stood_at_its_beginning(
    sweep_folder: Path,
) -> None:
    sweep = open_sweep(sweep_folder)
    new = {"trial": 4, "spec": "s", "state": "completed", "params": '{"x": 5}', "finished": 1.0}
    with sweep.moment() as then:
        before = [then.trials(), then.pareto(), then.counts()]
        part = Part(
            (write_table(sweep_folder, "metrics", [metric("s", 99.0)]),),
            (StoredResult("s", "completed", None),),
        )
        Store(sweep_folder).commit([part], trials=[new])
        assert [then.trials(), then.pareto(), then.counts()] == before
        assert sweep.trials() != before[0]
        with pytest.raises(SpecError, match="one SELECT"):
            then.query("CREATE TABLE trials (x INTEGER)")
        with pytest.raises(SpecError, match="no_such"):
            then.query("SELECT * FROM no_such")
        assert then.trials() == before[0]
    with sweep.moment() as now:
        assert now.trials() == sweep.trials()


def test_a_query_does_not_see_python_variables_of_its_caller(sweep_folder: Path) -> None:
    sweep = open_sweep(sweep_folder)
    hidden = sweep.query("SELECT 1 AS a")
    with pytest.raises(SpecError, match="hidden"):
        sweep.query("SELECT * FROM hidden")
    assert hidden.num_rows == 1


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


def garble(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2 : -1] = b"\xff" * (len(content) - len(content) // 2 - 1)
    path.write_bytes(content)


def delete(path: Path) -> None:
    path.unlink()


def empty_object(path: Path) -> None:
    path.write_text("{}\n")


def list_of_numbers(path: Path) -> None:
    path.write_text("[1]\n")


DAMAGES = (cut, garble, delete, empty_object, list_of_numbers)
STORED = (
    "sweep.json",
    "manifest/00000000.json",
    "ledger.jsonl",
    "tables/trials/*.parquet",
    "tables/metrics/*.parquet",
)
MENDED = (("ledger.jsonl", cut), ("ledger.jsonl", delete))
"""A torn last line of the ledger is dropped, and a ledger that is not there yet is empty."""


@pytest.mark.parametrize(
    ("pattern", "damage"), [case for case in itertools.product(STORED, DAMAGES) if case not in MENDED]
)
def test_a_sweep_whose_files_were_damaged_says_which_in_one_line(
    sweep_folder: Path, pattern: str, damage: Callable[[Path], None]
) -> None:
    path = sorted(sweep_folder.glob(pattern))[0]
    damage(path)
    with pytest.raises((StoreError, SpecError)) as error:
        open_sweep(sweep_folder).rows("SELECT * FROM trials JOIN metrics USING (spec)")
    assert path.name in str(error.value)
    assert "\n" not in str(error.value)


def test_what_dead_writers_have_left_is_removed_and_nothing_else(tmp_path: Path) -> None:
    for name in (".hidden", "tables/metrics/a.parquet", "manifest/00000000.json", ".mlflow.db.new"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("kept")
    before = files_under(tmp_path)
    for name in (".sweep.json.0a1b2c3d", "tables/metrics/.a.parquet.0a1b2c3d"):
        (tmp_path / name).write_text("half")
    remove_staging(tmp_path)
    assert files_under(tmp_path) == before


def test_a_folder_without_a_sweep_says_so(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match=r"holds no sweep.*sweep\.json"):
        open_sweep(tmp_path)


def test_a_folder_whose_name_needs_quoting_can_be_asked(tmp_path: Path) -> None:
    folder = tmp_path / 'it\'s [a] "folder" * ? é'
    sweep = write_sweep(
        folder, [StoredTrial({}, {"select": {"total": 1.0}})], objectives={"total": "maximize"}
    )
    assert sweep.rows("SELECT value FROM metrics") == [{"value": 1.0}]

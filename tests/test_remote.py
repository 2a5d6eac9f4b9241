"""Sweeps whose workers share no folder with their driver: files travel by a place that both reach."""

import json
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from moto.server import ThreadedMotoServer
from pyarrow.fs import S3FileSystem

from jobs.errors import SpecError
from jobs.spec import ModelRef
from orchestrator.config import make_config
from orchestrator.sweep import Sweep
from orchestrator.worker import Worker
from search_spaces.base import Grid
from storage.artifacts import read_artifact, write_artifact
from storage.backup import Backup
from storage.donors import Donors
from storage.durable import StoreError
from storage.lease import Lease
from storage.remote import Remote, sweep_uri
from storage.store import Store
from tests import fake_source
from tests.command import refused, results, run_arguments, steersweep
from tests.fakes import InlinePool, SilentProgress, Stopped, load_nothing
from tests.mirrored import free_port
from tests.sweeps import check_ended, drive, make_space, open_sampler, outcome_of, prepare

SPACE = make_space({"x": Grid([1, 2, 3, 4]), "source": Grid([5, 7])}, fixed={"mode": "tables"})


@pytest.fixture(scope="module")
def bucket() -> Iterator[str]:
    """URI of an empty bucket on a server that speaks S3."""
    port = free_port()
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=port, verbose=False)
    server.start()
    with pytest.MonkeyPatch.context() as patch:
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            patch.setenv(name, "test")
        patch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        endpoint = f"127.0.0.1:{port}"
        S3FileSystem(endpoint_override=endpoint, scheme="http", allow_bucket_creation=True).create_dir(
            "sweeps"
        )
        yield f"s3://sweeps?endpoint_override={endpoint}&scheme=http&region=us-east-1"
    server.stop()


@pytest.fixture(params=["s3", "file"])
def uri(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """URI of a place of its own for one sweep."""
    if request.param == "file":
        return f"file://{tmp_path / 'remote'}"
    return sweep_uri(request.getfixturevalue("bucket"), tmp_path.name)


class DistantPool(InlinePool):
    """Workers that have a folder of their own, each its own, and the driver's none."""

    def __init__(self, folder: Path, uri: str, **options: Any) -> None:
        self._uri = uri
        self._machines = 0
        super().__init__(folder, **options)

    def make_worker(self) -> Worker:
        self._machines += 1
        own = self._folder.with_name(f"{self._folder.name}-{self._machines}")
        own.mkdir(exist_ok=True)
        return Worker(
            own,
            ModelRef(id="no-model"),
            device="cpu",
            token_budget=1,
            load=load_nothing,
            remote=Remote(self._uri),
        )


def drive_apart(folder: Path, uri: str, **options: Any) -> DistantPool:
    config = prepare(folder, SPACE)
    pool = DistantPool(folder, uri, **options)
    Sweep(
        folder,
        space=SPACE,
        config=config,
        trials=8,
        sampler=open_sampler(folder, SPACE),
        pool=pool,
        donors=Donors(()),
        progress=SilentProgress(),
        on_result=lambda: None,
        is_asked_to_stop=lambda: False,
        remote=Remote(uri),
    ).run()
    return pool


@pytest.fixture(autouse=True)
def _a_clean_start(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_source.RAN.clear()
    monkeypatch.setattr("orchestrator.folder.provenance", dict)


def test_a_sweep_on_machines_without_a_common_folder_is_the_same_sweep(tmp_path: Path, uri: str) -> None:
    drive(tmp_path / "near", SPACE, trials=8)
    pool = drive_apart(tmp_path / "far", uri)
    check_ended(tmp_path / "far", SPACE, trials=8)
    assert outcome_of(tmp_path / "far") == outcome_of(tmp_path / "near")
    assert len({order.job for order in pool.orders}) == 2


def test_a_sweep_comes_back_whole_from_where_it_was_copied_to_and_goes_on(tmp_path: Path, uri: str) -> None:
    with pytest.raises(Stopped):
        drive_apart(tmp_path / "lost", uri, stop_at=16)
    Remote(uri).put_new(tmp_path / "lost")
    ended = len(Store(tmp_path / "lost").rows("trials"))
    assert 0 < ended < 8
    shutil.rmtree(tmp_path / "lost")
    Remote(uri).fetch_all(tmp_path / "found")
    assert len(Store(tmp_path / "found").rows("trials")) == ended
    drive_apart(tmp_path / "found", uri)
    check_ended(tmp_path / "found", SPACE, trials=8)
    drive(tmp_path / "near", SPACE, trials=8)
    assert outcome_of(tmp_path / "found") == outcome_of(tmp_path / "near")


def test_a_copy_that_is_cut_short_is_an_earlier_state_of_the_sweep(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(Stopped):
        drive(tmp_path / "sweep", SPACE, trials=8, stop_at=16)
    ended = len(Store(tmp_path / "sweep").rows("trials"))
    assert 0 < ended < 8
    real = Remote.put
    for last in range(0, 400, 12):
        shutil.rmtree(tmp_path / "written", ignore_errors=True)
        shutil.copytree(tmp_path / "sweep", tmp_path / "written")
        place = f"file://{tmp_path / f'remote-{last}'}"
        puts = iter(range(10_000))

        def put(self: Remote, folder: Path, path: str, puts: Iterator[int] = puts, last: int = last) -> None:
            number = next(puts)
            if number >= last:
                raise StoreError("the machine is gone")
            if number == 2:  # the driver goes on while its folder is copied
                drive(folder, SPACE, trials=8)
            real(self, folder, path)

        monkeypatch.setattr(Remote, "put", put)
        try:
            Remote(place).put_new(tmp_path / "written")
            is_whole = True
        except StoreError:
            is_whole = False
        monkeypatch.setattr(Remote, "put", real)
        found = tmp_path / f"found-{last}"
        try:
            Remote(place).fetch_all(found)
        except SpecError:
            assert not (found / "sweep.json").exists()
            continue
        # `Store` raises if a file is missing that the manifest lists.
        assert len(Store(found).rows("trials")) <= ended
        if is_whole:
            break
    assert is_whole
    assert len(Store(found).rows("trials")) == ended
    drive(found, SPACE, trials=8)
    check_ended(found, SPACE, trials=8)


def test_only_what_is_new_is_copied_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drive(tmp_path / "sweep", SPACE, trials=4)
    copied: list[str] = []
    real = Remote.put
    monkeypatch.setattr(
        Remote, "put", lambda self, folder, path: (copied.append(path), real(self, folder, path))
    )
    place = f"file://{tmp_path / 'remote'}"
    remote = Remote(place)
    remote.put_new(tmp_path / "sweep")
    assert {path.partition("/")[0] for path in copied} == {
        "artifacts", "ledger.jsonl", "manifest", "optuna.journal", "space.py", "sweep.json", "tables"
    }  # fmt: skip
    known = set(copied)
    copied.clear()
    remote.put_new(tmp_path / "sweep")
    assert copied == []
    drive(tmp_path / "sweep", SPACE, trials=8)
    Remote(place).put_new(tmp_path / "sweep")
    assert {path for path in copied if path.startswith("tables/")}.isdisjoint(known)
    assert "ledger.jsonl" in copied


def test_an_artifact_is_the_same_on_the_other_side(tmp_path: Path, uri: str) -> None:
    (tmp_path / "here").mkdir()
    artifact = write_artifact(tmp_path / "here", {"a": np.arange(5.0)})
    remote = Remote(uri)
    remote.put(tmp_path / "here", artifact.path)
    remote.fetch(tmp_path / "there", artifact.path)
    assert read_artifact(tmp_path / "there", artifact)["a"].tolist() == [0, 1, 2, 3, 4]
    with pytest.raises(StoreError, match="cannot read"):
        remote.fetch(tmp_path / "there", "artifacts/absent")
    assert [path.name for path in (tmp_path / "there" / "artifacts").iterdir()] == [Path(artifact.path).name]


def test_what_is_no_place_is_refused() -> None:
    with pytest.raises(SpecError, match="is no place for files"):
        Remote("nowhere://bucket")
    with pytest.raises(SpecError, match="AWS_ACCESS_KEY_ID"):
        make_config(results="s3://key:secret@bucket/sweeps")
    assert sweep_uri("s3://bucket/a/?x=1", "s") == "s3://bucket/a/s?x=1"


def test_a_backup_that_fails_later_is_one_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    drive(tmp_path / "sweep", SPACE, trials=4)
    monkeypatch.setattr("storage.backup._SECONDS", 0.01)
    backup = Backup(tmp_path / "sweep", Remote(f"file://{tmp_path / 'remote'}"))

    tries: list[Path] = []

    def refuse(self: Remote, folder: Path, may_write: object) -> None:
        tries.append(folder)
        raise StoreError("no way there")

    monkeypatch.setattr(Remote, "put_new", refuse)
    while len(tries) < 3:
        time.sleep(0.01)
    backup.close()
    assert sum("no way there" in record.message for record in caplog.records) == 1


def make_driver(folder: Path) -> Path:
    drive(folder, SPACE, trials=4)
    (folder / "lock").write_text(f"ada on {folder.name}, process 7")
    return folder


def copied(folder: Path) -> Path:
    """What another machine has of a driver's folder."""
    other = folder.with_name("second")
    shutil.copytree(folder, other)
    (other / "lock").write_text("ada on second, process 7")
    return other


def test_a_second_driver_of_a_sweep_in_a_bucket_is_refused_with_the_name_of_the_first(
    tmp_path: Path, uri: str
) -> None:
    first = Backup(make_driver(tmp_path / "first"), Remote(uri))
    second = copied(tmp_path / "first")
    with pytest.raises(SpecError, match=r"being run by ada on first, process 7, which was there \d s ago"):
        Backup(second, Remote(uri))
    Backup(tmp_path / "first", Remote(uri)).close()  # who goes on where it was left
    Backup(second, Remote(uri)).close()
    first.close()
    assert Remote(uri).files("drivers") == {}


def test_a_driver_that_was_not_heard_of_for_long_is_followed_by_another_and_copies_nothing_more(
    tmp_path: Path, uri: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    first = Backup(make_driver(tmp_path / "first"), Remote(uri))
    monkeypatch.setattr("storage.lease._FRESH_SECONDS", -5.0)
    second = Backup(copied(tmp_path / "first"), Remote(uri))
    monkeypatch.setattr("storage.lease._FRESH_SECONDS", 60.0)
    monkeypatch.setattr("storage.lease._RENEW_SECONDS", 0.0)
    written: list[str] = []
    real = Remote.put

    def put(self: Remote, folder: Path, path: str, *, to: str | None = None) -> None:
        written.append(folder.name)
        real(self, folder, path, to=to)

    monkeypatch.setattr(Remote, "put", put)
    (tmp_path / "first" / "ledger.jsonl").touch()
    first.close()
    second.close()
    assert set(written) == {"second"}
    assert sum("another driver has taken the sweep" in record.message for record in caplog.records) == 1
    assert Remote(uri).files("drivers") == {}
    Remote(uri).fetch_all(tmp_path / "brought")
    assert not (tmp_path / "brought" / "drivers").exists()


def test_a_driver_that_wakes_up_late_yields_to_the_one_that_followed(
    tmp_path: Path, uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = Lease(make_driver(tmp_path / "first"), Remote(uri))
    monkeypatch.setattr("storage.lease._FRESH_SECONDS", -5.0)
    second = Lease(copied(tmp_path / "first"), Remote(uri))
    monkeypatch.setattr("storage.lease._FRESH_SECONDS", 60.0)
    Remote(uri).put(tmp_path / "first", "lock", to=first._path)  # it was about to when the other took over
    first._renewed -= 100
    assert not first.holds()
    assert not first.holds(), "what is lost stays lost"
    assert second.holds()
    second.end()
    assert not first.holds()
    assert Remote(uri).files("drivers") == {}


def test_a_bucket_that_was_emptied_is_filled_again(
    tmp_path: Path, uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("storage.lease._RENEW_SECONDS", 0.0)
    backup = Backup(make_driver(tmp_path / "first"), Remote(uri))
    remote = Remote(uri)
    before = remote.files().keys()
    for path in before:
        remote.remove(path)
    backup.close()
    assert remote.files().keys() == {path for path in before if not path.startswith("drivers/")}


def test_a_long_copy_is_given_up_when_another_driver_has_taken_the_sweep(
    tmp_path: Path, uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_driver(tmp_path / "first")
    lease, remote = Lease(folder, Remote(uri)), Remote(uri)
    allowed: list[bool] = []

    def may_write() -> bool:
        if len(allowed) == 3:  # it takes so long that others take this driver for dead
            monkeypatch.setattr("storage.lease._FRESH_SECONDS", -5.0)
            Lease(copied(folder), Remote(uri))
            monkeypatch.setattr("storage.lease._FRESH_SECONDS", 60.0)
            lease._renewed -= 100
        allowed.append(lease.holds())
        return allowed[-1]

    assert not remote.put_new(folder, may_write)
    assert allowed == [True, True, True, False]
    assert not Remote(uri).files("manifest")


def test_a_folder_that_is_behind_is_not_copied_over_what_another_driver_has_added(
    tmp_path: Path, uri: str
) -> None:
    stale = make_driver(tmp_path / "first")
    Backup(stale, Remote(uri)).close()
    Remote(uri).fetch_all(tmp_path / "second")
    Backup(make_driver(tmp_path / "second"), Remote(uri)).close()
    drive(tmp_path / "second", SPACE, trials=8)
    Backup(tmp_path / "second", Remote(uri)).close()
    before = Remote(uri).files()
    with pytest.raises(SpecError, match=r"results of this sweep that .*first lacks.*steersweep fetch"):
        Backup(stale, Remote(uri))
    drive(stale, SPACE, trials=8)  # as many results, but others
    with pytest.raises(SpecError, match="another driver has gone on"):
        Backup(stale, Remote(uri))
    assert Remote(uri).files() == before


@pytest.mark.ray
def test_the_command_keeps_a_sweep_in_a_bucket_and_brings_it_back(
    place: Path, finished: dict[str, Any], bucket: str
) -> None:
    done = steersweep(*run_arguments(place, "kept"), "--set", f"results={bucket}")
    assert done.returncode == 0, done.stderr
    name = json.loads(done.stdout.splitlines()[-1])["sweep"]
    brought = steersweep("fetch", sweep_uri(bucket, name), "--out", place / "brought", "--json")
    assert brought.returncode == 0, brought.stderr
    assert results(place / "brought") == results(place / "finished")
    again = steersweep("resume", place / "brought", "--json")
    assert again.returncode == 0, again.stderr
    assert json.loads(again.stdout.splitlines()[-1])["completed"] == 9
    assert "is there already" in refused("fetch", sweep_uri(bucket, name), "--out", place / "brought")
    assert "holds no sweep" in refused("fetch", sweep_uri(bucket, "absent"), "--out", place / "absent")

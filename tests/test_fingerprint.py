"""The hash of a model's files: what counts, what is read again; and a sweep goes on with one model only."""

import hashlib
import json
import os
from pathlib import Path

import huggingface_hub.constants
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jobs import catalog
from jobs import fingerprint as fingerprint_module
from jobs.errors import ModelError, SpecError
from jobs.fingerprint import commit, fingerprint
from jobs.spec import ModelRef
from orchestrator.config import RunConfig
from orchestrator.folder import claimed
from orchestrator.planning import Planner, check_unchanged
from orchestrator.space_file import SpaceFile
from search_spaces.base import Grid, Objective, Space
from storage.ledger import Asked
from storage.query import read_identity

COMMIT = "0123456789abcdef0123456789abcdef01234567"
OLD = 1_600_000_000 * 10**9
"""Nanoseconds since 1970; a file of that age may be known by its time stamp."""
FILES = {
    "config.json": "{}",
    "generation_config.json": "{}",
    "model.safetensors": "weights",
    "tokenizer.json": "pieces",
    "tokenizer_config.json": "{}",
    "special_tokens_map.json": "{}",
    "chat_template.jinja": "template",
    "vocab.txt": "words",
    "merges.txt": "merges",
    "tokenizer.model": "pieces",
    "own.py": "code",
}
SPACE = Space(
    description="numbers",
    job="tests.fake_job",
    parameters={"x": Grid([1, 2])},
    objectives=(Objective(metric="total", direction="maximize"),),
    sampler="grid",
)


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache folder of the user's."""
    path = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("XDG_CACHE_HOME", str(path))
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "model"
    path.mkdir()
    for name, text in FILES.items():
        write(path / name, text)
    return path


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the files that were read through, in order."""
    names: list[str] = []
    read = fingerprint_module._read_hash

    def counted(path: Path) -> str:
        names.append(path.name)
        return read(path)

    monkeypatch.setattr(fingerprint_module, "_read_hash", counted)
    return names


def write(path: Path, text: str, *, nanoseconds: int = OLD) -> None:
    path.write_text(text)
    os.utime(path, ns=(nanoseconds, nanoseconds))


class TestWhatCounts:
    @pytest.mark.parametrize("name", FILES)
    def test_other_content_of_a_file_that_decides_is_another_fingerprint(
        self, folder: Path, name: str
    ) -> None:
        before = fingerprint(str(folder))
        write(folder / name, "x" * len(FILES[name]), nanoseconds=OLD + 1)
        assert fingerprint(str(folder)) != before
        write(folder / name, FILES[name], nanoseconds=OLD + 2)
        assert fingerprint(str(folder)) == before

    @pytest.mark.parametrize("name", FILES)
    def test_a_file_less_is_another_fingerprint(self, folder: Path, name: str) -> None:
        before = fingerprint(str(folder))
        (folder / name).unlink()
        assert fingerprint(str(folder)) != before

    @pytest.mark.parametrize("name", ["README.md", "LICENSE", "training_args.bin", "optimizer.pt", "a.gguf"])
    def test_other_files_do_not_count(self, folder: Path, name: str) -> None:
        before = fingerprint(str(folder))
        write(folder / name, "x")
        assert fingerprint(str(folder)) == before

    def test_the_same_files_elsewhere_have_the_same_fingerprint(self, folder: Path) -> None:
        before = fingerprint(str(folder))
        assert fingerprint(str(folder.rename(folder.with_name("moved")))) == before

    def test_two_files_that_change_places_are_another_fingerprint(self, folder: Path) -> None:
        before = fingerprint(str(folder))
        write(folder / "vocab.txt", FILES["merges.txt"], nanoseconds=OLD + 1)
        write(folder / "merges.txt", FILES["vocab.txt"], nanoseconds=OLD + 1)
        assert fingerprint(str(folder)) != before

    def test_without_safetensors_the_older_files_count(self, folder: Path) -> None:
        (folder / "model.safetensors").unlink()
        write(folder / "pytorch_model.bin", "weights")
        before = fingerprint(str(folder))
        write(folder / "pytorch_model.bin", "another", nanoseconds=OLD + 1)
        assert fingerprint(str(folder)) != before

    def test_shards_count_where_the_index_names_them(self, folder: Path) -> None:
        (folder / "model.safetensors").unlink()
        (folder / "shards").mkdir()
        names = {"a": "shards/1.safetensors", "b": "shards/2.safetensors", "c": "shards/absent.safetensors"}
        write(folder / "model.safetensors.index.json", json.dumps({"weight_map": names}))
        for name in ("1", "2", "unused"):
            write(folder / "shards" / f"{name}.safetensors", name)
        before = fingerprint(str(folder))
        write(folder / "shards" / "unused.safetensors", "x", nanoseconds=OLD + 1)
        assert fingerprint(str(folder)) == before
        write(folder / "shards" / "2.safetensors", "x", nanoseconds=OLD + 1)
        assert fingerprint(str(folder)) != before

    @pytest.mark.parametrize("text", ["", "{", "[]", '{"weight_map": 3}', '{"other": {}}'])
    def test_a_broken_index_is_left_to_the_loader(self, folder: Path, text: str) -> None:
        write(folder / "model.safetensors.index.json", text)
        assert fingerprint(str(folder)) is not None

    def test_links_are_read_as_what_they_point_to(self, folder: Path, tmp_path: Path) -> None:
        before = fingerprint(str(folder))
        (folder / "model.safetensors").rename(tmp_path / "blob")
        (folder / "model.safetensors").symlink_to(tmp_path / "blob")
        assert fingerprint(str(folder)) == before
        write(tmp_path / "blob", "another", nanoseconds=OLD + 1)
        assert fingerprint(str(folder)) != before
        (tmp_path / "blob").unlink()
        assert fingerprint(str(folder)) not in (None, before)

    @given(st.binary(max_size=64), st.integers(1, 9))
    def test_a_file_read_in_pieces_has_the_hash_of_the_whole(self, content: bytes, size: int) -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(fingerprint_module, "_CHUNK_BYTES", size)
            path = catalog.home().parent / "content"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
            assert fingerprint_module._read_hash(path) == hashlib.sha256(content).hexdigest()

    def test_a_name_that_can_be_added_means_its_folder(self, folder: Path) -> None:
        assert fingerprint("smollm2-135m") is None
        catalog.home().mkdir(parents=True)
        folder.rename(catalog.folder("smollm2-135m"))
        assert fingerprint("smollm2-135m") == fingerprint(str(catalog.folder("smollm2-135m")))

    def test_what_is_no_folder_has_none(self, tmp_path: Path) -> None:
        assert fingerprint("some-org/some-model") is None
        assert fingerprint(str(tmp_path / "absent")) is None

    def test_a_file_that_cannot_be_read_is_named(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def refuse(path: Path) -> str:
            raise PermissionError(13, "Permission denied", str(path))

        monkeypatch.setattr(fingerprint_module, "_read_hash", refuse)
        with pytest.raises(
            ModelError, match=r"cannot read .*chat_template\.jinja of model .*: Permission den"
        ):
            fingerprint(str(folder))


class TestReadingOnce:
    def test_a_second_call_reads_nothing_and_says_the_same(self, folder: Path, reads: list[str]) -> None:
        before = fingerprint(str(folder))
        assert sorted(reads) == sorted(FILES)
        reads.clear()
        assert fingerprint(str(folder)) == before
        assert reads == []

    @pytest.mark.parametrize(("text", "later"), [("weightS", 1), ("weights!", 0)])
    def test_another_time_or_size_is_read_again_and_nothing_else(
        self, folder: Path, reads: list[str], text: str, later: int
    ) -> None:
        before = fingerprint(str(folder))
        reads.clear()
        write(folder / "model.safetensors", text, nanoseconds=OLD + later)
        assert fingerprint(str(folder)) != before
        assert reads == ["model.safetensors"]

    def test_a_file_written_just_now_is_read_again_since_its_time_may_stay(
        self, folder: Path, reads: list[str]
    ) -> None:
        (folder / "model.safetensors").write_text("one")
        now = (folder / "model.safetensors").stat().st_mtime_ns
        before = fingerprint(str(folder))
        write(folder / "model.safetensors", "two", nanoseconds=now)
        assert fingerprint(str(folder)) != before
        assert reads.count("model.safetensors") == 2

    def test_a_file_that_changes_while_it_is_read_is_not_remembered(
        self, folder: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        before = fingerprint(str(folder))
        write(folder / "model.safetensors", "changes", nanoseconds=OLD + 1)

        def changing(path: Path) -> str:
            os.utime(path, ns=(OLD + 2, OLD + 2))
            return "0" * 64

        with monkeypatch.context() as patch:
            patch.setattr(fingerprint_module, "_read_hash", changing)
            fingerprint(str(folder))
        write(folder / "model.safetensors", "weights", nanoseconds=OLD + 1)
        assert fingerprint(str(folder)) == before

    def test_what_is_kept_may_be_damaged_or_gone(self, folder: Path, cache: Path, reads: list[str]) -> None:
        before = fingerprint(str(folder))
        kept = sorted((cache / "steersweep" / "fingerprints").iterdir())
        assert len(kept) == len(FILES)
        for path in kept[1:]:
            path.write_text("0" * 63)
        kept[0].unlink()
        reads.clear()
        assert fingerprint(str(folder)) == before
        assert len(reads) == len(FILES)

    def test_without_a_place_to_keep_hashes_they_are_computed_each_time(
        self, folder: Path, cache: Path, reads: list[str]
    ) -> None:
        (cache / "steersweep").write_text("a file where the folder should be")
        assert fingerprint(str(folder)) == fingerprint(str(folder))
        assert len(reads) == 2 * len(FILES)


class TestCommits:
    @pytest.fixture
    def hub(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        """Hugging Face's cache folder, in which the branch main of `org/name` is at `COMMIT`."""
        model = tmp_path / "hub" / "models--org--name"
        (model / "snapshots" / COMMIT).mkdir(parents=True)
        (model / "snapshots" / COMMIT / "config.json").write_text("{}")
        (model / "refs").mkdir()
        (model / "refs" / "main").write_text(COMMIT)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
        return model

    @pytest.mark.usefixtures("hub")
    def test_a_branch_means_the_commit_that_was_downloaded(self) -> None:
        assert commit(ModelRef(id="org/name")) == COMMIT
        assert commit(ModelRef(id="org/name", revision="main")) == COMMIT
        assert commit(ModelRef(id="org/name", revision="v2")) is None
        assert commit(ModelRef(id="org/other")) is None
        assert commit(ModelRef(id="org/other", revision=COMMIT)) == COMMIT

    @pytest.mark.parametrize("name", ["no such name", "a/b/c", "smollm2-135m", "."])
    def test_what_is_no_hugging_face_id_has_none(self, name: str) -> None:
        assert commit(ModelRef(id=name)) is None

    def test_a_pinned_configuration_stays_at_its_commit_when_the_branch_moves(self, hub: Path) -> None:
        config = RunConfig(model="org/name", seed=3)
        assert config.model_ref.revision is None
        pinned = config.pinned()
        assert pinned == RunConfig(model=f"org/name@{COMMIT}", seed=3)
        assert pinned.model_ref == ModelRef(id="org/name", revision=COMMIT)
        (hub / "refs" / "main").write_text(COMMIT[::-1])
        assert pinned.pinned() is pinned

    def test_a_folder_and_an_unknown_id_are_pinned_as_they_are(self, folder: Path) -> None:
        for model in (str(folder), "org/unknown"):
            config = RunConfig(model=model)
            assert config.pinned() is config


class TestSweeps:
    def test_the_fingerprint_is_in_the_spec_and_in_what_the_sweep_says_of_itself(
        self, folder: Path, tmp_path: Path
    ) -> None:
        config = RunConfig(model=str(folder))
        spec = Planner(SPACE, config).spec({"x": 1})
        assert spec.model.weights == fingerprint(str(folder))
        with claimed(tmp_path / "sweep", SpaceFile(SPACE, Path("fake.py"), "SPACE = ..."), config):
            pass
        assert read_identity(tmp_path / "sweep")["model"]["weights"] == spec.model.weights

    def test_a_sweep_does_not_go_on_with_other_weights(self, folder: Path) -> None:
        spec = Planner(SPACE, RunConfig(model=str(folder))).spec({"x": 1})
        asked = [Asked(trial=7, params={"x": 1}, spec=spec, seen=0, group=7)]
        check_unchanged(Planner(SPACE, RunConfig(model=str(folder))), asked)
        write(folder / "model.safetensors", "another", nanoseconds=OLD + 1)
        with pytest.raises(SpecError, match=r"the model .*model \(its weights, .*\) changed since trial 7"):
            check_unchanged(Planner(SPACE, RunConfig(model=str(folder))), asked)

    def test_one_driver_keeps_the_fingerprint_that_it_began_with(self, folder: Path) -> None:
        config = RunConfig(model=str(folder))
        planner = Planner(SPACE, config)
        before = planner.spec({"x": 1})
        write(folder / "model.safetensors", "another", nanoseconds=OLD + 1)
        assert planner.spec({"x": 1}) == before

"""Directions of a sweep as control vectors: what is listed, what is written, what is refused."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from jobs.directions.vector_files import read_vectors
from jobs.errors import SpecError
from orchestrator.cli import app
from orchestrator.control_vectors import Chosen, write_control_vector
from orchestrator.stored_vectors import stored_directions
from search_spaces.base import Grid, Objective
from storage.artifacts import read_artifact, write_artifact
from storage.durable import StoreError
from storage.query import open_sweep
from storage.store import Store
from tests.fakes import write_sweep
from tests.models import HIDDEN, LAYERS, tiny_replica
from tests.sweeps import drive, make_space


@pytest.fixture(scope="module")
def swept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sweep that required the directions of two methods."""
    folder = tmp_path_factory.mktemp("swept")
    space = make_space(
        {"direction": Grid(["mean_difference", "pca"]), "dose": Grid([0.5])},
        job="jobs.generate",
        fixed={"layer": 1, "prompts": "open_prompts", "count": 1, "max_new_tokens": 1},
        objectives=(Objective(metric="nll", direction="minimize"),),
    )
    drive(folder, space, trials=2, load=lambda ref, **options: tiny_replica("llama"))
    return folder


def store(folder: Path, **tensors: np.ndarray) -> Path:
    """A folder with one artifact of these arrays, whose origin is not known."""
    write_sweep(folder, [], objectives={"total": "maximize"})
    identity = json.loads((folder / "sweep.json").read_text())
    model = {"id": "some/model", "revision": "main", "weights": None}
    (folder / "sweep.json").write_text(json.dumps({**identity, "model": model}))
    add(folder, "only", **tensors)
    return folder


def add(folder: Path, spec: str, **tensors: np.ndarray) -> None:
    kept = write_artifact(folder, tensors)
    row = {"spec": spec, "job": "jobs.extract", "hash": kept.sha256, "path": kept.path, "bytes": kept.bytes}
    Store(folder).commit([], artifacts=[row])


def arrays(seed: int = 0) -> dict[str, np.ndarray]:
    drawn = np.random.default_rng(seed).normal(size=(3, 8)).astype(np.float32)
    return {"directions": drawn, "residual_norms": np.array([1.0, 2.0, 3.0], dtype=np.float32)}


def test_the_list_says_how_each_was_made_for_which_layers_and_size(swept: Path) -> None:
    found = stored_directions(swept)
    assert {each.params["method"] for each in found if each.params} == {"mean_difference", "pca"}
    assert {(each.job, tuple(each.layers), each.hidden) for each in found} == {
        ("jobs.extract", tuple(range(LAYERS)), HIDDEN)
    }


def test_a_safetensors_file_holds_what_is_stored(swept: Path, tmp_path: Path) -> None:
    chosen = stored_directions(swept)[0]
    written = write_control_vector(swept, Chosen(tmp_path / "v.safetensors", chosen.spec[:10]))
    file = read_vectors(tmp_path / "v.safetensors", layers=LAYERS, hidden=HIDDEN)
    kept = read_artifact(swept, chosen.artifact)
    np.testing.assert_array_equal(np.stack(list(file.directions.values())), kept["directions"])
    assert list(file.residual_norms.values()) == kept["residual_norms"].tolist()
    assert file.metadata["method"].startswith("jobs.extract {")
    assert file.metadata["model"] == "no-model"
    assert written["spec"] == chosen.spec


def test_a_gguf_file_holds_it_without_layer_0(swept: Path, tmp_path: Path) -> None:
    chosen = stored_directions(swept)[1]
    written = write_control_vector(swept, Chosen(tmp_path / "v.gguf", chosen.spec, architecture="llama"))
    file = read_vectors(tmp_path / "v.gguf", layers=LAYERS, hidden=HIDDEN)
    kept = read_artifact(swept, chosen.artifact)
    assert list(file.directions) == written["written"] == [1, 2, 3]
    np.testing.assert_array_equal(np.stack(list(file.directions.values())), kept["directions"][1:])
    assert list(file.residual_norms.values()) == kept["residual_norms"][1:].tolist()
    assert file.metadata["model_hint"] == "llama"


def test_the_architecture_is_read_from_a_models_folder(tmp_path: Path) -> None:
    folder = store(tmp_path / "sweep", **arrays())
    model = tmp_path / "tiny"
    model.mkdir()
    (model / "config.json").write_text('{"model_type": "qwen3"}')
    identity = open_sweep(folder).identity
    (folder / "sweep.json").write_text(
        json.dumps({**identity, "model": {"id": str(model), "revision": None, "weights": "ab" * 32}})
    )
    write_control_vector(folder, Chosen(tmp_path / "v.gguf"))
    metadata = read_vectors(tmp_path / "v.gguf").metadata
    assert metadata["model_hint"] == "qwen3"
    assert metadata["model"] == f"tiny (weights {'ab' * 8})"


def test_layers_without_a_direction_are_left_out(tmp_path: Path) -> None:
    given = arrays()
    given["directions"][1] = np.nan
    given["residual_norms"][1] = np.nan
    folder = store(tmp_path / "sweep", **given)
    assert [each.layers for each in stored_directions(folder)] == [[0, 2]]
    write_control_vector(folder, Chosen(tmp_path / "v.safetensors"))
    assert list(read_vectors(tmp_path / "v.safetensors").directions) == [0, 2]


def test_directions_without_norms_are_written_without(tmp_path: Path) -> None:
    folder = store(tmp_path / "sweep", directions=arrays()["directions"])
    write_control_vector(folder, Chosen(tmp_path / "v.safetensors"))
    assert read_vectors(tmp_path / "v.safetensors").residual_norms == {}


def test_artifacts_of_other_kinds_are_not_listed(tmp_path: Path) -> None:
    assert stored_directions(store(tmp_path / "a", log_probabilities=np.zeros((2, 3)))) == []
    assert stored_directions(store(tmp_path / "b", directions=np.zeros(3))) == []


def test_what_nobody_knows_the_parameters_of_is_exported_by_the_name_of_its_job(tmp_path: Path) -> None:
    folder = store(tmp_path / "sweep", **arrays())
    [only] = stored_directions(folder)
    assert only.params is None
    write_control_vector(folder, Chosen(tmp_path / "v.safetensors"))
    assert read_vectors(tmp_path / "v.safetensors").metadata["method"] == "jobs.extract"


def test_of_directions_that_were_lost_and_made_again_the_latest_counts(tmp_path: Path) -> None:
    folder = store(tmp_path / "sweep", **arrays())
    add(folder, "only", **arrays(1))
    write_control_vector(folder, Chosen(tmp_path / "v.safetensors"))
    written = read_vectors(tmp_path / "v.safetensors").directions
    np.testing.assert_array_equal(np.stack(list(written.values())), arrays(1)["directions"])


def refused(folder: Path, **chosen: Any) -> str:
    with pytest.raises(SpecError) as caught:
        write_control_vector(folder, Chosen(**chosen))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_what_cannot_be_exported_is_one_clear_line(swept: Path, tmp_path: Path) -> None:
    specs = [each.spec for each in stored_directions(swept)]
    message = refused(swept, out=tmp_path / "v.gguf")
    assert "choose one with --spec" in message
    assert all(spec in message for spec in specs)
    assert all(spec in refused(swept, out=tmp_path / "v.gguf", spec="nothing") for spec in specs)
    assert ".safetensors or .gguf" in refused(swept, out=tmp_path / "v.npz")
    assert "--architecture" in refused(swept, out=tmp_path / "v.gguf", spec=specs[0])
    assert "cannot be written" in refused(swept, out=tmp_path / "no" / "v.safetensors", spec=specs[0])
    empty = store(tmp_path / "empty", other=np.zeros(1))
    assert "has stored no directions" in refused(empty, out=tmp_path / "v.gguf")
    assert list(tmp_path.iterdir()) == [empty]


def test_a_file_that_is_there_is_replaced_only_by_force(tmp_path: Path) -> None:
    folder = store(tmp_path / "sweep", **arrays())
    out = tmp_path / "v.safetensors"
    out.write_bytes(b"mine")
    assert "--force" in refused(folder, out=out)
    assert out.read_bytes() == b"mine"
    write_control_vector(folder, Chosen(out, force=True))
    assert list(read_vectors(out).directions) == [0, 1, 2]


def test_stored_directions_that_changed_are_not_exported(tmp_path: Path) -> None:
    folder = store(tmp_path / "sweep", **arrays())
    [path] = (folder / "artifacts").iterdir()
    path.write_bytes(path.read_bytes()[:-4] + b"\0\0\0\0")
    with pytest.raises(StoreError, match="has changed"):
        write_control_vector(folder, Chosen(tmp_path / "v.safetensors"))


def test_the_command_lists_and_exports(tmp_path: Path) -> None:
    folder = store(tmp_path / "sweep", **arrays())
    run = CliRunner().invoke
    listed = run(app, ["vectors", str(folder)])
    assert "only" in listed.stdout
    assert "0-2" in listed.stdout
    [found] = json.loads(run(app, ["vectors", str(folder), "--json"]).stdout)["directions"]
    assert (found["spec"], found["layers"], found["hidden"]) == ("only", [0, 1, 2], 8)
    out = str(tmp_path / "v.gguf")
    done = run(app, ["vectors", str(folder), "--out", out, "--architecture", "llama"])
    assert done.exit_code == 0, done.output
    assert "no layer 0" in done.stdout
    add(folder, "other", **arrays(1))
    again = json.loads(
        run(
            app,
            [
                "vectors",
                str(folder),
                "--out",
                out,
                "--architecture",
                "x",
                "--spec",
                "ot",
                "--force",
                "--json",
            ],
        ).stdout
    )
    assert (again["spec"], again["written"], again["file"]) == ("other", [1, 2], out)

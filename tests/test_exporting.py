"""Trials of a sweep in the formats of other programs: what is written, and what is refused."""

import csv
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.numpy import load_file
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from jobs.directions.vector_files import read_vectors
from jobs.engine import loading
from jobs.engine.tuned import tuned
from jobs.errors import SpecError
from jobs.reading import behaviours
from jobs.spec import ModelRef, Spec
from orchestrator.cli import app
from orchestrator.exporting import Wanted, export_trial
from search_spaces.base import Grid, Objective
from storage.ledger import Asked, Ledger
from storage.query import open_sweep
from tests.fakes import write_sweep
from tests.models import LAYERS, tiny_replica
from tests.sweeps import drive, make_space

PROMPT = torch.tensor([[5, 6, 7, 8, 9, 3, 4]])
EXAMPLES = [
    {"prompt": "ping", "reply": " pong", "split": split, "behaviour": "a", "mark": "pong"}
    for split in ("extract", "extract", "select", "report")
]
STEERED = {"prompts": "open_prompts", "count": 1, "max_new_tokens": 2}
PROMPTS = [
    {"split": "extract", "prompt": "Tell me a story."},
    {"split": "select", "prompt": "Why is the sea salt?"},
    {"split": "report", "prompt": "Name a bird."},
]
LEARNED = {
    "source": 1,
    "target": LAYERS - 1,
    "read_on": 1,
    "max_new_tokens": 4,
    "most_nll": 99.0,
    "most_repetition": 1.0,
    "radius": 2.0,
    "optimiser": "none",
}


def letters(texts: Any, encoder: str) -> np.ndarray:
    """Embeddings by counting letters, in place of a sentence encoder."""
    return np.array([[text.count(letter) + 0.1 for letter in "abcdefgh"] for text in texts])


def swept(folder: Path, job: str, parameters: Mapping[str, Any], tuned: str = "", **fixed: Any) -> Path:
    metric = "loss" if job in ("jobs.finetune", "jobs.tune") else "nll"
    space = make_space(
        parameters, job=job, fixed=fixed, objectives=(Objective(metric=metric, direction="minimize"),)
    )
    trials = int(np.prod([len(grid.values) for grid in parameters.values()]))
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(behaviours, "embed", letters)
        drive(folder, space, trials=trials, tuned=tuned, load=lambda ref, **options: tiny_replica("llama"))
    states = {row["state"] for row in open_sweep(folder).rows("SELECT state FROM trials")}
    assert states == {"completed"}
    return folder


@pytest.fixture(autouse=True)
def model(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is loaded where a format needs the model."""
    monkeypatch.setattr(loading, "load_replica", lambda ref: tiny_replica("llama"))


@pytest.fixture(scope="module")
def steered(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Trials that add or project out, at two layers, at all tokens or the prompt's alone."""
    operations = {
        "operation": Grid(["add", "project_out"]),
        "tokens": Grid(["all", "prompt"]),
        "dose": Grid([0.5]),
    }
    fixed = {**STEERED, "layer": 1, "layers": [2], "weights": [1.0, -0.5]}
    return swept(tmp_path_factory.mktemp("steered") / "sweep", "jobs.generate", operations, **fixed)


@pytest.fixture(scope="module")
def finetuned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("finetuned")
    examples = place / "examples.jsonl"
    examples.write_text("".join(json.dumps(each) + "\n" for each in EXAMPLES))
    fixed = {"examples": str(examples), "epochs": 2, "rank": 2, "max_new_tokens": 2, "learning_rate": 0.1}
    return swept(place / "sweep", "jobs.finetune", {"batch": Grid([1, 2])}, **fixed)


def trial_of(folder: Path, condition: str) -> int:
    [row] = open_sweep(folder).rows(f"SELECT trial FROM trials WHERE {condition}")
    found: int = row["trial"]
    return found


def added(folder: Path, trial: int) -> dict[int, np.ndarray]:
    rows = open_sweep(folder).rows(f"SELECT layer, vector FROM vectors WHERE trial = {trial}")
    return {row["layer"]: np.array(row["vector"], dtype=np.float32) for row in rows}


@pytest.mark.parametrize("form", ["safetensors", "gguf"])
def test_a_control_vector_holds_what_the_trial_adds(steered: Path, tmp_path: Path, form: str) -> None:
    trial = trial_of(steered, "operation = 'add' AND tokens = 'all'")
    out = tmp_path / f"v.{form}"
    said = export_trial(steered, trial, Wanted(form, out, architecture="llama"))
    file, expected = read_vectors(out), added(steered, trial)
    assert list(file.directions) == said["layers"] == sorted(expected) == [1, 2]
    for layer, vector in expected.items():
        np.testing.assert_array_equal(file.directions[layer], vector)
    assert f"trial {trial} of {open_sweep(steered).identity['sweep']}" in file.metadata["method"]


def test_a_merged_folder_steers_by_itself(steered: Path, tmp_path: Path) -> None:
    trial = trial_of(steered, "operation = 'add' AND tokens = 'all'")
    export_trial(steered, trial, Wanted("hf", tmp_path / "merged"))
    expected = tiny_replica("llama")
    for layer, vector in added(steered, trial).items():
        expected.blocks[layer].register_forward_hook(
            lambda block, given, put_out, vector=vector: put_out + torch.tensor(vector)
        )
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=expected.model.dtype)
    with torch.no_grad():
        torch.testing.assert_close(found(PROMPT).logits, expected.model(PROMPT).logits, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("form", ["hf", "lora"])
def test_tuned_weights_are_written_both_ways(finetuned: Path, tmp_path: Path, form: str) -> None:
    trial = trial_of(finetuned, "batch = 2")
    export_trial(finetuned, trial, Wanted(form, tmp_path / "out"))
    [row] = open_sweep(finetuned).rows(
        f"SELECT path FROM artifacts JOIN trials USING (spec) WHERE trials.trial = {trial}"
    )
    replica = tiny_replica("llama")
    with tuned(replica, load_file(finetuned / row["path"])), torch.no_grad():
        expected = replica.model(PROMPT).logits
    with torch.no_grad():
        assert not torch.allclose(replica.model(PROMPT).logits, expected, atol=1e-3)
        found: Any = (
            AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=replica.model.dtype)
            if form == "hf"
            else PeftModel.from_pretrained(replica.model, str(tmp_path / "out"))
        )
        torch.testing.assert_close(found(PROMPT).logits, expected, rtol=1e-3, atol=1e-4)


@pytest.fixture(scope="module")
def tuned_in(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Whole matrices that are trained, and low-rank changes of them."""
    fixed = {"losses": "tune_in", "directions": "random", "first": 1, "depth": 2, "reads": False}
    few = {"examples_extract": 4, "examples_select": 4, "examples_report": 4, "learning_rate": 1e-2}
    return swept(
        tmp_path_factory.mktemp("tuned") / "sweep", "jobs.tune", {"rank": Grid([0, 2])}, **fixed, **few
    )


@pytest.mark.parametrize("rank", [0, 2])
def test_what_tuning_adds_is_written_as_a_model_and_as_a_delta(
    tuned_in: Path, tmp_path: Path, rank: int
) -> None:
    trial = trial_of(tuned_in, f"rank = {rank}")
    export_trial(tuned_in, trial, Wanted("hf", tmp_path / "model"))
    export_trial(tuned_in, trial, Wanted("delta", tmp_path / "delta.safetensors"))
    delta = load_file(tmp_path / "delta.safetensors")
    [row] = open_sweep(tuned_in).rows(f"SELECT path FROM artifacts WHERE trial = {trial}")
    replica = tiny_replica("llama")
    with tuned(replica, load_file(tuned_in / row["path"])), torch.no_grad():
        expected = replica.model(PROMPT).logits
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(merged(PROMPT).logits, expected, rtol=1e-9, atol=1e-9)
        assert len(delta) == 4
        assert all(np.abs(each).max() > 0 for each in delta.values())
        for name, each in delta.items():
            replica.model.get_parameter(name).add_(torch.tensor(each))
        torch.testing.assert_close(replica.model(PROMPT).logits, expected, rtol=1e-5, atol=1e-5)


def test_whole_matrices_are_no_adapter_and_vectors_no_delta(
    tuned_in: Path, steered: Path, tmp_path: Path
) -> None:
    whole, out = trial_of(tuned_in, "rank = 0"), tmp_path / "delta.safetensors"
    assert "take hf, or delta" in refused(tuned_in, whole, form="lora", out=tmp_path / "lora")
    adds = trial_of(steered, "operation = 'add' AND tokens = 'all'")
    assert "adds vectors: take hf, or gguf" in refused(steered, adds, form="delta", out=out)
    assert "to a .safetensors file" in refused(tuned_in, whole, form="delta", out=tmp_path / "delta")


def test_a_trial_on_tuned_weights_is_merged_with_them(finetuned: Path, tmp_path: Path) -> None:
    batch = trial_of(finetuned, "batch = 2")
    [row] = open_sweep(finetuned).rows(f"SELECT params FROM trials WHERE trial = {batch}")
    fixed = open_sweep(finetuned).identity["fixed"]
    tuned_by = f"jobs.finetune{json.dumps({**fixed, **json.loads(row['params'])})}"
    both = swept(tmp_path / "both", "jobs.generate", {"dose": Grid([0.5])}, tuned_by, **STEERED, layer=1)
    export_trial(both, 0, Wanted("hf", tmp_path / "merged"))
    export_trial(finetuned, batch, Wanted("hf", tmp_path / "tuned"))
    dtype = tiny_replica("llama").model.dtype
    found, expected = (
        AutoModelForCausalLM.from_pretrained(tmp_path / name, dtype=dtype) for name in ("merged", "tuned")
    )
    [(layer, vector)] = added(both, 0).items()
    expected.model.layers[layer].register_forward_hook(
        lambda block, given, put_out: put_out + torch.tensor(vector)
    )
    with torch.no_grad():
        torch.testing.assert_close(found(PROMPT).logits, expected(PROMPT).logits, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(("job", "count"), [("jobs.melbo", "vectors"), ("jobs.adapters", "adapters")])
def test_what_was_learned_together_is_taken_out_by_its_number(tmp_path: Path, job: str, count: str) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps(row) + "\n" for row in PROMPTS))
    size = {"radius_in": "stream"} if job == "jobs.melbo" else {"rank": 2}
    fixed = {**LEARNED, **size, "prompts": str(prompts)}
    folder = swept(tmp_path / "sweep", job, {count: Grid([3])}, **fixed)
    form, name = ("safetensors", "v.safetensors") if job == "jobs.melbo" else ("lora", "lora")
    assert "no --vector" in refused(folder, 0, form=form, out=tmp_path / name)
    assert "give --vector 0 to 2" in refused(folder, 0, form=form, out=tmp_path / name, vector=3)
    export_trial(folder, 0, Wanted(form, tmp_path / name, vector=1))
    [row] = open_sweep(folder).rows("SELECT path FROM artifacts JOIN trials USING (spec)")
    kept = load_file(folder / row["path"])
    if job == "jobs.melbo":
        found = read_vectors(tmp_path / name).directions
        assert list(found) == [1]
        np.testing.assert_array_equal(found[1], kept["vectors"][1])
        return
    tensors = load_file(tmp_path / name / "adapter_model.safetensors")
    module = "base_model.model.model.layers.1.mlp.down_proj"
    assert sorted(tensors) == [f"{module}.lora_{side}.weight" for side in "AB"]
    found_DH = tensors[f"{module}.lora_B.weight"] @ tensors[f"{module}.lora_A.weight"]
    np.testing.assert_allclose(found_DH, 2.0 * kept["b"][1] @ kept["a"][1].T, rtol=1e-5)


def test_tables_of_a_trial_are_csv_files(steered: Path, tmp_path: Path) -> None:
    trial = trial_of(steered, "operation = 'add' AND tokens = 'prompt'")
    said = export_trial(steered, trial, Wanted("csv", tmp_path / "tables"))
    assert said["tables"] == ["completions", "items", "metrics"]
    for table in said["tables"]:
        with (tmp_path / "tables" / f"{table}.csv").open(newline="") as file:
            found = list(csv.DictReader(file))
        expected = open_sweep(steered).rows(f"SELECT * FROM {table} WHERE trial = {trial} ORDER BY ALL")
        assert [list(row) for row in found] == [list(row) for row in expected]
        texts = [
            {name: "" if value is None else str(value) for name, value in row.items()} for row in expected
        ]
        assert found == texts


def refused(folder: Path, trial: int, **wanted: Any) -> str:
    with pytest.raises(SpecError) as caught:
        export_trial(folder, trial, Wanted(**wanted))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_what_a_format_cannot_say_is_refused(
    steered: Path, finetuned: Path, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    out = tmp_path / "v.gguf"
    prompt = trial_of(steered, "operation = 'add' AND tokens = 'prompt'")
    both = trial_of(steered, "operation = 'project_out' AND tokens = 'prompt'")
    adds = trial_of(steered, "operation = 'add' AND tokens = 'all'")
    assert '{"tokens":"prompt"}' in refused(steered, prompt, form="gguf", out=out)
    assert '{"operation":"project_out","tokens":"prompt"}' in refused(steered, both, form="gguf", out=out)
    assert "adds no vectors" in refused(finetuned, 0, form="gguf", out=out)
    place = tmp_path_factory.mktemp("lowest") / "sweep"
    lowest = swept(place, "jobs.generate", {"dose": Grid([0.5])}, **STEERED, layer=0)
    assert "layer 0, for which a GGUF control vector has no place" in refused(lowest, 0, form="gguf", out=out)
    assert "take hf, or gguf" in refused(steered, adds, form="lora", out=tmp_path / "lora")
    assert "--vector 1: trial" in refused(steered, adds, form="gguf", out=out, vector=1)
    assert "--vector 7" in refused(finetuned, 0, form="lora", out=tmp_path / "lora", vector=7)
    assert "--vector 2: csv" in refused(steered, adds, form="csv", out=tmp_path / "csv", vector=2)
    assert "there is no trial 99" in refused(steered, 99, form="csv", out=tmp_path / "csv")
    assert list(tmp_path.iterdir()) == []


def test_a_trial_without_a_result_is_no_tables(tmp_path: Path) -> None:
    folder = tmp_path / "sweep"
    write_sweep(folder, [], objectives={"nll": "minimize"})
    spec = Spec(job="tests.fake_job", code="c", params={}, model=ModelRef(id="m"), data={}, seed=0)
    Ledger(folder).asked([Asked(trial=0, spec=spec, params={}, seen=0, group="")])
    assert "no result yet" in refused(folder, 0, form="csv", out=tmp_path / "csv")
    assert not (tmp_path / "csv").exists()


def test_what_is_there_is_not_replaced(steered: Path, tmp_path: Path) -> None:
    out, folder = tmp_path / "v.safetensors", tmp_path / "mine"
    out.write_text("mine")
    folder.mkdir()
    trial = trial_of(steered, "operation = 'add' AND tokens = 'all'")
    assert "or --force" in refused(steered, trial, form="safetensors", out=out)
    assert "--force" not in refused(steered, trial, form="csv", out=folder, force=True)
    assert "to a .gguf file" in refused(steered, trial, form="gguf", out=out)
    assert out.read_text() == "mine"
    export_trial(steered, trial, Wanted("safetensors", out, force=True))
    assert list(read_vectors(out).directions) == [1, 2]


def test_the_command_says_what_it_has_written(steered: Path, tmp_path: Path) -> None:
    trial = trial_of(steered, "operation = 'add' AND tokens = 'all'")
    out = tmp_path / "v.safetensors"
    done = CliRunner().invoke(app, ["export", str(steered), str(trial), "--out", str(out)])
    assert done.exit_code == 0, done.output
    assert done.output.split(": ")[1:] == [f"trial {trial} as safetensors, layer 1, 2", "add it times 1\n"]
    again = ["export", str(steered), str(trial), "--out", str(out), "--force", "--json"]
    assert json.loads(CliRunner().invoke(app, again).output)["layers"] == [1, 2]

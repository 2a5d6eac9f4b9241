"""A sweep of extractions by the real command: objectives, datasets beside the space, and reasons."""

import json
from pathlib import Path

import pytest

from storage.query import open_sweep
from tests.command import refused, steersweep
from tests.models import save_tiny

pytestmark = pytest.mark.ray

SPACE = """
from search_spaces.base import Grid, Objective, Space

SPACE = Space(
    description="Which extraction tells the sides apart?",
    job="jobs.extract",
    parameters={"pairs": Grid(["mine/pairs.jsonl", "mine/single.jsonl"]), "component": Grid([0, 99])},
    fixed={"method": "pca"},
    objectives=[Objective(metric="held_out_auc", direction="maximize")],
    sampler="grid",
    retention="front",
)
"""
PAIRS = [{"positive": f"A kind word {n}.", "negative": f"A grim word {n}?"} for n in range(4)]


@pytest.fixture(scope="module")
def spaces(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a space, and its datasets in a folder beside it."""
    folder = tmp_path_factory.mktemp("spaces")
    save_tiny(folder / "model")
    (folder / "space.py").write_text(SPACE)
    (folder / "mine").mkdir()
    for name, rows in (("pairs", PAIRS), ("single", PAIRS[:1])):
        (folder / "mine" / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


def test_extractions_are_chosen_on_the_split_extract_and_the_end_says_why_others_are_not(
    spaces: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    done = steersweep("run", spaces / "space.py", "--out", out, "--set", f"model={spaces / 'model'}")
    assert done.returncode == 1, done.stderr
    assert "held_out_auc (extract)" in done.stdout
    assert "1 completed, 1 infeasible, 2 failed of 4 trials" in done.stdout
    lines = done.stdout.splitlines()
    assert "infeasible, 1 trial: not all of the objectives ['held_out_auc'] are defined" in lines
    assert len([line for line in lines if line.startswith("failed, 1 trial: ")]) == 2
    page = (out / "report" / "index.html").read_text()
    assert "chosen on the split extract" in page
    (out / "report" / "index.html").unlink()
    again = steersweep("resume", out, "--json", cwd=tmp_path)
    assert again.returncode == 1, again.stderr
    found = json.loads(again.stdout)
    assert (found["completed"], [row["trials"] for row in found["reasons"]]) == (1, [1, 1, 1])
    [best] = found["pareto"]
    assert (best["trial"], best["split"]) == (0, "extract")
    made = open_sweep(out).rows("SELECT trial, path FROM artifacts ORDER BY trial")
    assert len(made) > 1
    assert [row["trial"] for row in made if (out / row["path"]).is_file()] == [0]
    assert open_sweep(out).rows("SELECT detail FROM events WHERE kind = 'collected'")
    assert best["params"]["pairs"] == str(spaces / "mine" / "pairs.jsonl")
    assert 0 <= best["objectives"]["held_out_auc"] <= 1


def test_a_dataset_that_is_nowhere_is_one_line_with_both_folders(spaces: Path, tmp_path: Path) -> None:
    (spaces / "wrong.py").write_text(SPACE.replace("mine/single.jsonl", "mine/none.jsonl"))
    line = refused("run", spaces / "wrong.py", "--out", tmp_path / "out")
    assert f"no dataset 'mine/none.jsonl': there is no such file in {spaces} or in " in line
    assert not (tmp_path / "out").exists()

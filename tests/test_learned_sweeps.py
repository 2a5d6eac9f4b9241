"""Sweeps of learned vectors: what can be listed, taken out and read of them afterwards."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jobs.directions.vector_files import read_vectors
from jobs.errors import SpecError
from jobs.reading import behaviours
from orchestrator.control_vectors import Chosen, write_control_vector
from orchestrator.lineage import stored_specs
from orchestrator.report.comparisons import compare_replies
from orchestrator.report.findings import axes, others, read_findings
from orchestrator.report.radius_scans import read_scans
from orchestrator.report.writing import write_report
from orchestrator.stored_vectors import stored_sets
from search_spaces.base import Grid, Objective
from storage.artifacts import read_artifact
from storage.ledger import read_asked
from storage.query import open_sweep
from tests.models import HIDDEN, LAYERS, tiny_replica
from tests.sweeps import drive, make_space
from tests.test_control_vectors import arrays, store

PROMPTS = [
    {"split": "extract", "prompt": "Tell me a story."},
    {"split": "select", "prompt": "Why is the sea salt?"},
    {"split": "report", "prompt": "Name a bird."},
]
SET = {
    "source": 0,
    "target": LAYERS - 2,
    "read_on": 1,
    "max_new_tokens": 4,
    "most_nll": 99.0,
    "most_repetition": 1.0,
    "vectors": 3,
    "radius_in": "stream",
}
RADII = [0.5, 2.0, 8.0]


def letters(texts: Any, encoder: str) -> np.ndarray:
    """Embeddings by counting letters, in place of a sentence encoder."""
    return np.array([[text.count(letter) + 0.1 for letter in "abcdefgh"] for text in texts])


def swept(folder: Path, job: str, parameters: dict[str, Any], metric: str, **fixed: Any) -> Path:
    objective = Objective(metric=metric, direction="maximize")
    space = make_space(parameters, job=job, fixed=fixed, objectives=(objective,))
    trials = int(np.prod([len(grid.values) for grid in parameters.values()]))
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(behaviours, "embed", letters)
        drive(folder, space, trials=trials, load=lambda ref, **options: tiny_replica("llama"))
    return folder


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("data") / "prompts.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in PROMPTS))
    return str(path)


@pytest.fixture(scope="module")
def learned(tmp_path_factory: pytest.TempPathFactory, prompts: str) -> Path:
    """Learned and random vectors at three norms."""
    grids = {"radius": Grid(RADII), "optimiser": Grid(["fixed_point", "none"])}
    folder = tmp_path_factory.mktemp("learned")
    return swept(folder, "jobs.melbo", grids, "diversity", prompts=prompts, **SET)


@pytest.fixture(scope="module")
def scanned(tmp_path_factory: pytest.TempPathFactory, prompts: str) -> Path:
    """One set at three norms."""
    use = f"jobs.melbo{json.dumps({**SET, 'prompts': prompts})}"
    folder = tmp_path_factory.mktemp("scanned")
    return swept(folder, "jobs.radius_scan", {"learned": Grid([use])}, "best_radius", radii=RADII)


class TestStoredSets:
    def test_every_set_is_listed_with_its_norm_and_its_trials(self, learned: Path) -> None:
        found = stored_sets(learned)
        assert sorted(trial for each in found for trial in each.trials) == list(range(6))
        trials = {row["trial"]: row for row in open_sweep(learned).rows("SELECT * FROM trials")}
        for each in found:
            [trial] = each.trials
            assert each.params is not None
            assert each.params["radius"] == trials[trial]["radius"] == pytest.approx(each.norm, rel=1e-4)
            assert each.params["optimiser"] == trials[trial]["optimiser"]
            assert (each.layer, each.vectors, each.job) == (0, 3, "jobs.melbo")

    def test_what_was_required_is_listed_without_a_trial(self, scanned: Path) -> None:
        found = stored_sets(scanned)
        assert sorted(each.params["radius"] for each in found if each.params) == sorted(RADII * 2)
        assert all(not each.trials for each in found)

    def test_a_vector_is_written_as_it_is_stored(self, learned: Path, tmp_path: Path) -> None:
        source = stored_sets(learned)[0]
        out = tmp_path / "vector.safetensors"
        written = write_control_vector(learned, Chosen(out, source.spec, vector=2))
        file = read_vectors(out, layers=LAYERS, hidden=HIDDEN)
        stored = read_artifact(learned, source.artifact)["vectors"]
        assert list(file.directions) == written["written"] == [0]
        np.testing.assert_array_equal(file.directions[0], stored[2])
        assert file.metadata["method"].endswith("vector 2")
        assert written["multiplier"] == pytest.approx(np.linalg.norm(stored[2]))

    def test_directions_have_no_vectors_by_number(self, tmp_path: Path) -> None:
        kept = store(tmp_path / "sweep", **arrays())
        with pytest.raises(SpecError, match="one direction a layer"):
            write_control_vector(kept, Chosen(tmp_path / "v.safetensors", vector=0))

    @pytest.mark.parametrize(("vector", "said"), [(None, "no --vector"), (3, "--vector 3"), (-1, "0 to 2")])
    def test_a_vector_that_is_not_there_is_refused(
        self, learned: Path, tmp_path: Path, vector: int | None, said: str
    ) -> None:
        with pytest.raises(SpecError, match=said):
            write_control_vector(
                learned, Chosen(tmp_path / "v.safetensors", stored_sets(learned)[0].spec, vector=vector)
            )
        assert not list(tmp_path.iterdir())


class TestReport:
    def test_lines_are_told_apart_by_words_and_stand_over_the_norm(self, learned: Path) -> None:
        found = read_findings(open_sweep(learned))
        assert axes(found) == ("radius", "optimiser")
        assert others(found) == []
        page = write_report(learned).read_text()
        assert "diversity by optimiser and radius" in page
        assert "a colour for each optimiser" in page
        assert "Curves of diversity, diversity_all, repetition over radius" in page

    def test_random_vectors_of_the_trials_own_norm_stand_beside_it_by_their_name(self, learned: Path) -> None:
        sweep = open_sweep(learned)
        found = read_findings(sweep)
        assert (found.control, found.unsteered) == ("random vectors", {})
        shown = compare_replies(sweep, found)
        specs = stored_specs(sweep)
        radii = {asked.spec.id: asked.params["radius"] for asked in read_asked(learned)}
        tried = 0
        for each in shown:
            if each.trial["params"]["optimiser"] == "none":
                continue
            for reply, control, unsteered in each.replies:
                assert control is not None
                assert unsteered is not None
                assert (unsteered["prompt"], unsteered["split"]) == (reply["prompt"], reply["split"])
                assert specs[unsteered["spec"]].params["temperature"] == 0
                assert reply["variant"] == control["variant"] == f"vector {reply['item'] % 3}"
                spec = specs[control["spec"]]
                assert (spec.params["optimiser"], spec.params["radius"]) == (
                    "none",
                    each.trial["params"]["radius"],
                )
                assert radii[control["spec"]] == each.trial["params"]["radius"]
                assert (control["item"], control["prompt"]) == (reply["item"], reply["prompt"])
                tried += 1
        assert tried
        page = write_report(learned).read_text()
        assert "under random vectors" in page
        assert "of the unsteered model" not in page

    def test_a_scan_is_drawn_with_its_best_norm(self, scanned: Path) -> None:
        page = write_report(scanned).read_text()
        [trial] = read_findings(open_sweep(scanned)).scored.values()
        best = trial["chosen"]["best_radius"]
        assert best in RADII
        assert f"Marked: the best norm {best:g}" in page
        assert "Best of 3 norms, in stream units" in page
        assert ("the largest norm that was tried" in page) == (trial["chosen"]["cusp"] == RADII[-1])
        [scan] = read_scans(open_sweep(scanned), read_findings(open_sweep(scanned)))
        specs = stored_specs(open_sweep(scanned))
        assert len(scan.replies) == 9
        for reply, control, _ in scan.replies:
            assert control is not None
            found = [specs[each["spec"]].params for each in (reply, control)]
            assert [each["radius"] for each in found] == [best, best]
            assert [each["optimiser"] for each in found] == ["fixed_point", "none"]
        assert "Replies at the best norm" in page
        assert (scanned / "report" / "radii-0.png").is_file()

    def test_a_sweep_of_another_job_has_no_norms(self, learned: Path) -> None:
        assert 'id="norms"' not in write_report(learned).read_text()

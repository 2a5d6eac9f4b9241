"""Scores added to stored completions: what they say, and that none is lost or doubled, whoever dies."""

import hashlib
import json
import math
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from jobs.errors import SpecError
from jobs.resolve import data_hash
from jobs.scoring import scorers as registry
from jobs.scoring.scorers import Use, apply_scorers
from jobs.spec import ModelRef, Spec
from orchestrator import rescoring
from orchestrator.cli import app
from orchestrator.lineage import spec_row
from orchestrator.rescoring import rescore
from search_spaces.base import Grid, Objective
from storage.durable import StoreError
from storage.lock import driving
from storage.manifest import StoredResult
from storage.query import open_sweep
from storage.scores import scoring
from storage.store import Part, Store
from tests.fakes import write_sweep
from tests.models import tiny_replica
from tests.sweeps import drive, make_space

ROOT = Path(__file__).parents[1]
PROMPTS = (
    {"prompt": "Pick one.", "answer": "A"},
    {"turns": ["Pick again.", "And now?"], "answer": "B", "split": "report"},
)
TEXTS = ("I can't help with that.", "The answer is A.", "B, in the sun")


def write_prompts(path: Path, prompts: Sequence[Mapping[str, Any]] = PROMPTS) -> str:
    path.write_text("\n".join(map(json.dumps, prompts)))
    return str(path)


def add_result(folder: Path, number: int, *, prompts: str, samples: int = 1) -> None:
    """Store one trial of jobs.generate with its completions, as a driver and a worker would."""
    params = {"prompts": prompts, "count": 0, "samples": samples, "layer": number}
    data = {"prompts": data_hash(prompts)}
    spec = Spec(job="jobs.generate", code="c", params=params, model=ModelRef(id="m"), data=data, seed=0)
    said = [(0, "select", "Pick one."), (2, "report", "Pick again."), (3, "report", "And now?")]
    completions = [
        {"spec": spec.id, "split": split, "item": item * samples + sample, "prompt": prompt, "text": text}
        for (item, split, prompt), text in zip(said, TEXTS, strict=True)
        for sample in range(samples)
    ]
    trial = {"trial": number, "spec": spec.id, "state": "completed", "params": "{}"}
    Store(folder).commit(
        [Part((), (StoredResult(spec.id, "completed", None),))],
        trials=[trial],
        completions=completions,
        specs=[spec_row(spec)],
    )


def make_folder(folder: Path, *, results: int = 2, samples: int = 1) -> Path:
    write_sweep(folder, [], objectives={"total": "maximize"})
    prompts = write_prompts(folder / "prompts.jsonl")
    for number in range(results):
        add_result(folder, number, prompts=prompts, samples=samples)
    return folder


def scores(folder: Path) -> list[dict[str, Any]]:
    return open_sweep(folder).rows("SELECT * FROM scores ORDER BY ALL")


def keys(folder: Path) -> list[tuple[Any, ...]]:
    names = ("spec", "split", "item", "scorer", "version", "options")
    return [tuple(row[name] for name in names) for row in scores(folder)]


def drivers_files(folder: Path) -> dict[str, str]:
    """Content of all that is not a score's."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and "scores" not in path.relative_to(folder).parts
    }


class TestScores:
    def test_they_are_stored_with_the_scorers_name_version_and_options(self, tmp_path: Path) -> None:
        folder = make_folder(tmp_path, results=1)
        rescore(folder, ['contains{"sought": "sun"}', "refusal"])
        rows = open_sweep(folder).rows(
            "SELECT trial, split, item, scorer, version, options, value, parsed FROM scores "
            "ORDER BY scorer, item"
        )
        options = '{"ignore_case":false,"sought":"sun"}'
        head = {"trial": 0, "version": 1, "parsed": 1}
        assert rows == [
            {**head, "split": split, "item": item, "scorer": scorer, "options": said, "value": value}
            for scorer, said, values in (("contains", options, (0, 0, 1)), ("refusal", "{}", (1, 0, 0)))
            for (split, item), value in zip(
                (("select", 0), ("report", 2), ("report", 3)), values, strict=True
            )
        ]

    @pytest.mark.parametrize("samples", [1, 3])
    def test_answers_come_from_the_row_of_the_dataset_that_was_completed(
        self, tmp_path: Path, samples: int
    ) -> None:
        folder = make_folder(tmp_path, results=1, samples=samples)
        found = rescore(folder, ["choice"])
        assert [row["value"] for row in scores(folder)] == [0] * samples + [1] * samples + [None] * samples
        trials = {row["split"]: row for row in found["trials"]}
        assert trials["report"]["mean"] == 0.5
        assert (trials["select"]["mean"], trials["select"]["unparsed"]) == (None, samples)

    def test_they_are_those_of_the_pure_functions(self, tmp_path: Path) -> None:
        folder = make_folder(tmp_path)
        rescore(folder, ["refusal", 'regex{"pattern": "B"}'])
        for use in (Use("refusal"), Use("regex", {"pattern": "B"})):
            expected = [row["value"] for row in apply_scorers([{"text": text} for text in TEXTS], [use])]
            found = open_sweep(folder).rows(
                f"SELECT value FROM scores WHERE scorer = '{use.scorer}' AND trial = 1 ORDER BY item"
            )
            assert [row["value"] for row in found] == expected


class TestAgain:
    def test_scoring_again_adds_nothing(self, tmp_path: Path) -> None:
        folder = make_folder(tmp_path)
        first = rescore(folder, ["refusal", "choice"])
        before = keys(folder), sorted(folder.rglob("*"))
        second = rescore(folder, ["refusal", "choice"])
        assert (first["added"], first["unchanged"]) == (12, 0)
        assert (second["added"], second["unchanged"]) == (0, 4)
        assert second["trials"] == first["trials"]
        assert (keys(folder), sorted(folder.rglob("*"))) == before

    def test_options_in_another_order_or_left_at_their_default_are_the_same(self, tmp_path: Path) -> None:
        folder = make_folder(tmp_path)
        rescore(folder, ['contains{"sought": "a"}'])
        again = rescore(folder, ['contains:{"ignore_case": false, "sought": "a"}'])
        assert again["added"] == 0

    def test_another_version_stands_beside_the_old_one(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        folder = make_folder(tmp_path)
        rescore(folder, ["refusal"])
        newer = replace(registry.SCORERS["refusal"], version=2)
        monkeypatch.setattr(registry, "SCORERS", {**registry.SCORERS, "refusal": newer})
        assert rescore(folder, ["refusal"])["added"] == 6
        assert sorted({row["version"] for row in scores(folder)}) == [1, 2]

    @settings(max_examples=12, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(
        calls=st.lists(
            st.lists(
                st.sampled_from(["refusal", "choice", 'contains{"sought": "a"}', 'contains{"sought": "b"}']),
                unique=True,
                min_size=1,
            ),
            max_size=4,
        )
    )
    def test_however_often_and_in_whatever_order_each_score_is_there_once(
        self, tmp_path_factory: pytest.TempPathFactory, calls: list[list[str]]
    ) -> None:
        folder = make_folder(tmp_path_factory.mktemp("again"), results=2)
        before = drivers_files(folder)
        for call in calls:
            rescore(folder, call)
        found = keys(folder)
        assert len(found) == len(set(found)) == 6 * len({use for call in calls for use in call})
        assert drivers_files(folder) == before


class TestBesideADriver:
    def test_a_running_sweep_is_scored_and_later_only_what_is_new(self, tmp_path: Path) -> None:
        folder = make_folder(tmp_path, results=1)
        with driving(folder):
            assert rescore(folder, ["refusal"])["added"] == 3
            add_result(folder, 1, prompts=str(folder / "prompts.jsonl"))
            found = rescore(folder, ["refusal"])
        assert (found["added"], found["unchanged"]) == (3, 1)
        assert len(keys(folder)) == len(set(keys(folder))) == 6

    def test_a_driver_that_opened_the_folder_before_goes_on_after(self, tmp_path: Path) -> None:
        folder = make_folder(tmp_path, results=1)
        store = Store(folder)
        rescore(folder, ["refusal"])
        store.commit([], attempts=[{"attempt": "a"}])
        assert len(open_sweep(folder).rows("SELECT * FROM attempts")) == 1
        assert len(scores(folder)) == 3

    def test_two_at_once_are_refused(self, tmp_path: Path) -> None:
        folder = make_folder(tmp_path)
        with scoring(folder), pytest.raises(SpecError, match="scores is being run by"):
            rescore(folder, ["refusal"])
        assert rescore(folder, ["refusal"])["added"] == 6


class TestKilled:
    SCRIPT = (
        "import os, signal, sys\n"
        "from pathlib import Path\n"
        "from orchestrator import rescoring\n"
        "rescoring._ROWS_A_COMMIT = 1\n"
        "left, sync = int(sys.argv[2]), os.fsync\n"
        "def fsync(file):\n"
        "    global left\n"
        "    left -= 1\n"
        "    if left == 0:\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "    sync(file)\n"
        "os.fsync = fsync\n"
        "rescoring.rescore(Path(sys.argv[1]), ['refusal', 'choice'])\n"
    )

    @pytest.mark.parametrize("write", [1, 2, 3, 4])
    def test_whenever_it_dies_whole_results_are_scored_and_the_next_call_adds_the_rest(
        self, tmp_path: Path, write: int
    ) -> None:
        folder = make_folder(tmp_path)
        before = drivers_files(folder)
        command = [sys.executable, "-c", self.SCRIPT, str(folder), str(write)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        assert done.returncode == -signal.SIGKILL, done.stderr
        assert len(scores(folder)) == (6 if write > 2 else 0)
        found = rescore(folder, ["refusal", "choice"])
        assert found["added"] == (6 if write > 2 else 12)
        assert len(keys(folder)) == len(set(keys(folder))) == 12
        assert drivers_files(folder) == before
        assert not [path for path in folder.rglob(".*") if path.is_file()]

    def test_a_full_disk_leaves_nothing_half_written(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        folder = make_folder(tmp_path)

        def refuse(file: int) -> None:
            raise OSError(28, "No space left on device")

        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", refuse)
            with pytest.raises(StoreError, match="No space left"):
                rescore(folder, ["refusal"])
        assert scores(folder) == []
        assert rescore(folder, ["refusal"])["added"] == 6

    def test_nothing_scored_twice_is_taken(self, tmp_path: Path) -> None:
        folder = make_folder(tmp_path)
        rescore(folder, ["refusal"])
        row = {"spec": keys(folder)[0][0], "scorer": "refusal", "version": 1, "options": "{}"}
        with scoring(folder) as store, pytest.raises(ValueError, match="was scored before"):
            store.add([row])


class TestRefusals:
    def refused(self, folder: Path, scorers: Sequence[str]) -> str:
        with pytest.raises(SpecError) as caught:
            rescore(folder, scorers)
        assert scores(folder) == []
        assert "\n" not in str(caught.value)
        return str(caught.value)

    def test_an_unknown_scorer_names_those_that_there_are(self, tmp_path: Path) -> None:
        folder = make_folder(tmp_path)
        message = self.refused(folder, ["refusal", "sentiment"])
        assert "no scorer 'sentiment'" in message
        assert "'refusal'" in message
        assert "no option ['phrase']" in self.refused(folder, ['refusal{"phrase": "x"}'])
        assert "not JSON" in self.refused(folder, ["contains{sun}"])

    def test_a_missing_column_names_the_scorers_that_need_none(self, tmp_path: Path) -> None:
        message = self.refused(make_folder(tmp_path), ["refusal", "similarity_mean"])
        assert "exemplars" in message
        assert "'regex'" in message

    def test_a_dataset_that_has_changed_or_gone_is_refused(self, tmp_path: Path) -> None:
        folder = make_folder(tmp_path)
        other = [{"prompt": "Pick one.", "answer": "B"}, PROMPTS[1]]
        write_prompts(folder / "prompts.jsonl", other)
        assert "has changed since" in self.refused(folder, ["choice"])
        (folder / "prompts.jsonl").unlink()
        assert "no dataset" in self.refused(folder, ["choice"])
        assert rescore(folder, ["refusal"])["added"] == 6

    def test_completions_of_unknown_origin_are_scored_by_their_text_alone(self, tmp_path: Path) -> None:
        folder = make_folder(tmp_path, results=0)
        row = {"spec": "base", "split": "select", "item": 0, "prompt": "?", "text": "a"}
        Store(folder).commit([], completions=[row])
        assert "without columns such as 'answer'" in self.refused(folder, ["choice"])
        found = rescore(folder, ["refusal"])
        assert [(each["trial"], each["mean"]) for each in found["trials"]] == [(None, 0)]

    def test_a_folder_without_completions_says_so(self, tmp_path: Path) -> None:
        assert "no completions" in self.refused(make_folder(tmp_path, results=0), ["refusal"])


@pytest.fixture(scope="module")
def swept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sweep of jobs.generate by real workers on a tiny model; two of its trials share a result."""
    folder = tmp_path_factory.mktemp("swept")
    fixed = {
        "prompts": write_prompts(folder.with_suffix(".jsonl")),
        "max_new_tokens": 3,
        "scorers": ('contains{"sought": "e"}',),
    }
    space = make_space(
        {"layer": Grid([0, 2]), "dose": Grid([0.0, 0.5])},
        job="jobs.generate",
        fixed=fixed,
        objectives=(Objective(metric="contains", direction="maximize"),),
    )
    drive(folder, space, trials=4, load=lambda ref, **options: tiny_replica("llama"))
    return folder


def test_a_scorer_that_the_sweep_used_gives_the_same_values_again(swept: Path) -> None:
    rescore(swept, ['contains{"sought": "e"}'])
    compared = open_sweep(swept).rows(
        "SELECT items.value AS then, scores.value AS now FROM items JOIN scores USING (trial, split, item) "
        "WHERE items.name = 'contains' AND scores.scorer = 'contains'"
    )
    assert len(compared) == 4 * 3
    assert all(row["then"] == row["now"] for row in compared)


def test_the_command_prints_a_mean_for_each_trial_and_says_when_there_was_nothing_to_do(swept: Path) -> None:
    run = CliRunner().invoke
    arguments = ["score", str(swept), "--scorer", "choice", "--scorer", 'regex:{"pattern": "[aeiou]"}']
    first = run(app, arguments)
    assert first.exit_code == 0, first.output
    assert "scores added for 3 results" in first.stdout
    assert 'regex version 1 {"ignore_case":false' in first.stdout
    again = run(app, arguments)
    assert "nothing to do" in again.stdout
    found = json.loads(run(app, [*arguments, "--json"]).stdout)
    assert {(row["trial"], row["split"], row["scorer"]) for row in found["trials"]} == {
        (trial, split, scorer)
        for trial in range(4)
        for split in ("select", "report")
        for scorer in ("choice", "regex")
    }
    means = {row["scorer"]: row["mean"] for row in found["trials"] if row["trial"] == 0}
    assert all(mean is None or math.isfinite(mean) for mean in means.values())
    assert rescoring.rescore(swept, ["choice"])["added"] == 0


def test_a_table_of_several_variants_names_each_by_the_options_in_which_it_differs(swept: Path) -> None:
    variants = [
        'contains{"sought": "e", "ignore_case": true}',
        'contains{"sought": "q", "ignore_case": true}',
    ]
    arguments = ["score", str(swept), "--scorer", "choice"]
    for variant in variants:
        arguments += ["--scorer", variant]
    shown = CliRunner().invoke(app, arguments).stdout
    rows = [[cell.strip() for cell in line.split("│")] for line in shown.splitlines() if line.startswith("│")]
    cells = {cell for row in rows for cell in row if cell.startswith(("choice", "contains"))}
    assert cells == {"choice", 'contains{"sought": "e"}', 'contains{"sought": "q"}'}
    names = list(open_sweep(swept).identity["parameters"])
    params = {
        str(row["trial"]): [row[name] for name in names] for row in open_sweep(swept).trials().to_pylist()
    }
    for row in rows:
        assert row[2 : 2 + len(names)] == [
            f"{value:g}" if isinstance(value, float) else str(value) for value in params[row[1]]
        ]
    found = json.loads(CliRunner().invoke(app, [*arguments, "--json"]).stdout)
    assert [used["name"] for used in found["scorers"]] == ["choice", "contains", "contains_2"]


def test_the_list_of_scorers_has_all_of_them_with_every_option_and_needs_no_sweep() -> None:
    shown = CliRunner().invoke(app, ["score", "--list"])
    assert shown.exit_code == 0, shown.output
    cells = [[cell.strip() for cell in line.split("│")[1:-1]] for line in shown.stdout.splitlines()]
    about = {row[0]: row[2] for row in cells if len(row) == 4}
    assert about == {scorer.name: scorer.metric.meaning for scorer in registry.SCORERS.values()}
    options = {(row[0], row[1]): row[2:] for row in cells if len(row) == 5}
    assert options["contains", "sought"] == ["str", "required", "The text that is looked for."]
    assert options["choice", "labels"][:2] == ["list of str", "('A', 'B')"]
    assert all(row[-1] for row in options.values())
    listed = json.loads(CliRunner().invoke(app, ["score", "--list", "--json"]).stdout)["scorers"]
    assert {(row["scorer"], option["name"]) for row in listed for option in row["options"]} == set(options)


@pytest.mark.parametrize("given", [(), ("somewhere",), ("--scorer", "refusal")])
def test_a_call_without_a_folder_or_a_scorer_names_the_list(given: Sequence[str]) -> None:
    outcome = CliRunner().invoke(app, ["score", *given])
    assert isinstance(outcome.exception, SpecError)
    assert "score --list" in str(outcome.exception)

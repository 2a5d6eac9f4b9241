"""Labels by people: what they are shown, what is kept, and how agreement is counted."""

import csv
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sklearn.metrics import cohen_kappa_score
from typer.testing import CliRunner

from jobs.errors import SpecError
from orchestrator.cli import app
from orchestrator.labelling import export_texts, import_labels
from storage.query import open_sweep
from storage.store import Store
from tests.fakes import StoredTrial, write_sweep

TEXTS = [f"Text number {number}" for number in range(10)] + ["=HYPERLINK(1)", "-- no", "Text number 0"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two trials that say thirteen texts each, one of them twice, with the job's own score of every text."""
    place = tmp_path / "sweep"
    trials = [StoredTrial({"x": number}, {"select": {"total": 1.0}}) for number in range(2)]
    write_sweep(place, trials, objectives={"total": "maximize"}, parameters={"x": "BIGINT"})
    rows = [
        {"spec": f"spec{trial}", "split": "select", "item": item, "prompt": "Say it.", "text": text}
        for trial in range(2)
        for item, text in enumerate(TEXTS)
    ]
    items = [
        {**{key: row[key] for key in ("spec", "split", "item", "prompt")}, "name": "odd", "value": number % 2}
        for number, row in enumerate(rows)
    ]
    measured = [{**row, "name": "length", "value": len(row["prompt"]) + row["item"] / 7} for row in items]
    # Prompts of another kind, which the job numbers from 0 too.
    others = [{**row, "name": "choice", "prompt": "Good / bad", "value": 1.0} for row in items]
    Store(place).commit([], completions=rows, items=[*items, *measured, *others])
    return place


def lines_of(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def fill(path: Path, labels: dict[str, str], columns: tuple[str, ...] = ("key", "label")) -> Path:
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(columns)
        writer.writerows(labels.items())
    return path


class TestExport:
    def test_every_text_is_there_once_and_nothing_says_whose_it_is(
        self, folder: Path, tmp_path: Path
    ) -> None:
        out = tmp_path / "texts.csv"
        assert export_texts(folder, out, most=None, seed=0) == 12
        lines = lines_of(out)
        assert {line["text"].removeprefix("'") for line in lines} == set(TEXTS)
        assert all(line.keys() == {"key", "prompt", "text", "label"} for line in lines)
        assert all(line["label"] == "" and re.fullmatch("[0-9a-f]{12}", line["key"]) for line in lines)
        assert not re.search("spec|trial", out.read_text())

    def test_no_text_is_a_formula_to_a_spreadsheet(self, folder: Path, tmp_path: Path) -> None:
        export_texts(folder, tmp_path / "texts.csv", most=None, seed=0)
        said = {line["text"] for line in lines_of(tmp_path / "texts.csv")}
        assert {"'=HYPERLINK(1)", "'-- no"} < said

    def test_the_order_depends_on_the_seed_and_a_draw_is_part_of_the_whole(
        self, folder: Path, tmp_path: Path
    ) -> None:
        orders = []
        for number, (most, seed) in enumerate(((None, 0), (None, 0), (None, 1), (4, 0))):
            out = tmp_path / f"{number}.csv"
            export_texts(folder, out, most=most, seed=seed)
            orders.append([line["key"] for line in lines_of(out)])
        assert orders[0] == orders[1] != orders[2]
        assert sorted(orders[0]) == sorted(orders[2]) != orders[0]
        assert orders[3] == orders[0][:4]

    def test_a_file_that_is_there_or_no_csv_and_a_sweep_without_texts_are_refused(
        self, folder: Path, tmp_path: Path
    ) -> None:
        (tmp_path / "mine.csv").write_text("labels of a week")
        for name, said in (("mine.csv", "there already"), ("mine.xlsx", "a .csv file")):
            with pytest.raises(SpecError, match=said):
                export_texts(folder, tmp_path / name, most=None, seed=0)
        assert (tmp_path / "mine.csv").read_text() == "labels of a week"
        write_sweep(tmp_path / "silent", [], objectives={"total": "maximize"})
        with pytest.raises(SpecError, match="no completions yet"):
            export_texts(tmp_path / "silent", tmp_path / "new.csv", most=None, seed=0)


class TestImport:
    def labelled(self, folder: Path, tmp_path: Path, labels: dict[str, Any]) -> Path:
        """A file with labels by text."""
        out = tmp_path / f"{len(list(tmp_path.iterdir()))}.csv"
        export_texts(folder, out, most=None, seed=0)
        keys = {line["text"].removeprefix("'"): line["key"] for line in lines_of(out)}
        return fill(out, {keys[text]: str(label) for text, label in labels.items()})

    def test_a_label_counts_for_every_trial_that_says_the_text(self, folder: Path, tmp_path: Path) -> None:
        labels = {"Text number 0": "yes", "Text number 1": "No", "Text number 2": "", "-- no": 2.5}
        found = import_labels(folder, self.labelled(folder, tmp_path, labels), annotator="first")
        assert (found["labels"], found["completions"], found["version"], found["is_new"]) == (3, 8, 1, True)
        rows = open_sweep(folder).rows("SELECT * FROM scores")
        assert {row["scorer"] for row in rows} == {"label"}
        assert {row["options"] for row in rows} == {'{"annotator": "first"}'}
        expected = {0: 1.0, 12: 1.0, 1: 0.0, 11: 2.5}
        assert {(row["trial"], row["item"]): row["value"] for row in rows} == {
            (trial, item): value for trial in range(2) for item, value in expected.items()
        }

    def test_the_same_labels_again_change_nothing_and_others_are_a_new_version(
        self, folder: Path, tmp_path: Path
    ) -> None:
        first = self.labelled(folder, tmp_path, {"Text number 1": 1, "Text number 2": 0})
        other = self.labelled(folder, tmp_path, {"Text number 1": 1, "Text number 2": 1})
        versions = [import_labels(folder, file, annotator="a") for file in (first, first, other, other)]
        assert [(each["version"], each["is_new"]) for each in versions] == [
            (1, True),
            (1, False),
            (2, True),
            (2, False),
        ]
        assert import_labels(folder, first, annotator="b")["version"] == 1

    def test_agreement_is_cohens_kappa_over_the_different_texts(self, folder: Path, tmp_path: Path) -> None:
        generator = np.random.default_rng(0)
        mine = {text: int(generator.integers(2)) for text in sorted(set(TEXTS))}
        theirs = {text: int(generator.integers(2)) for text in sorted(set(TEXTS))}
        import_labels(folder, self.labelled(folder, tmp_path, theirs), annotator="b")
        found = import_labels(folder, self.labelled(folder, tmp_path, mine), annotator="a")
        agreement = {each["with_"]: each for each in found["agreement"]}
        assert set(agreement) == {'label{"annotator": "b"}', "odd"}, (
            "length has too many values, and choice is of other prompts"
        )
        firsts = {text: TEXTS.index(text) for text in mine}
        for name, others in (
            ('label{"annotator": "b"}', theirs),
            ("odd", {text: item % 2 for text, item in firsts.items()}),
        ):
            both = [[of[text] for text in sorted(mine)] for of in (mine, others)]
            assert agreement[name]["items"] == len(mine)
            assert agreement[name]["kappa"] == pytest.approx(cohen_kappa_score(*both))
            assert agreement[name]["agreed"] == pytest.approx(np.mean(np.equal(*both)))
            assert agreement[name]["low"] < agreement[name]["kappa"] < agreement[name]["high"]

    @pytest.mark.parametrize(
        ("content", "said"),
        [
            ("key,label\nabc,1\n", "1 keys mean no completion of this sweep, such as 'abc'"),
            ("key,label\n{key},maybe\n", "entry 1: label 'maybe'; it takes a number, or yes or no"),
            ("key,label\n{key},inf\n", "entry 1: label 'inf'"),
            ("key,label\n{key},1\n{key},0\n", "entry 2: the key '{key}' has two different labels"),
            ("key,label\n{key},\n", "the column label is empty"),
            ("key,mark\n{key},1\n", "entry 1: no column 'label'"),
            ("", "the column label is empty"),
        ],
    )
    def test_a_file_that_cannot_be_meant_is_refused_and_nothing_kept(
        self, folder: Path, tmp_path: Path, content: str, said: str
    ) -> None:
        export_texts(folder, tmp_path / "texts.csv", most=None, seed=0)
        key = lines_of(tmp_path / "texts.csv")[0]["key"]
        file = tmp_path / "labels.csv"
        file.write_text(content.replace("{key}", key))
        with pytest.raises(SpecError, match=re.escape(said.replace("{key}", key))):
            import_labels(folder, file, annotator="a")
        assert open_sweep(folder).rows("SELECT * FROM scores") == []

    def test_the_command_takes_a_file_out_and_in(self, folder: Path, tmp_path: Path) -> None:
        def call(*arguments: str) -> dict[str, Any]:
            done = CliRunner().invoke(app, ["label", str(folder), *arguments, "--json"])
            assert done.exit_code == 0, done.output
            found: dict[str, Any] = json.loads(done.stdout)
            return found

        out = tmp_path / "texts.csv"
        assert call("--out", str(out), "--most", "5") == {"file": str(out), "texts": 5}
        fill(out, {line["key"]: "1" for line in lines_of(out)})
        assert call("--in", str(out), "--annotator", "a")["labels"] == 5
        for wrong in ((), ("--in", str(out)), ("--in", str(out), "--out", str(out))):
            assert CliRunner().invoke(app, ["label", str(folder), *wrong]).exit_code != 0

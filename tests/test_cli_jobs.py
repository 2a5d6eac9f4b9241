"""The command `jobs`: what comes with the package, as the modules themselves have it."""

import dataclasses
import json
import re
from dataclasses import dataclass
from pathlib import Path

import pytest

from jobs.resolve import load_job, shipped_jobs
from orchestrator.descriptions import describe_fields, describe_job
from tests.command import ROOT, refused, steersweep
from tests.test_architecture import run_without

NAMES = shipped_jobs()


def test_all_jobs_are_listed_with_the_first_line_of_their_docstring() -> None:
    done = steersweep("jobs")
    assert done.returncode == 0, done.stderr
    listed = dict(re.findall(r"^│ (\S+) +│ (.*?) +│$", done.stdout, re.MULTILINE))
    files = {path.stem: path.read_text() for path in (ROOT / "jobs").glob("*.py")}
    expected = {
        f"jobs.{stem}": text.splitlines()[0].strip('"').removeprefix("Job: ")
        for stem, text in files.items()
        if re.search("^def run\\(", text, re.MULTILINE)
    }
    assert listed == expected
    assert len(listed) >= 8


def test_a_job_is_shown_with_parameters_metrics_datasets_and_packing() -> None:
    done = steersweep("jobs", "steer")
    assert done.returncode == 0, done.stderr
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in done.stdout.splitlines()]
    parameters = {row[0]: row[1:] for row in rows if len(row) == 4}
    assert parameters["layer"] == ["int", "required", "Block whose output is steered, counted from 0."]
    assert parameters["dose"][:2] == ["float | None", "None"]
    assert parameters["choices_select"] == ["int", "40", "Choices of the split select."]
    metrics = {row[0]: row[1:] for row in rows if len(row) == 3}
    assert metrics.keys() == load_job("jobs.steer").METRICS.keys()
    assert "datasets or files: pairs, choices, prompts, vectors, combine, without" in done.stdout
    assert "trials pack: those that share choices, choices_select, " in done.stdout
    assert "do not pack" in steersweep("jobs", "jobs.extract").stdout


@pytest.mark.parametrize("name", NAMES)
def test_every_parameter_of_every_job_is_described(name: str) -> None:
    found = describe_job(name)
    fields = dataclasses.fields(load_job(name).Params)
    assert [row["name"] for row in found["parameters"]] == [field.name for field in fields]
    assert [row["name"] for row in found["parameters"] if not row["about"]] == []
    json.dumps(found)


def test_words_of_a_class_replace_those_of_its_bases() -> None:
    @dataclass(frozen=True, kw_only=True)
    class Base:
        """Above.

        Attributes:
            one: The first,
                over two lines: with a colon.

            two: The second.

        More, which is
            three: no field.
        """

        one: int
        two: tuple[float, ...] = (1.0,)

    @dataclass(frozen=True, kw_only=True)
    class Own(Base):
        """Below.

        Attributes:
            two: Its own.
        """

        three: str | None = None

    assert [tuple(row.values()) for row in describe_fields(Own)] == [
        ("one", "int", True, None, "The first, over two lines: with a colon."),
        ("two", "list of float", False, (1.0,), "Its own."),
        ("three", "str | None", False, None, ""),
    ]


@pytest.mark.parametrize("name", ["stear", "jobs.stear", ".steer", "jobs..steer"])
def test_an_unknown_job_is_one_clear_line(name: str) -> None:
    line = refused("jobs", name)
    assert "no job" in line
    assert "`steersweep jobs`" in line


def test_jobs_are_described_without_torch(tmp_path: Path) -> None:
    script = "from orchestrator.cli import app; app(['jobs', 'generate', '--json'], standalone_mode=False)"
    run_without(("torch", "transformers", "ray"), script)

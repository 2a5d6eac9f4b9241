"""The README says what is there."""

import json
import re
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from jobs.data.claims import load_questions
from jobs.data.examples import load_examples
from jobs.data.multiple_choice import load_multiple_choice
from jobs.data.pairs import load_pairs
from jobs.data.prompts import load_choices, load_conversations, load_open_prompts
from jobs.data.replies import load_replies
from jobs.data.texts import load_texts
from jobs.errors import SpecError
from jobs.resolve import load_job, make_params, shipped_jobs

ROOT = Path(__file__).parents[1]
PAGES = sorted(path for path in ROOT.glob("*.md")) + sorted((ROOT / "docs").glob("*.md"))


def blocks(language: str) -> list[str]:
    """The README's fenced blocks of one language; "" for those that name none."""
    fenced = re.findall(r"^```(\w*)\n(.*?)^```$", (ROOT / "README.md").read_text(), re.DOTALL | re.MULTILINE)
    return [text for named, text in fenced if named == language]


def tree() -> list[tuple[int, str]]:
    """Indentation and name of each line of the README's tree."""
    [block] = blocks("")
    return [(len(line) - len(line.lstrip()), line.split()[0]) for line in block.splitlines()]


def test_every_line_of_the_tree_is_a_file_or_folder() -> None:
    folder = ROOT
    for indentation, name in tree():
        folder = ROOT if indentation == 0 else folder
        assert (folder / name).exists(), name
        if indentation == 0 and name.endswith("/"):
            folder = ROOT / name


def test_every_folder_of_the_project_is_in_the_tree() -> None:
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True)
    folders = {path.split("/")[0] + "/" for path in tracked.stdout.splitlines() if "/" in path}
    named = {name for indentation, name in tree() if indentation == 0}
    assert {folder for folder in folders if not folder.startswith(".")} <= named


def test_every_part_of_jobs_is_in_the_tree() -> None:
    named = {name.rstrip("/") for indentation, name in tree() if indentation > 0}
    parts = {
        path.name
        for path in (ROOT / "jobs").iterdir()
        if path.suffix == ".py" or (path / "__init__.py").exists()
    }
    assert parts - {"__init__.py"} == named


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_to_files_lead_somewhere(page: Path) -> None:
    links = re.findall(r"\]\(([^)#]+)\)", page.read_text())
    local = [link for link in links if "://" not in link]
    assert [link for link in local if not (page.parent / link).exists()] == []


def test_the_spaces_in_the_readme_run_as_they_stand(tmp_path: Path) -> None:
    from orchestrator.config import make_config
    from orchestrator.space_file import check_space, load_space

    assert blocks("python")
    for block in blocks("python"):
        path = tmp_path / "space.py"
        path.write_text(block)
        check_space(load_space(path).space, make_config().model_ref)


LOADERS: dict[str, Callable[[str], object]] = {
    "contrast pairs": load_pairs,
    "two-way choices": lambda path: load_choices(path, 3, 1),
    "open prompts": lambda path: load_open_prompts(path, 3, 1),
    "conversations": lambda path: load_conversations(path, 4),
    "examples of replies": load_examples,
    "prompts to capture": lambda path: load_job("jobs.capture").check(
        make_params("jobs.capture", {"data": path})
    ),
    "claims": lambda path: load_questions(path, extract=2, select=1, report=1),
    "questions": lambda path: load_multiple_choice(path, 4),
    "neutral text": load_texts,
    "replies": lambda path: load_replies(path, 4),
}
CELLS = {"turns": ["Why?", "How?"], "choices": ["red", "blue"], "answer": "1"}


def datasets() -> list[list[str]]:
    """Kind, columns, further columns and parameters of each row of the README's table of datasets."""
    [section] = re.findall(
        r"^## Your own data\n(.*?)^## ", (ROOT / "README.md").read_text(), re.DOTALL | re.M
    )
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in re.findall(r"^\|.*", section, re.M)
    ]
    return rows[2:]


def test_datasets_with_the_columns_that_the_readme_names_can_be_read_and_need_them_all(
    tmp_path: Path,
) -> None:
    assert [kind for kind, *_ in datasets()] == [*LOADERS]
    for kind, columns, *_ in datasets():
        # what stands in brackets or behind a semicolon is another way of giving the same
        needed = re.findall(r"`(\w+)`", re.sub(r"\(.*?\)|;.*", "", columns))
        rows = [{name: CELLS.get(name, f"Say {number}.") for name in needed} for number in range(4)]
        for number, row in enumerate(rows):
            row |= {"label": number % 2} if "label" in row else {}
        path = tmp_path / "data.jsonl"
        path.write_text("\n".join(map(json.dumps, rows)))
        LOADERS[kind](str(path))
        for absent in needed:
            left = [{name: value for name, value in row.items() if name != absent} for row in rows]
            path.write_text("\n".join(map(json.dumps, left)))
            with pytest.raises(SpecError):
                LOADERS[kind](str(path))


def test_the_table_of_datasets_names_every_parameter_of_every_job_that_takes_one() -> None:
    named = {name for *_, parameters in datasets() for name in re.findall(r"`(\w+)`", parameters)}
    taken = {name for job in shipped_jobs() for name in load_job(job).DATA}
    assert named == taken - {"vectors"}  # a file of directions is no dataset


def test_the_examples_of_the_engine_run_as_they_stand(capsys: pytest.CaptureFixture[str]) -> None:
    page = (ROOT / "docs" / "engine.md").read_text()
    examples = re.findall(r"^```python\n(.*?)^```$", page, re.DOTALL | re.MULTILINE)
    assert len(examples) == 5
    exec("\n".join(examples), {})
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == 8 + 2 + 1 + 2

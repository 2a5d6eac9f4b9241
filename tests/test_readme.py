"""The README says what is there."""

import re
import subprocess
from pathlib import Path

import pytest

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


def test_the_examples_of_the_engine_run_as_they_stand(capsys: pytest.CaptureFixture[str]) -> None:
    page = (ROOT / "docs" / "engine.md").read_text()
    examples = re.findall(r"^```python\n(.*?)^```$", page, re.DOTALL | re.MULTILINE)
    assert len(examples) == 3
    exec("\n".join(examples), {})
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == 8 + 2

"""Who imports whom, read from the syntax trees; and what `jobs` runs without."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = ("jobs", "orchestrator", "search_spaces", "storage")
MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for folder in FOLDERS
    for path in sorted((ROOT / folder).rglob("*.py"))
}
LIGHT = ("jobs.spec", "jobs.errors", "jobs.resolve", "jobs.catalog", "jobs.fingerprint")
JOB_MODULES = tuple(
    name for name, path in MODULES.items() if re.search(r"^def run\(replica", path.read_text(), re.M)
)

ALLOWED = {
    "jobs": ("jobs",),
    "search_spaces": ("search_spaces", "jobs.spec", "jobs.errors"),
    "storage": ("storage", "jobs.spec", "jobs.errors"),
    "orchestrator": (
        "orchestrator",
        "search_spaces",
        "storage",
        "jobs.scoring",
        "jobs.directions.vector_files",
        "jobs.merging",
        *LIGHT,
    ),
}
IMPORTERS = {
    "ray": {"orchestrator.ray_pool", "orchestrator.ray_worker", "orchestrator.ray_cluster"},
    "optuna": {"orchestrator.sampler", "orchestrator.study", "orchestrator.window", "orchestrator.pack_tpe"},
    "mlflow": {"storage.mlflow_log"},
    "pyarrow": {
        "storage.parquet",
        "storage.table_stream",
        "storage.query",
        "storage.relations",
        "storage.pareto",
        "storage.remote",
    },
    "duckdb": {"storage.query", "storage.relations"},
    "moocore": {"storage.front"},
    "transformers": {
        "jobs.engine.replica",
        "jobs.engine.loading",
        "jobs.engine.cache",
        "jobs.engine.ablation",
        "jobs.catalog",
    },
}
NOT_FOR_JOBS = ("ray", "optuna", "mlflow", "pyarrow", "duckdb")


def imports(path: Path) -> Iterator[str]:
    """Every module that a file names in an import, wherever in the file."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} has a relative import"
            for alias in node.names:
                qualified = f"{node.module}.{alias.name}"
                yield qualified if qualified in MODULES else str(node.module)


def is_within(module: str, package: str) -> bool:
    return module == package or module.startswith(f"{package}.")


@pytest.mark.parametrize("folder", FOLDERS)
def test_a_folder_imports_only_those_below_it(folder: str) -> None:
    wrong = [
        f"{name} imports {imported}; {folder} may import of ours only {ALLOWED[folder]}"
        for name, path in MODULES.items()
        if is_within(name, folder)
        for imported in imports(path)
        if imported.split(".")[0] in (*FOLDERS, "tests", "benchmarks")
        and not any(is_within(imported, allowed) for allowed in ALLOWED[folder])
    ]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("library", IMPORTERS)
def test_a_heavy_library_is_imported_in_its_own_files_only(library: str) -> None:
    found = {
        name for name, path in MODULES.items() for imported in imports(path) if is_within(imported, library)
    }
    assert found == IMPORTERS[library]


def test_torch_is_imported_by_jobs_and_by_the_actor_that_sets_its_threads() -> None:
    found = {
        name for name, path in MODULES.items() for imported in imports(path) if is_within(imported, "torch")
    }
    assert {name for name in found if not is_within(name, "jobs")} == {"orchestrator.ray_worker"}
    assert not found & set(LIGHT)


def test_no_module_imports_itself_in_a_circle() -> None:
    graph = {
        name: {imported for imported in imports(path) if imported in MODULES}
        for name, path in MODULES.items()
    }
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(f"these modules import each other in a circle: {' <- '.join(error.args[1])}")


def test_init_files_are_empty() -> None:
    assert [str(path) for path in MODULES.values() if path.name == "__init__.py" and path.read_bytes()] == []


def test_every_folder_of_modules_is_a_package() -> None:
    assert {path.parent for path in MODULES.values() if not (path.parent / "__init__.py").is_file()} == set()


BLOCK = """
import sys

class Without:
    def __init__(self, finder):
        self.finder = finder

    def __getattr__(self, name):
        return getattr(self.finder, name)

    def find_spec(self, name, path=None, target=None):
        return None if name.split(".")[0] in {libraries!r} else self.finder.find_spec(name, path, target)

sys.meta_path[:] = [Without(finder) for finder in sys.meta_path]
"""
"""Hides packages from imports and from those who only ask whether a package is there."""


def run_without(libraries: tuple[str, ...], script: str, *arguments: str) -> None:
    command = [sys.executable, "-c", BLOCK.format(libraries=set(libraries)) + script, *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_block_works() -> None:
    with pytest.raises(AssertionError, match="No module named 'optuna'"):
        run_without(("optuna",), "import optuna")


def test_specs_and_jobs_import_without_torch_and_transformers() -> None:
    assert len(JOB_MODULES) >= 3
    run_without(("torch", "transformers"), "\n".join(f"import {name}" for name in (*LIGHT, *JOB_MODULES)))


def test_the_driver_imports_without_torch_and_transformers() -> None:
    driver = [name for name in MODULES if not is_within(name, "jobs")]
    run_without(("torch", "transformers"), "\n".join(f"import {name}" for name in driver))


def test_jobs_import_and_run_without_the_loops_libraries(tmp_path: Path) -> None:
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text(
        '{"positive": "Good.", "negative": "Bad?"}\n{"positive": "Warm.", "negative": "Cold?"}\n'
    )
    everything = "\n".join(f"import {name}" for name in MODULES if is_within(name, "jobs"))
    script = f"""
{everything}
from jobs.resolve import make_params
from tests.models import Artifacts, tiny_replica

params = make_params("jobs.steer", dict(
    layer=1, dose=0.5, pairs=sys.argv[1], max_new_tokens=2,
    choices_select=1, choices_report=1, prompts_select=1, prompts_report=1,
))
[outcome] = Artifacts(tiny_replica("llama")).run("jobs.steer", [params])
assert outcome.status == "completed", outcome
assert outcome.metrics["select"]["kl"] > 0, outcome
"""
    run_without((*NOT_FOR_JOBS, *(folder for folder in FOLDERS if folder != "jobs")), script, str(pairs))

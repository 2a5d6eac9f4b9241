"""What a user can get wrong before anything is spent, and the one clear line that each mistake gets."""

import dataclasses
import errno
import getpass
import itertools
import json
import math
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jobs.errors import ModelError, SpecError
from jobs.spec import ModelRef
from orchestrator.config import RunConfig, make_config, split_settings
from orchestrator.folder import check_free, claimed, differences, identify
from orchestrator.planning import Planner, check_unchanged
from orchestrator.reopening import load_kept
from orchestrator.space_file import (
    SpaceFile,
    check_space,
    column_types,
    data_grids,
    grid_cell,
    grid_size,
    load_space,
    located_use,
    with_absolute_data,
    with_fixed,
)
from search_spaces.base import Float, Grid, Int, Objective, Space
from storage.ledger import Asked
from storage.lock import driver, driving
from storage.query import read_identity

ROOT = Path(__file__).parents[1]
TOTAL = Objective(metric="total", direction="maximize")
SOURCE = """
from search_spaces.base import Grid, Objective, Space

SPACE = Space(
    description="numbers",
    job="tests.fake_job",
    parameters={"x": Grid([1, 2])},
    objectives=[Objective(metric="total", direction="maximize")],
    sampler="grid",
)
"""


def make_space(parameters: Mapping[str, Any] | None = None, **changes: Any) -> Space:
    values: dict[str, Any] = {
        "description": "numbers",
        "job": "tests.fake_job",
        "parameters": {"x": Grid([1, 2])} if parameters is None else parameters,
        "objectives": [TOTAL],
        "sampler": "grid",
        **changes,
    }
    return Space(**values)


def files_under(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def claim(folder: Path, file: SpaceFile, config: RunConfig) -> dict[str, Any]:
    with claimed(folder, file, config):
        return read_identity(folder)


def refuse_fsync(file: int) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def check_line(error: BaseException, *parts: str) -> None:
    """One line that names every part."""
    line = str(error)
    assert "\n" not in line
    for part in parts:
        assert part in line


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("orchestrator.folder.provenance", dict)


@pytest.fixture
def model(tmp_path: Path) -> ModelRef:
    """A model folder of which only the configuration is there: six layers."""
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text('{"num_hidden_layers": 6}')
    return ModelRef(id=str(folder))


WRONG: dict[str, tuple[Callable[[], object], tuple[str, ...]]] = {
    "no parameters": (lambda: make_space({}), ("parameters is empty",)),
    "no objectives": (lambda: make_space(objectives=[]), ("objectives is empty",)),
    "a list for a domain": (lambda: make_space({"x": [1, 2]}), ("'x': [1, 2]", "Grid([...])")),
    "fixed and varied": (lambda: make_space(fixed={"x": 1}), ("['x']", "keep one of them")),
    "no trials": (lambda: make_space(trials=0), ("trials=0", "1 or more")),
    "an endless search": (lambda: make_space(sampler="tpe"), ("'tpe'", "trials=N")),
    "a real grid": (lambda: make_space({"y": Float(low=0, high=1)}), ("['y']", "Grid([...])")),
    "an unknown sampler": (lambda: make_space(sampler="gird", trials=3), ("'gird'", "'grid'", "'tpe'")),
    "no job": (lambda: make_space(job=""), ("job=''", "'jobs.steer'")),
    "a relative job": (lambda: make_space(job=".steer"), ("job='.steer'",)),
    "a number for a name": (lambda: make_space({1: Grid([1])}), ("[1]", "named by texts")),
    "a text for an objective": (lambda: make_space(objectives=["total"]), ("['total']", "Objective(")),
    "an objective twice": (lambda: make_space(objectives=[TOTAL, TOTAL]), ("'total'", "once")),
    "a direction": (lambda: Objective(metric="a", direction="up"), ("'up'", "'minimize' or 'maximize'")),
    "bounds of a real": (lambda: Float(low=2, high=1), ("low=2", "high=1")),
    "bounds of a whole number": (lambda: Int(low=2, high=1), ("low=2", "high=1")),
    "an endless real": (lambda: Float(low=0, high=math.inf), ("high=inf", "finite")),
    "an undefined real": (lambda: Float(low=math.nan, high=1), ("low=nan", "finite")),
    "a real without an end between": (lambda: Float(low=-1.7e308, high=1.7e308), ("1.7e+308", "between")),
    "a whole number that is none": (lambda: Int(low=0.5, high=3.5), ("low=0.5", "Float")),  # type: ignore[arg-type]
    "a whole number of many bits": (lambda: Int(low=0, high=2**63), ("high=9223372036854775808", "64 bits")),
    "many bits in a grid": (lambda: Grid([2**64]), ("18446744073709551616", "64 bits")),
    "half a character": (lambda: Grid(["\ud800", "b"]), ("UTF-8",)),
    "a logarithm of 0": (lambda: Float(low=0, high=1, log=True), ("low=0", "above 0")),
    "a logarithm of a whole 0": (lambda: Int(low=0, high=1, log=True), ("low=0", "above 0")),
    "an empty grid": (lambda: Grid([]), ("at least one value",)),
    "a value twice": (lambda: Grid([1, 2, 1]), ("[1, 2, 1]", "listed once")),
    "a value twice in other words": (lambda: Grid([1, True]), ("[1, True]", "listed once")),
    "a list in a grid": (lambda: Grid([[1], [2]]), ("[1]", "bool, int, float or str")),
    "nothing in a grid": (lambda: Grid([None, 1]), ("None", "bool, int, float or str")),
    "an undefined value in a grid": (lambda: Grid([1.0, math.nan]), ("nan", "finite")),
}


@pytest.mark.parametrize("mistake", WRONG)
def test_a_space_that_cannot_be_meant_names_what_was_given_and_what_is_allowed(mistake: str) -> None:
    make, parts = WRONG[mistake]
    with pytest.raises(ValueError, match=r"\S") as error:
        make()
    check_line(error.value, *parts)


def test_a_space_file_is_loaded_with_its_name_and_text_and_nothing_is_left_beside_it(tmp_path: Path) -> None:
    path = tmp_path / "mine.py"
    path.write_text(SOURCE)
    file = load_space(path)
    assert (file.space, file.name, file.source) == (make_space(), "mine", SOURCE)
    assert files_under(tmp_path) == {"mine.py": SOURCE.encode()}


def test_a_space_file_that_was_changed_within_a_second_is_read_anew(tmp_path: Path) -> None:
    # Python's own cache compares whole seconds and sizes.
    path = tmp_path / "mine.py"
    for text in (SOURCE, SOURCE.replace("[1, 2]", "[3, 4]")):
        path.write_text(text)
        os.utime(path, (1e9, 1e9))
        file = load_space(path)
    assert file.source == text
    assert file.space.parameters == {"x": Grid([3, 4])}


BROKEN = {
    "syntax": ("a = 1\nb = (\n", ("line 2", "SyntaxError")),
    "indentation": ("a = 1\n  b = 2\n", ("line 2", "IndentationError")),
    "a name": ("\n\nSPACE = Spaec()\n", ("line 3", "NameError", "Spaec")),
    "an import": ("import nonsense_that_is_absent\n", ("line 1", "nonsense_that_is_absent")),
    "a value": (SOURCE.replace("Grid([1, 2])", "Grid([])"), ("line 7", "at least one value")),
    "a keyword": (SOURCE.replace("sampler=", "smapler="), ("line 4", "smapler")),
    "deep inside": ("def f():\n    raise KeyError('deep')\n\nf()\n", ("line 2", "deep")),
    "many lines": ("raise RuntimeError('first\\nsecond')\n", ("line 1", "first")),
    "no words": ("raise RuntimeError\n", ("line 1", "RuntimeError")),
    "no SPACE": ("a = 1\n", ("SPACE = Space(...)",)),
    "another SPACE": ("SPACE = {'job': 'jobs.steer'}\n", ("SPACE = Space(...)",)),
    "another encoding": ("name = 'é'\n".encode("latin-1"), ("UnicodeDecodeError",)),
    "no text": (b"a = 1\0\n", ("mine.py",)),
}


@pytest.mark.parametrize("mistake", BROKEN)
def test_a_space_file_that_does_not_run_is_named_with_its_line(tmp_path: Path, mistake: str) -> None:
    content, parts = BROKEN[mistake]
    path = tmp_path / "mine.py"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(SpecError) as error:
        load_space(path)
    check_line(error.value, str(path), *parts)


def test_a_space_file_that_is_not_there_says_so(tmp_path: Path) -> None:
    for path in (tmp_path / "none.py", tmp_path):
        with pytest.raises(SpecError) as error:
            load_space(path)
        check_line(error.value, f"no space file {path}")


def test_an_error_in_another_file_is_not_given_a_line_of_this_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "broken_beside.py").write_text("\n\n\n\n\nb = (\n")
    (tmp_path / "mine.py").write_text("import broken_beside\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(SpecError) as error:
        load_space(tmp_path / "mine.py")
    check_line(error.value, "mine.py, line 1", "broken_beside.py")


def test_every_space_of_the_project_loads_and_passes_its_own_checks(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"n_layer": 40}')
    paths = [path for path in (ROOT / "search_spaces").glob("*.py") if path.stem not in ("__init__", "base")]
    assert paths
    for path in paths:
        check_space(load_space(path).space, ModelRef(id=str(tmp_path)))


UNFIT: dict[str, tuple[Space, tuple[str, ...]]] = {
    "a job": (make_space(job="jobs.nonsense"), ("'jobs.nonsense'", "'jobs.steer'")),
    "a module that is no job": (make_space(job="jobs.spec"), ("jobs.spec", "lacks", "METRICS")),
    "an objective": (
        make_space(objectives=[Objective(metric="totla", direction="maximize")]),
        ("'totla'", "'square'", "did you mean 'total'?"),
    ),
    "a later objective": (
        make_space(objectives=[TOTAL, Objective(metric="zzz", direction="maximize")]),
        ("'zzz'", "['square', 'total']"),
    ),
    "a parameter": (
        make_space({"xx": Grid([1])}, fixed={"x": 1}),
        ("['xx']", "'group'", "did you mean 'x'?"),
    ),
    "a fixed parameter": (make_space(fixed={"gruop": "a"}), ("['gruop']", "did you mean 'group'?")),
    "a column of the tables": (
        make_space({"state": Grid([1])}, fixed={"x": 1}),
        ("['state']", "other names"),
    ),
    "a column in capitals": (make_space({"State": Grid([1])}, fixed={"x": 1}), ("['State']", "other names")),
    "names that SQL does not tell apart": (
        make_space({"x": Grid([1]), "X": Grid([1])}),
        ("['X', 'x']", "case"),
    ),
    "a parameter that is needed": (make_space({"y": Grid([1.0])}), ("['x']", "needs")),
    "a type": (make_space({"x": Grid([1, 2.5])}), ("x=2.5", "a whole number")),
    "a fixed type": (make_space(fixed={"group": 3}), ("group=3", "a text")),
    "a truth for a number": (make_space({"x": Grid([True])}), ("x=True", "a whole number")),
    "a bound that the job refuses": (make_space({"x": Int(low=-2000, high=5)}), ("x=-2000", "-1000 or more")),
    "data that cannot be read": (make_space(fixed={"group": "unreadable"}), ("'unreadable'",)),
    "a layer": (make_space({"x": Grid([1]), "layer": Grid([0, 5, 6])}), ("layer=6", "0 to 5")),
    "the last layer of a range": (
        make_space({"x": Grid([1]), "layer": Int(low=0, high=9)}),
        ("layer=9", "0 to 5"),
    ),
    "a negative layer": (make_space({"x": Grid([1]), "layer": Grid([-1])}), ("layer=-1", "0 to 5")),
    "a fixed layer": (make_space(fixed={"layer": 6}), ("layer=6", "0 to 5")),
}


@pytest.mark.parametrize("mistake", UNFIT)
def test_a_space_that_its_job_or_model_cannot_run_names_what_does_not_fit(
    model: ModelRef, mistake: str
) -> None:
    space, parts = UNFIT[mistake]
    with pytest.raises(SpecError) as error:
        check_space(space, model)
    check_line(error.value, *parts)


def test_a_space_that_fits_is_not_refused(model: ModelRef) -> None:
    check_space(
        make_space(
            {"x": Int(low=-1000, high=5), "y": Grid([1, 2.5]), "layer": Int(low=0, high=5)},
            fixed={"mode": "ok"},
        ),
        model,
    )


@pytest.mark.parametrize(
    ("content", "layers"),
    [
        ('{"n_layer": 6}', 6),
        ('{"num_layers": 6}', 6),
        ('{"text_config": {"num_hidden_layers": 6}}', 6),
        ('{"hidden_size": 6}', None),
    ],
)
def test_layers_are_checked_where_the_configuration_states_them(
    model: ModelRef, content: str, layers: int | None
) -> None:
    (Path(model.id) / "config.json").write_text(content)
    space = make_space(fixed={"layer": 6})
    if layers is None:
        check_space(space, model)
    else:
        with pytest.raises(SpecError, match="0 to 5"):
            check_space(space, model)


def test_a_model_that_is_not_to_be_had_is_named(
    tmp_path: Path, model: ModelRef, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(ModelError) as error:
        check_space(make_space(), ModelRef(id="smollm2-135m"))
    check_line(error.value, "smollm2-135m", "steersweep models add")
    with pytest.raises(ModelError) as error:
        check_space(make_space(), ModelRef(id="no such model", revision="v1"))
    check_line(error.value, "'no such model'", "'v1'", "smollm2-135m", "Hugging Face id")
    (Path(model.id) / "config.json").write_text("{")
    with pytest.raises(ModelError) as error:
        check_space(make_space(), model)
    check_line(error.value, model.id, "configuration")


DOMAIN = st.one_of(
    st.builds(lambda low, more: Int(low=low, high=low + more), st.integers(-3, 3), st.integers(0, 3)),
    st.lists(st.integers() | st.text(max_size=2) | st.floats(-2, 2), min_size=1, max_size=3, unique=True).map(
        Grid
    ),
)


@given(domains=st.lists(DOMAIN, min_size=1, max_size=4))
def test_the_cells_of_a_grid_are_the_product_of_its_values(domains: list[Any]) -> None:
    space = make_space({f"p{number}": domain for number, domain in enumerate(domains)})
    values = [
        domain.values if isinstance(domain, Grid) else range(domain.low, domain.high + 1)
        for domain in domains
    ]
    cells = [grid_cell(space, index) for index in range(grid_size(space))]
    assert [tuple(cell.values()) for cell in cells] == list(itertools.product(*values))
    assert all(list(cell) == list(space.parameters) for cell in cells)


def test_a_grid_over_a_real_parameter_is_refused_when_it_is_asked_for_later() -> None:
    space = make_space({"y": Float(low=0, high=1), "x": Grid([1])}, sampler="tpe", trials=3)
    with pytest.raises(SpecError) as error:
        grid_size(space)
    check_line(error.value, "['y']", "Grid([...])")


@pytest.mark.parametrize(
    ("domain", "wanted"),
    [
        (Int(low=0, high=2), "BIGINT"),
        (Float(low=0, high=2), "DOUBLE"),
        (Grid([1, 2]), "BIGINT"),
        (Grid([1, 2.5]), "DOUBLE"),
        (Grid([0.5]), "DOUBLE"),
        (Grid(["a", "b"]), "VARCHAR"),
        (Grid([True, False]), "BOOLEAN"),
        (Grid([1, "a"]), "VARCHAR"),
        (Grid([True, 2.5]), "VARCHAR"),
    ],
)
def test_a_column_has_the_narrowest_type_that_holds_all_values(domain: Any, wanted: str) -> None:
    space = make_space({"p": domain}, sampler="random", trials=1)
    assert column_types(space) == {"p": wanted}


def test_fixed_values_from_the_command_line_have_the_types_of_the_job() -> None:
    space = make_space(fixed={"y": 1.0, "mode": "ok"})
    changed = with_fixed(space, {"y": "2.5", "group": "007", "layer": "3", "mode": "true"}, Path())
    assert changed.fixed == {"y": 2.5, "group": "007", "layer": 3, "mode": "true"}
    assert space.fixed == {"y": 1.0, "mode": "ok"}


@pytest.mark.parametrize(
    ("name", "parts"), [("gruop", ("gruop", "'group'")), ("x", ("space.x", "varies it"))]
)
def test_a_value_that_the_command_line_cannot_fix_is_refused(name: str, parts: tuple[str, ...]) -> None:
    with pytest.raises(SpecError) as error:
        with_fixed(make_space(), {name: "1"}, Path())
    check_line(error.value, *parts)


def test_settings_are_split_at_their_first_equals_sign() -> None:
    fields, fixed = split_settings(["model=a/b@c=d", "space.mode=x=y", "space.group="])
    assert (fields, fixed) == ({"model": "a/b@c=d"}, {"mode": "x=y", "group": ""})


@pytest.mark.parametrize("text", ["model", "=1", ""])
def test_a_setting_without_key_or_value_is_refused(text: str) -> None:
    with pytest.raises(SpecError) as error:
        split_settings([text])
    check_line(error.value, repr(text), "key=value")


@pytest.mark.parametrize(
    ("values", "parts"),
    [
        ({"wrokers": "2"}, ("wrokers", "'workers'", "space.NAME")),
        ({"workers": "0"}, ("workers='0'", "greater than or equal to 1")),
        ({"workers": "two"}, ("workers='two'", "integer")),
        ({"seed": "-1"}, ("seed='-1'",)),
        ({"sampler": "gird"}, ("sampler='gird'", "'grid'", "'tpe'")),
        ({"trials": "0"}, ("trials='0'",)),
        ({"gpus_per_worker": "1.5"}, ("gpus_per_worker", "1.5", "share")),
        ({"resources": '{"tpu": -1}'}, ("resources", "-1", "share")),
        ({"dtype": "fp16"}, ("dtype='fp16'", "'bfloat16'")),
        ({"trust_remote_code": "perhaps"}, ("trust_remote_code='perhaps'",)),
    ],
)
def test_a_wrong_setting_is_one_line_that_names_it(values: dict[str, str], parts: tuple[str, ...]) -> None:
    with pytest.raises(SpecError) as error:
        make_config(**values)
    check_line(error.value, *parts)


def test_settings_are_converted_and_what_was_not_given_keeps_its_default() -> None:
    config = make_config(workers="3", gpus_per_worker="0.5", trials=None, model="a/b@main", dtype="bfloat16")
    assert (config.workers, config.gpus_per_worker, config.trials) == (3, 0.5, None)
    assert config.seed == RunConfig().seed
    assert config.model_ref == ModelRef(id="a/b", revision="main", dtype="bfloat16")
    assert make_config(model="a/b").model_ref.revision is None


FILE = SpaceFile(make_space(fixed={"group": "a"}), Path("mine.py"), SOURCE)


def test_a_new_folder_is_claimed_with_the_space_and_recognised_again(tmp_path: Path) -> None:
    folder = tmp_path / "sweeps" / "one"
    identity = claim(folder, FILE, RunConfig())
    assert sorted(files_under(folder)) == ["lock", "space.py", "sweep.json"]
    assert (folder / "space.py").read_text() == SOURCE
    before = files_under(folder)
    assert claim(folder, FILE, RunConfig()) == identity
    assert files_under(folder) == before


def test_an_identity_says_what_a_reader_of_the_tables_needs() -> None:
    identity = identify(FILE, RunConfig(model="a/b@c", seed=5))
    assert identity["job"] == "tests.fake_job"
    assert identity["parameters"] == {"x": "BIGINT"}
    assert identity["objectives"] == [{"metric": "total", "direction": "maximize"}]
    assert set(identity["metrics"]) == {"total", "square"}
    assert (identity["model"]["id"], identity["model"]["revision"], identity["seed"]) == ("a/b", "c", 5)
    assert json.loads(json.dumps(identity)) == identity


def test_a_sweep_whose_fixed_values_json_spells_otherwise_is_still_the_same(tmp_path: Path) -> None:
    file = FILE._replace(space=make_space(fixed={"blocks": (1, 2)}))
    assert claim(tmp_path / "one", file, RunConfig()) == claim(tmp_path / "one", file, RunConfig())
    assert (
        claim(tmp_path / "two", file, RunConfig())["sweep"]
        != claim(tmp_path / "one", file, RunConfig())["sweep"]
    )


CHANGES: dict[str, tuple[SpaceFile, RunConfig, tuple[str, ...]]] = {
    "seed": (FILE, RunConfig(seed=1), ("seed=0 (now 1)",)),
    "model and trials": (
        FILE,
        RunConfig(model="a/b", trials=3),
        ("'smollm2-135m' (now 'a/b')", "trials=None (now 3)"),
    ),
    "text": (FILE._replace(source=SOURCE + "\n"), RunConfig(), ("another space file",)),
    "a line": (
        FILE._replace(source="# new\n" + SOURCE),
        RunConfig(),
        ("another space file (its line 1 was", "now '# new')"),
    ),
    "name": (FILE._replace(path=Path("other.py")), RunConfig(), ("space='mine' (now 'other')",)),
    "fixed": (
        FILE._replace(space=make_space(fixed={"group": "b"})),
        RunConfig(),
        ("{'group': 'a'} (now {'group': 'b'})",),
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_folder_of_another_sweep_is_refused_and_the_difference_named(tmp_path: Path, change: str) -> None:
    file, config, parts = CHANGES[change]
    identity = claim(tmp_path / "one", FILE, RunConfig())
    before = files_under(tmp_path)
    with pytest.raises(SpecError) as error:
        claim(tmp_path / "one", file, config)
    check_line(error.value, identity["sweep"], "--out", *parts)
    assert files_under(tmp_path) == before
    assert differences(identity, identify(file, config)) in str(error.value)
    assert claim(tmp_path / "two", file, config)["sweep"] != identity["sweep"]


def test_sweeps_do_not_differ_in_when_and_where_they_were_started() -> None:
    one = identify(FILE, RunConfig())
    other = {**one, "provenance": {"python": "9"}, "description": "better words"}
    assert differences(one, other) == ""


@pytest.mark.parametrize("name", ["notes.txt", ".hidden", "space.py", "tables"])
def test_a_folder_that_holds_anything_else_is_refused_and_left_as_it_is(tmp_path: Path, name: str) -> None:
    (tmp_path / "one").mkdir()
    if name == "tables":
        (tmp_path / "one" / name).mkdir()
    else:
        (tmp_path / "one" / name).write_text("SPACE = 'mine'")
    before = files_under(tmp_path)
    with pytest.raises(SpecError) as error:
        claim(tmp_path / "one", FILE, RunConfig())
    check_line(error.value, "not empty", "--out")
    assert files_under(tmp_path) == before
    assert (tmp_path / "one" / name).exists()


def test_an_empty_folder_is_taken(tmp_path: Path) -> None:
    claim(tmp_path, FILE, RunConfig())
    assert sorted(files_under(tmp_path)) == ["lock", "space.py", "sweep.json"]


def test_a_folder_whose_driver_was_killed_while_it_was_made_is_taken(tmp_path: Path) -> None:
    (tmp_path / "space.py").write_text(SOURCE)
    (tmp_path / ".sweep.json.0a1b2c3d").write_text('{"swe')
    claim(tmp_path, FILE, RunConfig())
    assert json.loads((tmp_path / "sweep.json").read_text())["space"] == "mine"


@pytest.mark.parametrize("allowed", [0, 1])
@pytest.mark.parametrize("exists", [False, True])
def test_a_claim_on_a_full_disk_is_one_line_and_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, allowed: int, exists: bool
) -> None:
    calls = iter(range(allowed))

    def refuse(file: int) -> None:
        if next(calls, None) is None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    if exists:
        (tmp_path / "one").mkdir()
    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", refuse)
        with pytest.raises(SpecError) as error:
            claim(tmp_path / "one", FILE, RunConfig())
    check_line(error.value, str(tmp_path / "one"), "No space left")
    assert files_under(tmp_path) == {}
    claim(tmp_path / "one", FILE, RunConfig())


def test_a_claim_on_a_file_is_one_line_and_leaves_the_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("mine")
    for folder in (path, path / "below"):
        with pytest.raises(SpecError) as error:
            claim(folder, FILE, RunConfig())
        check_line(error.value, str(folder), "--out")
    assert files_under(tmp_path) == {"file": b"mine"}


HOLD = """
import sys
from pathlib import Path
from storage.lock import driving

with driving(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_a_second_driver_is_refused_and_told_who_is_the_first_until_that_one_is_dead(tmp_path: Path) -> None:
    first = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert first.stdout is not None
        assert first.stdout.readline() == "held\n"
        for _ in range(2):
            with pytest.raises(SpecError) as error, driving(tmp_path):
                pass
            check_line(error.value, str(tmp_path), getpass.getuser(), f"process {first.pid}")
    finally:
        first.kill()
        first.communicate()
    with driving(tmp_path), pytest.raises(SpecError) as error, driving(tmp_path):
        pass
    check_line(error.value, f"process {os.getpid()}")


def data_space(**changes: Any) -> Space:
    parameters = {"layer": Grid([0]), "dose": Grid([0.1])}
    return make_space(
        parameters, job="jobs.steer", objectives=[Objective(metric="effect", direction="maximize")], **changes
    )


def test_paths_of_datasets_become_absolute_and_names_of_the_projects_own_stay(tmp_path: Path) -> None:
    (tmp_path / "mine.jsonl").write_text("{}")
    (tmp_path / "tone_pairs").write_text("not meant")
    fixed = {"pairs": "mine.jsonl", "choices": "tone_choices", "vectors": "", "direction": "pca"}
    assert with_absolute_data(data_space(fixed=fixed), [tmp_path]).fixed == {
        **fixed,
        "pairs": str(tmp_path / "mine.jsonl"),
    }
    varied = data_space()
    varied = dataclasses.replace(
        varied, parameters={**varied.parameters, "pairs": Grid(["tone_pairs", "mine.jsonl"])}
    )
    assert with_absolute_data(varied, [tmp_path]).parameters["pairs"] == Grid(
        ["tone_pairs", str(tmp_path / "mine.jsonl")]
    )


def two_folders(place: Path, *names: str) -> tuple[Path, Path]:
    """A folder of spaces and one to work in, each with a dataset of its own and with `names`."""
    folders = (place / "spaces", place / "work")
    for folder in folders:
        folder.mkdir()
        for name in (f"{folder.name}.jsonl", *names):
            (folder / name).write_text(f'{{"positive": "in {folder.name}", "negative": "b"}}\n')
    return folders


def test_a_relative_dataset_is_looked_for_beside_the_space_and_then_in_the_working_folder(
    tmp_path: Path,
) -> None:
    spaces, work = two_folders(tmp_path, "both.jsonl")
    fixed = {"pairs": "both.jsonl", "combine": ["spaces.jsonl", "work.jsonl"]}
    assert with_absolute_data(data_space(fixed=fixed), [spaces, work]).fixed == {
        "pairs": str(spaces / "both.jsonl"),
        "combine": [str(spaces / "spaces.jsonl"), str(work / "work.jsonl")],
    }
    typed = with_fixed(data_space(), {"pairs": "both.jsonl"}, work)
    assert with_absolute_data(typed, [spaces, work]).fixed == {"pairs": str(work / "both.jsonl")}


def learned_space(**melbo: Any) -> Space:
    uses = [f"jobs.melbo{json.dumps({**melbo, 'radius': radius})}" for radius in (0.1, 0.2)]
    return make_space(
        {"learned": Grid(uses), "vector": Grid([0, 1])},
        job="jobs.generate",
        fixed={"layer": 7, "multiplier": 1.0},
        objectives=[Objective(metric="nll", direction="minimize")],
    )


def test_datasets_of_a_job_that_another_names_are_found_alike(tmp_path: Path) -> None:
    spaces, work = two_folders(tmp_path, "both.jsonl")
    found = with_absolute_data(learned_space(prompts="both.jsonl"), [spaces, work])
    path = str(spaces / "both.jsonl")
    assert found.parameters["learned"] == learned_space(prompts=path).parameters["learned"]
    assert data_grids(found) == {"learned": list(found.parameters["learned"].values)}
    own = learned_space(prompts="elicitation_prompts")
    assert with_absolute_data(own, [spaces, work]) == own
    use = 'jobs.melbo{"prompts": "work.jsonl"}'
    typed = with_fixed(make_space({"vector": Grid([0])}, job="jobs.generate"), {"learned": use}, work)
    assert typed.fixed["learned"] == f'jobs.melbo{{"prompts": "{work / "work.jsonl"}"}}'
    tuned = 'jobs.finetune{"examples": "both.jsonl", "epochs": 2}'
    assert located_use(tuned, [work]) == f'jobs.finetune{{"examples": "{work / "both.jsonl"}", "epochs": 2}}'
    assert located_use("jobs.melbo", [work]) == "jobs.melbo"
    with pytest.raises(SpecError, match="no dataset 'nowhere"):
        with_absolute_data(learned_space(prompts="nowhere.jsonl"), [spaces, work])


@pytest.mark.parametrize(
    ("space", "said"),
    [
        (learned_space(vectors=2), None),
        (learned_space(vectors=1), "vector=1; the set has the vectors 0 to 0"),
        (learned_space(target=31), "target=31 in jobs.melbo, which jobs.generate requires: the model"),
        (
            learned_space(vectors=33),
            "33 directions at right angles in jobs.melbo, which jobs.generate requires",
        ),
        (learned_space(vectors=33, orthogonality="none"), None),
        (
            make_space(
                {"factors": Grid([8, 40])},
                job="jobs.dct",
                fixed={"read": 4},
                objectives=[Objective(metric="nll", direction="minimize")],
            ),
            "40 directions at right angles: the residual stream of the model .* has 32; ask for that many",
        ),
    ],
)
def test_vectors_layers_and_directions_that_do_not_exist_are_refused(
    tmp_path: Path, space: Space, said: str | None
) -> None:
    (tmp_path / "config.json").write_text('{"num_hidden_layers": 30, "hidden_size": 32}')
    model = ModelRef(id=str(tmp_path))
    if said is None:
        check_space(space, model)
        return
    with pytest.raises(SpecError, match=said):
        check_space(space, model)


@pytest.mark.parametrize(
    ("name", "what"), [("nowhere.jsonl", "no dataset 'nowhere.jsonl'"), ("v.gguf", "no vector file 'v.gguf'")]
)
def test_a_dataset_or_vector_file_that_is_nowhere_is_refused_with_the_folders(
    tmp_path: Path, name: str, what: str
) -> None:
    spaces, work = two_folders(tmp_path)
    with pytest.raises(SpecError) as error:
        with_absolute_data(data_space(fixed={"combine": [name]}), [spaces, work])
    check_line(error.value, what, str(spaces), str(work))
    assert ("'tone_pairs'" in str(error.value)) == name.endswith(".jsonl")


def test_a_sweep_goes_on_with_the_datasets_that_it_found_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spaces, work = two_folders(tmp_path)
    (spaces / "mine.py").write_text(
        SOURCE.replace("tests.fake_job", "jobs.extract")
        .replace('"x": Grid([1, 2])', '"pairs": Grid(["work.jsonl", "spaces.jsonl"])')
        .replace('"total"', '"held_out_auc"')
    )
    file = load_space(spaces / "mine.py")
    file = file._replace(space=with_absolute_data(file.space, [spaces, work]))
    claim(tmp_path / "out", file, RunConfig())
    (spaces / "work.jsonl").write_text("another one of that name")
    monkeypatch.chdir(tmp_path)
    kept, _ = load_kept(tmp_path / "out")
    assert kept.space.parameters["pairs"] == Grid([str(work / "work.jsonl"), str(spaces / "spaces.jsonl")])


def test_the_copy_of_a_space_sees_the_place_of_the_original(tmp_path: Path) -> None:
    (tmp_path / "beside.txt").write_text("from beside")
    text = SOURCE.replace('"numbers"', '(Path(__file__).parent / "beside.txt").read_text()')
    (tmp_path / "mine.py").write_text("from pathlib import Path\n" + text)
    kept = tmp_path / "kept" / "space.py"
    kept.parent.mkdir()
    kept.write_text((tmp_path / "mine.py").read_text())
    found = load_space(kept, origin=tmp_path / "mine.py")
    assert (found.space.description, found.name) == ("from beside", "mine")


def test_a_model_folder_becomes_absolute_and_ids_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("model", "smollm2-135m"):
        (tmp_path / name).mkdir()
    assert make_config(model="model").model == str(tmp_path / "model")
    assert make_config(model="smollm2-135m").model == "smollm2-135m"
    assert make_config(model="some/id@revision").model == "some/id@revision"


@pytest.mark.parametrize(
    "uri", ["https://me:secret@host", "http://secret@host", "postgresql://me@host/runs?password=secret"]
)
def test_a_secret_is_not_taken_into_the_configuration(uri: str) -> None:
    with pytest.raises(SpecError) as error:
        make_config(mlflow=uri)
    check_line(error.value, "MLFLOW_TRACKING_PASSWORD")
    assert "secret" not in str(error.value)


def test_a_store_of_runs_means_the_same_from_anywhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert make_config(mlflow="sqlite:///runs.db").mlflow == f"sqlite:///{tmp_path / 'runs.db'}"
    for uri in ("https://host", "postgresql://me@host/runs", "sqlite:////absolute.db"):
        assert make_config(mlflow=uri).mlflow == uri


def test_trials_that_would_mean_other_work_now_are_refused(tmp_path: Path) -> None:
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text("one")
    planner = Planner(data_space(fixed={"pairs": str(pairs)}), RunConfig())
    params = {"layer": 0, "dose": 0.1}
    asked = Asked(trial=3, params=params, spec=planner.spec(params), seen=0, group=0)
    check_unchanged(planner, [asked])
    older = dataclasses.replace(asked, spec=dataclasses.replace(asked.spec, code="older"))
    with pytest.raises(SpecError) as error:
        check_unchanged(planner, [asked, older])
    check_line(error.value, "jobs.steer", "torch", "trial 3", "--out")
    pairs.write_text("two")
    with pytest.raises(SpecError) as error:
        check_unchanged(planner, [asked])
    check_line(error.value, str(pairs), "trial 3")


def test_who_drives_a_folder_is_known_while_it_is_driven(tmp_path: Path) -> None:
    assert driver(tmp_path) is None
    with driving(tmp_path):
        assert f"process {os.getpid()}" in (driver(tmp_path) or "")
    assert driver(tmp_path) is None


def test_a_lock_that_was_removed_protects_nothing_and_is_made_again(tmp_path: Path) -> None:
    with driving(tmp_path):
        (tmp_path / "lock").unlink()
        with driving(tmp_path), pytest.raises(SpecError), driving(tmp_path):
            pass


def test_of_two_first_drivers_the_second_is_refused_and_changes_nothing(tmp_path: Path) -> None:
    folder = tmp_path / "deep" / "one"
    with claimed(folder, FILE, RunConfig()):
        before = files_under(tmp_path)
        with pytest.raises(SpecError) as error, claimed(folder, FILE, RunConfig()):
            pass
        check_line(error.value, f"process {os.getpid()}")
        with pytest.raises(SpecError) as error, claimed(folder, FILE, RunConfig(seed=1)):
            pass
        assert files_under(tmp_path) == before


def test_a_folder_that_was_made_for_a_failed_claim_is_removed_with_its_parents(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "fsync", refuse_fsync)
    with pytest.raises(SpecError) as error, claimed(tmp_path / "deep" / "one", FILE, RunConfig()):
        pass
    check_line(error.value, "No space left", "--out")
    assert list(tmp_path.iterdir()) == []


def test_looking_whether_a_folder_is_free_writes_nothing(tmp_path: Path) -> None:
    check_free(tmp_path / "one", FILE, RunConfig())
    assert list(tmp_path.iterdir()) == []


def test_a_sweep_that_fails_leaves_its_folder_claimed(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), claimed(tmp_path / "one", FILE, RunConfig()):
        raise RuntimeError
    assert (tmp_path / "one" / "sweep.json").exists()
    assert driver(tmp_path / "one") is None


def test_a_driver_that_fails_lets_go_of_the_folder(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), driving(tmp_path):
        raise KeyboardInterrupt
    with driving(tmp_path):
        pass


def test_spaces_and_domains_cannot_be_changed() -> None:
    space = make_space()
    for thing, name in (
        (space, "trials"),
        (TOTAL, "metric"),
        (Grid([1]), "values"),
        (Int(low=0, high=1), "low"),
    ):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(thing, name, 3)

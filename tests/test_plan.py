"""What a sweep would take: counted as the sweep counts, timed on a real worker, refused if too large."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from jobs.engine.loading import load_replica, weight_bytes
from jobs.errors import DoesNotFit, OutOfMemory, SpecError
from jobs.spec import ModelRef
from orchestrator import plan as plan_module
from orchestrator import probe as probe_module
from orchestrator.config import RunConfig
from orchestrator.plan import make_plan
from orchestrator.planning import Planner
from orchestrator.probe import measure
from orchestrator.workload import workload
from search_spaces.base import Constraint, Grid, Int, Space, Stage
from storage.ledger import read_asked
from storage.query import open_sweep
from storage.store import Store
from tests import fake_job
from tests.command import refused, steersweep
from tests.models import tiny_model, tiny_tokenizer
from tests.sweeps import drive, make_space

CONFIG = RunConfig(model="no-model", workers=2, max_pack=4)
SPACES: dict[str, tuple[Space, int]] = {
    "grid": (make_space(), 12),
    "packs": (
        make_space(
            {"group": Grid(["a", "b", "c"]), "x": Int(low=1, high=10**6)}, sampler="random", trials=60
        ),
        60,
    ),
    "duplicates": (make_space({"x": Int(low=1, high=3)}, sampler="random", trials=20), 20),
    "prerequisites": (
        make_space({"x": Grid([1, 2, 3, 4]), "source": Grid([0, 5, 7])}, fixed={"source_depth": 1}),
        12,
    ),
}


@pytest.fixture(autouse=True)
def _no_git(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("orchestrator.folder.provenance", dict)


@pytest.mark.parametrize("name", SPACES)
def test_a_sweep_computes_what_was_counted(tmp_path: Path, name: str) -> None:
    space, trials = SPACES[name]
    found = workload(space, CONFIG, trials)
    drive(tmp_path, space, trials=trials)
    attempts = open_sweep(tmp_path).rows("SELECT job, spec, pack FROM attempts")
    assert set(found.works) == {row["job"] for row in attempts}
    for job, work in found.works.items():
        own = [row for row in attempts if row["job"] == job]
        assert work.specs == len(own)
        assert work.tokens == len(own)  # as the fake jobs say of their size
    packs = {row["pack"] for row in attempts if row["job"] == "tests.fake_job"}
    assert found.works["tests.fake_job"].packs == len(packs)
    assert {spec.id for pack in found.packs for spec in pack} == {
        each.spec.id for each in read_asked(tmp_path)
    }


def test_stages_count_by_the_share_that_they_let_pass() -> None:
    stages = [
        Stage(overrides={"y": 1.0}, keep=0.5),
        Stage(overrides={"y": 2.0}, constraints=[Constraint(metric="total", most=1)]),
    ]
    space = make_space({"x": Int(low=1, high=10**9)}, sampler="random", trials=10, stages=stages, bracket=5)
    [work] = workload(space, CONFIG, 10).works.values()
    assert work.specs == 10 + 5 + 5


def test_what_is_not_drawn_goes_on_like_the_second_half_of_what_is() -> None:
    fresh = make_space({"x": Int(low=1, high=10**9)}, sampler="random", trials=10_000)
    few = make_space({"x": Int(low=1, high=9)}, sampler="random", trials=10_000)
    needy = make_space({"x": Int(low=1, high=10**9), "source": Grid([3, 4])}, sampler="random", trials=10_000)
    assert workload(fresh, CONFIG, 10_000).works["tests.fake_job"].specs == pytest.approx(10_000, rel=0.01)
    assert workload(few, CONFIG, 10_000).works["tests.fake_job"].specs == 9
    assert workload(needy, CONFIG, 10_000).works["tests.fake_source"].first == 2


class Clock:
    """A clock for a worker whose loading takes 100 s, each pack 10 s, each row 1 s more."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        monkeypatch.setattr(probe_module.time, "perf_counter", lambda: self.now)
        real = fake_job.run

        def run(replica: Any, rows: Sequence[Any], context: Any) -> Any:
            self.now += 10 + len(rows)
            return real(replica, rows, context)

        monkeypatch.setattr(fake_job, "run", run)
        monkeypatch.setattr("jobs.engine.loading.load_replica", self.load)

    def load(self, ref: ModelRef, **options: Any) -> None:
        self.now += 100


def test_a_pack_costs_a_constant_and_its_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    Clock(monkeypatch)
    space = make_space({"x": Grid(list(range(1, 41)))})
    packs = workload(space, CONFIG, 40).packs
    found = measure(Planner(space, CONFIG), packs, CONFIG, 200)
    assert found.loading_seconds == 100
    pace = found.paces["tests.fake_job"]
    assert (pace.rows, pace.pack_seconds, pace.token_seconds) == (4, 10, 1)
    assert pace.row_bytes > 0


def test_without_time_for_a_pack_a_row_costs_what_it_costs_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    Clock(monkeypatch)
    space = make_space({"x": Grid(list(range(1, 41)))})
    found = measure(Planner(space, CONFIG), workload(space, CONFIG, 40).packs, CONFIG, 0.0)
    assert found.paces["tests.fake_job"][:3] == (1, 0, 11)


@pytest.fixture
def planned(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """Makes plans for a model that is not there."""
    monkeypatch.setattr("jobs.engine.loading.weight_bytes", lambda model: 2**30)
    monkeypatch.setattr(plan_module, "check_space", lambda space, model: None)
    return Clock(monkeypatch)


def plan_of(space: Space, tmp_path: Path, **changes: Any) -> Mapping[str, Any]:
    config = RunConfig(**CONFIG.model_dump() | {"memory_gib": 0.5} | changes)
    return make_plan(space, config, out=tmp_path / "sweep", seconds=200)


@pytest.mark.usefixtures("planned")
def test_the_plan_is_what_the_clock_says_of_all_packs(tmp_path: Path) -> None:
    space = make_space({"x": Grid(list(range(1, 41)))})
    found = plan_of(space, tmp_path)
    assert (found["trials"], found["prerequisites"], found["tokens"]) == (40, {}, 40)
    assert found["worker_hours"] == pytest.approx((found["packs"] * 10 + 40) / 3600)
    assert found["hours"] == pytest.approx(100 / 3600 + found["worker_hours"] / 2)
    assert found["trials_in_budget"] is None
    assert found["weights_gib"] == 1
    half = plan_of(space, tmp_path, budget_hours=found["hours"] / 2)
    assert half["trials_in_budget"] == 20
    assert not (tmp_path / "sweep").exists()


@pytest.mark.usefixtures("planned")
def test_what_does_not_fit_is_refused_before_anything_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, planned: Clock
) -> None:
    space = make_space()
    with pytest.raises(DoesNotFit, match=r"3 workers .* 1\.00 GiB and 9000\.00 GiB .* this machine has"):
        plan_of(space, tmp_path, workers=3, memory_gib=9000)
    assert planned.now == 0
    monkeypatch.setattr(plan_module, "_free_disk", lambda out: 1)
    with pytest.raises(DoesNotFit, match="12 trials take about"):
        plan_of(space, tmp_path)


@pytest.mark.usefixtures("planned")
@pytest.mark.parametrize(("mode", "error"), [("oom", OutOfMemory), ("raise", SpecError), ("fail", SpecError)])
def test_a_trial_that_cannot_run_is_named(tmp_path: Path, mode: str, error: type[Exception]) -> None:
    with pytest.raises(error, match=f"tests.fake_job .*{mode}.*told"):
        plan_of(make_space({"x": Grid([1, 2])}, fixed={"mode": mode}), tmp_path)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_weights_are_counted_without_loading_them(tmp_path: Path, name: str, dtype: str) -> None:
    tiny_model(name).float().save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    ref = ModelRef(id=str(tmp_path), dtype=dtype)
    loaded = load_replica(ref).model
    expected = sum(weight.numel() * weight.element_size() for weight in loaded.parameters())
    assert weight_bytes(ref) == expected


@pytest.mark.ray
def test_the_command_plans_what_it_then_runs(place: Path, finished: dict[str, Any]) -> None:
    command = ["plan", place / "space.py", "--set", f"model={place / 'model'}", "--seconds", "5"]
    done = steersweep(*command, "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["trials"] == finished["trials"] == 9
    attempts = Store(place / "finished").rows("attempts")
    first = [row for row in attempts if row["job"] != "jobs.steer"]
    assert found["prerequisites"]["jobs.extract"] == len(first)
    assert 0 < found["hours"] < 1
    said = steersweep(*command).stdout
    assert said.startswith("9 trials in")
    too_large = steersweep(*command, "--set", "memory_gib=100000")
    assert (too_large.returncode, too_large.stdout) == (3, "")
    assert "give fewer workers" in too_large.stderr
    assert "no space file" in refused("plan", place / "absent.py")

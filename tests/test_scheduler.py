"""The scheduler's decisions, in examples and under any order of results, deaths and splits."""

import ast
import inspect
from collections import Counter
from collections.abc import Callable, Iterator

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from orchestrator import scheduler as scheduler_module
from orchestrator.scheduler import Pack, Scheduler, Task


def trial(spec: str, *, key: str | None = "k", needs: tuple[str, ...] = ()) -> Task:
    return Task(spec=spec, job="jobs.fake", pack_key=key, needs=frozenset(needs), is_trial=True)


def source(spec: str, *, needs: tuple[str, ...] = ()) -> Task:
    return Task(spec=spec, job="jobs.source", pack_key=None, needs=frozenset(needs), is_trial=False)


def make(*, workers: int = 1, trials: int = 16, max_pack: int = 4, max_attempts: int = 3) -> Scheduler:
    return Scheduler(workers=workers, trials=trials, max_pack=max_pack, max_attempts=max_attempts)


def specs(pack: Pack | None) -> list[str]:
    assert pack is not None
    return [task.spec for task in pack.tasks]


def packs_of(scheduler: Scheduler) -> Iterator[Pack]:
    """Packs until nothing can run, each of whose tasks settles at once."""
    while (pack := scheduler.next_pack()) is not None:
        yield pack
        for task in pack.tasks:
            scheduler.settle(task.spec)


def test_a_scheduler_without_tasks_has_nothing_to_do() -> None:
    scheduler = make()
    assert scheduler.next_pack() is None
    assert (scheduler.ready, scheduler.blocked, scheduler.has_work) == (0, 0, False)


def test_prerequisites_go_first_and_once_however_many_need_them() -> None:
    scheduler = make()
    scheduler.add(trial("free"), settled=[])
    scheduler.add(source("s"), settled=[])
    for number in range(3):
        scheduler.add(trial(f"t{number}", needs=("s",)), settled=[])
    assert (scheduler.ready, scheduler.blocked) == (1, 3)
    order = [specs(pack) for pack in packs_of(scheduler)]
    assert order[0] == ["s"]
    assert sorted(sum(order, [])) == ["free", "s", "t0", "t1", "t2"]


def test_what_needs_a_prerequisite_waits_while_the_rest_runs() -> None:
    scheduler = make()
    scheduler.add(source("s"), settled=[])
    scheduler.add(trial("t", needs=("s",)), settled=[])
    scheduler.add(trial("free"), settled=[])
    assert specs(scheduler.next_pack()) == ["s"]
    assert specs(scheduler.next_pack()) == ["free"]
    assert scheduler.next_pack() is None
    scheduler.settle("s")
    assert specs(scheduler.next_pack()) == ["t"]


def test_a_task_waits_for_the_last_of_its_prerequisites_but_not_for_settled_ones() -> None:
    scheduler = make()
    for name in ("a", "b"):
        scheduler.add(source(name), settled=[])
    scheduler.add(trial("t", needs=("a", "b", "stored")), settled=["stored"])
    assert specs(scheduler.next_pack()) == ["a"]
    assert specs(scheduler.next_pack()) == ["b"]
    scheduler.settle("b")
    assert scheduler.next_pack() is None
    scheduler.settle("a")
    assert specs(scheduler.next_pack()) == ["t"]


def test_a_trial_can_be_the_prerequisite_of_another() -> None:
    scheduler = make()
    scheduler.add(trial("baseline"), settled=[])
    scheduler.add(trial("steered", needs=("baseline",)), settled=[])
    assert [specs(pack) for pack in packs_of(scheduler)] == [["baseline"], ["steered"]]


def test_a_pack_holds_tasks_of_one_key_in_the_order_they_came() -> None:
    scheduler = make(trials=64, max_pack=8)
    for number in range(12):
        scheduler.add(trial(f"t{number}", key="ab"[number % 2]), settled=[])
    first, second = scheduler.next_pack(), scheduler.next_pack()
    assert specs(first) == ["t0", "t2", "t4", "t6", "t8", "t10"]
    assert specs(second) == ["t1", "t3", "t5", "t7", "t9", "t11"]


def test_tasks_without_a_key_are_never_packed() -> None:
    scheduler = make(trials=64, max_pack=8)
    for number in range(5):
        scheduler.add(trial(f"t{number}", key=None), settled=[])
    assert [specs(pack) for pack in packs_of(scheduler)] == [[f"t{number}"] for number in range(5)]


@pytest.mark.parametrize("workers", [1, 2, 5])
@pytest.mark.parametrize("max_pack", [1, 4, 16])
def test_a_pack_takes_a_quarter_of_a_workers_share_of_what_is_left(workers: int, max_pack: int) -> None:
    trials = 200
    scheduler = make(workers=workers, trials=trials, max_pack=max_pack)
    for number in range(trials):
        scheduler.add(trial(f"t{number}"), settled=[])
    left = trials
    while left:
        wanted = max(1, min(max_pack, left // (4 * workers)))
        assert scheduler.pack_limit() == wanted
        assert len(specs(scheduler.next_pack())) == min(wanted, left)
        left -= min(wanted, left)
    assert scheduler.next_pack() is None


def test_trials_that_end_without_running_count_as_done_for_the_size_of_packs() -> None:
    scheduler = make(trials=40, max_pack=100)
    assert scheduler.pack_limit() == 10
    for _ in range(20):
        scheduler.no_new_work()
    assert scheduler.pack_limit() == 5
    scheduler.add(source("s"), settled=[])
    for number in range(12):
        scheduler.add(trial(f"t{number}", needs=("s",)), settled=[])
    scheduler.next_pack()
    assert scheduler.pack_limit() == 5, "a prerequisite is no trial"
    scheduler.fail("s")
    assert scheduler.pack_limit() == 2


def test_a_lost_pack_runs_again_in_the_same_company_then_is_given_up() -> None:
    scheduler = make(max_attempts=3)
    for number in range(8):
        scheduler.add(trial(f"t{number}"), settled=[])
    first = scheduler.next_pack()
    assert first is not None
    assert scheduler.lost(first)
    second = scheduler.next_pack()
    assert second == Pack(id=first.id, tasks=first.tasks, attempt=2)
    assert scheduler.lost(second)
    third = scheduler.next_pack()
    assert third == Pack(id=first.id, tasks=first.tasks, attempt=3)
    assert not scheduler.lost(third)
    assert not set(specs(scheduler.next_pack())) & set(specs(first))


def test_what_a_lost_pack_had_finished_does_not_run_again() -> None:
    scheduler = make()
    for number in range(4):
        scheduler.add(trial(f"t{number}"), settled=[])
    pack = scheduler.next_pack()
    assert pack is not None
    scheduler.settle("t1")
    scheduler.fail("t2")
    assert scheduler.lost(pack)
    assert specs(scheduler.next_pack()) == ["t0", "t3"]


def test_a_pack_that_was_lost_with_everything_finished_does_not_run_again() -> None:
    scheduler = make(max_attempts=2)
    scheduler.add(trial("t"), settled=[])
    pack = scheduler.next_pack()
    assert pack is not None
    scheduler.settle("t")
    assert scheduler.lost(pack)
    assert scheduler.next_pack() is None
    assert not scheduler.has_work


def test_a_pack_that_raised_runs_again_one_by_one_and_a_lone_task_does_not() -> None:
    scheduler = make()
    for number in range(4):
        scheduler.add(trial(f"t{number}"), settled=[])
    pack = scheduler.next_pack()
    assert pack is not None
    scheduler.settle("t0")
    assert scheduler.split(pack)
    alone = [scheduler.next_pack() for _ in range(3)]
    assert [specs(one) for one in alone] == [["t1"], ["t2"], ["t3"]]
    assert len({one.id for one in [pack, *alone] if one is not None}) == 4
    assert alone[0] is not None
    assert not scheduler.split(alone[0])
    assert scheduler.next_pack() is None


def test_what_runs_again_goes_before_what_is_new() -> None:
    scheduler = make()
    for number in range(8):
        scheduler.add(trial(f"t{number}"), settled=[])
    pack = scheduler.next_pack()
    assert pack is not None
    scheduler.add(source("s"), settled=[])
    scheduler.lost(pack)
    assert specs(scheduler.next_pack()) == specs(pack)


def test_a_failing_prerequisite_drops_all_that_need_it_and_nothing_else() -> None:
    scheduler = make()
    scheduler.add(source("a"), settled=[])
    scheduler.add(source("b", needs=("a",)), settled=[])
    scheduler.add(source("other"), settled=[])
    scheduler.add(trial("direct", needs=("a",)), settled=[])
    scheduler.add(trial("indirect", needs=("b",)), settled=[])
    scheduler.add(trial("both", needs=("b", "other")), settled=[])
    scheduler.add(trial("spared", needs=("other",)), settled=[])
    assert specs(scheduler.next_pack()) == ["a"]
    dropped = scheduler.fail("a")
    assert sorted(dropped) == ["b", "both", "direct", "indirect"]
    assert not any(scheduler.knows(spec) for spec in ["a", *dropped])
    assert [specs(pack) for pack in packs_of(scheduler)] == [["other"], ["spared"]]
    assert not scheduler.has_work


def test_a_task_of_two_failing_prerequisites_is_dropped_once() -> None:
    scheduler = make()
    for name in ("a", "b"):
        scheduler.add(source(name), settled=[])
    scheduler.add(trial("t", needs=("a", "b")), settled=[])
    assert scheduler.fail("a") == ["t"]
    assert scheduler.fail("b") == []


def test_a_spec_is_known_from_being_added_until_it_ends() -> None:
    scheduler = make()
    assert not scheduler.knows("t")
    scheduler.add(trial("t"), settled=[])
    assert scheduler.knows("t")
    scheduler.next_pack()
    assert scheduler.knows("t")
    scheduler.settle("t")
    assert not scheduler.knows("t")


def test_decisions_depend_on_nothing_but_the_calls() -> None:
    # No clock, no chance, no I/O can be had from these modules; sets are not walked in the packs' order.
    tree = ast.parse(inspect.getsource(scheduler_module))
    imported = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert imported == {"collections", "collections.abc", "dataclasses"}
    assert not [node for node in ast.walk(tree) if isinstance(node, ast.Import)]

    def decide() -> list[list[str]]:
        scheduler = make(trials=30, workers=2)
        scheduler.add(source("s"), settled=[])
        for number in range(30):
            scheduler.add(trial(f"t{number}", key="ab"[number % 3 % 2], needs=("s",) * (number % 2)), settled=[])
        return [specs(pack) for pack in packs_of(scheduler)]

    assert decide() == decide()


SOURCES = 4
KEYS = st.sampled_from(["a", "b", None])


class SchedulerMachine(RuleBasedStateMachine):
    """A driver that keeps its own account of every task, by plain bookkeeping, and compares."""

    @initialize(
        workers=st.integers(1, 3),
        trials=st.integers(1, 40),
        max_pack=st.integers(1, 5),
        max_attempts=st.integers(1, 3),
    )
    def start(self, workers: int, trials: int, max_pack: int, max_attempts: int) -> None:
        self.scheduler = make(workers=workers, trials=trials, max_pack=max_pack, max_attempts=max_attempts)
        self.workers, self.max_pack, self.max_attempts = workers, max_pack, max_attempts
        self.left = trials
        self.unasked = trials
        self.tasks: dict[str, Task] = {}
        self.ended: Counter[str] = Counter()
        self.artifacts: set[str] = set()
        self.running: list[Pack] = []
        self.again: list[Pack] = []
        self.dispatched: Counter[str] = Counter()

    @property
    def open(self) -> set[str]:
        return set(self.tasks) - set(self.ended)

    def _is_blocked(self, spec: str) -> bool:
        return not self.tasks[spec].needs <= self.artifacts

    def _fresh(self, *, trials: bool) -> list[str]:
        """Tasks that could run and have never been in a pack."""
        return [
            spec
            for spec in self.open
            if not self.dispatched[spec] and not self._is_blocked(spec) and self.tasks[spec].is_trial == trials
        ]

    def _add(self, task: Task) -> None:
        self.tasks[task.spec] = task
        self.scheduler.add(task, settled=sorted(task.needs & self.artifacts))

    def _plan_source(self, number: int) -> bool:
        """Add a source and those it needs; False if one of them has ended without an artifact."""
        spec = f"s{number}"
        needs = (f"s{number - 1}",) if number % 2 else ()
        if spec in self.artifacts or spec in self.open:
            return True
        if spec in self.ended or (needs and not self._plan_source(number - 1)):
            return False
        self._add(source(spec, needs=needs))
        return True

    def _end(self, spec: str, *, with_artifact: bool) -> None:
        self.ended[spec] += 1
        if with_artifact:
            self.artifacts.add(spec)
            self.scheduler.settle(spec)
            return
        lost = {spec}
        while more := {
            other for other in self.open - lost if self.tasks[other].needs & lost and self._is_blocked(other)
        }:
            lost |= more
        dropped = self.scheduler.fail(spec)
        assert sorted(dropped) == sorted(lost - {spec})
        self.ended.update(dropped)
        self.left -= sum(self.tasks[other].is_trial for other in dropped)

    @precondition(lambda self: self.unasked)
    @rule(key=KEYS, need=st.none() | st.integers(0, SOURCES - 1))
    def ask(self, key: str | None, need: int | None) -> None:
        self.unasked -= 1
        if need is not None and not self._plan_source(need):
            self.left -= 1
            self.scheduler.no_new_work()
            return
        self._add(trial(f"t{self.unasked}", key=key, needs=() if need is None else (f"s{need}",)))

    @precondition(lambda self: self.unasked)
    @rule()
    def ask_for_what_is_known(self) -> None:
        self.unasked -= 1
        self.left -= 1
        self.scheduler.no_new_work()

    @precondition(lambda self: len(self.running) < self.workers)
    @rule()
    def dispatch(self) -> None:
        limit = max(1, min(self.max_pack, self.left // (4 * self.workers)))
        assert self.scheduler.pack_limit() == limit
        sources, trials = self._fresh(trials=False), self._fresh(trials=True)
        pack = self.scheduler.next_pack()
        if pack is None:
            assert not self.again
            assert not sources
            assert not trials
            return
        inside = [task.spec for task in pack.tasks]
        assert inside
        assert len(inside) == len(set(inside))
        assert not set(inside) & {task.spec for other in self.running for task in other.tasks}
        assert set(inside) <= self.open
        assert not any(self._is_blocked(spec) for spec in inside)
        if self.again:
            wanted = self.again.pop(0)
            assert (pack.tasks, pack.attempt) == (wanted.tasks, wanted.attempt)
        else:
            assert pack.attempt == 1
            assert set(inside) <= set(sources or trials), "prerequisites first"
            assert len({task.pack_key for task in pack.tasks}) == 1
            assert len(inside) == 1 or len(inside) <= limit
            assert len(inside) == 1 or (pack.tasks[0].pack_key is not None and pack.tasks[0].is_trial)
            self.left -= sum(task.is_trial for task in pack.tasks)
        self.dispatched.update(inside)
        self.running.append(pack)

    def _take(self, data: st.DataObject) -> Pack:
        return self.running[data.draw(st.integers(0, len(self.running) - 1), label="worker")]

    def _unfinished(self, pack: Pack) -> tuple[Task, ...]:
        return tuple(task for task in pack.tasks if task.spec in self.open)

    @precondition(lambda self: self.running)
    @rule(data=st.data(), with_artifact=st.booleans())
    def report(self, data: st.DataObject, with_artifact: bool) -> None:
        pack = self._take(data)
        rows = self._unfinished(pack)
        if rows:
            row = rows[data.draw(st.integers(0, len(rows) - 1), label="row")]
            self._end(row.spec, with_artifact=with_artifact)
        if len(rows) <= 1:
            self.running.remove(pack)

    @precondition(lambda self: self.running)
    @rule(data=st.data())
    def die(self, data: st.DataObject) -> None:
        pack = self._take(data)
        self.running.remove(pack)
        rows = self._unfinished(pack)
        if not self.scheduler.lost(pack):
            assert pack.attempt == self.max_attempts
            for row in rows:
                self._end(row.spec, with_artifact=False)
        elif rows:
            assert pack.attempt < self.max_attempts
            self.again.append(Pack(id=pack.id, tasks=rows, attempt=pack.attempt + 1))

    @precondition(lambda self: self.running)
    @rule(data=st.data())
    def break_down(self, data: st.DataObject) -> None:
        pack = self._take(data)
        self.running.remove(pack)
        rows = self._unfinished(pack)
        if self.scheduler.split(pack):
            assert len(pack.tasks) > 1
            self.again += [Pack(id=-1, tasks=(row,)) for row in rows]
        else:
            assert len(pack.tasks) == 1
            for row in rows:
                self._end(row.spec, with_artifact=False)

    @invariant()
    def accounts_agree(self) -> None:
        if not hasattr(self, "scheduler"):
            return
        assert set(self.ended.values()) <= {1}
        assert all(self.scheduler.knows(spec) == (spec in self.open) for spec in self.tasks)
        assert self.scheduler.has_work == bool(self.open)
        assert self.scheduler.ready == len(self._fresh(trials=True))
        assert self.scheduler.blocked == sum(map(self._is_blocked, self.open))
        assert all(times <= 2 * self.max_attempts for times in self.dispatched.values())

    def teardown(self) -> None:
        """From wherever it stands, a driver whose workers live brings everything to its end."""
        if not hasattr(self, "scheduler"):
            return
        for _ in range(3 * len(self.tasks) + 1):
            for pack in list(self.running):
                for row in self._unfinished(pack):
                    self._end(row.spec, with_artifact=True)
                self.running.remove(pack)
            self.dispatch()
        assert not self.running
        assert not self.open, "a task was lost"
        assert set(self.ended) == set(self.tasks)
        self.accounts_agree()


TestAnyOrderOfResultsDeathsAndSplits: Callable[[], None] = SchedulerMachine.TestCase
TestAnyOrderOfResultsDeathsAndSplits.settings = settings(max_examples=120, stateful_step_count=60)  # type: ignore[attr-defined]

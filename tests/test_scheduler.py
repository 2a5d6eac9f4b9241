"""The scheduler's decisions, in examples and under any order of results, deaths and splits."""

import ast
import inspect
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from orchestrator import scheduler as scheduler_module
from orchestrator.scheduler import Kind, Pack, Scheduler, Task, pack_limit

FAKE = Kind("jobs.fake", "m")
SOURCE = Kind("jobs.source", "m")


def trial(spec: str, *, key: str | None = "k", needs: Sequence[str] = (), kind: Kind = FAKE) -> Task:
    return Task(spec=spec, kind=kind, pack_key=key, needs=frozenset(needs), is_trial=True)


def source(spec: str, *, needs: Sequence[str] = ()) -> Task:
    return Task(spec=spec, kind=SOURCE, pack_key=None, needs=frozenset(needs), is_trial=False)


def specs(pack: Pack | None) -> list[str]:
    assert pack is not None
    return [task.spec for task in pack.tasks]


def packs_of(scheduler: Scheduler) -> Iterator[Pack]:
    """Packs until nothing can run; each one's tasks settle before the next is asked for."""
    while (pack := scheduler.next_pack()) is not None:
        yield pack
        for task in pack.tasks:
            scheduler.settle(task.spec)


@pytest.fixture
def scheduler() -> Scheduler:
    return Scheduler(max_attempts=3)


def test_a_scheduler_without_tasks_has_nothing_to_do(scheduler: Scheduler) -> None:
    assert scheduler.next_pack() is None
    assert (scheduler.runnable, scheduler.blocked) == (0, 0)


@pytest.mark.parametrize("workers", [1, 2, 5])
@pytest.mark.parametrize("max_pack", [1, 4, 16])
def test_a_pack_is_half_of_a_workers_share_of_what_is_left_but_at_least_one(
    workers: int, max_pack: int
) -> None:
    for unasked in range(300):
        limit = pack_limit(unasked=unasked, workers=workers, max_pack=max_pack)
        assert 1 <= limit <= max_pack
        assert limit == max_pack or limit == 1 or limit <= unasked / (2 * workers) < limit + 1
    assert limit == min(max_pack, 299 // (2 * workers))


def test_the_packs_of_a_whole_sweep_get_smaller_towards_its_end() -> None:
    unasked, limits = 500, []
    while unasked > 0:
        limits.append(min(unasked, pack_limit(unasked=unasked, workers=2, max_pack=16)))
        unasked -= limits[-1]
    assert limits[0] == 16
    assert limits[-4:] == [1] * 4
    assert limits == sorted(limits, reverse=True)


def test_prerequisites_go_first_and_once_however_many_need_them(scheduler: Scheduler) -> None:
    scheduler.add([trial("free")], settled=())
    scheduler.add([source("s")], settled=())
    scheduler.add([trial(f"t{number}", key=None, needs="s") for number in range(3)], settled=())
    assert (scheduler.runnable, scheduler.blocked) == (2, 3)
    order = [specs(pack) for pack in packs_of(scheduler)]
    assert order[0] == ["s"]
    assert sorted(spec for pack in order for spec in pack) == ["free", "s", "t0", "t1", "t2"]


def test_what_needs_a_prerequisite_waits_while_the_rest_runs(scheduler: Scheduler) -> None:
    scheduler.add([source("s")], settled=())
    scheduler.add([trial("t", needs="s")], settled=())
    scheduler.add([trial("free")], settled=())
    assert specs(scheduler.next_pack()) == ["s"]
    assert specs(scheduler.next_pack()) == ["free"]
    assert scheduler.next_pack() is None
    scheduler.settle("s")
    assert specs(scheduler.next_pack()) == ["t"]


def test_a_pack_waits_for_the_last_of_its_prerequisites_but_not_for_settled_ones(
    scheduler: Scheduler,
) -> None:
    scheduler.add([source("a")], settled=())
    scheduler.add([source("b")], settled=())
    scheduler.add([trial("t", needs=["a", "stored"]), trial("u", needs=["b", "stored"])], settled=["stored"])
    assert specs(scheduler.next_pack()) == ["a"]
    assert specs(scheduler.next_pack()) == ["b"]
    scheduler.settle("b")
    assert scheduler.next_pack() is None
    scheduler.settle("a")
    assert specs(scheduler.next_pack()) == ["t", "u"]


def test_tasks_added_together_share_packs_by_key_in_the_order_they_came(scheduler: Scheduler) -> None:
    scheduler.add([trial(f"t{number}", key="ab"[number % 2]) for number in range(6)], settled=())
    assert specs(scheduler.next_pack()) == ["t0", "t2", "t4"]
    assert specs(scheduler.next_pack()) == ["t1", "t3", "t5"]
    assert scheduler.next_pack() is None


def test_a_pack_has_as_many_tasks_as_asked_for_at_most(scheduler: Scheduler) -> None:
    scheduler.add([trial(f"t{number}") for number in range(5)], settled=(), most=2)
    assert [specs(pack) for pack in packs_of(scheduler)] == [["t0", "t1"], ["t2", "t3"], ["t4"]]


def test_tasks_added_apart_never_share_a_pack(scheduler: Scheduler) -> None:
    # Otherwise what rides with what, and with it the last bits of a result, would depend on timing.
    for number in range(3):
        scheduler.add([trial(f"t{number}")], settled=())
    assert [specs(pack) for pack in packs_of(scheduler)] == [["t0"], ["t1"], ["t2"]]


def test_tasks_without_a_key_are_never_packed(scheduler: Scheduler) -> None:
    scheduler.add([trial(f"t{number}", key=None) for number in range(3)], settled=())
    assert [specs(pack) for pack in packs_of(scheduler)] == [["t0"], ["t1"], ["t2"]]


@pytest.mark.parametrize("order", [1, -1])
def test_a_trial_that_a_trial_beside_it_needs_goes_ahead(scheduler: Scheduler, order: int) -> None:
    tasks = [trial("baseline"), trial("steered", needs=["baseline"]), trial("other")][::order]
    scheduler.add(tasks, settled=())
    packs = [specs(pack) for pack in packs_of(scheduler)]
    assert ["baseline"] in packs
    assert packs.index(["baseline"]) < next(index for index, pack in enumerate(packs) if "steered" in pack)


def test_a_trial_that_is_needed_through_another_task_does_not_ride_with_who_needs_it(
    scheduler: Scheduler,
) -> None:
    # steered needs middle, middle needs baseline: in one pack, baseline would wait for itself.
    scheduler.add([source("middle", needs=["baseline"])], settled=())
    scheduler.add([trial("baseline"), trial("steered", needs=["middle"])], settled=())
    assert [specs(pack) for pack in packs_of(scheduler)] == [["baseline"], ["middle"], ["steered"]]


def test_a_lost_pack_runs_again_in_the_same_company_then_one_by_one_then_is_given_up(
    scheduler: Scheduler,
) -> None:
    scheduler.add([trial(f"t{number}") for number in range(4)], settled=())
    first = scheduler.next_pack()
    assert first is not None
    assert scheduler.lost(first)
    second = scheduler.next_pack()
    assert second == Pack(id=first.id, tasks=first.tasks, attempt=2)
    assert scheduler.lost(second)
    alone = list(packs_of(scheduler))
    assert [specs(pack) for pack in alone] == [["t0"], ["t1"], ["t2"], ["t3"]]
    assert {pack.attempt for pack in alone} == {3}
    assert len({pack.id for pack in [first, *alone]}) == 5
    assert not any(scheduler.lost(pack) for pack in alone)
    assert scheduler.next_pack() is None


def test_a_lone_task_keeps_its_pack_through_all_attempts(scheduler: Scheduler) -> None:
    scheduler.add([trial("t")], settled=())
    pack = scheduler.next_pack()
    for attempt in (2, 3):
        assert pack is not None
        assert scheduler.lost(pack)
        pack = scheduler.next_pack()
        assert pack is not None
        assert (pack.id, pack.attempt) == (1, attempt)


def test_what_a_lost_pack_had_finished_does_not_run_again(scheduler: Scheduler) -> None:
    scheduler.add([trial(f"t{number}") for number in range(4)], settled=())
    pack = scheduler.next_pack()
    assert pack is not None
    scheduler.settle("t1")
    scheduler.fail("t2")
    assert scheduler.lost(pack)
    assert specs(scheduler.next_pack()) == ["t0", "t3"]


def test_a_pack_that_was_lost_with_everything_finished_does_not_run_again(scheduler: Scheduler) -> None:
    scheduler.add([trial("t")], settled=())
    pack = scheduler.next_pack()
    assert pack is not None
    scheduler.settle("t")
    assert scheduler.lost(pack)
    assert scheduler.next_pack() is None


def test_a_pack_that_raised_runs_again_one_by_one_and_a_lone_task_does_not(scheduler: Scheduler) -> None:
    scheduler.add([trial(f"t{number}") for number in range(4)], settled=())
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


def test_what_runs_again_goes_before_what_is_new(scheduler: Scheduler) -> None:
    scheduler.add([trial("t0"), trial("t1")], settled=())
    pack = scheduler.next_pack()
    assert pack is not None
    scheduler.add([trial("u")], settled=())
    scheduler.add([source("s")], settled=())
    scheduler.lost(pack)
    assert [specs(pack) for pack in packs_of(scheduler)] == [["t0", "t1"], ["s"], ["u"]]


def test_jobs_take_turns_however_many_packs_of_one_wait(scheduler: Scheduler) -> None:
    kinds = [Kind("a", "m")] * 6 + [Kind("b", "m")] * 2 + [Kind("c", "m")]
    for number, kind in enumerate(kinds):
        scheduler.add([trial(f"{kind.job}{number}", kind=kind)], settled=())
    assert [specs(pack)[0][0] for pack in packs_of(scheduler)] == list("abcabaaaa")


def test_a_worker_is_given_packs_of_another_model_only_when_its_own_has_none(scheduler: Scheduler) -> None:
    for number in range(6):
        scheduler.add([trial(f"t{number}", kind=Kind("jobs.fake", "mn"[number % 2]))], settled=())
    scheduler.add([replace(source("s"), kind=Kind("jobs.source", "m"))], settled=())
    taken = [scheduler.next_pack("n") for _ in range(7)]
    assert [specs(pack)[0] for pack in taken] == ["t1", "t3", "t5", "s", "t0", "t2", "t4"]


def test_a_pack_that_does_not_fit_is_halved_and_later_ones_are_cut(
    scheduler: Scheduler,
) -> None:
    scheduler.add([trial(f"t{number}") for number in range(7)], settled=())
    large = scheduler.next_pack()
    assert large is not None
    assert scheduler.halve(large)
    half = scheduler.next_pack()
    assert specs(half) == ["t0", "t1", "t2"]
    assert half is not None
    assert scheduler.halve(half)
    assert scheduler.limits == {FAKE: 1}
    scheduler.add([trial(f"u{number}") for number in range(2)], settled=())
    scheduler.add([trial(f"v{number}", kind=SOURCE) for number in range(2)], settled=())
    order = [specs(pack) for pack in packs_of(scheduler)]
    assert sorted(order[:7]) == [[f"t{number}"] for number in range(7)]
    assert sorted(order[7:]) == [["u0"], ["u1"], ["v0", "v1"]]
    alone = Pack(id=99, tasks=(trial("w"),))
    assert not scheduler.halve(alone)


def test_a_machine_that_was_taken_away_costs_no_attempt(scheduler: Scheduler) -> None:
    scheduler.add([trial("a"), trial("b")], settled=())
    for _ in range(9):
        pack = scheduler.next_pack()
        assert pack is not None
        assert (specs(pack), pack.attempt) == (["a", "b"], 1)
        assert scheduler.lost(pack, counts=False)


def test_a_failing_prerequisite_drops_all_that_need_it_and_nothing_else(scheduler: Scheduler) -> None:
    scheduler.add([source("a")], settled=())
    scheduler.add([source("b", needs="a")], settled=())
    scheduler.add([source("c")], settled=())
    group = [("direct", "a"), ("indirect", "b"), ("both", "bc"), ("spared", "c"), ("free", "")]
    scheduler.add([trial(spec, needs=needs) for spec, needs in group], settled=())
    assert specs(scheduler.next_pack()) == ["a"]
    dropped = scheduler.fail("a")
    assert sorted(dropped) == ["b", "both", "direct", "indirect"]
    assert not any(scheduler.knows(spec) for spec in ["a", *dropped])
    assert [specs(pack) for pack in packs_of(scheduler)] == [["c"], ["spared", "free"]]
    assert scheduler.blocked == 0


def test_a_task_of_two_failing_prerequisites_is_dropped_once(scheduler: Scheduler) -> None:
    scheduler.add([source("a")], settled=())
    scheduler.add([source("b")], settled=())
    scheduler.add([trial("t", needs="ab")], settled=())
    assert scheduler.fail("a") == ["t"]
    assert scheduler.fail("b") == []


def test_a_spec_is_known_from_being_added_until_it_ends(scheduler: Scheduler) -> None:
    assert not scheduler.knows("t")
    scheduler.add([trial("t")], settled=())
    assert scheduler.knows("t")
    scheduler.next_pack()
    assert scheduler.knows("t")
    scheduler.settle("t")
    assert not scheduler.knows("t")


def test_decisions_depend_on_nothing_but_the_calls() -> None:
    # Neither clock nor chance nor I/O is at hand: this is all that the module can reach.
    tree = ast.parse(inspect.getsource(scheduler_module))
    imported = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert imported == {"collections", "collections.abc", "dataclasses", "typing"}
    assert not [node for node in ast.walk(tree) if isinstance(node, ast.Import)]

    def decide() -> list[list[str]]:
        scheduler = Scheduler(max_attempts=3)
        scheduler.add([source("s")], settled=())
        tasks = [trial(f"t{number}", key="abc"[number % 3], needs="s" * (number % 2)) for number in range(30)]
        scheduler.add(tasks, settled=())
        return [specs(pack) for pack in packs_of(scheduler)]

    assert decide() == decide()


NODES = 14
"""Specs of the machine below; each may need any of those before it."""


class SchedulerMachine(RuleBasedStateMachine):
    """A driver that keeps its own account of every task, by plain bookkeeping, and compares."""

    @initialize(data=st.data(), workers=st.integers(1, 3), max_attempts=st.integers(1, 3))
    def start(self, data: st.DataObject, workers: int, max_attempts: int) -> None:
        self.scheduler = Scheduler(max_attempts=max_attempts)
        self.workers, self.max_attempts = workers, max_attempts
        below = [
            st.sets(st.sampled_from(range(node)), max_size=2) if node else st.just(set())
            for node in range(NODES)
        ]
        self.needs = [data.draw(one) if data.draw(st.booleans()) else set() for one in below]
        self.keys = data.draw(st.lists(st.sampled_from(["a", "b", None]), min_size=NODES, max_size=NODES))
        self.tasks: dict[str, Task] = {}
        self.company: dict[str, frozenset[str]] = {}
        self.ended: Counter[str] = Counter()
        self.artifacts: set[str] = set()
        self.running: list[Pack] = []
        self.again: list[Pack] = []
        self.dispatched: Counter[str] = Counter()
        self.limit = NODES

    @property
    def open(self) -> set[str]:
        return set(self.tasks) - set(self.ended)

    def _groups(self, *, trials: bool) -> list[set[str]]:
        """Packs that no worker was given yet, without what was dropped from them."""
        fresh = {
            frozenset(self.company[spec] & self.open)
            for spec in self.open
            if not self.dispatched[spec] and self.tasks[spec].is_trial == trials
        }
        return [set(group) for group in fresh]

    def _can_run(self, group: set[str]) -> bool:
        return all(self.tasks[spec].needs <= self.artifacts for spec in group)

    def _make(self, node: int, *, is_trial: bool) -> Task:
        needs = frozenset(f"n{need}" for need in self.needs[node])
        key = self.keys[node]
        return Task(spec=f"n{node}", kind=FAKE, pack_key=key, needs=needs, is_trial=is_trial)

    def _is_hopeless(self, node: int) -> bool:
        """Whether something under it has ended without an artifact."""
        return any(
            f"n{need}" not in self.artifacts
            and (f"n{need}" in self.ended or (f"n{need}" not in self.tasks and self._is_hopeless(need)))
            for need in self.needs[node]
        )

    def _plan(self, node: int, *, is_trial: bool) -> Task:
        """As a driver does: what is needed and not known is added first, alone."""
        for need in sorted(self.needs[node]):
            if f"n{need}" not in self.tasks:
                task = self._plan(need, is_trial=False)
                self.company[task.spec] = frozenset([task.spec])
                self.scheduler.add([task], settled=self.artifacts)
        task = self._make(node, is_trial=is_trial)
        self.tasks[task.spec] = task
        return task

    @rule(nodes=st.lists(st.integers(0, NODES - 1), min_size=1, max_size=5, unique=True))
    def ask(self, nodes: list[int]) -> None:
        tasks = []
        for node in nodes:
            if f"n{node}" in self.tasks:
                continue
            if self._is_hopeless(node):
                self.tasks[f"n{node}"] = self._make(node, is_trial=True)
                self.ended[f"n{node}"] += 1
                continue
            tasks.append(self._plan(node, is_trial=True))
        needed = {need for spec in self.open for need in self.tasks[spec].needs}
        for task in tasks:
            riders = {
                other.spec for other in tasks if other.pack_key == task.pack_key and other.spec not in needed
            }
            alone = task.pack_key is None or task.spec in needed
            self.company[task.spec] = frozenset([task.spec] if alone else riders)
        self.scheduler.add(tasks, settled=self.artifacts)

    @precondition(lambda self: len(self.running) < self.workers)
    @rule()
    def dispatch(self) -> None:
        sources = [group for group in self._groups(trials=False) if self._can_run(group)]
        trials = [group for group in self._groups(trials=True) if self._can_run(group)]
        pack = self.scheduler.next_pack()
        if pack is None:
            assert not self.again
            assert not sources
            assert not trials
            return
        inside = specs(pack)
        assert inside
        assert len(inside) == len(set(inside))
        assert not set(inside) & {task.spec for other in self.running for task in other.tasks}
        assert set(inside) <= self.open
        assert self._can_run(set(inside))
        if self.again:
            wanted = self.again.pop(0)
            fits, rest = wanted.tasks[: self.limit], wanted.tasks[self.limit :]
            assert (pack.tasks, pack.attempt) == (fits, wanted.attempt)
            if rest:
                self.again.insert(0, Pack(id=-1, tasks=rest, attempt=wanted.attempt))
        else:
            assert pack.attempt == 1
            [whole] = [group for group in (sources or trials) if set(inside) <= group]
            in_order = [spec for spec in self.tasks if spec in whole]
            assert inside == in_order[: self.limit], "prerequisites first, then packs as they were added"
            for part in (inside, in_order[self.limit :]):
                self.company |= {spec: frozenset(part) for spec in part}
            assert len({task.pack_key for task in pack.tasks}) == 1
            assert len(inside) == 1 or pack.tasks[0].pack_key is not None
        self.dispatched.update(inside)
        self.running.append(pack)

    def _end(self, spec: str, *, with_artifact: bool) -> None:
        self.ended[spec] += 1
        if with_artifact:
            self.artifacts.add(spec)
            self.scheduler.settle(spec)
            return
        lost = {spec}
        while more := {other for other in self.open - lost if self.tasks[other].needs & lost}:
            lost |= more
        dropped = self.scheduler.fail(spec)
        assert sorted(dropped) == sorted(lost - {spec})
        self.ended.update(dropped)

    def _take(self, data: st.DataObject) -> Pack:
        return self.running[data.draw(st.integers(0, len(self.running) - 1), label="worker")]

    def _unfinished(self, pack: Pack) -> tuple[Task, ...]:
        return tuple(task for task in pack.tasks if task.spec in self.open)

    @precondition(lambda self: self.running)
    @rule(data=st.data(), with_artifact=st.sampled_from([True, True, False]))
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
            attempt = pack.attempt + 1
            groups = [(row,) for row in rows] if attempt == self.max_attempts else [rows]
            self.again += [Pack(id=-1, tasks=group, attempt=attempt) for group in groups]

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

    @precondition(lambda self: self.running)
    @rule(data=st.data())
    def overflow(self, data: st.DataObject) -> None:
        pack = self._take(data)
        self.running.remove(pack)
        rows = self._unfinished(pack)
        if self.scheduler.halve(pack):
            half = len(pack.tasks) // 2
            self.limit = min(self.limit, half)
            self.again += [
                Pack(id=-1, tasks=rows[start : start + half]) for start in range(0, len(rows), half)
            ]
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
        waiting = [*self._groups(trials=False), *self._groups(trials=True)]
        assert self.scheduler.runnable == len(self.again) + sum(map(self._can_run, waiting))
        assert self.scheduler.blocked == sum(not self._can_run(one) for one in self._groups(trials=True))
        assert all(times <= 6 * self.max_attempts for times in self.dispatched.values())

    def teardown(self) -> None:
        """From wherever it stands, a driver whose workers live brings everything to its end."""
        if not hasattr(self, "scheduler"):
            return
        for _ in range(2 * len(self.tasks) + 2):
            for pack in list(self.running):
                for row in self._unfinished(pack):
                    self._end(row.spec, with_artifact=True)
                self.running.remove(pack)
            self.dispatch()
        assert not self.running
        assert not self.open, "a task was lost, or waits for itself"
        self.accounts_agree()


class TestAnyOrderOfResultsDeathsAndSplits(SchedulerMachine.TestCase):
    settings = settings(max_examples=100, stateful_step_count=40)

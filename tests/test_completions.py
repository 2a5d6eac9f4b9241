"""Completions that are read again, row by row and together; and steering that did not act as it was to."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest

from jobs import steer
from jobs.engine.decoding import Continuation
from jobs.engine.interventions import Add
from jobs.engine.replica import Replica
from jobs.engine.sites import Place
from jobs.engine.tables import RowTables, row_tables
from jobs.reading import completions as completing
from jobs.reading import readout
from jobs.reading.completions import NOT_FINITE, Reply, flaw_of, missed
from jobs.reading.rereading import reread, reread_together
from jobs.resolve import make_params
from jobs.spec import Status
from tests.models import HIDDEN, Artifacts, tiny_replica

ARCHITECTURE = "llama"
UPPER, LOWER = Place(3, "after"), Place(1, "mlp")


class TestMissed:
    @pytest.mark.parametrize(
        ("fired", "intended"),
        [({}, {}), ({UPPER: 4}, {UPPER: 4}), ({UPPER: 0}, {}), ({LOWER: 2, UPPER: 1}, {UPPER: 1, LOWER: 2})],
    )
    def test_nothing_is_said_where_all_is_as_it_was_to_be(self, fired: Any, intended: Any) -> None:
        assert missed(fired, intended) is None

    @pytest.mark.parametrize(
        ("fired", "intended", "said"),
        [
            ({}, {UPPER: 4}, "at layer 3, site after, 0 of 4 tokens were changed"),
            ({UPPER: 5}, {UPPER: 4}, "at layer 3, site after, 5 of 4 tokens were changed"),
            (
                {UPPER: 2, LOWER: 1},
                {LOWER: 7, UPPER: 3},
                "at layer 1, site mlp, 1 of 7 tokens; at layer 3, site after, 2 of 3 tokens were changed",
            ),
        ],
    )
    def test_each_place_is_named_with_its_numbers(self, fired: Any, intended: Any, said: str) -> None:
        assert said in str(missed(fired, intended))

    def test_logits_that_are_not_finite_come_first(self) -> None:
        assert flaw_of(Continuation([], None, False, {}, {UPPER: 4})) == NOT_FINITE
        assert "0 of 4" in str(flaw_of(Continuation([], None, True, {}, {UPPER: 4})))
        assert flaw_of(Continuation([], None, True, {UPPER: 4}, {UPPER: 4})) is None


def losing(real: Any, layer: int) -> Any:
    """A decoder that reports one token fewer at a layer than were changed."""

    def generate(*arguments: Any) -> Iterator[tuple[int, Continuation]]:
        for index, found in real(*arguments):
            fired = {place: number - (place.layer == layer) for place, number in found.fired.items()}
            yield index, found._replace(fired=fired)

    return generate


class TestJobs:
    @pytest.mark.parametrize(("job", "module"), [("jobs.generate", completing), ("jobs.steer", readout)])
    def test_a_row_that_is_not_changed_where_it_was_to_be_fails_and_its_mates_do_not(
        self, job: str, module: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(module, "generate", losing(module.generate, 1))
        rows = [make_params(job, {"layer": layer, "dose": 0.5, "max_new_tokens": 2}) for layer in (1, 2)]
        if job == "jobs.steer":
            few = {"choices_select": 1, "choices_report": 1, "prompts_select": 1, "prompts_report": 1}
            rows = [steer.Params(layer=row.layer, dose=0.5, max_new_tokens=2, **few) for row in rows]
        lost, mate = Artifacts(tiny_replica(ARCHITECTURE)).run(job, rows)
        assert (lost.status, mate.status) == (Status.FAILED, Status.COMPLETED)
        assert "the steering did not act as it was to: at layer 1, site after" in str(lost.reason)


class TestReread:
    @pytest.fixture
    def replica(self) -> Replica:
        return tiny_replica(ARCHITECTURE)

    @pytest.fixture
    def tables(self, replica: Replica) -> RowTables:
        vector = np.linspace(-1, 1, HIDDEN)
        return row_tables(replica, [[], *([Add(layer=layer, vector=2 * vector)] for layer in (0, 2))])

    @pytest.fixture
    def replies(self, replica: Replica) -> list[Reply]:
        texts = [("Why?", "So."), ("How is it?", ""), ("Tell me.", "A long story about a cat.")]
        return [
            Reply(replica.encode(prompt), replica.encode_continuation(text) if text else [], text)
            for prompt, text in texts
        ]

    @pytest.mark.parametrize("token_budget", [1, 60, 8192])
    def test_rows_read_together_give_what_each_gives_alone(
        self, replica: Replica, tables: RowTables, replies: list[Reply], token_budget: int
    ) -> None:
        alone = {row: reread(replica, replies, tables, [row] * len(replies)) for row in range(3)}
        replica.token_budget = token_budget
        finished = ((row, replies) for row in (2, 0, 1))
        together = dict(reread_together(replica, finished, tables))
        assert list(together) == [2, 0, 1]
        for row, found in together.items():
            np.testing.assert_allclose(
                [each[:3] for each in found], [each[:3] for each in alone[row]], atol=1e-9
            )
        assert alone[0][0].kl == pytest.approx(0, abs=1e-9) != alone[1][0].kl

    def test_rows_are_handed_over_once_a_batch_is_full_and_share_its_passes(
        self, replica: Replica, tables: RowTables, replies: list[Reply]
    ) -> None:
        assert replica.cache_bytes  # measured by a pass
        passes: list[int] = []
        replica.model.register_forward_pre_hook(lambda model, inputs: passes.append(1))
        taken: list[int] = []

        def finished() -> Iterator[tuple[int, Sequence[Reply]]]:
            for row in range(3):
                taken.append(row)
                yield row, replies

        list(reread_together(replica, finished(), tables))
        assert len(passes) == 2  # the unsteered one and the steered one
        replica.token_budget = 1
        taken.clear()
        handed_over = [len(taken) for _ in reread_together(replica, finished(), tables)]
        assert handed_over == [1, 2, 3]

    def test_a_row_without_completions_gives_none(
        self, replica: Replica, tables: RowTables, replies: list[Reply]
    ) -> None:
        found = dict(reread_together(replica, iter([(0, []), (1, replies)]), tables))
        assert found[0] == []
        assert len(found[1]) == len(replies)
        assert dict(reread_together(replica, iter([]), tables)) == {}

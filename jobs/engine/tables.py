"""Interventions as tables: one row of a table a configuration, so that any mixture rides in one batch.

What a row does, where and to which tokens is data, never code.
R rows (configurations), S sequences, T tokens, K spans, D hidden.
"""

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from jobs.engine.interventions import ENDLESS, Intervention, Span, Terms, terms
from jobs.engine.replica import Replica
from jobs.engine.sites import Place, attach
from jobs.errors import SpecError

Counts = dict[Place, int]
"""Place -> number of tokens that were changed there."""


@dataclass(frozen=True, slots=True)
class Table:
    """At one place, at most one intervention of each row, in the form of `interventions.Terms`.

    Attributes:
        add_RKD: What is added, the model's dtype; zero where a row has no intervention here.
        unit_RD: What is projected out, float32 or wider; None if no row projects.
        replaces_R: Whether the row drops h; None if none does.
        spans_RK4: The fields of each `Span`, int64; one that is not used is empty.
        everywhere: Whether every row that acts here acts at every token.
    """

    add_RKD: Tensor
    unit_RD: Tensor | None
    replaces_R: Tensor | None
    spans_RK4: Tensor
    everywhere: bool

    def take(self, rows: Sequence[int]) -> "Table":
        """The rows of the sequences of a batch."""
        return self._at(torch.tensor(rows, device=self.add_RKD.device))

    def load(self, other: "Table") -> None:
        """Write the rows of a table of the same kind over the first ones of this."""
        for mine, theirs in (
            (self.add_RKD, other.add_RKD),
            (self.unit_RD, other.unit_RD),
            (self.replaces_R, other.replaces_R),
            (self.spans_RK4, other.spans_RK4),
        ):
            if mine is not None and theirs is not None:
                mine[: len(theirs)] = theirs

    def first(self, number: int) -> "Table":
        """The first rows."""
        return self if number == len(self.add_RKD) else self._at(slice(number))

    def _at(self, index: Tensor | slice) -> "Table":
        return Table(
            self.add_RKD[index],
            None if self.unit_RD is None else self.unit_RD[index],
            None if self.replaces_R is None else self.replaces_R[index],
            self.spans_RK4[index],
            self.everywhere,
        )


Tables = Mapping[Place, Sequence[Table]]
"""What acts at each place, in its order."""


@dataclass(frozen=True, slots=True)
class RowTables:
    """What the configurations of a pack do, ready for a replica.

    Attributes:
        tables: Place -> tables, in the order in which they act.
        shared: For each row, how many blocks from the bottom put out what they would put out in the
            unsteered model while the prompt is read, hooks on the last of them left aside; one more than
            there are blocks if the prompt is not changed at all.
        untouched: For each row, how many blocks from the bottom put out what they would put out in the
            unsteered model for the same text, new tokens included; counted as `shared` is.
        positions: For each row, the positions in the prompt that each of its interventions names.
        same: For each row, the first row that does the same.
        spans: For each row, the tokens that are changed at each place.
    """

    tables: Tables
    shared: Sequence[int]
    untouched: Sequence[int]
    positions: Sequence[Sequence[tuple[int, ...]]]
    same: Sequence[int]
    spans: Sequence[Mapping[Place, Sequence[Span]]]

    @property
    def rows(self) -> int:
        """Number of configurations."""
        return len(self.shared)

    def take(self, rows: Sequence[int]) -> Tables:
        """The tables of a batch whose sequence s belongs to row `rows[s]`."""
        return {place: [table.take(rows) for table in stack] for place, stack in self.tables.items()}

    def intended(self, row: int, prompt_tokens: int, tokens: int) -> Counts:
        """At how many of a text's first `tokens` the interventions at each place are to change it."""
        found = {
            place: sum(len(span.among(prompt_tokens, tokens)) for span in spans)
            for place, spans in self.spans[row].items()
        }
        return {place: number for place, number in found.items() if number}

    def check_prompt(self, row: int, tokens: int) -> None:
        """Raises SpecError if the row names a position that such a prompt has not, or one twice."""
        for positions in self.positions[row]:
            if wrong := [at for at in positions if not -tokens <= at < tokens]:
                raise SpecError(
                    f"row {row}: positions {wrong} of a prompt that has {-tokens} to {tokens - 1}"
                )
            if len({at % tokens for at in positions}) < len(positions):
                raise SpecError(
                    f"row {row}: positions {positions} name a token of a {tokens}-token prompt twice"
                )


def row_tables(replica: Replica, rows: Sequence[Sequence[Intervention]]) -> RowTables:
    """Tables of a pack: row `i` of each holds what configuration `i` does there.

    Raises:
        SpecError: If an intervention cannot be meant; the message names the row.
    """
    stacks: dict[Place, list[dict[int, Terms]]] = {}
    shared, untouched, contents, spans = [], [], [], []
    for row, changes in enumerate(rows):
        depth = lowest = replica.layers + 1
        content: list[Hashable] = []
        acting: dict[Place, list[Span]] = {}
        for change in changes:
            try:
                found = terms(change, hidden=replica.hidden_size, layers=replica.layers)
            except SpecError as error:
                raise SpecError(f"row {row}: {error}") from error
            if found.nothing:
                continue
            place = Place(change.layer, change.site)
            stack = stacks.setdefault(place, [])
            free = next((table for table in stack if row not in table), None)
            if free is None:
                stack.append(free := {})
            free[row] = found
            content.append((place, found.content))
            acting.setdefault(place, []).extend(found.spans)
            own = change.layer + (change.site == "after")
            lowest = min(lowest, own)
            if change.tokens != "generated":
                depth = min(depth, own)
        shared.append(depth)
        untouched.append(lowest)
        contents.append(tuple(content))
        spans.append(acting)
    tables = {
        place: [_table(replica, place, table, len(rows)) for table in stack]
        for place, stack in stacks.items()
    }
    positions = [
        [change.tokens for change in changes if isinstance(change.tokens, tuple)] for changes in rows
    ]
    first: dict[Hashable, int] = {}
    same = [first.setdefault(content, row) for row, content in enumerate(contents)]
    return RowTables(tables, shared, untouched, positions, same, spans)


def _table(replica: Replica, place: Place, rows: Mapping[int, Terms], number: int) -> Table:
    device = next(replica.blocks[place.layer].parameters()).device
    spans = max(len(found.spans) for found in rows.values())
    add = torch.zeros((number, spans, replica.hidden_size), dtype=torch.float64)
    unit = torch.zeros((number, replica.hidden_size), dtype=torch.float64)
    replaces = torch.zeros(number, dtype=torch.bool)
    fields = torch.zeros((number, spans, 4), dtype=torch.int64)
    for row, found in rows.items():
        add[row, : len(found.spans)] = torch.from_numpy(found.add_KD)
        unit[row] = torch.from_numpy(found.unit_D)
        replaces[row] = found.replaces
        fields[row, : len(found.spans)] = torch.tensor(found.spans, dtype=torch.int64)
    dtype = replica.model.dtype
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    return Table(
        add.to(device, dtype),
        unit.to(device, wide) if bool(unit.any()) else None,
        replaces.to(device) if bool(replaces.any()) else None,
        fields.to(device),
        everywhere=all(found.spans == (Span(0, ENDLESS),) for found in rows.values()),
    )


class Steering:
    """The interventions of one batch at work.

    Args:
        tables: One row a sequence.
        prompt_tokens: Length of each sequence's prompt.

    Attributes:
        tables: Place -> tables, in the order in which they act.
        fired: Place -> for each of its tables, tokens at which each sequence was changed, shape (S,).
    """

    def __init__(self, tables: Tables, prompt_tokens: Sequence[int]) -> None:
        self.tables = tables
        prompt_S = torch.tensor(prompt_tokens)
        self._prompt_S = {place: prompt_S.to(stack[0].add_RKD.device) for place, stack in tables.items()}
        self._sequences = len(prompt_tokens)
        self.fired = {
            place: [
                torch.zeros(len(prompt_tokens), dtype=torch.int64, device=table.add_RKD.device)
                for table in stack
            ]
            for place, stack in tables.items()
        }

    def change(self, place: Place, h_STD: Tensor, positions_ST: Tensor) -> Tensor:
        """The hidden state after all interventions at a place.

        Args:
            place: Where it is.
            h_STD: The hidden state; some models' feed-forward parts give it as (S x T, D). Inside a block
                that computes only the first sequences it is theirs.
            positions_ST: Position of each token in its text, from 0; -1 marks padding.
        """
        shape = h_STD.shape
        number = h_STD.numel() // (positions_ST.shape[1] * shape[-1])
        positions_ST = positions_ST[:number].to(h_STD.device)
        h_STD = h_STD.view(*positions_ST.shape, shape[-1])
        for whole, fired_S in zip(self.tables[place], self.fired[place], strict=True):
            table = whole.first(number)
            inside_STK = _inside(table, positions_ST, self._prompt_S[place])
            fired_S[:number] += inside_STK.any(dim=2).sum(dim=1)
            h_STD = _changed(h_STD, table, None if table.everywhere else inside_STK)
        return h_STD.view(shape)

    def at(self, replica: Replica, place: Place) -> Callable[[Tensor], Tensor]:
        """What changes the hidden state of the pass that is running."""
        return lambda h_STD: self.change(place, h_STD, replica.positions_ST)

    @property
    def all_fired(self) -> list[Tensor]:
        """The counters of all tables."""
        return [fired_S for stack in self.fired.values() for fired_S in stack]

    def load(self, tables: Tables, prompt_tokens: Sequence[int]) -> None:
        """Let the first sequences be others, in the same memory, and begin to count at 0.

        Args:
            tables: One row a sequence, of the tables that this was made from.
            prompt_tokens: Length of each one's prompt.
        """
        for place, stack in self.tables.items():
            self._prompt_S[place][: len(prompt_tokens)] = torch.tensor(prompt_tokens)
            for mine, theirs in zip(stack, tables[place], strict=True):
                mine.load(theirs)
        for fired_S in self.all_fired:
            fired_S.zero_()

    def counts(self) -> list[Counts]:
        """For each sequence, at how many tokens all tables of a place together have changed it."""
        sums = {place: torch.stack(stack).sum(dim=0).tolist() for place, stack in self.fired.items()}
        return [{place: found[index] for place, found in sums.items()} for index in range(self._sequences)]


def _inside(table: Table, positions_ST: Tensor, prompt_S: Tensor) -> Tensor:
    """Which tokens each span holds, shape (S, T, K)."""
    prompt_S11 = prompt_S[: len(positions_ST), None, None]
    start, stop, from_prompt, to_prompt = table.spans_RK4[:, None].unbind(dim=-1)
    position_ST1 = positions_ST[..., None]
    after = position_ST1 >= start + from_prompt * prompt_S11
    before = position_ST1 < stop + to_prompt * prompt_S11
    return after & before & (position_ST1 >= 0)


def _changed(h_STD: Tensor, table: Table, inside_STK: Tensor | None) -> Tensor:
    """`inside_STK` is None where every token counts: padding is changed too, which nothing ever reads."""
    if inside_STK is None:
        add_STD = table.add_RKD[:, :1]
    else:
        add_STD = torch.einsum("stk,skd->std", inside_STK.to(h_STD.dtype), table.add_RKD)
    changed = h_STD
    if table.unit_RD is not None:
        wide = h_STD.to(table.unit_RD.dtype)
        along = (wide * table.unit_RD[:, None]).sum(dim=-1, keepdim=True) * table.unit_RD[:, None]
        if inside_STK is not None:
            along = along * inside_STK.any(dim=2, keepdim=True)
        changed = (wide - along).to(h_STD.dtype)
    if table.replaces_R is not None:
        dropped = table.replaces_R[:, None, None]
        if inside_STK is not None:
            dropped = dropped & inside_STK.any(dim=2, keepdim=True)
        changed = changed.masked_fill(dropped, 0)
    return changed + add_STD


@contextmanager
def steered(replica: Replica, steering: Steering) -> Iterator[None]:
    """Inside the block every pass is changed; `replica.positions_ST` tells which tokens it holds."""
    handles: list[Any] = []
    try:
        for place in steering.tables:
            handles.append(attach(replica, place, steering.at(replica, place)))
        yield
    finally:
        for handle in handles:
            handle.remove()

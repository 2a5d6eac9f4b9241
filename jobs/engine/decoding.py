"""Complete prompts under many configurations at once, with a key-value cache.

Sequences that end leave the batch at once and waiting ones take their place, so that the batch stays
full to the end.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from jobs.engine.cache import KeyValues
from jobs.engine.groups import check_work, groups, once
from jobs.engine.lanes import side_by_side
from jobs.engine.lockstep import in_order, skipped
from jobs.engine.memory import share
from jobs.engine.prefill import Prefill
from jobs.engine.replica import Replica
from jobs.engine.sampling import Sampling, choose
from jobs.engine.skipping import first_sequences, skipping
from jobs.engine.static import StaticStep, can_stay
from jobs.engine.tables import Counts, RowTables, Steering, steered

# A CPU gains nothing from more; a GPU reads its weights once for all of them.
_SLOTS_ON_CPU, _SLOTS_ON_GPU = 160, 512
_SPARE_TOKENS = 32
"""The time axis is longer than any sequence, so that old tokens are dropped from it seldom."""


class Work(NamedTuple):
    """A prompt to be completed under a configuration.

    Attributes:
        prompt: Which prompt.
        row: Which row of the tables.
        seed: Of the random numbers, where tokens are drawn.
    """

    prompt: int
    row: int
    seed: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Decoding:
    """How completions are made.

    Attributes:
        max_new_tokens: Most tokens of a completion, at least 1.
        sampling: How tokens are chosen.
        stops: Whether a stop token ends a completion; without it every one gets all its tokens.
        slots: Most sequences of the batch, of each lane's on a CPU; None takes 160 there and 512 on a GPU.
        first_logits: Whether the logits of the first new token are handed over.
    """

    max_new_tokens: int
    sampling: Sampling = field(default_factory=Sampling)
    stops: bool = True
    slots: int | None = None
    first_logits: bool = False

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1 or (self.slots is not None and self.slots < 1):
            raise ValueError(
                f"max_new_tokens={self.max_new_tokens}, slots={self.slots}; each takes 1 or more"
            )


class Continuation(NamedTuple):
    """What follows a prompt.

    Attributes:
        tokens: New tokens, up to and without the first stop token.
        first_logits_V: Logits of the first new token, the model's dtype; None if not asked for.
        finite: Whether all logits were finite; if not, the tokens end before the first that were not.
        fired: What was changed, the prompt's tokens included.
        intended: What was to be changed among all tokens that were read; equal to `fired` unless a model
            runs its blocks in a way that hooks do not see.
    """

    tokens: list[int]
    first_logits_V: Tensor | None
    finite: bool
    fired: Counts
    intended: Counts


def generate(
    replica: Replica,
    prompts: Sequence[Sequence[int]],
    tables: RowTables,
    work: Sequence[Work],
    decoding: Decoding,
) -> Iterator[tuple[int, Continuation]]:
    """Completions of all work, each with its index, as soon as it is finished.

    On a CPU lanes may go on between one completion and the next; see `lanes.side_by_side`.

    Args:
        replica: The model.
        prompts: Token ids; they may differ in length.
        tables: The configurations.
        work: Which prompts to complete under which of them.
        decoding: How.

    Raises:
        SpecError: If a text would be longer than the model's context, or a configuration names a position
            that its prompt has not; nothing has run then.
        OutOfMemory: If a single row does not fit.
    """
    pairs = [(each.prompt, each.row) for each in work]
    check_work(replica, prompts, tables, pairs, new_tokens=decoding.max_new_tokens)

    def run(lane: Replica, left: list[int]) -> Iterator[tuple[int, Continuation]]:
        for index, found in _generate(lane, prompts, tables, [work[index] for index in left], decoding):
            yield left[index], found

    draws = decoding.sampling.temperature > 0
    keys = [(each.prompt, tables.same[each.row], each.seed if draws else 0) for each in work]
    of_work = [each.prompt for each in work]
    return once(keys, lambda firsts: side_by_side(replica, of_work, firsts, run))


@torch.inference_mode()
def _generate(
    replica: Replica,
    prompts: Sequence[Sequence[int]],
    tables: RowTables,
    work: Sequence[Work],
    decoding: Decoding,
) -> Iterator[tuple[int, Continuation]]:
    longest = max(len(prompts[each.prompt]) for each in work)
    batch = _Batch(replica, tables, decoding, longest=longest, sequences=len(work))
    pairs = [(each.prompt, each.row) for each in work]
    # A batch is refilled by parts, so that it is never far from full and never filled one by one. All that
    # is done to a prompt comes together: its sequences have much in common.
    together = max(Counter(prompt for prompt, _ in pairs).values())
    waiting = groups(replica, prompts, tables, pairs, most=min(batch.free, max(together, batch.free // 4)))
    group = next(waiting, None)
    while group is not None or batch.live:
        while group is not None and len(group.members) <= batch.free:
            slots = [_Slot.of(index, work[index], prompts[work[index].prompt]) for index in group.members]
            batch.join(slots, group.prompts.prefill(group.work))
            yield from batch.leave()
            group = next(waiting, None)
        if batch.live:
            batch.step()
            yield from batch.leave()


@dataclass(slots=True)
class _Slot:
    """A sequence of the batch."""

    index: int
    row: int
    prompt: int
    prompt_tokens: int
    text: list[int]
    generator: torch.Generator
    new: list[int] = field(default_factory=list)
    fired: Counts = field(default_factory=dict)
    first_logits_V: Tensor | None = None
    finite: bool = True
    full: bool = False
    ended: bool = False

    @staticmethod
    def of(index: int, work: Work, prompt: Sequence[int]) -> "_Slot":
        generator = torch.Generator().manual_seed(work.seed)
        return _Slot(index, work.row, work.prompt, len(prompt), list(prompt), generator)

    def count(self, counts: Counts) -> None:
        for place, number in counts.items():
            self.fired[place] = self.fired.get(place, 0) + number

    def result(self, tables: RowTables) -> Continuation:
        # The last token of a completion of full length is not read.
        intended = tables.intended(self.row, self.prompt_tokens, len(self.text) - self.full)
        fired = {place: number for place, number in self.fired.items() if number}
        return Continuation(self.new, self.first_logits_V, self.finite, fired, intended)


class _Batch:
    """The sequences that are being completed; the live ones are the first slots of the cache."""

    def __init__(
        self, replica: Replica, tables: RowTables, decoding: Decoding, *, longest: int, sequences: int
    ) -> None:
        self._replica = replica
        self._tables = tables
        self._decoding = decoding
        self._longest = longest
        capacity = longest + decoding.max_new_tokens + _SPARE_TOKENS
        fitting = share(replica, "batch") // (capacity * replica.cache_bytes)
        slots = decoding.slots or (_SLOTS_ON_CPU if replica.device.type == "cpu" else _SLOTS_ON_GPU)
        self._most = max(1, min(slots, fitting, sequences))
        self._cache = KeyValues(replica.layers, slots=self._most, capacity=capacity)
        self._cache.length = longest
        self._mask = torch.zeros((self._most, capacity), dtype=torch.int64, device=replica.device)
        self._slots: list[_Slot] = []
        self._stays = can_stay(replica)
        self._static: StaticStep | None = None
        self._counting: Steering | StaticStep | None = None

    @property
    def live(self) -> int:
        """Number of sequences."""
        return len(self._slots)

    @property
    def free(self) -> int:
        """Number of slots without one."""
        return self._most - self.live

    def join(self, slots: Sequence[_Slot], found: Prefill) -> None:
        """Take in sequences whose prompts were read, and choose their first tokens."""
        self._count()
        places = range(self.live, self.live + len(slots))
        self._cache.take_in(places, found.cache)
        stop = self._cache.length
        self._mask[places.start : places.stop] = 0
        self._mask[places.start : places.stop, stop - found.mask_ST.shape[1] : stop] = found.mask_ST
        self._slots += slots
        for slot, counts, logits_V in zip(slots, found.fired, found.logits_SV, strict=True):
            slot.count(counts)
            slot.first_logits_V = logits_V.clone() if self._decoding.first_logits else None
        self._choose(slots, found.logits_SV)

    def _choose(self, slots: Sequence[_Slot], logits_SV: Tensor) -> None:
        tokens = choose(
            logits_SV,
            self._decoding.sampling,
            texts=[slot.text for slot in slots],
            generators=[slot.generator for slot in slots],
        )
        for slot, token in zip(slots, tokens, strict=True):
            slot.finite = token is not None
            if token is None or (self._decoding.stops and token in self._replica.stop_ids):
                slot.ended = True
                continue
            slot.text.append(token)
            slot.new.append(token)
            slot.full = slot.ended = len(slot.new) == self._decoding.max_new_tokens

    def leave(self) -> list[tuple[int, Continuation]]:
        """Take out the sequences that have ended; live ones move into their slots."""
        ended = [slot for slot in self._slots if slot.ended]
        if not ended:
            return []
        self._count()
        live = self.live - len(ended)
        self._move(in_order([slot.ended for slot in self._slots])[:live])
        return [(slot.index, slot.result(self._tables)) for slot in ended]

    def _move(self, order: Sequence[int]) -> None:
        """Put the sequence of slot `order[i]` into slot `i`; those of other slots are gone."""
        targets = [place for place, source in enumerate(order) if place != source]
        sources = [order[place] for place in targets]
        if targets:
            self._count()
            self._cache.move(sources, targets)
            self._mask[targets] = self._mask[sources]
        self._slots = [self._slots[source] for source in order]

    def step(self) -> None:
        """One more token for every sequence."""
        if self._cache.length == self._cache.capacity:
            self._drop_oldest()
        logits_SV = self._static_step() if self._stays else self._lockstep()
        self._choose(self._slots, logits_SV)

    def _static_step(self) -> Tensor:
        """Logits of the next tokens; every slot computes every block."""
        if self._static is None:
            self._static = StaticStep(self._replica, self._tables, self._cache, self._mask)
        if self._counting is None:
            self._static.load(*self._rows())
            self._counting = self._static
        return self._static.run(
            [slot.text[-1] for slot in self._slots], [len(slot.text) - 1 for slot in self._slots]
        )

    def _lockstep(self) -> Tensor:
        """Logits of the next tokens; sequences of the same text run as one as far as they can."""
        blocks, leader = self._skipped()
        if blocks != sorted(blocks):
            self._move(in_order(blocks))
            blocks, leader = self._skipped()
        computed = first_sequences(self._replica, blocks)
        length = self._cache.length
        self._mask[: self.live, length] = 1
        ids_S1 = torch.tensor([[slot.text[-1]] for slot in self._slots], device=self._replica.device)
        positions_S1 = torch.tensor([[len(slot.text) - 1] for slot in self._slots], device=ids_S1.device)
        if not isinstance(self._counting, Steering):
            rows, prompt_tokens = self._rows()
            self._counting = Steering(self._tables.take(rows), prompt_tokens)

        def known(block: int, output_STD: Tensor | None) -> Tensor | None:
            return None if output_STD is None else output_STD[leader[computed[block] :]]

        with (
            skipping(self._replica, computed, self.live, known),
            steered(self._replica, self._counting),
        ):
            logits = self._replica.forward(
                ids_S1, self._mask[: self.live, : length + 1], positions_S1, keep=1, cache=self._cache
            )
        self._cache.follow(computed, leader)
        return logits[:, -1]

    def _rows(self) -> tuple[list[int], list[int]]:
        """Row of the tables, and length of the prompt, of each sequence."""
        return [slot.row for slot in self._slots], [slot.prompt_tokens for slot in self._slots]

    def _skipped(self) -> tuple[list[int], list[int]]:
        """What `lockstep.skipped` gives for the live sequences."""
        texts = [(slot.prompt, *slot.new) for slot in self._slots]
        untouched = [self._tables.untouched[slot.row] for slot in self._slots]
        return skipped(texts, untouched, self._replica.layers)

    def _drop_oldest(self) -> None:
        # What joins later may be as long as the longest prompt.
        unused = int(self._mask[: self.live, : self._cache.length].any(dim=0).int().argmax())
        unused = min(unused, self._cache.length - self._longest)
        self._cache.forget(unused)
        self._mask[:, : self._cache.length] = self._mask[:, unused : unused + self._cache.length].clone()
        self._mask[:, self._cache.length :] = 0

    def _count(self) -> None:
        """Add what has fired since the batch last changed to its sequences' own counts."""
        if self._counting is not None:
            for slot, counts in zip(self._slots, self._counting.counts(), strict=False):
                slot.count(counts)
        self._counting = None

"""Compute once what several configurations have in common.

Two things are shared. The blocks below the lowest change put out the same for every configuration, so one
unsteered pass serves all. And prompts that begin alike, as those of one template do, share the keys and
values of that beginning, once for each configuration.
S sequences, T tokens, D hidden, V vocabulary.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor

from jobs.engine.memory import in_batches
from jobs.engine.prefill import Prefill, Texts, begin, fill, prefill
from jobs.engine.replica import Replica
from jobs.engine.sites import Place, picked
from jobs.engine.tables import Counts, RowTables, Steering, steered


class Unsteered:
    """Prompts, read once without steering.

    Args:
        replica: The model.
        prompts: Token ids.
        prefix: Number of first tokens that all prompts have in common; see `prefixes.families`.
        blocks: Keys and values of so many blocks, from the bottom, are kept.
        layers: Outputs of these blocks are kept.

    Attributes:
        prompts: Token ids.
        prefix: As given.
        beginning: The common beginning; None if there is none.
        endings: The rest of each prompt.
    """

    def __init__(
        self,
        replica: Replica,
        prompts: Sequence[Sequence[int]],
        *,
        prefix: int,
        blocks: int,
        layers: Sequence[int],
    ) -> None:
        self.prompts = prompts
        self.prefix = prefix
        self._layers = layers
        # The rest of a prompt is read after all blocks of its beginning.
        self.beginning = self._read(replica, [prompts[0][:prefix]], None, replica.layers) if prefix else None
        self.endings = self._read(replica, [prompt[prefix:] for prompt in prompts], self.beginning, blocks)

    @torch.inference_mode()
    def _read(
        self, replica: Replica, texts: Sequence[Sequence[int]], beginning: Texts | None, blocks: int
    ) -> Texts:
        lengths = [len(text) for text in texts]
        found = Texts(len(texts), max(lengths))
        places = [Place(layer, "after") for layer in self._layers]

        def read(batch: list[int]) -> list[int]:
            with picked(replica, places, lambda h_STD: h_STD) as states:
                done = prefill(replica, [texts[index] for index in batch], beginning, [0] * len(batch))
            outputs = {place.layer: state for place, state in states.items()}
            found.put(batch, done, blocks=blocks, outputs=outputs)
            return batch

        in_batches(replica, lengths, read)
        return found


class Prompts:
    """Prompts, to be read under configurations.

    Args:
        replica: The model.
        unsteered: The prompts, with the outputs of the layers below which the configurations differ in
            nothing.
        tables: The configurations.
    """

    def __init__(self, replica: Replica, unsteered: Unsteered, tables: RowTables) -> None:
        self._replica = replica
        self._unsteered = unsteered
        self._tables = tables
        self._begun: list[int] = []
        self._beginnings: Texts | None = None

    @torch.inference_mode()
    def logits(self, work: Sequence[tuple[int, int]]) -> Tensor:
        """Logits of the next token, shape (S, V), the model's dtype.

        Args:
            work: Pairs of prompt and row of the tables; the rows share equally many blocks.
        """
        return self._read(work, room=0).logits_SV

    @torch.inference_mode()
    def prefill(self, work: Sequence[tuple[int, int]], *, room: int) -> Prefill:
        """Read prompts so that they can be gone on with.

        Args:
            work: Pairs of prompt and row of the tables; the rows share equally many blocks.
            room: Tokens for which the cache keeps memory free.
        """
        found = self._read(work, room=room)
        prompts = [prompt for prompt, _ in work]
        tokens = max(len(self._unsteered.prompts[prompt]) for prompt in prompts) - self._unsteered.prefix
        shared = self._shared([row for _, row in work])
        fill(found.cache, self._unsteered.endings, prompts, tokens, blocks=min(shared, self._replica.layers))
        return found

    def _read(self, work: Sequence[tuple[int, int]], *, room: int) -> Prefill:
        """Read the rest of prompts; the blocks below what is changed leave the cache empty."""
        rows = [row for _, row in work]
        self._read_beginnings(sorted(set(rows)))
        prompts, prefix = self._unsteered.prompts, self._unsteered.prefix
        found = self._pass(
            [prompts[prompt][prefix:] for prompt, _ in work],
            self._unsteered.endings,
            [prompt for prompt, _ in work],
            rows,
            [len(prompts[prompt]) for prompt, _ in work],
            room=room,
        )
        if self._beginnings is None:
            return found
        before = [self._beginnings.fired[self._begun.index(row)] for row in rows]
        return found._replace(fired=[_sum(*counts) for counts in zip(before, found.fired, strict=True)])

    def _read_beginnings(self, rows: list[int]) -> None:
        """The common beginning under each of these configurations, and no others: they come in order."""
        beginning, tokens = self._unsteered.beginning, self._unsteered.prefix
        if beginning is None or set(rows) <= set(self._begun):
            return
        self._beginnings = None
        number, shared = len(rows), self._shared(rows)
        # Positions counted from the end lie behind the beginning in the shortest prompt, so in all.
        shortest = min(map(len, self._unsteered.prompts))
        text = self._unsteered.prompts[0][:tokens]
        found = self._pass([text] * number, beginning, [0] * number, rows, [shortest] * number, room=0)
        fill(found.cache, beginning, [0] * number, tokens, blocks=min(shared, self._replica.layers))
        begun = Texts(number, tokens)
        begun.put(range(number), found, blocks=self._replica.layers, outputs={})
        self._begun, self._beginnings = rows, begun

    def _shared(self, rows: Sequence[int]) -> int:
        [shared] = {self._tables.shared[row] for row in rows}
        return shared

    def _pass(
        self,
        texts: Sequence[Sequence[int]],
        unsteered: Texts,
        places: Sequence[int],
        rows: Sequence[int],
        prompt_tokens: Sequence[int],
        *,
        room: int,
    ) -> Prefill:
        """Read texts from where the configurations begin to differ from the unsteered.

        Args:
            texts: Token ids.
            unsteered: The same texts, as they were read without steering.
            places: Which of those each text is.
            rows: Row of the tables of each text.
            prompt_tokens: Length of the whole prompt of each text.
            room: Tokens for which the cache keeps memory free.
        """
        shared = self._shared(rows)
        begun = [self._begun.index(row) for row in rows] if self._beginnings is not None else []
        if shared > self._replica.layers:
            cache, mask_ST = begin(self._replica, texts, self._beginnings, begun, room=room)
            return Prefill(cache, mask_ST, unsteered.logits_NV[places], [{} for _ in texts])
        steering = Steering(self._tables.take(rows), prompt_tokens)
        with ExitStack() as hooks:
            if shared:
                output_STD = unsteered.outputs[shared - 1][places, -max(map(len, texts)) :]
                hooks.enter_context(resumed(self._replica, shared, output_STD))
            hooks.enter_context(steered(self._replica, steering))
            found = prefill(self._replica, texts, self._beginnings, begun, room=room)
        return found._replace(fired=steering.counts())


def _sum(one: Counts, other: Counts) -> Counts:
    return {place: one.get(place, 0) + other.get(place, 0) for place in one.keys() | other.keys()}


@contextmanager
def resumed(replica: Replica, shared: int, output_STD: Tensor) -> Iterator[None]:
    """Inside the block, a pass begins after the first `shared` blocks.

    Args:
        replica: The model.
        shared: Number of blocks that are not computed; their keys and values are not written.
        output_STD: What the last of them puts out, shape (S, T, D); hooks on it still run.
    """
    blocks = [replica.blocks[index] for index in range(shared)]
    try:
        for block in blocks:
            block.forward = _giving(output_STD, as_tuple=replica.blocks_give_tuples)
        yield
    finally:
        for block in blocks:
            block.__dict__.pop("forward", None)


def _giving(output: Tensor, *, as_tuple: bool) -> Any:
    def forward(*arguments: Any, **options: Any) -> Any:
        return (output,) if as_tuple else output

    return forward

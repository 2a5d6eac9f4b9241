"""Compute once what several configurations have in common.

Two things are shared. The blocks below the lowest change put out the same for every configuration, so one
unsteered pass serves all. And prompts that begin alike, as those of one template do, share the keys and
values of that beginning, once for each configuration.
S sequences, T tokens, D hidden, V vocabulary.
"""

import itertools
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from jobs.engine.memory import in_batches
from jobs.engine.prefill import Prefill, Read, begin, fill, kept, prefill
from jobs.engine.recording import recorded
from jobs.engine.replica import Replica
from jobs.engine.tables import Counts, RowTables, Steering, steered


class Unsteered:
    """Prompts, read once without steering.

    Args:
        replica: The model.
        prompts: Token ids.
        prefix: Number of first tokens that all prompts have in common; see `common_prefix`.
        blocks: Keys and values of so many blocks, from the bottom, are kept.
        layers: Outputs of these blocks are kept.

    Attributes:
        prompts: Token ids.
        prefix: As given.
        beginning: What is kept of the common beginning; None if there is none.
        endings: What is kept of each prompt's rest.
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
        self.beginning = (
            self._read(replica, [prompts[0][:prefix]], None, replica.layers)[0] if prefix else None
        )
        self.endings = self._read(replica, [prompt[prefix:] for prompt in prompts], self.beginning, blocks)

    @torch.inference_mode()
    def _read(
        self, replica: Replica, texts: Sequence[Sequence[int]], beginning: Read | None, blocks: int
    ) -> list[Read]:
        def read(batch: list[int]) -> list[Read]:
            with recorded(replica, self._layers) as outputs:
                found = prefill(replica, [texts[index] for index in batch], [beginning] * len(batch))
            return [
                kept(found, slot, len(texts[index]), blocks=blocks, outputs=outputs)
                for slot, index in enumerate(batch)
            ]

        return in_batches(replica, [len(text) for text in texts], read)


class _Part(NamedTuple):
    """One sequence of a pass.

    Attributes:
        tokens: What is read.
        unsteered: The same, as it was read without steering.
        beginning: What comes before.
        row: Row of the tables.
        prompt_tokens: Length of the whole prompt.
    """

    tokens: Sequence[int]
    unsteered: Read
    beginning: Read | None
    row: int
    prompt_tokens: int


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
        self._beginnings: dict[int, Read] = {}

    @torch.inference_mode()
    def logits(self, work: Sequence[tuple[int, int]]) -> Tensor:
        """Logits of the next token, shape (S, V), the model's dtype.

        Args:
            work: Pairs of prompt and row of the tables; the rows share equally many blocks.
        """
        return self._pass(self._parts(work), room=0).logits_SV

    @torch.inference_mode()
    def prefill(self, work: Sequence[tuple[int, int]], *, room: int) -> Prefill:
        """Read prompts so that they can be gone on with.

        Args:
            work: Pairs of prompt and row of the tables; the rows share equally many blocks.
            room: Tokens for which the cache keeps memory free.
        """
        return self._prefill(self._parts(work), room=room)

    def _parts(self, work: Sequence[tuple[int, int]]) -> list[_Part]:
        self._read_beginnings({row for _, row in work})
        prompts, prefix = self._unsteered.prompts, self._unsteered.prefix
        return [
            _Part(
                prompts[prompt][prefix:],
                self._unsteered.endings[prompt],
                self._beginnings.get(row),
                row,
                len(prompts[prompt]),
            )
            for prompt, row in work
        ]

    def _read_beginnings(self, rows: set[int]) -> None:
        """The common beginning under each of these configurations, and no others: they come in order."""
        beginning, tokens = self._unsteered.beginning, self._unsteered.prefix
        if beginning is None:
            return
        # Positions counted from the end lie behind the beginning in the shortest prompt, so in all.
        shortest = min(map(len, self._unsteered.prompts))
        new = sorted(rows - self._beginnings.keys())
        self._beginnings = {row: self._beginnings[row] for row in rows & self._beginnings.keys()}
        if new:
            text = self._unsteered.prompts[0][:tokens]
            found = self._prefill([_Part(text, beginning, None, row, shortest) for row in new], room=0)
            for slot, row in enumerate(new):
                self._beginnings[row] = kept(found, slot, tokens, blocks=self._replica.layers, outputs={})

    def _prefill(self, parts: Sequence[_Part], *, room: int) -> Prefill:
        found = self._pass(parts, room=room)
        shared = min(self._shared(parts), self._replica.layers)
        fill(found.cache, [part.unsteered for part in parts], shared)
        fired = [
            _sum(part.beginning.fired, counts) if part.beginning is not None else counts
            for part, counts in zip(parts, found.fired, strict=True)
        ]
        return found._replace(fired=fired)

    def _shared(self, parts: Sequence[_Part]) -> int:
        [shared] = {self._tables.shared[part.row] for part in parts}
        return shared

    def _pass(self, parts: Sequence[_Part], *, room: int) -> Prefill:
        """Read from where the configurations begin to differ; the blocks below leave the cache empty."""
        shared = self._shared(parts)
        texts = [part.tokens for part in parts]
        beginnings = [part.beginning for part in parts]
        if shared > self._replica.layers:
            cache, mask_ST = begin(self._replica, texts, beginnings, room=room)
            logits_SV = torch.stack([part.unsteered.logits_V for part in parts])
            return Prefill(cache, mask_ST, logits_SV, [{} for _ in parts])
        tables = self._tables.take([part.row for part in parts])
        steering = Steering(tables, [part.prompt_tokens for part in parts])
        with ExitStack() as hooks:
            if shared:
                outputs = _padded([part.unsteered.outputs[shared - 1] for part in parts])
                hooks.enter_context(resumed(self._replica, shared, outputs))
            hooks.enter_context(steered(self._replica, steering))
            found = prefill(self._replica, texts, beginnings, room=room)
        return found._replace(fired=steering.counts())


def _padded(outputs: Sequence[Tensor]) -> Tensor:
    """Shape (S, T, D), padded on the left with zeros."""
    longest = max(len(output) for output in outputs)
    padded = outputs[0].new_zeros((len(outputs), longest, outputs[0].shape[1]))
    for place, output in enumerate(outputs):
        padded[place, longest - len(output) :] = output
    return padded


def _sum(one: Counts, other: Counts) -> Counts:
    return {place: one.get(place, 0) + other.get(place, 0) for place in one.keys() | other.keys()}


def common_prefix(replica: Replica, prompts: Sequence[Sequence[int]], tables: RowTables) -> int:
    """Number of first tokens that may be read once for all prompts.

    The rest is at least one token, and holds all positions that configurations count from the end. 0 where
    the model's windows of attention would see the padding that stands between the beginning and the rest.
    """
    if getattr(replica.model.config.get_text_config(), "sliding_window", None):
        return 0
    rest = max((-at for row in tables.positions for positions in row for at in positions), default=1)
    longest = min(len(prompt) for prompt in prompts) - max(1, rest)
    agreeing = itertools.takewhile(lambda tokens: len(set(tokens)) == 1, zip(*prompts, strict=False))
    return min(max(0, longest), sum(1 for _ in agreeing))


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

"""Compute once what several configurations have in common.

Two things are shared. The blocks below a configuration's lowest change put out what they put out unsteered,
so one unsteered pass serves all. And prompts that begin alike, as those of one template do, share the keys
and values of that beginning, once for each configuration.
S sequences, T tokens, D hidden, V vocabulary.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from jobs.engine.cache import KeyValues
from jobs.engine.memory import in_batches
from jobs.engine.prefill import Prefill, Texts, begin, prefill
from jobs.engine.replica import Replica
from jobs.engine.sites import Place, picked
from jobs.engine.skipping import first_sequences, skipping
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
        self._begun: dict[int, int] = {}
        self._beginnings: Texts | None = None

    @torch.inference_mode()
    def logits(self, work: Sequence[tuple[int, int]]) -> Tensor:
        """Logits of the next token, shape (S, V), the model's dtype.

        Args:
            work: Pairs of prompt and row of the tables, the rows that share fewest blocks first.
        """
        return self._read(work).logits_SV

    @torch.inference_mode()
    def prefill(self, work: Sequence[tuple[int, int]]) -> Prefill:
        """Read prompts so that they can be gone on with.

        Args:
            work: Pairs of prompt and row of the tables, the rows that share fewest blocks first.
        """
        found = self._read(work)
        places = [prompt for prompt, _ in work]
        tokens = max(len(self._unsteered.prompts[prompt]) for prompt in places) - self._unsteered.prefix
        self._fill_shared(found.cache, self._unsteered.endings, places, tokens, [row for _, row in work])
        return found

    @torch.inference_mode()
    def begin(self, rows: Sequence[int]) -> None:
        """Read the common beginning under each of these configurations, and forget it under all others.

        Args:
            rows: Rows of the tables, those that share fewest blocks first.
        """
        beginning, tokens = self._unsteered.beginning, self._unsteered.prefix
        self._beginnings = None
        if beginning is None:
            return
        number = len(rows)
        # Positions counted from the end lie behind the beginning in the shortest prompt, so in all.
        shortest = min(map(len, self._unsteered.prompts))
        text = self._unsteered.prompts[0][:tokens]
        found = self._pass([text] * number, beginning, [0] * number, rows, [shortest] * number)
        self._fill_shared(found.cache, beginning, [0] * number, tokens, rows)
        begun = Texts(number, tokens)
        begun.put(range(number), found, blocks=self._replica.layers, outputs={})
        self._begun, self._beginnings = {row: place for place, row in enumerate(rows)}, begun

    def _read(self, work: Sequence[tuple[int, int]]) -> Prefill:
        """Read the rest of prompts; what the rows share stays out of the cache."""
        rows = [row for _, row in work]
        prompts, prefix = self._unsteered.prompts, self._unsteered.prefix
        found = self._pass(
            [prompts[prompt][prefix:] for prompt, _ in work],
            self._unsteered.endings,
            [prompt for prompt, _ in work],
            rows,
            [len(prompts[prompt]) for prompt, _ in work],
        )
        if self._beginnings is None:
            return found
        before = [self._beginnings.fired[self._begun[row]] for row in rows]
        return found._replace(fired=[_sum(*counts) for counts in zip(before, found.fired, strict=True)])

    def _computed(self, rows: Sequence[int]) -> list[int]:
        return first_sequences(self._replica, [self._tables.shared[row] for row in rows])

    def _fill_shared(
        self, cache: KeyValues, texts: Texts, places: Sequence[int], tokens: int, rows: Sequence[int]
    ) -> None:
        for layer, states, computed in zip(cache.by_layer, texts.states, self._computed(rows), strict=False):
            if computed < len(rows):
                kept = [each[places[computed:], :, -tokens:] for each in states]
                layer.put(slice(computed, len(rows)), cache.length - tokens, kept)

    def _pass(
        self,
        texts: Sequence[Sequence[int]],
        unsteered: Texts,
        places: Sequence[int],
        rows: Sequence[int],
        prompt_tokens: Sequence[int],
    ) -> Prefill:
        """Read texts, each from where its configuration begins to differ from the unsteered.

        Args:
            texts: Token ids.
            unsteered: The same texts, as they were read without steering.
            places: Which of those each text is.
            rows: Row of the tables of each text, those that share fewest blocks first.
            prompt_tokens: Length of the whole prompt of each text.
        """
        begun = [self._begun[row] for row in rows] if self._beginnings is not None else []
        changed = sum(self._tables.shared[row] <= self._replica.layers for row in rows)
        if not changed:
            cache, mask_ST = begin(self._replica, texts, self._beginnings, begun)
            cache.length = mask_ST.shape[1]
            return Prefill(cache, mask_ST, unsteered.logits_NV[places], [{} for _ in texts])
        computed = self._computed(rows)
        tokens = max(map(len, texts))

        def known(block: int, output_STD: Tensor | None) -> Tensor | None:
            kept = unsteered.outputs.get(block)
            return None if kept is None else kept[places[computed[block] :], -tokens:]

        steering = Steering(self._tables.take(rows), prompt_tokens)
        with (
            skipping(self._replica, computed, len(texts), known),
            steered(self._replica, steering),
        ):
            found = prefill(self._replica, texts, self._beginnings, begun)
        found.logits_SV[changed:] = unsteered.logits_NV[places[changed:]]
        return found._replace(fired=steering.counts())


def _sum(one: Counts, other: Counts) -> Counts:
    return {place: one.get(place, 0) + other.get(place, 0) for place in one.keys() | other.keys()}

"""A decoding step on tensors that stay in place, which a GPU replays as a CUDA graph.

Launching the kernels of a step one by one takes the CPU longer than a GPU needs to run them. A graph launches
all of them at once, but only with the shapes and addresses that it was captured with: the step runs over all
places of the cache's time axis and over a fixed number of slots.
S slots, C capacity of the time axis, V vocabulary.
"""

import logging
from collections.abc import Sequence
from inspect import signature

import torch
from torch import Tensor

from jobs.engine.cache import KeyValues
from jobs.engine.replica import Replica
from jobs.engine.tables import Counts, RowTables, Steering, steered

_LOG = logging.getLogger(__name__)
_FEWEST = 8
"""Slots of the smallest graph."""


def can_stay(replica: Replica) -> bool:
    """Whether the model's steps can be replayed: on one GPU, with attention that takes a mask of its own."""
    devices = {weight.device for weight in replica.model.parameters()}
    return len(devices) == 1 and replica.device.type == "cuda" and takes_masks(replica)


def takes_masks(replica: Replica) -> bool:
    """Whether attention only needs to be told which tokens it sees.

    Eager attention adds the mask to its scores; windows and chunks, and biases that grow with distance, are
    made from the mask by the model itself.
    """
    config = replica.model.config.get_text_config()
    by_distance = (
        getattr(config, "alibi", False) or "position_ids" not in signature(replica.model.forward).parameters
    )
    return config._attn_implementation == "sdpa" and not replica.has_windows and not by_distance


class StaticStep:
    """The steps of one batch.

    Args:
        replica: The model.
        tables: The configurations.
        cache: Keys and values of the batch; sequences have joined it.
        mask_SC: 1 where the cache holds a token, 0 elsewhere; written in place from step to step.
    """

    def __init__(self, replica: Replica, tables: RowTables, cache: KeyValues, mask_SC: Tensor) -> None:
        slots = len(mask_SC)
        self._replica = replica
        self._tables = tables
        self._cache = cache
        self._mask_SC = mask_SC
        self._ids_S1 = torch.zeros((slots, 1), dtype=torch.int64, device=replica.device)
        self._positions_S1 = torch.zeros_like(self._ids_S1)
        self._at_1 = torch.zeros(1, dtype=torch.int64, device=replica.device)
        self._steering = Steering(tables.take([0] * slots), [0] * slots)
        self._graphs: dict[int, tuple[torch.cuda.CUDAGraph, Tensor]] = {}
        self._replays = replica.device.type == "cuda"

    def load(self, rows: Sequence[int], prompt_tokens: Sequence[int]) -> None:
        """Let the first slots hold these sequences, whose counts begin at 0.

        Args:
            rows: Row of the tables of each.
            prompt_tokens: Length of each one's prompt.
        """
        self._steering.load(self._tables.take(rows), prompt_tokens)

    def counts(self) -> list[Counts]:
        """What was changed in each slot since `load`."""
        return self._steering.counts()

    def run(self, tokens: Sequence[int], positions: Sequence[int]) -> Tensor:
        """Read one more token of the first slots.

        Args:
            tokens: Token id of each.
            positions: Place of each in its text.

        Returns:
            Logits of the next token, shape (S, V); the next step writes over them.
        """
        live = len(tokens)
        self._ids_S1[:live, 0] = torch.tensor(tokens)
        self._positions_S1[:live, 0] = torch.tensor(positions)
        length = self._cache.length
        self._at_1.fill_(length)
        # Slots without a sequence see at least one token: attention to none is not a number.
        self._mask_SC[:, length] = 1
        logits_SV = self._logits(self._slots(live))
        self._cache.length = length + 1
        return logits_SV[:live]

    def _slots(self, live: int) -> int:
        """Number of slots of the smallest graph that holds so many sequences."""
        slots = len(self._mask_SC)
        while slots // 2 >= max(live, _FEWEST):
            slots //= 2
        return slots

    def _logits(self, slots: int) -> Tensor:
        if self._replays and slots not in self._graphs:
            try:
                self._graphs[slots] = self._captured(slots)
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as error:
                _LOG.warning("decoding without CUDA graphs, which this model's steps refuse: %s", error)
                self._replays = False
        if not self._replays:
            return self._step(slots)
        graph, logits_SV = self._graphs[slots]
        graph.replay()
        return logits_SV

    def _captured(self, slots: int) -> tuple[torch.cuda.CUDAGraph, Tensor]:
        counted = [fired_S.clone() for fired_S in self._steering.all_fired]
        try:
            return self._recorded(slots)
        finally:
            for fired_S, before_S in zip(self._steering.all_fired, counted, strict=True):
                fired_S.copy_(before_S)

    def _recorded(self, slots: int) -> tuple[torch.cuda.CUDAGraph, Tensor]:
        graph = torch.cuda.CUDAGraph()
        beside = torch.cuda.Stream()
        beside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(beside):
            for _ in range(2):
                self._step(slots)
        torch.cuda.current_stream().wait_stream(beside)
        # All graphs of the batch share memory, as only one runs at a time.
        pool = next((graph.pool() for graph, _ in self._graphs.values()), None)
        with torch.cuda.graph(graph, pool=pool):
            logits_SV = self._step(slots)
        return graph, logits_SV

    def _step(self, slots: int) -> Tensor:
        positions_S1 = self._replica.positions_ST = self._positions_S1[:slots]
        with steered(self._replica, self._steering), self._cache.written_at(self._at_1):
            output = self._replica.model(
                input_ids=self._ids_S1[:slots],
                attention_mask=self._mask_SC[:slots, None, None].bool(),
                position_ids=positions_S1,
                past_key_values=self._cache,
                use_cache=True,
            )
        logits_SV: Tensor = output.logits[:, -1]
        return logits_SV

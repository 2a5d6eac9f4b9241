"""Some consecutive blocks as a differentiable function of what is added to the residual stream below them.

N prompts, B rows, T tokens, D hidden.
"""

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from jobs.engine.memory import is_out_of_memory
from jobs.engine.replica import Replica, position_ids
from jobs.engine.sites import Place, attach, picked
from jobs.errors import ModelError, SpecError, first_line

TargetSite = Literal["after", "attention"]
_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-2}
"""Of the largest state; a wrong mask or a wrong position is far beyond it."""


class _Call(NamedTuple):
    """What a block was given besides the hidden state."""

    arguments: tuple[Any, ...]
    options: dict[str, Any]


class Slice:
    """Blocks `source + 1` to `target`, as they run on some prompts.

    Prompts are read once, without steering; then only the blocks of the slice run.

    Args:
        replica: The model.
        prompts: Token ids; they may differ in length.
        source: Block whose output is added to, counted from 0; -1 for the embeddings.
        target: Block whose output is read; above `source`.
        site: `after`: the residual stream that leaves the target block. `attention`: what the attention of
            the target block adds.

    Attributes:
        inputs_NTD: The residual stream that leaves the source block, unsteered, padded on the left.
        targets_NTD: The target, unsteered.
        positions_NT: Position of each token in its prompt, from 0; -1 marks padding.
        wide: Has the device of these and their dtype, or float32 if theirs is narrower: what vectors are in.

    Raises:
        SpecError: If the layers cannot be meant, or a prompt is longer than the context.
        ModelError: If the model's blocks cannot run by themselves.
    """

    def __init__(
        self,
        replica: Replica,
        prompts: Sequence[Sequence[int]],
        *,
        source: int,
        target: int,
        site: TargetSite = "after",
    ) -> None:
        if not -1 <= source < target < replica.layers:
            raise SpecError(
                f"source={source}, target={target}; the target lies above the source, and the model has the "
                f"layers 0 to {replica.layers - 1}"
            )
        for prompt in prompts:
            replica.check_text(prompt)
        self.replica = replica
        self.source = source
        self.target = target
        self.site = site
        self._read(prompts)
        self._check()

    @torch.no_grad()  # what inference mode makes cannot be differentiated later
    def _read(self, prompts: Sequence[Sequence[int]]) -> None:
        replica, calls = self.replica, list[_Call]()

        def keep(block: Any, arguments: tuple[Any, ...], options: dict[str, Any]) -> None:
            options = {name: value for name, value in options.items() if name != "hidden_states"}
            calls.append(_Call(arguments[1:], options))

        blocks = replica.blocks[self.source + 1 : self.target + 1]
        handles = [block.register_forward_pre_hook(keep, with_kwargs=True) for block in blocks]
        entered, left = Place(self.source + 1, "before"), Place(self.target, self.site)
        ids, mask = replica.pad(prompts)
        try:
            with picked(replica, [entered, left], lambda h_NTD: h_NTD) as found:
                replica.forward(ids, mask, position_ids(mask), keep=1)
        finally:
            for handle in handles:
                handle.remove()
        self._calls = calls
        self.inputs_NTD, self.targets_NTD = found[entered], found[left]
        wide = torch.promote_types(self.inputs_NTD.dtype, torch.float32)
        self.wide = self.inputs_NTD.new_empty(0, dtype=wide)
        self.positions_NT = replica.positions_ST

    def _check(self) -> None:
        # Twice as many rows as prompts: what blocks are given may be laid out by rows in other ways too.
        reverse = 2 * list(reversed(range(len(self.inputs_NTD))))
        try:
            with torch.no_grad():
                found, expected = self.run(self.inputs_NTD[reverse], reverse), self.targets_NTD[reverse]
        except (RuntimeError, TypeError, ValueError) as error:
            if is_out_of_memory(error):
                raise
            raise ModelError(
                f"blocks {self.source + 1} to {self.target} of {type(self.replica.model).__name__} cannot "
                f"run by themselves: {first_line(error)}"
            ) from error
        real = (self.positions_NT[reverse] >= 0)[..., None].to(found.device)
        off = ((found - expected) * real).abs().max() / (expected * real).abs().max()
        if not off <= _TOLERANCE.get(found.dtype, 0.1):
            raise ModelError(
                f"blocks {self.source + 1} to {self.target} of {type(self.replica.model).__name__} put out "
                f"something else when they run by themselves (off by {float(off):.2g} of the largest state)"
            )

    def run(self, h_BTD: Tensor, prompts: Sequence[int]) -> Tensor:
        """The target for given states at the source.

        Args:
            h_BTD: In place of `inputs_NTD`.
            prompts: Which prompt each row is, for masks and positions.
        """
        found, of = list[Tensor](), len(self.positions_NT)
        handle = attach(self.replica, Place(self.target, self.site), lambda state: found.append(state))
        try:
            for number, call in enumerate(self._calls, self.source + 1):
                block = self.replica.blocks[number]
                output = block(h_BTD, *_of(call.arguments, of, prompts), **_of(call.options, of, prompts))
                h_BTD = output[0] if isinstance(output, tuple) else output
        finally:
            handle.remove()
        return found[0]

    def deltas(self, theta_BD: Tensor, prompts: Sequence[int]) -> Tensor:
        """How far the target moves when a vector is added at every token of the source.

        Args:
            theta_BD: A vector a row, or one at each token of each row: (B, T, D).
            prompts: Which prompt each row is.

        Returns:
            Shape (B, T, D); padding is 0.
        """
        theta = theta_BD if theta_BD.dim() == 3 else theta_BD[:, None]
        moved = self.run(self.inputs_NTD[prompts] + theta.to(self.inputs_NTD), prompts)
        real_BT1 = (self.positions_NT[prompts] >= 0)[..., None].to(moved.device)
        return (moved - self.targets_NTD[prompts]) * real_BT1


def _of(value: Any, of: int, prompts: Sequence[int]) -> Any:
    """What blocks were given for all `of` prompts, for these; what they have in common stays so."""
    if isinstance(value, Tensor) and value.dim() > 1 and value.shape[0] == of > 1:
        return value[prompts]
    if type(value) is tuple:
        return tuple(_of(each, of, prompts) for each in value)
    if type(value) is dict:
        return {name: _of(each, of, prompts) for name, each in value.items()}
    return value

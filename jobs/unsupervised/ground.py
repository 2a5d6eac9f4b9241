"""A slice on the prompts that vectors are learned from, and the tokens that count.

V vectors, N prompts, T tokens, D hidden.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from jobs.engine.replica import Replica
from jobs.engine.slices import Slice, TargetSite
from jobs.unsupervised.jacobian import jacobian_directions
from jobs.unsupervised.objective import Counted, counted_tokens


class Ground:
    """Blocks, prompts, and the tokens that count.

    Args:
        replica: The model.
        prompts: Token ids.
        source: Block to whose output vectors are added.
        target: Block whose output counts.
        counted: Which of its tokens count; see `counted_tokens`.
        last: How many, where the last few count.
        site: What of the target block counts.

    Attributes:
        slice_: The blocks, and the prompts.
        counted_NT: Which tokens count.

    Raises:
        SpecError: If a layer or a token does not exist.
        ModelError: If the blocks cannot run alone.
    """

    def __init__(
        self,
        replica: Replica,
        prompts: Sequence[Sequence[int]],
        *,
        source: int,
        target: int,
        counted: Counted,
        last: int,
        site: TargetSite = "after",
    ) -> None:
        self.slice_ = Slice(replica, prompts, source=source, target=target, site=site)
        self.counted_NT = counted_tokens(self.slice_.positions_NT, counted, last=last)
        self._jacobians: dict[tuple[int, tuple[int, ...]], Tensor] = {}

    @property
    def everything(self) -> tuple[int, ...]:
        """The numbers of all prompts."""
        return tuple(range(len(self.counted_NT)))

    def counted(self, prompts: Sequence[int]) -> Tensor:
        """Which tokens of some prompts count, shape (N, T); of the others none does."""
        chosen_N1 = torch.zeros_like(self.counted_NT[:, :1])
        chosen_N1[list(prompts)] = True
        return self.counted_NT & chosen_N1

    def jacobian(self, vectors: int, prompts: tuple[int, ...]) -> Tensor:
        """First right singular vectors of the Jacobian at 0 on some prompts, shape (V, D), computed once."""
        if (vectors, prompts) not in self._jacobians:
            found_VD, _ = jacobian_directions(self.slice_, self.counted(prompts), vectors)
            self._jacobians[vectors, prompts] = found_VD
        return self._jacobians[vectors, prompts]

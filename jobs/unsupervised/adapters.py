"""Low-rank changes of a block's feed-forward output that move a later layer most.

Source: Mack and Turner, "Mechanistically eliciting latent behaviors in language models", 2024, section on
unsupervised steering adapters: W' = W + R B A^T with columns of norm 1, learned by AMSGrad.
K adapters, B rows (an adapter on a prompt), T tokens, H inner width, D hidden, Q rank, S steps.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import normalize

from jobs.engine.adapting import output_matrix
from jobs.engine.slices import Slice
from jobs.unsupervised.objective import NormOver, movement, shares
from jobs.unsupervised.passes import Passes

Normalised = Literal["column", "frobenius", "spectral", "notebook"]


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterGoal:
    """What adapters are to maximise, and how large they may be.

    Attributes:
        radius: R, which the product of an adapter's matrices is multiplied with.
        rank: Columns of each matrix.
        normalised: `column`: every column has norm 1. `frobenius`: each matrix has the norm sqrt(rank),
            which columns of norm 1 give it. `spectral`: the product's largest singular value is 1.
            `notebook`: as the original code has it: R / rank in place of R, and for each inner unit the
            entries of A over the columns have norm 1.
        power: p of the objective.
        root: q of the objective.
        over: What the norm of the objective is taken over.
        few_tokens: The objective is multiplied by exp(-few_tokens x H), with H the entropy of the tokens'
            shares over that of equal shares: 0 where one token carries all, 1 where all carry the same.
    """

    radius: float
    rank: int
    normalised: Normalised = "column"
    power: float = 2.0
    root: float = 2.0
    over: NormOver = "hidden"
    few_tokens: float = 0.0

    @property
    def factor(self) -> float:
        """What the product of both matrices is multiplied with."""
        return self.radius / self.rank if self.normalised == "notebook" else self.radius


class Adapters(NamedTuple):
    """Matrices, one pair an adapter.

    Attributes:
        a_KHQ: Read the inner width.
        b_KDQ: Write to the residual stream.
    """

    a_KHQ: Tensor
    b_KDQ: Tensor

    def normalised(self, goal: AdapterGoal) -> "Adapters":
        """The nearest ones that are as large as the goal allows."""
        match goal.normalised:
            case "column":
                return Adapters(normalize(self.a_KHQ, dim=1), normalize(self.b_KDQ, dim=1))
            case "notebook":
                return Adapters(normalize(self.a_KHQ, dim=2), normalize(self.b_KDQ, dim=1))
            case "frobenius":
                return Adapters(*(math.sqrt(goal.rank) * _over_norm(each) for each in self))
            case "spectral":
                sizes_K11 = self._spectral()[:, None, None].sqrt()
                return Adapters(self.a_KHQ / sizes_K11, self.b_KDQ / sizes_K11)

    def change(self, goal: AdapterGoal, adapter: int) -> Tensor:
        """What one of them adds to the weights, shape (D, H)."""
        change_DH: Tensor = goal.factor * self.b_KDQ[adapter] @ self.a_KHQ[adapter].T
        return change_DH

    def _spectral(self) -> Tensor:
        """Largest singular value of each product, from the triangles of both matrices."""
        triangles = [torch.linalg.qr(each, mode="r").R for each in self]
        products_KQQ = triangles[1] @ triangles[0].mT
        if not bool(products_KQQ.isfinite().all()):
            return torch.full_like(products_KQQ[:, 0, 0], torch.nan)
        sizes_K: Tensor = torch.linalg.matrix_norm(products_KQQ, ord=2)
        return sizes_K


def _over_norm(matrices_KMQ: Tensor) -> Tensor:
    unit_KMQ: Tensor = matrices_KMQ / matrices_KMQ.flatten(1).norm(dim=1)[:, None, None]
    return unit_KMQ


class LearnedAdapters(NamedTuple):
    """Adapters as the optimiser leaves them.

    Attributes:
        adapters: The matrices.
        values_K: Their objectives, with the factor for few tokens.
        history_SK: What each step found before it moved.
        shares_KNT: Each token's share of its prompt's sum of |delta|^p; padding has 0.
        spread_KN: `spread` of each of these.
    """

    adapters: Adapters
    values_K: Tensor
    history_SK: Tensor
    shares_KNT: Tensor
    spread_KN: Tensor


class AdapterGround:
    """Where adapters act and what they move.

    Args:
        slice_: Begins at the input of the adapted block, which is `slice_.source + 1`.
        counted_NT: Which tokens of the target count.
        goal: What they are to maximise.

    Attributes:
        goal: As given.
    """

    def __init__(self, slice_: Slice, counted_NT: Tensor, goal: AdapterGoal) -> None:
        self._slice = slice_
        self._counted_NT = counted_NT
        self.goal = goal
        self._module = output_matrix(slice_.replica, slice_.source + 1).module
        self._passes = Passes(slice_)

    def drawn(self, adapters: int, seed: int) -> Adapters:
        """Random adapters of the size that the goal allows."""
        generator = torch.Generator().manual_seed(seed)
        writer = output_matrix(self._slice.replica, self._slice.source + 1)
        weight = getattr(writer.module, writer.name)
        outer, inner = weight.shape if writer.axis == 0 else weight.shape[::-1]
        a_KHQ, b_KDQ = (
            torch.randn((adapters, width, self.goal.rank), generator=generator).to(self._slice.wide)
            for width in (inner, outer)
        )
        return Adapters(a_KHQ, b_KDQ).normalised(self.goal)

    def look(self, adapters: Adapters, prompts: Sequence[int]) -> tuple[Tensor, Adapters, Tensor]:
        """The objective of each adapter over some prompts, its gradient, and the tokens' shares.

        Raises:
            OutOfMemory: If a single adapter on a single prompt does not fit.
        """
        rows = [(adapter, place) for adapter in range(len(adapters.a_KHQ)) for place in range(len(prompts))]
        values_K = adapters.a_KHQ.new_zeros(len(adapters.a_KHQ))
        gradients = Adapters(*(torch.zeros_like(each) for each in adapters))
        shares_KNT = values_K.new_zeros((len(values_K), len(prompts), self._counted_NT.shape[1]))

        def run(chosen: list[int]) -> None:
            which, places = map(list, zip(*(rows[index] for index in chosen), strict=True))
            of = [prompts[place] for place in places]
            with torch.enable_grad():
                batch = Adapters(*(each[which].requires_grad_() for each in adapters))
                values_B, shares_BT = self._values(batch, of)
                found = torch.autograd.grad(values_B.sum(), batch)
            at_B = torch.tensor(which, device=values_K.device)
            values_K.index_add_(0, at_B, values_B.detach())
            for sums, parts in zip(gradients, found, strict=True):
                sums.index_add_(0, at_B, parts)
            shares_KNT[which, places] = shares_BT.detach()

        self._passes.over(len(rows), run)
        return values_K, gradients, shares_KNT

    def spread(self, shares_KNT: Tensor, prompts: Sequence[int]) -> Tensor:
        """`spread` of the shares of each adapter on each of some prompts, shape (K, N)."""
        return torch.stack([spread(each, self._counted_NT[list(prompts)]) for each in shares_KNT])

    def _values(self, batch: Adapters, prompts: list[int]) -> tuple[Tensor, Tensor]:
        goal, counted_BT = self.goal, self._counted_NT[prompts]
        with self._added(batch):
            moved_BTD = self._slice.run(self._slice.inputs_NTD[prompts], prompts)
        real_BT1 = (self._slice.positions_NT[prompts] >= 0)[..., None].to(moved_BTD.device)
        deltas_BTD = ((moved_BTD - self._slice.targets_NTD[prompts]) * real_BT1).to(batch.a_KHQ)
        powers_B, roots_B = (deltas_BTD.new_full((len(prompts),), each) for each in (goal.power, goal.root))
        values_B = movement(deltas_BTD, counted_BT, powers_B, roots_B, over=goal.over)
        shares_BT = shares(deltas_BTD, counted_BT, powers_B)
        if goal.few_tokens:
            values_B = values_B * (-goal.few_tokens * spread(shares_BT, counted_BT)).exp()
        return values_B, shares_BT

    @contextmanager
    def _added(self, batch: Adapters) -> Iterator[None]:
        def add(module: torch.nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
            inner_BTH = inputs[0].reshape(len(batch.a_KHQ), -1, inputs[0].shape[-1]).to(batch.a_KHQ.dtype)
            change_BTD = self.goal.factor * (inner_BTH @ batch.a_KHQ) @ batch.b_KDQ.mT
            return output + change_BTD.reshape(output.shape).to(output.dtype)

        handle = self._module.register_forward_hook(add)
        try:
            yield
        finally:
            handle.remove()


def spread(shares_BT: Tensor, counted_BT: Tensor) -> Tensor:
    """Entropy of the tokens' shares over that of equal ones, from 0 to 1, shape (B,); 0 for a lone token."""
    # The slope of -x ln x is infinite at 0, where padding is.
    entropy_B = torch.special.entr(shares_BT.clamp(min=1e-30)).sum(dim=1)
    spread_B: Tensor = entropy_B / counted_BT.sum(dim=1).clamp(min=2).log().to(entropy_B)
    return spread_B


def learn_adapters(
    ground: AdapterGround,
    start: Adapters,
    prompts: Sequence[int],
    *,
    steps: int,
    learning_rate: float = 1e-3,
    betas: tuple[float, float] = (0.9, 0.98),
) -> LearnedAdapters:
    """Adapters after a number of AMSGrad steps, all of them at once and none dependent on another.

    The gradient is projected onto the tangent of what is normalised (columns, matrices), and the matrices are
    normalised after each step; for the spectral norm they are only normalised.

    Args:
        ground: Where they act.
        start: Where they start.
        prompts: Which of the slice's prompts.
        steps: How many, at least 0.
        learning_rate: An element and step.
        betas: Shares of the old mean that the means of the gradient and of its square keep.

    Raises:
        OutOfMemory: If a single adapter on a single prompt does not fit.
    """
    adapters = Adapters(*(each.clone() for each in start))
    optimiser = torch.optim.AdamW(
        list(adapters), lr=learning_rate, betas=betas, weight_decay=0.0, amsgrad=True
    )
    history = []
    for _ in range(steps):
        values_K, gradients, _ = ground.look(adapters, prompts)
        history.append(values_K)
        dims: tuple[tuple[int, ...], ...] = {
            "column": ((1,), (1,)),
            "notebook": ((2,), (1,)),
            "frobenius": ((1, 2), (1, 2)),
            "spectral": ((), ()),
        }[ground.goal.normalised]
        for matrices, gradient, dim in zip(adapters, gradients, dims, strict=True):
            matrices.grad = -_tangent(gradient, matrices, dim)
        optimiser.step()
        for matrices, allowed in zip(adapters, adapters.normalised(ground.goal), strict=True):
            matrices.copy_(allowed)
    values_K, _, shares_KNT = ground.look(adapters, prompts)
    history_SK = torch.stack(history) if history else values_K.new_empty((0, len(values_K)))
    return LearnedAdapters(adapters, values_K, history_SK, shares_KNT, ground.spread(shares_KNT, prompts))


def _tangent(gradient: Tensor, matrices: Tensor, dim: tuple[int, ...]) -> Tensor:
    if not dim:
        return gradient
    along = (gradient * matrices).sum(dim=dim, keepdim=True)
    return gradient - along / matrices.square().sum(dim=dim, keepdim=True) * matrices

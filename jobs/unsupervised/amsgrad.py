"""The optimiser of the original MELBO: AMSGrad on the sphere.

Source: Mack and Turner, "Mechanistically eliciting latent behaviors in language models", 2024: AdamW without
decay, learning rate 1e-3, betas 0.9 and 0.98, with the gradient projected onto the sphere's tangent and the
vector put back onto the sphere after each step.
V vectors, S steps, D hidden.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from jobs.unsupervised.landscape import Landscape
from jobs.unsupervised.learned import Learned
from jobs.unsupervised.sphere import Surface


def amsgrad(
    landscape: Landscape,
    start_VD: Tensor,
    groups: Sequence[tuple[Sequence[int], Surface]],
    *,
    steps: int = 300,
    learning_rate: float = 1e-3,
    betas: tuple[float, float] = (0.9, 0.98),
) -> Learned:
    """Vectors after a number of steps; takes and raises otherwise what `fixed_point` does.

    Args:
        landscape: The goals.
        start_VD: Where the vectors start, on their surfaces.
        groups: Vectors that share a surface; each vector in one group.
        steps: Steps that every vector takes, at least 0.
        learning_rate: In residual-stream units an element and step.
        betas: Shares of the old mean that the means of the gradient and of its square keep.
    """
    theta_VD = start_VD.clone()
    optimiser = torch.optim.AdamW([theta_VD], lr=learning_rate, betas=betas, weight_decay=0.0, amsgrad=True)
    learned = Learned(
        torch.full_like(start_VD, torch.nan),
        start_VD.new_full((len(start_VD),), torch.nan),
        start_VD.new_full((steps, len(start_VD)), torch.nan),
        torch.zeros(len(start_VD), dtype=torch.bool),
        torch.ones(len(start_VD), dtype=torch.bool),
    )
    for step in range(steps + 1):
        gradients_VD = _look(landscape, theta_VD, groups, learned)
        if step == steps:
            break
        learned.history_SV[step] = torch.where(learned.finite_V, learned.values_V, torch.nan)
        theta_VD.grad = torch.zeros_like(theta_VD)
        for vectors, surface in groups:
            part = list(vectors)
            theta_VD.grad[part] = -_tangent(surface.flat(gradients_VD[part]), theta_VD[part])
        optimiser.step()
        for vectors, surface in groups:
            part = list(vectors)
            theta_VD[part] = surface.onto(theta_VD[part])
    return learned


def _look(
    landscape: Landscape,
    theta_VD: Tensor,
    groups: Sequence[tuple[Sequence[int], Surface]],
    learned: Learned,
) -> Tensor:
    """Gradients of the vectors that always were finite, 0 of others; `learned` takes note of the former.

    A group at right angles ends as a whole where it last was finite.
    """
    gradients_VD = torch.zeros_like(theta_VD)
    vectors = learned.finite_V.nonzero()[:, 0].tolist()
    if not vectors:
        return gradients_VD
    found = landscape.climb(theta_VD[vectors], vectors)
    finite_V = found.values_V.isfinite() & found.gradients_VD.isfinite().all(dim=1)
    broken = {vector for vector, finite in zip(vectors, finite_V.tolist(), strict=True) if not finite}
    for group, surface in groups:
        if surface.orthogonal and broken & set(group):
            broken |= set(group)
    learned.finite_V[sorted(broken)] = False
    places = [place for place, vector in enumerate(vectors) if vector not in broken]
    kept = [vectors[place] for place in places]
    learned.theta_VD[kept], learned.values_V[kept] = theta_VD[kept], found.values_V[places]
    gradients_VD[kept] = found.gradients_VD[places]
    return gradients_VD


def _tangent(gradients_VD: Tensor, theta_VD: Tensor) -> Tensor:
    """What of each gradient is at right angles to its vector."""
    along_V1 = (gradients_VD * theta_VD).sum(dim=1, keepdim=True) / theta_VD.square().sum(dim=1, keepdim=True)
    return gradients_VD - along_V1 * theta_VD

"""Where perturbations may lie: on a sphere, in a subspace of it, at right angles to each other.

V vectors, K directions, D hidden.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from jobs.errors import SpecError


@dataclass(frozen=True, slots=True, kw_only=True)
class Surface:
    """Where the vectors of a group may lie.

    Attributes:
        radius: Norm of each, in residual-stream units.
        orthogonal: Whether they are at right angles to each other.
        within_KD: Rows, orthonormal, that span what they lie in; None takes the whole space.
        without_KD: Rows, orthonormal, that they are at right angles to; None takes none.
    """

    radius: float
    orthogonal: bool = False
    within_KD: Tensor | None = None
    without_KD: Tensor | None = None

    def check(self, vectors: int, hidden: int) -> None:
        """Raises SpecError if the radius is not above 0, or so many orthogonal vectors do not exist."""
        if not 0 < self.radius < float("inf"):
            raise SpecError(f"radius {self.radius}; it takes a finite number above 0")
        room = (hidden if self.within_KD is None else len(self.within_KD)) - (
            0 if self.without_KD is None else len(self.without_KD)
        )
        if (vectors if self.orthogonal else 1) > room:
            raise SpecError(f"{vectors} orthogonal vectors; there is room for {room} at right angles")

    def flat(self, vectors_VD: Tensor) -> Tensor:
        """The part of each vector that lies in the allowed subspace."""
        if self.within_KD is not None:
            within_KD = self.within_KD.to(vectors_VD)
            vectors_VD = vectors_VD @ within_KD.T @ within_KD
        if self.without_KD is not None:
            vectors_VD = vectors_VD - vectors_VD @ self.without_KD.T @ self.without_KD
        return vectors_VD

    def onto(self, vectors_VD: Tensor) -> Tensor:
        """The points of the surface whose inner products with the vectors have the largest sum.

        Of orthogonal ones that is the polar factor: longer vectors are turned less. NaN where they are not
        finite.
        """
        flat_VD = self.flat(vectors_VD)
        if not self.orthogonal:
            return torch.nn.functional.normalize(flat_VD, dim=-1) * self.radius
        if not bool(flat_VD.isfinite().all()):
            return torch.full_like(flat_VD, torch.nan)
        left_VV, _, right_VD = torch.linalg.svd(flat_VD, full_matrices=False)
        points_VD: Tensor = left_VV @ right_VD * self.radius
        return points_VD

    def drawn(self, vectors: int, hidden: int, seed: int) -> Tensor:
        """Random points of the surface, shape (V, D), float32, on the CPU: normal numbers, then `onto`."""
        generator = torch.Generator().manual_seed(seed)
        return self.onto(torch.randn((vectors, hidden), generator=generator))


def orthonormal(rows_KD: Tensor) -> Tensor:
    """Rows that are independent, made orthonormal one after the other; none is turned about."""
    columns_DK, triangle_KK = torch.linalg.qr(rows_KD.T)
    signs_K = torch.where(triangle_KK.diagonal() < 0, -1.0, 1.0).to(rows_KD)
    basis_KD: Tensor = (columns_DK * signs_K).T
    return basis_KD

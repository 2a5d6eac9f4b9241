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
        """Points of the surface in the directions of the vectors; of orthogonal ones the first goes first."""
        flat_VD = self.flat(vectors_VD)
        if not self.orthogonal:
            return torch.nn.functional.normalize(flat_VD, dim=-1) * self.radius
        columns_DV, triangle_VV = torch.linalg.qr(flat_VD.T)
        signs_V = torch.where(triangle_VV.diagonal() < 0, -1.0, 1.0).to(flat_VD)
        points_VD: Tensor = (columns_DV * signs_V).T * self.radius
        return points_VD

    def drawn(self, vectors: int, hidden: int, seed: int) -> Tensor:
        """Random points of the surface, shape (V, D), float32, on the CPU: normal numbers, then `onto`."""
        generator = torch.Generator().manual_seed(seed)
        return self.onto(torch.randn((vectors, hidden), generator=generator))


def orthonormal(rows_KD: Tensor) -> Tensor:
    """An orthonormal basis of the span of rows that are independent, in their order."""
    basis_KD: Tensor = torch.linalg.qr(rows_KD.T).Q.T
    return basis_KD

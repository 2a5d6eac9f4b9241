"""What an optimiser of perturbations hands back. V vectors, S steps, D hidden."""

from typing import NamedTuple

from torch import Tensor


class Learned(NamedTuple):
    """Vectors as an optimiser leaves them.

    Attributes:
        theta_VD: The vectors.
        values_V: What they maximised: their objectives, times the factor of their coupling if there is one.
        history_SV: What each step found of it, before it moved; NaN once a vector took no more steps.
        settled_V: Whether the optimiser stopped by its own test; the steps ran out otherwise.
        finite_V: Whether the objective and its gradient always were finite, in a group at right angles those
            of all; if not, the vector is the last one where they were, and NaN if there was none.
    """

    theta_VD: Tensor
    values_V: Tensor
    history_SV: Tensor
    settled_V: Tensor
    finite_V: Tensor

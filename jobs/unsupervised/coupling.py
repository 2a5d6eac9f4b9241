"""Terms that make the vectors of a set differ from each other, and each of them agree with itself.

V vectors, N prompts, T tokens, D hidden, K any width.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import normalize


@dataclass(frozen=True, slots=True, kw_only=True)
class Coupling:
    """What the objectives of a set's vectors are multiplied with: exp of the sum of weighted terms.

    A factor makes a weight mean the same at every R, p and q. It is the same for all vectors of the set, with
    the mean of each term over them: were it each vector's own, one vector could be bought at the price of
    all others.

    Attributes:
        vectors: Which vectors make up the set.
        apart_vectors: Weight of `apartness` of the vectors themselves.
        apart_deltas: Weight of `apartness` of their changes of the target, over all counted tokens and
            prompts.
        contrast: Weight of `contrast` of their mean changes on each prompt.
    """

    vectors: tuple[int, ...]
    apart_vectors: float = 0.0
    apart_deltas: float = 0.0
    contrast: float = 0.0

    def factor(self, theta_VD: Tensor, deltas_VNTD: Tensor, counted_NT: Tensor) -> Tensor:
        """The factor of the set, a scalar; vectors whose changes are not finite take no part in it.

        Args:
            theta_VD: The vectors of the set.
            deltas_VNTD: Their changes of the target.
            counted_NT: Which tokens count.
        """
        counted_VNTD = deltas_VNTD * counted_NT[..., None]
        finite_V = counted_VNTD.flatten(1).isfinite().all(dim=1)
        kept_VNTD = counted_VNTD[finite_V]
        terms_V = kept_VNTD.new_zeros(len(kept_VNTD))
        if self.apart_vectors:
            terms_V = terms_V + self.apart_vectors * apartness(theta_VD[finite_V])
        if self.apart_deltas:
            terms_V = terms_V + self.apart_deltas * apartness(kept_VNTD.flatten(1))
        if self.contrast:
            means_VND = kept_VNTD.sum(dim=2) / counted_NT.sum(dim=1)[:, None]
            terms_V = terms_V + self.contrast * contrast(means_VND)
        return terms_V.mean().exp() if len(terms_V) else terms_V.new_ones(())


def apartness(rows_VK: Tensor) -> Tensor:
    """Minus the sum over the other rows of the squared cosine, shape (V,): 0 where all are at right angles.

    Soft orthogonality; of changes of the target it is what the author of MELBO suggests in place of hard
    orthogonality of the vectors.
    """
    units_VK = normalize(rows_VK, dim=1)
    squares_VV = (units_VK @ units_VK.T).square()
    return squares_VV.diagonal() - squares_VV.sum(dim=1)


def contrast(means_VND: Tensor) -> Tensor:
    """How alike a vector's changes are over prompts, less how alike they are to the other vectors', (V,).

    The mean cosine of a vector's mean changes on two prompts (left out where there is one prompt), minus the
    mean cosine to the other vectors' on all prompts (left out where there is one vector). The idea of a
    contrastive objective over directions is NoiseCLR's (Dalva and Yanardag, arXiv:2312.05390); cosines in
    place of its logarithm of exponentials.

    Args:
        means_VND: Mean change of the target over the counted tokens of each prompt.
    """
    vectors, prompts, _ = means_VND.shape
    units_VND = normalize(means_VND, dim=2)
    sums_VD = units_VND.sum(dim=1)
    pairs_VV = sums_VD @ sums_VD.T
    own_V = pairs_VV.diagonal()
    found_V = torch.zeros_like(own_V)
    if prompts > 1:
        found_V = found_V + (own_V - units_VND.square().sum(dim=(1, 2))) / (prompts * (prompts - 1))
    if vectors > 1:
        found_V = found_V - (pairs_VV.sum(dim=1) - own_V) / ((vectors - 1) * prompts**2)
    return found_V

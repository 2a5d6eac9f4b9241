"""Sets whose vectors depend on each other, the span of activations: against plain loops and differences."""

from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from jobs.engine.slices import Slice
from jobs.errors import SpecError
from jobs.unsupervised.coupling import Coupling, apartness, contrast
from jobs.unsupervised.landscape import Goal, Landscape
from jobs.unsupervised.search import Method, Search, learn
from jobs.unsupervised.span import activation_span, share_within
from tests.models import HIDDEN, LAYERS, tiny_replica

PROMPTS = [[5, 6, 7, 8, 9], [3, 4, 5], [9, 8, 7, 6, 5, 4, 3]]


def cosine(one: Tensor, other: Tensor) -> float:
    return float(one.flatten() @ other.flatten() / one.norm() / other.norm())


def test_apartness_is_minus_the_sum_of_squared_cosines_to_the_others() -> None:
    rows = torch.randn((4, 7), dtype=torch.float64)
    expected = [-sum(cosine(rows[i], rows[j]) ** 2 for j in range(4) if j != i) for i in range(4)]
    np.testing.assert_allclose(apartness(rows), expected, rtol=1e-12)
    assert not apartness(torch.eye(5)).any()


@pytest.mark.parametrize(("vectors", "prompts"), [(3, 4), (3, 1), (1, 4), (1, 1)])
def test_contrast_is_the_mean_cosine_to_itself_less_that_to_the_others(vectors: int, prompts: int) -> None:
    means = torch.randn((vectors, prompts, 5), dtype=torch.float64)
    found = contrast(means)
    for one in range(vectors):
        own = [cosine(means[one, n], means[one, m]) for n in range(prompts) for m in range(prompts) if n != m]
        others = [
            cosine(means[one, n], means[other, m])
            for other in range(vectors)
            for n, m in product(range(prompts), repeat=2)
            if other != one
        ]
        expected = (np.mean(own) if own else 0) - (np.mean(others) if others else 0)
        assert float(found[one]) == pytest.approx(expected, abs=1e-12)


def ground(couplings: list[Coupling], prompts: tuple[int, ...] = (0, 1, 2)) -> Landscape:
    # Llama's norms round to float32, which finite differences do not survive.
    slice_ = Slice(tiny_replica("gpt2"), PROMPTS, source=0, target=LAYERS - 2)
    goals = [Goal(radius=1.0, power=2, root=2, prompts=prompts)] * 4
    return Landscape(slice_, slice_.positions_NT > 0, goals, couplings=couplings)


FULL = {"apart_vectors": 0.7, "apart_deltas": 1.3, "contrast": 0.9}


@pytest.mark.parametrize("terms", [*({name: weight} for name, weight in FULL.items()), FULL])
def test_gradients_of_coupled_vectors_are_finite_differences(terms: dict[str, Any]) -> None:
    found = ground([Coupling(vectors=(0, 2, 3), **terms)])
    theta_VD = torch.randn((4, HIDDEN), dtype=torch.float64)
    here = found.climb(theta_VD, range(4))
    for _ in range(2):
        way_VD = torch.randn_like(theta_VD)
        ahead, behind = (
            found.climb(theta_VD + step * way_VD, range(4)).values_V.sum() for step in (1e-5, -1e-5)
        )
        torch.testing.assert_close(
            (here.gradients_VD * way_VD).sum(), (ahead - behind) / 2e-5, rtol=1e-6, atol=1e-6
        )


def test_the_factor_multiplies_the_objective_and_others_keep_theirs() -> None:
    theta_VD = torch.randn((4, HIDDEN), dtype=torch.float64)
    bare = ground([]).climb(theta_VD, range(4))
    coupled = ground([Coupling(vectors=(0, 1, 3), apart_vectors=2.0)]).climb(theta_VD, range(4))
    factor = (2.0 * apartness(theta_VD[[0, 1, 3]]).mean()).exp()
    torch.testing.assert_close(coupled.values_V[[0, 1, 3]], bare.values_V[[0, 1, 3]] * factor)
    torch.testing.assert_close(coupled.values_V[2], bare.values_V[2])
    torch.testing.assert_close(coupled.gradients_VD[2], bare.gradients_VD[2])


def test_coupled_vectors_are_looked_at_in_any_order_and_memory() -> None:
    coupling = Coupling(vectors=(0, 1, 2, 3), apart_deltas=1.0, contrast=0.5)
    theta_VD = torch.randn((4, HIDDEN), dtype=torch.float64)
    together = ground([coupling]).climb(theta_VD, range(4))
    narrow = ground([coupling])
    narrow._slice.replica.memory = 1
    order = [2, 0, 3, 1]
    for found in (ground([coupling]).climb(theta_VD[order], order), narrow.climb(theta_VD[order], order)):
        torch.testing.assert_close(found.values_V, together.values_V[order])
        torch.testing.assert_close(found.gradients_VD, together.gradients_VD[order])


def test_a_coupled_vector_that_is_not_finite_leaves_the_others_alone() -> None:
    coupling = Coupling(vectors=(0, 1, 2, 3), apart_vectors=1.0, apart_deltas=1.0, contrast=0.5)
    theta_VD = torch.randn((4, HIDDEN), dtype=torch.float64)
    theta_VD[1] = torch.nan
    found = ground([coupling]).climb(theta_VD, range(4))
    rest = ground([coupling]).climb(theta_VD[[0, 2, 3]], [0, 2, 3])
    assert found.values_V[1].isnan()
    torch.testing.assert_close(found.values_V[[0, 2, 3]], rest.values_V)
    torch.testing.assert_close(found.gradients_VD[[0, 2, 3]], rest.gradients_VD)


def slice_of(prompts: list[list[int]] = PROMPTS) -> tuple[Slice, Tensor]:
    found = Slice(tiny_replica("llama"), prompts, source=0, target=LAYERS - 2)
    return found, found.positions_NT > 0


def searched(**options: Any) -> Tensor:
    slice_, counted = slice_of()
    search = Search(vectors=4, goal=Goal(radius=1.0, prompts=(0, 1, 2)), **options)
    [found] = learn(slice_, counted, [search], Method(steps=60, tolerance=1e-6))
    return found.theta_VD.double()


def largest_cosine(theta_VD: Tensor) -> float:
    units_VD = torch.nn.functional.normalize(theta_VD, dim=1)
    return float((units_VD @ units_VD.T - torch.eye(len(units_VD))).abs().max())


def test_the_soft_penalty_keeps_vectors_apart_that_would_merge() -> None:
    merged = largest_cosine(searched(orthogonality="none"))
    weak, strong = (
        largest_cosine(searched(orthogonality="soft_vectors", apart=weight)) for weight in (0.5, 50.0)
    )
    assert merged > 0.9
    assert strong < 0.1 < merged
    assert strong < weak


def test_the_soft_penalty_on_deltas_keeps_what_vectors_do_apart() -> None:
    slice_, counted = slice_of()

    def delta_cosine(theta_VD: Tensor) -> float:
        parts = [slice_.deltas(theta_VD, [n] * 4) * counted[n, :, None] for n in range(3)]
        return largest_cosine(torch.cat([part.flatten(1) for part in parts], dim=1))

    merged = delta_cosine(searched(orthogonality="none"))
    apart = delta_cosine(searched(orthogonality="soft_deltas", apart=20.0))
    assert apart < 0.5 < merged


def test_the_contrastive_term_raises_the_contrast() -> None:
    slice_, counted = slice_of()

    def contrast_of(theta_VD: Tensor) -> float:
        means = [
            (slice_.deltas(theta_VD, [n] * 4) * counted[n, :, None]).sum(dim=1) / counted[n].sum()
            for n in range(3)
        ]
        return float(contrast(torch.stack(means, dim=1)).mean())

    bare, with_term = (contrast_of(searched(orthogonality="none", contrast=weight)) for weight in (0.0, 5.0))
    assert with_term > bare + 0.1


def test_trials_of_all_kinds_learn_in_one_pack_what_they_learn_alone() -> None:
    slice_, counted = slice_of()
    goal = Goal(radius=1.0, prompts=(0, 1, 2))
    searches = [
        Search(vectors=3, goal=goal, orthogonality="soft_vectors", apart=5.0, seed=1),
        Search(vectors=2, goal=goal, orthogonality="joint", contrast=2.0, seed=2),
        Search(vectors=2, goal=goal, orthogonality="sequential", seed=3),
        Search(vectors=3, goal=goal, orthogonality="soft_deltas", seed=4),
    ]
    method = Method(steps=12)
    for search, packed in zip(searches, learn(slice_, counted, searches, method), strict=True):
        [alone] = learn(slice_, counted, [search], method)
        torch.testing.assert_close(packed.theta_VD, alone.theta_VD, rtol=1e-6, atol=1e-8)
        torch.testing.assert_close(packed.values_V, alone.values_V, rtol=1e-8, atol=1e-8)


def test_contrast_with_vectors_learned_one_after_another_is_refused() -> None:
    slice_, counted = slice_of()
    search = Search(vectors=2, goal=Goal(radius=1.0), orthogonality="sequential", contrast=1.0)
    with pytest.raises(SpecError, match=r"contrast=1\.0 with orthogonality='sequential'"):
        learn(slice_, counted, [search], Method())


def test_the_span_is_that_of_the_counted_tokens_states() -> None:
    slice_, counted = slice_of()
    basis_KD = activation_span(slice_, counted)
    states_KD = slice_.inputs_NTD[counted]
    torch.testing.assert_close(states_KD @ basis_KD.T @ basis_KD, states_KD)
    assert len(basis_KD) == int(torch.linalg.matrix_rank(states_KD))
    expected = np.linalg.svd(states_KD.numpy())[2][:3]
    np.testing.assert_allclose(
        np.abs(activation_span(slice_, counted, 3).numpy() @ expected.T), np.eye(3), atol=1e-8
    )
    with pytest.raises(SpecError, match="span of 40 directions"):
        activation_span(slice_, counted, 40)


def test_vectors_stay_in_the_span_and_shares_say_so() -> None:
    slice_, counted = slice_of()
    basis_KD = activation_span(slice_, counted, 5)
    inside = searched(within_KD=basis_KD)
    torch.testing.assert_close(share_within(inside, basis_KD), torch.ones(4, dtype=torch.float64))
    random = torch.randn((4000, HIDDEN), dtype=torch.float64)
    assert float(share_within(random, basis_KD).mean()) == pytest.approx(5 / HIDDEN, rel=0.05)


def test_a_search_starts_where_it_is_told_to() -> None:
    slice_, counted = slice_of()
    start_VD = torch.randn((2, HIDDEN), dtype=torch.float64)
    search = Search(vectors=2, goal=Goal(radius=2.0), orthogonality="none", start_VD=start_VD)
    [found] = learn(slice_, counted, [search], Method(optimiser="none"))
    torch.testing.assert_close(found.theta_VD, 2 * torch.nn.functional.normalize(start_VD, dim=1))

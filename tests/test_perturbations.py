"""Perturbations: the objective against plain loops, its optimisers against linear algebra and plain loops."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from jobs.engine.slices import Slice
from jobs.errors import SpecError
from jobs.unsupervised.amsgrad import amsgrad
from jobs.unsupervised.fixed_point import fixed_point, sketched_power
from jobs.unsupervised.jacobian import directional
from jobs.unsupervised.landscape import Climb, Goal, Landscape
from jobs.unsupervised.objective import movement, shares
from jobs.unsupervised.sphere import Surface, orthonormal
from tests.models import HIDDEN, LAYERS, tiny_replica

PROMPTS = [[5, 6, 7, 8, 9], [3, 4, 5], [9, 8, 7, 6, 5, 4, 3]]


class Bowl:
    """A landscape with a known summit: |J theta|^2, NaN for the vectors that are told to break."""

    def __init__(self, jacobian: Tensor, broken_after: dict[int, int] | None = None) -> None:
        self._jacobian = jacobian
        self._broken_after = broken_after or {}
        self.looks: dict[int, int] = {}

    def is_coupled(self, vector: int) -> bool:
        return False

    def values(self, theta_VD: Tensor, vectors: Sequence[int]) -> Tensor:
        return (theta_VD @ self._jacobian.T).square().sum(dim=1)

    def climb(self, theta_VD: Tensor, vectors: Sequence[int]) -> Climb:
        moved = theta_VD @ self._jacobian.T
        values = moved.square().sum(dim=1)
        for place, vector in enumerate(vectors):
            self.looks[vector] = self.looks.get(vector, 0) + 1
            if self.looks[vector] > self._broken_after.get(vector, math.inf):
                values[place] = torch.nan
        return Climb(values, 2 * moved @ self._jacobian)


def bowl(seed: int = 0, **options: Any) -> tuple[Any, np.ndarray, np.ndarray]:
    """A landscape, and the singular values and right singular vectors of its Jacobian."""
    generator = np.random.default_rng(seed)
    left, _ = np.linalg.qr(generator.normal(size=(20, 12)))
    right, _ = np.linalg.qr(generator.normal(size=(12, 12)))
    sizes = np.array([3.0, 2.4, 1.9, 1.5, 1.2, 1.0, 0.8, 0.6, 0.5, 0.4, 0.3, 0.2])
    return Bowl(torch.tensor(left * sizes @ right.T), **options), sizes, right.T


def drawn(surface: Surface, vectors: int, seed: int = 0) -> Tensor:
    return surface.drawn(vectors, 12, seed).double()


@given(
    power=st.floats(1, 5),
    root=st.floats(1, 5),
    over=st.sampled_from(["hidden", "tokens"]),
    seed=st.integers(0, 99),
)
@settings(max_examples=40)
def test_the_objective_is_the_sum_of_the_formula(power: float, root: float, over: Any, seed: int) -> None:
    generator = np.random.default_rng(seed)
    deltas, counted = generator.normal(size=(2, 4, 3)), generator.random((2, 4)) < 0.7
    expected = []
    for delta, tokens in zip(deltas, counted, strict=True):
        kept = [row for row, counts in zip(delta, tokens, strict=True) if counts]
        runs = kept if over == "hidden" else list(np.array(kept).T) if kept else []
        expected.append(sum(math.sqrt(sum(x * x for x in run)) ** power for run in runs) ** (1 / root))
    found = movement(
        torch.tensor(deltas),
        torch.tensor(counted),
        torch.tensor([power] * 2, dtype=torch.float64),
        torch.tensor([root] * 2, dtype=torch.float64),
        over=over,
    )
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-9)


def test_the_other_axis_matters_only_where_p_is_not_2() -> None:
    deltas, counted = torch.randn(1, 5, 7, dtype=torch.float64), torch.ones(1, 5, dtype=torch.bool)
    two, four, one = (torch.tensor([x], dtype=torch.float64) for x in (2.0, 4.0, 1.0))
    torch.testing.assert_close(
        movement(deltas, counted, two, one), movement(deltas, counted, two, one, over="tokens")
    )
    assert not torch.allclose(
        movement(deltas, counted, four, one), movement(deltas, counted, four, one, over="tokens")
    )


def test_shares_say_which_tokens_carry_the_objective() -> None:
    deltas = torch.tensor([[[3.0, 4.0], [0.0, 5.0], [9.0, 9.0]]])
    found = shares(deltas, torch.tensor([[True, True, False]]), torch.tensor([2.0]))
    torch.testing.assert_close(found, torch.tensor([[0.5, 0.5, 0.0]]))


def landscape(goals: Sequence[Goal], name: str = "llama", **options: Any) -> Landscape:
    found = Slice(tiny_replica(name), PROMPTS, source=0, target=LAYERS - 2)
    return Landscape(found, found.positions_NT > 0, goals, **options)


GOALS = [
    Goal(radius=1.0, power=2, root=1, prompts=(0,)),
    Goal(radius=2.0, power=4, root=4, prompts=(1, 2)),
    Goal(radius=0.5, power=1, root=2, prompts=(0, 1, 2)),
]


@pytest.mark.parametrize("over", ["hidden", "tokens"])
def test_gradients_are_finite_differences(over: Any) -> None:
    # Llama's norms round to float32, which differences of 1e-5 do not survive.
    ground = landscape(GOALS, "gpt2", over=over)
    theta_VD = torch.randn((3, HIDDEN), dtype=torch.float64)
    found = ground.climb(theta_VD, [0, 1, 2])
    for _ in range(3):
        way_VD = torch.randn_like(theta_VD)
        ahead, behind = (ground.climb(theta_VD + step * way_VD, [0, 1, 2]).values_V for step in (1e-5, -1e-5))
        torch.testing.assert_close(
            (found.gradients_VD * way_VD).sum(dim=1), (ahead - behind) / 2e-5, rtol=1e-6, atol=1e-6
        )


def test_vectors_are_looked_at_alone_or_together_in_any_order_and_memory() -> None:
    ground = landscape(GOALS)
    theta_VD = torch.randn((3, HIDDEN), dtype=torch.float64)
    together = ground.climb(theta_VD, [0, 1, 2])
    shuffled = ground.climb(theta_VD[[2, 0, 1]], [2, 0, 1])
    torch.testing.assert_close(shuffled.values_V, together.values_V[[2, 0, 1]])
    narrow = landscape(GOALS)
    narrow._slice.replica.memory = 1
    for vector in range(3):
        for place in (ground, narrow):
            alone = place.climb(theta_VD[[vector]], [vector])
            torch.testing.assert_close(alone.values_V[0], together.values_V[vector])
            torch.testing.assert_close(alone.gradients_VD[0], together.gradients_VD[vector])


def test_the_objective_of_several_prompts_is_the_sum_of_each() -> None:
    apart = landscape([Goal(radius=1.0, power=3, root=2, prompts=(prompt,)) for prompt in range(3)])
    whole = landscape([Goal(radius=1.0, power=3, root=2, prompts=(0, 1, 2))])
    theta_1D = torch.randn((1, HIDDEN), dtype=torch.float64)
    parts = apart.climb(theta_1D.repeat(3, 1), [0, 1, 2]).values_V
    torch.testing.assert_close(whole.climb(theta_1D, [0]).values_V[0], parts.sum())


@pytest.mark.parametrize("seed", range(3))
def test_on_a_linear_slice_the_fixed_point_is_the_first_singular_vector(seed: int) -> None:
    ground, sizes, right = bowl(seed)
    surface = Surface(radius=2.0)
    found = fixed_point(ground, drawn(surface, 3, seed), [([v], surface) for v in range(3)], tolerance=1e-12)
    assert found.settled_V.all()
    np.testing.assert_allclose(found.values_V, 4 * sizes[0] ** 2, rtol=1e-6)
    np.testing.assert_allclose(np.abs(found.theta_VD.numpy() @ right[0]), 2, rtol=1e-5)
    assert (found.history_SV.diff(dim=0).nan_to_num() >= 0).all()


def test_kin_lead_each_other_to_the_same_summit_in_fewer_looks() -> None:
    surface = Surface(radius=2.0)
    start_VD, alone = drawn(surface, 8), [([v], surface) for v in range(8)]
    by_itself = fixed_point(bowl()[0], start_VD, alone, tolerance=1e-9)
    led = fixed_point(bowl()[0], start_VD, alone, kin=[range(8)], tolerance=1e-9)
    torch.testing.assert_close(led.theta_VD.abs(), by_itself.theta_VD.abs(), rtol=1e-3, atol=1e-4)
    looks = [int(found.history_SV.isfinite().sum()) for found in (led, by_itself)]
    assert looks[0] < looks[1]


def test_products_that_are_sketched_from_as_many_images_as_there_are_dimensions_are_exact() -> None:
    generator = torch.Generator().manual_seed(0)
    factor_DD = torch.randn((6, 6), generator=generator, dtype=torch.float64)
    operator_DD = factor_DD @ factor_DD.T + torch.eye(6)
    points_KD = torch.randn((9, 6), generator=generator, dtype=torch.float64)
    found = sketched_power(points_KD, points_KD @ operator_DD, times=3)
    expected = points_KD @ torch.linalg.matrix_power(operator_DD, 4)
    torch.testing.assert_close(found, torch.nn.functional.normalize(expected, dim=-1), rtol=1e-6, atol=1e-8)
    single = sketched_power(points_KD[:1], points_KD[:1] @ operator_DD, times=3)
    torch.testing.assert_close(
        single, torch.nn.functional.normalize(points_KD[:1] @ operator_DD), rtol=1e-9, atol=1e-9
    )


@pytest.mark.parametrize("orthogonal", [False, True])
def test_of_two_opposite_ends_the_higher_one_is_chosen(orthogonal: bool) -> None:
    class Tilted(Bowl):
        """Higher on one side of every axis."""

        def values(self, theta_VD: Tensor, vectors: Sequence[int]) -> Tensor:
            return super().values(theta_VD, vectors) + theta_VD.sum(dim=1) / 4

        def climb(self, theta_VD: Tensor, vectors: Sequence[int]) -> Climb:
            found = super().climb(theta_VD, vectors)
            return Climb(self.values(theta_VD, vectors), found.gradients_VD + 0.25)

    _, sizes, right = bowl()
    ground = Tilted(torch.tensor(np.diag(sizes) @ right))
    surface = Surface(radius=1.0, orthogonal=orthogonal)
    groups = [(range(4), surface)] if orthogonal else [([v], surface) for v in range(4)]
    for seed in range(5):
        # Two looks: the start, and the end that was chosen.
        found = fixed_point(ground, drawn(surface, 4, seed), groups, steps=2)
        assert (ground.values(found.theta_VD, range(4)) > ground.values(-found.theta_VD, range(4))).all()


def test_orthogonal_vectors_span_the_first_singular_vectors() -> None:
    ground, sizes, right = bowl()
    surface = Surface(radius=0.5, orthogonal=True)
    found = fixed_point(ground, drawn(surface, 4), [(range(4), surface)], steps=300, tolerance=1e-13)
    inside = np.square(found.theta_VD.numpy() @ right[:4].T).sum(axis=1)
    np.testing.assert_allclose(inside, 0.25, rtol=1e-5)
    np.testing.assert_allclose(found.values_V.sum(), 0.25 * np.square(sizes[:4]).sum(), rtol=1e-6)


def test_groups_of_one_call_find_what_they_find_alone() -> None:
    wide, narrow = Surface(radius=2.0, orthogonal=True), Surface(radius=0.1)
    start_VD = torch.cat([drawn(wide, 2), drawn(narrow, 1)])
    together = fixed_point(bowl()[0], start_VD, [([0, 1], wide), ([2], narrow)])
    first = fixed_point(bowl()[0], start_VD[:2], [([0, 1], wide)])
    other = fixed_point(bowl()[0], start_VD[2:], [([0], narrow)])
    torch.testing.assert_close(together.theta_VD, torch.cat([first.theta_VD, other.theta_VD]))
    assert len(together.history_SV) == max(len(first.history_SV), len(other.history_SV))


def test_vectors_stay_in_their_subspace() -> None:
    ground, sizes, right = bowl()
    within_KD, without_KD = torch.tensor(right[2:6]), torch.tensor(right[2:3])
    surface = Surface(radius=1.0, within_KD=within_KD, without_KD=without_KD)
    surface.check(1, 12)
    found = fixed_point(
        ground, surface.onto(drawn(Surface(radius=1.0), 1)), [([0], surface)], tolerance=1e-12
    )
    np.testing.assert_allclose(found.values_V, sizes[3] ** 2, rtol=1e-6)
    np.testing.assert_allclose(np.abs(found.theta_VD.numpy() @ right[3]), 1, rtol=1e-5)


@pytest.mark.parametrize("optimiser", [fixed_point, amsgrad])
def test_a_group_at_right_angles_ends_where_it_last_was_finite_as_a_whole(optimiser: Any) -> None:
    surface = Surface(radius=2.0, orthogonal=True)
    ground, _, _ = bowl(broken_after={1: 3})
    found = optimiser(ground, drawn(surface, 3), [(range(3), surface)], steps=40)
    assert found.finite_V.tolist() == [False, False, False]
    np.testing.assert_allclose(found.theta_VD @ found.theta_VD.T, 4 * np.eye(3), atol=1e-9)
    np.testing.assert_allclose(found.values_V, found.history_SV[:3].max(dim=0).values)
    assert max(ground.looks.values()) <= 4


@pytest.mark.parametrize("optimiser", [fixed_point, amsgrad])
def test_a_vector_that_breaks_keeps_its_last_finite_point_and_the_others_go_on(optimiser: Any) -> None:
    surface = Surface(radius=1.0)
    start_VD = drawn(surface, 3)
    groups = [([v], surface) for v in range(3)]
    ground, _, _ = bowl(broken_after={0: 0, 1: 2})
    found = optimiser(ground, start_VD, groups, steps=40)
    assert found.finite_V.tolist() == [False, False, True]
    assert found.theta_VD[0].isnan().all()
    assert found.theta_VD[1:].isfinite().all()
    assert float(found.values_V[1]) == pytest.approx(float(found.history_SV[1, 1]))
    assert ground.looks[1] == 3
    assert found.values_V[2] > found.history_SV[0, 2]


class NoForwardMode(torch.autograd.Function):
    """x^3, of which torch knows the gradient alone."""

    @staticmethod
    def forward(context: Any, x: Tensor) -> Tensor:
        context.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(context: Any, *ways: Tensor) -> Tensor:
        (x,) = context.saved_tensors
        return 3 * x**2 * ways[0]


def test_directional_derivatives_need_no_forward_mode() -> None:
    generator = torch.Generator().manual_seed(0)
    at, ways = (torch.randn(2, 3, generator=generator, dtype=torch.float64) for _ in range(2))
    mix = torch.randn(3, 3, generator=generator, dtype=torch.float64)
    value, moved = directional(lambda x: NoForwardMode.apply(x @ mix).tanh(), at, ways)
    expected, slopes = directional(lambda x: ((x @ mix) ** 3).tanh(), at, ways)
    torch.testing.assert_close(value, expected)
    torch.testing.assert_close(moved, slopes)
    assert not moved.requires_grad
    assert not value.requires_grad


@pytest.mark.parametrize("optimiser", [fixed_point, amsgrad])
def test_a_gradient_of_zero_leads_nowhere(optimiser: Any) -> None:
    for surface in (Surface(radius=1.0), Surface(radius=1.0, orthogonal=True)):
        start_VD = drawn(surface, 2)
        groups = [(range(2), surface)] if surface.orthogonal else [([v], surface) for v in range(2)]
        found = optimiser(Bowl(torch.zeros(12, 12, dtype=torch.float64)), start_VD, groups, steps=5)
        np.testing.assert_allclose(found.theta_VD.norm(dim=1), 1)


def test_points_that_are_not_finite_have_no_nearest_one_at_right_angles() -> None:
    vectors_VD = torch.tensor([[1.0, 0.0], [torch.inf, 1.0]])
    assert Surface(radius=1.0, orthogonal=True).onto(vectors_VD).isnan().all()


def test_a_step_that_would_go_down_is_taken_back() -> None:
    class Ridge(Bowl):
        """Its gradient points past the summit: a whole step lands on the other side, lower."""

        def climb(self, theta_VD: Tensor, vectors: Sequence[int]) -> Climb:
            summit = torch.tensor([1.0, 0.0], dtype=theta_VD.dtype)
            angle = torch.atan2(theta_VD[:, 1], theta_VD[:, 0])
            past = -torch.sign(angle) * torch.minimum(3 * angle.abs(), torch.tensor(2.5))
            ahead = torch.stack([torch.cos(angle + past), torch.sin(angle + past)], dim=1)
            return Climb(theta_VD @ summit, ahead)

        def values(self, theta_VD: Tensor, vectors: Sequence[int]) -> Tensor:
            return theta_VD @ torch.tensor([1.0, 0.0], dtype=theta_VD.dtype)

    surface = Surface(radius=1.0)
    start_VD = torch.tensor([[math.cos(1.0), math.sin(1.0)]], dtype=torch.float64)
    found = fixed_point(Ridge(torch.zeros(1, 1)), start_VD, [([0], surface)], steps=80)
    assert (found.history_SV.diff(dim=0) < 0).any()
    assert float(found.values_V) >= float(found.history_SV.max())
    assert float(found.values_V) > 0.99


def test_amsgrad_takes_the_steps_of_a_plain_loop() -> None:
    goals = [Goal(radius=1.5), Goal(radius=3.0, power=4, root=4)]
    ground = landscape(goals)
    surfaces = [Surface(radius=goal.radius) for goal in goals]
    start_VD = torch.cat([surface.drawn(1, HIDDEN, 7).double() for surface in surfaces])
    found = amsgrad(ground, start_VD, [([v], surface) for v, surface in enumerate(surfaces)], steps=6)
    for vector, goal in enumerate(goals):
        theta = start_VD[vector].clone()
        optimiser = torch.optim.AdamW([theta], lr=1e-3, betas=(0.9, 0.98), weight_decay=0.0, amsgrad=True)
        values = []
        for _ in range(6):
            climb = ground.climb(theta[None], [vector])
            values.append(float(climb.values_V))
            gradient = -climb.gradients_VD[0]
            theta.grad = gradient - (gradient @ theta) * theta / goal.radius**2
            optimiser.step()
            theta.mul_(goal.radius / theta.norm())
        torch.testing.assert_close(found.theta_VD[vector], theta)
        np.testing.assert_allclose(found.history_SV[:, vector], values)


def test_without_steps_vectors_stay_random() -> None:
    surface = Surface(radius=1.0, orthogonal=True)
    start_VD = drawn(surface, 3)
    found = amsgrad(bowl()[0], start_VD, [(range(3), surface)], steps=0)
    torch.testing.assert_close(found.theta_VD, start_VD)
    assert found.history_SV.shape == (0, 3)
    torch.testing.assert_close(
        found.theta_VD @ found.theta_VD.T, torch.eye(3, dtype=torch.float64), rtol=1e-6, atol=1e-6
    )


def test_no_other_points_of_the_surface_agree_more_with_the_vectors() -> None:
    surface = Surface(radius=3.0, orthogonal=True)
    rows_KD = torch.randn((4, 12), dtype=torch.float64)
    points = surface.onto(rows_KD)
    torch.testing.assert_close(points @ points.T, 9 * torch.eye(4, dtype=torch.float64))
    agreement = float((points * rows_KD).sum())
    expected = 3 * np.linalg.svd(rows_KD.numpy(), compute_uv=False).sum()
    assert agreement == pytest.approx(expected)
    for seed in range(50):
        others = surface.drawn(4, 12, seed).double()
        assert float((others * rows_KD).sum()) < agreement


def test_rows_are_made_orthonormal_in_their_order_and_none_is_turned_about() -> None:
    rows_KD = torch.randn((4, 12), dtype=torch.float64)
    basis = orthonormal(rows_KD)
    torch.testing.assert_close(basis @ basis.T, torch.eye(4, dtype=torch.float64))
    torch.testing.assert_close(rows_KD @ basis.T @ basis, rows_KD)
    torch.testing.assert_close(basis[0], rows_KD[0] / rows_KD[0].norm())
    assert (basis * rows_KD).sum(dim=1).min() > 0


@pytest.mark.parametrize("radius", [0.0, -1.0, math.inf, math.nan])
def test_a_radius_that_is_no_length_is_refused(radius: float) -> None:
    with pytest.raises(SpecError, match=f"radius {radius}"):
        Surface(radius=radius).check(1, 12)


def test_more_orthogonal_vectors_than_there_is_room_for_are_refused() -> None:
    Surface(radius=1.0, orthogonal=True).check(12, 12)
    with pytest.raises(SpecError, match="13 orthogonal vectors; there is room for 12"):
        Surface(radius=1.0, orthogonal=True).check(13, 12)
    with pytest.raises(SpecError, match="room for 3"):
        Surface(radius=1.0, orthogonal=True, within_KD=torch.eye(12)[:4], without_KD=torch.eye(12)[:1]).check(
            4, 12
        )

"""Derivatives of a slice against autograd and differences; features against algebra and planted ones."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from jobs.engine.interventions import Add
from jobs.engine.replica import Replica
from jobs.engine.sites import Place, picked
from jobs.engine.slices import Slice
from jobs.engine.tables import Steering, row_tables, steered
from jobs.unsupervised.causal_map import CausalMap, Curved, Pulled
from jobs.unsupervised.jacobian import jacobian_directions, stretched
from jobs.unsupervised.transcoding import (
    alphas,
    exponential_factors,
    linear_factors,
    quadratic_factors,
)
from tests.models import ARCHITECTURES, FLOAT32_ONLY, HIDDEN, LAYERS, tiny_replica

PROMPTS = [[5, 6, 7, 8, 9], [3, 4, 5], [9, 8, 7, 6, 5, 4, 3]]


def made(name: str = "gpt2", last: int = 2) -> tuple[Replica, Slice, Tensor]:
    replica = tiny_replica(name)
    slice_ = Slice(replica, PROMPTS, source=0, target=LAYERS - 2)
    counted = slice_.positions_NT >= 0
    counted[:, :-last] = False
    return replica, slice_, counted


def whole_jacobian(slice_: Slice, counted: Tensor) -> Tensor:
    """Of all counted tokens of all prompts, shape (tokens x D, D), by reverse mode."""
    parts = []
    for prompt in range(len(PROMPTS)):

        def moved(theta_D: Tensor, prompt: int = prompt) -> Tensor:
            return slice_.deltas(theta_D[None], [prompt])[0][counted[prompt]]

        zeros = torch.zeros(HIDDEN, dtype=slice_.wide.dtype)
        parts.append(torch.autograd.functional.jacobian(moved, zeros).flatten(0, 1))
    return torch.cat(parts)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_products_with_the_jacobian_are_those_of_reverse_mode(name: str) -> None:
    _, slice_, counted = made(name)
    jacobian = whole_jacobian(slice_, counted)
    vectors = torch.randn((3, HIDDEN)).to(slice_.wide)
    close = {"rtol": 1e-3, "atol": 1e-3} if name in FLOAT32_ONLY else {"rtol": 1e-5, "atol": 1e-5}
    torch.testing.assert_close(stretched(slice_, counted, vectors), vectors @ jacobian.T @ jacobian, **close)


def test_directions_are_the_first_right_singular_vectors() -> None:
    _, slice_, counted = made()
    _, sizes, right = torch.linalg.svd(whole_jacobian(slice_, counted), full_matrices=False)
    found, values = jacobian_directions(slice_, counted, 4, passes=60)
    torch.testing.assert_close(values, sizes[:4], rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(np.abs((found @ right[:4].T).numpy()), np.eye(4), atol=2e-2)
    quick, few = jacobian_directions(slice_, counted, 4)
    torch.testing.assert_close(few, sizes[:4], rtol=2e-2, atol=1e-6)
    torch.testing.assert_close(quick @ quick.T, torch.eye(4, dtype=torch.float64))


def mean_delta(slice_: Slice, counted: Tensor, theta_D: Tensor) -> Tensor:
    """The map by a plain loop over prompts."""
    means = [slice_.deltas(theta_D[None], [n])[0][counted[n]].mean(dim=0) for n in range(len(PROMPTS))]
    return torch.stack(means).mean(dim=0)


def test_the_map_and_its_pull_are_those_of_a_plain_loop() -> None:
    _, slice_, counted = made()
    causal = CausalMap(slice_, counted)
    theta, ways = torch.randn((2, 3, HIDDEN), dtype=torch.float64)
    found = causal.pulled(theta, ways)
    torch.testing.assert_close(causal.at(theta), found.values_VD)
    for vector in range(3):
        leaf = theta[vector].clone().requires_grad_()
        value = mean_delta(slice_, counted, leaf)
        torch.testing.assert_close(found.values_VD[vector], value.detach())
        (expected,) = torch.autograd.grad(value, leaf, ways[vector])
        torch.testing.assert_close(found.pulled_VD[vector], expected)


def test_first_and_second_derivatives_at_0_are_those_of_autograd() -> None:
    _, slice_, counted = made()
    causal = CausalMap(slice_, counted)
    inputs, outputs = torch.randn((2, 2, HIDDEN), dtype=torch.float64)
    zeros = torch.zeros(HIDDEN, dtype=torch.float64)
    jacobian = torch.autograd.functional.jacobian(lambda t: mean_delta(slice_, counted, t), zeros)
    torch.testing.assert_close(causal.pushed(inputs), inputs @ jacobian.T)
    found = causal.curved(inputs, outputs)
    step = 1e-4
    for number, (v, u) in enumerate(zip(inputs, outputs, strict=True)):
        ahead, behind = (mean_delta(slice_, counted, sign * step * v) for sign in (1, -1))
        torch.testing.assert_close(found.values_VD[number], (ahead + behind) / step**2, rtol=1e-4, atol=1e-4)
        pulls = []
        for sign in (1, -1):
            leaf = (sign * step * v).requires_grad_()
            (pull,) = torch.autograd.grad(mean_delta(slice_, counted, leaf) @ u, leaf)
            pulls.append(pull)
        expected = (pulls[0] - pulls[1]) / (2 * step)
        torch.testing.assert_close(found.pulled_VD[number], expected, rtol=1e-4, atol=1e-4)


def test_memory_does_not_change_what_is_found() -> None:
    replica, slice_, counted = made()
    causal = CausalMap(slice_, counted)
    theta, ways = torch.randn((2, 5, HIDDEN), dtype=torch.float64)
    everything = (causal.pulled(theta, ways), causal.curved(theta, ways), causal.pushed(theta))
    replica.memory = 1
    torch.testing.assert_close(
        (causal.pulled(theta, ways), causal.curved(theta, ways), causal.pushed(theta)), everything
    )


def test_features_are_trained_where_they_steer() -> None:
    """What `Add(layer=source)` does to the whole model is what the map says."""
    replica, slice_, counted = made("llama", last=1)
    theta_D = torch.randn(HIDDEN, dtype=torch.float64)
    states = []
    for rows in ([[]], [[Add(layer=0, vector=theta_D.numpy())]]):
        ends = []
        for prompt in PROMPTS:
            steering = Steering(row_tables(replica, rows).take([0]), [len(prompt)])
            place = Place(LAYERS - 2, "after")
            with (
                torch.no_grad(),
                steered(replica, steering),
                picked(replica, [place], lambda h: h[0, -1].clone()) as found,
            ):
                replica.logits([prompt], keep=1)
            ends.append(found[place])
        states.append(torch.stack(ends).mean(dim=0))
    torch.testing.assert_close(
        CausalMap(slice_, counted).at(theta_D[None])[0], states[1] - states[0], rtol=1e-6, atol=1e-8
    )


class Planted:
    """A map with known features: delta(theta) = sum over l of alpha_l u_l f(v_l . theta)."""

    def __init__(self, features: int = 5, hidden: int = 24, kind: str = "exponential", seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        draw = {"generator": generator, "dtype": torch.float64}
        self.inputs = torch.linalg.qr(torch.randn((hidden, features), **draw)).Q.T
        self.outputs = torch.linalg.qr(torch.randn((hidden, features), **draw)).Q.T
        self.alphas = torch.linspace(3.0, 1.0, features, dtype=torch.float64)
        self.hidden = hidden
        self._kind = kind

    def _map(self, theta_VD: Tensor) -> Tensor:
        along = theta_VD @ self.inputs.T
        features = {"exponential": torch.expm1, "quadratic": torch.square, "linear": lambda x: x}
        return (self.alphas * features[self._kind](along)) @ self.outputs

    def at(self, theta_VD: Tensor) -> Tensor:
        return self._map(theta_VD)

    def pulled(self, theta_VD: Tensor, ways_VD: Tensor) -> Pulled:
        leaf = theta_VD.clone().requires_grad_()
        values = self._map(leaf)
        (pulled,) = torch.autograd.grad(values, leaf, ways_VD)
        return Pulled(values.detach(), pulled)

    def pushed(self, ways_VD: Tensor) -> Tensor:
        return torch.func.jvp(self._map, (torch.zeros_like(ways_VD),), (ways_VD,))[1]

    def curved(self, inputs_VD: Tensor, outputs_VD: Tensor) -> Curved:
        along, out = inputs_VD @ self.inputs.T, outputs_VD @ self.outputs.T
        curve = {"exponential": 1.0, "quadratic": 2.0, "linear": 0.0}[self._kind] * self.alphas
        return Curved((curve * along**2) @ self.outputs, (curve * along * out) @ self.inputs)


def matched(found: Tensor, planted: Tensor) -> np.ndarray:
    """For each planted direction the greatest cosine with one found, or with its opposite."""
    cosines: np.ndarray = np.abs((planted @ found.T).numpy())
    return cosines.max(axis=1)


def start(planted: Planted, factors: int, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn((factors, planted.hidden), generator=generator, dtype=torch.float64)


def test_linear_features_are_singular_vectors_largest_first() -> None:
    planted = Planted(kind="linear")
    found = linear_factors(planted, start(planted, 5), iterations=80)  # type: ignore[arg-type]
    torch.testing.assert_close(found.strengths_V, planted.alphas, rtol=1e-6, atol=1e-8)
    np.testing.assert_allclose(np.abs((found.inputs_VD @ planted.inputs.T).numpy()), np.eye(5), atol=1e-3)
    pairs = (found.inputs_VD @ planted.inputs.T).diagonal() * (
        found.outputs_VD @ planted.outputs.T
    ).diagonal()
    torch.testing.assert_close(pairs, torch.ones(5, dtype=torch.float64), rtol=1e-5, atol=1e-5)


def test_quadratic_features_are_those_planted() -> None:
    planted = Planted(kind="quadratic")
    found = quadratic_factors(planted, start(planted, 12), iterations=60)  # type: ignore[arg-type]
    assert np.abs((planted.inputs @ found.inputs_VD.T).numpy()).max(axis=1).min() > 0.99
    order = found.strengths_V.argsort(descending=True)[:5]
    torch.testing.assert_close(found.strengths_V[order], planted.alphas, rtol=2e-2, atol=1e-3)
    assert float(found.history_S[-1]) >= float(found.history_S[0])


@pytest.mark.parametrize("seed", range(3))
def test_exponential_features_are_those_planted(seed: int) -> None:
    planted = Planted(seed=seed)
    found = exponential_factors(planted, start(planted, 12, seed), 1.0, iterations=60)  # type: ignore[arg-type]
    assert matched(found.inputs_VD, planted.inputs).min() > 0.95


def test_alphas_are_those_for_which_the_features_fit() -> None:
    planted = Planted()
    values = planted.at(planted.inputs)
    torch.testing.assert_close(alphas(planted.inputs, planted.outputs, values), planted.alphas)
    twice = [torch.cat([each, each]) for each in (planted.inputs, planted.outputs, values)]
    torch.testing.assert_close(alphas(*twice), torch.cat([planted.alphas] * 2) / 2)


def test_linear_features_of_a_slice_are_those_of_its_jacobian() -> None:
    _, slice_, counted = made()
    causal = CausalMap(slice_, counted)
    zeros = torch.zeros(HIDDEN, dtype=torch.float64)
    jacobian = torch.autograd.functional.jacobian(lambda t: mean_delta(slice_, counted, t), zeros)
    sizes = torch.linalg.svdvals(jacobian)
    begin = torch.randn((6, HIDDEN), dtype=torch.float64)
    found: Any = linear_factors(causal, begin, iterations=60)
    torch.testing.assert_close(found.strengths_V[:3], sizes[:3], rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(
        (found.outputs_VD[0] @ jacobian) * found.strengths_V[0] ** -1,
        found.inputs_VD[0],
        rtol=2e-2,
        atol=2e-2,
    )

"""Points of a face, between slabs: against SciPy."""

import numpy as np
import pytest
import torch
from scipy.optimize import linprog, lsq_linear

from flowsim.norms.vector import Linf
from flowsim.velocity.ties import Slabs, least_curved, support_within


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


GRADIENT = torch.tensor([1.0, -2.0, 0, 0, 0, 0]).double()
FACE = Linf().face(GRADIENT)  # u₁ = 1, u₂ = −1, and the others in [−1, 1]
NOTHING = torch.zeros(0).double()
WHOLE = Slabs(NOTHING.view(0, 6), NOTHING, NOTHING)


def half(seed):
    """⟨n, u⟩ ≤ 0 and ⟨n', u⟩ = 0."""
    n = randn(2, 6, seed=seed)
    n[:, :2] = 0
    n = n / torch.linalg.vector_norm(n, dim=-1, keepdim=True)
    return Slabs(n, torch.tensor([-torch.inf, 0]).double(), torch.zeros(2).double())


@pytest.mark.parametrize("seed", range(3))
def test_least_curvature_is_a_bounded_least_squares_problem(seed):
    C = randn(8, 6, seed=seed)
    u = least_curved(FACE, C, WHOLE, GRADIENT.sign())
    fixed = (C[:, 0] - C[:, 1]).numpy()
    free = lsq_linear(C[:, 2:].numpy(), -fixed, (-1, 1), tol=1e-14).x
    np.testing.assert_allclose(u, [1, -1, *free], atol=1e-7)


def test_of_equal_curvatures_the_shortest():
    C = randn(1, 6, seed=3)
    u = least_curved(FACE, C, WHOLE, GRADIENT.sign())
    free, c = u[2:], C[0, 2:]
    rest = C[0, 1] - C[0, 0]
    np.testing.assert_allclose(free, (rest / (c @ c) * c).clamp(-1, 1), atol=1e-7)


@pytest.mark.parametrize("seed", range(3))
def test_slabs_are_respected_and_nothing_in_them_is_less_curved(seed):
    C, slabs = randn(8, 6, seed=seed), half(seed + 20)
    u = least_curved(FACE, C, slabs, GRADIENT.sign())
    along = slabs.n @ u
    assert along[0] <= 1e-9
    assert abs(along[1]) <= 1e-9
    assert (u[2:].abs() <= 1 + 1e-9).all()
    for other in range(200):
        v = u + 0.1 * randn(6, seed=other)
        v[:2] = u[:2]
        v = v - (slabs.n[1] @ v) * slabs.n[1]
        if (slabs.n[0] @ v) <= 0 and (v[2:].abs() <= 1).all():
            assert torch.linalg.vector_norm(C @ v) >= torch.linalg.vector_norm(C @ u) - 1e-9


@pytest.mark.parametrize("seed", range(3))
def test_the_support_is_a_linear_programme(seed):
    a, slabs = randn(6, seed=seed), half(seed + 40)
    n = slabs.n.numpy()
    bounds = [(1, 1), (-1, -1), *[(-1, 1)] * 4]
    best = linprog(-a.numpy(), n[:1], [0], n[1:], [0], bounds=bounds)
    assert float(support_within(FACE, a, slabs)) == pytest.approx(-best.fun, rel=1e-7)

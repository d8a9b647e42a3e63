"""Outer functions: Fenchel's inequality, derivatives of the conjugate, and paths in the domain."""

import pytest
import torch

from flowsim.convex.outer import HalfSquare, SoftMaximum

B = torch.tensor([0.3, -0.2, 1.0, 0.0], dtype=torch.float64)
OUTERS = {"soft": SoftMaximum(0.4), "square": HalfSquare()}


def value(outer, z):
    if isinstance(outer, HalfSquare):
        return 0.5 * z @ z
    return outer.temperature * torch.logsumexp(-z / outer.temperature, 0)


@pytest.mark.parametrize("name", OUTERS)
def test_the_gap_is_that_of_fenchel(name):
    outer, z = OUTERS[name], 2 * B - 0.1
    p = outer.begin(B)
    gap = value(outer, z) + outer.dual(p, 0.0).value + p @ z
    assert float(outer.gap(p, z)) == pytest.approx(float(gap), abs=1e-12)
    assert float(gap) > 1e-3
    best = torch.softmax(-z / 0.4, 0) if outer.simplex else -z
    assert float(outer.gap(best, z)) == pytest.approx(0, abs=1e-14)


@pytest.mark.parametrize("mu", [0.0, 0.1])
@pytest.mark.parametrize("name", OUTERS)
def test_derivatives_of_the_conjugate(name, mu):
    outer, p = OUTERS[name], OUTERS[name].begin(B)
    at = outer.dual(p, mu)
    of_value = torch.func.grad(lambda p: outer.dual(p, mu).value)
    torch.testing.assert_close(of_value(p), at.slope)
    hessian = torch.func.jacrev(of_value)(p)
    torch.testing.assert_close(hessian, torch.diag(at.diagonal))


@pytest.mark.parametrize("name", OUTERS)
def test_paths_leave_in_their_direction_and_stay_in_the_domain(name):
    outer, p = OUTERS[name], OUTERS[name].begin(B)
    d = torch.tensor([1.0, -2.0, 0.5, 0.5], dtype=torch.float64)
    for longest, path in outer.paths(p, d):
        torch.testing.assert_close((path(1e-7) - p) / 1e-7, d, rtol=1e-4, atol=1e-5)
        end = path(longest)
        if outer.simplex:
            assert bool((end > 0).all())
            assert float(end.sum()) == pytest.approx(1)
    assert bool((outer.inside(p, 0.1) != 0).any())

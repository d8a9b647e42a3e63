"""Smoothed dual norms: derivatives and limits. Minima over unit balls: duality gaps and
projections."""

import pytest
import torch

import flowsim as fs
from flowsim.convex.in_ball import minimise_in_ball
from flowsim.convex.outer import HalfSquare, SoftMaximum
from flowsim.convex.smoothed import smoothed_dual, supports_smoothing
from flowsim.layout import lay_out

LAYOUT = lay_out({"A": (3, 4)})
TWO = lay_out({"A": (3, 2), "b": (4,)})
MATRIX = torch.diag(torch.linspace(1, 3, 12, dtype=torch.float64)) + 0.1
NORMS = {
    "l1": fs.L1(),
    "l2": fs.L2(),
    "linf": fs.Linf(),
    "l1.5": fs.Lp(1.5),
    "l4": fs.Lp(4),
    "mahalanobis": fs.Mahalanobis(MATRIX),
    "spectral": fs.Spectral(),
    "nuclear": fs.Nuclear(),
    "schatten4": fs.Schatten(4),
}
BLOCKS = {
    "max": fs.Max({"A": fs.Spectral(), "b": fs.L2()}, {"A": 2.0}),
    "sum": fs.Sum({"A": fs.Nuclear(), "b": fs.Linf()}, {"A": 2.0}),
    "euclidean": fs.Euclidean({"A": fs.Spectral(), "b": fs.L1()}),
}
BOUND = {k: n.bind(LAYOUT) for k, n in NORMS.items()} | {k: n.bind(TWO) for k, n in BLOCKS.items()}


def gradient(seed=0, size=None):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(size or 12, generator=generator, dtype=torch.float64)


def point(name, seed=0):
    return gradient(seed, 10 if name in BLOCKS else 12)


@pytest.mark.parametrize("mu", [1.0, 1e-3])
@pytest.mark.parametrize("name", BOUND)
def test_the_gradient_is_that_of_the_value_and_the_hessian_that_of_the_gradient(name, mu):
    norm, g = BOUND[name], point(name)
    at, d = smoothed_dual(norm, g, mu), point(name, 1)
    step = 1e-6 * mu**0.5
    ahead, behind = smoothed_dual(norm, g + step * d, mu), smoothed_dual(norm, g - step * d, mu)
    slope = (ahead.value - behind.value) / (2 * step)
    torch.testing.assert_close(slope, at.gradient @ d, rtol=1e-6, atol=1e-6)
    bend = (ahead.gradient - behind.gradient) / (2 * step)
    torch.testing.assert_close(at.hessian(d[None])[0], bend, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", BOUND)
def test_gradients_lie_inside_the_ball_and_tend_to_steepest_directions(name):
    norm, g = BOUND[name], point(name)
    gaps = []
    for mu in (1.0, 1e-2, 1e-4, 1e-6, 1e-10):
        v = smoothed_dual(norm, g, mu).gradient
        assert norm.value(v) < 1 + 1e-14
        gaps.append(float(norm.dual(g) - g @ v))
    assert gaps == sorted(gaps, reverse=True)
    assert gaps[-1] < 1e-8


@pytest.mark.parametrize("name", BOUND)
def test_zero_gradients_and_equal_singular_values_are_finite(name):
    norm, zero = BOUND[name], torch.zeros_like(point(name))
    for g in (
        zero,
        torch.ones_like(zero),
        torch.eye(3, 4, dtype=torch.float64).flatten()[: len(zero)],
    ):
        for mu in (1.0, 1e-8):
            at = smoothed_dual(norm, g, mu)
            assert torch.isfinite(at.value)
            assert torch.isfinite(at.gradient).all()
            assert torch.isfinite(at.hessian(torch.eye(len(g), dtype=g.dtype))).all()
    torch.testing.assert_close(smoothed_dual(norm, zero, 1.0).gradient, zero)


def test_only_known_norms_are_supported():
    class Own(fs.L1):
        pass

    class Other(fs.Linf.__mro__[1]):
        name = symbol = "other"
        ties = False
        value = dual = steepest = _nearest = lambda self, v: v

    assert supports_smoothing(Own())
    assert not supports_smoothing(Other())
    assert not supports_smoothing(fs.Max(Other()))


@pytest.mark.parametrize("temperature", [1e3, 1.0, 1e-2, 1e-5])
@pytest.mark.parametrize("name", BOUND)
def test_soft_minima_over_the_ball_are_proven_by_their_duals(name, temperature):
    norm = BOUND[name]
    for seed in range(2):
        rows = gradient(seed, 20 * len(point(name))).view(20, -1) + point(name)
        rows = rows / norm.dual(rows).amax()
        offset = 0.1 * gradient(seed + 7, 20)
        found = minimise_in_ball(norm, SoftMaximum(temperature), rows, offset, tol=1e-10)
        assert norm.value(found.v) <= 1 + 1e-14
        z = offset + rows @ found.v
        primal = temperature * torch.logsumexp(-z / temperature, 0)
        entropy = -torch.xlogy(found.p, found.p).sum()
        dual = temperature * entropy - found.p @ offset - norm.dual(found.p @ rows)
        assert found.p.sum() == pytest.approx(1, abs=1e-12)
        assert float(primal - dual) == pytest.approx(found.gap, abs=1e-12)
        assert found.gap < 1e-8
        warm = minimise_in_ball(
            norm, SoftMaximum(temperature), rows, offset, start=found.p, tol=1e-10
        )
        torch.testing.assert_close(rows @ warm.v, rows @ found.v, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", BOUND)
def test_least_squares_over_the_ball_is_a_projection_where_the_rows_are_unit_vectors(name):
    norm = BOUND[name]
    target = point(name)
    found = minimise_in_ball(
        norm, HalfSquare(), torch.eye(len(target), dtype=torch.float64), -target, tol=1e-13
    )
    torch.testing.assert_close(found.v, norm.project(target), rtol=0, atol=2e-6)
    inside = 0.1 * target / norm.value(target)
    found = minimise_in_ball(
        norm, HalfSquare(), torch.eye(len(target), dtype=torch.float64), -inside, tol=1e-14
    )
    torch.testing.assert_close(found.v, inside, rtol=0, atol=2e-6)


def test_iterations_are_bounded():
    rows = gradient(0, 60).view(5, 12)
    assert (
        minimise_in_ball(fs.L1(), SoftMaximum(1e-3), rows, torch.zeros(5).double(), tol=0.0).newton
        <= 100
    )

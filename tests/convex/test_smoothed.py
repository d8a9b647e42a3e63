"""Smoothed dual norms: derivatives and limits."""

import pytest
import torch

import flowsim as fs
from flowsim.convex.smoothed import smoothed_dual, supports_smoothing
from tests.oracles.bound_norms import BOUND, point


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

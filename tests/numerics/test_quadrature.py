"""Logarithms of integrals against adaptive quadrature."""

import math

import pytest
import torch
from scipy.integrate import quad

from flowsim.numerics.quadrature import hermite, log_elapsed, log_mean_exp


def number(value):
    return torch.tensor([value], dtype=torch.float64)


@pytest.mark.parametrize(
    ("a", "b"),
    [
        (0.0, 0.0),
        (1.0, 1.0 + 1e-9),
        (-2.0, -2.0 + 1e-5),
        (0.0, 1.0),
        (3.0, -4.0),
        (0.0, 30.0),
        (-5.0, -5.0 - 2e-6),
    ],
)
def test_log_mean_exp_is_the_logarithm_of_the_integral(a, b):
    exact = math.log(quad(lambda u: math.exp(a + (b - a) * u), 0, 1, epsabs=0, epsrel=1e-13)[0])
    assert float(log_mean_exp(number(a), number(b))) == pytest.approx(exact, abs=2e-12)


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("gap", [100.0, 1e4, 1e6])
def test_log_mean_exp_of_far_ends_is_the_larger_less_the_log_of_the_gap(gap, sign):
    a, b = number(sign * 1e6), number(sign * 1e6 + gap)
    for value in (log_mean_exp(a, b), log_mean_exp(b, a)):
        assert float(value) == pytest.approx(float(b) - math.log(gap), rel=1e-14)


def test_log_mean_exp_is_symmetric_and_lies_between_its_ends():
    a, b = torch.randn(2, 200, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 50
    mean = log_mean_exp(a, b)
    assert torch.equal(mean, log_mean_exp(b, a))
    assert ((mean >= torch.minimum(a, b)) & (mean <= torch.maximum(a, b))).all()


def test_hermite_takes_its_values_and_slopes():
    ends = [number(value) for value in (2.0, -1.0, 0.5, 3.0)]
    u = torch.tensor([0.0, 1.0], dtype=torch.float64, requires_grad=True)
    cubic = hermite(u, *ends)
    (slopes,) = torch.autograd.grad(cubic.sum(), u)
    assert cubic.tolist() == pytest.approx([2.0, -1.0])
    assert slopes.tolist() == pytest.approx([0.5, 3.0])


@pytest.mark.parametrize("u", [1.0, 0.3])
@pytest.mark.parametrize(
    "ends", [(0.0, 0.0, 0.0, 0.0), (1.0, -2.0, 3.0, 0.5), (0.0, 40.0, 5.0, 90.0)]
)
def test_log_elapsed_is_the_logarithm_of_the_integral(ends, u):
    rate = lambda v: float(hermite(number(v), *map(number, ends)))
    exact = math.log(quad(lambda v: math.exp(rate(v)), 0, u, epsabs=0, epsrel=1e-12)[0])
    assert float(log_elapsed(*map(number, ends), number(u))) == pytest.approx(exact, abs=1e-6)
    if u == 1:
        assert torch.equal(
            log_elapsed(*map(number, ends)), log_elapsed(*map(number, ends), number(u))
        )

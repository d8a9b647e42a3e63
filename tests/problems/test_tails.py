"""Tails: their slopes, inverses and decays belong together, and they can be saved."""

import math
import pickle

import pytest
import torch

from flowsim.problems.tails import EXPONENTIAL, HALF_SQUARE, LOGISTIC

TAILS = [EXPONENTIAL, LOGISTIC, HALF_SQUARE]
Q = torch.linspace(-20, 25, 91, dtype=torch.float64) + 0.01

NAIVE = {
    "exponential": lambda q: torch.exp(-q),
    "logistic": lambda q: torch.log1p(torch.exp(-q)),
    "half square": lambda q: 0.5 * q**2,
}


@pytest.mark.parametrize("tail", TAILS, ids=lambda tail: tail.name)
def test_values_and_slopes_are_logarithms_of_the_naive_ones(tail):
    naive = NAIVE[tail.name]
    torch.testing.assert_close(tail.log_value(Q), torch.log(naive(Q)), rtol=1e-9, atol=1e-12)
    slope = torch.func.vmap(torch.func.grad(naive))(Q)
    torch.testing.assert_close(tail.log_slope(Q), torch.log(slope.abs()), rtol=1e-9, atol=1e-12)
    assert tail.decreasing == bool((slope < 0).all())


@pytest.mark.parametrize("tail", [EXPONENTIAL, LOGISTIC], ids=lambda tail: tail.name)
def test_fall_is_the_second_derivative_over_the_slope(tail):
    first = torch.func.grad(NAIVE[tail.name])
    ratio = -torch.func.vmap(torch.func.grad(first))(Q) / torch.func.vmap(first)(Q)
    torch.testing.assert_close(tail.fall(Q), ratio, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("tail", [EXPONENTIAL, LOGISTIC], ids=lambda tail: tail.name)
@pytest.mark.parametrize("q", [-50.0, -1.0, 0.0, 3.0, 31.0, 1e6])
def test_inverse_undoes_the_value(tail, q):
    lam = -tail.log_value(torch.tensor([q], dtype=torch.float64))
    assert float(tail.inverse(lam)) == pytest.approx(q, rel=1e-14, abs=2e-15)


def test_a_half_square_has_no_inverse():
    assert HALF_SQUARE.inverse is None
    assert float(HALF_SQUARE.log_value(torch.tensor(3.0))) == pytest.approx(math.log(4.5))


@pytest.mark.parametrize("tail", TAILS, ids=lambda tail: tail.name)
def test_tails_can_be_pickled(tail):
    assert pickle.loads(pickle.dumps(tail)) == tail

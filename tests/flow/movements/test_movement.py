"""Sums of exponentials that touch a loss."""

import pytest
import torch

import flowsim as fs
from flowsim.flow.movements.movement import exact, linear_reading, touching


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


CASES = {
    "exponential": (fs.exponential, 1),
    "logistic": (fs.logistic, 1),
    "pairwise": (fs.pairwise_exponential, 3),
    "cross entropy": (fs.cross_entropy, 3),
}


@pytest.mark.parametrize("name", CASES)
def test_they_have_the_loss_s_gradient_and_are_not_below_it(name):
    loss, classes = CASES[name]
    y = torch.arange(6) % 3 if classes == 3 else torch.tensor([1.0, -1, 1, -1, 1, 1]).double()
    at = randn(1, 6, classes)
    reading = linear_reading(loss)
    q0 = reading.read(at, y)[0][0]
    scale, offset = touching(loss, at, y)

    def model(outputs):
        return torch.exp(-offset - scale * (reading.read(outputs, y)[0][0] - q0)).sum()

    def true(outputs):
        return torch.exp(-loss.ascent(outputs, y)[0])[0]

    here = at.clone().requires_grad_()
    (slope,) = torch.autograd.grad(model(here), here)
    lam, pull = loss.ascent(at, y)
    torch.testing.assert_close(slope, -pull * torch.exp(-lam), rtol=1e-9, atol=1e-12)
    shift = model(at) - true(at)
    for seed in range(5):
        moved = at + 1e-2 * randn(1, 6, classes, seed=seed + 1)
        above = model(moved) - true(moved) - shift
        assert float(above) > -2e-6
        if exact(loss):
            assert abs(float(above)) < 1e-12


def test_what_is_not_a_sum_of_exponentials_is_refused():
    with pytest.raises(ValueError, match="does not know the loss"):
        linear_reading(fs.squared)

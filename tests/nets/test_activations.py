"""Activations: their values, slopes and degrees; problems that hold them can be pickled."""

import pickle

import pytest
import torch

import flowsim as fs

ACTIVATIONS = [fs.relu, fs.leaky_relu(0.1), fs.squared_relu, fs.identity, fs.square]
Z = torch.tensor([-2.0, -0.5, 0.0, 0.5, 3.0], dtype=torch.float64)


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=lambda a: a.name)
def test_slope_is_the_derivative_that_autograd_returns(activation):
    z = Z.clone().requires_grad_()
    value = activation.value(z)
    (slope,) = torch.autograd.grad(value.sum(), z)
    assert value.any()
    torch.testing.assert_close(activation.slope(Z), slope)


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=lambda a: a.name)
def test_a_positive_factor_comes_out_to_the_degree(activation):
    expected = 3**activation.degree * activation.value(Z)
    torch.testing.assert_close(activation.value(3 * Z), expected)


def test_leaky_relu_is_its_two_lines():
    assert fs.leaky_relu(0.1).value(Z).tolist() == pytest.approx([-0.2, -0.05, 0.0, 0.5, 3.0])
    assert fs.leaky_relu(0.1).kinked
    assert not fs.leaky_relu(1.0).kinked
    with pytest.raises(ValueError, match="got slope 2"):
        fs.leaky_relu(2)


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=lambda a: a.name)
def test_activations_are_pickled(activation):
    again = pickle.loads(pickle.dumps(activation))
    assert torch.equal(again.value(Z), activation.value(Z))

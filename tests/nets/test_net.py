"""Laws of nets: homogeneity, derivatives, degrees, initial weights."""

import numpy as np
import pytest
import torch
from torch import nn

import flowsim as fs
from tests.oracles.net_cases import NETS, bias_free, draw

nets = pytest.mark.parametrize(("net", "degree"), NETS.values(), ids=NETS)


@nets
@pytest.mark.parametrize("own", [False, True])
def test_a_positive_factor_on_the_weights_comes_out_to_the_degree(net, degree, own):
    w, x = net.init(range(3)), draw(1, *([3] if own else []), 4, 3)
    measured = net.measured(x)
    assert measured.degree == pytest.approx(degree, abs=1e-12)
    f = measured.outputs(w, x)
    for c in (1e-3, 0.7, 5.0):
        torch.testing.assert_close(measured.outputs(c * w, x), c**degree * f, rtol=1e-11, atol=0)


@nets
def test_euler_identity(net, degree):
    w, x = net.init(range(3)), draw(1, 4, 3)
    f = net.outputs(w, x)
    torch.testing.assert_close(net.pushforward(w, x, w), degree * f, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(
        (net.pullback(w, x, f) * w).sum(1), degree * f.square().sum((1, 2)), rtol=1e-10, atol=0
    )


@nets
def test_derivatives_are_adjoint_and_agree_with_the_jacobian(net, degree):
    w, x, v = net.init(range(3)), draw(1, 4, 3), draw(2, 3, net.size)
    J = net.jacobian(w, x)
    c = draw(3, *J.shape[:3])
    torch.testing.assert_close(
        net.pushforward(w, x, v), torch.einsum("bncp,bp->bnc", J, v), rtol=1e-11, atol=1e-11
    )
    torch.testing.assert_close(
        net.pullback(w, x, c), torch.einsum("bncp,bnc->bp", J, c), rtol=1e-11, atol=1e-11
    )
    flat = J.flatten(1, 2)
    torch.testing.assert_close(net.gram(w, x), flat @ flat.mT, rtol=1e-11, atol=1e-11)


@nets
def test_pushforward_is_the_limit_of_differences(net, degree):
    w, x, v = net.init(range(3)), draw(1, 4, 3), draw(2, 3, net.size)
    h = 1e-6
    difference = (net.outputs(w + h * v, x) - net.outputs(w - h * v, x)) / (2 * h)
    torch.testing.assert_close(net.pushforward(w, x, v), difference, rtol=1e-5, atol=1e-6)


@nets
def test_own_data_equal_shared_data_repeated(net, degree):
    w, x = net.init(range(3)), draw(1, 4, 3)
    repeated = x.repeat(3, 1, 1)
    torch.testing.assert_close(net.outputs(w, repeated), net.outputs(w, x), rtol=1e-13, atol=1e-15)
    c = draw(2, *net.outputs(w, x).shape)
    torch.testing.assert_close(
        net.pullback(w, repeated, c), net.pullback(w, x, c), rtol=1e-12, atol=1e-14
    )


def test_degree_of_a_problem_is_the_measured_one():
    x, y = draw(1, 6, 3), torch.tensor([1, -1, 1, -1, 1, 1])
    for net in (fs.ModuleNet(bias_free(3, 5, 4, 1)), fs.ModuleNet(bias_free(3, 5, 4, 1), degree=3)):
        assert fs.Problem(net, x, y, fs.exponential).degree == 3
    frozen = fs.Frozen(fs.ModuleNet(bias_free(3, 5, 1)), {"2.weight": draw(2, 1, 5)})
    assert fs.Problem(frozen, x, y, fs.exponential).degree == 1


@pytest.mark.parametrize(
    "net",
    [
        fs.ModuleNet(bias_free(3, 5, 1), degree=3),
        fs.FunctionNet(lambda p, x: x @ p["W1"][0] ** 2, fs.Linear(3).layout, degree=1),
        fs.Frozen(fs.MLP([3, 5, 4, 1]), {"W1": draw(1, 5, 3)}, degree=3),
    ],
)
def test_wrong_declared_degree_is_refused_with_the_measured_one(net):
    with pytest.raises(
        ValueError, match=r"declared homogeneous of degree \d, but its measured degree is 2;"
    ):
        net.measured(draw(1, 6, 3))


@pytest.mark.parametrize(
    "module",
    [
        nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 1)),
        nn.Sequential(nn.Linear(3, 4, bias=False), nn.Tanh(), nn.Linear(4, 1, bias=False)),
        nn.Sequential(nn.Linear(3, 4, bias=False), nn.LayerNorm(4), nn.Linear(4, 1, bias=False)),
        nn.Sequential(nn.Linear(3, 4, bias=False), nn.PReLU(), nn.Linear(4, 1, bias=False)),
    ],
    ids=["bias", "tanh", "layer norm", "prelu"],
)
def test_nets_that_are_not_homogeneous_are_refused(module):
    with pytest.raises(ValueError, match="not positively homogeneous"):
        fs.ModuleNet(module).measured(draw(1, 6, 3))


def test_bias_of_a_linear_model_is_homogeneous():
    assert fs.ModuleNet(nn.Linear(3, 1)).measured(draw(1, 6, 3)).degree == 1


def test_net_that_is_zero_everywhere_has_no_degree():
    with pytest.raises(ValueError, match="outputs are all zero"):
        fs.Frozen(fs.MLP([3, 5, 1]), {"W2": torch.zeros(1, 5)}).measured(draw(1, 6, 3))


def test_rows_of_init_depend_on_their_own_seed_only():
    net = fs.MLP([3, 5, 1])
    w = net.init([4, 7, 9])
    assert torch.equal(w[1:2], net.init(7))
    assert torch.equal(w[[2, 0]], net.init([9, 4]))
    assert torch.equal(net.init(np.arange(3)), net.init(range(3)))
    assert torch.equal(net.init(np.int64(7)), net.init(7))
    assert not torch.equal(w[0], w[1])
    assert w.dtype == torch.float64


def test_init_is_gaussian_with_variance_one_over_fan_in():
    net = fs.MLP([50, 400, 2])
    w = net.init(range(4), scale=3.0)
    for block, fan_in in zip(net.layout, [50, 400], strict=True):
        part = block.of(w)
        assert float(part.std()) == pytest.approx(3 / fan_in**0.5, rel=0.06)
    assert torch.equal(net.init(0, scale=2.0), 2 * net.init(0))
    assert not net.init(0, scale=0.0).any()
    assert float(fs.Diagonal(4000).init(0).std()) == pytest.approx(1, rel=0.05)


@pytest.mark.parametrize(
    ("net", "kinks"),
    [
        (fs.MLP([3, 4, 1]), True),
        (fs.MLP([3, 1]), False),
        (fs.MLP([3, 4, 1], fs.leaky_relu(1.0)), False),
        (fs.MLP([3, 4, 1], fs.squared_relu), False),
        (fs.Diagonal(3), False),
        (fs.Frozen(fs.MLP([3, 4, 1]), {"W2": torch.ones(1, 4)}), True),
    ],
)
def test_nets_know_whether_they_have_kinks(net, kinks):
    assert net.kinks is kinks

"""Feed-forward nets."""

import torch

import flowsim as fs
from tests.oracles.net_cases import draw


def test_layerwise_euler_identity_of_a_relu_net():
    net = fs.MLP([3, 5, 4, 1])
    w, x = net.init(range(3)), draw(1, 4, 3)
    for block in net.layout:
        v = torch.zeros_like(w)
        v[:, block.slice] = w[:, block.slice]
        torch.testing.assert_close(
            net.pushforward(w, x, v), net.outputs(w, x), rtol=1e-12, atol=1e-14
        )


def test_outputs_are_the_layers_one_after_the_other():
    net = fs.MLP([3, 5, 4, 2], fs.squared_relu)
    w, x = net.init(range(3)), draw(1, 7, 3)
    W1, W2, W3 = net.weights(w)
    a = torch.relu(x @ W1.mT).square()
    a = torch.relu(a @ W2.mT).square()
    torch.testing.assert_close(net.outputs(w, x), a @ W3.mT)


def test_linear_is_a_net_of_one_layer():
    net, w, x = fs.Linear(3, 2), draw(1, 4, 6), draw(2, 5, 3)
    assert net.linear
    assert net.degree == 1
    assert not fs.MLP([3, 2, 1]).linear
    torch.testing.assert_close(net.outputs(w, x), x @ w.view(4, 2, 3).mT)


def test_a_linearised_net_has_its_outputs_and_their_gradient():
    net = fs.MLP([3, 5, 4, 2], fs.squared_relu)
    w, x, c = net.init(range(3)).requires_grad_(), draw(1, 7, 3), draw(2, 3, 7, 2)
    outputs = net.outputs(w, x)
    (gradient,) = torch.autograd.grad((outputs * c).sum(), w)
    seen, pull = net.linearize(w.detach(), x)
    torch.testing.assert_close(seen, outputs.detach())
    torch.testing.assert_close(pull(c), gradient)

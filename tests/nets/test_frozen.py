"""Nets with frozen blocks."""

import torch

import flowsim as fs
from tests.oracles.net_cases import draw


def test_frozen_net_is_the_net_at_the_frozen_values():
    net, values = fs.MLP([3, 5, 4, 2]), draw(1, 4, 5)
    frozen = fs.Frozen(net, {"W2": values})
    assert [b.name for b in frozen.layout] == ["W1", "W3"]
    w, x, c = net.init(range(3)), draw(2, 6, 3), draw(3, 3, 6, 2)
    W1, W2, W3 = (block.slice for block in net.layout)
    w[:, W2] = values.flatten()
    free = torch.cat([w[:, W1], w[:, W3]], 1)
    assert torch.equal(frozen.outputs(free, x), net.outputs(w, x))
    g = net.pullback(w, x, c)
    assert torch.equal(frozen.pullback(free, x, c), torch.cat([g[:, W1], g[:, W3]], 1))


def test_frozen_values_of_each_trajectory_stay_with_it():
    values = draw(1, 3, 1, 5)
    frozen = fs.Frozen(fs.MLP([3, 5, 1]), {"W2": values})
    w, x = frozen.init(range(3)), draw(2, 6, 3)
    outputs = frozen.outputs(w, x)
    for b in range(3):
        alone = fs.Frozen(fs.MLP([3, 5, 1]), {"W2": values[b]})
        torch.testing.assert_close(
            outputs[b : b + 1], alone.outputs(w[b : b + 1], x), rtol=1e-13, atol=1e-15
        )
    rows = torch.tensor([2, 0])
    torch.testing.assert_close(
        frozen.select(rows).outputs(w[rows], x), outputs[rows], rtol=1e-13, atol=1e-15
    )
    problem = fs.Problem(frozen, x, [1, -1, 1, 1, -1, -1], fs.exponential)
    torch.testing.assert_close(
        problem.select(rows).lam(w[rows]), problem.lam(w)[rows], rtol=1e-13, atol=1e-13
    )


def test_frozen_second_layer_is_piecewise_linear_in_the_first():
    frozen = fs.Frozen(fs.MLP([3, 5, 1]), {"W2": draw(1, 1, 5)})
    w, x = frozen.init(0), draw(2, 6, 3)
    nearby = w + 1e-6 * draw(3, 1, frozen.size)  # the same activation pattern
    change = frozen.pushforward(w, x, nearby - w)
    torch.testing.assert_close(
        frozen.outputs(nearby, x) - frozen.outputs(w, x), change, rtol=1e-6, atol=1e-15
    )

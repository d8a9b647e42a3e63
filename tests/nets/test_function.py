"""Nets from functions and from modules of torch."""

import pytest
import torch
from torch import nn

import flowsim as fs
from flowsim.nets.function import weights_of
from tests.oracles.net_cases import bias_free, draw


@pytest.mark.parametrize("depth", [1, 2, 3, 4])
def test_diagonal_nets_are_linear_predictors_with_the_stated_weights(depth):
    x = draw(1, 5, 3)
    w = draw(2, 2, 3 * depth)
    beta = w.view(2, depth, 3).prod(1)
    torch.testing.assert_close(fs.Diagonal(3, depth).outputs(w, x)[..., 0], beta @ x.T)
    u, v = draw(3, 2, 3), draw(4, 2, 3)
    signed = fs.Diagonal(3, depth, signed=True).outputs(torch.cat([u, v], 1), x)[..., 0]
    torch.testing.assert_close(signed, (u**depth - v**depth) @ x.T)


class Branching(nn.Module):
    """Homogeneous of degree 1, but vmap cannot see which branch is taken."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.ones(3))

    def forward(self, x):
        return x @ self.w if self.w.sum().item() > 0 else 2 * (x @ self.w)


@pytest.mark.parametrize("own", [False, True])
def test_sequential_module_equals_mlp(own):
    net, mlp = fs.ModuleNet(bias_free(3, 5, 4, 2)), fs.MLP([3, 5, 4, 2])
    w, x, c, v = (
        mlp.init(range(3)),
        draw(1, *([3] if own else []), 7, 3),
        draw(2, 3, 7, 2),
        draw(3, 3, mlp.size),
    )
    assert [b.shape for b in net.layout] == [b.shape for b in mlp.layout]
    for call in (
        lambda n: n.outputs(w, x),
        lambda n: n.pullback(w, x, c),
        lambda n: n.pushforward(w, x, v),
        lambda n: n.gram(w, x),
    ):
        torch.testing.assert_close(call(net), call(mlp), rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("training", [True, False])
def test_module_is_never_changed(training):
    module = bias_free(3, 5, 1).train(training)
    before = [p.clone() for p in module.parameters()]
    problem = fs.Problem(fs.ModuleNet(module), draw(1, 6, 3), [1, -1, 1, 1, -1, -1], fs.exponential)
    problem.ascent(problem.net.init(range(3)))
    problem.net.pushforward(problem.net.init(0), problem.x, problem.net.init(1))
    assert all(torch.equal(p, q) for p, q in zip(module.parameters(), before, strict=True))
    assert all(p.grad is None and p.requires_grad for p in module.parameters())
    assert module.training is training


def test_weights_of_a_module_reproduce_its_outputs():
    module, x = bias_free(3, 5, 2), draw(1, 6, 3)
    outputs = fs.ModuleNet(module).outputs(weights_of(module), x)
    torch.testing.assert_close(outputs[0], module.double()(x).detach())


def test_gradients_do_not_carry_a_graph():
    net = fs.ModuleNet(bias_free(3, 5, 1))
    outputs, pull = net.linearize(net.init(0), draw(1, 4, 3))
    assert not outputs.requires_grad
    assert not pull(outputs).requires_grad
    assert torch.equal(pull(outputs), pull(outputs))


def test_module_that_vmap_refuses_is_looped_with_the_same_numbers():
    x, y = draw(1, 6, 3), [1, -1, 1, 1, -1, -1]
    with pytest.warns(UserWarning, match="vmap cannot batch this net"):
        problem = fs.Problem(fs.ModuleNet(Branching()), x, y, fs.exponential)
    w = torch.tensor([[1.0, 2.0, -1.0], [-3.0, 1.0, 0.5]], dtype=torch.float64)
    factor = torch.tensor([[1.0], [2.0]], dtype=torch.float64)
    linear = fs.Problem(fs.Linear(3), x, y, fs.exponential)
    lam, h = problem.ascent(w)
    expected, direction = linear.ascent(factor * w)
    torch.testing.assert_close(lam, expected)
    torch.testing.assert_close(h, factor * direction)
    torch.testing.assert_close(problem.net.pushforward(w, x, w), problem.outputs(w))
    own = x.repeat(2, 1, 1)
    torch.testing.assert_close(problem.net.outputs(w, own), problem.outputs(w))


@pytest.mark.filterwarnings("ignore:vmap cannot batch this net")
def test_random_module_is_refused():
    class Noisy(nn.Linear):
        def forward(self, x):
            return super().forward(x) * torch.rand(())

    with pytest.raises(ValueError, match="two evaluations of the net at the same weights differ"):
        fs.ModuleNet(Noisy(3, 1, bias=False)).measured(draw(1, 6, 3))


class Buffered(nn.Linear):
    def __init__(self):
        super().__init__(3, 1, bias=False)
        self.register_buffer("scale", torch.ones(1))


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (
            nn.Sequential(nn.Linear(3, 1), nn.Dropout(0.5)),
            "1 is Dropout; expected a deterministic module",
        ),
        (
            nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)),
            "1 is BatchNorm1d, which mixes examples",
        ),
        (Buffered(), "has a buffer, 'scale'"),
        (nn.ReLU(), "no parameters"),
        (fs.MLP([3, 1]), r"got module=MLP.*, expected a torch\.nn\.Module"),
    ],
)
def test_modules_that_are_no_function_of_weights_and_data_are_refused(module, message):
    with pytest.raises((ValueError, TypeError), match=message):
        fs.ModuleNet(module)


def test_dropout_that_drops_nothing_is_allowed():
    assert (
        fs.ModuleNet(nn.Sequential(nn.Linear(3, 1, bias=False), nn.Dropout(0.0)))
        .measured(draw(1, 6, 3))
        .degree
        == 1
    )


def test_kinks_of_a_module_are_assumed_unless_it_is_called_smooth():
    assert fs.ModuleNet(bias_free(3, 1)).kinks
    assert not fs.ModuleNet(bias_free(3, 1), smooth=True).kinks
    with pytest.raises(ValueError, match="smooth=True, but 1 is ReLU, which has kinks"):
        fs.ModuleNet(bias_free(3, 4, 1), smooth=True)

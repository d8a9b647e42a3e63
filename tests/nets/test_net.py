"""Laws of nets: homogeneity, derivatives, frozen blocks, modules."""

import itertools

import numpy as np
import pytest
import torch
from torch import nn

import flowsim as fs
from flowsim.nets.function import weights_of


def draw(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def bias_free(*widths, activation=nn.ReLU):
    layers = itertools.chain.from_iterable(
        (nn.Linear(a, b, bias=False), activation()) for a, b in itertools.pairwise(widths)
    )
    return nn.Sequential(*list(layers)[:-1])


class Branching(nn.Module):
    """Homogeneous of degree 1, but vmap cannot see which branch is taken."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.ones(3))

    def forward(self, x):
        return x @ self.w if self.w.sum().item() > 0 else 2 * (x @ self.w)


NETS = {
    "relu": (fs.MLP([3, 5, 4, 1]), 3),
    "leaky": (fs.MLP([3, 5, 2], fs.leaky_relu(0.1)), 2),
    "squared_relu": (fs.MLP([3, 4, 4, 1], fs.squared_relu), 7),
    "square": (fs.MLP([3, 4, 2], fs.square), 3),
    "deep linear": (fs.MLP([3, 4, 4, 4, 1], fs.identity), 4),
    "linear": (fs.Linear(3, 2), 1),
    "diagonal": (fs.Diagonal(3, 3), 3),
    "signed diagonal": (fs.Diagonal(3, 2, signed=True), 2),
    "frozen": (fs.Frozen(fs.MLP([3, 5, 4, 1]), {"W2": draw(5, 4, 5)}), 2),
    "frozen per trajectory": (fs.Frozen(fs.MLP([3, 5, 1]), {"W2": draw(5, 3, 1, 5)}), 1),
    "frozen diagonal": (fs.Frozen(fs.Diagonal(3, 3), {"w1": draw(5, 3)}), 2),
    "frozen squared": (fs.Frozen(fs.MLP([3, 5, 1], fs.squared_relu), {"W2": draw(5, 1, 5)}), 2),
    "module": (fs.ModuleNet(bias_free(3, 5, 2)), 2),
    "root": (fs.FunctionNet(lambda p, x: (x @ p["W1"][0]).abs().sqrt(), fs.Linear(3).layout), 0.5),
}
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


def test_layerwise_euler_identity_of_a_relu_net():
    net = fs.MLP([3, 5, 4, 1])
    w, x = net.init(range(3)), draw(1, 4, 3)
    for block in net.layout:
        v = torch.zeros_like(w)
        v[:, block.slice] = w[:, block.slice]
        torch.testing.assert_close(
            net.pushforward(w, x, v), net.outputs(w, x), rtol=1e-12, atol=1e-14
        )


# --- declared and measured degrees ---------------------------------------------------------------


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


# --- initial weights -----------------------------------------------------------------------------


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


# --- frozen blocks -------------------------------------------------------------------------------


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


# --- diagonal nets -------------------------------------------------------------------------------


@pytest.mark.parametrize("depth", [1, 2, 3, 4])
def test_diagonal_nets_are_linear_predictors_with_the_stated_weights(depth):
    x = draw(1, 5, 3)
    w = draw(2, 2, 3 * depth)
    beta = w.view(2, depth, 3).prod(1)
    torch.testing.assert_close(fs.Diagonal(3, depth).outputs(w, x)[..., 0], beta @ x.T)
    u, v = draw(3, 2, 3), draw(4, 2, 3)
    signed = fs.Diagonal(3, depth, signed=True).outputs(torch.cat([u, v], 1), x)[..., 0]
    torch.testing.assert_close(signed, (u**depth - v**depth) @ x.T)


# --- modules -------------------------------------------------------------------------------------


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
        (fs.MLP([3, 1]), "got MLP, expected a torch.nn.Module"),
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

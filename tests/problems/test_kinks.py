"""Kinks of two-layer nets: their gradients against autograd, and the sets of gradients where they
are shared."""

import pytest
import torch
from torch import nn

import flowsim as fs

X = torch.tensor(
    [[1.0, 2.0], [0.5, -1.0], [2.0, 4.0], [-3.0, -6.0], [0.0, 0.0], [-0.5, 1.0], [0.0, 0.0]],
    dtype=torch.float64,
)


def two_layer(x, y, loss=fs.exponential, *, width=4, outputs=1, activation=fs.relu):
    x = torch.as_tensor(x, dtype=torch.float64)
    return fs.Problem(fs.MLP([x.shape[-1], width, outputs], activation=activation), x, y, loss)


def random_setting(loss, outputs, activation, *, trajectories=3, own_data=False, n=9, d=4):
    g = torch.Generator().manual_seed(5)
    shape = (trajectories, n, d) if own_data else (n, d)
    x = torch.randn(*shape, generator=g, dtype=torch.float64)
    if loss is fs.squared:
        y = torch.randn(*shape[:-1], outputs, generator=g, dtype=torch.float64)
    elif outputs == 1:
        y = 2 * torch.randint(2, shape[:-1], generator=g) - 1
    else:
        y = torch.randint(outputs, shape[:-1], generator=g)
    problem = two_layer(x, y, loss, width=5, outputs=outputs, activation=activation)
    return problem, problem.net.init(seeds=range(trajectories))


CASES = [
    (fs.exponential, 1),
    (fs.logistic, 1),
    (fs.pairwise_exponential, 3),
    (fs.cross_entropy, 3),
    (fs.squared, 1),
    (fs.squared, 2),
]


# Parallel inputs


def test_inputs_on_one_line_are_represented_by_the_first():
    net = two_layer(X, [1, -1, 1, -1, 1, 1, -1]).two_layer(1)
    assert net.representative.tolist() == [[0, 1, 0, 0, 4, 1, 6]]
    assert net.coefficient[0, [0, 1, 2, 3, 5]] == pytest.approx([1, 1, 2, -3, -1], rel=1e-14)
    assert net.distinct.flatten().tolist() == [True, True, False, False, False, False, False]
    assert net.merged


def test_inputs_that_are_nearly_parallel_keep_kinks_of_their_own():
    net = two_layer([[1.0, 0.0], [1.0, 1e-5], [-1.0, 1e-5]], [1, -1, 1]).two_layer(1)
    assert bool(net.distinct.all())
    assert not net.merged


def test_multipliers_of_one_line_are_tied():
    net = two_layer(X, [1, -1, 1, -1, 1, 1, -1]).two_layer(1)
    given = torch.full((1, 7, 4), 0.5, dtype=torch.float64)
    given[0, 0], given[0, 1] = 0.2, 0.9
    spread = net.spread(given)[0, :, 0]
    assert spread[:4] == pytest.approx([0.2, 0.9, 0.2, 0.8])
    assert spread[5] == pytest.approx(0.1)


def test_a_representative_carries_the_jumps_of_its_class():
    net = two_layer(X, [1, -1, 1, -1, 1, 1, -1]).two_layer(1)
    jump = torch.arange(1.0, 29.0, dtype=torch.float64).view(1, 7, 4)
    gathered = net.gathered(jump)[0]
    assert torch.allclose(gathered[0], jump[0, 0] + 2 * jump[0, 2] + 3 * jump[0, 3])
    assert torch.allclose(gathered[1], jump[0, 1] + jump[0, 5])
    assert torch.equal(gathered[[2, 3, 5]], torch.zeros(3, 4).double())


def test_the_gradients_on_a_shared_kink_are_those_on_its_two_sides():
    """x, 2x, −3x: Clarke's set has two extreme points, not eight."""
    problem = two_layer(X[[0, 1, 2, 3, 5]], [1, -1, 1, -1, 1], width=2)
    w = problem.net.init(seeds=3)
    w[:, :2] = torch.tensor([2.0, -1.0])  # ⊥ the first line
    normal = torch.zeros_like(w)
    normal[:, :2] = X[0]
    hinges = problem.hinges(w)
    assert (hinges.z.view(5, 2)[:, 0] == 0).tolist() == [True, False, True, True, False]
    D = (hinges.z > 0).to(w)
    for side in (0.0, 1.0):
        D[:, 0] = side
        h = hinges.gradient(D)
        near = problem.ascent(w + (2 * side - 1) * 1e-9 * normal)[1]
        assert torch.allclose(h, near, rtol=0, atol=1e-7)


def test_inputs_that_are_zero_do_not_disturb_parallel_ones():
    problem = two_layer([[1.0, 0.0], [2.0, 0.0], [0.0, 0.0]], [1, -1, 1], width=2)
    w = problem.net.init(seeds=0)
    hinges = problem.hinges(w)
    h = hinges.gradient((hinges.z > 0).double())
    assert torch.allclose(h, problem.ascent(w)[1], rtol=1e-12, atol=1e-14)


def test_parallel_inputs_in_single_precision():
    problem = two_layer(X[:4], [1, -1, 1, -1])
    net = problem.like(torch.zeros(1, 12)).two_layer(1)
    assert net.representative.tolist() == [[0, 1, 0, 0]]


# Gradients


@pytest.mark.parametrize("own_data", [False, True], ids=["shared data", "own data"])
@pytest.mark.parametrize("activation", [fs.relu, fs.leaky_relu(0.3)], ids=lambda a: a.name)
@pytest.mark.parametrize(("loss", "outputs"), CASES, ids=lambda c: getattr(c, "name", c))
def test_gradients_away_from_kinks_are_those_of_autograd(loss, outputs, activation, own_data):
    problem, w = random_setting(loss, outputs, activation, own_data=own_data)
    point = problem.two_layer(3).at(w)
    lam, h = problem.ascent(w)
    assert torch.allclose(point.lam, lam, rtol=1e-13)
    side = (point.z > 0).double()
    assert torch.allclose(point.gradient(point.slopes(side)), h, rtol=1e-12, atol=1e-13)
    hinges = problem.hinges(w)
    assert torch.allclose(hinges.gradient(side.flatten(1)), h, rtol=1e-12, atol=1e-13)

    leaf = w.clone().requires_grad_()
    problem.lam(leaf).sum().backward()
    assert torch.allclose(h, leaf.grad, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("activation", [fs.relu, fs.leaky_relu(0.3)], ids=lambda a: a.name)
@pytest.mark.parametrize(("loss", "outputs"), CASES, ids=lambda c: getattr(c, "name", c))
def test_the_jump_is_the_change_of_the_gradient_across_a_kink(loss, outputs, activation):
    problem, w = random_setting(loss, outputs, activation)
    x = problem.x
    for i, j in ((0, 0), (4, 2), (8, 4)):
        on = w.clone()
        row = on[:, 4 * j : 4 * j + 4]
        row -= (row @ x[i])[:, None] * x[i] / x[i].square().sum()
        normal = torch.zeros_like(w)
        normal[:, 4 * j : 4 * j + 4] = x[i]
        hinges, k = problem.hinges(on), i * 5 + j
        assert hinges.z[:, k].abs().max() < 1e-14
        gap = problem.ascent(on + 1e-9 * normal)[1] - problem.ascent(on - 1e-9 * normal)[1]
        assert torch.allclose(gap, hinges.jump[:, k, None] * normal, rtol=0, atol=1e-6)


def test_normals_and_their_transpose():
    problem, w = random_setting(fs.pairwise_exponential, 3, fs.relu, own_data=True)
    hinges = problem.hinges(w)
    g = torch.Generator().manual_seed(1)
    c = torch.randn(hinges.z.shape, generator=g, dtype=torch.float64)
    v = torch.randn(w.shape, generator=g, dtype=torch.float64)
    assert torch.allclose(
        (hinges.combine(c) * v).sum(-1), (hinges.along(v) * c).sum(-1), rtol=1e-12
    )
    assert torch.allclose(hinges.along(w), hinges.z, rtol=1e-12)


def test_data_of_their_own_give_the_kinks_of_each_trajectory(agree):
    problem, w = random_setting(fs.exponential, 1, fs.relu, own_data=True)
    whole = problem.hinges(w)
    for b in range(3):
        rows = torch.tensor([b])
        alone = problem.select(rows).hinges(w[rows])
        for name in ("z", "jump", "base"):
            agree(getattr(alone, name)[0], getattr(whole, name)[b], rel=1e-13)


# Refusals


@pytest.mark.parametrize(
    "net",
    [
        fs.MLP([2, 4, 4, 1], activation=fs.relu),
        fs.MLP([2, 4, 1], activation=fs.squared_relu),
        fs.ModuleNet(
            nn.Sequential(
                nn.Linear(2, 4, bias=False), nn.ReLU(), nn.Linear(4, 1, bias=False)
            ).double()
        ),
    ],
    ids=["three layers", "no kinks", "module"],
)
def test_other_nets_are_refused_with_the_way_out(net):
    problem = fs.Problem(net, X[:2], [1, -1], fs.exponential)
    with pytest.raises(
        ValueError, match="two-layer MLPs with relu or leaky_relu; got .*try flowsim.MLP"
    ):
        problem.two_layer(1)


@pytest.mark.parametrize(
    "net",
    [
        fs.MLP([2, 4, 4, 1], activation=fs.relu),
        fs.ModuleNet(
            nn.Sequential(
                nn.Linear(2, 4, bias=False), nn.ReLU(), nn.Linear(4, 1, bias=False)
            ).double()
        ),
    ],
    ids=["three layers", "module"],
)
def test_a_flow_of_other_nets_with_kinks_is_refused(net):
    problem = fs.Problem(net, X[:2], [1, -1], fs.exponential)
    with pytest.raises(ValueError, match="two-layer"):
        fs.simulate(problem, fs.SteepestFlow(fs.L2()), net.init(seeds=0), until=fs.lam(1.0))

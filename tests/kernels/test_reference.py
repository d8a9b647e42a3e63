"""The kernels of feed-forward nets against autograd. Tolerances are rounding-error bounds,
elementwise.

Every activation here has |φ(z)| ≤ φ(|z|) and |φ'(z)| ≤ φ'(|z|), so that f(|x|; |w|), and likewise
every derivative at (|x|; |w|), bounds the sum of the absolute values of all terms that are added
up."""

import pytest
import torch
from torch.func import functional_call, jacrev, jvp

import flowsim as fs
from flowsim.kernels.reference import forward, gram

ACTIVATIONS = {
    "relu": (fs.relu, torch.relu),
    "leaky_relu": (fs.leaky_relu(0.1), lambda z: torch.nn.functional.leaky_relu(z, 0.1)),
    "squared_relu": (fs.squared_relu, lambda z: torch.relu(z) ** 2),
    "identity": (fs.identity, lambda z: z),
    "square": (fs.square, lambda z: z * z),
}
WIDTHS = {1: [4], 2: [4, 5], 3: [4, 5, 3], 4: [4, 3, 1, 2]}  # by depth, without the outputs


def draw(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def plain(net, value, w, x):
    """The net for one trajectory, w (P,), x (N, d), in the most pedestrian way."""
    *hidden, last = [w[block.slice].reshape(block.shape) for block in net.layout]
    for W in hidden:
        x = value(torch.einsum("nm,km->nk", x, W))
    return torch.einsum("nm,km->nk", x, last)


class Case:
    def __init__(self, name, depth, C, N, own, dtype, B=3):
        activation, self.value = ACTIVATIONS[name]
        self.net = fs.MLP([*WIDTHS[depth], C], activation)
        d = WIDTHS[depth][0]
        self.w, self.v = draw(1, B, self.net.size).to(dtype), draw(2, B, self.net.size).to(dtype)
        self.x = draw(3, *([B] if own else []), N, d).to(dtype)
        self.c = draw(4, B, N, C).to(dtype)
        self.terms = 8 * self.net.degree * (sum(self.net.widths) + N)
        self.eps = torch.finfo(dtype).eps

    def reference(self, function):
        """function(f, w, x, b) of each trajectory in float64, where f is the plain net."""
        rows = []
        for b, row in enumerate(self.w.double()):
            x = (self.x[b] if self.x.ndim == 3 else self.x).double()
            rows.append(function(lambda w, x=x: plain(self.net, self.value, w, x), row, b))
        return torch.stack(rows)

    def check(self, got, expected, bound):
        assert got.dtype == self.w.dtype
        assert got.shape == expected.shape
        assert ((got.double() - expected).abs() <= self.terms * self.eps * bound.double()).all()


cases = pytest.mark.parametrize(
    "case",
    [
        pytest.param(
            (name, depth, C, N, own, dtype),
            id=f"{name}-{depth}-C{C}-N{N}-{'own' if own else 'shared'}-{bits}",
        )
        for name in ACTIVATIONS
        for depth in WIDTHS
        for C, N, own in [(1, 5, False), (3, 7, True), (1, 1, True), (3, 2, False)]
        for bits, dtype in [(32, torch.float32), (64, torch.float64)]
    ],
)


@cases
def test_outputs_and_pullback_are_autograds(case):
    case = Case(*case)
    net, w, x = case.net, case.w, case.x
    outputs, pull = net.linearize(w, x)
    assert torch.equal(outputs, net.outputs(w, x))
    case.check(outputs, case.reference(lambda f, row, b: f(row)), net.outputs(w.abs(), x.abs()))

    def gradient(f, row, b):
        row = row.clone().requires_grad_()
        return torch.autograd.grad((f(row) * case.c[b].double()).sum(), row)[0]

    case.check(pull(case.c), case.reference(gradient), net.pullback(w.abs(), x.abs(), case.c.abs()))
    assert torch.equal(pull(case.c), net.pullback(w, x, case.c))


@cases
def test_pushforward_is_forward_mode(case):
    case = Case(*case)
    expected = case.reference(lambda f, row, b: jvp(f, (row,), (case.v[b].double(),))[1])
    bound = case.net.pushforward(case.w.abs(), case.x.abs(), case.v.abs())
    case.check(case.net.pushforward(case.w, case.x, case.v), expected, bound)


@cases
def test_jacobian_and_gram(case):
    case = Case(*case)
    net, w, x = case.net, case.w, case.x
    J = case.reference(lambda f, row, b: jacrev(f)(row))
    bound = net.jacobian(w.abs(), x.abs())
    case.check(net.jacobian(w, x), J, bound)
    rows, large = J.flatten(1, 2), bound.double().flatten(1, 2)
    case.check(net.gram(w, x), rows @ rows.mT, large @ large.mT)


def test_gram_weighs_layers_by_their_scales():
    net = fs.MLP([4, 5, 3, 2])
    w, x, scales = draw(1, 2, net.size), draw(2, 6, 4), [2.0, 0.5, 3.0]
    J = net.jacobian(w, x).flatten(1, 2)
    parts = [J[..., block.slice] for block in net.layout]
    expected = sum(scale * part @ part.mT for scale, part in zip(scales, parts, strict=True))
    _, tape = forward(net.weights(w), x, net.activation)
    torch.testing.assert_close(gram(tape, scales), expected)


@pytest.mark.parametrize("name", ACTIVATIONS)
@pytest.mark.parametrize("own", [False, True])
def test_pullback_and_pushforward_are_adjoint(name, own):
    case = Case(name, 3, 3, 6, own, torch.float64)
    net, w, x, v, c = case.net, case.w, case.x, case.v, case.c
    left = (net.pushforward(w, x, v) * c).sum((1, 2))
    right = (v * net.pullback(w, x, c)).sum(1)
    torch.testing.assert_close(left, right, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ["relu", "leaky_relu", "squared_relu"])
def test_at_a_kink_the_pullback_is_the_element_that_autograd_returns(name):
    activation, value = ACTIVATIONS[name]
    net = fs.MLP([2, 3, 2, 1], activation)
    x = draw(1, 4, 2)
    for w in [
        torch.zeros(net.size, dtype=torch.float64),
        torch.ones(net.size, dtype=torch.float64),
    ]:
        w = w.clone()
        w[:6] = 0  # every first-layer preactivation is exactly zero
        row = w.clone().requires_grad_()
        gradient = torch.autograd.grad(plain(net, value, row, x).sum(), row)[0]
        assert torch.equal(
            net.pullback(w[None], x, torch.ones(1, 4, 1, dtype=w.dtype))[0], gradient
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("N", range(1, 17))
@pytest.mark.parametrize("C", [1, 3])
def test_loss_and_gradient_equal_a_loop_over_examples(N, C, dtype):
    net = fs.MLP([5, 4, C])
    x, w = draw(N, N, 5).to(dtype), net.init([1, 2]).to(dtype)
    y = torch.randint(0, max(C, 2), (N,), generator=torch.Generator().manual_seed(N))
    loss = fs.logistic if C == 1 else fs.cross_entropy
    lam, h = fs.Problem(net, x, y, loss).like(w).ascent(w)
    for b in range(2):
        row = w[b].double().requires_grad_()
        total = torch.zeros((), dtype=torch.float64)
        for i in range(N):
            f = plain(net, torch.relu, row, x[i : i + 1].double())[0]
            f = torch.cat([torch.zeros(1, dtype=torch.float64), f]) if C == 1 else f
            total = total - torch.log(torch.softmax(f, 0)[y[i]])
        gradient = torch.autograd.grad(total, row)[0]
        tolerance = 100 * torch.finfo(dtype).eps
        assert abs(float(torch.exp(-lam[b].double()) / total.detach()) - 1) <= tolerance
        error = h[b].double() + gradient / total.detach()
        assert float(error.abs().max()) <= tolerance * float(h[b].abs().max())


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize(
    ("widths", "N"),
    [([64, 128, 1], 100), ([64, 128, 1], 8), ([20, 64, 1], 50), ([7, 1, 1], 3), ([5, 9, 6, 3], 13)],
)
def test_a_trajectory_feels_its_batch_mates_by_rounding_only(widths, N, own, agree):
    net = fs.MLP(widths)
    w, x, c = net.init(range(3)), draw(1, 3, N, widths[0]), draw(2, 3, N, widths[-1])
    x = x if own else x[0]
    together, pull = net.linearize(w, x)
    gradients = pull(c)
    for b in range(3):
        alone, pull_alone = net.linearize(w[b : b + 1], x[b : b + 1] if own else x)
        for one, all_ in [(alone[0], together[b]), (pull_alone(c[b : b + 1])[0], gradients[b])]:
            agree(one, all_, rel=1e-13)


def test_permuting_examples_permutes_outputs_and_keeps_the_loss():
    net = fs.MLP([5, 6, 1])
    x, y, w = draw(1, 11, 5), torch.sign(draw(2, 11)), net.init(range(3))
    order = torch.randperm(11, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(
        net.outputs(w, x[order]), net.outputs(w, x)[:, order], rtol=1e-12, atol=1e-14
    )
    a, b = (
        fs.Problem(net, x, y, fs.exponential),
        fs.Problem(net, x[order], y[order], fs.exponential),
    )
    torch.testing.assert_close(a.ascent(w), b.ascent(w), rtol=1e-12, atol=1e-12)


def test_plain_net_of_these_tests_is_torchs_own_module():
    net, w, x = fs.MLP([4, 5, 3, 2]), draw(1, 1, fs.MLP([4, 5, 3, 2]).size), draw(2, 6, 4)
    module = torch.nn.Sequential(
        torch.nn.Linear(4, 5, bias=False),
        torch.nn.ReLU(),
        torch.nn.Linear(5, 3, bias=False),
        torch.nn.ReLU(),
        torch.nn.Linear(3, 2, bias=False),
    )
    weights = {f"{2 * l}.weight": block.of(w[0]) for l, block in enumerate(net.layout)}
    torch.testing.assert_close(
        plain(net, torch.relu, w[0], x), functional_call(module, weights, (x,))
    )

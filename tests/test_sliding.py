"""The flow of two-layer nets through their kinks: exact slides, small steps in numpy, and the laws of the flow."""

import math
from dataclasses import dataclass, replace
from functools import cache

import numpy as np
import pytest
import torch
from scipy.integrate import solve_ivp
from scipy.optimize import lsq_linear
from scipy.special import expi, log_expit, logsumexp, softmax

import flowsim as fs
from flowsim.clocks import LAM, STEPS, Target
from flowsim.sliding import KinkImplicit, Sliding

LOG10 = math.log(10)


def flow(problem, w0, until, *, norm=None, rtol=1e-3, farther=False, max_steps=20_000, **options):
    rule = fs.SteepestFlow(norm or fs.L2(), rtol=rtol, method=KinkImplicit(farther))
    return fs.simulate(problem, rule, w0, until=until, max_steps=max_steps, **options)


# A program of its own: w ← w + c/‖w‖² A⁻¹∇Λ, whose chatter about a kink averages to the slide as c → 0.


def ascent_exponential(f, y):
    q = y * f[:, 0]
    return -logsumexp(-q), (y * softmax(-q))[:, None]


def ascent_logistic(f, y):
    q = y * f[:, 0]
    log_total = logsumexp(np.log(-log_expit(q)))
    return -log_total, (y * np.exp(log_expit(-q) - log_total))[:, None]


def ascent_pairwise(f, y):
    rows = np.arange(len(y))
    gaps = f[rows, y][:, None] - f
    gaps[rows, y] = np.inf
    p = softmax(-gaps)
    cotangent = -p
    cotangent[rows, y] = p.sum(1)
    return -logsumexp(-gaps), cotangent


def ascent_cross_entropy(f, y):
    rows = np.arange(len(y))
    total = -(f - logsumexp(f, axis=1, keepdims=True))[rows, y].sum()
    cotangent = -softmax(f, axis=1)
    cotangent[rows, y] += 1
    return -math.log(total), cotangent / total


def ascent_squared(f, y):
    total = 0.5 * np.square(f - y).sum()
    return -math.log(total), (y - f) / total


ASCENT = {
    fs.exponential.name: ascent_exponential,
    fs.logistic.name: ascent_logistic,
    fs.pairwise_exponential.name: ascent_pairwise,
    fs.cross_entropy.name: ascent_cross_entropy,
    fs.squared.name: ascent_squared,
}


@dataclass
class Steps:
    """Small steps of one trajectory. ``inverse`` is A⁻¹, dense or its diagonal."""

    x: np.ndarray
    y: np.ndarray
    loss: str
    width: int
    leak: float = 0.0
    inverse: np.ndarray | float = 1.0

    @staticmethod
    def of(problem, row=0, **options):
        x = (problem.x[row] if problem.x.ndim == 3 else problem.x).numpy()
        y = (problem.y[row] if problem.y.ndim > 1 + (problem.loss is fs.squared) else problem.y).numpy()
        return Steps(x, y, problem.loss.name, problem.net.widths[1], **options)

    def ascent(self, w):
        m, d = self.width, self.x.shape[1]
        first, last = w[: m * d].reshape(m, d), w[m * d :].reshape(-1, m)
        z = self.x @ first.T
        slope = np.where(z > 0, 1.0, self.leak)
        hidden = slope * z
        lam, cotangent = ASCENT[self.loss](hidden @ last.T, self.y)
        force = (cotangent @ last) * slope
        return lam, np.concatenate([(force.T @ self.x).ravel(), (cotangent.T @ hidden).ravel()])

    def raised(self, h):
        return self.inverse @ h if np.ndim(self.inverse) == 2 else self.inverse * h

    def size(self, w):
        """‖w‖_A."""
        return math.sqrt(w @ (np.linalg.solve(self.inverse, w) if np.ndim(self.inverse) == 2 else w / self.inverse))

    def run(self, w, levels, c):
        """Λ, weights and log t at the first steps that pass the levels, read off linearly in between."""
        w, found = np.array(w), []
        lam, h = self.ascent(w)
        time = 0.0
        for level in levels:
            while lam < level:
                tau = c / self.size(w) ** 2
                before = w, lam, time
                w = w + tau * self.raised(h)
                lam, h = self.ascent(w)
                time += tau * (math.exp(lam) - math.exp(before[1])) / (lam - before[1] or 1e-300)
            u = (level - before[1]) / (lam - before[1])
            found.append((before[0] + u * (w - before[0]), math.log(before[2] + u * (time - before[2]))))
        return np.array([w for w, _ in found]), np.array([t for _, t in found])


def margins(problem, weights, norm=None, row=0):
    """Soft margins of saved weights (S, P)."""
    w = torch.from_numpy(np.ascontiguousarray(weights))
    one = problem.select(torch.full((len(w),), row)) if problem.x.ndim == 3 else problem
    lam = problem.loss.soft_minimum(one.lam(w))
    return (lam / (norm or fs.L2()).bind(problem.layout).value(w) ** 2).numpy()


@cache
def peers(d, n, seed):
    return fs.data.peers_net(d, 64, n, seed=seed)


def small(loss=fs.exponential, *, outputs=1, activation=fs.relu, seed=0, n=15, d=6, width=10):
    """A small net on Gaussian inputs with random labels."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(n, d, generator=g, dtype=torch.float64)
    if loss is fs.squared:
        y = torch.randn(n, outputs, generator=g, dtype=torch.float64)
    elif outputs == 1:
        y = 2 * torch.randint(2, (n,), generator=g) - 1
    else:
        y = torch.randint(outputs, (n,), generator=g)
    net = fs.MLP([d, width, outputs], activation=activation)
    return fs.Problem(net, x, y, loss), net.init(seeds=seed, scale=0.7)


def walk(problem, w0, stop, rtol=1e-3):
    """The states after every natural step up to Λ = stop."""
    rule = fs.SteepestFlow(fs.L2(), rtol=rtol, method=KinkImplicit())
    states = [rule.start(problem, w0)]
    until = Target(LAM, torch.full((len(w0),), float(stop), dtype=torch.float64))
    while bool((states[-1].readings["lam"] < stop).all()) and bool(states[-1].running.all()):
        state = rule.advance(problem, states[-1], until, 1)
        if float(state.readings["steps"]) > float(states[-1].readings["steps"]):
            states.append(state)
        else:
            states[-1] = state
    return states


@cache
def long_walk(rtol=1e-3, seed=1):
    return walk(*peers(20, 50, seed), 1e4, rtol)


def column(states, name):
    return np.array([float(s.readings[name]) for s in states])


# Exact slides. Unit inputs x₁, x₂ at an angle of cosine c and sine s. A neuron w ⊥ x₂ with a positive outer weight
# gains from x₁ (y = +1) and is kept off x₂ (y = −1): it slides with multiplier D = c p₁/p₂ along the kink of x₂.

COSINE, SINE = 0.6, 0.8
X1, X2 = np.array([0.0, 1.0, 0.0]), np.array([SINE, COSINE, 0.0])
PERP1, PERP2 = np.array([1.0, 0.0, 0.0]), np.array([-COSINE, SINE, 0.0])  # ⟨PERP2, X1⟩ = ⟨PERP1, X2⟩ = s


def two_examples(width):
    return fs.Problem(fs.MLP([3, width, 1], activation=fs.relu), np.stack([X1, X2]), [1, -1], fs.exponential)


def weights(neurons, outer):
    return torch.from_numpy(np.concatenate([np.concatenate(neurons), outer]))[None]


@pytest.mark.parametrize("rtol", [1e-3, 1e-5])
def test_one_neuron_slides_on_the_example_it_must_not_see(rtol):
    """q = q₁ = s a² with w = a·PERP2: q̇ = 2s q e^{−q}, so that t = (Ei(q) − Ei(q₀))/2s; q₂ = 0 throughout."""
    start = 0.4
    q0 = SINE * start**2
    levels = [-math.log1p(math.exp(-q)) for q in (0.3, 0.7, 1.5, 3.0)]
    run = flow(two_examples(1), weights([start * PERP2], [start]), fs.lam(levels), rtol=rtol, strict=True)
    for k, q in enumerate((0.3, 0.7, 1.5, 3.0), start=1):
        a = math.sqrt(q / SINE)
        assert run.weights[k, 0] == pytest.approx([*(a * PERP2), a], abs=30 * rtol**1.5)
        assert run.weights[k, 0, :3] @ X2 == pytest.approx(0, abs=1e-15)
        assert run["log_time"][k, 0] == pytest.approx(math.log((expi(q) - expi(q0)) / (2 * SINE)), abs=3 * rtol)
        assert run["arclength"][k, 0] == pytest.approx(math.sqrt(2) * (a - start), abs=10 * rtol)
    q = SINE * float(run.final.w[0, 3]) ** 2
    assert run.final.multipliers[0] == pytest.approx([1, COSINE * math.exp(-q)], abs=1e-12)
    assert run["tally_sliding"][:, 0] == pytest.approx(1)


@pytest.mark.parametrize("stop", [20.0, 1e4, 1e6])
def test_two_neurons_that_slide_on_the_examples_of_each_other(stop):
    """Both margins are q = s a²: a ray, on which Λ = q − log 2, γ = s/4 and t = (Ei(q) − Ei(q₀))/2s."""
    start = 0.5
    w0 = weights([start * PERP2, start * PERP1], [start, -start])
    run = flow(two_examples(2), w0, fs.lam(stop, saves=4), strict=True)
    for k in range(4):
        a = math.sqrt((run["lam"][k, 0] + math.log(2)) / SINE)
        assert run.weights[k, 0] == pytest.approx([*(a * PERP2), *(a * PERP1), a, -a], rel=1e-9, abs=1e-9)
    assert run.final.multipliers[0] == pytest.approx([1, COSINE, COSINE, 1], abs=1e-9)
    q0, q = SINE * start**2, float(run.final.readings["lam"][0]) + math.log(2)
    log_time = math.log((expi(q) - expi(q0)) / (2 * SINE)) if q < 600 else q - math.log(q - 1) - math.log(2 * SINE)
    assert float(run.final.readings["log_time"][0]) == pytest.approx(log_time, abs=5e-3)
    assert run["dissipated"][-1] == pytest.approx(run["lam"][-1] - run["lam"][0], rel=2e-4)


def test_unequal_layers_slide_on_a_hyperbola():
    """|w|² − a² is conserved, and on it q = s a|w|."""
    w0 = weights([0.9 * PERP2], [0.3])
    run = flow(two_examples(1), w0, fs.lam([-0.3, -0.1, -0.05]), rtol=1e-4, strict=True)
    size, a = np.linalg.norm(run.weights[:, 0, :3], axis=1), run.weights[:, 0, 3]
    assert size**2 - a**2 == pytest.approx(0.72, abs=1e-5)
    assert -np.log1p(np.exp(-SINE * a * size)) == pytest.approx(run["lam"][:, 0], abs=1e-12)


def test_a_neuron_arrives_at_its_kink_and_slides():
    """Against an ODE solver on either side of the arrival."""
    problem, steps = two_examples(1), Steps.of(two_examples(1))
    start = np.array([*(0.4 * PERP2 + 0.1 * X2), 0.5])

    def event(t, w):
        return w[:3] @ X2

    event.terminal = True
    tight = {"rtol": 1e-11, "atol": 1e-13}
    first = solve_ivp(lambda t, w: steps.ascent(w)[1], (0, 10), start, events=event, **tight)
    assert first.status == 1

    def along(t, w):
        p1 = 1 / (1 + math.exp(SINE * np.linalg.norm(w[:3]) * w[3]))
        return p1 * np.array([*(w[3] * SINE * PERP2), SINE * np.linalg.norm(w[:3])])

    def level(t, w):
        return steps.ascent(w)[0] + 0.05

    level.terminal = True
    then = solve_ivp(along, (0, 100), first.y[:, -1], events=level, **tight)
    run = flow(problem, torch.from_numpy(start)[None], fs.lam([-0.05]), rtol=1e-5, strict=True)
    assert run.weights[-1, 0] == pytest.approx(then.y[:, -1], abs=1e-5)
    assert run["tally_sliding"][:, 0].tolist() == [0, 1]


# Small steps


def check_against_small_steps(d, n, seed, decades, c, *, rtol=1e-3, close=1e-4):
    """Soft margin and log t at decades of the mean loss, against steps c and c/2 that agree with each other."""
    problem, w0 = peers(d, n, seed)
    levels = [k * LOG10 - math.log(n) for k in decades]
    run = flow(problem, w0, fs.lam(levels), rtol=rtol, strict=True)
    (coarse, _), (fine, log_time) = (Steps.of(problem).run(w0[0].numpy(), levels, step) for step in (c, c / 2))
    expected = margins(problem, fine)
    assert margins(problem, coarse) == pytest.approx(expected, abs=close / 3)
    assert margins(problem, run.weights[1:, 0]) == pytest.approx(expected, abs=close)
    assert run["log_time"][1:, 0] == pytest.approx(log_time, abs=1e-3)
    assert np.linalg.norm(run.weights[1:, 0] - fine, axis=1) <= pytest.approx(0.02 * np.linalg.norm(fine, axis=1))
    assert run["tally_sliding"][-1, 0] > 30


@pytest.mark.parametrize(("d", "n", "seed", "c"), [(20, 50, 1, 0.2), (100, 20, 1, 0.04)])
def test_small_steps_of_a_large_net_tend_to_the_flow(d, n, seed, c):
    check_against_small_steps(d, n, seed, [1, 2, 5, 10], c)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(("d", "n", "c"), [(20, 50, 0.1), (100, 20, 0.02)])
def test_small_steps_tend_to_the_flow_as_far_as_losses_of_1e_minus_100(d, n, c, seed):
    check_against_small_steps(d, n, seed, [1, 2, 5, 10, 30, 100], c, rtol=1e-4)


def spd(size):
    g = torch.Generator().manual_seed(9)
    root = torch.randn(size, size, generator=g, dtype=torch.float64) / size**0.5
    return torch.eye(size).double() + root @ root.T


SETTINGS = {
    "l2": (fs.exponential, 1, fs.relu, None, 1.0),
    "leaky relu": (fs.exponential, 1, fs.leaky_relu(0.2), None, 1.0),
    "logistic": (fs.logistic, 1, fs.relu, None, 1.0),
    "pairwise": (fs.pairwise_exponential, 3, fs.relu, None, 1.0),
    "cross-entropy": (fs.cross_entropy, 3, fs.relu, None, 1.0),
    "pairwise leaky relu": (fs.pairwise_exponential, 3, fs.leaky_relu(0.2), None, 1.0),
    "squared": (fs.squared, 1, fs.relu, None, 1.0),
    "squared with two outputs": (fs.squared, 2, fs.relu, None, 1.0),
    "euclidean": (fs.exponential, 1, fs.relu, fs.Euclidean(fs.L2(), {"W1": 0.5, "W2": 2.0}), [0.25, 4.0]),
    "diagonal": (fs.exponential, 1, fs.relu, fs.Mahalanobis(torch.linspace(0.5, 2, 70).double()), "norm"),
    "dense": (fs.exponential, 1, fs.relu, fs.Mahalanobis(spd(70)), "norm"),
    "dense cross-entropy": (fs.cross_entropy, 3, fs.relu, fs.Mahalanobis(spd(90)), "norm"),
}


def inverse_of(problem, norm, inverse):
    if inverse == "norm":
        return np.linalg.inv(norm.matrix.numpy()) if norm.matrix.ndim == 2 else 1 / norm.matrix.numpy()
    if isinstance(inverse, list):
        return np.concatenate([np.full(b.size, v) for b, v in zip(problem.layout, inverse, strict=True)])
    return inverse


@pytest.mark.parametrize("name", SETTINGS)
def test_small_steps_tend_to_the_flow_in_every_quadratic_norm_and_loss(name):
    loss, outputs, activation, norm, inverse = SETTINGS[name]
    problem, w0 = small(loss, outputs=outputs, activation=activation)
    levels = [0.0, 2.0, 4.0] if loss is fs.squared else [0.0, 2.0, 8.0]
    run = flow(problem, w0, fs.lam(levels), norm=norm, rtol=1e-4, strict=True)
    leak = float(activation.slope(torch.tensor([-1.0]))[0])
    steps = Steps.of(problem, leak=leak, inverse=inverse_of(problem, norm, inverse))
    expected, log_time = steps.run(w0[0].numpy(), levels, 2e-3)
    size = np.linalg.norm(expected, axis=1)
    assert np.linalg.norm(run.weights[1:, 0] - expected, axis=1) / size == pytest.approx(0, abs=2e-3)
    assert run["log_time"][1:, 0] == pytest.approx(log_time, abs=3e-3)
    if loss is not fs.squared:
        ours, theirs = (margins(problem, w, norm) for w in (run.weights[1:, 0], expected))
        assert ours == pytest.approx(theirs, rel=1e-3, abs=1e-5)
    assert run["tally_sliding"].max() >= 1

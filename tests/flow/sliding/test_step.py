"""The flow of two-layer nets through their kinks: exact slides, small steps in numpy, and the laws
of the flow."""

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
from flowsim.flow.field import Field
from flowsim.flow.sliding.step import KinkImplicit
from flowsim.motion.clocks import GRADIENT, LAM, STEPS, Target

LOG10 = math.log(10)


def flow(problem, w0, until, *, norm=None, rtol=1e-3, sides=(), max_steps=20_000, **options):
    rule = fs.SteepestFlow(norm or fs.L2(), rtol=rtol, method=KinkImplicit(sides))
    return fs.simulate(problem, rule, w0, until=until, max_steps=max_steps, **options)


# A program of its own: w ← w + c/‖w‖² A⁻¹∇Λ, whose chatter about a kink averages to the slide as c
# → 0.


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
        y = (
            problem.y[row] if problem.y.ndim > 1 + (problem.loss is fs.squared) else problem.y
        ).numpy()
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
        return math.sqrt(
            w
            @ (np.linalg.solve(self.inverse, w) if np.ndim(self.inverse) == 2 else w / self.inverse)
        )

    def run(self, w, levels, c, time=0.0):
        """Weights and log t at the levels, read off linearly inside a step."""
        w, found = np.array(w), []
        lam, h = self.ascent(w)
        for level in levels:
            while lam < level:
                tau = c / self.size(w) ** 2
                before = w, lam, time
                w = w + tau * self.raised(h)
                lam, h = self.ascent(w)
                time += tau * (math.exp(lam) - math.exp(before[1])) / (lam - before[1] or 1e-300)
            u = (level - before[1]) / (lam - before[1])
            found.append(
                (before[0] + u * (w - before[0]), math.log(before[2] + u * (time - before[2])))
            )
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


def small(loss=fs.exponential, *, outputs=1, activation=fs.relu, seed=1, n=10, d=6, width=10):
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


# Exact slides. Unit inputs x₁, x₂ at an angle of cosine c and sine s. A neuron w ⊥ x₂ with a
# positive outer weight gains from x₁ (y = +1) and is kept off x₂ (y = −1): it slides with
# multiplier D = c p₁/p₂ along the kink of x₂.

COSINE, SINE = 0.6, 0.8
X1, X2 = np.array([0.0, 1.0, 0.0]), np.array([SINE, COSINE, 0.0])
PERP1, PERP2 = (
    np.array([1.0, 0.0, 0.0]),
    np.array([-COSINE, SINE, 0.0]),
)  # ⟨PERP2, X1⟩ = ⟨PERP1, X2⟩ = s


def two_examples(width):
    return fs.Problem(
        fs.MLP([3, width, 1], activation=fs.relu), np.stack([X1, X2]), [1, -1], fs.exponential
    )


def weights(neurons, outer):
    return torch.from_numpy(np.concatenate([np.concatenate(neurons), outer]))[None]


@pytest.mark.parametrize("rtol", [1e-3, 1e-4])
def test_one_neuron_slides_on_the_example_it_must_not_see(rtol):
    """q = q₁ = s a² with w = a·PERP2: q̇ = 2s q e^{−q}, so that t = (Ei(q) − Ei(q₀))/2s; q₂ = 0
    throughout."""
    start = 0.4
    q0 = SINE * start**2
    levels = [-math.log1p(math.exp(-q)) for q in (0.3, 0.7, 1.5, 3.0)]
    run = flow(
        two_examples(1), weights([start * PERP2], [start]), fs.lam(levels), rtol=rtol, strict=True
    )
    for k, q in enumerate((0.3, 0.7, 1.5, 3.0), start=1):
        a = math.sqrt(q / SINE)
        assert run.weights[k, 0] == pytest.approx([*(a * PERP2), a], abs=0.03 * rtol)
        assert run.weights[k, 0, :3] @ X2 == pytest.approx(0, abs=1e-13)
        assert run["log_time"][k, 0] == pytest.approx(
            math.log((expi(q) - expi(q0)) / (2 * SINE)), abs=3 * rtol
        )
    a = float(run.final.w[0, 3])
    assert run.final.multipliers[0].tolist() == pytest.approx(
        [1, COSINE * math.exp(-SINE * a**2)], abs=1e-11
    )
    assert float(run.final.readings["arclength"]) == pytest.approx(
        math.sqrt(2) * (a - start), abs=0.3 * rtol
    )
    assert run["tally_sliding"][:, 0] == pytest.approx(1)


@pytest.mark.parametrize("stop", [20.0, 1e4, 1e6])
def test_two_neurons_that_slide_on_the_examples_of_each_other(stop):
    """Both margins are q = s a²: a ray, on which Λ = q − log 2, γ = s/4 and t = (Ei(q) −
    Ei(q₀))/2s."""
    start = 0.5
    w0 = weights([start * PERP2, start * PERP1], [start, -start])
    run = flow(two_examples(2), w0, fs.lam(stop, saves=4), strict=True)
    assert run["steps"][-1, 0] < 400
    for k in range(4):
        a = math.sqrt((run["lam"][k, 0] + math.log(2)) / SINE)
        assert run.weights[k, 0] / a == pytest.approx([*PERP2, *PERP1, 1, -1], abs=1e-10)
    assert run.final.multipliers[0].tolist() == pytest.approx([1, COSINE, COSINE, 1], abs=1e-8)
    q0, q = SINE * start**2, float(run.final.readings["lam"][0]) + math.log(2)
    log_time = (
        math.log((expi(q) - expi(q0)) / (2 * SINE))
        if q < 600
        else q - math.log(q - 1) - math.log(2 * SINE)
    )
    assert float(run.final.readings["log_time"][0]) == pytest.approx(log_time, abs=1e-3)
    assert run["dissipated"][-1] == pytest.approx(run["lam"][-1] - run["lam"][0], rel=1e-5)


def test_unequal_layers_slide_on_a_hyperbola():
    """|w|² − a² is conserved, and on it q = s a|w|."""
    w0 = weights([0.9 * PERP2], [0.3])
    run = flow(two_examples(1), w0, fs.lam([-0.3, -0.1, -0.05]), rtol=1e-4, strict=True)
    size, a = np.linalg.norm(run.weights[:, 0, :3], axis=1), run.weights[:, 0, 3]
    assert size**2 - a**2 == pytest.approx(0.72, abs=5e-4)
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
    run = flow(problem, torch.from_numpy(start)[None], fs.lam([-0.05]), rtol=1e-4, strict=True)
    assert run.weights[-1, 0] == pytest.approx(then.y[:, -1], abs=1e-4)
    assert run["tally_sliding"][:, 0].tolist() == [0, 1]


# Small steps


def between_releases(run):
    """Ranges of saves without a release inside. From each one on, small steps go on from the flow:
    which side a released pair takes is a choice."""
    steps, releases = run["steps"][:, 0], run["tally_releases"][:, 0]
    rises = [*(np.flatnonzero(np.diff(releases) > 0) + 1), len(steps)]
    # the tally of a save is that of the step around it
    starts = [0, *(int(np.searchsorted(steps, math.ceil(steps[k]))) for k in rises[:-1])]
    return [(start, end) for start, end in zip(starts, rises, strict=True) if start < end]


def check_against_small_steps(d, n, seed, decades, c, *, rtol=1e-3, close=1e-4, near=5e-3):
    """Soft margin and log t at decades of the mean loss, against steps c and c/2 that agree with
    each other."""
    problem, w0 = peers(d, n, seed)
    levels = [k * LOG10 - math.log(n) for k in decades]
    first = float(problem.lam(w0))
    grid = [first + (levels[-1] - first) * (u / 200) ** 3 for u in range(1, 200)]
    run = flow(problem, w0, fs.lam(sorted({*levels, *grid})), rtol=rtol, strict=True)
    checked, steps = 0, Steps.of(problem)
    for start, end in between_releases(run):
        saves = [
            k
            for k in range(start + 1, end)
            if np.abs(np.array(levels) - run["lam"][k, 0]).min() < 1e-4
        ]
        if not saves:
            continue
        given = run.weights[start, 0], run["lam"][saves, 0]
        time = math.exp(run["log_time"][start, 0])
        (coarse, _), (fine, log_time) = (steps.run(*given, step, time) for step in (c, c / 2))
        expected = margins(problem, fine)
        assert margins(problem, coarse) == pytest.approx(expected, abs=close / 3)
        assert margins(problem, run.weights[saves, 0]) == pytest.approx(expected, abs=close)
        assert run["log_time"][saves, 0] == pytest.approx(log_time, abs=1e-3)
        size = np.linalg.norm(fine, axis=1)
        assert np.linalg.norm(run.weights[saves, 0] - fine, axis=1) / size == pytest.approx(
            0, abs=near
        )
        checked += len(saves)
    assert checked >= len(levels) // 2
    assert run["tally_sliding"][-1, 0] > 30


@pytest.mark.parametrize(("d", "n", "seed", "c"), [(20, 50, 1, 0.2), (100, 20, 1, 0.04)])
def test_small_steps_of_a_large_net_tend_to_the_flow(d, n, seed, c):
    check_against_small_steps(d, n, seed, [1, 2, 5, 10], c)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(("d", "n", "c"), [(20, 50, 0.1), (100, 20, 0.02)])
def test_small_steps_tend_to_the_flow_as_far_as_losses_of_1e_minus_100(d, n, c, seed):
    check_against_small_steps(d, n, seed, [1, 2, 5, 10, 30, 100], c, rtol=1e-4, near=1e-2)


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
    "euclidean": (
        fs.exponential,
        1,
        fs.relu,
        fs.Euclidean(fs.L2(), {"W1": 0.5, "W2": 2.0}),
        [0.25, 4.0],
    ),
    "diagonal": (
        fs.exponential,
        1,
        fs.relu,
        fs.Mahalanobis(torch.linspace(0.5, 2, 70).double()),
        "norm",
    ),
    "dense": (fs.exponential, 1, fs.relu, fs.Mahalanobis(spd(70)), "norm"),
    "dense cross-entropy": (fs.cross_entropy, 3, fs.relu, fs.Mahalanobis(spd(90)), "norm"),
}


def inverse_of(problem, norm, inverse):
    if inverse == "norm":
        return (
            np.linalg.inv(norm.matrix.numpy()) if norm.matrix.ndim == 2 else 1 / norm.matrix.numpy()
        )
    if isinstance(inverse, list):
        return np.concatenate(
            [np.full(b.size, v) for b, v in zip(problem.layout, inverse, strict=True)]
        )
    return inverse


@pytest.mark.parametrize("name", SETTINGS)
def test_small_steps_tend_to_the_flow_in_every_quadratic_norm_and_loss(name):
    loss, outputs, activation, norm, inverse = SETTINGS[name]
    problem, w0 = small(loss, outputs=outputs, activation=activation)
    levels = [0.0, 1.5] if loss is fs.squared else [1.0, 2.0, 6.0]
    run = flow(problem, w0, fs.lam(levels), norm=norm, rtol=5e-4, strict=True)
    leak = float(activation.slope(torch.tensor([-1.0]))[0])
    steps = Steps.of(problem, leak=leak, inverse=inverse_of(problem, norm, inverse))
    expected, log_time = steps.run(w0[0].numpy(), levels, 4e-3 if loss is fs.squared else 8e-2)
    size = np.linalg.norm(expected, axis=1)
    assert np.linalg.norm(run.weights[1:, 0] - expected, axis=1) / size == pytest.approx(
        0, abs=2e-3
    )
    assert run["log_time"][1:, 0] == pytest.approx(log_time, abs=3e-3)
    if loss is not fs.squared:
        ours, theirs = (margins(problem, w, norm) for w in (run.weights[1:, 0], expected))
        assert ours == pytest.approx(theirs, rel=5e-4)
    assert run["tally_sliding"].max() >= 1


# Norms


def same(run, other, close=1e-6):
    """Up to rounding, which the choice of step sizes amplifies."""
    assert run["steps"][-1] == pytest.approx(other["steps"][-1], rel=close)
    assert run.weights == pytest.approx(other.weights, rel=close, abs=close)
    for name in ("lam", "log_time", "arclength", "dissipated"):
        assert run[name][1:] == pytest.approx(other[name][1:], rel=close, abs=close)


def test_metrics_written_in_two_ways_are_one():
    problem, w0 = small()
    scales = {"W1": 0.5, "W2": 2.0}
    diagonal = torch.cat(
        [torch.full((b.size,), scales[b.name] ** -2) for b in problem.layout]
    ).double()
    unit = torch.ones(problem.size, dtype=torch.float64)
    for one, other in (
        (fs.L2(), fs.Mahalanobis(unit)),
        (fs.L2(), fs.Mahalanobis(torch.diag(unit))),
        (fs.L2(), fs.Euclidean(fs.L2())),
        (fs.Euclidean(fs.L2(), scales), fs.Mahalanobis(diagonal)),
        (fs.Mahalanobis(diagonal), fs.Mahalanobis(torch.diag(diagonal))),
    ):
        same(
            *(
                flow(problem, w0, fs.lam([-1.0, 0.0]), norm=norm, strict=True)
                for norm in (one, other)
            )
        )


def test_norms_that_are_not_quadratic_are_refused():
    problem, w0 = small()
    for norm in (fs.Linf(), fs.Lp(3.0), fs.Euclidean(fs.Linf())):
        with pytest.raises(ValueError, match="expected a quadratic one .*try flowsim.SmallStep"):
            flow(problem, w0, fs.lam([1.0]), norm=norm)


# Symmetries


def test_scaled_data_and_weights_have_scaled_paths():
    problem, w0 = small()
    scaled = fs.Problem(problem.net, 16 * problem.x, problem.y, problem.loss)
    run, other = flow(problem, w0, fs.lam([5.0, 30.0])), flow(scaled, w0 / 4, fs.lam([5.0, 30.0]))
    assert 4 * other.weights == pytest.approx(run.weights, abs=1e-6)


def test_rotated_inputs_and_permuted_neurons_have_the_same_path():
    problem, w0 = small()
    turn = torch.linalg.qr(torch.randn(6, 6, generator=torch.Generator().manual_seed(2)).double())[
        0
    ]
    order = torch.randperm(10, generator=torch.Generator().manual_seed(2))
    rows = torch.randperm(10, generator=torch.Generator().manual_seed(3))

    def turned(w):
        first, last = w[..., :60].unflatten(-1, (10, 6)), w[..., 60:]
        return torch.cat([(first @ turn)[..., order, :].flatten(-2), last[..., order]], -1)

    other = fs.Problem(problem.net, problem.x[rows] @ turn, problem.y[rows], problem.loss)
    run, image = (
        flow(problem, w0, fs.lam([5.0, 30.0])),
        flow(other, turned(w0), fs.lam([5.0, 30.0])),
    )
    assert turned(torch.from_numpy(run.weights)).numpy() == pytest.approx(image.weights, abs=1e-6)


# Order


class Fixed(KinkImplicit):
    """Steps of one size."""

    def _excess(self, field, problem, state, trial, point, moved):
        return torch.zeros_like(state.step_size)

    def _resized(self, state, excess):
        return state


def fixed_steps(problem, state, size, count):
    """The state after ``count`` steps, each of relative arclength ``size``."""
    state = replace(state, step_size=torch.full_like(state.step_size, size))
    until = Target(STEPS, state.readings["steps"] + count)
    return Fixed().advance(Field(fs.L2(), GRADIENT), problem, state, until, count)


def at_level(before, after, level):
    """Weights at Λ = level between two states, by the cubic through dw/dΛ = h/‖h‖²."""
    first, last = (float(s.readings["lam"]) for s in (before, after))
    rise, u = last - first, (level - first) / (last - first)
    start, end = (
        rise * s.memory["ascent"] / s.memory["dual_norm"][:, None] ** 2 for s in (before, after)
    )
    gap = after.w - before.w
    return before.w + u * (start + u * ((3 * gap - 2 * start - end) + u * (start + end - 2 * gap)))


def order(starts, span, sizes):
    """The slope of the mean error, in the weights at equal Λ, over the sizes of steps."""
    errors = []
    for problem, start in starts:
        ends = [fixed_steps(problem, start, h, round(span / h)) for h in sizes]
        state, found = start, {}
        while len(found) < len(ends):
            then = fixed_steps(problem, state, min(sizes) / 8, 1)
            for k, end in enumerate(ends):
                level = float(end.readings["lam"])
                if k not in found and float(then.readings["lam"]) >= level:
                    found[k] = at_level(state, then, level)
            state = then
        errors.append(
            [float((end.w - found[k]).norm() / end.w.norm()) for k, end in enumerate(ends)]
        )
    mean = np.exp(np.log(errors).mean(0))
    return np.polyfit(np.log(sizes), np.log(mean), 1)[0], mean


def sliding_start(d, n, seed, level=2.0):
    problem, w0 = peers(d, n, seed)
    run = flow(problem, w0, fs.lam([level]), strict=True)
    state = replace(run.final, status=torch.zeros_like(run.final.status))
    return problem, fixed_steps(problem, state, 1e-3, 20)


@pytest.mark.slow
def test_steps_are_of_second_order_through_sliding():
    starts = [sliding_start(20, 50, seed) for seed in range(6)]
    assert min(float(state.tallies["sliding"]) for _, state in starts) > 100
    slope, errors = order(starts, 0.04, [0.01, 0.005, 0.0025, 0.00125])
    assert 1.7 < slope < 2.3, (slope, errors)


def test_steps_converge_through_sliding():
    """An eighth of the step size leaves less than a fifth of the error."""
    _, errors = order([sliding_start(20, 50, seed) for seed in (0, 1)], 0.04, [0.04, 0.005])
    assert errors[1] < 0.2 * errors[0] < 2e-4


BELOW, ABOVE = 0.4 * PERP2 - 0.1 * X2, 0.4 * PERP2 + 0.1 * X2
FALLING = np.array([SINE, -COSINE, 0.0])
EVENTS = {  # inputs, labels, start, Λ at the end, whether it slides from there on
    "arrives from above": (X1, X2, [1, -1], [*ABOVE, 0.5], -0.4, True),
    "arrives from below": (X1, X2, [1, -1], [*BELOW, 0.5], -0.4, True),
    "passes where it is attracted": (
        5 * X1,
        X2,
        [1, -1],
        [*(0.2 * PERP2 - 0.1 * X2), 0.2],
        -0.35,
        False,
    ),
    "passes where it is repelled": (8 * X1, FALLING, [1, 1], [0.16, 0.13, 0.0, 0.2], -0.45, False),
}


def behind_a_kink(steps, start, level, slides):
    """Weights at Λ = level by an ODE solver on either side of the kink of the second example."""
    x2, tight = steps.x[1], {"rtol": 1e-12, "atol": 1e-14}

    def event(t, w):
        return w[:3] @ x2

    def end(t, w):
        return steps.ascent(w)[0] - level

    def velocity(t, w):
        h = steps.ascent(w)[1]
        h[:3] -= slides * (h[:3] @ x2) * x2
        return h

    event.terminal = end.terminal = True
    first = solve_ivp(lambda t, w: steps.ascent(w)[1], (0, 100), start, events=event, **tight)
    w = first.y[:, -1]
    w[:3] -= (w[:3] @ x2 + (not slides) * 1e-13 * np.sign(start[:3] @ x2)) * x2
    then = solve_ivp(velocity, (0, 100), w, events=end, **tight)
    assert (first.status, then.status) == (1, 1)
    return then.y[:, -1]


@pytest.mark.parametrize(
    "name",
    [
        "arrives from above",
        "arrives from below",
        "passes where it is attracted",
        "passes where it is repelled",
    ],
)
def test_one_kink_costs_an_error_of_second_order(name):
    """The envelope over steps of many sizes: the error depends on where in its step the neuron
    meets the kink."""
    first, second, y, start, level, slides = EVENTS[name]
    net = fs.MLP([3, 1, 1], activation=fs.relu)
    problem, start = fs.Problem(net, np.stack([first, second]), y, fs.exponential), np.array(start)
    expected = behind_a_kink(Steps.of(problem), start, level, slides)
    begin = fs.SteepestFlow(fs.L2()).start(problem, torch.from_numpy(start)[None])

    def error(size):
        state = then = begin
        while float(then.readings["lam"]) < level:
            state, then = then, fixed_steps(problem, then, size, 1)
        return np.linalg.norm(at_level(state, then, level)[0].numpy() - expected)

    coarse, fine = (max(error(size * 0.9**k) for k in range(4)) for size in (0.08, 0.02))
    assert fine < coarse / 4**1.6, math.log(coarse / fine) / math.log(4)


# Laws of the flow


def check_energy(states, close):
    lam, dissipated = column(states, "lam"), column(states, "dissipated")
    assert dissipated[-1] / (lam[-1] - lam[0]) == pytest.approx(1, abs=close)


def test_energy_balances():
    check_energy(long_walk(), 2e-4)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(2))
def test_energy_balances_to_the_tolerance(seed):
    check_energy(walk(*peers(20, 50, seed), 1e4, 1e-4), 1e-5)


def test_the_soft_margin_rises_at_every_step_once_it_is_positive():
    states = long_walk()
    lam, size = column(states, "lam"), np.array([float(s.w.norm()) for s in states])
    margin = (lam / size**2)[lam > 0]
    assert len(margin) > 50
    assert (np.diff(margin) >= -1e-12 * margin[1:]).all()
    assert (np.diff(lam) > 0).all()


def test_alignment_pays_for_the_growth_of_the_margin():
    """∫(1/α − 1) dσ ≤ ½ log(γ̃₂/γ̃₁), with the α of the selected gradient, and α → 1."""
    states = [s for s in long_walk() if float(s.readings["lam"]) > 0]
    size = np.array([float(s.w.norm()) for s in states])
    alpha = (
        np.array([float((s.w * s.memory["ascent"]).sum() / s.memory["dual_norm"]) for s in states])
        / size
    )
    relative, log_margin = column(states, "relative"), np.log(column(states, "lam") / size**2)
    paid = np.cumsum(np.diff(relative) * ((1 / alpha - 1)[1:] + (1 / alpha - 1)[:-1]) / 2)
    for first in (0, 20, 60):
        gained = 0.5 * (log_margin - log_margin[first])
        assert (
            paid[first:] - (paid[first - 1] if first else 0) <= gained[first + 1 :] + 1e-3
        ).all()
    assert alpha[-1] == pytest.approx(1, abs=5e-3)
    assert (alpha <= 1 + 1e-12).all()


def test_time_at_the_end_is_that_of_theory():
    """t𝓛Λ·4γ → 1 for nets of degree 2."""
    last = long_walk()[-1]
    lam = float(last.readings["lam"])
    gamma = lam / float(last.w.norm()) ** 2
    assert float(last.readings["log_time"]) - lam + math.log(lam) + math.log(
        4 * gamma
    ) == pytest.approx(0, abs=1e-2)


def test_sliding_pairs_stay_on_their_kinks_and_their_gradient_is_the_least():
    """Hundreds of steps on: the stored multipliers against bounded least squares over Clarke's
    set."""
    problem, _ = peers(20, 50, 1)
    last = long_walk()[-1]
    x, width, (first, outer) = problem.x.numpy(), 64, last.w[0].split([64 * 20, 64])
    first = first.view(64, 20).numpy()
    z = x @ first.T
    size = np.linalg.norm(x, axis=1)[:, None] * np.linalg.norm(first, axis=1)
    D = last.multipliers.view(50, 64).numpy()
    sliding = (D > 0) & (D < 1)
    assert sliding.sum() > 200
    assert (np.abs(z)[sliding] <= 1e-12 * size[sliding]).all()
    assert np.array_equal(
        D[~sliding & (np.abs(z) > 1e-12 * size)], (z > 0)[~sliding & (np.abs(z) > 1e-12 * size)]
    )

    _, cotangent = ascent_exponential(
        (np.maximum(z, 0) @ outer.numpy())[:, None], problem.y.numpy()
    )
    force = cotangent * outer.numpy()
    on = (np.abs(z) <= 1e-12 * size) & (force < 0)
    expected = np.zeros_like(first)
    for j in range(width):
        base = (force[:, j] * ~on[:, j] * (z[:, j] > 0)) @ x
        expected[j] = base
        if on[:, j].any():
            normals = (force[on[:, j], j, None] * x[on[:, j]]).T
            share = lsq_linear(normals, -base, bounds=(0, 1), method="bvls", tol=1e-14).x
            expected[j] += normals @ share
    h = last.memory["ascent"][0].numpy()
    scale = np.linalg.norm(h)
    assert h[: width * 20].reshape(width, 20) == pytest.approx(expected, abs=1e-7 * scale)
    assert float(last.memory["dual_norm"]) == pytest.approx(scale, rel=1e-12)
    assert float(problem.ascent(last.w)[1].norm()) > 1.005 * scale


# Releases


def test_released_pairs_are_counted_and_their_side_is_a_choice():
    problem, w0 = peers(100, 20, 1)
    choices = [(), (), (0, 0, 0), (1, 1, 1)]
    runs = [flow(problem, w0, fs.lam([0.0, 5.0]), sides=sides, strict=True) for sides in choices]
    assert np.array_equal(runs[0].weights, runs[1].weights)
    assert [run["tally_releases"][-1, 0] for run in runs] == [3, 3, 3, 3]
    assert np.abs(runs[2].weights[-1] - runs[3].weights[-1]).max() > 1e-4
    for run in runs:
        risen = run["lam"][-1] - run["lam"][0]
        assert run["dissipated"][-1] == pytest.approx(risen, rel=1e-3)
        assert (np.diff(run["tally_releases"][:, 0]) >= 0).all()


# Batches, saved states, number formats


def test_trajectories_of_a_batch_are_single_ones(agree):
    singles = [small(seed=seed) for seed in (0, 1, 2)]
    x = torch.stack([p.x for p, _ in singles])
    y = torch.stack([p.y for p, _ in singles])
    batch = fs.Problem(singles[0][0].net, x, y, fs.exponential)
    until = fs.lam([-1.0, 0.0])
    together = flow(batch, torch.cat([w for _, w in singles]), until, strict=True)
    for b, (problem, w0) in enumerate(singles):
        alone = flow(problem, w0, until, strict=True)
        agree(alone.weights[:, 0], together.weights[:, b])
        agree(alone.final.multipliers[0], together.final.multipliers[b])
        for name in ("lam", "log_time", "dissipated", "tally_gradients", "tally_sliding"):
            agree(alone[name][:, 0], together[name][:, b])


def test_shared_data_and_several_starts(agree):
    problem, _ = small()
    w0 = problem.net.init(seeds=range(2), scale=0.7)
    together = flow(problem, w0, fs.lam([5.0]), strict=True)
    for b in range(2):
        alone = flow(problem, w0[b : b + 1], fs.lam([5.0]))
        agree(alone.weights[:, 0], together.weights[:, b])


@pytest.mark.parametrize("stop", [1.0, 5.0])
def test_a_run_that_is_resumed_is_the_unbroken_one(stop):
    problem, w0 = peers(100, 20, 1)
    unbroken = flow(problem, w0, fs.lam([stop, 15.0]))
    part = flow(problem, w0, fs.lam([stop]))
    saved = fs.State.from_tensors({name: t.clone() for name, t in part.final.tensors().items()})
    resumed = flow(problem, saved, fs.lam([15.0]))
    assert torch.equal(resumed.final.readings["steps"], unbroken.final.readings["steps"])
    assert torch.equal(resumed.final.w, unbroken.final.w)
    assert torch.equal(resumed.final.multipliers, unbroken.final.multipliers)


def test_a_state_that_has_counted_no_releases_goes_on_at_none():
    problem, w0 = peers(30, 8, 1)
    state = flow(problem, w0, fs.lam([2.0]), strict=True).final
    counted = {name: n for name, n in state.tallies.items() if name != "releases"}
    rule = fs.SteepestFlow(fs.L2(), rtol=1e-3, method=KinkImplicit())
    started = rule.start(problem, replace(state, tallies=counted))
    assert float(started.tallies["releases"]) == 0
    assert torch.equal(started.multipliers, state.multipliers)


@pytest.mark.parametrize("cut", [{"steps": 12}, {"steps": 20}, {"attempts": 12}, {"attempts": 21}])
@pytest.mark.parametrize("seed", [1, 5, 11, 22])
def test_a_state_goes_on_with_what_it_remembers(seed, cut):
    """Selected anew, multipliers round otherwise (seed 11, step 20), a pair that has just been
    released takes the other side (seed 1, step 12), and a rejection is forgotten."""
    problem, w0 = fs.data.peers_net(4 + seed % 5, 4 + seed % 7, 6 + seed % 6, seed=seed)
    rule, until = fs.SteepestFlow(fs.L2(), rtol=1e-3), fs.steps([40])
    whole = fs.simulate(problem, rule, w0, until=until).final.tensors()
    first = fs.steps([cut.get("steps", 40)])
    half = fs.simulate(problem, rule, w0, until=first, max_steps=cut.get("attempts", 100)).final
    rest = fs.simulate(problem, rule, half, until=until).final.tensors()
    for name in whole.keys() - {"tallies.gradients"}:
        assert torch.equal(rest[name].nan_to_num(), whole[name].nan_to_num()), name


def test_single_precision():
    problem, w0 = small()
    run, single = (
        flow(problem, w.clone(), fs.lam([0.0, 20.0]), max_steps=200) for w in (w0, w0.float())
    )
    assert single.final.w.dtype == torch.float32
    assert single.statuses == [fs.Status.DONE]
    assert single.weights == pytest.approx(run.weights, abs=1e-2)


# Degenerate problems


def test_an_example_given_twice():
    problem, w0 = small()
    x, y = problem.x[[*range(10), 0, 3, 3]], problem.y[[*range(10), 0, 3, 3]]
    twice = fs.Problem(problem.net, x, y, problem.loss)
    run = flow(twice, w0, fs.lam([1.0, 6.0]), strict=True)
    expected, _ = Steps.of(twice).run(w0[0].numpy(), [1.0, 6.0], 0.04)
    assert margins(twice, run.weights[1:, 0]) == pytest.approx(margins(twice, expected), rel=1e-3)
    assert np.linalg.norm(run.weights[1:, 0] - expected, axis=1) == pytest.approx(0, abs=1e-2)


def test_inputs_on_one_line_through_the_origin():
    """Pairs of opposite and of multiple inputs share their kinks."""
    problem, w0 = small()
    x, y = (
        torch.cat([problem.x, -2 * problem.x[:4], 3 * problem.x[5:7]]),
        problem.y[[*range(10), 3, 0, 1, 2, 5, 6]],
    )
    shared = fs.Problem(problem.net, x, y, problem.loss)
    run = flow(shared, w0, fs.lam([0.0, 4.0]), rtol=5e-4, strict=True)
    expected, _ = Steps.of(shared).run(w0[0].numpy(), [0.0, 4.0], 0.02)
    size = np.linalg.norm(expected, axis=1)
    assert np.linalg.norm(run.weights[1:, 0] - expected, axis=1) / size == pytest.approx(
        0, abs=3e-3
    )


def test_one_example():
    problem, w0 = small(n=1)
    run = flow(problem, w0, fs.lam([100.0]), strict=True)
    assert run["dissipated"][-1] == pytest.approx(run["lam"][-1] - run["lam"][0], rel=1e-3)


def test_neurons_that_no_example_reaches_never_move():
    problem, w0 = small(activation=fs.relu)
    x = problem.x.clone()
    x[:, 0] = x[:, 0].abs() + 0.5
    w0 = w0.clone()
    w0[:, :6] = torch.tensor([-3.0, 0, 0, 0, 0, 0]) - 1e-3
    w0[:, :6] *= 1.0
    x[:, 1:] *= 0.2
    dead = fs.Problem(problem.net, x, problem.y, problem.loss)
    run = flow(dead, w0, fs.lam([0.0]), max_steps=500)
    assert (problem.net.outputs(w0, x).isfinite()).all()
    assert ((x @ w0[0, :6]) < 0).all()
    moved = run.final.w - w0
    assert torch.equal(moved[:, :6], torch.zeros(1, 6).double())
    assert float(moved[0, 60]) == 0
    assert float(moved.abs().max()) > 0.01


def test_where_nothing_moves():
    problem, w0 = small()
    assert flow(problem, 0 * w0, fs.lam([1.0])).statuses == [fs.Status.STATIONARY]
    positive = fs.Problem(problem.net, problem.x.abs(), problem.y, problem.loss)
    dead = torch.cat([-w0[:, :60].abs(), w0[:, 60:]], 1)
    assert flow(positive, dead, fs.lam([1.0])).statuses == [fs.Status.STATIONARY]


def unsolvable(name):
    problem, w0 = small(width=2) if name == "narrow" else small()
    x, y = problem.x, problem.y
    if name == "contradictory labels":
        x, y = torch.cat([x, x[:2]]), torch.cat([y, -y[:2]])
    elif name == "only contradictory labels":
        x, y = torch.cat([x[:1], x[:1]]), torch.tensor([1, -1])
    elif name == "narrow":
        g = torch.Generator().manual_seed(0)
        x, y = (
            torch.randn(40, 6, generator=g).double(),
            2 * torch.randint(2, (40,), generator=g) - 1,
        )
    return fs.Problem(problem.net, x, y, problem.loss), w0


UNSOLVABLE = ["contradictory labels", "only contradictory labels", "narrow"]


@pytest.mark.parametrize("name", ["an example that no neuron reaches", "only contradictory labels"])
def test_losses_that_cannot_fall_further_are_not_called_infinite(name):
    problem, w0 = small(fs.logistic, seed=0, n=15) if name.startswith("an") else unsolvable(name)
    run = flow(problem, w0, fs.lam([8.0]), max_steps=400)
    assert run.statuses[0] is not fs.Status.NONFINITE


@pytest.mark.parametrize("name", UNSOLVABLE)
def test_losses_that_stay_above_zero_end_with_a_status(name):
    problem, w0 = unsolvable(name)
    run = flow(problem, w0, fs.lam([5.0]), max_steps=400)
    assert run.statuses[0] not in (fs.Status.RUNNING, fs.Status.DONE)
    assert bool(torch.isfinite(run.final.w).all())
    assert float(run.final.readings["lam"]) < 0 + 1e-9
    assert float(run.final.readings["dissipated"]) == pytest.approx(
        float(run.final.readings["lam"]) - run["lam"][0, 0], abs=1e-2
    )


def test_regression_reaches_a_small_loss():
    problem, w0 = small(fs.squared, n=5)
    run = flow(problem, w0, fs.lam([20.0]), max_steps=2000)
    assert run.statuses == [fs.Status.DONE], run.final.readings["lam"]
    assert float(problem.outputs(run.final.w).sub(problem.y).abs().max()) < 1e-4

"""The linearly implicit method: order conditions, order, stiffness, invariants, and what every
method must keep."""

import math
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch
from scipy.integrate import solve_ivp
from scipy.optimize import nnls

import flowsim as fs
from flowsim.flow.field import Field
from flowsim.flow.rosenbrock import (
    ROS34PW2,
    attempt,
    damping,
    evaluate,
    gains_along,
    without_stiff_part,
)
from flowsim.motion.clocks import GRADIENT
from flowsim.motion.state import Status

X = torch.randn(12, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
Y = torch.where(X[:, 0] > 0, 1.0, -1.0)


def metric(size):
    a = torch.randn(size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    return torch.eye(size).double() + a @ a.T / size


NORMS = {
    "l2": lambda size: fs.L2(),
    "diagonal": lambda size: fs.Mahalanobis(torch.linspace(0.5, 2.0, size).double()),
    "dense": lambda size: fs.Mahalanobis(metric(size)),
}
BY_NORM = pytest.mark.parametrize("norm", NORMS.values(), ids=NORMS)


def linear(loss=fs.exponential):
    problem = fs.Problem(fs.Linear(4), X, Y, loss)
    return problem, torch.tensor([[0.1, -0.2, 0.3, 0.0]], dtype=torch.float64)


def net(loss=fs.logistic):
    net = fs.MLP([4, 3, 1], activation=fs.square)
    return fs.Problem(net, X / 2, Y, loss), net.init([1])


def rule(rtol=1e-4, norm=None):
    return fs.SteepestFlow(norm or fs.L2(), rtol=rtol, method=ROS34PW2)


def distance(w, reference):
    return float(np.linalg.norm(w - reference) / np.linalg.norm(reference))


# The method


def coefficients():
    alpha, gamma = np.zeros((4, 4)), np.eye(4) * ROS34PW2.gamma
    for i, (row, coupling) in enumerate(zip(ROS34PW2.stages, ROS34PW2.couplings, strict=True), 1):
        alpha[i, :i], gamma[i, :i] = row, coupling
    return alpha, gamma


def conditions(b):
    """Order conditions with an arbitrary matrix in the place of the Jacobian (Hairer & Wanner
    IV.7): the residuals of orders 1, 2 and 3."""
    alpha, gamma = coefficients()
    a, c = alpha.sum(1), gamma.sum(1)
    third = [b @ a**2 - 1 / 3, b @ alpha @ a - 1 / 6, b @ alpha @ c, b @ gamma @ a, b @ gamma @ c]
    return [b.sum() - 1], [b @ a - 1 / 2, b @ c], third


def test_order_conditions_hold_for_any_matrix():
    weights, embedded = np.array(ROS34PW2.weights), np.array(ROS34PW2.embedded)
    first, second, third = conditions(weights)
    assert np.abs([*first, *second, *third]).max() < 1e-15
    first, second, third = conditions(embedded)
    assert np.abs([*first, *second]).max() < 1e-15
    assert np.abs(third).max() > 0.01  # so that the difference is an estimate of order 2


def test_stiff_components_vanish_in_one_step():
    alpha, gamma = coefficients()
    weights, one = np.array(ROS34PW2.weights), np.ones(4)
    assert (alpha + gamma)[-1] == pytest.approx(weights, abs=1e-15)  # stiffly accurate
    assert 1 - weights @ np.linalg.solve(alpha + gamma, one) == pytest.approx(0, abs=1e-14)  # R(∞)
    assert abs(1 - np.array(ROS34PW2.embedded) @ np.linalg.solve(alpha + gamma, one)) < 1
    y = np.logspace(-3, 6, 500)
    damped = [
        abs(1 + 1j * t * weights @ np.linalg.solve(np.eye(4) - 1j * t * (alpha + gamma), one))
        for t in y
    ]
    assert max(damped) <= 1 + 1e-12  # A-stable


@pytest.mark.parametrize(
    "norm",
    [*NORMS.values(), lambda size: fs.Euclidean(fs.L2(), {"W1": 2.0})],
    ids=[*NORMS, "blocks"],
)
def test_systems_solved_among_examples_are_those_among_weights(norm):
    problem, w = net()
    norm = norm(problem.size).bind(problem.layout)
    w = torch.cat([w, -2 * w])
    root, size = problem.curvature(w), torch.tensor([0.3, 40.0]).double()
    v = torch.randn(
        2, problem.size, dtype=torch.float64, generator=torch.Generator().manual_seed(3)
    )
    inverse = norm.dual(eye := torch.eye(problem.size).double())[:, None] * norm.steepest(eye)
    dense = torch.eye(problem.size) + size[:, None, None] * inverse @ root.mT @ root
    exact = torch.linalg.solve(dense, v)
    solve = damping(norm, root, size)
    assert torch.allclose(solve(v), exact, rtol=1e-11, atol=1e-12)
    stiff = v
    for _ in range(3):
        stiff = stiff - torch.linalg.solve(dense, stiff)
    assert torch.allclose(without_stiff_part(solve, v), v - stiff, rtol=1e-10, atol=1e-11)


def fixed(problem, norm, w, n, span, matrix=None):
    """n equal steps, with W from the curvature or a given matrix."""
    field, dt = (
        Field(norm.bind(problem.layout), GRADIENT),
        torch.tensor([span / n], dtype=torch.float64),
    )
    for _ in range(n):
        first = evaluate(field, problem, w)
        solve = damping(field.norm, problem.curvature(w), ROS34PW2.gamma * dt)
        if matrix is not None:
            inverse = torch.linalg.inv(torch.eye(problem.size) - ROS34PW2.gamma * dt * matrix)
            solve = lambda v, inverse=inverse: v @ inverse.T
        w = attempt(ROS34PW2, lambda w: evaluate(field, problem, w).velocity, solve, w, first, dt)[
            0
        ]
    return w[0].numpy()


def exact(problem, norm, w0, span):
    field = Field(norm.bind(problem.layout), GRADIENT)

    def velocity(_, w):
        return evaluate(field, problem, torch.from_numpy(w[None].copy())).velocity[0].numpy()

    return solve_ivp(velocity, (0, span), w0[0].numpy(), method="DOP853", rtol=1e-13, atol=1e-14).y[
        :, -1
    ]


def order(counts, errors):
    return -np.polyfit(np.log(counts), np.log(errors), 1)[0]


@BY_NORM
@pytest.mark.parametrize("setting", [linear, net], ids=["linear", "net"])
def test_fixed_steps_converge_at_order_three(setting, norm):
    (problem, w0), counts = setting(), (32, 64, 128)
    norm = norm(problem.size)
    reference = exact(problem, norm, w0, 1.0)
    errors = [distance(fixed(problem, norm, w0, n, 1.0), reference) for n in counts]
    assert abs(order(counts, errors) - 3) < 0.3, errors


def test_order_three_also_with_a_matrix_that_has_nothing_to_do_with_the_field():
    (problem, w0), counts = linear(), (32, 64, 128)
    matrix = torch.randn(4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(7))
    reference = exact(problem, fs.L2(), w0, 1.0)
    errors = [distance(fixed(problem, fs.L2(), w0, n, 1.0, matrix), reference) for n in counts]
    assert abs(order(counts, errors) - 3) < 0.3, errors


def length(problem, w0, span):
    """Arclength, by Gauss quadrature of ‖h‖ along the exact path."""
    nodes, weights = np.polynomial.legendre.leggauss(6)
    points = [exact(problem, fs.L2(), w0, span * (1 + u) / 2) for u in nodes]
    return (
        span / 2 * weights @ problem.ascent(torch.tensor(np.array(points)))[1].norm(dim=1).numpy()
    )


def test_dense_output_and_lengths_are_of_fourth_order():
    """The cubic through both ends of an exact step: its middle, and the integrals along it."""
    problem, w0 = net()
    field, sizes = Field(fs.L2(), GRADIENT), (0.8, 0.4, 0.2)
    middles, lengths, heats = [], [], []
    for dt in sizes:
        end = torch.from_numpy(exact(problem, fs.L2(), w0, dt)[None])
        solve = damping(
            fs.L2(), problem.curvature(w0), torch.tensor([ROS34PW2.gamma * dt]).double()
        )
        first, last = (evaluate(field, problem, w) for w in (w0, end))
        path = rule().start(problem, w0).segment
        path = replace(
            path,
            w1=end,
            slope0=without_stiff_part(solve, dt * first.velocity),
            slope1=without_stiff_part(solve, dt * last.velocity),
        )
        at = torch.tensor([0.5]).double()
        middles.append(distance(path.at(at)[0][0].numpy(), exact(problem, fs.L2(), w0, dt / 2)))
        gained = gains_along(fs.L2(), path, torch.tensor([dt]).double())
        lengths.append(abs(gained["arclength"].item() - length(problem, w0, dt)))
        heats.append(abs(gained["dissipated"].item() - (last.lam - first.lam).item()))
    assert order(1 / np.array(sizes), middles) > 3.6, middles
    assert order(1 / np.array(sizes), lengths) > 3.6, lengths
    assert order(1 / np.array(sizes), heats) > 3.6, heats


# Stiffness: linear models to Λ = 10⁶


@cache
def separable(d):
    x, y = fs.data.gaussian_separable(200, d, margin=0.1, seed=0)
    return fs.Problem(fs.Linear(d), x, y, fs.exponential), (x * y[:, None]).numpy()


def largest_margin(z):
    """max of min_i (Zw)_i over the unit ball: the support by non-negative least squares, then a
    linear system."""
    n, d = z.shape
    support = nnls(np.vstack([1e3 * np.ones(n), z.T]), np.append(1e3, np.zeros(d)))[0] > 1e-9
    p = np.linalg.solve(z[support] @ z[support].T, np.ones(support.sum()))
    w = z[support].T @ p
    assert (p > 0).all()
    assert (z @ w).min() > 1 - 1e-9
    return 1 / np.linalg.norm(w)


@cache
def by_radau(d, lams):
    """SciPy's path from 0 in the span of the data, with z = t·e^{−Λ}: weights and log t at these
    Λ."""
    z = separable(d)[1]
    basis = np.linalg.qr(z.T)[0] if d > len(z) else np.eye(d)
    z = z @ basis

    def level(w):
        q = -z @ w
        p = np.exp(q - q.max())
        return -q.max() - np.log(p.sum()), z.T @ (p / p.sum()), p / p.sum()

    def field(_, y):
        h = level(y[:-1])[1]
        return np.append(h, 1.0) / (h @ h) - np.append(0 * h, y[-1])

    def jacobian(_, y):
        _, h, p = level(y[:-1])
        turn, size = np.outer(h, h) - (z.T * p) @ z, h @ h
        J = -np.eye(len(y))
        J[:-1, :-1] = turn / size - 2 * np.outer(h, turn @ h) / size**2
        J[-1, :-1] = -2 * turn @ h / size**2
        J[:-1, -1] = 0
        return J

    start = level(np.zeros(z.shape[1]))[0]
    y = solve_ivp(
        field,
        (start, lams[-1]),
        np.zeros(z.shape[1] + 1),
        "Radau",
        lams,
        jac=jacobian,
        rtol=1e-11,
        atol=1e-12,
    ).y
    return (basis @ y[:-1]).T, np.log(y[-1]) + np.array(lams)


@pytest.mark.parametrize(("rtol", "most"), [(1e-2, 40), (1e-4, 100)])
@pytest.mark.parametrize("d", [50, 1000])
def test_linear_models_to_lam_a_million(d, rtol, most):
    """Measured at rtol 1e-2 and 1e-4: d = 50 in 32 and 87 steps, d = 1000 in fewer."""
    problem, z = separable(d)
    lams = (23.0, 230.0, 1e4)
    run = fs.simulate(
        problem, rule(rtol), torch.zeros(1, d).double(), until=fs.lam([*lams, 1e6]), strict=True
    )
    weights, log_time = by_radau(d, lams)
    for w, exact_w in zip(run.weights[1:, 0], weights, strict=False):
        assert distance(w, exact_w) <= rtol
    assert run["log_time"][1:-1, 0] == pytest.approx(log_time, abs=1e-3)
    assert run["tally_accepted"][-1, 0] + run["tally_rejected"][-1, 0] <= most
    best = largest_margin(z)
    for w in (torch.from_numpy(run.weights[-1]), run.final.w):
        assert float(problem.ascent(w)[1].norm()) / best - 1 == pytest.approx(0, abs=1e-8)
    rise = run.final.readings["lam"] - run["lam"][0]
    assert float(run.final.readings["dissipated"] / rise) == pytest.approx(1, abs=1e-4)


# Nets


def deep(method=ROS34PW2, rtol=1e-4, lams=(3.0, 10.0)):
    net = fs.Diagonal(4, 3)
    problem = fs.Problem(net, X, Y, fs.exponential)
    w0 = net.init([0, 1], scale=0.7).abs()
    how = fs.SteepestFlow(fs.L2(), rtol=rtol, method=method)
    return fs.simulate(problem, how, w0, until=fs.lam(list(lams)), strict=True)


def test_a_deep_net_agrees_with_an_explicit_method():
    explicit, implicit = deep(fs.DOPRI5, rtol=1e-8), deep(rtol=1e-5)
    assert distance(implicit.weights[1:], explicit.weights[1:]) < 1e-4
    for name in ("log_time", "arclength"):
        assert implicit[name][1:] == pytest.approx(explicit[name][1:], abs=5e-3), (
            name
        )  # linear inside a step
    assert (implicit["tally_rejected"][-1] < implicit["tally_accepted"][-1]).all()


@pytest.mark.parametrize("setting", [linear, net], ids=["linear", "net"])
def test_the_soft_margin_never_falls_and_energy_balances_to_lam_10000(setting):
    problem, w0 = setting(fs.exponential)
    flow, degree = rule(1e-4), problem.degree
    state = flow.start(problem, w0)
    target = fs.clocks.Target(fs.clocks.LAM, torch.tensor([1e4]).double())
    margins, defects = [], []
    for _ in range(2000):
        before, state = state, flow.advance(problem, state, target, 1)
        lam, rise = (
            float(v)
            for v in (state.readings["lam"], state.readings["lam"] - before.readings["lam"])
        )
        if lam > 0 and rise != 0:
            margins.append(lam / float(state.w.norm()) ** degree)
            defects.append(
                float(state.readings["dissipated"] - before.readings["dissipated"]) / rise - 1
            )
        if lam >= 1e4:
            break
    assert state.readings["lam"] >= 1e4
    assert (np.diff(margins) >= -1e-12 * np.array(margins[1:])).all()
    assert np.abs(defects).max() < 1e-3
    # t𝓛Λ^{2−2/L}L²γ^{2/L} → 1
    lam, log_time = float(state.readings["lam"]), float(state.readings["log_time"])
    limit = (
        (2 - 2 / degree) * math.log(lam) + 2 * math.log(degree) + 2 / degree * math.log(margins[-1])
    )
    assert log_time - lam + limit == pytest.approx(0, abs=1e-2)


# What every method keeps


def test_a_resumed_run_is_the_same_run():
    problem, w0 = net()
    until = [2.0, 5.0, 20.0]
    whole = fs.simulate(problem, rule(), w0, until=fs.lam(until), strict=True)
    half = fs.simulate(problem, rule(), w0, until=fs.lam(until[:2]), strict=True)
    rest = fs.simulate(problem, rule(), half.final, until=fs.lam(until), strict=True)
    assert torch.equal(rest.final.w, whole.final.w)
    for name, value in whole.final.readings.items():
        assert torch.equal(rest.final.readings[name], value), name


def test_a_step_size_of_another_method_is_not_taken_over():
    problem, w0 = linear()
    explicit = fs.simulate(
        problem,
        fs.SteepestFlow(fs.L2(), method=fs.DOPRI5),
        w0,
        until=fs.lam(20.0, saves=2),
        strict=True,
    )
    state = rule().start(problem, explicit.final)
    assert float(state.step_size * state.memory["velocity"].norm()) == pytest.approx(
        1e-3 * float(state.w.norm())
    )
    assert fs.simulate(problem, rule(), explicit.final, until=fs.lam(100.0, saves=2)).statuses == [
        Status.DONE
    ]


@pytest.mark.parametrize("norm", [NORMS["l2"](15), NORMS["diagonal"](15)], ids=["l2", "diagonal"])
def test_a_trajectory_depends_on_its_batch_by_rounding_only(norm, agree):
    problem, _ = net(fs.exponential)
    w0 = problem.net.init(range(4))
    together = fs.simulate(problem, rule(norm=norm), w0, until=fs.steps(40, saves=5))
    for rows in ([0], [2], [1, 3]):
        alone = fs.simulate(problem, rule(norm=norm), w0[rows], until=fs.steps(40, saves=5))
        agree(alone.final.w, together.final.w[rows])
        agree(alone.weights, together.weights[:, rows])


@pytest.mark.parametrize(
    "loss", [fs.cross_entropy, fs.pairwise_exponential], ids=lambda loss: loss.name
)
def test_several_classes(loss):
    x = X[:, :4] + 4 * torch.eye(4).double().repeat(3, 1)
    problem = fs.Problem(fs.Linear(4, 4), x, torch.arange(4).repeat(3), loss)
    run = fs.simulate(
        problem, rule(), torch.zeros(1, 16).double(), until=fs.lam(1e4, saves=5), strict=True
    )
    assert run["steps"][-1, 0] < 100
    margin, dual = (
        problem.margins(run.final.w).amin() / run.final.w.norm(),
        problem.ascent(run.final.w)[1].norm(),
    )
    assert -1e-9 <= float(dual / margin) - 1 <= 2 * math.log(36) / 1e4


def test_a_norm_that_is_not_quadratic_is_refused():
    problem, w0 = linear()
    with pytest.raises(ValueError, match="got the l3 norm, expected a quadratic one .*, try"):
        rule(norm=fs.Lp(3.0)).start(problem, w0)
    fs.simulate(problem, rule(norm=fs.Lp(2.0)), w0, until=fs.lam([5.0]), strict=True)


def test_statuses():
    problem = fs.Quadratic(
        torch.diag(torch.tensor([1.0, 50.0])).double(), torch.tensor([1.0, -1.0]).double()
    )
    at_rest = fs.simulate(
        problem, rule(), torch.tensor([[1.0, -1.0]]).double(), until=fs.time(1.0, saves=2)
    )
    assert at_rest.statuses == [Status.STATIONARY]
    moving = fs.simulate(
        problem, rule(), torch.zeros(1, 2).double(), until=fs.time([100.0]), max_steps=2000
    )
    assert moving.statuses[0] in (Status.DONE, Status.STATIONARY)
    assert moving.final.w.numpy() == pytest.approx(np.array([[1.0, -1.0]]), abs=1e-9)
    assert torch.isfinite(moving.final.readings["log_time"]).all()

    cliff = fs.FunctionNet(
        lambda p, x: x @ p["W1"][0] / (p["W1"][0, 0] < 1.5),
        fs.Linear(1).layout,
        degree=1.0,
        kinks=False,
        checked=True,
    )
    stuck = fs.simulate(
        fs.Problem(cliff, [[1.0]], [1], fs.exponential),
        rule(),
        torch.ones(1, 1).double(),
        until=fs.lam([5.0]),
    )
    assert stuck.statuses == [Status.NONFINITE]
    assert 1.4 < float(stuck.final.w) < 1.5

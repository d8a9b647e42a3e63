"""Steepest flows whose paths are known in closed form, by an explicit and by a linearly implicit method."""

import math

import numpy as np
import pytest
import torch
from scipy.integrate import quad, solve_ivp
from scipy.linalg import expm
from scipy.optimize import minimize
from scipy.special import expi

import flowsim as fs
from flowsim.clocks import ARCLENGTH, TIME
from flowsim.rosenbrock import ROS34PW2

RTOL = 1e-6
LOG_TIME = 3e-4  # absolute accuracy of log t inside a step
METHODS = pytest.mark.parametrize("method", [fs.DOPRI5, ROS34PW2], ids=lambda m: m.name)
METRIC = torch.tensor([[2.0, 0.5, 0.0], [0.5, 1.0, 0.3], [0.0, 0.3, 3.0]], dtype=torch.float64)
QUADRATIC = pytest.mark.parametrize("norm", [fs.L2(), fs.Mahalanobis(METRIC)], ids=lambda n: n.name)


def run(problem, w0, until, *, norm=None, method=fs.DOPRI5):
    """Saves at given times are read off a clock that is regular in time; the implicit method has its own clock."""
    clock = TIME if until.clock is TIME else ARCLENGTH
    rule = fs.SteepestFlow(norm or fs.L2(), rtol=RTOL, method=method, clock=clock)
    return fs.simulate(problem, rule, torch.as_tensor(w0).double().reshape(1, -1), until=until, strict=True)


def close(value, exact, tolerance=10 * RTOL):
    """Equal relative to the size of each exact point."""
    exact = np.asarray(exact)
    error = np.linalg.norm(np.atleast_2d(value - exact), axis=-1)
    assert (error <= tolerance * np.linalg.norm(np.atleast_2d(exact), axis=-1)).all(), error


def log_time_of(lam, start, degree, rate):
    """log t at Λ = q where rate·q^{2 − 2/L}·e^{−q} is the speed of q, by quadrature of e^q q^{2/L − 2}/rate."""
    first = max(start, lam - 60)
    return lam + math.log(quad(lambda q: math.exp(q - lam) * q ** (2 / degree - 2), first, lam, limit=200)[0] / rate)


def metric(norm):
    return norm.matrix.numpy() if isinstance(norm, fs.Mahalanobis) else np.eye(3)


@METHODS
@QUADRATIC
def test_one_example(norm, method):
    """q(t) = log(e^{q0} + ‖x‖_*² t), w = w0 + s·u, s = (q − q0)/‖x‖_*, u steepest for x."""
    x, w0 = torch.tensor([1.0, -0.4, 2.0], dtype=torch.float64), torch.tensor([0.3, -0.2, 0.1], dtype=torch.float64)
    dual, u, q0 = norm.dual(x).item(), norm.steepest(x).numpy(), (x @ w0).item()
    path = run(
        fs.Problem(fs.Linear(3), x[None], [1], fs.exponential), w0, fs.lam(1e4, saves=15), norm=norm, method=method
    )
    q = path["lam"][1:, 0]
    close(path.weights[1:, 0], w0.numpy() + (q - q0)[:, None] / dual * u)
    assert path["arclength"][1:, 0] == pytest.approx((q - q0) / dual, rel=1e-6)
    assert path["log_time"][1:, 0] == pytest.approx(q + np.log(-np.expm1(q0 - q)) - 2 * math.log(dual), abs=LOG_TIME)


@METHODS
def test_a_round_quadratic(method):
    """F = ½|w − w*|²: the distance falls by the arclength, and as e^{−t}."""
    w0, target = np.array([1.0, 2.0, -2.0]), np.array([0.5, 0.0, 1.0])
    problem = fs.Quadratic(torch.eye(3).double(), torch.from_numpy(target))
    path = run(problem, w0 + target, fs.time(3.0, saves=9), method=method)
    t, s = np.exp(path["log_time"][1:]), path["arclength"][1:]
    close(path.weights[1:, 0], target + np.exp(-t) * w0)
    assert np.linalg.norm(path.final.w.numpy() - target) == pytest.approx(
        3 - path.final.readings["arclength"].item(), rel=1e-5
    )
    assert s[-1, 0] == pytest.approx(3 * (1 - math.exp(-3)), abs=3e-3)  # linear inside a step


@METHODS
def test_an_oblong_quadratic(method):
    """w = w* − e^{−Ht}w*."""
    H, target = np.array([[2.0, 1.0], [1.0, 2.0]]), np.array([4 / 3, 1 / 3])
    problem = fs.Quadratic(torch.from_numpy(H), torch.from_numpy(target))
    path = run(problem, [0.0, 0.0], fs.time(5.0, saves=12), method=method)
    exact = [target - expm(-H * t) @ target for t in np.exp(path["log_time"][1:, 0])]
    close(path.weights[1:, 0], exact)


@METHODS
@QUADRATIC
def test_linear_regression(norm, method):
    """A w' = −Xᵀ(Xw − y), so w = w* + e^{−A⁻¹XᵀXt}(w0 − w*)."""
    rng = np.random.default_rng(0)
    x, y, w0 = rng.normal(size=(7, 3)), rng.normal(size=7), np.array([0.5, -1.0, 0.2])
    path = run(fs.Problem(fs.Linear(3), x, y, fs.squared), w0, fs.time(2.0, saves=12), norm=norm, method=method)
    best = np.linalg.lstsq(x, y, rcond=None)[0]
    rate = np.linalg.solve(metric(norm), x.T @ x)
    exact = [best + expm(-rate * t) @ (w0 - best) for t in np.exp(path["log_time"][1:, 0])]
    close(path.weights[1:, 0], exact)


@METHODS
def test_a_linear_max_margin_problem(method):
    """γ* = √(53/17); γ* − log(m)/s ≤ γ̃ ≤ γ ≤ γ* ≤ ‖∇Λ‖₂ at every point; t𝓛γ² → 1."""
    z = torch.tensor([[3.0, 1, 0], [1, -2, 2], [1, 2, 1]], dtype=torch.float64)
    best, problem = math.sqrt(53 / 17), fs.Problem(fs.Linear(3), z, [1, 1, 1], fs.exponential)
    path = run(problem, [0.0, 0.0, 0.0], fs.lam(300.0, saves=60), method=method)
    w, lam = torch.from_numpy(path.weights[1:, 0]), path["lam"][1:, 0]
    size, margin = w.norm(dim=1).numpy(), (w @ z.T).amin(1).numpy() / w.norm(dim=1).numpy()
    dual = problem.ascent(w)[1].norm(dim=1).numpy()
    s = path["arclength"][1:, 0]
    rounding = 1e-9
    late = lam > 5  # inside the first steps arclength is linear in the clock
    assert (lam / size >= best - math.log(3) / np.maximum(s, size) - rounding)[late].all()
    assert (margin >= lam / size - rounding).all()
    assert (margin <= best + rounding).all()
    assert (dual >= best - rounding).all()
    assert dual[-1] == pytest.approx(best, rel=1e-6)
    # by convexity |u − u*|² ≤ 2(γ* − γ)/γ*
    nearness = math.sqrt(2 * math.log(3) / (best * s[-1]))
    close((w[-1] / w[-1].norm()).numpy(), np.array([17, 6, 24]) / math.sqrt(17**2 + 6**2 + 24**2), nearness)
    assert path["log_time"][-1, 0] - lam[-1] + 2 * math.log(best) == pytest.approx(0, abs=LOG_TIME)


@METHODS
@pytest.mark.parametrize("degree", [1, 2, 3])
def test_a_power_of_one_weight(degree, method):
    """f = w^L: q' = L² q^{2−2/L} e^{−q}; for L = 2, Ei(q) = Ei(q0) + 4t."""
    net = fs.FunctionNet(lambda p, x: x @ p["W1"][0] ** degree, fs.Linear(1).layout, kinks=False)
    path = run(fs.Problem(net, [[1.0]], [1], fs.exponential), [0.7], fs.lam([1.0, 5.0, 20.0]), method=method)
    lam, log_time = path["lam"][1:, 0], path["log_time"][1:, 0]
    close(path.weights[1:, 0], lam[:, None] ** (1 / degree))
    assert log_time == pytest.approx([log_time_of(q, 0.7**degree, degree, degree**2) for q in lam], abs=LOG_TIME)
    if degree == 2:
        assert log_time == pytest.approx(np.log((expi(lam) - expi(0.49)) / 4), abs=LOG_TIME)


@METHODS
@pytest.mark.parametrize("depth", [2, 3])
def test_a_product_of_equal_weights(depth, method):
    """f = u⋯u: q' = L q^{2−2/L} e^{−q}; for two weights Ei(q) = Ei(q0) + 2t."""
    problem = fs.Problem(fs.Diagonal(1, depth), [[1.0]], [1], fs.exponential)
    path = run(problem, [0.7] * depth, fs.lam([1.0, 5.0, 20.0, 200.0]), method=method)
    lam, log_time = path["lam"][1:, 0], path["log_time"][1:, 0]
    close(path.weights[1:, 0], lam[:, None] ** (1 / depth) * np.ones(depth))
    assert log_time == pytest.approx([log_time_of(q, 0.7**depth, depth, depth) for q in lam], abs=LOG_TIME)


def diagonal(depth, *, positive=False):
    """A diagonal net with its weights (1, depth, 4) and a problem; ``positive``: no gradient ever changes sign."""
    rng = np.random.default_rng(1)
    x, w0 = rng.normal(size=(10, 4)), rng.uniform(0.3, 1.0, size=(depth, 4))
    y = np.sign(x @ [1.0, -2.0, 0.5, 1.5])
    x, y = (np.abs(x), np.ones(10)) if positive else (x, y)
    return fs.Problem(fs.Diagonal(4, depth), x, y, fs.exponential), w0


def conserved(weights, depth, q):
    powers = np.abs(weights.reshape(len(weights), depth, -1)) ** q
    return powers[:, 1:] - powers[:, :-1], powers.max((1, 2))


@METHODS
@pytest.mark.parametrize("depth", [2, 3])
def test_diagonal_nets_conserve_differences_of_squares(depth, method):
    problem, w0 = diagonal(depth)
    path = run(problem, w0, fs.lam(30.0, saves=15), method=method)
    difference, size = conserved(path.weights[:, 0], depth, 2)
    assert (np.abs(difference - difference[0]).max((1, 2)) <= 10 * RTOL * size).all()


@pytest.mark.parametrize("depth", [2, 3])
@pytest.mark.parametrize("p", [1.5, 3.0])
def test_diagonal_nets_conserve_differences_of_dual_powers(p, depth):
    problem, w0 = diagonal(depth, positive=True)
    path = run(problem, w0, fs.lam(20.0, saves=15), norm=fs.Lp(p))
    difference, size = conserved(path.weights[:, 0], depth, p / (p - 1))
    assert (np.abs(difference - difference[0]).max((1, 2)) <= 10 * RTOL * size).all()


@METHODS
def test_differences_of_squares_as_a_mirror_flow(method):
    """β = u² − v² from u = v = α with squared loss is β = 2α² sinh(4Xᵀν), ν' = y − Xβ; it ends at the interpolator
    that minimises Q = α² Σ q(β/α²), q(z) = 2 − √(4 + z²) + z·asinh(z/2), for which ∇Q = asinh(β/2α²)."""
    rng, alpha = np.random.default_rng(2), 0.3
    x, y = rng.normal(size=(3, 6)), rng.normal(size=3)
    problem = fs.Problem(fs.Diagonal(6, 2, signed=True), x, y, fs.squared)

    def beta(nu):
        return 2 * alpha**2 * np.sinh(4 * x.T @ nu)

    times = np.array([0.01, 0.1, 0.3, 1.0, 3.0])
    path = run(problem, [alpha] * 12, fs.time(times.tolist()), method=method)
    exact = solve_ivp(lambda _, nu: y - x @ beta(nu), (0, 3), np.zeros(3), "DOP853", times, rtol=1e-12, atol=1e-14).y
    u, v = path.weights[1:, 0, :6], path.weights[1:, 0, 6:]
    growth = np.exp(2 * x.T @ exact).T
    close(path.weights[1:, 0], alpha * np.c_[growth, 1 / growth])
    close(u * v, np.full_like(u, alpha**2))
    close(u**2 - v**2, beta(exact).T, 20 * RTOL)

    end = run(problem, [alpha] * 12, fs.lam(25.0, saves=2), method=method).weights[-1, 0]
    # the dual: max ν·y − Σ 2α² cosh(Xᵀν)
    dual = minimize(
        lambda nu: 2 * alpha**2 * np.cosh(x.T @ nu).sum() - nu @ y,
        np.zeros(3),
        jac=lambda nu: 2 * alpha**2 * x @ np.sinh(x.T @ nu) - y,
        method="BFGS",
        options={"gtol": 1e-12},
    )
    close(end[:6] ** 2 - end[6:] ** 2, 2 * alpha**2 * np.sinh(x.T @ dual.x), 20 * RTOL)

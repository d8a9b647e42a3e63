"""Flows that are known at given times, and what flows of diagonal nets conserve."""

import numpy as np
import pytest
import torch
from scipy.optimize import minimize_scalar

import flowsim as fs
from flowsim import closed_forms as exact
from flowsim.flow.rosenbrock import ROS34PW2
from tests.oracles.followed_flows import METHODS, QUADRATIC, RTOL, TARGET, H, close, nearly, run


@METHODS
def test_an_oblong_quadratic_in_l2(method):
    problem, times = (
        fs.Quadratic(torch.from_numpy(H), torch.from_numpy(TARGET)),
        fs.time(5.0, saves=12),
    )
    path = run(problem, [0.0, 0.0], times, method=method)
    close(
        path.weights[1:, 0],
        exact.smooth_quadratic(H, TARGET, [0, 0], np.exp(path["log_time"][1:, 0])),
    )


@METHODS
@QUADRATIC
def test_linear_regression(norm, method):
    rng = np.random.default_rng(0)
    x, y, w0 = rng.normal(size=(7, 3)), rng.normal(size=7), np.array([0.5, -1.0, 0.2])
    path = run(
        fs.Problem(fs.Linear(3), x, y, fs.squared),
        w0,
        fs.time(2.0, saves=12),
        norm=norm,
        method=method,
    )
    metric = norm.matrix if isinstance(norm, fs.Mahalanobis) else None
    best, times = np.linalg.lstsq(x, y)[0], np.exp(path["log_time"][1:, 0])
    close(path.weights[1:, 0], exact.smooth_quadratic(x.T @ x, best, w0, times, metric))


def diagonal(depth, *, positive=False):
    """A diagonal net and its weights (depth, 4); ``positive``: no gradient ever changes sign."""
    rng = np.random.default_rng(1)
    x, w0 = rng.normal(size=(10, 4)), rng.uniform(0.3, 1.0, size=(depth, 4))
    y = np.sign(x @ [1.0, -2.0, 0.5, 1.5])
    x, y = (np.abs(x), np.ones(10)) if positive else (x, y)
    return fs.Problem(fs.Diagonal(4, depth), x, y, fs.exponential), w0


@pytest.mark.parametrize("depth", [2, 3])
@pytest.mark.parametrize(
    ("norm", "q", "method"),
    [
        (fs.L2(), 2, fs.DOPRI5),
        (fs.L2(), 2, ROS34PW2),
        (fs.Lp(1.5), 3, fs.DOPRI5),
        (fs.Lp(3.0), 1.5, fs.DOPRI5),
    ],
    ids=lambda v: getattr(v, "name", None),
)
def test_diagonal_nets_conserve_differences_of_dual_powers(norm, q, method, depth):
    problem, w0 = diagonal(depth, positive=norm.name != "l2")
    path = run(problem, w0, fs.lam(10.0, saves=8), method=method, norm=norm)
    constants = exact.conserved(path.weights[:, 0], depth, q)
    assert constants.shape == (len(path.weights), depth - 1, 4)
    size = np.abs(path.weights[:, 0]).max(-1) ** q
    assert (np.abs(constants - constants[0]).max((1, 2)) <= 10 * RTOL * size).all()


def test_sign_steps_on_diagonal_nets_conserve_differences_of_absolute_values():
    """ℓ∞: every weight moves at the same speed, so no step breaks it."""
    problem, w0 = diagonal(3, positive=True)
    w0 = torch.from_numpy(w0).reshape(1, -1)
    path = fs.simulate(
        problem, fs.SmallStep(fs.Linf(), dlam=0.1), w0, until=fs.lam(20.0, saves=15), strict=True
    )
    constants = exact.conserved(path.weights[:, 0], 3, 1)
    np.testing.assert_allclose(
        constants, np.broadcast_to(constants[0], constants.shape), atol=1e-12
    )


def squares(alpha):
    rng = np.random.default_rng(2)
    x, y = rng.normal(size=(3, 6)), rng.normal(size=3)
    return x, y, fs.Problem(fs.Diagonal(6, 2, signed=True), x, y, fs.squared), [alpha] * 12


@METHODS
def test_differences_of_squares(method):
    alpha = 0.3
    x, y, problem, w0 = squares(alpha)
    times = [0.01, 0.1, 0.3, 1.0, 3.0]
    path = run(problem, w0, fs.time(times), method=method)
    true = exact.difference_of_squares(x, y, alpha, times)
    u, v = path.weights[1:, 0, :6], path.weights[1:, 0, 6:]
    close(path.weights[1:, 0], true)
    close(u * v, np.full_like(u, alpha**2))
    np.testing.assert_array_equal(exact.difference_of_squares(x, y, alpha, times[::-1]), true[::-1])


def test_differences_of_squares_end_at_the_least_entropy():
    x, y, problem, w0 = squares(0.3)
    end = run(problem, w0, fs.lam(25.0, saves=2), method=fs.DOPRI5).weights[-1, 0]
    close(end[:6] ** 2 - end[6:] ** 2, exact.difference_of_squares_limit(x, y, 0.3), 20 * RTOL)


def test_one_example_and_two_weights_end_at_the_least_entropy_of_all_interpolators():
    """d = 2, N = 1: Q is minimised over a line, by a search that knows nothing of duals."""
    x, y, alpha = np.array([[1.0, 2.0]]), np.array([1.5]), 0.2

    def beta(b):
        return np.array([b, (1.5 - b) / 2])

    def entropy(b):
        z = beta(b) / alpha**2
        return (2 - np.sqrt(4 + z**2) + z * np.arcsinh(z / 2)).sum()

    best = minimize_scalar(entropy, bounds=(-2, 2), method="bounded", options={"xatol": 1e-12}).x
    found = exact.difference_of_squares_limit(x, y, alpha)
    assert x @ found == nearly(y, rel=1e-9)
    np.testing.assert_allclose(found, beta(best), atol=1e-6)
    u, v = np.split(exact.difference_of_squares(x, y, alpha, 60.0), 2)
    np.testing.assert_allclose(u**2 - v**2, found, atol=1e-9)

"""Flows of quadratics along polylines, in norms with ties and without."""

import math

import numpy as np
import pytest
import torch

import flowsim as fs
from flowsim import closed_forms as exact
from tests.oracles.followed_flows import (
    LOG_TIME,
    METHODS,
    RTOL,
    SHAPE,
    TARGET,
    H,
    close,
    nearly,
    randn,
    run,
    spd,
)

ROUND = {
    "l1": (fs.L1(), RTOL),
    "linf": (fs.Linf(), RTOL),
    "spectral": (fs.Spectral(), 1e-4),
    "nuclear": (fs.Nuclear(), 1e-4),
}


def round_path(norm, minimiser, w0):
    problem = fs.Quadratic(torch.eye(12).double(), minimiser, shape=SHAPE)
    return problem, exact.round_quadratic(minimiser, w0, norm.bind(problem.layout))


@pytest.mark.parametrize("name", ROUND)
def test_round_quadratics_through_every_tie(name):
    """Saves on both sides of each corner, and the end at the minimiser after the exact length."""
    norm, rtol = ROUND[name]
    minimiser, w0 = randn(12, seed=1), 0.1 * randn(12, seed=2)
    problem, path = round_path(norm, minimiser, w0)
    points = (path.lengths[:-1] + np.diff(path.lengths) * [[0.3], [0.8]]).ravel()
    points = np.sort(points[points < 0.99 * path.lengths[-1]])
    until, rule = fs.arclength([*points, 2 * path.lengths[-1]]), fs.SteepestFlow(norm, rtol=rtol)
    found = fs.simulate(problem, rule, w0[None], until=until)
    scale = np.linalg.norm(minimiser - w0)
    error = np.linalg.norm(found.weights[1 : len(points) + 1, 0] - path.weights(points), axis=-1)
    assert error.max() <= 10 * rtol * scale
    if rtol == RTOL:  # no tolerance covers log t of movements
        assert found["log_time"][1 : len(points) + 1, 0] == nearly(
            path.log_time(points), abs=LOG_TIME
        )
    assert found.statuses == [fs.Status.STATIONARY]
    assert float(found.final.readings["arclength"]) == nearly(path.lengths[-1], abs=1e-4 * scale)


@METHODS
@pytest.mark.parametrize("norm", [fs.L2(), fs.Frobenius()], ids=lambda n: n.name)
def test_round_quadratics_that_have_no_ties(norm, method):
    minimiser, w0 = randn(12, seed=1), 0.1 * randn(12, seed=2)
    problem, path = round_path(norm, minimiser, w0)
    found = run(problem, w0, fs.time(3.0, saves=9), norm=norm, method=method)
    close(found.weights[1:, 0], path.weights(path.length(found["log_time"][1:, 0])))


@pytest.mark.parametrize(
    "norm", [fs.L1(), fs.L2(), fs.Linf(), fs.Spectral(), fs.Nuclear()], ids=lambda n: n.name
)
def test_a_round_quadratic_is_nearest_to_its_minimiser_in_each_ball(norm):
    """No point of the ball of radius s around w0 is nearer, checked by the projection of the
    norm."""
    minimiser, w0 = randn(12, seed=3), randn(12, seed=4)
    problem, path = round_path(norm, minimiser, w0)
    norm = norm.bind(problem.layout)
    for s in np.linspace(0.05, 1.0, 9) * path.lengths[-1]:
        nearest = w0 + s * norm.project((minimiser - w0) / s)
        np.testing.assert_allclose(path.weights(s), nearest, atol=1e-9)
        residual = minimiser - torch.from_numpy(path.weights(s))
        assert float(path.dual(s)) == nearly(float(norm.dual(residual)), abs=1e-9)
    assert path.length(path.log_time(0.4 * path.lengths[-1])) == nearly(
        0.4 * path.lengths[-1], rel=1e-9
    )


@pytest.mark.parametrize(
    ("norm", "corner", "lengths", "time"),
    [
        (fs.L1(), (1, 0), (1, 5 / 3), math.log(3) / 2),
        (fs.Linf(), (2 / 3, 2 / 3), (2 / 3, 4 / 3), math.log(5) / 6),
    ],
)
def test_the_worked_example_of_two_weights(norm, corner, lengths, time):
    path = exact.polyhedral_quadratic(H, TARGET, [0, 0], norm)
    np.testing.assert_allclose(path.corners, [(0, 0), corner, TARGET], atol=1e-14)
    np.testing.assert_allclose(path.lengths, [0, *lengths], atol=1e-14)
    assert np.exp(path.log_time(lengths[0])) == nearly(time, rel=1e-13)


@pytest.mark.parametrize(
    ("d", "method", "rtol", "errors"),
    [
        (2, None, RTOL, 10),
        (4, None, RTOL, 10),
        (9, None, RTOL, 10),
        (4, fs.MinimisingMovement(), 1e-4, 20),
    ],
    ids=["2", "4", "9", "4, moving"],
)
@pytest.mark.parametrize("norm", [fs.L1(), fs.Linf()], ids=lambda n: n.name)
def test_oblong_quadratics_in_polyhedral_norms(d, method, rtol, errors, norm):
    """Movements cut each corner by up to a few rtol, which adds up."""
    matrix, minimiser, w0 = spd(d, d), randn(d, seed=20 + d).numpy(), randn(d, seed=40 + d).numpy()
    path = exact.polyhedral_quadratic(matrix, minimiser, w0, norm)
    points = np.linspace(0.1, 0.97, 12) * path.lengths[-1]
    problem = fs.Quadratic(torch.from_numpy(matrix), torch.from_numpy(minimiser))
    found = run(problem, w0, fs.arclength(points.tolist()), norm=norm, method=method, rtol=rtol)
    error = np.linalg.norm(found.weights[1:, 0] - path.weights(points), axis=-1)
    assert error.max() <= errors * rtol * np.linalg.norm(minimiser - w0)
    np.testing.assert_allclose(path.corners[-1], minimiser, atol=1e-9)
    # ‖∇F‖_* is what it claims to be, and the level falls by its integral
    gradient = torch.from_numpy((path.weights(points) - minimiser) @ matrix)
    assert path.dual(points) == nearly(norm.dual(gradient).numpy(), rel=1e-7, abs=1e-9)
    drop = 0.5 * (w0 - minimiser) @ matrix @ (w0 - minimiser)
    assert np.trapezoid(path.duals, path.lengths) == nearly(drop, rel=1e-10)


@pytest.mark.parametrize("shape", [(20, 5), (5, 9)], ids=["tall", "wide"])
def test_regression_in_l1_is_forward_stagewise(shape):
    x, y = randn(*shape, seed=1).numpy(), randn(shape[0], seed=3).numpy()
    path = exact.forward_stagewise(x, y)
    points = np.linspace(0.1, 0.95, 12) * path.lengths[-1]
    problem = fs.Problem(fs.Linear(shape[1]), x, y, fs.squared)
    found = run(problem, np.zeros(shape[1]), fs.arclength(points.tolist()), norm=fs.L1())
    close(found.weights[1:, 0], path.weights(points))
    np.testing.assert_allclose(x.T @ (x @ path.corners[-1] - y), 0, atol=1e-9)


def test_forward_stagewise_is_the_lasso_where_columns_are_orthonormal():
    """There coefficients are monotone: w = soft threshold of Xᵀy at M, of length ‖w‖₁."""
    x, y = np.linalg.qr(randn(9, 4, seed=1).numpy())[0], randn(9, seed=2).numpy()
    path, c = exact.forward_stagewise(x, y), x.T @ y
    for M in np.array([0.9, 0.5, 0.1, 0.01]) * np.abs(c).max():
        lasso = np.sign(c) * np.maximum(np.abs(c) - M, 0)
        np.testing.assert_allclose(path.weights(np.abs(lasso).sum()), lasso, atol=1e-12)


def test_forward_stagewise_is_the_limit_of_small_stages():
    x, y = randn(12, 4, seed=5).numpy(), randn(12, seed=6).numpy()
    path, w, stage = exact.forward_stagewise(x, y), np.zeros(4), 2e-5
    for _ in range(round(0.7 * path.lengths[-1] / stage)):
        g = x.T @ (y - x @ w)
        best = np.abs(g).argmax()
        w[best] += stage * np.sign(g[best])
    np.testing.assert_allclose(path.weights(0.7 * path.lengths[-1]), w, atol=5 * stage)


@pytest.mark.parametrize("norm", [fs.Lp(3.0), fs.Spectral()], ids=lambda n: n.name)
def test_polylines_are_refused_where_the_flow_is_none(norm):
    with pytest.raises(ValueError, match="expected ℓ1 or ℓ∞"):
        exact.polyhedral_quadratic(H, TARGET, [0, 0], norm)
    if isinstance(norm, fs.Lp):
        with pytest.raises(ValueError, match="expected ℓ1, ℓ2"):
            exact.round_quadratic(TARGET, [0, 0], norm)

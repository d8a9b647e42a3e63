"""Flows along rays, by every method that follows them, and the time that they take."""

import math

import numpy as np
import pytest
import torch
from scipy.integrate import quad
from scipy.special import expi

import flowsim as fs
from flowsim import closed_forms as exact
from flowsim.flow.rosenbrock import ROS34PW2
from tests.oracles.followed_flows import LOG_TIME, METHODS, METRIC, RTOL, close, nearly, run

EVERY_NORM = [
    *(
        (norm, method, RTOL)
        for norm in (fs.L2(), fs.Mahalanobis(METRIC))
        for method in (fs.DOPRI5, ROS34PW2)
    ),
    *((norm, None, RTOL) for norm in (fs.L1(), fs.Linf())),
    (fs.Lp(3.0), fs.DOPRI5, RTOL),
    *((norm, None, 1e-4) for norm in (fs.Lp(1.5), fs.Spectral(), fs.Nuclear())),
]


@pytest.mark.parametrize(
    ("norm", "method", "rtol"), EVERY_NORM, ids=lambda v: getattr(v, "name", None)
)
def test_one_example(norm, method, rtol):
    problem = fs.Problem(fs.Linear(3), [[1.0, -0.4, 2.0]], [1], fs.exponential)
    w0 = [0.3, -0.2, 0.1]
    path = run(problem, w0, fs.lam(1e4, saves=15), norm=norm, method=method, rtol=rtol)
    ray = exact.one_example([1.0, -0.4, 2.0], w0, norm.bind(problem.layout))
    log_time, s = path["log_time"][1:, 0], path["arclength"][1:, 0]
    close(path.weights[1:, 0], ray.weights(s), 10 * rtol)
    assert path["lam"][1:, 0] == nearly(ray.margin(s), rel=rtol)
    assert log_time == nearly(ray.log_time((path["lam"][1:, 0] - ray.q0) / ray.gamma), abs=LOG_TIME)
    assert s == nearly(ray.length(log_time), rel=1e-3)


@METHODS
@pytest.mark.parametrize("degree", [1, 2, 3])
def test_a_power_of_one_weight(degree, method):
    """f = w^L: all norms are the same, γ = 1."""
    net = fs.FunctionNet(lambda p, x: x @ p["W1"][0] ** degree, fs.Linear(1).layout, kinks=False)
    path = run(
        fs.Problem(net, [[1.0]], [1], fs.exponential),
        [0.7],
        fs.lam([1.0, 5.0, 20.0]),
        method=method,
    )
    ray = exact.radial([0.7], fs.L2(), 0.7**degree, degree)
    s = path["lam"][1:, 0] ** (1 / degree) - 0.7
    close(path.weights[1:, 0], ray.weights(s))
    assert path["log_time"][1:, 0] == nearly(ray.log_time(s), abs=LOG_TIME)


@pytest.mark.parametrize("depth", [2, 3])
@pytest.mark.parametrize(
    ("norm", "method"),
    [(fs.L2(), fs.DOPRI5), (fs.L2(), ROS34PW2), (fs.Lp(1.5), fs.DOPRI5), (fs.Lp(4.0), fs.DOPRI5)],
)
def test_a_product_of_equal_weights(depth, norm, method):
    """f = u⋯u with two examples; for two weights Ei(q) = Ei(q0) + 2·2^{1 − 2/p}·2t in ℓp."""
    problem = fs.Problem(fs.Diagonal(1, depth), [[1.0], [1.0]], [1, 1], fs.exponential)
    path = run(problem, [0.7] * depth, fs.lam([1.0, 5.0, 20.0, 200.0]), method=method, norm=norm)
    ray = exact.radial([0.7] * depth, norm, 0.7**depth, depth, examples=2)
    q = path["lam"][1:, 0] + math.log(2)
    s = (q ** (1 / depth) - 0.7) / ray.direction[0]
    assert ray.margin(s) == nearly(q, rel=1e-12)
    close(path.weights[1:, 0], ray.weights(s))
    assert path["log_time"][1:, 0] == nearly(ray.log_time(s), abs=LOG_TIME)


@pytest.mark.parametrize(("norm", "rate"), [(fs.L1(), 1), (fs.L2(), 2), (fs.Linf(), 4)])
def test_a_product_of_two_weights_grows_by_the_exponential_integral(norm, rate):
    """Ei(q) = Ei(q0) + ct; small steps sum the same time, in ℓ1 along its tie."""
    ray = exact.radial([0.7, 0.7], norm, 0.49, 2)
    q = ray.margin(s := np.array([0.5, 2.0, 6.0]))
    assert np.exp(ray.log_time(s)) == nearly((expi(q) - expi(0.49)) / rate, rel=1e-12)
    assert ray.length(ray.log_time(s)) == nearly(s, rel=1e-9)
    problem = fs.Problem(fs.Diagonal(1), [[1.0]], [1], fs.exponential)
    rule, w0 = fs.SmallStep(norm, dlam=5e-3), torch.full((1, 2), 0.7, dtype=torch.float64)
    path = fs.simulate(problem, rule, w0, until=fs.lam([2.0, 4.0]), strict=True)
    at = ray.length(path["log_time"][1:, 0])
    close(path.weights[1:, 0], ray.weights(at), 5e-3)


@pytest.mark.parametrize("degree", [1, 2, 3])
def test_time_along_a_ray_is_the_integral_of_its_rate(degree):
    """dt = ds·e^q/(m·dq/ds) by quadrature in s, at a Λ that no float holds as a loss, and back."""
    ray = exact.radial([0.7, 0.7], fs.L2(), 0.4, degree, examples=3)
    for s in (0.3, 2.0, 30.0):
        top = float(ray.margin(s))

        def rate(v, top=top):
            q = float(ray.margin(v))
            slope = degree * ray.gamma ** (1 / degree) * q ** (1 - 1 / degree)
            return math.exp(q - top) / (3 * slope)

        points = [s - 40 / top * s, s - 4 / top * s] if top > 50 else None
        whole = quad(rate, 0, s, points=points, epsabs=0, epsrel=1e-11, limit=500)[0]
        assert ray.log_time(s) == nearly(top + math.log(whole), abs=1e-8)
        assert ray.length(ray.log_time(s)) == nearly(s, rel=1e-9)

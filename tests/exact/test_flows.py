"""Flows against closed forms, by every method that follows them; and closed forms against each
other."""

import math

import numpy as np
import pytest
import torch
from scipy.integrate import quad
from scipy.optimize import minimize_scalar
from scipy.special import expi

import flowsim as fs
from flowsim import closed_forms as exact
from flowsim.flow.rosenbrock import ROS34PW2
from flowsim.motion.clocks import TIME

RTOL = 1e-6
LOG_TIME = 3e-4  # absolute accuracy of log t inside a step
METHODS = pytest.mark.parametrize("method", [fs.DOPRI5, ROS34PW2], ids=lambda m: m.name)
METRIC = torch.tensor([[2.0, 0.5, 0.0], [0.5, 1.0, 0.3], [0.0, 0.3, 3.0]], dtype=torch.float64)
QUADRATIC = pytest.mark.parametrize("norm", [fs.L2(), fs.Mahalanobis(METRIC)], ids=lambda n: n.name)
H, TARGET = np.array([[2.0, 1.0], [1.0, 2.0]]), np.array([4 / 3, 1 / 3])
SHAPE = (3, 4)


def run(problem, w0, until, *, norm=None, method=None, rtol=RTOL):
    """Saves at given times are read off a clock that is regular in time; implicit methods have
    their own."""
    explicit = method is fs.DOPRI5
    clock = TIME if explicit and until.clock is TIME else None
    rule = fs.SteepestFlow(norm or fs.L2(), rtol=rtol, method=method, clock=clock)
    return fs.simulate(
        problem, rule, torch.as_tensor(w0).double().reshape(1, -1), until=until, strict=True
    )


def close(value, true, tolerance=10 * RTOL):
    """Equal relative to the size of each exact point."""
    true = np.asarray(true)
    error = np.linalg.norm(np.atleast_2d(value - true), axis=-1)
    assert (error <= tolerance * np.linalg.norm(np.atleast_2d(true), axis=-1)).all(), error


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def spd(d, seed):
    root = randn(d + 2, d, seed=seed).numpy()
    return root.T @ root / d


def nearly(value, **tolerance):
    return pytest.approx(value, **tolerance)


# --- rays ----------------------------------------------------------------------------------------

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


# --- quadratics ----------------------------------------------------------------------------------

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


# --- diagonal nets -------------------------------------------------------------------------------


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

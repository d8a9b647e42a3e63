"""Steepest flow against closed forms, and its refusals."""

import math

import numpy as np
import pytest
import torch
from scipy.optimize import brentq
from scipy.special import expi

import flowsim as fs
from flowsim.flow.movements.step import MinimisingMovement
from flowsim.flow.pieces.step import ExactPieces
from flowsim.flow.rosenbrock import ROS34PW2
from flowsim.flow.sliding.step import KinkImplicit
from flowsim.flow.steepest import suited
from flowsim.motion.clocks import ARCLENGTH, LAM, RELATIVE, TIME

# One example, linear model, exponential loss, in any norm: with G the gradient of its margin q,
#     q(t) = log(e^{q0} + ‖G‖_*² t),   w(t) = w0 + s(t)·u,   u steepest for G,   s = (q − q0)/‖G‖_*.
# Two classes make the weights a 2 × 3 matrix.

ONE = fs.Problem(fs.Linear(3, 2), [[1.0, -0.4, 2.0]], [1], fs.pairwise_exponential)
W0 = torch.tensor(
    [[0.3, -0.2, 0.1, 0.0, 0.4, -0.1], [0.0, 0.0, 0.0, 0.0, 0.0, 0.0]], dtype=torch.float64
)
METRIC = torch.diag(torch.arange(1.0, 7.0)).double() + 0.3
WITHOUT_TIES = [
    fs.L2(),
    fs.Frobenius(),
    fs.Lp(1.5),
    fs.Lp(3.0),
    fs.Mahalanobis(METRIC),
    fs.Schatten(3.0),
    fs.Euclidean(fs.L2()),
]
WITH_TIES = [
    fs.L1(),
    fs.Linf(),
    fs.Spectral(),
    fs.Nuclear(),
    fs.Max(fs.Spectral()),
    fs.Sum(fs.L1(), {"W1": 2.0}),
]


def check_one_example(run, norm, *, tolerance):
    """At the save points and, to 1e-7, at the end of the last step."""
    norm, w0 = norm.bind(ONE.layout), torch.from_numpy(run.weights[0])
    lam, gradient = ONE.ascent(w0)
    dual, u = norm.dual(gradient), norm.steepest(gradient)
    for w, readings, close in (
        (run.weights[1:], {name: run[name][1:] for name in run.names}, tolerance),
        (
            run.final.w.numpy(),
            {name: value.numpy() for name, value in run.final.readings.items()},
            1e-7,
        ),
    ):
        s = torch.from_numpy(readings["arclength"])
        q = lam + dual * s
        assert readings["lam"] == pytest.approx(q.numpy(), abs=close)
        assert w == pytest.approx((w0 + s[..., None] * u).numpy(), abs=close)
        log_time = (
            q + torch.log(-torch.expm1(lam - q)) - 2 * torch.log(dual)
        )  # t = (e^q − e^{q0})/‖G‖_*²
        assert readings["log_time"] == pytest.approx(log_time.numpy(), abs=100 * close)


@pytest.mark.parametrize("clock", [ARCLENGTH, LAM], ids=lambda c: c.name)
@pytest.mark.parametrize("norm", WITHOUT_TIES, ids=lambda n: n.name)
def test_one_example_in_every_norm_without_ties(norm, clock):
    rule = fs.SteepestFlow(norm, rtol=1e-8, clock=clock, method=fs.DOPRI5)
    check_one_example(
        fs.simulate(ONE, rule, W0, until=fs.lam(30.0, saves=7), strict=True), norm, tolerance=1e-7
    )


@pytest.mark.parametrize("clock", [TIME, RELATIVE], ids=lambda c: c.name)
@pytest.mark.parametrize("norm", [fs.L2(), fs.Lp(3.0)], ids=lambda n: n.name)
def test_one_example_on_clocks_along_which_arclength_is_curved(norm, clock):
    """Inside a step arclength is linear in the clock, so that save points are as near as steps are
    short."""
    rule = fs.SteepestFlow(norm, rtol=1e-8, clock=clock, method=fs.DOPRI5)
    run = fs.simulate(ONE, rule, W0 + 0.1, until=fs.lam(30.0, saves=7), strict=True)
    check_one_example(run, norm, tolerance=3e-3)


@pytest.mark.parametrize("norm", [*WITHOUT_TIES, *WITH_TIES], ids=lambda n: n.name)
def test_one_example_in_every_norm_by_small_steps(norm):
    """The direction never changes, so that small steps are exact, also in time: log dt/ds is
    linear."""
    run = fs.simulate(
        ONE, fs.SmallStep(norm, dlam=0.7), W0, until=fs.lam(30.0, saves=7), strict=True
    )
    check_one_example(run, norm, tolerance=1e-10)


@pytest.mark.parametrize("norm", [fs.L2(), fs.Lp(3.0)], ids=lambda n: n.name)
def test_one_example_at_a_given_time(norm):
    run = fs.simulate(
        ONE,
        fs.SteepestFlow(norm, rtol=1e-9, method=fs.DOPRI5),
        W0,
        until=fs.time(1e6, saves=9),
        strict=True,
    )
    lam, gradient = ONE.ascent(W0)
    t = np.exp(run["log_time"])
    assert t[-1] == pytest.approx(1e6, rel=1e-9)
    dual = norm.dual(gradient).numpy()
    assert run["lam"] == pytest.approx(np.log(np.exp(lam.numpy()) + dual**2 * t), abs=1e-5)


def test_one_example_to_a_loss_beyond_all_numbers():
    run = fs.simulate(ONE, fs.SteepestFlow(fs.L2()), W0, until=fs.lam(1e5, saves=20), strict=True)
    check_one_example(run, fs.L2(), tolerance=1e-7)


# f = product of L equal weights: q̇ = L² γ^{2/L} q^{2−2/L} e^{−q}; for L = 2 an exponential
# integral.


def log_time_of_product(q0, q, rate):
    """log t, with Ei(q) = Ei(q0) + rate·t."""
    return math.log((expi(q) - expi(q0)) / rate)


@pytest.mark.parametrize("clock", [ARCLENGTH, LAM, TIME, RELATIVE], ids=lambda c: c.name)
def test_a_product_of_two_weights_in_l2(clock):
    problem = fs.Problem(fs.Diagonal(1, 2), [[1.0]], [1], fs.exponential)
    w0 = torch.tensor([[0.5, 0.5]], dtype=torch.float64)
    run = fs.simulate(
        problem,
        fs.SteepestFlow(fs.L2(), rtol=1e-9, clock=clock, method=fs.DOPRI5),
        w0,
        until=fs.lam(10.0, saves=6),
    )
    for lam, log_time, w in zip(
        run["lam"][1:, 0], run["log_time"][1:, 0], run.weights[1:, 0], strict=True
    ):
        assert log_time == pytest.approx(
            log_time_of_product(0.25, lam, rate=2), abs=1e-4
        )  # inside a step
        assert w == pytest.approx([math.sqrt(lam)] * 2, rel=1e-6)
    lam, log_time = (
        float(run.final.readings[name]) for name in ("lam", "log_time")
    )  # at the end of one
    assert log_time == pytest.approx(log_time_of_product(0.25, lam, rate=2), abs=1e-7)
    assert run["lam"][-1, 0] == pytest.approx(10.0)


@pytest.mark.parametrize(("norm", "rate"), [(fs.L2(), 2), (fs.Linf(), 4)], ids=["l2", "linf"])
def test_a_product_of_two_weights_by_small_steps_converges_in_time(norm, rate):
    problem = fs.Problem(fs.Diagonal(1, 2), [[1.0]], [1], fs.exponential)
    w0 = torch.tensor([[0.5, 0.5]], dtype=torch.float64)
    errors = []
    for dlam in (0.04, 0.02, 0.01):
        run = fs.simulate(
            problem, fs.SmallStep(norm, dlam=dlam, relative=1.0), w0, until=fs.lam([5.0])
        )
        errors.append(abs(run["log_time"][-1, 0] - log_time_of_product(0.25, 5.0, rate)))
        assert run.weights[-1, 0] == pytest.approx([math.sqrt(5)] * 2, rel=1e-9)
    assert errors[0] < 1e-4
    assert errors[0] > 3 * errors[1] > 9 * errors[2]  # the quadrature of time is of second order


def test_a_radial_solution_of_several_examples():
    """All m margins equal on the ray through a KKT point: q = γρ², Ei(q − log m …) with 𝓛 = m
    e^{−q}."""
    problem = fs.Problem(fs.Diagonal(2, 2), [[1.0, 0.0], [0.0, 1.0]], [1, 1], fs.exponential)
    w0 = torch.full((1, 4), 0.6, dtype=torch.float64)
    run = fs.simulate(
        problem,
        fs.SteepestFlow(fs.L2(), rtol=1e-9, method=fs.DOPRI5),
        w0,
        until=fs.lam(15.0, saves=5),
    )
    assert run.weights == pytest.approx(run.weights[:, :, :1].repeat(4, 2), rel=1e-9)
    ends = ((run.final.readings["lam"][0], run.final.readings["log_time"][0], 1e-7),)
    inside = zip(
        run["lam"][1:, 0], run["log_time"][1:, 0], [1e-4] * 4, strict=True
    )  # time inside a step
    for lam, log_time, close in (*ends, *inside):
        q, gamma = float(lam) + math.log(2), 1 / 4  # q = ¼‖w‖²
        assert float(log_time) == pytest.approx(
            log_time_of_product(0.36, q, rate=4 * 2 * gamma), abs=close
        )


@pytest.mark.parametrize("depth", [1, 3, 4])
def test_a_product_of_any_number_of_weights(depth):
    """θ = equal weights: q = θ^L and dq/dt = L θ^{2L−2} e^{−q} in ℓ2."""
    from scipy.integrate import quad

    problem = fs.Problem(fs.Diagonal(1, depth), [[1.0]], [1], fs.exponential)
    w0 = torch.full((1, depth), 0.8, dtype=torch.float64)
    run = fs.simulate(
        problem,
        fs.SteepestFlow(fs.L2(), rtol=1e-9, method=fs.DOPRI5),
        w0,
        until=fs.lam([12.0]),
        strict=True,
    )
    time = quad(
        lambda q: math.exp(q) / (depth * q ** (2 - 2 / depth)),
        0.8**depth,
        12,
        epsabs=0,
        epsrel=1e-12,
    )[0]
    assert run["log_time"][-1, 0] == pytest.approx(math.log(time), abs=1e-5)
    assert run.weights[-1, 0] == pytest.approx([12 ** (1 / depth)] * depth, rel=1e-7)


# F = ½‖w − w*‖²: w = w* + e^{−t}(w0 − w*), and in arclength the residual shrinks by s (a prox of
# the dual norm).

TARGET = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
BOWL = fs.Quadratic(torch.eye(3, dtype=torch.float64), TARGET)
STARTS = torch.tensor([[4.0, 2.0, 0.5], [0.0, 0.0, -3.0]], dtype=torch.float64)


@pytest.mark.parametrize("clock", [ARCLENGTH, TIME, RELATIVE], ids=lambda c: c.name)
@pytest.mark.parametrize("objective", ["quadratic", "squared loss"])
def test_the_flow_into_a_bowl_in_time(objective, clock):
    if objective == "quadratic":
        problem, lam = BOWL, lambda r: -0.5 * (r**2).sum(-1)
    else:
        problem = fs.Problem(fs.Linear(3), torch.eye(3).double(), TARGET, fs.squared)
        lam = lambda r: -np.log(0.5 * (r**2).sum(-1))
    until = fs.time([0.1, 0.5, 1.0, 3.0])
    run = fs.simulate(
        problem,
        fs.SteepestFlow(fs.L2(), rtol=1e-9, clock=clock, method=fs.DOPRI5),
        STARTS,
        until=until,
        strict=True,
    )
    t = np.array([0, 0.1, 0.5, 1.0, 3.0])[:, None, None]
    residual = np.exp(-t) * (STARTS - TARGET).numpy()
    assert run.weights == pytest.approx(TARGET.numpy() + residual, abs=2e-5)
    assert run["lam"] == pytest.approx(lam(residual), abs=1e-4)


def test_the_flow_into_a_bowl_in_arclength():
    flow = fs.SteepestFlow(fs.L2(), rtol=1e-6, method=fs.DOPRI5)
    run = fs.simulate(BOWL, flow, STARTS, until=fs.arclength(3.0, saves=7), strict=True)
    r = (STARTS - TARGET).numpy()
    size = np.linalg.norm(r, axis=1)
    s = np.linspace(0, 3, 7)[:, None]
    assert run.weights == pytest.approx(TARGET.numpy() + (1 - s / size)[..., None] * r, abs=1e-9)


@pytest.mark.parametrize("norm", [fs.L1(), fs.Linf()], ids=lambda n: n.name)
def test_small_steps_into_a_bowl_tend_to_the_prox_path(norm):
    """ℓ∞: the residual is soft-thresholded by s; ℓ1: clipped at M with Σ(|r| − M)₊ = s."""
    s = 2.0
    r = (STARTS[0] - TARGET).numpy()
    if norm == fs.Linf():
        expected = np.sign(r) * np.maximum(np.abs(r) - s, 0)
    else:
        level = brentq(lambda m: np.maximum(np.abs(r) - m, 0).sum() - s, 0, np.abs(r).max())
        expected = np.clip(r, -level, level)
    errors = []
    for lr in (0.01, 0.001):
        rule = fs.SteepestDescent(norm, lr, normalized=True)
        run = fs.simulate(BOWL, rule, STARTS[:1], until=fs.steps([round(s / lr)]), strict=True)
        errors.append(np.abs(run.weights[-1, 0] - TARGET.numpy() - expected).max())
    assert errors[0] < 0.02
    assert errors[1] < 0.002


# Refusals

SMOOTH = fs.Problem(
    fs.MLP([3, 4, 1], activation=fs.squared_relu), torch.eye(3).double(), [1, -1, 1], fs.logistic
)
KINKED = fs.Problem(
    fs.MLP([3, 4, 1], activation=fs.relu), torch.eye(3).double(), [1, -1, 1], fs.logistic
)


@pytest.mark.parametrize(
    "norm", [fs.Max(fs.Spectral()), fs.Sum(fs.L2()), fs.Euclidean(fs.Linf())], ids=str
)
def test_a_net_with_kinks_in_a_norm_without_a_method_is_refused(norm):
    with pytest.raises(ValueError, match=r"expected L1, L2, Linf.*try flowsim\.SmallStep"):
        fs.simulate(KINKED, fs.SteepestFlow(norm), KINKED.net.init(0), until=fs.lam([1.0]))


@pytest.mark.parametrize(
    "method", [fs.DOPRI5, fs.TorchDiffEq("dopri5")], ids=["dopri5", "torchdiffeq"]
)
def test_explicit_solvers_refuse_kinks_and_ties(method):
    with pytest.raises(ValueError, match=r"the net has kinks.*try method=None"):
        fs.simulate(
            KINKED, fs.SteepestFlow(fs.L2(), method=method), KINKED.net.init(0), until=fs.lam([1.0])
        )
    with pytest.raises(ValueError, match=r"norm has ties.*try method=None"):
        fs.simulate(
            SMOOTH,
            fs.SteepestFlow(fs.Linf(), method=method),
            SMOOTH.net.init(0),
            until=fs.lam([1.0]),
        )


@pytest.mark.parametrize(
    "norm",
    [
        fs.L1(),
        fs.Linf(),
        fs.Max(fs.L2()),
        fs.Sum(fs.L2()),
        fs.Max(fs.Spectral()),
        fs.Euclidean(fs.Linf()),
    ],
    ids=lambda n: n.name,
)
def test_a_norm_with_ties_is_refused_and_the_small_step_path_is_named(norm):
    with pytest.raises(ValueError, match=r"norm has ties.*try flowsim\.SmallStep\(flowsim\."):
        fs.simulate(SMOOTH, fs.SteepestFlow(norm), SMOOTH.net.init(0), until=fs.lam([1.0]))


NET = fs.Problem(fs.Diagonal(3), torch.eye(3).double(), [1, -1, 1], fs.logistic)


@pytest.mark.parametrize(
    ("problem", "norm", "method"),
    [
        (KINKED, fs.L2(), KinkImplicit()),
        (KINKED, fs.Euclidean(fs.Frobenius()), KinkImplicit()),
        (ONE, fs.Linf(), ExactPieces()),
        (BOWL, fs.L1(), ExactPieces()),
        (ONE, fs.L2(), ROS34PW2),
        (NET, fs.L2(), ROS34PW2),
        (ONE, fs.Spectral(), MinimisingMovement()),
        (BOWL, fs.Lp(4.0), MinimisingMovement()),
        (NET, fs.Lp(4.0), fs.DOPRI5),
    ],
    ids=lambda value: getattr(value, "name", type(value).__name__),
)
def test_the_method_follows_from_norm_and_problem(problem, norm, method):
    assert suited(norm.bind(problem.layout), problem) == method


def test_a_linear_model_has_no_kinks_whatever_its_activation():
    problem = fs.Problem(
        fs.MLP([3, 1], activation=fs.relu), torch.eye(3).double(), [1, -1, 1], fs.logistic
    )
    run = fs.simulate(problem, fs.SteepestFlow(fs.L2()), problem.net.init(0), until=fs.lam([1.0]))
    assert run.statuses == [fs.Status.DONE]


@pytest.mark.parametrize("value", [0, -1e-3, 1.0, 2, math.nan, math.inf, "1e-3", None, True])
@pytest.mark.parametrize("name", ["rtol", "atol"])
def test_tolerances_lie_between_zero_and_one(name, value):
    with pytest.raises(
        ValueError, match=f"SteepestFlow: got {name}=.*expected a number between 0 and 1"
    ):
        fs.SteepestFlow(fs.L2(), **{name: value})


@pytest.mark.parametrize("norm", [fs.L2, "l2", None])
def test_a_norm_must_be_an_instance(norm):
    with pytest.raises(
        TypeError, match=r"SteepestFlow: got norm=.*expected a flowsim norm, try flowsim\.L2\(\)"
    ):
        fs.SteepestFlow(norm)


@pytest.mark.parametrize("clock", ["lam", 0, fs.lam, fs.clocks.STEPS])
def test_a_clock_must_be_one_that_can_be_integrated_against(clock):
    with pytest.raises(
        ValueError, match=r"SteepestFlow: got clock .*try flowsim\.clocks\.ARCLENGTH"
    ):
        fs.SteepestFlow(fs.L2(), clock=clock)


@pytest.mark.parametrize(
    "method", [ROS34PW2, KinkImplicit(), ExactPieces(), MinimisingMovement()], ids=repr
)
def test_a_clock_is_refused_by_methods_that_have_one_of_their_own(method):
    with pytest.raises(ValueError, match="got clock 'lam' for .*, expected none, .*try clock=None"):
        fs.SteepestFlow(fs.L2(), clock=LAM, method=method)


def test_a_clock_is_refused_at_the_start_where_the_method_is_chosen_then():
    with pytest.raises(ValueError, match="got clock 'arclength' for Rosenbrock.*try clock=None"):
        fs.SteepestFlow(fs.L2(), clock=ARCLENGTH).start(ONE, W0)
    rule = fs.SteepestFlow(fs.Lp(3.0), clock=LAM)
    problem = fs.Problem(fs.Diagonal(1, 2), [[1.0]], [1], fs.exponential)
    run = fs.simulate(problem, rule, torch.ones(1, 2).double(), until=fs.lam([2.0]), strict=True)
    assert float(run.final.readings["lam"]) >= 2.0


@pytest.mark.parametrize("method", ["euler", "rk4", "tsit5", ""])
def test_a_solver_of_torchdiffeq_is_an_adaptive_one(method):
    with pytest.raises(ValueError, match=f"TorchDiffEq: got '{method}', expected one of dopri5"):
        fs.TorchDiffEq(method)


@pytest.mark.parametrize("method", [5, "dopri5", fs.TorchDiffEq])
def test_a_method_is_an_object(method):
    with pytest.raises(TypeError, match=r"SteepestFlow: got method=.*try flowsim\.DOPRI5"):
        fs.SteepestFlow(fs.L2(), method=method)

"""Flows of dissipation potentials: exact solutions, an independent integrator, and an optimiser
that tends to one."""

import math

import numpy as np
import pytest
import torch
from scipy.integrate import solve_ivp

import flowsim as fs

NET = fs.MLP([3, 4, 1], activation=fs.squared_relu)
X, Y = fs.data.gaussian_separable(8, 3, margin=0.5, seed=0)
POTENTIALS = {
    "smooth sign": (fs.SmoothSign(0.3), lambda g: g / (np.abs(g) + 0.3)),
    "huber": (fs.Huber(0.5), lambda g: np.clip(g, -0.5, 0.5)),
    "clipping": (fs.Clipping(0.5), lambda g: g * min(1, 0.5 / np.linalg.norm(g))),
}


def one_weight():
    """𝓛 = e^{−w}."""
    return fs.Problem(fs.Linear(1), [[1.0]], [1], fs.exponential)


def zero():
    return torch.zeros(1, 1, dtype=torch.float64)


def setting():
    return fs.Problem(NET, X, Y, fs.logistic), NET.init(range(2))


@pytest.mark.parametrize("name", POTENTIALS)
def test_against_an_independent_integrator_in_time(name):
    problem, w0 = setting()
    potential, velocity = POTENTIALS[name]
    run = fs.simulate(
        problem,
        fs.DissipationFlow(potential, rtol=1e-9),
        w0,
        until=fs.time([0.5, 2.0]),
        strict=True,
    )

    def descend(t, w):
        lam, h = problem.ascent(torch.from_numpy(w)[None])
        return -velocity((-torch.exp(-lam)[:, None] * h)[0].numpy())

    for b in range(2):
        exact = solve_ivp(
            descend, (0, 2), w0[b].numpy(), rtol=1e-9, atol=1e-11, t_eval=[0.5, 2.0], method="LSODA"
        )
        assert np.abs(run.weights[1:, b] - exact.y.T).max() < 2e-5


@pytest.mark.parametrize("eps", [1e-3, 0.5, 10.0])
@pytest.mark.parametrize("lam", [1.0, 20.0, 2000.0])
def test_the_smooth_sign_flow_of_one_weight(eps, lam):
    """w' = e^{−w}/(e^{−w} + ε): t = w + ε(e^w − 1), to Λ = w = 2000."""
    flow = fs.DissipationFlow(fs.SmoothSign(eps), rtol=1e-8)
    run = fs.simulate(one_weight(), flow, zero(), until=fs.lam([lam]), strict=True)
    exact = np.logaddexp(math.log(lam), math.log(eps) + lam + math.log(-math.expm1(-lam)))
    assert run["log_time"][-1, 0] == pytest.approx(exact, abs=1e-4)


@pytest.mark.parametrize("bound", [0.1, 5.0])
@pytest.mark.parametrize("make", [fs.Huber, fs.Clipping])
def test_the_clipped_flows_of_one_weight(make, bound):
    """w' = min(e^{−w}, δ): w = δt up to e^{−w} = δ, then e^w grows by one per unit of time."""
    run = fs.simulate(
        one_weight(),
        fs.DissipationFlow(make(bound), rtol=1e-9),
        zero(),
        until=fs.lam([6.0]),
        strict=True,
    )
    first = max(0.0, -math.log(bound))
    assert run["log_time"][-1, 0] == pytest.approx(
        math.log(first / bound + math.exp(6.0) - math.exp(first)), abs=1e-4
    )


def test_clipping_walks_the_orbit_of_gradient_flow():
    problem, w0 = setting()
    until = fs.arclength([0.2, 0.5, 1.0])
    clipped = fs.simulate(problem, fs.DissipationFlow(fs.Clipping(0.1), rtol=1e-9), w0, until=until)
    plain = fs.simulate(problem, fs.SteepestFlow(fs.L2(), rtol=1e-9), w0, until=until)
    assert np.abs(clipped.weights - plain.weights).max() < 1e-6
    assert (clipped["log_time"][-1] > plain["log_time"][-1]).all()


def test_adam_tends_to_the_smooth_sign_flow_at_equal_times():
    problem, w0 = setting()
    flow = fs.simulate(
        problem, fs.DissipationFlow(fs.SmoothSign(0.3), rtol=1e-9), w0, until=fs.time([1.0])
    )
    errors = []
    for steps in (400, 800, 1600):
        rule = fs.Adam(1.0 / steps, betas=(0.5, 0.8), eps=0.3)
        run = fs.simulate(problem, rule, w0, until=fs.steps([steps]))
        errors.append(np.abs(run.weights[-1] - flow.weights[-1]).max())
    assert errors[0] / errors[1] == pytest.approx(2, abs=0.4)
    assert errors[1] / errors[2] == pytest.approx(2, abs=0.4)


def test_the_dissipated_level_is_the_rise():
    problem, w0 = setting()
    run = fs.simulate(
        problem, fs.DissipationFlow(fs.Huber(0.5), rtol=1e-8), w0, until=fs.time([5.0])
    )
    assert run["dissipated"][-1] == pytest.approx(run["lam"][-1] - run["lam"][0], rel=1e-5)


def test_late_it_follows_the_gradient():
    """Far below ε the smooth sign flow raises the l2 margin of a linear model, which is sqrt(53/17)
    at best."""
    Z = torch.tensor([[3.0, 1.0, 0.0], [1.0, -2.0, 2.0], [1.0, 2.0, 1.0]], dtype=torch.float64)
    problem = fs.Problem(fs.Linear(3), Z, torch.ones(3), fs.exponential)
    observe = {"l2": fs.diagnostics.margin(fs.L2())}
    flow = fs.DissipationFlow(fs.SmoothSign(1e-3), rtol=1e-5)
    run = fs.simulate(
        problem, flow, torch.zeros(1, 3).double(), until=fs.lam([3.0, 30.0, 300.0]), observe=observe
    )
    assert 0.995 < run["l2"][-1, 0] / math.sqrt(53 / 17) <= 1
    assert run["l2"][1, 0] < run["l2"][-1, 0]


def test_kinks_are_refused():
    problem = fs.Problem(fs.MLP([3, 4, 1]), X, Y, fs.logistic)
    with pytest.raises(ValueError, match="kinks"):
        fs.simulate(
            problem, fs.DissipationFlow(fs.Huber()), problem.net.init(0), until=fs.steps([1])
        )


@pytest.mark.parametrize(
    ("make", "option"), [(fs.SmoothSign, "eps"), (fs.Huber, "delta"), (fs.Clipping, "threshold")]
)
@pytest.mark.parametrize("value", [0, -1.0, math.inf, "1"])
def test_options_are_positive(make, option, value):
    with pytest.raises(
        ValueError, match=f"{make.__name__}: got {option}=.*expected a finite number > 0"
    ):
        make(value)


@pytest.mark.parametrize("potential", [None, "huber", 1.0])
def test_the_potential_is_one(potential):
    with pytest.raises(TypeError, match="DissipationFlow: got potential"):
        fs.DissipationFlow(potential)


def test_the_tolerance_is_a_share():
    with pytest.raises(ValueError, match="DissipationFlow: got rtol=2"):
        fs.DissipationFlow(fs.Huber(), rtol=2)


def test_a_method_that_follows_norms_is_refused():
    for method in (fs.ROS34PW2, fs.KinkImplicit(), fs.ExactPieces(), fs.MinimisingMovement()):
        with pytest.raises(ValueError, match="DissipationFlow: got method=.*try flowsim.DOPRI5"):
            fs.DissipationFlow(fs.Huber(), method=method)
    with pytest.raises(TypeError, match="DissipationFlow: got method='dopri5'"):
        fs.DissipationFlow(fs.Huber(), method="dopri5")


def test_the_potential_is_followed_by_other_explicit_methods():
    problem, w0 = setting()
    until = fs.time([1.0])
    ends = []
    for method in (fs.DOPRI5, fs.BOSH3):
        flow = fs.DissipationFlow(fs.Huber(0.5), rtol=1e-8, method=method)
        ends.append(fs.simulate(problem, flow, w0, until=until).weights[-1])
    np.testing.assert_allclose(*ends, atol=1e-5)

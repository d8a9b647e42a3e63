"""Explicit pairs against SciPy and torchdiffeq, and against what the flow must conserve."""

import numpy as np
import pytest
import torch
from scipy.integrate import solve_ivp

import flowsim as fs
from flowsim.flow.explicit import BOSH3, DOPRI5, runge_kutta
from flowsim.flow.field import Field
from flowsim.motion.clocks import ARCLENGTH, LAM, RELATIVE, TIME
from tests.oracles.scipy_flows import (
    ACTIVATIONS,
    LOSSES,
    X,
    Y,
    by_arclength,
    by_lam,
    distance,
    flow,
    setting,
)


@pytest.mark.parametrize("clock", [ARCLENGTH, TIME], ids=lambda c: c.name)
@pytest.mark.parametrize(
    ("tableau", "counts"), [(DOPRI5, (32, 64)), (BOSH3, (32, 64, 128))], ids=["5", "3"]
)
def test_fixed_steps_converge_at_the_nominal_order(tableau, counts, clock):
    net = fs.MLP([4, 3, 1], activation=fs.square)
    problem, w0 = fs.Problem(net, X / 2, Y, fs.logistic), net.init([1])
    field, span = Field(fs.L2(), clock), 1.0

    def go(n):
        w, dt = w0, torch.tensor([span / n], dtype=torch.float64)
        sample = field(problem, w)
        for _ in range(n):
            w, _, samples = runge_kutta(tableau, lambda w: field(problem, w), w, sample, dt)
            sample = samples[-1]
        return w[0].numpy()

    def velocity(_, w):
        return field(problem, torch.from_numpy(w[None].copy())).velocity[0].numpy()

    exact = solve_ivp(
        velocity, (0, span), w0[0].numpy(), method="DOP853", rtol=1e-13, atol=1e-14
    ).y[:, -1]
    errors = [distance(go(n), exact) for n in counts]
    order = -np.polyfit(np.log(counts), np.log(errors), 1)[0]
    assert abs(order - tableau.order) < 0.3, errors


@pytest.mark.parametrize("tableau", [DOPRI5, BOSH3], ids=lambda t: t.name)
def test_the_error_vector_is_of_the_order_of_the_embedded_solution(tableau):
    problem, w0 = setting()
    field, sizes = Field(fs.L2(), ARCLENGTH), (0.02, 0.01, 0.005)
    sample = field(problem, w0)
    errors = []
    for dt in sizes:
        at = torch.tensor([dt], dtype=torch.float64)
        errors.append(
            float(runge_kutta(tableau, lambda w: field(problem, w), w0, sample, at)[1].norm())
        )
    assert abs(np.polyfit(np.log(sizes), np.log(errors), 1)[0] - tableau.order) < 0.3, errors


@pytest.mark.parametrize("tableau", [DOPRI5, BOSH3], ids=lambda t: t.name)
def test_tableaus_are_consistent(tableau):
    assert sum(tableau.stages[-1]) == pytest.approx(1, abs=1e-15)
    assert sum(tableau.error) == pytest.approx(0, abs=1e-15)
    assert len(tableau.error) == len(tableau.stages) + 1 == tableau.evaluations + 1


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("method", [DOPRI5, fs.TorchDiffEq("dopri5")], ids=["own", "torchdiffeq"])
@pytest.mark.parametrize(
    ("activation", "rtol", "allowed"),
    [
        ("square", 1e-4, 10),
        ("square", 1e-6, 10),
        ("square", 1e-8, 10),
        ("squared_relu", 1e-4, 10),
        ("squared_relu", 1e-6, 50),
        ("squared_relu", 1e-8, 300),
    ],
)
def test_the_path_agrees_with_scipy_to_the_tolerance(method, activation, rtol, allowed, loss):
    s = 3.0
    run = flow(activation, loss, fs.arclength(s, saves=2), rtol=rtol, method=method)
    assert distance(run.weights[-1, 0], by_arclength(activation, loss, s)) < allowed * rtol


@pytest.mark.parametrize("rtol", [1e-4, 1e-6])
def test_the_path_of_order_3_agrees_with_scipy_to_the_tolerance(rtol):
    run = flow("square", "exponential", fs.arclength(3.0, saves=2), rtol=rtol, method=BOSH3)
    assert distance(run.weights[-1, 0], by_arclength("square", "exponential", 3.0)) < 10 * rtol


@pytest.mark.parametrize(
    ("loss", "method"),
    [("exponential", DOPRI5), ("logistic", DOPRI5), ("exponential", BOSH3)],
    ids=["e5", "l5", "e3"],
)
@pytest.mark.parametrize("clock", [ARCLENGTH, RELATIVE, LAM, TIME], ids=lambda c: c.name)
def test_the_orbit_and_its_time_do_not_depend_on_the_clock(clock, method, loss):
    reference, log_time = by_lam("square", loss, 5.0)
    run = flow("square", loss, fs.lam([5.0]), clock=clock, method=method)
    assert distance(run.weights[-1, 0], reference) < 1e-5
    assert run["log_time"][-1, 0] == pytest.approx(log_time, abs=1e-5)


@pytest.mark.parametrize("clock", [ARCLENGTH, RELATIVE, LAM, TIME], ids=lambda c: c.name)
def test_the_orbit_does_not_depend_on_the_clock_where_second_derivatives_jump(clock):
    reference, log_time = by_lam("squared_relu", "exponential", 20.0)
    run = flow("squared_relu", "exponential", fs.lam([20.0]), clock=clock)
    assert distance(run.weights[-1, 0], reference) < 5e-5
    assert run["log_time"][-1, 0] == pytest.approx(log_time, abs=1e-3)


@pytest.mark.parametrize("method", [DOPRI5, BOSH3], ids=lambda t: t.name)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_on_the_lam_clock_lam_advances_by_exactly_the_clock(activation, method):
    run = flow(activation, "exponential", fs.lam(10.0, saves=20), clock=LAM, method=method)
    problem, _ = setting(activation)
    points = fs.lam(10.0, saves=20).targets(torch.from_numpy(run["lam"][0]))
    shown = [float(problem.lam(torch.from_numpy(w))) for w in run.weights[1:]]
    # natural steps are exact to rtol; inside a step the weights are a cubic
    assert shown[-1] == pytest.approx(10.0, abs=1e-5)
    assert shown == pytest.approx(points, abs=1e-3)
    final = run.final
    natural = float(problem.lam(final.w))
    assert natural == pytest.approx(float(final.readings["lam"]), abs=1e-12)


@pytest.mark.parametrize("clock", [ARCLENGTH, LAM, RELATIVE, TIME], ids=lambda c: c.name)
@pytest.mark.parametrize("loss", LOSSES)
def test_what_is_dissipated_is_the_rise_of_lam(loss, clock):
    run = flow("square", loss, fs.lam([3.0]), rtol=1e-8, clock=clock)
    rise = run.final.readings["lam"] - torch.from_numpy(run["lam"][0])
    assert float(run.final.readings["dissipated"] - rise) == pytest.approx(0, abs=1e-6)


def test_lam_is_held_to_rtol_where_the_weights_alone_would_leave_it_loose():
    run = flow("square", "exponential", fs.lam([30.0]), rtol=1e-5)
    rise = run.final.readings["lam"] - torch.from_numpy(run["lam"][0])
    assert float(run.final.readings["dissipated"] - rise) == pytest.approx(0, abs=1e-4)


@pytest.mark.parametrize(
    "method", [DOPRI5, BOSH3, fs.TorchDiffEq("dopri5")], ids=["own 5", "own 3", "torchdiffeq"]
)
def test_arclength_is_the_length_of_the_path(method):
    run = flow("square", "exponential", fs.arclength(2.0, saves=60), rtol=1e-6, method=method)
    chords = np.linalg.norm(np.diff(run.weights[:, 0], axis=0), axis=1)
    assert chords.sum() == pytest.approx(2.0, rel=1e-3)
    relative = (
        chords / np.linalg.norm((run.weights[1:, 0] + run.weights[:-1, 0]) / 2, axis=1)
    ).sum()
    assert run["relative"][-1, 0] == pytest.approx(relative, rel=1e-3)


def test_a_smaller_rtol_takes_more_steps_and_is_nearer():
    runs = [
        flow("square", "exponential", fs.arclength(3.0, saves=2), rtol=r)
        for r in (1e-3, 1e-5, 1e-7)
    ]
    exact = by_arclength("square", "exponential", 3.0)
    errors = [distance(run.weights[-1, 0], exact) for run in runs]
    counts = [run["steps"][-1, 0] for run in runs]
    assert errors[0] > 10 * errors[1] > 100 * errors[2]
    assert counts[0] < counts[1] < counts[2]


def test_atol_matters_where_the_weights_are_small():
    """Without a logarithmic level the only tolerance is on the weights."""
    bowl = fs.Quadratic(torch.diag(torch.tensor([1.0, 30.0])).double(), torch.zeros(2).double())
    w0 = torch.tensor([[1e-6, 1e-6]]).double()
    counts = []
    for atol in (1e-11, 1e-6):
        rule = fs.SteepestFlow(fs.L2(), rtol=1e-7, atol=atol, clock=TIME, method=DOPRI5)
        counts.append(fs.simulate(bowl, rule, w0, until=fs.time([1.0]))["steps"][-1, 0])
    assert counts[0] > counts[1]


def test_the_clock_changes_the_pattern_of_steps():
    counts = {
        c.name: flow("square", "exponential", fs.lam([3.0]), clock=c)["steps"][-1, 0]
        for c in (LAM, TIME)
    }
    assert counts["lam"] != counts["time"]


def test_gradients_accepted_and_rejected_are_counted():
    run = flow("square", "exponential", fs.arclength([1.0]), rtol=1e-7)
    tallies = {name: float(value) for name, value in run.final.tallies.items()}
    assert tallies["accepted"] == float(run.final.readings["steps"])
    assert tallies["gradients"] == 1 + 6 * (tallies["accepted"] + tallies["rejected"])

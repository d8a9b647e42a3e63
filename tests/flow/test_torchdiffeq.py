"""Solvers of torchdiffeq as methods of a flow."""

import math

import pytest

import flowsim as fs
from flowsim.motion.clocks import LAM, TIME
from tests.oracles.scipy_flows import (
    by_arclength,
    by_lam,
    distance,
    flow,
)


@pytest.mark.parametrize("method", ["dopri8", "bosh3", "fehlberg2", "adaptive_heun"])
def test_every_solver_of_torchdiffeq_can_be_named(method):
    run = flow(
        "square", "logistic", fs.arclength([0.5, 1.0]), rtol=1e-4, method=fs.TorchDiffEq(method)
    )
    assert distance(run.weights[-1, 0], by_arclength("square", "logistic", 1.0)) < 1e-3


def test_torchdiffeq_needs_save_points_on_its_own_clock():
    with pytest.raises(
        ValueError, match="integrates on the arclength clock, but save points are on lam; try"
    ):
        flow("square", "exponential", fs.lam([1.0]), method=fs.TorchDiffEq("dopri5"))


@pytest.mark.parametrize("clock", [LAM, TIME], ids=lambda c: c.name)
def test_torchdiffeq_on_its_own_clock_agrees_with_scipy(clock):
    reference, log_time = by_lam("square", "logistic", 3.0)
    until = fs.lam([1.0, 3.0]) if clock is LAM else fs.time([1.0, math.exp(log_time)])
    run = flow("square", "logistic", until, rtol=1e-7, clock=clock, method=fs.TorchDiffEq("dopri5"))
    assert distance(run.weights[-1, 0], reference) < 1e-5
    assert run["log_time"][-1, 0] == pytest.approx(log_time, abs=1e-5)
    assert run["lam"][-1, 0] == pytest.approx(3.0, abs=1e-5)

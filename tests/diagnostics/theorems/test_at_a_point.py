"""Theorems at a point: at the end of flows in many norms, and on what is no flow."""

from dataclasses import replace

import numpy as np
import pytest
import torch

import flowsim as fs
from flowsim import identities
from flowsim.motion.state import initial_state
from tests.oracles.observed_flows import (
    CASES,
    KINKED,
    START,
    X,
    Y,
    observed_flow,
)

POINTWISE = [
    identities.chain_rule,
    identities.least_dual,
    identities.growth,
    identities.soft_hard,
    identities.euler,
    identities.level_rate,
    identities.force,
    identities.slack,
    identities.weight,
    identities.turning,
    identities.smooth_force,
    identities.nearby,
]
EQUALITIES = [
    identities.chain_rule,
    identities.growth,
    identities.euler,
    identities.level_rate,
    identities.weight,
]


@pytest.fixture(params=CASES)
def flow(request):
    return observed_flow(request.param)


def worst(check):
    return float(np.nanmax(np.asarray(check.residual)))


@pytest.mark.parametrize("identity", POINTWISE, ids=lambda f: f.__name__)
def test_it_holds_at_the_end_of_a_flow(flow, identity):
    problem, norm, run = flow
    check = identity(problem, run.final, norm)
    assert check.holds
    assert np.isfinite(worst(check))


@pytest.mark.parametrize("identity", EQUALITIES, ids=lambda f: f.__name__)
def test_equalities_hold_to_1e_8_at_the_end_of_every_step_of_a_net_that_slides(identity):
    state = fs.simulate(
        KINKED, fs.SteepestFlow(fs.L2(), rtol=1e-2), START, until=fs.lam(10.0, saves=2)
    ).final
    held = 0
    for _ in range(8):
        state = fs.simulate(
            KINKED,
            fs.SteepestFlow(fs.L2(), rtol=1e-2),
            state,
            until=fs.lam([float(state.readings["lam"]) + 1.0]),
        ).final
        held += int(state.tallies["sliding"])
        assert worst(identity(KINKED, state, fs.L2())) < 1e-8
    assert held > 20


def test_the_two_ways_to_the_divergence_agree_and_the_force_has_the_size_of_the_weights(flow):
    problem, norm, run = flow
    at = fs.diagnostics.Stationarity.of(problem, run.final, norm)
    assert float((at.divergence - at.bregman).abs() / at.size**2) < 1e-10
    assert float((at.norm.dual(at.force) / at.size - 1).abs()) < 1e-10
    assert worst(identities.force(problem, run.final, norm)) < 1e-10


def test_the_gradient_that_autograd_takes_fails_where_the_flow_slides():
    run = fs.simulate(KINKED, fs.SteepestFlow(fs.L2(), rtol=1e-3), START, until=fs.lam([30.0]))
    autograd = replace(run.final, multipliers=None)
    for identity in (identities.least_dual, identities.chain_rule):
        assert identity(KINKED, run.final, fs.L2()).holds
    h, own = (fs.diagnostics.dual(fs.L2())(KINKED, s) for s in (autograd, run.final))
    assert float(h / own) > 1.1
    alpha = [fs.diagnostics.alignment(fs.L2())(KINKED, s) for s in (autograd, run.final)]
    assert float(1 - alpha[0]) > 5 * float(1 - alpha[1])


def test_before_separation_nothing_is_claimed():
    problem = fs.Problem(fs.Linear(1), [[1.0], [-1.0]], [1, 1], fs.exponential)
    state = initial_state(problem, torch.tensor([[0.3]], dtype=torch.float64))
    for identity in (
        identities.growth,
        identities.level_rate,
        identities.force,
        identities.slack,
        identities.weight,
    ):
        check = identity(problem, state, fs.L2())
        assert torch.isnan(check.residual).all()
        assert check.holds  # vacuously
    assert identities.euler(problem, state, fs.L2()).holds


def test_identities_of_the_exponential_loss_say_so():
    problem = fs.Problem(fs.Linear(5), X, Y, fs.logistic)
    with pytest.raises(
        ValueError, match="got the logistic loss, expected an exponential tail.*try"
    ):
        identities.growth(problem, initial_state(problem, problem.net.init(0)), fs.L2())

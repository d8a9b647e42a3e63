"""Theorems along runs: of flows in many norms, and of paths that are no flows."""

from dataclasses import replace

import numpy as np
import pytest
import torch

import flowsim as fs
from flowsim import identities
from tests.oracles.observed_flows import (
    CASES,
    FIXTURE,
    SMOOTH,
    observed_flow,
)


@pytest.fixture(params=CASES)
def flow(request):
    return observed_flow(request.param)


def worst(check):
    return float(np.nanmax(np.asarray(check.residual)))


@pytest.mark.parametrize(
    "identity",
    [identities.monotone, identities.growth_in_time, identities.aligning],
    ids=lambda f: f.__name__,
)
def test_it_holds_along_a_flow(flow, identity):
    _, norm, run = flow
    check = identity(run, norm)
    assert check.holds
    assert np.isfinite(check.residual).sum() > 20


def test_the_sharp_constant_of_time_is_reached_within_its_bound(flow):
    _, norm, run = flow
    check = identities.sharp_time(run, norm)
    assert (check.residual[-20:] <= check.bound[-20:]).all()
    assert 0 < check.residual[-1, 0] < 0.15


def test_energy_balances_over_the_saves_and_over_the_steps(flow):
    _, norm, run = flow
    assert worst(identities.energy(run, norm)) < 2e-2  # of the quadrature over 120 saves
    late = run["lam"][1:, 0] > 1
    assert identities.dissipation(run).residual[late].max() < 5e-3


def test_a_wide_net_balances_its_energy_by_the_selected_gradient_and_not_by_autograds():
    problem, w0 = fs.data.peers_net(d=20, width=64, n=50, seed=0)
    observe = {
        "dual_l2": fs.diagnostics.dual(fs.L2()),
        "autograd": lambda p, s: p.ascent(s.w)[1].norm(dim=-1),
    }
    times = np.geomspace(3, 30, 150)
    run = fs.simulate(
        problem, fs.SteepestFlow(fs.L2(), rtol=1e-3), w0, until=fs.time(times), observe=observe
    )
    assert run["tally_sliding"][1:].min() > 150
    late = {name: value[1:] for name, value in run.values.items()}
    assert worst(identities.energy(replace(run, values=late), fs.L2())) < 1e-3
    wrong = identities.energy(replace(run, values=late | {"dual_l2": late["autograd"]}), fs.L2())
    assert wrong.residual[-1, 0] > 0.5


def test_identities_of_the_gradient_fail_in_another_norm_than_that_of_the_path():
    """What is not a flow in ℓ∞ breaks the inequality between α and the growth of the margin."""
    observe = fs.diagnostics.standard(SMOOTH, norms=[fs.L2(), fs.Linf()])
    w0 = SMOOTH.net.init(0, scale=0.5)
    run = fs.simulate(
        SMOOTH, fs.SteepestFlow(fs.L2()), w0, until=fs.lam(30.0, saves=120), observe=observe
    )
    assert not identities.aligning(run, fs.Linf()).holds
    assert not identities.energy(run, fs.Linf(), 0.1).holds


@pytest.mark.parametrize("norm", [fs.L1(), fs.L2(), fs.Linf()], ids=lambda n: n.name)
def test_a_linear_model_stays_between_its_bounds(norm):
    best = {"l1": 17 / 15, "l2": np.sqrt(53 / 17), "linf": 5 / 2}[norm.name]
    observe = fs.diagnostics.standard(FIXTURE, norms=[norm])
    w0 = torch.zeros(1, 3, dtype=torch.float64)
    run = fs.simulate(
        FIXTURE, fs.SteepestFlow(norm, rtol=1e-6), w0, until=fs.arclength(9.0), observe=observe
    )
    assert identities.linear_margin(run, norm, best).holds
    assert not identities.linear_margin(run, norm, 1.05 * best).holds
    gap = best - run[f"margin_{norm.name}"][-1, 0]
    assert 0 < gap < np.log(3) / 9


@pytest.mark.parametrize("norm", [fs.L1(), fs.L2(), fs.Linf(), fs.Lp(4.0)], ids=lambda n: n.name)
def test_residuals_of_two_regressions_approach_each_other(norm):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(6, 4, generator=generator, dtype=torch.float64)
    problem = fs.Problem(fs.Linear(4), x, torch.arange(6.0).double(), fs.squared)
    until = fs.time([0.01, 0.03, 0.1, 0.3, 1.0, 3.0])
    rule = fs.SteepestFlow(norm, rtol=1e-4)
    one, other = (
        fs.simulate(problem, rule, problem.net.init(seed), until=until) for seed in (0, 1)
    )
    check = identities.contraction(problem, one, other)
    assert (check.residual <= 1e-5).all()  # the error of the saves
    assert check.residual.min() < -0.01

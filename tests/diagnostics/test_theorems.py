"""Theorems as numbers: along flows of nets and linear models in many norms, and on paths that are
no flows."""

from dataclasses import replace

import numpy as np
import pytest
import torch

import flowsim as fs
from flowsim import identities
from flowsim.diagnostics.selected import selected_sides
from flowsim.diagnostics.theorems import Check
from flowsim.motion.state import initial_state

FIXTURE = fs.Problem(fs.Linear(3), [[3, 1, 0], [1, -2, 2], [1, 2, 1]], [1, 1, 1], fs.exponential)
KINKED, START = fs.data.peers_net(5, 10, 10, seed=0)
X, Y = KINKED.x, KINKED.y
SMOOTH = fs.Problem(fs.MLP([5, 10, 1], activation=fs.squared_relu), X, Y, fs.exponential)
CLASSES = fs.Problem(
    fs.MLP([5, 10, 3], activation=fs.squared_relu), X, torch.arange(10) % 3, fs.pairwise_exponential
)
CASES = {
    "relu, l2": (KINKED, fs.L2()),
    "relu, mahalanobis": (KINKED, fs.Mahalanobis(torch.linspace(0.5, 2, 60, dtype=torch.float64))),
    "smooth, l2": (SMOOTH, fs.L2()),
    "smooth, l3": (SMOOTH, fs.Lp(3.0)),
    "classes, l2": (CLASSES, fs.L2()),
    "linear, l1": (FIXTURE, fs.L1()),
    "linear, linf": (FIXTURE, fs.Linf()),
    "linear, spectral": (FIXTURE, fs.Spectral()),
}
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


@pytest.fixture(scope="module", params=CASES)
def flow(request):
    problem, norm = CASES[request.param]
    w0 = START if problem is KINKED else problem.net.init(0, scale=0.5)
    observe = fs.diagnostics.standard(problem, norms=[norm])
    rule = fs.SteepestFlow(norm, rtol=1e-3)
    run = fs.simulate(
        problem, rule, w0, until=fs.lam(30.0, saves=120), observe=observe, max_steps=5000
    )
    assert run.statuses == [fs.Status.DONE]
    return problem, norm, run


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
    assert check.residual[-1, 0] < 0.15


def test_energy_balances_over_the_saves_and_over_the_steps(flow):
    _, norm, run = flow
    assert worst(identities.energy(run, norm)) < 2e-2  # of the quadrature over 120 saves
    late = run["lam"][1:, 0] > 1
    assert identities.dissipation(run).residual[late].max() < 5e-3


def test_the_gradient_that_autograd_takes_fails_where_the_flow_slides():
    run = fs.simulate(KINKED, fs.SteepestFlow(fs.L2(), rtol=1e-3), START, until=fs.lam([30.0]))
    autograd = replace(run.final, multipliers=None)
    for identity in (identities.least_dual, identities.chain_rule):
        assert identity(KINKED, run.final, fs.L2()).holds
    h, own = (fs.diagnostics.dual(fs.L2())(KINKED, s) for s in (autograd, run.final))
    assert float(h / own) > 1.1
    alpha = [fs.diagnostics.alignment(fs.L2())(KINKED, s) for s in (autograd, run.final)]
    assert float(1 - alpha[0]) > 5 * float(1 - alpha[1])


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


def test_neurons_keep_their_balance_in_l2_and_reach_it_in_the_limit():
    observe = {
        "kept": lambda p, s: (lambda a, b: a**2 - b**2)(*identities.neuron_balance(p, s, fs.L2())),
        "ratio": lambda p, s: (lambda a, b: a / b)(*identities.neuron_balance(p, s, fs.L2())),
    }
    run = fs.simulate(
        KINKED,
        fs.SteepestFlow(fs.L2(), rtol=1e-3),
        START,
        until=fs.lam([1.0, 60.0]),
        observe=observe,
    )
    kept, ratio = run["kept"][:, 0], run["ratio"][:, 0]
    assert np.abs(kept - kept[0]).max() < 1e-2 * np.abs(kept[0]).max()
    alive = (KINKED.x @ KINKED.layout[0].of(run.final.w)[0].mT > 1e-9).any(0).numpy()
    assert np.abs(ratio[-1][alive] - 1).max() < 0.2 < np.abs(ratio[0][alive] - 1).max()


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


def test_the_radial_speed_is_the_derivative_of_the_norm():
    for norm in (fs.L1(), fs.L2(), fs.Linf(), fs.Lp(3.0), fs.modular(SMOOTH.layout)):
        w = SMOOTH.net.init(0)
        state = initial_state(SMOOTH, w)
        u, bound = SMOOTH.net.init(1), norm.bind(SMOOTH.layout)
        step = (bound.value(w + 1e-7 * u) - bound.value(w)) / 1e-7
        torch.testing.assert_close(
            identities.radial(SMOOTH, state, norm, u), step, rtol=1e-5, atol=1e-6
        )


def test_the_rise_along_a_direction_is_the_derivative_of_the_level_also_on_kinks():
    run = fs.simulate(KINKED, fs.SteepestFlow(fs.L2(), rtol=1e-3), START, until=fs.lam([5.0]))
    sides = selected_sides(KINKED, run.final)
    assert ((sides > 0) & (sides < 1)).any()
    w, u = (
        run.final.w,
        torch.randn(1, 60, generator=torch.Generator().manual_seed(0), dtype=torch.float64),
    )
    step = (KINKED.lam(w + 1e-7 * u) - KINKED.lam(w)) / 1e-7
    torch.testing.assert_close(identities.rise(KINKED, run.final, u), step, rtol=1e-5, atol=1e-6)


def test_a_check_counts_only_what_is_known():
    assert Check(np.array([np.nan, 1.0]), 1.0).holds
    assert not Check(torch.tensor([0.0, 2.0]), torch.tensor([1.0, 1.0])).holds

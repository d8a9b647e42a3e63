"""Max-margin directions: linear models against convex solvers, and deep late phases without a
warning."""

import math
import warnings

import numpy as np
import pytest
import torch

import flowsim as fs
from flowsim.exact.optima import game

N, D = 20, 5
X, Y = fs.data.gaussian_separable(N, D, margin=1.0, seed=range(2))
NORMS = {"l1": fs.L1(), "l2": fs.L2(), "linf": fs.Linf()}


def gap_over_bound(name, dlam, seeds, points):
    """(γ* − γ)/γ* at each save point over its proven bound log n/(Λ + log n), small steps from w =
    0."""
    norm, (x, y) = NORMS[name], fs.data.gaussian_separable(N, D, margin=1.0, seed=seeds)
    problem, w0 = (
        fs.Problem(fs.Linear(D), x, y, fs.exponential),
        torch.zeros(len(seeds), D, dtype=torch.float64),
    )
    observe = {"margin": fs.diagnostics.margin(norm)}
    rule = fs.SmallStep(norm, dlam=dlam)
    run = fs.simulate(problem, rule, w0, until=fs.lam(points), observe=observe, strict=True)
    best = np.array([game(a * b[:, None], norm).margin for a, b in zip(x, y, strict=True)])
    gap = (best - run["margin"][1:]) / best
    assert (gap >= -1e-9).all()
    return gap * (run["lam"][1:] + math.log(N)) / math.log(N)


@pytest.mark.parametrize("name", NORMS)
def test_small_steps_reach_the_largest_margin_at_the_proven_rate(name):
    assert (gap_over_bound(name, 0.1, range(8), [1.0, 10.0, 100.0]) <= 1).all()


@pytest.mark.parametrize("last", [1000.0, pytest.param(1e4, marks=pytest.mark.slow)])
@pytest.mark.parametrize(("name", "dlam"), [("l1", 0.5), ("l2", 1.0), ("linf", 0.5)], ids=NORMS)
def test_small_steps_keep_the_proven_rate_into_the_late_phase(name, dlam, last):
    assert (gap_over_bound(name, dlam, [0], [10.0, 100.0, last]) <= 1).all()


@pytest.mark.parametrize(
    ("name", "seed", "lam"), [("l1", 3, 500.0), ("linf", 7, 100.0)], ids=["l1", "linf"]
)
def test_coarse_steps_in_a_norm_with_ties_miss_the_largest_margin_and_fine_ones_do_not(
    name, seed, lam
):
    """Coarse steps jump over the tie that the flow slides on, and settle at a smaller margin for
    good."""
    coarse, fine = (gap_over_bound(name, dlam, [seed], [lam])[0, 0] for dlam in (2.0, 0.1))
    assert coarse > 1.5
    assert fine < 1


@pytest.mark.parametrize(
    "norm", [fs.L2(), fs.Lp(3.0), fs.Mahalanobis(torch.arange(1.0, D + 1).double())], ids=str
)
def test_flows_of_linear_models_reach_the_largest_margin_at_the_proven_rate(norm):
    """γ̃ ≥ (Λ(0) + γ*s)/s in arclength, against the dual certificate γ* ≤ ‖∇Λ‖_*."""
    problem = fs.Problem(fs.Linear(D), X, Y, fs.exponential)
    observe = {
        "margin": fs.diagnostics.margin(norm),
        "dual": lambda p, s: norm.dual(p.ascent(s.w)[1]),
    }
    w0 = torch.zeros(2, D, dtype=torch.float64)
    run = fs.simulate(
        problem,
        fs.SteepestFlow(norm),
        w0,
        until=fs.lam(100.0, saves=20),
        observe=observe,
        strict=True,
    )
    margin, upper = run["margin"][1:], run["dual"][1:]
    assert (np.diff(upper, axis=0) <= 1e-6).all()  # ‖∇Λ‖_* falls to γ*
    assert (margin <= upper[-1] + 1e-9).all()
    # with the smallest certificate in the place of γ*
    assert (margin[-1] >= (1 - math.log(N) / (100 + math.log(N))) * upper[-1] - 1e-6).all()
    if norm == fs.L2():
        best = [game(X[b] * Y[b, :, None], norm).margin for b in range(2)]
        assert (upper[-1] >= np.array(best) - 1e-9).all()
        assert ((best - margin[-1]) / best <= math.log(N) / (100 + math.log(N))).all()


@pytest.mark.parametrize("norm", NORMS.values(), ids=NORMS)
def test_a_relu_net_reaches_lam_5000_with_finite_numbers_and_without_a_warning(norm):
    x, y = fs.data.gaussian_separable(12, 4, margin=0.5, seed=0)
    net = fs.MLP([4, 8, 1], activation=fs.relu)
    problem = fs.Problem(net, x, y, fs.logistic)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        observe = fs.diagnostics.standard(problem, test=(x, y))
        rule = fs.SmallStep(norm, dlam=4.0)
        run = fs.simulate(
            problem,
            rule,
            net.init([0, 1]),
            until=fs.lam(5000.0, saves=12),
            observe=observe,
            strict=True,
        )
    for name in run.names:
        assert np.isfinite(run[name][1:]).all(), name
    assert np.isfinite(run.weights).all()
    assert run["lam"][-1] == pytest.approx(5000.0, rel=1e-3)
    assert (run["accuracy"][-1] == 1).all()
    assert (run[f"alignment_{norm.name}"][-1] <= 1 + 1e-12).all()
    assert run["log_time"][-1] == pytest.approx(5000.0, abs=50)

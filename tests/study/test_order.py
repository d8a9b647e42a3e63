"""Orders of approach: fitted, with intervals, and those of known methods."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.stats import binom

import flowsim as fs
from flowsim.flow.dissipation import SmoothSign
from flowsim.study.order import Order
from tests.oracles.bowls import BOWL, CORNERS, FINE, FLOW, LADDER


@pytest.fixture(scope="module")
def bowl():
    rules = {f"{lr:g}": fs.GradientDescent(lr) for lr in (0.1, 0.05)}
    return fs.compare(BOWL, FLOW, rules, CORNERS, until=fs.time(2.0, saves=9))


def test_intervals_of_the_median_cover_it_as_often_as_they_say():
    generator = np.random.default_rng(0)
    for n in (5, 8, 12):
        orders = [Order.of(generator.exponential(size=n)) for _ in range(4000)]
        held = np.mean([order.low <= np.log(2) <= order.high for order in orders])
        assert held == pytest.approx(orders[0].coverage, abs=0.015)
        k = np.searchsorted(np.sort(orders[0].each), orders[0].low)
        assert orders[0].coverage == pytest.approx(1 - 2 * binom.cdf(k, n, 0.5))
    assert Order.of(np.arange(5.0)).coverage == pytest.approx(0.9375)
    assert Order.of(np.array([1.0, np.nan, 3.0])).median == 2
    assert np.isnan(Order.of(np.full(3, np.nan)).median)


def test_orders_are_those_of_lines_in_logarithms(bowl):
    study = fs.order_study(
        BOWL, fs.GradientDescent, CORNERS, ladder=(0.04, 0.02, 0.01), until=fs.time(2.0, saves=5)
    )
    for power in (0.5, 1.0, 2.0):
        made = {
            label: {
                at: {"apart_weights": np.full((2, 3), 7 * lr**power)}
                for at in ("log_time", "nearest")
            }
            for label, lr in zip(study.comparison.labels, study.ladder, strict=True)
        }
        exact = replace(study, comparison=replace(study.comparison, matched=made))
        assert exact.order().each == pytest.approx([power] * 3)


def fitted(problem, method, w0, until, *, flow=None, at="log_time", what="weights", ladder=LADDER):
    study = fs.order_study(problem, method, w0, ladder=ladder, until=until, flow=flow)
    return study, study.order(what, at)


def separable(net, seeds=range(5), scale=0.7):
    x, y = fs.data.gaussian_separable(12, 5, margin=0.3, seed=0)
    problem = fs.Problem(net, x, y, fs.logistic)
    return problem, problem.net.init(seeds, scale=scale)


def test_gradient_descent_approaches_the_flow_of_a_smooth_net_at_first_order():
    problem, w0 = separable(fs.MLP([5, 6, 1], activation=fs.squared_relu))
    flow = fs.SteepestFlow(fs.L2(), rtol=1e-8, method=fs.DOPRI5)
    _, order = fitted(problem, fs.GradientDescent, w0, fs.time(0.5, saves=6), flow=flow)
    assert order.low > 0.9
    assert order.high < 1.1
    assert order.median == pytest.approx(1.0, abs=0.02)


def test_sign_and_coordinate_descent_approach_the_sliding_flows_of_a_linear_model_at_first_order():
    """The flows are exact, and slide along ties."""
    problem, w0 = separable(fs.Linear(5), scale=1.0)
    cases = {
        "sign": (fs.Linf(), lambda lr: fs.SignDescent(lr, normalized=True)),
        "coordinate": (fs.L1(), lambda lr: fs.CoordinateDescent(lr, normalized=True)),
    }
    for name, (norm, method) in cases.items():
        flow = fs.SteepestFlow(norm)
        study, order = fitted(
            problem, method, w0, fs.arclength(2.0, saves=6), flow=flow, at="arclength"
        )
        assert order.median == pytest.approx(1.0, abs=0.2), name
        assert (study.comparison.flow["tally_events"][-1] > 0).all(), name


def test_sign_descent_of_a_relu_net_settles_beside_the_steepest_flow_of_linf():
    """Learning rates of ratio four agree with each other, and not with the flow: it raises Λ
    faster, to a larger margin. What they tend to is the subject of `study.small_steps`."""
    problem, w0 = fs.data.peers_net(d=5, width=8, n=10, seed=0)
    flow = fs.SteepestFlow(fs.Linf(), rtol=1e-3)
    rules = {f"{lr:g}": fs.SignDescent(lr, normalized=True) for lr in (1e-3, 2.5e-4)}
    found = fs.compare(problem, flow, rules, w0, until=fs.lam([-1.0, 0.0, 1.0, 2.0, 3.0]))
    coarse, fine = (
        found[label, "margin_linf", "lam"][-1, 0] / found.flow["margin_linf"][-1, 0]
        for label in rules
    )
    assert coarse == pytest.approx(fine, abs=0.01)
    assert fine == pytest.approx(-0.11, abs=0.02)
    ours, flows = found.slopes("0.00025")
    assert ours[-1, 0] / flows[-1, 0] == pytest.approx(0.82, abs=0.03)
    assert 0.2 < found["0.00025", "direction", "lam"][-1, 0] < 0.4


@pytest.mark.slow
def test_gradient_descent_approaches_the_sliding_flow_of_a_relu_net_at_first_order():
    """Up to four pairs slide, and none is released: within a branch."""
    problem, w0 = separable(fs.MLP([5, 8, 1]), seeds=range(6))
    flow = fs.SteepestFlow(fs.L2(), rtol=1e-5)
    study, order = fitted(
        problem, fs.GradientDescent, w0, fs.time(0.6, saves=10), flow=flow, ladder=FINE
    )
    assert (study.comparison.flow["tally_releases"][-1] == 0).all()
    assert (study.comparison.flow["tally_sliding"].max(0) > 0).sum() >= 3
    assert 0.8 < order.low <= order.high < 1.2


@pytest.mark.slow
@pytest.mark.parametrize("normalized", [False, True])
def test_spectral_descent_approaches_the_flow_of_a_linear_model_at_first_order(normalized):
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(12, k, generator=generator, dtype=torch.float64) for k in (3, 2))
    problem = fs.Problem(fs.MLP([3, 2]), x, y, fs.squared)
    w0 = problem.net.init(range(6), scale=1.0)
    until, at, unit = (
        (fs.arclength(0.7, saves=12), "arclength", 1)
        if normalized
        else (fs.time(0.03), "log_time", 10)
    )
    flow = fs.SteepestFlow(fs.Spectral(), rtol=1e-7)

    def method(lr):
        return fs.SteepestDescent(fs.Spectral(), lr / unit, normalized)

    _, order = fitted(problem, method, w0, until, flow=flow, at=at, ladder=FINE)
    assert 0.8 < order.low <= order.high < 1.2
    assert order.median == pytest.approx(1.0, abs=0.1)


@pytest.mark.slow
@pytest.mark.parametrize("eps", [0.1, 1.0])
def test_adam_without_averages_approaches_the_flow_of_the_smooth_sign_at_first_order(eps):
    problem, w0 = separable(fs.MLP([5, 8, 1], activation=fs.squared_relu), seeds=range(6))
    flow = fs.DissipationFlow(SmoothSign(eps), rtol=1e-9)

    def method(lr):
        return fs.Adam(lr, betas=(0.0, 0.0), eps=eps)

    _, order = fitted(problem, method, w0, fs.time(0.6, saves=10), flow=flow, ladder=FINE)
    assert 0.98 < order.low <= order.high < 1.02


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["sign", "coordinate", "spectral"])
def test_descent_of_a_smooth_net_in_norms_with_ties_settles_at_first_order(kind):
    """`SteepestFlow` refuses these norms, and a finer run stands in its place."""
    problem, w0 = separable(fs.MLP([5, 8, 1], activation=fs.squared_relu), seeds=range(6))
    norm = {"sign": fs.Linf(), "coordinate": fs.L1(), "spectral": fs.modular(problem.layout)}[kind]
    with pytest.raises(ValueError, match="has ties"):
        fs.SteepestFlow(norm).start(problem, w0)

    def method(lr):
        return fs.SteepestDescent(norm, lr, normalized=True)

    until = fs.arclength({"sign": 0.32, "coordinate": 0.64, "spectral": 0.32}[kind], saves=10)
    _, order = fitted(problem, method, w0, until, at="arclength", ladder=FINE)
    assert order.median == pytest.approx(1.0, abs=0.2)


def test_rates_without_a_flow_are_held_against_an_eighth_of_the_last():
    ladder = (0.04, 0.02, 0.01)
    study, order = fitted(BOWL, fs.GradientDescent, CORNERS, fs.time(2.0, saves=5), ladder=ladder)
    assert "lr = 0.00125" in study.comparison.flow.label
    assert 1 < order.median < 1.15

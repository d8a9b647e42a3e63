"""Discrete runs beside a flow: distances against closed forms, orders of approach."""

from dataclasses import FrozenInstanceError, replace

import numpy as np
import pytest
import torch
from scipy.stats import binom

import flowsim as fs
from flowsim.flow.dissipation import SmoothSign
from flowsim.motion.clocks import ARCLENGTH, LAM, TIME
from flowsim.study.order import Order
from flowsim.study.traced_path import Traced, TracedPath

MATRIX, MINIMISER = [[2.0, 0.5], [0.5, 1.0]], [1.0, -1.0]
BOWL = fs.Quadratic(MATRIX, MINIMISER)
CORNERS = torch.tensor([[0.0, 0.0], [3.0, 1.0], [-1.0, 2.0]], dtype=torch.float64)
FINE = tuple(0.02 / 2**k for k in range(7))
LADDER = tuple(0.04 / 2**k for k in range(7))
FLOW = fs.SteepestFlow(fs.L2(), rtol=1e-9, method=fs.DOPRI5)


def solution(t, start):
    """Gradient flow of the bowl, ``(K, B, 2)`` at times ``(K, B)``."""
    values, vectors = np.linalg.eigh(np.array(MATRIX))
    inner = (start - np.array(MINIMISER)) @ vectors
    return (inner * np.exp(-values * t[..., None])) @ vectors.T + MINIMISER


@pytest.fixture(scope="module")
def bowl():
    rules = {f"{lr:g}": fs.GradientDescent(lr) for lr in (0.1, 0.05)}
    return fs.compare(BOWL, FLOW, rules, CORNERS, until=fs.time(2.0, saves=9))


# Paths


def traced(problem, rule, w0, until):
    kept = Traced(rule)
    fs.simulate(problem, kept, w0, until=until)
    return TracedPath.of(problem, kept)


def test_a_path_is_read_at_times_of_its_own_for_each_trajectory():
    path = traced(BOWL, FLOW, CORNERS, fs.time(2.0))
    t = torch.tensor([[0.0, 0.3, 1.1], [0.7, 1.9, 5.0]], dtype=torch.float64)
    state, inside = path.at(TIME, torch.log(t))
    assert inside.tolist() == [[True] * 3, [True, True, False]]
    exact = solution(t.numpy(), CORNERS.numpy()).reshape(6, 2)
    assert state.w[:5].numpy() == pytest.approx(exact[:5], abs=1e-6)
    assert state.readings["lam"] == pytest.approx(BOWL.lam(state.w))


def test_the_nearest_point_of_a_path_is_where_the_way_there_is_at_right_angles():
    path = traced(BOWL, FLOW, CORNERS, fs.time(2.0))
    there = torch.tensor(
        [[[0.5, 0.0], [1.5, 0.0], [0.3, 0.6]], [[0.4, 0.1], [2.0, 0.4], [0.0, 0.9]]]
    ).double()
    state = path.nearest(there)
    h = BOWL.ascent(state.w)[1]
    across = ((there.flatten(0, 1) - state.w) * h).sum(-1) / h.norm(dim=-1)
    assert across.abs().max() < 1e-6
    times = np.linspace(0, 2, 4001)[:, None].repeat(3, 1)
    grid = solution(times, CORNERS.numpy())
    least = np.linalg.norm(grid[:, None] - there.numpy(), axis=-1).min(0).ravel()
    assert (there.flatten(0, 1) - state.w).norm(dim=-1).numpy() == pytest.approx(least, abs=1e-5)


def test_nearest_points_do_not_depend_on_batch_mates_that_take_other_steps(agree):
    until = fs.time(2.0)
    batch, alone = traced(BOWL, FLOW, CORNERS, until), traced(BOWL, FLOW, CORNERS[1:2], until)
    there = torch.tensor(solution(np.linspace(0.1, 1.9, 40)[:, None].repeat(3, 1), CORNERS.numpy()))
    found = batch.nearest(there).w.view(40, 3, 2)
    agree(found[:, 1], alone.nearest(there[:, 1:2]).w)
    assert (found - there).abs().max() < 1e-7  # they are on the path


def test_indivisible_steps_are_read_as_straight_ones():
    path = traced(BOWL, fs.GradientDescent(0.25), CORNERS[:1], fs.steps([4]))
    first, second = CORNERS[:1], CORNERS[:1] + 0.25 * BOWL.ascent(CORNERS[:1])[1]
    for clock, value in ((TIME, np.log(0.1)), (ARCLENGTH, 0.4 * (second - first).norm().item())):
        state, _ = path.at(clock, torch.tensor([[value]], dtype=torch.float64))
        assert torch.allclose(state.w, first + 0.4 * (second - first))
        assert state.readings["log_time"].exp().item() == pytest.approx(0.1)


def test_a_level_that_falls_is_read_where_it_first_was():
    """Gradient descent beyond 2/λ_max: it comes down the valley, and then climbs its sides."""
    path = traced(
        BOWL, fs.GradientDescent(0.95), torch.tensor([[0.8, 0.0]]).double(), fs.steps([6])
    )
    ends = path.steps.readings1["lam"][:, 0]
    assert (ends.diff() < 0).any()
    state, inside = path.at(LAM, ends.max()[None, None])
    assert inside.all()
    assert state.readings["steps"].item() == pytest.approx(1 + int(ends.argmax()))


def test_a_method_whose_steps_cannot_be_read_is_refused():
    flow = fs.SteepestFlow(fs.L2(), method=fs.TorchDiffEq("dopri5"))
    with pytest.raises(ValueError, match="cannot be read inside, expected one of flowsim's own"):
        fs.compare(BOWL, flow, fs.GradientDescent(0.1), CORNERS, until=fs.arclength(1.0, saves=3))


# Comparisons


def test_distances_at_equal_time_are_those_from_the_closed_form(bowl):
    for label, run in bowl.runs.items():
        w, v = run.weights[1:], solution(np.exp(run["log_time"][1:]), CORNERS.numpy())
        size = np.linalg.norm(v, axis=-1)
        apart = np.linalg.norm(w - v, axis=-1) / size
        turned = np.linalg.norm(
            w / np.linalg.norm(w, axis=-1, keepdims=True) - v / size[..., None], axis=-1
        )
        for what, expected in (("weights", apart), ("direction", turned)):
            assert bowl[label, what, "log_time"][1:] == pytest.approx(expected, abs=2e-6)
            assert (bowl[label, what, "log_time"][0] == 0).all()  # at the origin too


def test_equal_levels_and_lengths_are_equal_and_the_nearest_point_is_nearest(bowl):
    for label in bowl.labels:
        for at in ("log_time", "lam", "arclength"):
            assert np.nanmax(np.abs(bowl[label, at, at])) < 1e-6
            assert (
                bowl[label, "weights", "nearest"] <= bowl[label, "weights", at] * 1.05 + 1e-9
            ).all()


def test_the_flow_goes_as_far_as_the_runs_on_every_clock(bowl):
    assert all(
        np.isfinite(bowl[label, "weights", at]).all()
        for label in bowl.labels
        for at in ("lam", "arclength")
    )


def test_slopes_are_rises_over_lengths(bowl):
    ours, flows = bowl.slopes("0.05")
    run = bowl.runs["0.05"]
    moved = np.diff(run["steps"], axis=0) > 0
    rise, walked = (np.diff(run[name], axis=0)[moved] for name in ("lam", "arclength"))
    assert ours[moved] == pytest.approx(rise / walked)
    assert np.median(ours[moved] / flows[moved]) == pytest.approx(1, abs=0.1)
    assert np.isnan(ours[~moved]).all()


def test_the_flow_of_a_comparison_is_the_run_of_simulate(bowl):
    run = fs.simulate(BOWL, FLOW, CORNERS, until=fs.time(2.0, saves=9))
    assert np.array_equal(bowl.flow.weights, run.weights)
    assert bowl.flow.provenance["rule"] == run.provenance["rule"]
    with pytest.raises(FrozenInstanceError):
        bowl.flow = run


def test_outputs_margins_and_runs_that_exist():
    x, y = fs.data.gaussian_separable(12, 4, margin=0.3, seed=0)
    problem = fs.Problem(fs.Linear(4), x, y, fs.logistic)
    w0 = problem.net.init(range(2), scale=0.5)
    observe = {"margin": fs.diagnostics.margin(fs.L2())}
    rule = fs.GradientDescent(0.05)
    run = fs.simulate(problem, rule, w0, until=fs.steps(100, saves=12), observe=observe)
    found = fs.compare(
        problem,
        FLOW,
        {"run": run, "rule": rule},
        w0,
        until=fs.steps(100, saves=12),
        observe=observe,
    )
    for what in ("outputs", "margin", "weights"):
        assert np.array_equal(found["run", what, "log_time"], found["rule", what, "log_time"])
    assert found.flow["log_time"][1:, 0] == pytest.approx(run["log_time"][1:, 0], abs=1e-9)
    gap = run["margin"] - found.flow["margin"]
    assert found["run", "margin", "log_time"][1:] == pytest.approx(gap[1:], abs=1e-6)
    f = [(p.weights @ problem.x.numpy().T) for p in (run, found.flow)]
    relative = np.linalg.norm(f[0] - f[1], axis=-1) / np.linalg.norm(f[1], axis=-1)
    assert found["run", "outputs", "log_time"][1:] == pytest.approx(relative[1:], abs=1e-6)


def test_a_run_that_diverges_leaves_nan_and_the_flow_in_peace():
    rules = {"far": fs.GradientDescent(1e200), "near": fs.GradientDescent(0.01)}
    found = fs.compare(BOWL, FLOW, rules, CORNERS, until=fs.steps(20, saves=5))
    assert set(found.runs["far"].statuses) == {fs.Status.NONFINITE}
    assert np.isnan(found["far", "weights", "log_time"][-1]).all()
    assert np.isfinite(found["near", "weights", "log_time"]).all()


def test_what_is_asked_wrongly_is_said(bowl):
    with pytest.raises(KeyError, match="expected one of weights, direction, steps"):
        bowl["0.1", "angle", "lam"]
    with pytest.raises(KeyError, match="expected one of log_time, lam, arclength, nearest"):
        bowl["0.1", "weights", "time"]
    with pytest.raises(KeyError, match=r"expected \[label, what, at\]"):
        bowl["0.1"]
    with pytest.raises(ValueError, match="two rules labelled"):
        fs.compare(BOWL, FLOW, [fs.GradientDescent(0.1)] * 2, CORNERS, until=fs.time(1.0))
    with pytest.raises(ValueError, match="expected one start of all runs"):
        fs.compare(BOWL, FLOW, bowl.runs, CORNERS + 1, until=fs.time(1.0))
    with pytest.raises(ValueError, match="at least three falling"):
        fs.order_study(
            BOWL, fs.GradientDescent, CORNERS, ladder=(0.1, 0.2, 0.05), until=fs.time(1.0)
        )


# Orders


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
    faster, to a larger margin. What they tend to is the subject of `limits`."""
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

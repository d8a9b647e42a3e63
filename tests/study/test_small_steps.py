"""The limit of small steps: exact rates at kinks, the flow where it is the flow, stalls where it is
not."""

import math
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch

import flowsim as fs
from flowsim.study.small_steps import SmallStepLimit, gain_ratio, small_step_limit

ORIGIN = torch.zeros(1, 3, dtype=torch.float64)
AVERAGES = fs.PiecewiseQuadratic(slope=[-3.0, -1.0, 1.0], normals=[[1.0, 0.5, 0.1]], weights=[4.0])
STALLS = fs.PiecewiseQuadratic(slope=[-1.0, -0.6, -0.3], normals=[[1.0, 1.0, 1.0]], weights=[2.0])
LADDER = (0.02, 0.01, 0.005)


# Kinks, where directions are averaged: g⁻ = (−3, −1, 1), and a jump of 4·(1, ½, 1/10) across the
# kink


def test_small_steps_in_linf_tend_to_the_mean_of_directions():
    """Of signs (1, 1, −1) and (−1, −1, −1), the mixture (c, c, −1) stays on the kink: c + c/2 =
    1/10."""
    ladder = (0.008, 0.004, 0.002)
    limit = small_step_limit(
        AVERAGES, fs.Linf(), ORIGIN, until=fs.arclength(1.0, saves=6), ladder=ladder
    )
    assert limit.finest.weights[-1, 0] == pytest.approx([1 / 15, 1 / 15, -1], abs=2e-3)
    assert limit["lam"][-1, -1, 0] == pytest.approx(19 / 15, abs=2e-3)
    assert limit.verdicts("lam")[0].startswith("converged: lam 1.26")
    assert not limit.stalled
    assert np.isnan(limit.slope)
    assert fs.select(AVERAGES, fs.Linf(), ORIGIN).dual.item() == pytest.approx(1.8)


def test_small_steps_in_l2_tend_to_the_flow_there():
    limit = small_step_limit(
        AVERAGES, fs.L2(), ORIGIN, until=fs.arclength(1.0, saves=3), ladder=LADDER
    )
    flow = fs.select(AVERAGES, fs.L2(), ORIGIN)
    travelled = limit.finest.weights[-1, 0]
    assert travelled / np.linalg.norm(travelled) == pytest.approx(
        flow.direction[0].numpy(), abs=1e-2
    )
    assert limit["lam"][-1, -1, 0] / np.linalg.norm(travelled) == pytest.approx(
        flow.dual.item(), rel=1e-2
    )


def test_small_steps_may_stall_where_the_flow_goes_on():
    limit = small_step_limit(
        STALLS, fs.Linf(), ORIGIN, until=fs.arclength(1.0, saves=3), ladder=LADDER
    )
    assert np.abs(limit["lam"][-1]).max() <= LADDER[-1]
    assert limit.stalled
    assert limit.slope == pytest.approx(0.7)
    [verdict] = limit.verdicts("lam")
    assert verdict.startswith("stalls at a non-stationary point")
    assert verdict.endswith("the steepest flow rises with slope 0.7")


def test_a_minimum_at_a_kink_is_a_stationary_point():
    """F = −0.3 w + max(w, 0)."""
    minimum = fs.PiecewiseQuadratic(slope=[-0.3], normals=[[1.0]], weights=[1.0])
    limit = small_step_limit(
        minimum, fs.Linf(), ORIGIN[:, :1] - 0.2, until=fs.arclength(2.0, saves=5), ladder=LADDER
    )
    assert limit.slope == 0
    assert limit.verdicts("lam")[0].endswith("at a stationary point to within the step")


# ReLU nets


@cache
def peers(d, width, n, seed):
    return fs.data.peers_net(d, width, n, seed=seed)


def test_coordinate_descent_stalls_on_a_kink_of_a_relu_net():
    problem, w0 = peers(10, 16, 16, 0)
    ladder = (0.1, 0.05, 0.025)
    limit = small_step_limit(
        problem, fs.L1(), w0, until=fs.lam([-2.5, 0.0]), ladder=ladder, max_steps=1000
    )
    assert limit.stalled
    assert limit["margin"].shape == (3, 3, 1)
    assert np.isfinite(limit["margin"][:, 1]).all()
    assert np.isnan(limit["margin"][-1, 2])
    assert "stalls at a non-stationary point" in limit.verdicts()[0]
    assert 0.1 < limit.slope[0] < float(fs.L1().dual(problem.ascent(limit.finest.final.w)[1]))


def test_in_l2_margins_tend_to_those_of_the_flow_through_kinks():
    problem, w0 = peers(20, 16, 12, 0)
    until = fs.lam([0.0, 4.0])
    limit = small_step_limit(problem, fs.L2(), w0, until=until, ladder=LADDER)
    flow = fs.simulate(problem, fs.SteepestFlow(fs.L2()), w0, until=until, strict=True)
    margins = problem.margins(torch.from_numpy(flow.weights[1:, 0])).amin(-1).numpy()
    margins /= np.linalg.norm(flow.weights[1:, 0], axis=-1) ** 2
    off = np.abs(limit["margin"][-1, 1:, 0] - margins) / margins.max()
    assert (off <= limit.error("margin")[1:, 0] + 1e-3).all()
    assert limit.verdicts()[0].startswith("converged: margin 0.")
    assert flow["tally_sliding"][-1, 0] > 10


@pytest.mark.parametrize("lam", [0.0, 5.0])
def test_in_l2_tiny_steps_gain_as_much_as_the_flow(lam):
    """On the wide net, from a place where the flow slides on more than a hundred kinks."""
    problem, w0 = peers(20, 64, 50, 0)
    flow = fs.SteepestFlow(fs.L2())
    state = fs.simulate(problem, fs.SteepestFlow(fs.L2(), rtol=1e-3), w0, until=fs.lam([lam])).final
    assert state.tallies["sliding"] > 100
    ratio = gain_ratio(problem, flow, state, length=0.02 * float(state.w.norm()), tiny=1000)
    assert ratio.item() == pytest.approx(1, abs=2e-3)


@pytest.mark.parametrize(
    ("share", "tiny"),
    [(0.02, 500), pytest.param(0.1, 5000, marks=pytest.mark.slow)],
    ids=["short", "long"],
)
def test_in_linf_tiny_steps_gain_less_than_the_flow(share, tiny):
    """From one state, over one net arclength, on the wide net; in ℓ2 both gain the same."""
    problem, w0 = peers(20, 64, 50, 0)
    state = fs.simulate(problem, fs.SteepestFlow(fs.L2(), rtol=1e-3), w0, until=fs.lam([5.0])).final
    ratios = []
    for norm in (fs.L2(), fs.Linf()):
        length = share * float(norm.value(state.w))
        ratios.append(
            gain_ratio(
                problem, fs.SteepestFlow(norm, rtol=1e-3), state, length=length, tiny=tiny
            ).item()
        )
    assert ratios[0] == pytest.approx(1, abs=2e-3)
    assert ratios[1] > 1.05


@pytest.mark.parametrize(("seed", "lam"), [(0, 5.0), (1, 5.0), (2, 0.0)])
def test_in_linf_tiny_steps_rise_more_slowly_than_the_flow(seed, lam):
    """The slope of the flow at a place on many kinks, by a linear programme, against sign steps."""
    problem, w0 = peers(20, 32, 30, seed)
    state = fs.simulate(problem, fs.SteepestFlow(fs.L2(), rtol=1e-3), w0, until=fs.lam([lam])).final
    flow = fs.select(problem, fs.Linf(), state.w, state.multipliers)
    assert flow.gap < 1e-9
    for step in (4e-6, 1e-6):  # of the largest weight: the ratio is no matter of the step
        length = step * float(state.w.abs().max())
        run = fs.simulate(
            problem, fs.SignDescent(length, normalized=True), state.w, until=fs.steps([400])
        )
        rate = (run["lam"][-1, 0] - run["lam"][0, 0]) / run["arclength"][-1, 0]
        assert 1.05 < flow.dual.item() / rate < 1.2
    assert flow.dual < fs.Linf().dual(problem.ascent(state.w)[1])


# Smooth fields, where the limit is the flow in every norm


def smooth():
    x, y = fs.data.gaussian_separable(20, 5, margin=0.5, seed=0)
    net = fs.MLP([5, 8, 1], activation=fs.squared_relu)
    return fs.Problem(net, x, y, fs.exponential), net.init(range(2), scale=0.5)


def test_on_smooth_nets_the_limit_is_the_flow_and_the_order_is_one():
    problem, w0 = smooth()
    until = fs.lam([0.0, 1.0])
    limit = small_step_limit(problem, fs.L2(), w0, until=until, ladder=(0.04, 0.02, 0.01))
    rule = fs.SteepestFlow(fs.L2(), rtol=1e-6, method=fs.DOPRI5)
    flow = fs.simulate(problem, rule, w0, until=until, strict=True)
    exact = flow.weights / np.linalg.norm(flow.weights, axis=-1, keepdims=True)
    off = np.linalg.norm(limit["direction"][-1] - exact, axis=-1)
    assert limit.order("direction")[:, 1:] == pytest.approx(1, abs=0.2)
    assert limit.error("direction")[1:] == pytest.approx(off[1:], rel=0.3)
    assert all("order 1.0" in verdict for verdict in limit.verdicts("direction"))


def test_on_smooth_nets_the_gain_ratio_is_one_for_each_trajectory():
    problem, w0 = smooth()
    for norm in (fs.L2(), fs.Lp(3.0)):
        ratio = gain_ratio(problem, fs.SteepestFlow(norm), w0, length=0.05, tiny=500)
        assert ratio.tolist() == pytest.approx([1, 1], abs=2e-3)


def test_on_a_linear_model_in_linf_the_limit_is_the_exact_flow():
    x, y = fs.data.gaussian_separable(12, 4, margin=0.2, seed=0)
    problem = fs.Problem(fs.Linear(4), x, y, fs.exponential)
    w0 = torch.full((1, 4), 0.01, dtype=torch.float64)
    limit = small_step_limit(problem, fs.Linf(), w0, until=fs.lam([5.0]), ladder=LADDER)
    flow = fs.simulate(problem, fs.SteepestFlow(fs.Linf()), w0, until=fs.lam([5.0]), strict=True)
    assert limit.finest.weights[-1] == pytest.approx(flow.weights[-1], rel=5e-3)
    assert limit.verdicts()[0].startswith("converged")
    ratio = gain_ratio(problem, fs.SteepestFlow(fs.Linf()), flow.final, length=0.5, tiny=500)
    assert ratio.item() == pytest.approx(1, abs=2e-3)


# The report


def report(values, ladder=(0.4, 0.2, 0.1)):
    """A report of runs with these values (R, K) of one trajectory."""
    problem, w0 = smooth()
    run = fs.simulate(problem, fs.SmallStep(fs.L2()), w0[:1], until=fs.lam([-1.0, -0.5]))
    runs = tuple(replace(run, values=run.values | {"margin": np.array(v)[:, None]}) for v in values)
    return SmallStepLimit(ladder, runs, np.array([False]), np.array([math.nan]))


def test_differences_order_and_error_of_a_sequence_of_first_order():
    limit = report([[1.0, 2.4, 4.8], [1.0, 2.2, 4.4], [1.0, 2.1, 4.2]])
    assert limit.differences("margin")[:, :, 0] == pytest.approx(
        np.array([[0, 0.2, 0.4], [0, 0.1, 0.2]]) / 4.8
    )
    assert limit.order("margin")[0, 1:, 0] == pytest.approx(1)
    assert np.isnan(limit.order("margin")[0, 0, 0])
    assert limit.error("margin")[:, 0] == pytest.approx(
        np.array([0, 0.1, 0.2]) / 4.8
    )  # the limit is 1, 2, 4


def test_a_difference_that_is_small_by_chance_does_not_count():
    limit = report([[1.0, 2.0, 4.0], [1.0, 2.0, 3.0], [1.0, 2.0, 3.001]])
    assert limit.error("margin")[-1, 0] == pytest.approx(0.5 / 4)
    assert limit.verdicts()[0].startswith(
        "not converged: the two finest runs differ by 0.0% in margin"
    )


def test_a_sequence_that_scatters_is_converged_to_its_scatter_only():
    limit = report([[1.0, 2.0, 4.0], [1.0, 2.01, 4.01], [1.0, 2.0, 4.0]])
    assert limit.error("margin")[-1, 0] == pytest.approx(0.01 / 4.01 / (2**0.5 - 1))
    assert limit.verdicts()[0] == (
        "converged: margin 4 with an estimated error of 0.6%; differences no longer fall"
    )
    assert limit.verdicts(tol=1e-3)[0].startswith("not converged")


def test_runs_that_do_not_get_there_are_not_reached():
    problem, w0 = smooth()
    limit = small_step_limit(
        problem, fs.L2(), w0, until=fs.lam([0.0, 50.0]), ladder=LADDER, max_steps=200
    )
    assert [run.final.readings["steps"].max() for run in limit.runs] == [50, 100, 200]
    assert all(
        verdict.startswith("not reached: the runs stopped with MAX_STEPS, MAX_STEPS, MAX_STEPS")
        for verdict in limit.verdicts()
    )


@pytest.mark.parametrize(
    "ladder", [(0.1, 0.05), (0.1, 0.05, 0.05), (0.05, 0.1, 0.2), (0.1, 0.05, 0.0), (math.inf, 2, 1)]
)
def test_a_ladder_falls_and_has_three_steps(ladder):
    problem, w0 = smooth()
    with pytest.raises(
        ValueError, match="small_step_limit: got ladder=.*expected at least three falling steps"
    ):
        small_step_limit(problem, fs.L2(), w0, until=fs.lam(1.0), ladder=ladder)


def test_directions_need_weights():
    limit = report([[1.0, 2.0, 3.0]] * 3)
    bare = replace(limit, runs=tuple(replace(run, weights=None) for run in limit.runs))
    with pytest.raises(ValueError, match="direction: the runs hold no weights"):
        bare.differences("direction")

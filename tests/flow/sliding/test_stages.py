"""Both stages of a step along kinks: consistent with the kinks, and the W-method away from them."""

import pytest
import torch

import flowsim as fs
from flowsim.flow.field import sample_of
from flowsim.flow.sliding.forces import ActivePairs, Metric
from flowsim.flow.sliding.selection import between
from flowsim.flow.sliding.stages import (
    GAMMA,
    Impulses,
    StepStart,
    both_stages,
    multipliers_of_crossings,
    within_reach,
)

RULE = fs.SteepestFlow(fs.L2(), rtol=1e-3)
METRIC = Metric.of(fs.L2())


@pytest.fixture(scope="module")
def sliding():
    """A state of a net with pairs that slide."""
    problem, w0 = fs.data.peers_net(6, 8, 30, seed=1)
    state = fs.simulate(problem, RULE, w0, until=fs.lam([4.0]), strict=True).final
    assert float(state.tallies["sliding"]) > 3
    return problem, RULE.start(problem, state)


def started(problem, state, tau):
    tau = torch.full_like(state.step_size, tau)
    return StepStart.of(METRIC, problem.two_layer(1), state, sample_of(state), tau)


def test_pairs_that_are_held_end_on_their_kinks(sliding):
    problem, state = sliding
    start = started(problem, state, 1e-3)
    trial = both_stages(start, (), state.tallies["releases"])
    assert bool(trial.solved.all())
    end = problem.two_layer(1).at(trial.w)
    assert int(trial.stuck.sum()) > 3
    assert float(end.z[trial.stuck].abs().max()) < 1e-12
    slides = between(trial.multipliers) & trial.stuck
    assert torch.equal(slides, trial.stuck)
    others = start.coupling.pairs.mask & ~trial.stuck
    assert ((end.z[others] > 0) == (trial.multipliers[others] > 0.5)).all()


def test_without_kinks_in_reach_it_is_the_w_method():
    """Against M = (1 + γτJᵀSJ)⁻¹ among the weights."""
    problem, w0 = fs.data.peers_net(6, 8, 10, seed=2)
    state, tau = RULE.start(problem, w0), 1e-5
    start = started(problem, state, tau)
    assert not bool(start.coupling.pairs.mask.any())
    root = problem.curvature(w0)[0]
    M = torch.linalg.inv(torch.eye(w0.shape[1]).double() + GAMMA * tau * root.T @ root)
    k1 = M @ problem.ascent(w0)[1][0]
    w1 = w0[0] + tau * k1
    k2 = M @ (problem.ascent(w1[None])[1][0] - 2 * k1)
    trial = both_stages(start, (), state.tallies["releases"])
    torch.testing.assert_close(trial.w1[0], w1, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(
        trial.w[0], w0[0] + tau * (1.5 * k1 + 0.5 * k2), rtol=1e-12, atol=1e-14
    )
    assert not bool(trial.stuck.any())


def test_impulses_remember_what_came_before_the_arrival():
    problem, w0 = fs.data.peers_net(6, 8, 10, seed=2)
    point, j = problem.two_layer(1).at(w0), 0
    mask = torch.zeros_like(point.z, dtype=torch.bool)
    mask[0, :2, j] = True
    given = (point.z > 0).to(point.z)
    move = torch.zeros_like(point.z)
    move[0, 0, j] = -4 * point.z[0, 0, j]  # gets to its kink after a quarter of the step
    bounds = Impulses.of(ActivePairs.of(point, mask, METRIC), move, given)
    assert bounds.low[0, 0, j] == pytest.approx(0.25 * float(given[0, 0, j]))
    assert bounds.pairs.put(torch.zeros_like(point.z), bounds.width)[0, :2, j].tolist() == [0.75, 1]
    largest = bounds.largest(point.jump)
    assert largest.sum() == pytest.approx(-float((point.jump[0, :2, j] * bounds.width[0, 0]).sum()))


def test_a_pair_that_crosses_counts_the_share_of_the_step_on_each_side():
    z, z1 = torch.tensor([-1.0, 3.0, 2.0, 0.5]), torch.tensor([3.0, -1.0, 1.0, 0.0])
    given = torch.tensor([0.0, 1.0, 1.0, 0.3])
    assert multipliers_of_crossings(z, z1, given).tolist() == pytest.approx([1.5, 0.5, 1.0, 0.3])


def test_only_attracting_pairs_that_are_near_are_in_reach(sliding):
    problem, state = sliding
    point = problem.two_layer(1).at(state.w)
    velocity = sample_of(state).velocity
    near = [
        within_reach(METRIC, point, velocity, torch.tensor([tau]).double()) for tau in (1e-8, 1.0)
    ]
    assert not bool((near[0] & (point.jump >= 0)).any())
    assert not bool((near[0] & (point.z.abs() > 1e-4)).any())
    assert int(near[1].sum()) > int(near[0].sum())

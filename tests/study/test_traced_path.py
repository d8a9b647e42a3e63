"""Runs that are read at any of their points."""

import numpy as np
import pytest
import torch

import flowsim as fs
from flowsim.motion.clocks import ARCLENGTH, LAM, TIME
from flowsim.study.traced_path import Traced, TracedPath
from tests.oracles.bowls import BOWL, CORNERS, FLOW, solution


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

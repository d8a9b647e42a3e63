"""Branches of the flow after releases: each is a flow, takes the side that it was asked for, and
none is missed."""

from functools import cache
from itertools import product

import numpy as np
import pytest
import torch

import flowsim as fs
from flowsim.motion.clocks import LAM, Target
from flowsim.problems.kinks import release_sides

FLOW = fs.SteepestFlow(fs.L2(), rtol=1e-3)


def sided(sides, rtol=1e-3):
    return fs.SteepestFlow(fs.L2(), rtol=rtol, method=fs.KinkImplicit(sides))


@cache
def one_release():
    return fs.data.peers_net(60, 16, 10, seed=0)


@cache
def three_releases():
    return fs.data.peers_net(100, 64, 20, seed=1)


def three_releases_of(sides):
    problem, w0 = three_releases()
    return problem, sided(sides), w0


@cache
def fan_of_three():
    return fs.branch_fan(*both(three_releases()), until=fs.lam([0.0]), strict=True)


def both(pair):
    problem, w0 = pair
    return problem, FLOW, w0


# The rule of sides


def test_the_rule_of_sides():
    multipliers = torch.tensor([[0.2, 0.7, 0.5, 0.9, 0.1]])
    released = torch.tensor([[True, False, True, True, False]])
    for before, expected in (
        (
            0,
            [1, 1, 0, 1, 0],
        ),  # releases 0, 1 and 2 take sides 1, 0 and 1, the others the nearer one
        (1, [0, 1, 1, 1, 0]),
        (2, [1, 1, 1, 1, 0]),
        (3, [0, 1, 1, 1, 0]),
    ):
        chosen = release_sides(multipliers, released, torch.tensor([float(before)]), (1, 0, 1))
        assert chosen[0].tolist() == expected
    assert release_sides(multipliers, released, torch.zeros(1), ())[0].tolist() == [0, 1, 1, 1, 0]


def test_each_trajectory_counts_its_own_releases():
    multipliers, released = torch.full((2, 3), 0.3), torch.ones(2, 3, dtype=torch.bool)
    chosen = release_sides(multipliers, released, torch.tensor([0.0, 2.0]), (1, 0, 1))
    assert chosen.tolist() == [[1, 0, 1], [1, 0, 0]]


@pytest.mark.parametrize("sides", [(2,), (0.0,), (True,), [0, 1], 1, None, "01"])
def test_sides_are_zeros_and_ones(sides):
    with pytest.raises(ValueError, match=r"KinkImplicit: got sides=.*expected 0 \(z < 0\) or 1"):
        fs.KinkImplicit(sides)


def departures(problem, rule, w0, stop):
    """Where each pair is, up to Λ = stop, that ceases to slide as its kink turns repelling: (pair,
    side of z at the end), in the order of the releases. Every natural step is looked at."""
    until = Target(LAM, torch.full((len(w0),), stop, dtype=torch.float64))
    state, found = rule.start(problem, w0), []
    while bool((state.readings["lam"] < stop).all()):
        before, state = state, rule.advance(problem, state, until, 1)
        left = (
            (before.multipliers > 0)
            & (before.multipliers < 1)
            & (problem.hinges(state.w).jump >= 0)
        )
        found += left[0].nonzero()[:, 0].tolist()
    z = problem.hinges(state.w).z[0]
    return [(pair, int(z[pair] > 0)) for pair in found]


@pytest.mark.parametrize("side", [0, 1])
def test_a_released_pair_leaves_to_the_side_that_it_was_given(side):
    problem, w0 = one_release()
    [(_, end)] = departures(problem, sided((side,)), w0, 3.0)
    assert end == side


@pytest.mark.parametrize("sides", list(product((0, 1), repeat=3)))
def test_releases_of_several_neurons_take_their_sides_in_turn(sides):
    found = departures(*three_releases_of(sides), -1.5)
    assert [pair % 64 for pair, _ in found] == [6, 56, 4]
    assert [end for _, end in found] == list(sides)


@pytest.mark.parametrize("sides", list(product((0, 1), repeat=2)))
def test_pairs_of_one_neuron_are_released_together_and_part(sides):
    problem, w0 = fs.data.peers_net(100, 64, 20, seed=5)
    found = departures(problem, sided(sides), w0, 0.0)
    assert [pair % 64 for pair, _ in found] == [14, 14]
    assert [end for _, end in found] == list(sides)


@pytest.mark.parametrize("side", [0, 1])
def test_a_pair_that_is_released_at_the_end_of_a_step_takes_its_side_too(side):
    """The fourth release here repels so little at the end of its step that its side is not felt in
    that step."""
    problem, w0 = fs.data.peers_net(40, 64, 30, seed=7)
    assert departures(problem, sided((0, 0, 0, side)), w0, -0.5)[-1][1] == side


def test_the_nearer_side_is_taken_where_none_is_asked_for():
    problem, w0 = one_release()
    [(_, end)] = departures(problem, FLOW, w0, 3.0)
    plain, asked, other = (
        fs.simulate(problem, rule, w0, until=fs.lam([3.0]), strict=True).weights[-1]
        for rule in (FLOW, sided((end,)), sided((1 - end, 0, 0)))
    )
    assert np.array_equal(plain, asked)
    assert np.abs(plain - other).max() > 1e-2


# The fan


def test_a_fan_has_a_branch_for_every_choice_of_sides():
    fan = fan_of_three()
    assert list(fan.branches) == list(product((0, 1), repeat=3))
    assert (fan.releases == 3).all()
    ends = fan.spread("margin")[-1, 0], fan.weights_spread[-1, 0]
    assert ends == (pytest.approx(np.ptp(fan["margin"][:, -1, 0])), fan.weights_spread.max())
    weights = np.stack([run.weights[-1, 0] for run in fan.branches.values()])
    apart = np.linalg.norm(weights[:, None] - weights[None], axis=-1) / np.linalg.norm(weights[0])
    assert apart[np.triu_indices(8, 1)].min() > 1e-6
    assert ends[1] == pytest.approx(apart.max(), rel=1e-2)
    assert (fan.weights_spread[0], fan.spread("margin")[0]) == (0, 0)  # one start


def test_every_branch_balances_energy():
    for run in fan_of_three().branches.values():
        risen = run.final.readings["lam"] - float(run["lam"][0, 0])
        assert float(run.final.readings["dissipated"]) == pytest.approx(float(risen), rel=1e-3)


def test_small_steps_from_behind_a_release_stay_on_its_branch():
    """Small steps in ℓ2 tend to the flow, whichever branch they start on."""
    problem, w0 = one_release()
    fan = fs.branch_fan(problem, FLOW, w0, until=fs.lam([3.0, 8.0]), k=1, strict=True)
    assert list(fan.branches) == [(0,), (1,)]
    size = np.linalg.norm(fan.branches[0,].weights[-1, 0])
    for run in fan.branches.values():
        behind = torch.from_numpy(run.weights[1])
        small = fs.SmallStep(fs.L2(), dlam=2e-3, relative=2e-3)
        end = fs.simulate(problem, small, behind, until=fs.lam([8.0]), strict=True).weights[-1, 0]
        assert np.linalg.norm(end - run.weights[-1, 0]) / size < 0.01
    assert fan.weights_spread[-1, 0] > 0.1
    assert fan.spread("margin")[-1, 0] > 5e-3


def test_choices_that_no_release_asks_for_are_not_run():
    problem, w0 = one_release()
    fan = fs.branch_fan(problem, FLOW, w0, until=fs.lam([1.0, 2.0]), k=3)
    assert list(fan.branches) == [(0,), (1,)]
    early = fs.branch_fan(problem, FLOW, w0, until=fs.lam([-2.3]), k=3)
    assert list(early.branches) == [()]
    assert (early.releases, early.spread("margin")[-1], early.weights_spread[-1]) == (0, 0, 0)
    none = fs.branch_fan(problem, FLOW, w0, until=fs.lam([2.0]), k=0)
    assert list(none.branches) == [()]
    assert none.releases == 1


def test_a_batch_has_the_branches_of_the_start_with_most_releases():
    (problem, w0), other = one_release(), fs.data.peers_net(60, 16, 10, seed=1)
    x, y = torch.stack([problem.x, other[0].x]), torch.stack([problem.y, other[0].y])
    stacked = fs.Problem(problem.net, x, y, fs.exponential)
    fan = fs.branch_fan(stacked, FLOW, torch.cat([w0, other[1]]), until=fs.lam([2.0]), k=2)
    assert list(fan.branches) == [(0,), (1,)]
    assert fan.releases.tolist() == [[1, 0], [1, 0]]
    assert fan.weights_spread[-1, 0] > 1e-3
    assert fan.weights_spread[-1, 1] == 0


def test_from_a_state_releases_are_counted_anew():
    problem, w0 = one_release()
    state = fs.simulate(problem, FLOW, w0, until=fs.lam([-2.3])).final
    state = fs.State(
        **{**vars(state), "tallies": state.tallies | {"releases": torch.tensor([5.0]).double()}}
    )
    fan = fs.branch_fan(problem, FLOW, state, until=fs.lam([2.0]), k=1)
    assert list(fan.branches) == [(0,), (1,)]
    assert (fan.releases == 1).all()


# Misuse


@pytest.mark.parametrize("k", [-1, 11, 1.0, True, None])
def test_k_is_a_small_whole_number(k):
    with pytest.raises(
        ValueError, match="branch_fan: got k=.*expected a whole number from 0 to 10"
    ):
        fs.branch_fan(*both(one_release()), until=fs.lam(1.0), k=k)


def test_methods_without_releases_are_refused():
    problem, _ = one_release()
    smooth = fs.Problem(
        fs.MLP([60, 4, 1], activation=fs.squared_relu), problem.x, problem.y, fs.exponential
    )
    with pytest.raises(ValueError, match="which releases no kinks, expected one with sides"):
        fs.branch_fan(smooth, FLOW, smooth.net.init(0), until=fs.lam(1.0))


def test_a_spread_of_weights_needs_weights():
    fan = fan_of_three()
    bare = {
        sides: fs.Trajectory(**{**vars(run), "weights": None})
        for sides, run in fan.branches.items()
    }
    with pytest.raises(ValueError, match="the runs hold no weights"):
        _ = fs.BranchFan(bare).weights_spread


# The published setting, farther out


@pytest.mark.slow
@pytest.mark.parametrize(("seed", "count", "margins"), [(0, 2, 5e-6), (1, 8, 6e-4)])
def test_what_hangs_on_the_releases_of_a_large_net(seed, count, margins):
    """To a mean loss of 1e-100; the spread of margins hardly depends on rtol."""
    problem, w0 = fs.data.peers_net(100, 64, 20, seed=seed)
    until = fs.lam([5.0, 100 * np.log(10) - np.log(20)])
    fans = [
        fs.branch_fan(problem, fs.SteepestFlow(fs.L2(), rtol=rtol), w0, until=until, strict=True)
        for rtol in (1e-3, 1e-4)
    ]
    spreads = [fan.spread("margin")[-1, 0] for fan in fans]
    assert [len(fan.branches) for fan in fans] == [count, count]
    assert spreads[1] < margins
    assert spreads[0] == pytest.approx(spreads[1], rel=0.2)

"""Clarke's gradients of the margins, where a flow slides and on smooth nets."""

import pytest
import torch

import flowsim as fs
from flowsim.diagnostics.gradient_sets import GradientSets
from flowsim.motion.state import initial_state

NET, START = fs.data.peers_net(5, 10, 10, seed=0)


@pytest.fixture(scope="module")
def slid():
    final = fs.simulate(NET, fs.SteepestFlow(fs.L2(), rtol=1e-2), START, until=fs.lam([30.0])).final
    assert int(final.tallies["sliding"]) > 5
    return final


def test_the_gradients_are_those_of_the_margins(slid):
    sets = GradientSets.of(NET, slid, torch.arange(10))
    share = NET.weights(slid.w)[0]
    torch.testing.assert_close(
        (share @ sets.at(sets.kinks.D))[None], fs.diagnostics.ascent(NET, slid)
    )
    # Euler's identity for any choice on the kinks
    w, q = slid.w[0], NET.margins(slid.w)[0]
    for u in (w, torch.randn(60, generator=torch.Generator().manual_seed(0), dtype=torch.float64)):
        torch.testing.assert_close(sets.lowest(u) @ w, 2 * q)


def test_a_smooth_net_has_one_gradient_for_each_margin():
    problem = fs.Problem(
        fs.MLP([5, 4, 3], activation=fs.squared_relu), NET.x, torch.arange(10) % 3, fs.cross_entropy
    )
    state = initial_state(problem, problem.net.init(0))
    active = torch.tensor([1, 4, 17])
    sets = GradientSets.of(problem, state, active)
    assert len(sets.kinks) == 0
    f = problem.outputs(state.w)[0]
    gaps = torch.stack([f[i, i % 3] - f[i, j] for i in range(10) for j in range(3) if j != i % 3])
    torch.testing.assert_close(sets.at(sets.kinks.D) @ state.w[0], 3 * gaps[active])

"""The gradient that a flow has selected on kinks, and the multipliers of the margins in it."""

import pytest
import torch

import flowsim as fs
from flowsim.diagnostics.selected import loss_multipliers
from flowsim.motion.state import initial_state


def test_on_kinks_the_gradient_is_the_one_that_the_flow_has_selected():
    problem, w0 = fs.data.peers_net(6, 16, 12, seed=1)
    found = {}

    def observe(problem, state):
        h = fs.diagnostics.ascent(problem, state)
        found[float(state.readings["lam"][0])] = (h, problem.ascent(state.w)[1], state)
        return h.norm(dim=-1)

    flow = fs.SteepestFlow(fs.L2(), rtol=1e-3)
    run = fs.simulate(problem, flow, w0, until=fs.lam([2.0, 20.0]), observe={"dual": observe})
    final = run.final
    h, selected = (
        fs.diagnostics.ascent(problem, final),
        fs.select(problem, fs.L2(), final.w, final.multipliers),
    )
    torch.testing.assert_close(h, selected.ascent, rtol=1e-8, atol=1e-10)
    torch.testing.assert_close(h, final.memory["ascent"], rtol=1e-12, atol=1e-14)
    slid = [pair for lam, pair in found.items() if lam > 1]
    assert all(h.norm() < 0.99 * auto.norm() for h, auto, _ in slid)
    alpha = fs.diagnostics.alignment(fs.L2())(problem, final)
    assert alpha == pytest.approx(float((final.w * h).sum() / final.w.norm() / h.norm()))


def test_without_multipliers_the_gradient_is_that_of_autograd():
    problem, w0 = fs.data.peers_net(6, 16, 12, seed=1)
    final = fs.simulate(problem, fs.SmallStep(fs.L2()), w0, until=fs.lam(2.0, saves=3)).final
    assert torch.equal(fs.diagnostics.ascent(problem, final), problem.ascent(final.w)[1])


@pytest.mark.parametrize("loss", [fs.cross_entropy, fs.pairwise_exponential])
def test_shares_of_several_classes_sum_up_to_the_gradient(loss):
    x = fs.data.peers_net(5, 10, 10, seed=0)[0].x
    problem = fs.Problem(fs.MLP([5, 7, 3]), x, torch.arange(10) % 3, loss)
    at = initial_state(problem, problem.net.init(range(2)))
    q, mu = loss_multipliers(problem, at)
    assert q.shape == mu.shape == (2, 20)
    assert (mu >= 0).all()
    assert q.amin(-1).tolist() == pytest.approx(problem.margins(at.w).amin(-1).tolist())
    h = problem.ascent(at.w)[1]
    torch.testing.assert_close((at.w * h).sum(-1), 2 * (mu * q).sum(-1))

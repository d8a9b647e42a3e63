"""The best multipliers of a point: at exact KKT points, off them, and against other solvers."""

import math
from dataclasses import replace

import pytest
import torch

import flowsim as fs
from flowsim.convex.cones import conic_optimum
from flowsim.diagnostics.gradient_sets import GradientSets
from flowsim.diagnostics.lagrange import best_mixture, best_multipliers, lifted
from flowsim.motion.state import initial_state

NET, START = fs.data.peers_net(5, 10, 10, seed=0)
PLAIN = [fs.L1(), fs.L2(), fs.Linf()]
each = pytest.mark.parametrize("norm", PLAIN, ids=lambda n: n.name)


@pytest.fixture(scope="module")
def slid():
    final = fs.simulate(NET, fs.SteepestFlow(fs.L2(), rtol=1e-2), START, until=fs.lam([30.0])).final
    assert int(final.tallies["sliding"]) > 5
    return final


def two_neurons(a, tilt=0.0):
    """Examples (±1, a), both positive, and two ReLU neurons, of which the second is dead."""
    problem = fs.Problem(fs.MLP([2, 2, 1]), [[1.0, a], [-1.0, a]], [1, 1], fs.exponential)
    return problem, initial_state(
        problem, torch.tensor([[tilt, 1.0, 0.0, 0.0, 1.0, 0.0]], dtype=torch.float64)
    )


@each
@pytest.mark.parametrize("a", [0.25, 2.0])
def test_one_neuron_is_a_kkt_point_whether_it_is_the_best_or_not(norm, a):
    problem, state = two_neurons(a)
    best = best_multipliers(problem, state, norm)
    assert float(best.excess) == pytest.approx(0, abs=1e-9)
    if norm.name != "l1":  # where other shares do as well
        assert best.p[0].tolist() == pytest.approx([0.5, 0.5], abs=1e-6)


@pytest.mark.parametrize("a", [0.2, 1.0])
def test_that_kkt_point_is_a_local_optimum_in_l1_and_in_l2_only_for_flat_data(a):
    """In ℓ2 a second neuron pays at once where a < 1/√3."""
    problem, state = two_neurons(a)
    generator = torch.Generator().manual_seed(0)
    draw = (
        torch.randn(40_000, 6, generator=generator).double()
        * torch.rand(40_000, 6, generator=generator).double() ** 4
    )

    def gain(norm):
        margins = [
            problem.margins(state.w + eps * draw).amin(-1) / norm.value(state.w + eps * draw) ** 2
            for eps in (0.0, 0.1, 0.01)
        ]
        return float(torch.cat(margins[1:]).amax() - margins[0][0])

    assert gain(fs.L1()) < 0
    assert (gain(fs.L2()) > 1e-4) == (a < 3**-0.5)


@each
def test_a_tilted_neuron_is_not_stationary(norm):
    problem, state = two_neurons(0.25, tilt=0.05)
    assert float(best_multipliers(problem, state, norm, decades=0.5).excess) > 0.01


@pytest.mark.parametrize(
    ("norm", "w", "p"),
    [
        (fs.L1(), [5, 2, 8], [1, 3, 11]),
        (fs.L2(), [17, 6, 24], [0, 7, 10]),
        (fs.Linf(), [4, 1, 4], [0, 1, 1]),
    ],
    ids=lambda v: getattr(v, "name", ""),
)
def test_the_largest_margin_of_a_linear_model_is_recognised(norm, w, p):
    problem = fs.Problem(
        fs.Linear(3), [[3, 1, 0], [1, -2, 2], [1, 2, 1]], [1, 1, 1], fs.exponential
    )
    state = initial_state(problem, 1000 * torch.tensor([w], dtype=torch.float64))
    best = best_multipliers(problem, state, norm)
    assert float(best.excess) == pytest.approx(0, abs=1e-9)
    assert best.p[0].tolist() == pytest.approx([v / sum(p) for v in p], abs=1e-6)
    off = initial_state(problem, state.w + torch.tensor([[0.0, 30.0, -30.0]], dtype=torch.float64))
    assert float(best_multipliers(problem, off, norm).excess) > 1e-4


@each
def test_kinks_are_used_and_nothing_is_below_the_bound(norm, slid):
    best = best_multipliers(NET, slid, norm)
    assert float(best.p.sum()) == pytest.approx(1)
    assert float(1 - best.least / best.dual) < 1e-9
    decided = replace(
        slid, multipliers=(slid.multipliers > 0.5).to(slid.w)
    )  # every kink on one side
    assert float(best_multipliers(NET, decided, norm).dual) > float(best.dual)


@each
def test_two_solvers_agree(norm, slid):
    sets = GradientSets.of(NET, slid, torch.arange(10))
    assert len(sets.kinks) > 0
    found = best_mixture(sets, norm)
    best = conic_optimum(lifted(sets), norm)
    assert found.bound == pytest.approx(found.dual, rel=1e-8)
    assert sets.value(torch.from_numpy(best.u), norm) == pytest.approx(found.dual, rel=1e-5)
    assert best.multipliers[:10].sum() == pytest.approx(1, abs=1e-6)


def test_a_spectral_norm_and_several_classes():
    pytest.importorskip("cvxpy")
    net = fs.MLP([5, 6, 3])
    problem = fs.Problem(net, NET.x, torch.arange(10) % 3, fs.pairwise_exponential)
    run = fs.simulate(
        problem, fs.SteepestFlow(fs.L2(), rtol=1e-2), net.init(0), until=fs.lam([20.0])
    )
    for norm in (fs.L2(), fs.modular(net.layout)):
        best = best_multipliers(problem, run.final, norm)
        alpha = float(fs.diagnostics.alignment(norm)(problem, run.final))
        assert float(best.excess) >= 0
        assert float(best.floor) <= 1 - alpha
        assert float(1 - best.least / best.dual) < 1e-4


def test_it_frames_the_alignment_of_the_softmax_weights(slid):
    far = fs.simulate(NET, fs.SteepestFlow(fs.L2(), rtol=1e-3), slid, until=fs.lam([300.0])).final
    alpha = float(fs.diagnostics.alignment(fs.L2())(NET, far))
    best = best_multipliers(NET, far, fs.L2())
    assert float(best.floor) <= 1 - alpha <= float(best.excess)
    assert float(best.excess) < 0.05


def test_what_is_not_separated_has_none():
    problem = fs.Problem(fs.Linear(2), [[1.0, 0.0], [0.0, 1.0]], [1, 1], fs.exponential)
    state = initial_state(problem, torch.tensor([[1.0, -1.0], [1.0, 1.0]], dtype=torch.float64))
    best = best_multipliers(problem, state, fs.L2())
    assert torch.isnan(best.excess).tolist() == [True, False]
    assert float(best.excess[1]) == pytest.approx(0, abs=1e-9)


@pytest.mark.slow
def test_late_in_training_a_wide_net_comes_close_to_a_kkt_point():
    """1 − α at Λ = 10⁴ is 2.0e-3 within a tenth, at two tolerances, and falls on the way there."""
    problem, w0 = fs.data.peers_net(20, 64, 50, seed=1)
    for rtol in (1e-3, 1e-4):
        state, found = w0, []
        for lam in (100.0, 1e3, 1e4):
            state = fs.simulate(
                problem, fs.SteepestFlow(fs.L2(), rtol=rtol), state, until=fs.lam([lam])
            ).final
            found.append(1 - float(fs.diagnostics.alignment(fs.L2())(problem, state)))
        assert found == sorted(found, reverse=True)
        assert found[-1] == pytest.approx(2.0e-3, rel=0.1)
        best = best_multipliers(problem, state, fs.L2())
        assert float(best.floor) <= found[-1] <= float(best.excess)
        assert math.isfinite(float(best.excess))

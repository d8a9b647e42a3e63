"""Minimising movements of nets with kinks: exact velocities, the laws of the flow, and
contracts."""

import math
from dataclasses import replace
from functools import cache
from itertools import pairwise

import numpy as np
import pytest
import torch

import flowsim as fs
from flowsim.flow.movements.movement import Guess
from flowsim.flow.movements.net import NetMover
from flowsim.flow.movements.step import MinimisingMovement
from flowsim.flow.sliding.step import KinkImplicit
from flowsim.motion.clocks import STEPS, Target

NORMS = {"linf": fs.Linf(), "l1": fs.L1(), "max l2": fs.Max(fs.L2()), "l3": fs.Lp(3.0)}
every_norm = pytest.mark.parametrize("name", NORMS)


def small(*, leak=0.0, classes=2, loss=fs.exponential, inputs=None):
    """Random data with labels in turn, and a two-layer net."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(6, 3, generator=g, dtype=torch.float64) if inputs is None else inputs
    y = torch.arange(len(x)) % classes
    net = fs.MLP(
        [x.shape[1], 6, 1 if classes == 2 else classes],
        activation=fs.leaky_relu(leak) if leak else fs.relu,
    )
    return fs.Problem(net, x, 2 * y - 1 if classes == 2 else y, loss), net.init(0, scale=0.5)


def flow(problem, norm, w0, until, rtol=1e-2):
    return fs.simulate(problem, fs.SteepestFlow(norm, rtol=rtol), w0, until=until)


def imbalance(run):
    """∫‖h‖_* ds over the rise of the level to the end of the last step, less one."""
    rise, spent = (
        float(run.final.readings[name]) - run[name][0, 0] for name in ("lam", "dissipated")
    )
    assert rise > 0
    return abs(spent / rise - 1)


# Velocities that are known


def on_a_kink(slope, normal, w):
    """One neuron on the kink of its first example, with ∇Λ = c·(slope − D·normal) in its inner
    weights; and c."""
    slope, normal, w = (torch.tensor(v, dtype=torch.float64) for v in (slope, normal, w))
    ratio = math.exp(-float(slope @ w))
    x = torch.stack([ratio * normal, slope])
    problem = fs.Problem(fs.MLP([3, 1, 1], activation=fs.relu), x, [1, -1], fs.exponential)
    return problem, torch.cat([w, w.new_tensor([-1.0])])[None], ratio / (1 + ratio)


@pytest.mark.parametrize(
    ("slope", "normal", "w", "direction", "rate"),
    [
        ((3.0, 1.0, -1.0), (4.0, 2.0, 0.4), (0.01, 0.0, -0.1), (0.6, -1.0, -1.0), 1.8),
        ((1.0, 0.6, 0.3), (2.0, 2.0, 2.0), (0.1, -0.1, 0.0), (1.0, 0.0, -1.0), 0.7),
    ],
    ids=["directions are averaged", "small steps stall"],
)
def test_velocities_of_linf_on_a_kink(slope, normal, w, direction, rate):
    """Where small steps have rates of 19/15 and 0; the outer weight falls in both."""
    problem, w0, c = on_a_kink(slope, normal, w)
    guess = Guess(
        torch.zeros(4, dtype=torch.float64), torch.tensor([0.5, 1.0], dtype=torch.float64)
    )
    moved = NetMover(fs.Linf(), problem, w0).move(w0[0], 1e-6, guess)
    np.testing.assert_allclose(moved.v, [*direction, -1], atol=1e-5)
    outer = c * float(np.dot(slope, w))
    assert float(fs.Linf().dual(moved.ascent)) == pytest.approx(c * rate + outer, rel=1e-5)


# The laws of the flow


@cache
def walk(name):
    """A problem, its norm, and the states at the ends of the first steps."""
    problem, w0 = fs.data.peers_net(5, 6, 6, seed=2)
    rule = fs.SteepestFlow(NORMS[name], rtol=1e-2)
    states = [rule.start(problem, w0)]
    for k in range(1, 19):
        states.append(
            rule.advance(problem, states[-1], Target(STEPS, torch.tensor([float(k)])), 100)
        )
    return problem, NORMS[name].bind(problem.layout), states


@every_norm
def test_directions_are_steepest_for_the_gradient_of_the_multipliers(name):
    problem, norm, states = walk(name)
    lacking = []
    for state in states[1:]:
        h = problem.hinges(state.w).gradient(state.multipliers)
        lacking.append(float(1 - (h * state.memory["velocity"]).sum() / norm.dual(h)))
    assert min(lacking) > -1e-9
    assert max(lacking) < NetMover.trusted
    assert np.median(lacking) < 1e-5


@every_norm
def test_energy_balances(name):
    _, _, states = walk(name)
    rise, spent = (
        float(states[-1].readings[n] - states[0].readings[n]) for n in ("lam", "dissipated")
    )
    assert rise > 2
    assert spent == pytest.approx(rise, rel=2e-3)


@every_norm
def test_level_and_soft_margin_never_fall(name):
    _, norm, states = walk(name)
    lam = [float(state.readings["lam"]) for state in states]
    assert all(b > a for a, b in pairwise(lam))
    soft = [
        float(level / norm.value(state.w) ** 2)
        for level, state in zip(lam, states, strict=True)
        if level > 0
    ]
    assert len(soft) >= 3
    assert all(b >= a * (1 - 1e-12) for a, b in pairwise(soft))


@every_norm
def test_multipliers_say_which_kinks_hold(name):
    problem, norm, states = walk(name)
    for state in states[1:]:
        kinks, D = problem.hinges(state.w), state.multipliers
        sliding = (D > 0) & (D < 1)
        assert ((D >= 0) & (D <= 1)).all()
        assert sliding.sum() == state.tallies["sliding"]
        assert (kinks.jump[sliding] < 0).all()
        felt = sliding & (kinks.jump < -1e-6 * norm.dual(state.memory["ascent"]))
        assert (kinks.z.abs()[felt] < 1e-3 * kinks.z.abs().amax()).all()
        assert torch.equal(D[~sliding] > 0.5, kinks.z[~sliding] > 0)
    assert max(state.tallies["sliding"] for state in states) >= 3


def put_on_kinks(problem, state):
    """The state's weights, moved by what sliding pairs are off their kinks."""
    w = state.w.clone()
    m, d = problem.net.widths[1], problem.net.widths[0]
    sliding = ((state.multipliers > 0) & (state.multipliers < 1)).view(-1, m)
    for j in range(m):
        x, own = problem.x[sliding[:, j]], w[0, j * d : (j + 1) * d]
        own -= torch.linalg.pinv(x) @ (x @ own)
    return w


@every_norm
def test_short_movements_have_the_velocity_of_the_theory(name):
    """`select` finds the gradient of least dual norm by other means."""
    problem, norm, states = walk(name)
    state = max(states[:-4], key=lambda state: float(state.tallies["sliding"]))
    w, size = put_on_kinks(problem, state), float(norm.value(state.w))
    there = fs.select(problem, norm, w, state.multipliers)
    guess = Guess(state.memory["velocity"][0], state.multipliers[0])
    moved = NetMover(norm, problem, w).move(w[0], 1e-8 * size, guess)
    assert float(norm.dual(moved.ascent)) == pytest.approx(there.dual.item(), rel=1e-6)
    assert float(moved.ascent @ moved.v) == pytest.approx(there.dual.item(), rel=1e-6)


def test_a_maximum_over_layers_of_linf_is_linf():
    problem, w0 = fs.data.peers_net(5, 6, 6, seed=2)
    one, other = (flow(problem, norm, w0, fs.lam([2.0])) for norm in (fs.Linf(), fs.Max(fs.Linf())))
    np.testing.assert_allclose(other.weights[-1], one.weights[-1], rtol=1e-6, atol=1e-9)
    assert other["dissipated"][-1] == pytest.approx(one["dissipated"][-1], rel=1e-6)


def test_in_l2_it_is_the_flow_that_another_method_follows():
    problem, w0 = fs.data.peers_net(5, 8, 10, seed=1)
    rules = [
        fs.SteepestFlow(fs.L2(), rtol=1e-3, method=method)
        for method in (MinimisingMovement(), KinkImplicit())
    ]
    one, other = (
        fs.simulate(problem, rule, w0, until=fs.lam([0.0, 4.0]), strict=True) for rule in rules
    )
    size = np.linalg.norm(other.weights, axis=-1)
    assert (np.linalg.norm(one.weights - other.weights, axis=-1) < 2e-3 * size).all()
    assert other["tally_sliding"][:, 0].tolist() == one["tally_sliding"][:, 0].tolist() == [0, 6, 8]


def test_releases_are_counted_and_may_leave_to_either_side():
    problem, w0 = fs.data.peers_net(10, 6, 6, seed=2)
    rules = [
        fs.SteepestFlow(fs.Max(fs.L2()), rtol=1e-2, method=MinimisingMovement((side,)))
        for side in (0, 1)
    ]
    runs = [fs.simulate(problem, rule, w0, until=fs.steps([14])) for rule in rules]
    assert [run["tally_releases"][-1, 0] for run in runs] == [1, 1]
    assert max(imbalance(run) for run in runs) < 1e-2
    below, above = (run.final.w for run in runs)
    assert torch.linalg.vector_norm(above - below) > 1e-2 * torch.linalg.vector_norm(below)


# Losses, activations, inputs

MIXED = torch.tensor(
    [[1.0, 0.5], [2.0, 1.0], [-1.0, -0.5], [1.0, 0.5], [0.0, 0.0], [0.3, -1.0]], dtype=torch.float64
)
CASES = {
    "logistic": {"loss": fs.logistic},
    "pairwise": {"loss": fs.pairwise_exponential, "classes": 3},
    "cross entropy": {"loss": fs.cross_entropy, "classes": 3},
    "leaky": {"leak": 0.2},
    "parallel, twice, zero": {"inputs": MIXED},
    "leaky, parallel": {"inputs": MIXED, "leak": 0.2},
}


@pytest.mark.parametrize(
    ("case", "norm"),
    [(case, fs.Linf()) for case in CASES]
    + [(case, fs.Max(fs.L2())) for case in ("logistic", "pairwise", "leaky")],
    ids=str,
)
def test_energy_balances_for_every_loss_and_activation_and_for_parallel_inputs(case, norm):
    problem, w0 = small(**CASES[case])
    run = flow(problem, norm, w0, fs.steps([12]))
    assert imbalance(run) < 2e-2


def test_losses_without_a_convex_bound_are_refused():
    problem, w0 = small(loss=fs.squared)
    with pytest.raises(ValueError, match="does not know the loss"):
        flow(problem, fs.Linf(), w0, fs.steps([2]))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("norm", "seed", "tolerances"),
    [(fs.Linf(), 2, (1e-3, 3e-4)), (fs.Max(fs.L2()), 0, (3e-4, 1e-4))],
    ids=str,
)
def test_margins_agree_under_refinement(norm, seed, tolerances):
    """On nets whose flow does not branch."""
    problem, w0 = fs.data.peers_net(6, 10, 10, seed=seed)
    ends = [flow(problem, norm, w0, fs.lam([5.0]), rtol) for rtol in tolerances]
    margin = fs.diagnostics.margin(norm)
    coarse, fine = (
        float(margin(problem, replace(run.final, w=torch.from_numpy(run.weights[-1]))))
        for run in ends
    )
    assert coarse == pytest.approx(fine, rel=1e-3)


# Contracts


def test_a_run_goes_on_from_its_state_as_if_unbroken(tmp_path):
    problem, w0 = fs.data.peers_net(5, 6, 6, seed=2)
    whole = flow(problem, fs.Linf(), w0, fs.lam([0.0, 2.0]))
    first = flow(problem, fs.Linf(), w0, fs.lam([0.0]))
    first.save(tmp_path / "run")
    for state in (first.final, fs.load(tmp_path / "run").final):
        rest = flow(problem, fs.Linf(), state, fs.lam([2.0]))
        assert torch.equal(rest.final.w, whole.final.w)
        assert torch.equal(rest.final.multipliers, whole.final.multipliers)
        for name in ("steps", "arclength", "dissipated", "log_time"):
            assert torch.equal(rest.final.readings[name], whole.final.readings[name])


def test_weights_in_single_precision_are_refused():
    problem, w0 = small()
    with pytest.raises(ValueError, match=r"needs weights in float64.*try w\.double\(\)"):
        flow(problem, fs.Linf(), w0.float(), fs.lam([1.0]))

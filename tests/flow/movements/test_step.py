"""Minimising movements: closed forms of quadratics, orders, margins against convex solvers, losses,
contracts."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch

import flowsim as fs
from flowsim.exact.flows import round_quadratic
from flowsim.exact.optima import margin_rows, max_margin
from flowsim.flow.field import Field
from flowsim.flow.movements.convex import ConvexMover
from flowsim.flow.movements.step import ImplicitSteps, MinimisingMovement
from flowsim.motion.clocks import ARCLENGTH

METHOD = MinimisingMovement()
SHAPE = (3, 4)
FIXTURE = torch.tensor([[3.0, 1, 0], [1, -2, 2], [1, 2, 1]], dtype=torch.float64)


def flow(norm, rtol=1e-4):
    return fs.SteepestFlow(norm, rtol=rtol, method=METHOD)


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def start_at_zero(problem, count=1):
    return torch.zeros(count, problem.size, dtype=torch.float64)


# --- closed forms: ½‖w − w*‖² from 0, whose residual is the proximal map of s‖·‖_* ---------------

CLOSED = pytest.mark.parametrize(
    "norm", [fs.L1(), fs.Linf(), fs.Frobenius(), fs.Spectral(), fs.Nuclear()], ids=lambda n: n.name
)


@CLOSED
def test_round_quadratics_follow_the_proximal_map_through_every_tie(norm):
    target = randn(12, seed=1)
    problem = fs.Quadratic(torch.eye(12, dtype=torch.float64), target, shape=SHAPE)
    path = round_quadratic(target, np.zeros(12), norm.bind(problem.layout))
    points = path.lengths[-1] * np.array([0.1, 0.35, 0.6, 0.85])
    run = fs.simulate(
        problem,
        flow(norm),
        start_at_zero(problem),
        until=fs.arclength(points.tolist()),
        strict=True,
    )
    error = np.linalg.norm(run.weights[1:, 0] - path.weights(points), axis=-1)
    assert error.max() < 1e-3 * np.linalg.norm(target)
    # natural steps end on the path itself
    end = run.final
    np.testing.assert_allclose(
        end.w[0], path.weights(float(end.readings["arclength"])), rtol=0, atol=1e-7
    )
    torch.testing.assert_close(
        end.readings["dissipated"], end.readings["lam"] + 0.5 * target @ target, rtol=1e-3, atol=0
    )


@CLOSED
def test_a_flow_ends_at_the_minimiser(norm):
    target = randn(12, seed=1)
    problem = fs.Quadratic(torch.eye(12, dtype=torch.float64), target, shape=SHAPE)
    run = fs.simulate(problem, flow(norm, 1e-3), start_at_zero(problem), until=fs.arclength(1e3))
    assert run.statuses == [fs.Status.STATIONARY]
    torch.testing.assert_close(run.final.w[0], target, rtol=0, atol=1e-5)


# --- order ---------------------------------------------------------------------------------------


def walk(norm, problem, length, steps):
    """Fixed steps along an arclength from 0, and what ∫‖h‖_* ds lacks of the rise of the level."""
    norm = norm.bind(problem.layout)
    field, w = Field(norm, ARCLENGTH, rtol=0.0), start_at_zero(problem)
    mover, guess = ConvexMover(norm, problem, w), None
    lam, h = problem.ascent(w)
    v = mover.move(w[0], 1e-5 * length, None).v
    at, gained = field.sample(problem, w, lam, h, v[None]), 0.0
    for _ in range(steps):
        trial = ImplicitSteps(field, problem, mover).trial(w[0], at, length / steps, guess)
        gained += length / steps * float(trial.mean("dissipated"))
        w, guess, at = trial.w, trial.end, trial.last
    return w[0], gained - float(at.lam - lam)


NORMS = {
    "spectral": fs.Spectral(),
    "nuclear": fs.Nuclear(),
    "l4": fs.Lp(4),
    "l1.5": fs.Lp(1.5),
    "schatten4": fs.Schatten(4),
}


def bowl():
    root = randn(12, 12, seed=2) + 2 * torch.eye(12, dtype=torch.float64)
    return fs.Quadratic(root.mT @ root, randn(12, seed=5), shape=SHAPE)


def order(errors):
    return float(np.polyfit(np.arange(len(errors)), -np.log2(errors), 1)[0])


@pytest.mark.parametrize("name", NORMS)
def test_steps_are_of_second_order_on_a_smooth_stretch(name):
    length = 0.05 * float(NORMS[name].bind(bowl().layout).value(bowl().minimiser))
    exact, _ = walk(NORMS[name], bowl(), length, 128)
    walks = [walk(NORMS[name], bowl(), length, steps) for steps in (4, 8, 16)]
    assert order([float(torch.linalg.vector_norm(w - exact)) for w, _ in walks]) == pytest.approx(
        2, abs=0.35
    )
    assert abs(walks[-1][1]) < 1e-5


@pytest.mark.parametrize("name", NORMS)
def test_general_quadratics_end_at_the_minimiser(name):
    problem = bowl()
    run = fs.simulate(
        problem, flow(NORMS[name], 1e-2), start_at_zero(problem), until=fs.arclength(1e3)
    )
    assert run.statuses == [fs.Status.STATIONARY]
    torch.testing.assert_close(run.final.w[0], problem.minimiser, rtol=0, atol=1e-4)


# --- margins of linear models --------------------------------------------------------------------


def classes(d=6, C=4, n=12, seed=0):
    """Separable data of C classes."""
    x = randn(n, d, seed=seed)
    y = (x @ randn(C, d, seed=seed + 1).mT).argmax(1)
    return fs.Problem(fs.Linear(d, C), x, y, fs.pairwise_exponential)


@pytest.mark.parametrize(
    "norm",
    [fs.Spectral(), fs.Nuclear(), fs.Lp(4), fs.L1(), fs.Max(fs.Spectral())],
    ids=lambda n: n.name,
)
def test_linear_flows_certify_their_margin_to_lam_10000(norm):
    problem = classes()
    best, count = max_margin(problem, norm).margin, len(margin_rows(problem))
    bound = norm.bind(problem.layout)
    run = fs.simulate(
        problem,
        flow(norm, 1e-2),
        start_at_zero(problem),
        until=fs.lam([1.0, 10.0, 100.0, 1e4]),
        strict=True,
    )
    for w, s in zip(run.weights[1:], run["arclength"][1:, 0], strict=True):
        w = torch.from_numpy(w)
        lam, h = problem.ascent(w)
        soft, hard = float(lam / bound.value(w)), float(problem.margins(w).min() / bound.value(w))
        assert best - math.log(count) / s <= soft + 1e-3 * best / s
        assert soft <= hard <= best + 1e-6
        assert best <= float(bound.dual(h)) + 1e-6


def test_the_soft_margin_never_falls_and_energy_balances():
    problem = classes()
    for norm in (fs.Spectral(), fs.Nuclear()):
        bound = norm.bind(problem.layout)
        rule, balance = flow(norm, 1e-3), []
        state, margins = rule.start(problem, start_at_zero(problem)), []
        first = state.readings["lam"]
        for _ in range(40):
            until = fs.clocks.Target(fs.clocks.LAM, torch.tensor([1e3], dtype=torch.float64))
            state = rule.advance(problem, state, until, 1)
            if float(state.readings["lam"]) > 0:
                margins.append(float(state.readings["lam"] / bound.value(state.w)))
        assert all(b >= a * (1 - 1e-12) for a, b in pairwise(margins))
        balance = float(state.readings["dissipated"] / (state.readings["lam"] - first))
        assert balance == pytest.approx(1, abs=2e-3)


@pytest.mark.parametrize(
    ("norm", "best"), [(fs.L1(), 17 / 15), (fs.L2(), math.sqrt(53 / 17)), (fs.Linf(), 5 / 2)]
)
def test_three_examples_reach_their_known_margins(norm, best):
    problem = fs.Problem(fs.Linear(3), FIXTURE, [1, 1, 1], fs.exponential)
    run = fs.simulate(
        problem,
        flow(norm),
        start_at_zero(problem),
        until=fs.arclength([1.0, 9.0, 300.0]),
        strict=True,
    )
    for s, lam in zip(run["arclength"][1:, 0], run["lam"][1:, 0], strict=True):
        assert best - math.log(3) / s <= lam / s + 1e-6
    margins = [
        float((FIXTURE @ torch.from_numpy(w[0])).min() / norm.value(torch.from_numpy(w[0])))
        for w in run.weights[1:]
    ]
    assert all(m <= best + 1e-9 for m in margins)
    assert margins[-1] == pytest.approx(best, abs=2e-3)


@pytest.mark.parametrize("norm", [fs.L1(), fs.L2(), fs.Linf(), fs.Lp(3)])
def test_one_example_moves_along_a_dual_vector_at_the_exact_speed(norm):
    x = torch.tensor([[3.0, -1.0, 2.0]], dtype=torch.float64)
    problem = fs.Problem(fs.Linear(3), x, [1], fs.exponential)
    run = fs.simulate(
        problem, flow(norm), start_at_zero(problem), until=fs.lam([10.0, 1000.0]), strict=True
    )
    rate = float(norm.dual(x[0]))
    assert run["arclength"][1:, 0] == pytest.approx([10 / rate, 1000 / rate], rel=1e-9)
    # e^Λ = 1 + ‖x‖_*² t
    assert run["log_time"][1:, 0] == pytest.approx(
        [10 + math.log1p(-math.exp(-10)) - 2 * math.log(rate), 1000 - 2 * math.log(rate)], abs=1e-4
    )


# --- other losses --------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", [fs.L2(), fs.Lp(4)])
def test_logistic_and_cross_entropy_agree_with_explicit_integration(norm):
    x, y = randn(8, 3, seed=5), [1, 1, -1, 1, -1, -1, 1, -1]
    binary = fs.Problem(fs.Linear(3), x, y, fs.logistic)
    several = fs.Problem(fs.Linear(3, 3), x, [0, 1, 2, 0, 1, 2, 1, 0], fs.cross_entropy)
    for problem in (binary, several):
        until = fs.arclength([0.2, 0.6])
        implicit = fs.simulate(
            problem, flow(norm), start_at_zero(problem), until=until, strict=True
        )
        explicit = fs.simulate(
            problem, fs.SteepestFlow(norm, 1e-6), start_at_zero(problem), until=until
        )
        np.testing.assert_allclose(implicit.weights[1:], explicit.weights[1:], atol=1e-3)


@pytest.mark.parametrize(
    ("loss", "norms"),
    [(fs.exponential, [fs.L2(), fs.L1(), fs.Linf()]), (fs.logistic, [fs.L2(), fs.Linf()])],
)
def test_labels_that_no_line_separates_end_at_the_finite_minimiser(loss, norms):
    x, y = randn(8, 2, seed=5), [1, 1, -1, 1, -1, -1, 1, -1]
    problem, ends = fs.Problem(fs.Linear(2), x, y, loss), []
    for norm in norms:
        run = fs.simulate(
            problem, flow(norm, 1e-3), start_at_zero(problem), until=fs.lam(1e3), max_steps=2000
        )
        assert run.statuses == [fs.Status.STATIONARY]
        ends.append(run.final.w[0])
    for end in ends[1:]:
        torch.testing.assert_close(end, ends[0], rtol=0, atol=1e-4)


def test_squared_loss_reaches_least_squares():
    x, target = randn(9, 3, seed=6), randn(9, seed=7)
    problem = fs.Problem(fs.Linear(3), x, target, fs.squared)
    run = fs.simulate(
        problem, flow(fs.Linf(), 1e-3), start_at_zero(problem), until=fs.arclength(1e3)
    )
    assert run.statuses == [fs.Status.STATIONARY]
    torch.testing.assert_close(
        run.final.w[0], torch.linalg.lstsq(x, target[:, None]).solution[:, 0], rtol=0, atol=1e-5
    )


# --- contracts -----------------------------------------------------------------------------------


def test_a_duplicated_example_counts_twice():
    doubled = fs.Problem(fs.Linear(3), FIXTURE[[0, 1, 2, 2]], [1] * 4, fs.exponential)
    run = fs.simulate(
        doubled, flow(fs.Linf()), start_at_zero(doubled), until=fs.lam(100.0, 3), strict=True
    )
    assert float(doubled.margins(run.final.w).min() / run.final.w.abs().max()) == pytest.approx(
        2.5, abs=0.03
    )


def test_a_trajectory_does_not_know_its_batch_and_resumes_to_the_bit(agree):
    problem = classes()
    w = torch.cat([start_at_zero(problem), 0.1 * randn(1, problem.size)])
    rule = flow(fs.Spectral(), 1e-2)
    both = fs.simulate(problem, rule, w, until=fs.lam(20.0, 4))
    alone = fs.simulate(problem, rule, w[1:], until=fs.lam(20.0, 4))
    agree(both.final.w[1:], alone.final.w)
    half = fs.simulate(problem, rule, w[1:], until=fs.lam(20.0, 4), max_steps=5)
    assert half.statuses == [fs.Status.MAX_STEPS]
    whole = fs.simulate(
        problem, rule, type(half.final).from_tensors(half.final.tensors()), until=fs.lam(20.0, 4)
    )
    torch.testing.assert_close(whole.final.w, alone.final.w, rtol=0, atol=0)
    for name, reading in alone.final.readings.items():
        torch.testing.assert_close(whole.final.readings[name], reading, rtol=0, atol=0)


def test_a_zero_gradient_is_stationary():
    problem = fs.Quadratic(torch.eye(3, dtype=torch.float64), torch.zeros(3, dtype=torch.float64))
    run = fs.simulate(problem, flow(fs.Linf()), start_at_zero(problem), until=fs.arclength(1.0))
    assert run.statuses == [fs.Status.STATIONARY]


def test_an_inner_solver_that_fails_stops_the_trajectory(monkeypatch):
    import flowsim.flow.movements.convex as movement

    real = movement.minimise_in_ball
    monkeypatch.setattr(movement, "minimise_in_ball", lambda *a, **k: real(*a, **k, max_steps=1))
    problem = classes()
    run = fs.simulate(
        problem, flow(fs.Nuclear()), start_at_zero(problem), until=fs.lam(1e3), max_steps=300
    )
    assert run.statuses[0] in (fs.Status.STEP_TOO_SMALL, fs.Status.MAX_STEPS)


def test_a_state_of_another_norm_is_begun_anew():
    problem = classes()
    there = fs.simulate(
        problem, flow(fs.Spectral(), 1e-2), start_at_zero(problem), until=fs.lam(5.0, 2)
    ).final
    state = flow(fs.Nuclear(), 1e-2).start(problem, there)
    bound = fs.Nuclear().bind(problem.layout)
    torch.testing.assert_close(state.memory["dual_norm"], bound.dual(problem.ascent(there.w)[1]))
    run = fs.simulate(problem, flow(fs.Nuclear(), 1e-2), there, until=fs.lam(8.0, 2), strict=True)
    assert float(run.final.readings["lam"]) >= 8


def test_single_precision_is_refused():
    problem = classes()
    with pytest.raises(ValueError, match="float64"):
        flow(fs.L1()).start(problem.like(torch.zeros(1)), torch.zeros(1, problem.size))


def test_what_is_not_convex_is_refused():
    net = fs.Problem(fs.MLP([3, 4, 1], activation=fs.square), FIXTURE, [1, 1, 1], fs.exponential)
    with pytest.raises(ValueError, match="convex"):
        flow(fs.L1()).start(net, net.net.init(0))

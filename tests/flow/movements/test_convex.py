"""Movements where the loss is convex: closed forms, and the gap that they claim."""

import pytest
import torch

import flowsim as fs
from flowsim.flow.movements.convex import ConvexMover
from flowsim.flow.movements.movement import Guess

SHAPE = (3, 4)
NORMS = [fs.L1(), fs.Linf(), fs.Frobenius(), fs.Spectral(), fs.Nuclear()]


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def mover_of(problem, norm, w):
    norm = norm.bind(problem.layout)
    return norm, ConvexMover(norm, problem, w[None])


@pytest.mark.parametrize("norm", NORMS, ids=lambda n: n.name)
def test_movements_of_a_round_quadratic_are_projections_onto_the_ball(norm):
    target, w, eps = randn(12, seed=1), randn(12, seed=2), 0.5
    problem = fs.Quadratic(torch.eye(12, dtype=torch.float64), target, shape=SHAPE)
    norm, mover = mover_of(problem, norm, w)
    moved = mover.move(w, eps, None, 1e-15)
    torch.testing.assert_close(moved.v, norm.project((target - w) / eps), rtol=0, atol=1e-6)
    torch.testing.assert_close(moved.w, w + eps * moved.v)
    torch.testing.assert_close(moved.ascent, target - moved.w)
    again = mover.move(w, eps, moved, 1e-15)
    torch.testing.assert_close(again.w, moved.w, rtol=0, atol=1e-6)
    assert mover.unknowns == len(moved.dual_variables) == 12


@pytest.mark.parametrize("loss", [fs.exponential, fs.logistic, fs.squared], ids=lambda x: x.name)
@pytest.mark.parametrize("norm", [fs.L1(), fs.Linf(), fs.Lp(3)], ids=lambda n: n.name)
def test_directions_are_steepest_at_the_end(norm, loss):
    problem = fs.Problem(fs.Linear(5), randn(9, 5), randn(9, seed=1).sign(), loss)
    w = 0.1 * randn(5, seed=2)
    norm, mover = mover_of(problem, norm, w)
    moved = mover.move(w, 0.05, None, 1e-12)
    level, h = problem.ascent(moved.w[None])
    assert float(norm.value(moved.v)) == pytest.approx(1, abs=1e-6)
    assert float(h[0] @ moved.v) == pytest.approx(float(norm.dual(h)[0]), rel=1e-5)
    assert float(moved.lam) == float(level[0]) > float(problem.lam(w[None]))
    assert moved.gap < ConvexMover.trusted


def test_at_a_minimiser_nothing_moves():
    problem = fs.Quadratic(torch.eye(3, dtype=torch.float64), torch.zeros(3, dtype=torch.float64))
    w = torch.zeros(3, dtype=torch.float64)
    moved = mover_of(problem, fs.L1(), w)[1].move(w, 1.0, Guess(w, w))
    assert moved.gap == 0
    assert not moved.v.any()

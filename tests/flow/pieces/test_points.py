"""Points on a piece: pseudoinverses, Newton's method, and the piece that follows."""

import numpy as np
import pytest
import torch

import flowsim as fs
from flowsim.flow.field import Field
from flowsim.flow.pieces.points import Evaluation, OnPiece, Pseudoinverse, View, following, newton
from flowsim.flow.pieces.polytope import Corners
from flowsim.motion.clocks import ARCLENGTH

NORMS = [fs.L1(), fs.Linf()]
every_norm = pytest.mark.parametrize("norm", NORMS, ids=lambda n: n.name)


def some(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape)


def view_of(norm, problem):
    return View(Field(norm, ARCLENGTH), problem, torch.device("cpu"))


def tied(norm):
    """A quadratic at 0 with a gradient of several steepest directions, and the face of one."""
    root = torch.from_numpy(some(9, 7))
    h = torch.from_numpy(np.clip(some(7, seed=1), -0.5, 0.5) if norm == NORMS[0] else some(7))
    if norm == NORMS[1]:
        h[3:] = 0
    H = root.T @ root
    problem = fs.Quadratic(H, torch.linalg.solve(H, h))
    at = Evaluation(view_of(norm, problem), np.zeros(7))
    return problem, OnPiece(at, Corners.steepest(at.view.ball, at.h))


@pytest.mark.parametrize("rank", [5, 3])
def test_pseudoinverses(rank):
    A = some(8, rank) @ some(rank, 5, seed=1)
    inverse = Pseudoinverse(A, np.abs(A).max(0))
    b, r = some(8, seed=2), A.T @ some(8, seed=3)
    np.testing.assert_allclose(inverse.times(b), np.linalg.pinv(A) @ b, atol=1e-10)
    np.testing.assert_allclose(inverse.of_normal(r), np.linalg.pinv(A.T @ A) @ r, atol=1e-8)
    wide = Pseudoinverse(np.c_[A, np.zeros(8)], np.append(np.abs(A).max(0), 0))
    np.testing.assert_allclose(wide.times(b), [*inverse.times(b), 0])


@every_norm
def test_the_velocity_of_the_next_piece_is_the_one_of_least_curvature(norm):
    problem, point = tied(norm)
    chosen = following(point, 62 * point.at.noise)
    expected = fs.select(problem, norm, torch.zeros(1, 7, dtype=torch.float64)).direction[0]
    np.testing.assert_allclose(chosen.u, expected, atol=1e-8)
    assert (chosen.clearance[2] >= -chosen.noise).all()
    assert len(chosen.face.free) > 1
    np.testing.assert_allclose(chosen.curvature, chosen.u @ problem.matrix.numpy() @ chosen.u)


@every_norm
def test_newtons_method_ends_where_slopes_are_equal(norm):
    _, point = tied(norm)
    here = following(point, 62 * point.at.noise)
    end = newton(here, 1e-3 * here.u)
    assert end.error < 1e-12
    np.testing.assert_allclose(end.at.w, 1e-3 * here.u, atol=1e-12)  # a piece is straight here
    off = newton(here, 1e-3 * here.u + here.face.expand(1e-4 * some(here.face.basis.shape[1])))
    np.testing.assert_allclose(off.at.w, end.at.w, atol=1e-10)
    assert here.at.view.gradients > 2


@every_norm
def test_clearances_close_as_they_say(norm):
    _, point = tied(norm)
    here = following(point, 62 * point.at.noise)
    end = newton(here, 1e-6 * here.u)
    known = np.isfinite(here.clearance[:2])
    fall = (here.clearance[:2][known] - end.clearance[:2][known]) / 1e-6
    np.testing.assert_allclose(here.closing[known], fall, atol=1e-3 * here.curvature)

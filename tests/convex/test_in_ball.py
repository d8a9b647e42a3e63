"""Minima over unit balls: duality gaps and projections."""

import pytest
import torch

import flowsim as fs
from flowsim.convex.in_ball import minimise_in_ball
from flowsim.convex.outer import HalfSquare, SoftMaximum
from tests.oracles.bound_norms import BOUND, gradient, point


@pytest.mark.parametrize("temperature", [1e3, 1.0, 1e-2, 1e-5])
@pytest.mark.parametrize("name", BOUND)
def test_soft_minima_over_the_ball_are_proven_by_their_duals(name, temperature):
    norm = BOUND[name]
    for seed in range(2):
        rows = gradient(seed, 20 * len(point(name))).view(20, -1) + point(name)
        rows = rows / norm.dual(rows).amax()
        offset = 0.1 * gradient(seed + 7, 20)
        found = minimise_in_ball(norm, SoftMaximum(temperature), rows, offset, tol=1e-10)
        assert norm.value(found.v) <= 1 + 1e-14
        z = offset + rows @ found.v
        primal = temperature * torch.logsumexp(-z / temperature, 0)
        entropy = -torch.xlogy(found.p, found.p).sum()
        dual = temperature * entropy - found.p @ offset - norm.dual(found.p @ rows)
        assert found.p.sum() == pytest.approx(1, abs=1e-12)
        assert float(primal - dual) == pytest.approx(found.gap, abs=1e-12)
        assert found.gap < 1e-8
        warm = minimise_in_ball(
            norm, SoftMaximum(temperature), rows, offset, start=found.p, tol=1e-10
        )
        torch.testing.assert_close(rows @ warm.v, rows @ found.v, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", BOUND)
def test_least_squares_over_the_ball_is_a_projection_where_the_rows_are_unit_vectors(name):
    norm = BOUND[name]
    target = point(name)
    found = minimise_in_ball(
        norm, HalfSquare(), torch.eye(len(target), dtype=torch.float64), -target, tol=1e-13
    )
    torch.testing.assert_close(found.v, norm.project(target), rtol=0, atol=2e-6)
    inside = 0.1 * target / norm.value(target)
    found = minimise_in_ball(
        norm, HalfSquare(), torch.eye(len(target), dtype=torch.float64), -inside, tol=1e-14
    )
    torch.testing.assert_close(found.v, inside, rtol=0, atol=2e-6)


def test_iterations_are_bounded():
    rows = gradient(0, 60).view(5, 12)
    assert (
        minimise_in_ball(fs.L1(), SoftMaximum(1e-3), rows, torch.zeros(5).double(), tol=0.0).newton
        <= 100
    )

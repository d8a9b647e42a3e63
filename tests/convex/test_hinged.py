"""The convex programme of a step through kinks: against an independent conic solver, and on random
instances."""

import cvxpy
import numpy as np
import pytest
import torch

import flowsim as fs
from flowsim.convex.hinged import solve_hinged
from tests.oracles.hinged_programmes import BALLS, bound, programme


def optimum(task, norm, tol=1e-9):
    return solve_hinged(task, norm, tol)


def primal(task, v):
    """The programme's objective in plain numpy."""
    blocks = task.blocked(v)
    q = (
        task.offset
        + task.rows(blocks)
        - task.hinge_loss((task.z + task.along(blocks)).clamp_min(0))
    )
    step = blocks - task.centre
    bent = 0.5 * torch.einsum("ja,jab,jb->", step, task.curb, step)
    return float(task.temperature * torch.logsumexp(-q / task.temperature, 0) + bent)


def conic(task, norm):
    """The least objective by Clarabel."""
    m, d = task.z.shape[0], task.inputs
    v, s = cvxpy.Variable((m, d + 1)), cvxpy.Variable(task.z.shape, nonneg=True)
    x, t = task.x.numpy(), task.temperature
    along = v[:, :d] @ x.T
    rows = cvxpy.sum(
        cvxpy.multiply(task.slope.numpy(), along)
        + cvxpy.multiply(task.ends[:, 0].numpy(), v[:, d:] @ np.ones((1, len(x)))),
        axis=0,
    )
    q = task.offset.numpy() + rows - cvxpy.sum(cvxpy.multiply(task.kinks.numpy(), s), axis=0)
    bent = (
        sum(
            cvxpy.sum_squares(
                np.linalg.cholesky(task.curb[j].numpy() + 1e-15 * np.eye(d + 1)).T
                @ (v[j] - task.centre[j].numpy())
            )
            for j in range(m)
        )
        / 2
    )
    layers = [(v[:, :d], 0), (v[:, d:], 1)]
    flat = cvxpy.hstack([cvxpy.vec(v[:, :d], order="C"), cvxpy.vec(v[:, d:], order="C")])
    if isinstance(norm, fs.Max):
        words = {fs.L1: 1, fs.Linf: "inf", fs.L2: 2}
        inside = [
            cvxpy.norm(cvxpy.vec(layer, order="C"), words[type(norm.blocks[i].norm)])
            <= norm.blocks[i].scale
            for layer, i in layers
        ]
    else:
        inside = [cvxpy.norm(flat, {"l1": 1, "l2": 2, "linf": "inf", "l3": 3}[norm.name]) <= 1]
    hinge = [cvxpy.multiply(task.live.numpy(), s - task.z.numpy() - along) >= 0]
    problem = cvxpy.Problem(cvxpy.Minimize(t * cvxpy.log_sum_exp(-q / t) + bent), inside + hinge)
    return problem.solve(solver="CLARABEL")


@pytest.mark.parametrize("temperature", [1.0, 0.05])
@pytest.mark.parametrize("name", BALLS)
def test_agrees_with_a_conic_solver(name, temperature):
    norm = bound(name, 3, 4)
    for seed in range(2):
        task = programme(norm, 6, 3, 4, temperature, seed, curb=0.02)
        found = optimum(task, norm)
        assert found.gap <= 1e-9
        v = task.flat(found.v)
        assert float(norm.value(v)) <= 1 + 1e-12
        assert primal(task, v) == pytest.approx(conic(task, norm), abs=2e-7 + found.gap)


@pytest.mark.parametrize("name", BALLS)
def test_the_gap_is_rigorous(name):
    """No point of the ball is better than the optimum by more than the gap, however rough the
    optimum."""
    norm = bound(name, 3, 4)
    task = programme(norm, 6, 3, 4, 0.1, 5, curb=0.02)
    fine = optimum(task, norm, 1e-11)
    best = primal(task, task.flat(fine.v))
    for tol in (1.0, 1e-1, 1e-2, 1e-4):
        rough = optimum(task, norm, tol)
        assert -1e-10 - fine.gap <= primal(task, task.flat(rough.v)) - best <= rough.gap + 1e-10


def failures(name, count, sizes, tol):
    bad = []
    for seed in range(count):
        g = np.random.default_rng(seed)
        n, d, m = (int(g.choice(s)) for s in sizes)
        norm = bound(name, d, m)
        task = programme(
            norm,
            n,
            d,
            m,
            float(10.0 ** -g.integers(0, 7)),
            seed,
            eps=float(10.0 ** g.uniform(-3, 1)),
            curb=float(g.choice([0, 1e-3])),
            twins=bool(g.integers(2)),
        )
        found = optimum(task, norm, tol)
        if not found.gap <= tol:
            bad.append((seed, n, d, m, task.temperature, found.gap))
    return bad


SIZES = ((1, 2, 5, 20), (1, 3, 8), (1, 4, 16))


@pytest.mark.parametrize("name", ["l1", "linf", "max l1, linf"])
def test_random_programmes(name):
    """Sizes, temperatures from 1 to 1e-6, twins, zero rows, one example, all kinks live."""
    assert failures(name, 40, SIZES, 1e-9) == []


@pytest.mark.slow
@pytest.mark.parametrize("name", ["l1", "linf", "max l1, linf"])
def test_a_thousand_random_programmes(name):
    """Rounding keeps a few at temperatures near 1e-6 from the last digits."""
    bad = failures(name, 1000, SIZES, 1e-9)
    assert len(bad) <= 5
    assert all(gap < 1e-6 for *_, gap in bad)

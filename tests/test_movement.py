"""Minimising movements: closed forms of quadratics, orders, margins against convex solvers, losses, contracts."""

import math

import numpy as np
import pytest
import torch

import flowsim as fs
from flowsim.clocks import ARCLENGTH
from flowsim.integrate import Field
from flowsim.movement import MinimisingMovement, Mover, implicit_step

METHOD = MinimisingMovement()
SHAPE = (3, 4)
FIXTURE = torch.tensor([[3.0, 1, 0], [1, -2, 2], [1, 2, 1]], dtype=torch.float64)


def flow(norm, rtol=1e-4):
    return fs.SteepestFlow(norm, rtol=rtol, method=METHOD)


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def start_at_zero(problem, count=1):
    return torch.zeros(count, problem.size, dtype=torch.float64)


# --- closed forms: ½‖w − w*‖² from 0, whose residual is the proximal map of s‖·‖_* -------------------------------


def soft(x, s):
    return x.sign() * (x.abs() - s).clamp_min(0)


def clip(x, s):
    low, high = 0.0, float(x.abs().max())
    for _ in range(200):
        middle = (low + high) / 2
        if float((x.abs() - middle).clamp_min(0).sum()) > s:
            low = middle
        else:
            high = middle
    return x.sign() * x.abs().clamp_max(low)


def of_singular_values(function):
    def residual(r, s):
        u, values, v = torch.linalg.svd(r.view(SHAPE), full_matrices=False)
        return ((u * function(values, s)) @ v).flatten()

    return residual


CLOSED = {
    "l1": (fs.L1(), clip),
    "linf": (fs.Linf(), soft),
    "frobenius": (fs.Frobenius(), lambda r, s: r * (1 - s / torch.linalg.vector_norm(r))),
    "spectral": (fs.Spectral(), of_singular_values(soft)),
    "nuclear": (fs.Nuclear(), of_singular_values(clip)),
}


@pytest.mark.parametrize("name", CLOSED)
def test_round_quadratics_follow_the_proximal_map_through_every_tie(name):
    norm, residual = CLOSED[name]
    target = randn(12, seed=1)
    problem = fs.Quadratic(torch.eye(12, dtype=torch.float64), target, shape=SHAPE)
    whole = float(norm.bind(problem.layout).value(target))
    points = [whole * part for part in (0.1, 0.35, 0.6, 0.85)]
    run = fs.simulate(problem, flow(norm), start_at_zero(problem), until=fs.arclength(points), strict=True)
    size = float(torch.linalg.vector_norm(target))
    for s, w in zip(points, run.weights[1:, 0], strict=True):
        error = target - torch.from_numpy(w) - residual(target, s)
        assert torch.linalg.vector_norm(error) < 1e-3 * size
    # natural steps end on the path itself
    end = run.final
    exact = residual(target, float(end.readings["arclength"]))
    torch.testing.assert_close(target - end.w[0], exact, rtol=0, atol=1e-7)
    torch.testing.assert_close(
        end.readings["dissipated"], end.readings["lam"] + 0.5 * target @ target, rtol=1e-3, atol=0
    )


@pytest.mark.parametrize("name", CLOSED)
def test_a_flow_ends_at_the_minimiser(name):
    target = randn(12, seed=1)
    problem = fs.Quadratic(torch.eye(12, dtype=torch.float64), target, shape=SHAPE)
    run = fs.simulate(problem, flow(CLOSED[name][0], 1e-3), start_at_zero(problem), until=fs.arclength(1e3))
    assert run.statuses == [fs.Status.STATIONARY]
    torch.testing.assert_close(run.final.w[0], target, rtol=0, atol=1e-5)


# --- order --------------------------------------------------------------------------------------------------------


def walk(norm, problem, length, steps):
    """Fixed steps along an arclength from 0, and what ∫‖h‖_* ds lacks of the rise of the level."""
    norm = norm.bind(problem.layout)
    field, w = Field(norm, ARCLENGTH), start_at_zero(problem)
    mover, duals = Mover(norm, problem, w), None
    lam, h = problem.ascent(w)
    v = mover.move(w[0], 1e-5 * length, None).v
    at, gained = field.sample(problem, w, lam, h, v[None]), 0.0
    for _ in range(steps):
        trial = implicit_step(field, mover, problem, w[0], at, length / steps, duals)
        gained += length / steps * float(trial.mean("dissipated", at))
        w, duals, at = trial.w[None], trial.duals, trial.last
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
    return fs.Quadratic(root.mT @ root, randn(12, seed=3), shape=SHAPE)


def order(errors):
    return float(np.polyfit(np.arange(len(errors)), -np.log2(errors), 1)[0])


@pytest.mark.parametrize("name", NORMS)
def test_steps_are_of_second_order_on_a_smooth_stretch(name):
    length = 0.05 * float(NORMS[name].bind(bowl().layout).value(bowl().minimiser))
    exact, _ = walk(NORMS[name], bowl(), length, 128)
    walks = [walk(NORMS[name], bowl(), length, steps) for steps in (4, 8, 16)]
    assert order([float(torch.linalg.vector_norm(w - exact)) for w, _ in walks]) == pytest.approx(2, abs=0.35)
    assert abs(walks[-1][1]) < 1e-5


@pytest.mark.parametrize("name", NORMS)
def test_general_quadratics_end_at_the_minimiser(name):
    problem = bowl()
    run = fs.simulate(problem, flow(NORMS[name], 1e-2), start_at_zero(problem), until=fs.arclength(1e3))
    assert run.statuses == [fs.Status.STATIONARY]
    torch.testing.assert_close(run.final.w[0], problem.minimiser, rtol=0, atol=1e-4)

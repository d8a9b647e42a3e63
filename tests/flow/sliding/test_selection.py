"""Pairs that their kinks hold at one place: the gradient of least dual norm against SciPy."""

import numpy as np
import pytest
import torch
from scipy.optimize import lsq_linear

import flowsim as fs
from flowsim.flow.sliding.forces import Metric
from flowsim.flow.sliding.selection import (
    between,
    count,
    fraction_of,
    least_gradient,
    on_kink,
    sides_at,
)

D, WIDTH = 5, 6


def stuck_net(seed):
    """A net of whose neurons the first three are each on the kink of an example."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(8, D, generator=g, dtype=torch.float64)
    y = 2 * torch.randint(2, (8,), generator=g) - 1
    problem = fs.Problem(fs.MLP([D, WIDTH, 1], activation=fs.relu), x, y, fs.exponential)
    w = problem.net.init(seeds=seed + 100, scale=0.7)
    first = w[0, : D * WIDTH].view(WIDTH, D)
    for j in range(3):
        first[j] -= (first[j] @ x[j]) / (x[j] @ x[j]) * x[j]
    return problem, w, problem.two_layer(1).at(w)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("metric", ["l2", "diagonal"])
def test_the_gradient_has_the_least_dual_norm(seed, metric):
    problem, w, point = stuck_net(seed)
    diagonal = torch.linspace(0.5, 2.0, w.shape[1], dtype=torch.float64)
    norm = {"l2": fs.L2(), "diagonal": fs.Mahalanobis(torch.diag(diagonal))}[metric]
    weight = np.ones(w.shape[1]) if metric == "l2" else 1 / np.sqrt(diagonal.numpy())
    stuck = on_kink(point)
    assert stuck.nonzero()[:, 1:].tolist() == [[0, 0], [1, 1], [2, 2]]
    given = torch.full_like(point.z, 0.4)
    multipliers, h = least_gradient(Metric.of(norm.bind(problem.layout)), point, given, stuck)
    hangs = stuck & (point.jump < 0)
    # outside of kinks that attract: the side that z shows, or the nearer one
    side = torch.where(stuck, 0.0, (point.z > 0).to(w))
    assert torch.equal(multipliers[~hangs], side[~hangs])
    base = point.gradient(point.slopes(torch.where(hangs, 0.0, multipliers)))[0]
    columns = [
        point.gradient(
            point.slopes(torch.where(hangs, 0.0, multipliers).index_put(k, w.new_ones(1)))
        )
        for k in (tuple(i[None] for i in index) for index in hangs.nonzero())
    ]
    matrix = np.stack([(column[0] - base).numpy() for column in columns], 1)
    best = lsq_linear(weight[:, None] * matrix, -weight * base.numpy(), (0, 1), tol=1e-14)
    np.testing.assert_allclose(multipliers[hangs].numpy(), best.x, atol=1e-8)
    np.testing.assert_allclose(h[0].numpy(), base.numpy() + matrix @ best.x, atol=1e-8)


def test_stored_multipliers_hold_on_kinks_and_between_sides():
    _, _, point = stuck_net(0)
    shown = (point.z > 0).to(point.z)
    stored = 1 - shown
    stored[0, 5, 5] = 0.25  # slides, though z has moved
    found = sides_at(point, stored.flatten(1))
    kept = on_kink(point) | between(stored)
    assert torch.equal(found, torch.where(kept, stored, shown))
    assert torch.equal(sides_at(point, None), shown)
    assert count(between(stored)).tolist() == [1.0]


def test_a_force_without_a_bound_is_no_fraction_of_it():
    force, upper = torch.tensor([0.0, 1.0]).double(), torch.tensor([0.0, 4.0]).double()
    assert fraction_of(force, upper).tolist() == [0.0, 0.25]

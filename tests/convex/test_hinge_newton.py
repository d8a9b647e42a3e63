"""The reduced Newton equations, against the unreduced ones."""

from dataclasses import replace

import pytest
import torch

from flowsim.convex.hinge_newton import HingedNewton
from flowsim.convex.hinged import _advanced, _begun
from tests.oracles.hinged_programmes import BALLS, bound, programme


def at_work(name):
    """An iterate on the way, where no residual is zero."""
    norm = bound(name, 3, 4)
    task = programme(norm, 6, 3, 4, 0.3, 1, curb=0.02)
    at = _begun(task, norm)
    for _ in range(2):
        at = _advanced(task, at, 0.5, 1e-9)
    return task, at


@pytest.mark.parametrize("name", BALLS)
def test_a_direction_solves_the_unreduced_equations(name):
    task, at = at_work(name)
    gap, mu = 1e-3, 0.02
    newton = HingedNewton.of(task, at, gap, mu)
    d = newton.direction(mu)
    v, dv = task.blocked(at.ball.v), task.blocked(d.ball.v)
    (above, s), (up, down) = at.hinges.slacks, at.hinges.forces
    (dabove, ds), (dup, ddown) = d.hinges.slacks, d.hinges.forces
    live = task.live
    assert bool(live.any())

    def zero(x):
        torch.testing.assert_close(x, torch.zeros_like(x), rtol=0, atol=1e-8)

    # products, the meaning of the slack, and the balance of forces at a hinge
    zero(torch.where(live, above * dup + up * dabove + up * above - mu, 0.0))
    zero(torch.where(live, s * ddown + down * ds + down * s - mu, 0.0))
    zero(torch.where(live, s + ds - task.z - task.along(v + dv) - above - dabove, 0.0))
    balance = up + dup + down + ddown - task.largest_force(at.p + d.p)
    zero(torch.where(live, balance, 0.0))
    # the rows, and the weights on the simplex
    s_live, ds_live = torch.where(live, s, 0.0), torch.where(live, ds, 0.0)
    rows = task.margins(v + dv, s_live + ds_live) - at.level - d.level
    zero(task.temperature * (torch.log(at.p) + d.p / at.p) + rows)
    assert float((at.p + d.p).sum()) == pytest.approx(1, abs=1e-12)
    # the ball: what it asks of dv at the new gradient
    ball = at.ball.newton(newton.g, at.targets(mu, None)[0])
    dg = task.gradient(at.p + d.p, up + dup, v + dv) - newton.g
    answer = ball.stiff * d.ball.v + (ball.weight * (ball.low @ d.ball.v)) @ ball.low
    torch.testing.assert_close(answer, dg + ball.pull, rtol=1e-6, atol=1e-7)


def test_iterates_move_by_fractions_and_stay_inside():
    task, at = at_work("l1")
    d = HingedNewton.of(task, at, 1e-3, 0.02).direction(0.02)
    primal, dual = at.to_boundary(d)
    moved = at.after(d, 0.9 * min(primal, 1.0), 0.9 * min(dual, 1.0))
    for kind in (*moved.hinges.slacks, *moved.hinges.forces, *moved.ball.pairs.slacks):
        assert bool((kind >= 0).all())
    assert moved.products()[0] > 0
    assert moved.products()[1] == at.products()[1] == 2 * int(task.live.sum()) + 2 * 16 + 1


def test_a_matrix_that_is_not_finite_is_an_arithmetic_error():
    task, at = at_work("linf")
    with pytest.raises(ArithmeticError, match="positive definite"):
        HingedNewton.of(task, replace(at, p=torch.nan * at.p), 1e-3, 0.02)

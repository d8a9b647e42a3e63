"""Balls of norms: their Newton equations, followed to the steepest direction of a gradient."""

import pytest
import torch

import flowsim as fs
from flowsim.convex.balls import ball_of, supports_ball
from flowsim.layout import lay_out

TWO = lay_out({"A": (3, 2), "b": (4,)})
G = torch.randn(10, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
NORMS = {
    "l1": fs.L1(),
    "linf": fs.Linf(),
    "l2": fs.L2(),
    "l1.5": fs.Lp(1.5),
    "l4": fs.Lp(4.0),
    "max": fs.Max({"A": fs.L1(), "b": fs.Linf()}, {"b": 2.0}).bind(TWO),
}
DIRECTION = torch.randn(10, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def matrix(newton):
    return torch.diag(newton.stiff) + newton.low.mT @ (newton.weight[:, None] * newton.low)


@pytest.mark.parametrize("name", NORMS)
def test_newton_steps_lead_to_the_steepest_direction(name):
    norm = NORMS[name]
    ball = ball_of(norm, G, 0.1)
    assert norm.value(ball.v) <= 1 + 1e-12
    for _ in range(60):
        total, count = ball.pairs.products()
        if count and total < 1e-9:
            break
        mu = 0.2 * total / max(count, 1)
        newton = ball.newton(G, ball.pairs.targets(mu))
        dv = torch.linalg.solve(matrix(newton), newton.pull)
        d = newton.direction(dv, torch.zeros_like(G))
        primal, dual = (min(1.0, 0.9 * a) for a in ball.pairs.to_boundary(d.pairs))
        ball = ball.after(d, primal, dual)
    assert float(norm.dual(G) - G @ ball.v) == pytest.approx(0, abs=1e-6)
    assert float(norm.value(ball.v)) == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("name", ["l1", "linf", "max"])
def test_a_full_step_reaches_its_products_to_first_order(name):
    """Slack·dforce + force·dslack = target − slack·force, for any step of v and g that solves the
    reduced equations."""
    ball = ball_of(NORMS[name], G, 0.1)
    targets = ball.pairs.targets(0.03)
    newton, dg = ball.newton(G, targets), 0.1 * DIRECTION
    d = newton.direction(torch.linalg.solve(matrix(newton), dg + newton.pull), dg)
    kinds = zip(ball.pairs.slacks, ball.pairs.forces, d.pairs.slacks, d.pairs.forces, strict=True)
    for (s, f, ds, df), target in zip(kinds, targets, strict=True):
        torch.testing.assert_close(s * df + f * ds, target - s * f, rtol=0, atol=1e-10)
    torch.testing.assert_close(ball.after(d, 1.0, 1.0).v, ball.v + d.v)


def test_which_norms_have_a_ball():
    assert all(supports_ball(norm) for norm in NORMS.values())
    assert not supports_ball(fs.Spectral())
    assert not supports_ball(fs.Max(fs.Nuclear()))

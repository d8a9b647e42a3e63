"""An interior point method for a step of a flow of a net with kinks: the `Programme`.

Mehrotra's predictor and corrector from an infeasible start (Nocedal and Wright 2006, algorithm
16.4)."""

import math
from dataclasses import dataclass, replace

import torch

from flowsim.convex.balls import ball_of
from flowsim.convex.hinge_newton import HingedDirection, HingedIterate, HingedNewton
from flowsim.convex.outer import SoftMaximum
from flowsim.convex.pairs import Pairs
from flowsim.convex.programme import PerHinge, PerNeuron, PerRow, Programme
from flowsim.norms.norm import Norm


@dataclass(frozen=True)
class Optimum:
    """The best point, with the weights p and forces f that prove it to the duality ``gap``; Newton
    steps taken, and an iterate from which a similar programme may be continued."""

    v: PerNeuron
    p: PerRow
    f: PerHinge
    gap: float
    newton: int
    iterate: HingedIterate


def solve_hinged(
    programme: Programme, norm: Norm, tol: float, start: HingedIterate | None = None
) -> Optimum:
    """The optimum to a duality gap of ``tol``, for data scaled so that the expected gain is about
    1.

    Where rounding ends the progress, the best point so far is returned, with its gap."""
    at = _begun(programme, norm) if start is None else _continued(programme, start)
    best = newest = _feasible(programme, norm, at)
    keep = at
    stale = 0
    for count in range(1, 81):
        if best.gap <= tol or stale > 25:
            break
        try:
            at = _advanced(programme, at, newest.gap, tol)
        except ArithmeticError:  # equations that rounding has made singular
            break
        newest = _feasible(programme, norm, at)
        if not math.isfinite(newest.gap):
            break
        if newest.gap > 1e-3:
            keep = at
        stale = 0 if newest.gap < 0.9 * best.gap else stale + 1
        best = min(best, newest, key=lambda found: found.gap)
        best = replace(best, newton=count, iterate=keep)
    return best


def _begun(programme: Programme, norm: Norm) -> HingedIterate:
    """The usual start: v at the middle of the ball, weights between softmax and equal."""
    p = _first_weights(programme)
    force = programme.largest_force(p) / 2
    pull = programme.columns(p) - programme.forces_on_weights(force)
    unknowns = pull.numel() + int(programme.live.sum())
    mu = 0.1 / (2 * unknowns)
    ball = ball_of(norm, programme.flat(pull), mu)
    v = programme.blocked(ball.v)
    hinges = _first_hinges(programme, v, force, mu)
    margins = programme.margins(v, hinges.slacks[1])
    levels = programme.temperature * torch.log(p) + margins
    level = float(levels.mean())
    return HingedIterate(ball, programme.live, hinges, p, level)


def _first_weights(programme: Programme) -> PerRow:
    s = programme.where_live(programme.z.clamp_min(0))
    q = programme.offset - programme.hinge_loss(s)
    return SoftMaximum(programme.temperature).begin(q)


def _first_hinges(programme: Programme, v: PerNeuron, force: PerHinge, mu: float) -> Pairs:
    """Products of about μ with these forces on both sides."""
    reach = programme.z + programme.along(v)
    strongest = float(programme.kinks.abs().amax())
    least = 1e-3 * strongest / len(programme.offset) + 1e-300
    s = reach.clamp_min(0) + mu / force.clamp_min(least)
    s = programme.where_live(s, 1.0)
    above = programme.where_live(s - reach, 1.0)
    return Pairs((above, s), (force, force))


def _continued(programme: Programme, start: HingedIterate) -> HingedIterate:
    """An iterate of a similar programme, with a beginning for hinges that were not live in it."""
    new = programme.live & ~start.live
    force = programme.largest_force(start.p) / 2
    v = programme.blocked(start.ball.v)
    reach = programme.z + programme.along(v)
    s = reach.clamp_min(0) + 1e-3 * (1 + reach.abs())
    first = Pairs((s - reach, s), (force, force))
    hinges = first.where(new, start.hinges)
    return replace(start, live=programme.live, hinges=hinges)


def _feasible(programme: Programme, norm: Norm, at: HingedIterate) -> Optimum:
    """The feasible points nearest to an iterate, and their duality gap, free of cancellation."""
    v = at.ball.v
    v = v / norm.value(v).clamp_min(1.0)
    blocks = programme.blocked(v)
    p = at.p / at.p.sum()
    largest = programme.largest_force(p).clamp_min(0)
    up, _ = at.hinges.forces
    f = programme.where_live(up.minimum(largest))
    reach = programme.where_live(programme.z) + programme.along(blocks)
    s = reach.clamp_min(0)
    surprise = SoftMaximum(programme.temperature).gap(p, programme.margins(blocks, s))
    work = (largest * s - f * reach).sum()
    g = programme.gradient(p, f, blocks)
    gap = surprise + work + norm.dual(g) - g @ v
    return Optimum(blocks, p, f, float(gap), 0, at)


def _advanced(programme: Programme, at: HingedIterate, gap: float, tol: float) -> HingedIterate:
    """The next iterate; ArithmeticError where the equations cannot be solved."""
    total, count = at.products()
    # without products there is nothing to centre, and μ only smooths the ball
    mu = total / count if count else gap
    newton = HingedNewton.of(programme, at, gap, mu)
    affine = newton.direction(0.0 if count else 0.1 * mu)
    # products far below the gap, or below the one that is asked for, only make the equations worse
    least = max(0.2 * tol, 0.01 * gap) / max(count, 1)
    central = _centring(at, affine) * mu
    aim = max(central, min(mu, least))
    direction = newton.direction(aim, affine)
    primal, dual = at.to_boundary(direction)
    keep = max(0.95, 1 - mu)
    primal = min(1.0, keep * primal)
    dual = min(1.0, keep * dual, _steady(at.p, direction.p))
    return at.after(direction, primal, dual)


def _centring(at: HingedIterate, affine: HingedDirection) -> float:
    """The part of μ to aim at, by what the predictor leaves of the products."""
    primal, dual = (min(1.0, 0.9995 * a) for a in at.to_boundary(affine))
    now, _ = at.products()
    ahead, _ = at.after(affine, primal, dual).products()
    left = max(ahead, 0.0) / max(now, 1e-300)
    centring = max(1e-4, min(1.0, left) ** 3)
    short = min(primal, dual) < 0.1
    return min(0.8, max(centring, 0.3 if short else 0.0))


def _steady(p: PerRow, dp: PerRow) -> float:
    """How far the weights may go: none that counts to zero, none to more than six times its
    size."""
    to_zero = -0.95 * p / dp.clamp_max(-1e-300)
    to_six = 5 * p / dp.clamp_min(1e-300)
    falls = (p > 1e-2) & (dp < 0)
    rises = (p > 1e-3) & (dp > 0)
    ends = torch.cat([to_zero[falls], to_six[rises]])
    return min(ends.tolist(), default=math.inf)

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
    keep, stale = at, 0
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
        keep = at if newest.gap > 1e-3 else keep
        stale = 0 if newest.gap < 0.9 * best.gap else stale + 1
        best = replace(newest if newest.gap < best.gap else best, newton=count, iterate=keep)
    return best


def _begun(programme: Programme, norm: Norm) -> HingedIterate:
    """The usual start: v at the middle of the ball, weights between softmax and equal."""
    live = programme.live
    p = _first_weights(programme)
    force = programme.largest_force(p) / 2
    g = programme.flat(programme.columns(p) - programme.forces_on_weights(force))
    mu = 0.1 / (2 * (g.numel() + int(live.sum())))
    ball = ball_of(norm, g, mu)
    v = programme.blocked(ball.v)
    reach = programme.z + programme.along(v)
    least = 1e-3 * float(programme.kinks.abs().amax()) / len(p) + 1e-300
    s = torch.where(live, reach.clamp_min(0) + mu / force.clamp_min(least), 1.0)
    above = torch.where(live, s - reach, 1.0)
    level = (programme.temperature * torch.log(p) + programme.margins(v, s)).mean()
    return HingedIterate(ball, live, Pairs((above, s), (force, force)), p, float(level))


def _first_weights(programme: Programme) -> PerRow:
    s = torch.where(programme.live, programme.z.clamp_min(0), 0.0)
    q = programme.offset - programme.hinge_loss(s)
    return SoftMaximum(programme.temperature).begin(q)


def _continued(programme: Programme, start: HingedIterate) -> HingedIterate:
    """An iterate of a similar programme, with a beginning for hinges that were not live in it."""
    new = programme.live & ~start.live
    force = programme.largest_force(start.p) / 2
    reach = programme.z + programme.along(programme.blocked(start.ball.v))
    s = reach.clamp_min(0) + 1e-3 * (1 + reach.abs())
    (old_above, old_s), (old_up, old_down) = start.hinges.slacks, start.hinges.forces
    slacks = torch.where(new, s - reach, old_above), torch.where(new, s, old_s)
    forces = torch.where(new, force, old_up), torch.where(new, force, old_down)
    return replace(start, live=programme.live, hinges=Pairs(slacks, forces))


def _feasible(programme: Programme, norm: Norm, at: HingedIterate) -> Optimum:
    """The feasible points nearest to an iterate, and their duality gap, free of cancellation."""
    v = at.ball.v / norm.value(at.ball.v).clamp_min(1.0)
    blocks = programme.blocked(v)
    p = at.p / at.p.sum()
    largest = programme.largest_force(p).clamp_min(0)
    f = torch.where(programme.live, torch.minimum(at.hinges.forces[0], largest), 0.0)
    reach = torch.where(programme.live, programme.z, 0.0) + programme.along(blocks)
    s = reach.clamp_min(0)
    surprise = SoftMaximum(programme.temperature).gap(p, programme.margins(blocks, s))
    g = programme.flat(programme.gradient(p, f, blocks))
    gap = surprise + (largest * s - f * reach).sum() + norm.dual(g) - g @ v
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
    direction = newton.direction(max(_centring(at, affine) * mu, min(mu, least)), affine)
    primal, dual = at.to_boundary(direction)
    keep = max(0.95, 1 - mu)
    steady = min(keep * dual, _steady(at.p, direction.p))
    return at.after(direction, min(1.0, keep * primal), min(1.0, steady))


def _centring(at: HingedIterate, affine: HingedDirection) -> float:
    """The part of μ to aim at, by what the predictor leaves of the products."""
    primal, dual = (min(1.0, 0.9995 * a) for a in at.to_boundary(affine))
    ahead = at.after(affine, primal, dual).products()[0]
    left = min(1.0, max(ahead, 0.0) / max(at.products()[0], 1e-300))
    centring = min(0.8, max(1e-4, left**3))
    return max(centring, 0.3) if min(primal, dual) < 0.1 else centring


def _steady(p: PerRow, dp: PerRow) -> float:
    """How far the weights may go: none that counts to zero, none to more than six times its
    size."""
    falls = torch.where((p > 1e-2) & (dp < 0), -0.95 * p / dp.clamp_max(-1e-300), math.inf)
    rises = torch.where((p > 1e-3) & (dp > 0), 5 * p / dp.clamp_min(1e-300), math.inf)
    return float(torch.minimum(falls, rises).amin())

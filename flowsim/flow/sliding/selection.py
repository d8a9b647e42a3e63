"""Which pairs (neuron, example) their kinks hold at one place, and the ∇Λ of least dual norm over
the multipliers of those."""

import torch
from jaxtyping import Bool
from torch import Tensor

from flowsim.convex import box
from flowsim.flow.sliding.forces import ActivePairs, Metric, squares
from flowsim.numerics.shapes import PerPair, PerTrajectory, Rows
from flowsim.problems.kinks import NetAt


def between(multipliers: Tensor) -> Bool[Tensor, "..."]:
    """Which pairs slide: those whose multiplier is at neither end."""
    return (multipliers > 0) & (multipliers < 1)


def count(mask: Tensor) -> PerTrajectory:
    """How many pairs of each trajectory are in ``mask``."""
    return mask.flatten(1).sum(-1).double()


def on_kink(point: NetAt) -> Bool[Tensor, "B N m"]:
    """Which pairs have z = 0 to rounding."""
    inputs = squares(point).sqrt()
    weights = torch.linalg.vector_norm(point.first, dim=-1)
    eps = torch.finfo(point.z.dtype).eps
    d = point.net.x.shape[-1]
    rounding = 16 * eps * d**0.5
    largest = rounding * inputs * weights[:, None]
    return point.z.abs() <= largest


def sides_at(point: NetAt, stored: Tensor | None) -> PerPair:
    """The stored multipliers of pairs on or within rounding of their kink, else the side that z
    shows: 0 for z < 0, 1 for z > 0."""
    shown = (point.z > 0).to(point.z)
    if stored is None:
        return shown
    stored = stored.view_as(shown)
    kept = between(stored) | on_kink(point)
    return torch.where(kept, stored, shown)


def fraction_of(force: Tensor, upper: Tensor) -> Tensor:
    """A force over its bound; 0 where there is none."""
    largest = torch.where(upper > 0, upper, 1.0)
    return force / largest


def least_gradient(
    metric: Metric,
    point: NetAt,
    given: PerPair,
    stuck: Bool[Tensor, "B N m"],
) -> tuple[PerPair, Rows]:
    """Multipliers and the ∇Λ of least dual norm, over the kinks that hold the pairs in ``stuck``.

    The others are on the side that z shows; a stuck pair whose kink repels is let go, to the side
    whose multiplier is nearer."""
    hangs = stuck & (point.jump < 0)
    sides = sides_at(point, None)
    sides = torch.where(stuck, (given >= 0.5).to(given), sides)
    pairs = ActivePairs.of(point, hangs, metric)
    without = torch.where(hangs, 0.0, sides)
    free = point.gradient(point.slopes(without))  # ∇Λ without forces
    upper = -pairs.take(point.jump)
    ahead = pairs.along(metric.inverse(free))
    guess = upper * pairs.take(given)
    gram = pairs.gram(metric)
    force = box.solve_box(gram, ahead, upper, start=guess).force
    h = free - pairs.combine(force)
    return pairs.put(sides, fraction_of(force, upper)), h

"""Slacks and the forces that they exert, of which the products tend to zero in an interior point
method. Points and directions have the same parts."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

Products: TypeAlias = tuple[Tensor, ...]
"""One tensor for every kind of inequality."""


@dataclass(frozen=True)
class Pairs:
    """Slacks ≥ 0 and forces ≥ 0, one tensor of each for every kind of inequality; or a direction of
    both."""

    slacks: Products = ()
    forces: Products = ()

    @property
    def kinds(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Slack and force of each kind of inequality."""
        return zip(self.slacks, self.forces, strict=True)

    def products(self) -> tuple[float, int]:
        """The sum of slacks times forces, and how many there are."""
        totals = [f.flatten() @ s.flatten() for s, f in self.kinds]
        count = sum(f.numel() for f in self.forces)
        return float(sum(totals)), count

    def targets(self, mu: float, before: "Pairs | None" = None) -> Products:
        """The products that a step is to reach: μ, corrected to second order after ``before``
        (Mehrotra)."""
        if before is None:
            return tuple(torch.full_like(f, mu) for f in self.forces)
        return tuple(mu - s * f for s, f in before.kinds)

    def to_boundary(self, d: "Pairs") -> tuple[float, float]:
        """How far slacks and forces may go along a direction before one of them is zero."""
        primal = _to_zero(self.slacks, d.slacks)
        dual = _to_zero(self.forces, d.forces)
        return primal, dual

    def after(self, d: "Pairs", primal: float, dual: float) -> "Pairs":
        """The pairs after these fractions of a direction."""
        slacks = _moved(self.slacks, d.slacks, primal)
        forces = _moved(self.forces, d.forces, dual)
        return Pairs(slacks, forces)

    def where(self, chosen: Tensor, others: "Pairs") -> "Pairs":
        """These pairs where ``chosen``, and the others elsewhere."""
        slacks = _chosen(chosen, self.slacks, others.slacks)
        forces = _chosen(chosen, self.forces, others.forces)
        return Pairs(slacks, forces)


def _chosen(chosen: Tensor, xs: Products, others: Products) -> Products:
    choices = zip(xs, others, strict=True)
    return tuple(torch.where(chosen, x, other) for x, other in choices)


def _to_zero(xs: Products, dxs: Products) -> float:
    """The largest a with x + a·dx ≥ 0."""
    least = math.inf
    for x, dx in zip(xs, dxs, strict=True):
        falling = dx < 0
        if bool(falling.any()):
            ends = -x[falling] / dx[falling]
            least = min(least, float(ends.amin()))
    return least


def _moved(xs: Products, dxs: Products, a: float) -> Products:
    moves = zip(xs, dxs, strict=True)
    return tuple(x + a * dx for x, dx in moves)

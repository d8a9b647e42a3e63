"""Slacks and the forces that they exert, of which the products tend to zero in an interior point
method. Points and directions have the same parts."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Pairs:
    """Slacks ≥ 0 and forces ≥ 0, one tensor of each for every kind of inequality; or a direction of
    both."""

    slacks: tuple[Tensor, ...] = ()
    forces: tuple[Tensor, ...] = ()

    def products(self) -> tuple[float, int]:
        """The sum of slacks times forces, and how many there are."""
        pairs = zip(self.slacks, self.forces, strict=True)
        total = sum(f.flatten() @ s.flatten() for s, f in pairs)
        return float(total), sum(f.numel() for f in self.forces)

    def targets(self, mu: float, before: "Pairs | None" = None) -> tuple[Tensor, ...]:
        """The products that a step is to reach: μ, corrected to second order after ``before``
        (Mehrotra)."""
        if before is None:
            return tuple(torch.full_like(f, mu) for f in self.forces)
        return tuple(mu - s * f for s, f in zip(before.slacks, before.forces, strict=True))

    def to_boundary(self, d: "Pairs") -> tuple[float, float]:
        """How far slacks and forces may go along a direction before one of them is zero."""
        return _to_zero(self.slacks, d.slacks), _to_zero(self.forces, d.forces)

    def after(self, d: "Pairs", primal: float, dual: float) -> "Pairs":
        """The pairs after these fractions of a direction."""
        return Pairs(_moved(self.slacks, d.slacks, primal), _moved(self.forces, d.forces, dual))


def _to_zero(xs: tuple[Tensor, ...], dxs: tuple[Tensor, ...]) -> float:
    """The largest a with x + a·dx ≥ 0."""
    ends = [
        torch.where(dx < 0, -x / torch.where(dx < 0, dx, 1.0), torch.inf)
        for x, dx in zip(xs, dxs, strict=True)
    ]
    return min((float(end.amin()) for end in ends if end.numel()), default=math.inf)


def _moved(xs: tuple[Tensor, ...], dxs: tuple[Tensor, ...], a: float) -> tuple[Tensor, ...]:
    return tuple(x + a * dx for x, dx in zip(xs, dxs, strict=True))

"""Zeros of falling functions, elementwise."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from flowsim.numerics.shapes import PerVector

_MOST = 150  # steps; bisection alone takes about 60


def find_zero(
    f: Callable[[Tensor], Tensor],
    low: Tensor,
    high: Tensor,
    *,
    xtol: float = 0.0,
    ftol: Tensor | float = 0.0,
) -> PerVector:
    """The zero of a decreasing ``f`` from ``low`` to ``high``, elementwise; the nearer end if there
    is none.

    Inverse quadratic interpolation inside a bracket, else bisection (Chandrupatla 1997), to the
    last bits; or to ``xtol`` times the bracket, or until ``|f| <= ftol``.

    >>> find_zero(lambda x: 2 - x**2, torch.tensor([0.0, 3.0]), torch.tensor([2.0, 4.0]))
    tensor([1.4142, 3.0000])
    """
    bracket = _Bracket.around(f, low, high)
    eps = torch.finfo(low.dtype).eps
    atol = max(xtol, eps**2) * bracket.width
    at_low = bracket.f1 <= ftol
    at_high = bracket.f2 >= -ftol
    best = torch.where(at_low, bracket.x1, bracket.x2)
    done = at_low | at_high
    t = torch.full_like(best, 0.5)
    for _ in range(_MOST):
        x = torch.where(done, best, bracket.at(t))
        bracket = bracket.with_point(x, f(x))
        best = torch.where(done, best, bracket.best)
        least = (2 * eps * best.abs() + atol) / bracket.width
        narrow = ~(least < 0.5)
        done = done | narrow | (bracket.f1.abs() <= ftol)
        if bool(done.all()):
            break
        t = bracket.guess()
        t = t.maximum(least).minimum(1 - least)
    return best


@dataclass(frozen=True)
class _Bracket:
    """The newest point x1, the end x2 on the other side of the zero, the point x3 that they
    replaced, and f there."""

    x1: Tensor
    x2: Tensor
    x3: Tensor
    f1: Tensor
    f2: Tensor
    f3: Tensor

    @staticmethod
    def around(f: Callable[[Tensor], Tensor], low: Tensor, high: Tensor) -> "_Bracket":
        x1, x2, f1, f2 = torch.broadcast_tensors(low, high, f(low), f(high))
        return _Bracket(x1, x2, x2, f1, f2, f2)

    @property
    def width(self) -> Tensor:
        return (self.x2 - self.x1).abs()

    @property
    def best(self) -> Tensor:
        return torch.where(self.f1.abs() < self.f2.abs(), self.x1, self.x2)

    def at(self, t: Tensor) -> Tensor:
        return self.x1 + t * (self.x2 - self.x1)

    def with_point(self, x: Tensor, fx: Tensor) -> "_Bracket":
        """A point between the ends takes the place of the end on its side."""
        same = (fx > 0) == (self.f1 > 0)
        x3 = torch.where(same, self.x1, self.x2)
        f3 = torch.where(same, self.f1, self.f2)
        x2 = torch.where(same, self.x2, self.x1)
        f2 = torch.where(same, self.f2, self.f1)
        return _Bracket(x, x2, x3, fx, f2, f3)

    def guess(self) -> Tensor:
        """Where between x1 (0) and x2 (1) the inverse parabola through the points is zero, if it is
        monotone there; else the middle."""
        x1 = self.x1
        x2 = self.x2
        x3 = self.x3
        f1 = self.f1
        f2 = self.f2
        f3 = self.f3
        xi = (x1 - x2) / (x3 - x2)
        phi = (f1 - f2) / (f3 - f2)
        rising = phi**2 < xi
        falling = (1 - phi) ** 2 < 1 - xi
        from_x2 = f1 / (f2 - f1) * f3 / (f2 - f3)
        from_x3 = (x3 - x1) / (x2 - x1) * f1 / (f3 - f1) * f2 / (f3 - f2)
        return torch.where(rising & falling, from_x2 + from_x3, 0.5)

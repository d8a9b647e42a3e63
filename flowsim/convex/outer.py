r"""Convex functions f of few numbers by their conjugates, as `in_ball` minimises them over a ball:

min f(b + Av) over ‖v‖ ≤ 1  =  max −(⟨p, b⟩ + f*(−p) + ‖Aᵀp‖_*) over p."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Protocol, TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor

DualPath: TypeAlias = tuple[float, Callable[[float], Tensor]]
"""How far a curve from p may be followed, and the curve."""


@dataclass(frozen=True)
class Conjugate:
    """f*(−p), its gradient ``slope`` and the ``diagonal`` of its Hessian."""

    value: Float[Tensor, ""]
    slope: Float[Tensor, " n"]
    diagonal: Float[Tensor, " n"]


class Outer(Protocol):
    """A convex f, by its conjugate. ``mu`` adds a barrier to f*(−p) where its domain has a
    boundary."""

    @property
    def simplex(self) -> bool:
        """Whether Σp = 1."""

    def begin(self, b: Tensor) -> Tensor:
        """Some p inside the domain."""

    def inside(self, p: Tensor, mu: float) -> Tensor:
        """p moved off the boundary by about μ."""

    def dual(self, p: Tensor, mu: float) -> Conjugate:
        """f*(−p)."""

    def gap(self, p: Tensor, z: Tensor) -> Tensor:
        """f(z) + f*(−p) + ⟨p, z⟩ ≥ 0, free of cancellation."""

    def paths(self, p: Tensor, d: Tensor) -> list[DualPath]:
        """Curves that leave p in the direction d, and how far each may be followed."""


@dataclass(frozen=True)
class SoftMaximum:
    """f(z) = T log Σ e^(−z/T), T > 0. Its dual variables p are the softmax weights; −f* is T times
    their entropy."""

    temperature: float
    simplex: ClassVar[bool] = True

    def begin(self, b: Tensor) -> Tensor:
        """Between softmax and equal weights."""
        heat = max(self.temperature, 0.3)
        softmax = torch.softmax(-b / heat, 0)
        return 0.9 * softmax + 0.1 / len(b)

    def inside(self, p: Tensor, mu: float) -> Tensor:
        p = p + 0.1 * min(mu, 1 / len(p))
        return p / p.sum()

    def dual(self, p: Tensor, mu: float) -> Conjugate:
        heat = max(self.temperature, mu)
        barrier = 0.5 * mu
        log = torch.log(p)
        value = heat * (p * log).sum() - barrier * log.sum()
        slope = heat * (1 + log) - barrier / p
        diagonal = heat / p + barrier / p**2
        return Conjugate(value, slope, diagonal)

    def gap(self, p: Tensor, z: Tensor) -> Tensor:
        log = torch.log_softmax(-z / self.temperature, 0)
        surprise = p * (torch.log(p) - log)
        terms = surprise - p + torch.exp(log)
        return self.temperature * terms.sum()

    def paths(self, p: Tensor, d: Tensor) -> list[DualPath]:
        def straight(a: float) -> Tensor:
            q = p + a * d
            return q / q.sum()

        def curved(a: float) -> Tensor:
            # where p falls, 1/p moves linearly: Newton's method on a barrier then has no boundary
            # to hit
            fallen = p / (1 - a * d.clamp_max(0) / p)
            q = torch.where(d < 0, fallen, p + a * d)
            return q / q.sum()

        fastest = float((-d / p).amax())
        longest = 0.95 / max(fastest, 0.1)
        if longest > 1:
            return [(1.0, straight)]
        return [(longest, straight), (1.0, curved)]


@dataclass(frozen=True)
class HalfSquare:
    """f(z) = ½‖z‖²; p = −z at the solution."""

    simplex: ClassVar[bool] = False

    def begin(self, b: Tensor) -> Tensor:
        return -b

    def inside(self, p: Tensor, mu: float) -> Tensor:
        return p

    def dual(self, p: Tensor, mu: float) -> Conjugate:
        value = 0.5 * (p @ p)
        return Conjugate(value, p, torch.ones_like(p))

    def gap(self, p: Tensor, z: Tensor) -> Tensor:
        return 0.5 * ((p + z) ** 2).sum()

    def paths(self, p: Tensor, d: Tensor) -> list[DualPath]:
        return [(1.0, lambda a: p + a * d)]

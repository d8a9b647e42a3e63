r"""The unit ball of a norm for primal-dual interior point methods.

The point of a ball where ``<g, v>`` is largest solves ``v ∈ ∂‖g‖_*``. An interior point method
follows the solutions of the same conditions with every product of a slack and its force equal to a
number that shrinks,

    l-infinity   λ⁺(ρ − v) = λ⁻(ρ + v) = μ,   λ⁺ − λ⁻ = g
    l1           v⁺(τ − g) = v⁻(τ + g) = τγ = μ,   v = v⁺ − v⁻,   Σ v⁺ + Σ v⁻ + γ = ρ

and in a ball bounded by a smooth norm ``v`` is the gradient of the dual norm, or g that of the
norm. Newton's method for these conditions needs from a ball how a step of v answers to one of g:

    (diag(stiff) + Σ weight·low lowᵀ) dv = dg + pull.

All tensors are ``(P,)``; the largest of several blocks has one ball for each (`ProductBall`).
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Self, TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor

from flowsim.convex.pairs import Pairs
from flowsim.convex.smoothed import Curve, curved
from flowsim.norms.blocks import Max
from flowsim.norms.norm import Norm
from flowsim.norms.vector import L1, L2, Linf, Lp
from flowsim.numerics.shapes import Row

Vector: TypeAlias = Row
Products: TypeAlias = tuple[Tensor, ...]
"""One tensor for every kind of inequality: see `Pairs`."""


@dataclass(frozen=True)
class BallDirection:
    """A Newton direction of the point, and of its slacks and forces."""

    v: Vector
    pairs: Pairs


@dataclass(frozen=True)
class BallNewton:
    """The Newton equations of a ball: see the module. ``direction`` makes of dv and dg the
    direction of all that the ball holds."""

    stiff: Vector
    pull: Vector
    low: Float[Tensor, "k P"]
    weight: Float[Tensor, " k"]
    direction: Callable[[Tensor, Tensor], BallDirection]


@dataclass(frozen=True)
class BallIterate(ABC):
    """A point inside a ball, with its slacks and forces."""

    v: Vector
    pairs: Pairs

    @abstractmethod
    def newton(self, g: Vector, targets: Products) -> BallNewton:
        """The Newton equations at g towards these products of slacks and forces."""

    def after(self, d: BallDirection, primal: float, dual: float) -> Self:
        """The ball after these fractions of a direction."""
        return replace(self, v=self.v + primal * d.v)


@dataclass(frozen=True)
class LinfBall(BallIterate):
    """The ℓ∞ ball of radius ρ."""

    radius: float

    @staticmethod
    def at(v: Tensor, forces: Products, radius: float) -> "LinfBall":
        return LinfBall(v, Pairs((radius - v, radius + v), forces), radius)

    @staticmethod
    def begin(g: Tensor, mu: float, radius: float) -> "LinfBall":
        total = torch.hypot(g, torch.full_like(g, mu / radius)) + mu / radius
        return LinfBall.at(torch.zeros_like(g), ((total + g) / 2, (total - g) / 2), radius)

    def newton(self, g: Tensor, targets: Products) -> BallNewton:
        (high, low), (above, below) = self.pairs.slacks, self.pairs.forces
        up, down = targets

        def direction(dv: Tensor, dg: Tensor) -> BallDirection:
            rise = (up + above * dv) / high - above
            fall = (down - below * dv) / low - below
            return BallDirection(dv, Pairs((-dv, dv), (rise, fall)))

        stiff = above / high + below / low
        pull = g - up / high + down / low
        return BallNewton(stiff, pull, g.new_zeros(0, len(g)), g.new_zeros(0), direction)

    def after(self, d: BallDirection, primal: float, dual: float) -> "LinfBall":
        forces = self.pairs.after(d.pairs, primal, dual).forces
        return LinfBall.at(self.v + primal * d.v, forces, self.radius)


@dataclass(frozen=True)
class L1Ball(BallIterate):
    """The ℓ1 ball of radius ρ: slacks v⁺, v⁻ and γ, what is left of ρ, with the forces τ − g, τ + g
    and τ."""

    @staticmethod
    def at(pairs: Pairs) -> "L1Ball":
        return L1Ball(pairs.slacks[0] - pairs.slacks[1], pairs)

    @staticmethod
    def begin(g: Tensor, mu: float, radius: float) -> "L1Ball":
        part = torch.full_like(g, 0.45 * radius / len(g))
        spare = g.new_tensor(0.1 * radius)
        top = g.abs().amax() + mu * len(g) / radius
        floor = 0.1 * mu * len(g) / radius
        above = (top - g).clamp_min(floor)
        below = (top + g).clamp_min(floor)
        return L1Ball.at(Pairs((part, part, spare), (above, below, top)))

    def newton(self, g: Tensor, targets: Products) -> BallNewton:
        budget = _Budget.of(self.pairs, g, targets)
        moved = budget.forth - budget.back + budget.tilt * budget.short / budget.spread
        lean = budget.tilt / budget.total
        weight = 1 / (budget.slack + (4 * budget.right * budget.left / budget.total).sum())
        pull = moved / budget.total + weight * lean * (lean @ moved)

        def direction(dv: Tensor, dg: Tensor) -> BallDirection:
            above, below, top = self.pairs.forces
            dtop = budget.top(dg)
            dspare = (targets[2] - self.pairs.slacks[2] * (top + dtop)) / top
            dabove = top + dtop - g - dg - above
            dbelow = top + dtop + g + dg - below
            slacks = (*budget.parts(dv, dg, dtop), dspare)
            return BallDirection(dv, Pairs(slacks, (dabove, dbelow, dtop)))

        return BallNewton(1 / budget.total, pull, lean[None], weight[None], direction)

    def after(self, d: BallDirection, primal: float, dual: float) -> "L1Ball":
        return L1Ball.at(self.pairs.after(d.pairs, primal, dual))


@dataclass(frozen=True)
class _Budget:
    """The Newton equations of the ℓ1 ball without its forces,

        dv⁺ = forth + right (dg − dτ),   dv⁻ = back − left (dg + dτ),
        dτ = (⟨tilt, dg⟩ − short)/spread,

    the last from the budget Σ v⁺ + Σ v⁻ + γ = ρ, so that dv = total·dg − tilt·dτ + forth − back."""

    right: Vector
    left: Vector
    slack: Float[Tensor, ""]
    forth: Vector
    back: Vector
    short: Float[Tensor, ""]

    @staticmethod
    def of(pairs: Pairs, g: Tensor, targets: Products) -> "_Budget":
        top = pairs.forces[2]
        right, left, slack = (s / f for s, f in zip(pairs.slacks, pairs.forces, strict=True))
        up, down, rest = (t / f for t, f in zip(targets, pairs.forces, strict=True))
        forth = up - right * (top - g)
        back = down - left * (top + g)
        short = pairs.slacks[2] - (forth + back).sum() - rest
        return _Budget(right, left, slack, forth, back, short)

    @property
    def total(self) -> Vector:
        return self.right + self.left

    @property
    def tilt(self) -> Vector:
        return self.right - self.left

    @property
    def spread(self) -> Float[Tensor, ""]:
        return self.total.sum() + self.slack

    def top(self, dg: Tensor) -> Float[Tensor, ""]:
        """dτ."""
        return (self.tilt @ dg) / self.spread - self.short / self.spread

    def parts(self, dv: Tensor, dg: Tensor, dtop: Tensor) -> tuple[Tensor, Tensor]:
        """dv⁺ and dv⁻. The looser of the two follows from dv: its own equation divides by a force
        that vanishes."""
        plus = self.forth + self.right * (dg - dtop)
        minus = self.back - self.left * (dg + dtop)
        loose = self.right > self.left
        return torch.where(loose, dv + minus, plus), torch.where(loose, minus, plus - dv)


@dataclass(frozen=True)
class L2Ball(BallIterate):
    """The ball of radius ρ of ℓ2 or ℓp, p ≤ 2: v follows the gradient of the smoothed dual norm,
    without forces.

    Like `LpBall` it stays on the sphere, so that it fails where the best v is inside, as g vanishes
    there."""

    norm: Norm
    radius: float

    def newton(self, g: Tensor, targets: Products) -> BallNewton:
        curve = _rounded(self.norm, g)
        diagonal = self.radius * curve.diagonal
        twist = self.radius * curve.twist
        missing = self.radius * curve.slope - self.v
        lean = curve.along / diagonal
        # the inverse of diag(diagonal) + twist·along alongᵀ
        weight = -twist / (1 + twist * (curve.along @ lean)).clamp_min(1e-14)
        pull = missing / diagonal + weight * lean * (lean @ missing)
        return BallNewton(1 / diagonal, pull, lean[None], weight[None], _of_point)


@dataclass(frozen=True)
class LpBall(BallIterate):
    """The ball of radius ρ of ℓp, p > 2, where v is not a smooth function of g but g is one of v:
    g = τ∇‖v‖ with τ = ‖g‖_*. The change of ‖v‖ is held by a stiff spring.

    Where a number of v vanishes so does the stiffness; there that of the v which goes with g takes
    its place."""

    p: float
    radius: float

    def newton(self, g: Tensor, targets: Products) -> BallNewton:
        p = self.p
        q = self.p / (self.p - 1)
        length = torch.linalg.vector_norm(self.v, p)
        force = torch.linalg.vector_norm(g, q)
        unit = self.v / length
        normal = torch.sign(unit) * unit.abs() ** (p - 1)
        largest = torch.maximum(unit.abs(), (g.abs() / force) ** (q - 1)).clamp_min(1e-6)
        stiff = (p - 1) * force / length * largest ** (p - 2)
        spring = 1e6 * force / self.radius
        pull = g - force * normal + spring * (self.radius - length) * normal
        return BallNewton(stiff, pull, normal[None], spring[None], _of_point)


@dataclass(frozen=True)
class ProductBall(BallIterate):
    """The ball of a maximum over blocks, one after the other in the weights."""

    balls: tuple[BallIterate, ...]

    @staticmethod
    def of(balls: tuple[BallIterate, ...]) -> "ProductBall":
        pairs = _joined([ball.pairs for ball in balls])
        return ProductBall(torch.cat([ball.v for ball in balls]), pairs, balls)

    def newton(self, g: Tensor, targets: Products) -> BallNewton:
        blocks = zip(self.balls, self._split(g), self._kinds(targets), strict=True)
        parts = [ball.newton(x, products) for ball, x, products in blocks]

        def direction(dv: Tensor, dg: Tensor) -> BallDirection:
            steps = zip(parts, self._split(dv), self._split(dg), strict=True)
            return BallDirection(dv, _joined([part.direction(x, y).pairs for part, x, y in steps]))

        return BallNewton(
            torch.cat([part.stiff for part in parts]),
            torch.cat([part.pull for part in parts]),
            torch.block_diag(*[part.low for part in parts]).view(-1, len(g)),
            torch.cat([part.weight for part in parts]),
            direction,
        )

    def after(self, d: BallDirection, primal: float, dual: float) -> "ProductBall":
        pairs = map(Pairs, self._kinds(d.pairs.slacks), self._kinds(d.pairs.forces))
        parts = map(BallDirection, self._split(d.v), pairs)
        moves = zip(self.balls, parts, strict=True)
        return ProductBall.of(tuple(ball.after(part, primal, dual) for ball, part in moves))

    def _split(self, v: Tensor) -> Sequence[Tensor]:
        return v.split([len(ball.v) for ball in self.balls])

    def _kinds(self, tensors: Products) -> list[Products]:
        """One tensor of every inequality as those of each ball."""
        rest = iter(tensors)
        return [tuple(islice(rest, len(ball.pairs.slacks))) for ball in self.balls]


def supports_ball(norm: Norm) -> bool:
    """Whether `ball_of` makes one for the norm: ℓ1, ℓ2, ℓ∞, ℓp, and their maximum over blocks."""
    if isinstance(norm, Max):
        return all(supports_ball(part) for part in norm.norms)
    return isinstance(norm, L1 | L2 | Linf | Lp)


def ball_of(norm: Norm, g: Vector, mu: float, radius: float = 1.0) -> BallIterate:
    """A point well inside the ball of a (bound) norm, for gradients like g and products near μ."""
    if isinstance(norm, Max):
        parts = norm.blocks_of(g)
        return ProductBall.of(tuple(ball_of(p.norm, p.of(g), mu, p.scale) for p in parts))
    if isinstance(norm, Linf):
        return LinfBall.begin(g, mu, radius)
    if isinstance(norm, L1):
        return L1Ball.begin(g, mu, radius)
    v = radius * _rounded(norm, g).slope
    if isinstance(norm, Lp) and norm.p > 2:
        return LpBall(v, Pairs(), norm.p, radius)
    return L2Ball(v, Pairs(), norm, radius)


def _of_point(dv: Tensor, dg: Tensor) -> BallDirection:
    """The direction of a ball that holds nothing but its point."""
    return BallDirection(dv, Pairs())


def _joined(pairs: list[Pairs]) -> Pairs:
    slacks = tuple(s for each in pairs for s in each.slacks)
    return Pairs(slacks, tuple(f for each in pairs for f in each.forces))


def _rounded(norm: Norm, g: Tensor) -> Curve:
    """The dual norm at g, smooth also where numbers of g vanish."""
    return curved(norm, g, 1e-7 * float(norm.dual(g)) + 1e-12)

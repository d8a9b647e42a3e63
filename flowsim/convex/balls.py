r"""The unit ball of a norm for primal-dual interior point methods.

The point of a ball where ``<g, v>`` is largest solves ``v ∈ ∂‖g‖_*``. An interior point method
follows the solutions of the same conditions with every product of a slack and its multiplier equal
to a number that shrinks,

    l-infinity   λ⁺(ρ − v) = λ⁻(ρ + v) = μ,   λ⁺ − λ⁻ = g
    l1           v⁺(τ − g) = v⁻(τ + g) = τγ = μ,   v = v⁺ − v⁻,   Σ v⁺ + Σ v⁻ + γ = ρ

and in a ball bounded by a smooth norm ``v`` is the gradient of the dual norm, or g that of the
norm. Newton's method for these conditions needs from a ball how a step of v answers to one of g:

    (diag(stiff) + Σ weight·low lowᵀ) dv = dg + pull.

All tensors are ``(P,)``; the largest of several blocks has one ball for each (`ProductBall`).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol, Self

import torch
from jaxtyping import Float
from torch import Tensor

from flowsim.convex.smoothed import Curve, curved
from flowsim.norms.blocks import Max
from flowsim.norms.norm import Norm
from flowsim.norms.vector import L1, L2, Linf, Lp


@dataclass(frozen=True)
class BallNewton:
    """The Newton equations of a ball: see the module. ``low (k, P)``, ``weight (k,)``; ``targets``
    are the products that its slacks and multipliers are to have."""

    stiff: Float[Tensor, " P"]
    pull: Float[Tensor, " P"]
    low: Float[Tensor, "k P"]
    weight: Float[Tensor, " k"]
    targets: tuple[Tensor, ...] = ()
    parts: "tuple[BallNewton, ...]" = ()


@dataclass(frozen=True)
class BallDirection:
    """A Newton direction: of v, of what else is primal, and of the multipliers."""

    v: Float[Tensor, " P"]
    primal: tuple[Tensor, ...] = ()
    dual: tuple[Tensor, ...] = ()
    parts: "tuple[BallDirection, ...]" = ()


class BallIterate(Protocol):
    """A point inside a ball with its multipliers."""

    @property
    def v(self) -> Float[Tensor, " P"]:
        """The point."""

    def products(self) -> tuple[float, int]:
        """The sum of slacks times multipliers, and how many there are."""

    def response(self, g: Tensor, mu: float, before: BallDirection | None = None) -> BallNewton:
        """The Newton equations at g towards products of μ, corrected to second order after
        ``before``."""

    def turn(self, response: BallNewton, g: Tensor, dv: Tensor, dg: Tensor) -> BallDirection:
        """The Newton direction of the multipliers that goes with those of v and g."""

    def to_boundary(self, turn: BallDirection) -> tuple[float, float]:
        """How far primal and dual variables may go along a direction before one of them is zero."""

    def after(self, turn: BallDirection, primal: float, dual: float) -> Self:
        """The ball after these shares of a direction."""


def to_boundary(x: Tensor, dx: Tensor) -> float:
    """The largest a with x + a·dx ≥ 0."""
    if not x.numel():
        return math.inf
    return float(torch.where(dx < 0, -x / torch.where(dx < 0, dx, 1.0), torch.inf).amin())


@dataclass(frozen=True)
class LinfBall:
    """The ℓ∞ ball of radius ρ."""

    v: Tensor
    above: Tensor
    below: Tensor
    radius: float

    @staticmethod
    def begin(g: Tensor, mu: float, radius: float) -> "LinfBall":
        size = torch.hypot(g, torch.full_like(g, mu / radius)) + mu / radius
        return LinfBall(torch.zeros_like(g), (size + g) / 2, (size - g) / 2, radius)

    def _slacks(self) -> tuple[Tensor, Tensor]:
        return self.radius - self.v, self.radius + self.v

    def products(self) -> tuple[float, int]:
        high, low = self._slacks()
        return float(self.above @ high + self.below @ low), 2 * len(self.v)

    def response(self, g: Tensor, mu: float, before: BallDirection | None = None) -> BallNewton:
        high, low = self._slacks()
        up = down = torch.full_like(g, mu)
        if before is not None:
            up, down = mu + before.dual[0] * before.v, mu - before.dual[1] * before.v
        stiff = self.above / high + self.below / low
        return BallNewton(
            stiff, g - up / high + down / low, g.new_zeros(0, len(g)), g.new_zeros(0), (up, down)
        )

    def turn(self, response: BallNewton, g: Tensor, dv: Tensor, dg: Tensor) -> BallDirection:
        (up, down), (high, low) = response.targets, self._slacks()
        above = (up + self.above * dv) / high - self.above
        return BallDirection(dv, dual=(above, (down - self.below * dv) / low - self.below))

    def to_boundary(self, turn: BallDirection) -> tuple[float, float]:
        high, low = self._slacks()
        above, below = turn.dual
        return min(to_boundary(high, -turn.v), to_boundary(low, turn.v)), min(
            to_boundary(self.above, above), to_boundary(self.below, below)
        )

    def after(self, turn: BallDirection, primal: float, dual: float) -> "LinfBall":
        above, below = turn.dual
        return replace(
            self,
            v=self.v + primal * turn.v,
            above=self.above + dual * above,
            below=self.below + dual * below,
        )


@dataclass(frozen=True)
class L1Ball:
    """The ℓ1 ball of radius ρ: v = plus − minus; ``spare`` is what is left of ρ and ``top`` its
    multiplier."""

    plus: Tensor
    minus: Tensor
    spare: Tensor
    above: Tensor
    below: Tensor
    top: Tensor

    @staticmethod
    def begin(g: Tensor, mu: float, radius: float) -> "L1Ball":
        share = torch.full_like(g, 0.45 * radius / len(g))
        top = g.abs().amax() + mu * len(g) / radius
        floor = 0.1 * mu * len(g) / radius
        return L1Ball(
            share,
            share,
            g.new_tensor(0.1 * radius),
            (top - g).clamp_min(floor),
            (top + g).clamp_min(floor),
            top,
        )

    @property
    def v(self) -> Tensor:
        return self.plus - self.minus

    def products(self) -> tuple[float, int]:
        total = self.above @ self.plus + self.below @ self.minus + self.top * self.spare
        return float(total), 2 * len(self.plus) + 1

    def response(self, g: Tensor, mu: float, before: BallDirection | None = None) -> BallNewton:
        up = down = torch.full_like(g, mu)
        rest = g.new_tensor(mu)
        if before is not None:
            (plus, minus, spare), (above, below, top) = before.primal, before.dual
            up, down, rest = mu - plus * above, mu - minus * below, mu - spare * top
        right, left = self.plus / self.above, self.minus / self.below
        forth, back = (
            up / self.above - right * (self.top - g),
            down / self.below - left * (self.top + g),
        )
        total, tilt = right + left, right - left
        slack = self.spare / self.top
        # dv = total·dg − tilt·dτ + forth − back, and the budget gives dτ = (⟨tilt, dg⟩ −
        # short)/spread
        short = self.spare - (forth + back).sum() - rest / self.top
        spread = total.sum() + slack
        moved = forth - back + tilt * short / spread
        lean = tilt / total
        weight = 1 / (slack + (4 * right * left / total).sum())
        pull = moved / total + weight * lean * (lean @ moved)
        return BallNewton(
            1 / total, pull, lean[None], weight[None], (up, down, rest, forth, back, short / spread)
        )

    def turn(self, response: BallNewton, g: Tensor, dv: Tensor, dg: Tensor) -> BallDirection:
        _, _, rest, forth, back, short = response.targets
        right, left = self.plus / self.above, self.minus / self.below
        top = ((right - left) @ dg) / ((right + left).sum() + self.spare / self.top) - short
        plus, minus = forth + right * (dg - top), back - left * (dg + top)
        # the looser of the two follows from dv: its own equation divides by a multiplier that
        # vanishes
        plus, minus = (
            torch.where(right > left, dv + minus, plus),
            torch.where(right > left, minus, plus - dv),
        )
        spare = (rest - self.spare * (self.top + top)) / self.top
        above = self.top + top - g - dg - self.above
        below = self.top + top + g + dg - self.below
        return BallDirection(dv, (plus, minus, spare), (above, below, top))

    def to_boundary(self, turn: BallDirection) -> tuple[float, float]:
        (plus, minus, spare), (above, below, top) = turn.primal, turn.dual
        primal = min(
            to_boundary(self.plus, plus),
            to_boundary(self.minus, minus),
            to_boundary(self.spare, spare),
        )
        return primal, min(
            to_boundary(self.above, above),
            to_boundary(self.below, below),
            to_boundary(self.top, top),
        )

    def after(self, turn: BallDirection, primal: float, dual: float) -> "L1Ball":
        (plus, minus, spare), (above, below, top) = turn.primal, turn.dual
        return L1Ball(
            self.plus + primal * plus,
            self.minus + primal * minus,
            self.spare + primal * spare,
            self.above + dual * above,
            self.below + dual * below,
            self.top + dual * top,
        )


@dataclass(frozen=True)
class L2Ball:
    """The ball of radius ρ of ℓ2 or ℓp, p ≤ 2: v follows the gradient of the smoothed dual norm,
    without multipliers.

    Like `LpBall` it stays on the sphere, so that it fails where the best v is inside, as g vanishes
    there."""

    v: Tensor
    norm: Norm
    radius: float

    @staticmethod
    def begin(g: Tensor, radius: float, norm: Norm) -> "L2Ball":
        return L2Ball(radius * _rounded(norm, g).slope, norm, radius)

    def products(self) -> tuple[float, int]:
        return 0.0, 0

    def response(self, g: Tensor, mu: float, before: BallDirection | None = None) -> BallNewton:
        curve = _rounded(self.norm, g)
        bend, twist = self.radius * curve.bend, self.radius * curve.twist
        missing = self.radius * curve.slope - self.v
        lean = curve.along / bend
        # the inverse of diag(bend) + twist·along alongᵀ
        weight = -twist / (1 + twist * (curve.along @ lean)).clamp_min(1e-14)
        return BallNewton(
            1 / bend, missing / bend + weight * lean * (lean @ missing), lean[None], weight[None]
        )

    def turn(self, response: BallNewton, g: Tensor, dv: Tensor, dg: Tensor) -> BallDirection:
        return BallDirection(dv)

    def to_boundary(self, turn: BallDirection) -> tuple[float, float]:
        return math.inf, math.inf

    def after(self, turn: BallDirection, primal: float, dual: float) -> "L2Ball":
        return replace(self, v=self.v + primal * turn.v)


@dataclass(frozen=True)
class LpBall:
    """The ball of radius ρ of ℓp, p > 2, where v is not a smooth function of g but g is one of v:
    g = τ∇‖v‖ with τ = ‖g‖_*. The change of ‖v‖ is held by a stiff spring.

    Where a number of v vanishes so does the stiffness; there that of the v which goes with g takes
    its place."""

    v: Tensor
    p: float
    radius: float

    @staticmethod
    def begin(g: Tensor, radius: float, norm: Lp) -> "LpBall":
        return LpBall(radius * _rounded(norm, g).slope, norm.p, radius)

    def products(self) -> tuple[float, int]:
        return 0.0, 0

    def response(self, g: Tensor, mu: float, before: BallDirection | None = None) -> BallNewton:
        p, q = self.p, self.p / (self.p - 1)
        size = torch.linalg.vector_norm(self.v, p)
        unit = self.v / size
        normal = torch.sign(unit) * unit.abs() ** (p - 1)
        force = torch.linalg.vector_norm(g, q)
        other = (g.abs() / force) ** (q - 1)
        bend = (p - 1) * force / size * torch.maximum(unit.abs(), other).clamp_min(1e-6) ** (p - 2)
        spring = 1e6 * force / self.radius
        pull = g - force * normal + spring * (self.radius - size) * normal
        return BallNewton(bend, pull, normal[None], spring[None])

    def turn(self, response: BallNewton, g: Tensor, dv: Tensor, dg: Tensor) -> BallDirection:
        return BallDirection(dv)

    def to_boundary(self, turn: BallDirection) -> tuple[float, float]:
        return math.inf, math.inf

    def after(self, turn: BallDirection, primal: float, dual: float) -> "LpBall":
        return replace(self, v=self.v + primal * turn.v)


@dataclass(frozen=True)
class ProductBall:
    """The ball of a maximum over blocks, one after the other in the weights."""

    balls: tuple[BallIterate, ...]

    @property
    def v(self) -> Tensor:
        return torch.cat([ball.v for ball in self.balls])

    def _split(self, x: Tensor) -> Sequence[Tensor]:
        return x.split([len(ball.v) for ball in self.balls])

    def products(self) -> tuple[float, int]:
        each = [ball.products() for ball in self.balls]
        return sum(total for total, _ in each), sum(count for _, count in each)

    def response(self, g: Tensor, mu: float, before: BallDirection | None = None) -> BallNewton:
        befores = [None] * len(self.balls) if before is None else before.parts
        parts = [
            b.response(x, mu, t)
            for b, x, t in zip(self.balls, self._split(g), befores, strict=True)
        ]
        low = torch.block_diag(*[part.low for part in parts]).view(-1, len(g))
        return BallNewton(
            torch.cat([part.stiff for part in parts]),
            torch.cat([part.pull for part in parts]),
            low,
            torch.cat([part.weight for part in parts]),
            parts=tuple(parts),
        )

    def turn(self, response: BallNewton, g: Tensor, dv: Tensor, dg: Tensor) -> BallDirection:
        split = zip(
            self.balls,
            response.parts,
            self._split(g),
            self._split(dv),
            self._split(dg),
            strict=True,
        )
        return BallDirection(
            dv, parts=tuple(ball.turn(part, x, y, z) for ball, part, x, y, z in split)
        )

    def to_boundary(self, turn: BallDirection) -> tuple[float, float]:
        rooms = [ball.to_boundary(part) for ball, part in zip(self.balls, turn.parts, strict=True)]
        return min(primal for primal, _ in rooms), min(dual for _, dual in rooms)

    def after(self, turn: BallDirection, primal: float, dual: float) -> "ProductBall":
        return ProductBall(
            tuple(
                b.after(part, primal, dual) for b, part in zip(self.balls, turn.parts, strict=True)
            )
        )


def knows(norm: Norm) -> bool:
    """Whether `ball_of` makes one for the norm: ℓ1, ℓ2, ℓ∞, ℓp, and their maximum over blocks."""
    if isinstance(norm, Max):
        return all(knows(part) for part in norm._norms())
    return isinstance(norm, L1 | L2 | Linf | Lp)


def ball_of(norm: Norm, g: Float[Tensor, " P"], mu: float) -> BallIterate:
    """A point well inside the unit ball of a (bound) norm, for gradients like g and products near
    μ."""
    if isinstance(norm, Max):
        return ProductBall(
            tuple(_one(part.norm, part.of(g), mu, part.scale) for part in norm._each(g))
        )
    return _one(norm, g, mu, 1.0)


def _one(norm: Norm, g: Tensor, mu: float, radius: float) -> BallIterate:
    if isinstance(norm, Linf):
        return LinfBall.begin(g, mu, radius)
    if isinstance(norm, L1):
        return L1Ball.begin(g, mu, radius)
    if isinstance(norm, Lp) and norm.p > 2:
        return LpBall.begin(g, radius, norm)
    return L2Ball.begin(g, radius, norm)


def _rounded(norm: Norm, g: Tensor) -> Curve:
    """The dual norm at g, smooth also where numbers of g vanish."""
    return curved(norm, g, 1e-7 * float(norm.dual(g)) + 1e-12)

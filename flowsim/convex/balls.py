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
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import islice
from typing import Self, TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor

from flowsim.convex.pairs import Pairs, Products
from flowsim.convex.smoothed import SecondOrder, curved, softened
from flowsim.norms.blocks import Max
from flowsim.norms.norm import Norm
from flowsim.norms.vector import L1, L2, Linf, Lp
from flowsim.numerics.shapes import Row


@dataclass(frozen=True)
class BallDirection:
    """A Newton direction of the point, and of its slacks and forces."""

    v: Row
    pairs: Pairs


Direction: TypeAlias = Callable[[Tensor, Tensor], BallDirection]
"""(dv, dg) -> the direction of all that a ball holds."""


@dataclass(frozen=True)
class BallNewton:
    """The Newton equations of a ball: see the module. ``direction`` makes of dv and dg the
    direction of all that the ball holds."""

    stiff: Row
    pull: Row
    low: Float[Tensor, "k P"]
    weight: Float[Tensor, " k"]
    direction: Direction


@dataclass(frozen=True)
class BallIterate(ABC):
    """A point inside a ball, with its slacks and forces."""

    v: Row
    pairs: Pairs

    @abstractmethod
    def newton(self, g: Row, targets: Products) -> BallNewton:
        """The Newton equations at g towards these products of slacks and forces."""

    def after(self, d: BallDirection, primal: float, dual: float) -> Self:
        """The ball after these fractions of a direction."""
        return replace(self, v=self.v + primal * d.v)


@dataclass(frozen=True)
class LinfBall(BallIterate):
    """The ℓ∞ ball of radius ρ."""

    radius: float

    @staticmethod
    def at(v: Row, forces: Products, radius: float) -> "LinfBall":
        slacks = radius - v, radius + v
        return LinfBall(v, Pairs(slacks, forces), radius)

    @staticmethod
    def begin(g: Row, mu: float, radius: float) -> "LinfBall":
        centre = mu / radius
        length = softened(g, centre)
        total = length + centre
        forces = (total + g) / 2, (total - g) / 2
        return LinfBall.at(torch.zeros_like(g), forces, radius)

    def newton(self, g: Row, targets: Products) -> BallNewton:
        high, low = self.pairs.slacks
        above, below = self.pairs.forces
        up, down = targets

        def direction(dv: Tensor, dg: Tensor) -> BallDirection:
            rise = (up + above * dv) / high - above
            fall = (down - below * dv) / low - below
            pairs = Pairs((-dv, dv), (rise, fall))
            return BallDirection(dv, pairs)

        stiff = above / high + below / low
        pull = g - up / high + down / low
        no_low = g.new_zeros(0, len(g))
        no_weight = g.new_zeros(0)
        return BallNewton(stiff, pull, no_low, no_weight, direction)

    def after(self, d: BallDirection, primal: float, dual: float) -> "LinfBall":
        v = self.v + primal * d.v
        pairs = self.pairs.after(d.pairs, primal, dual)
        return LinfBall.at(v, pairs.forces, self.radius)


@dataclass(frozen=True)
class L1Ball(BallIterate):
    """The ℓ1 ball of radius ρ: slacks v⁺, v⁻ and γ, what is left of ρ, with the forces τ − g, τ + g
    and τ."""

    @staticmethod
    def at(pairs: Pairs) -> "L1Ball":
        plus, minus, _ = pairs.slacks
        return L1Ball(plus - minus, pairs)

    @staticmethod
    def begin(g: Row, mu: float, radius: float) -> "L1Ball":
        size = len(g)
        part = torch.full_like(g, 0.45 * radius / size)
        spare = g.new_tensor(0.1 * radius)
        top = g.abs().amax() + mu * size / radius
        floor = 0.1 * mu * size / radius
        above = (top - g).clamp_min(floor)
        below = (top + g).clamp_min(floor)
        pairs = Pairs((part, part, spare), (above, below, top))
        return L1Ball.at(pairs)

    def newton(self, g: Row, targets: Products) -> BallNewton:
        budget = _Budget.of(self.pairs, g, targets)
        total = budget.total
        tilt = budget.tilt

        def direction(dv: Tensor, dg: Tensor) -> BallDirection:
            spare = self.pairs.slacks[2]
            above, below, top = self.pairs.forces
            dtop = budget.top(dg)
            moved_top = top + dtop
            dplus, dminus = budget.parts(dv, dg, dtop)
            dspare = (targets[2] - spare * moved_top) / top
            dabove = moved_top - g - dg - above
            dbelow = moved_top + g + dg - below
            pairs = Pairs((dplus, dminus, dspare), (dabove, dbelow, dtop))
            return BallDirection(dv, pairs)

        drift = budget.forth - budget.back
        missing = drift + tilt * budget.short / budget.spread
        shared = 4 * budget.right * budget.left / total
        weight = 1 / (budget.slack + shared.sum())
        return _inverted(total, tilt / total, weight, missing, direction)

    def after(self, d: BallDirection, primal: float, dual: float) -> "L1Ball":
        pairs = self.pairs.after(d.pairs, primal, dual)
        return L1Ball.at(pairs)


@dataclass(frozen=True)
class _Budget:
    """The Newton equations of the ℓ1 ball without its forces,

        dv⁺ = forth + right (dg − dτ),   dv⁻ = back − left (dg + dτ),
        dτ = (⟨tilt, dg⟩ − short)/spread,

    the last from the budget Σ v⁺ + Σ v⁻ + γ = ρ, so that dv = total·dg − tilt·dτ + forth − back."""

    right: Row
    left: Row
    slack: Float[Tensor, ""]
    forth: Row
    back: Row
    short: Float[Tensor, ""]

    @staticmethod
    def of(pairs: Pairs, g: Tensor, targets: Products) -> "_Budget":
        top = pairs.forces[2]
        aims = zip(targets, pairs.forces, strict=True)
        right, left, slack = (s / f for s, f in pairs.kinds)
        up, down, rest = (product / f for product, f in aims)
        forth = up - right * (top - g)
        back = down - left * (top + g)
        spent = (forth + back).sum()
        short = pairs.slacks[2] - spent - rest
        return _Budget(right, left, slack, forth, back, short)

    @property
    def total(self) -> Row:
        return self.right + self.left

    @property
    def tilt(self) -> Row:
        return self.right - self.left

    @property
    def spread(self) -> Float[Tensor, ""]:
        return self.total.sum() + self.slack

    def top(self, dg: Tensor) -> Float[Tensor, ""]:
        """dτ."""
        spread = self.spread
        return (self.tilt @ dg) / spread - self.short / spread

    def parts(self, dv: Tensor, dg: Tensor, dtop: Tensor) -> tuple[Tensor, Tensor]:
        """dv⁺ and dv⁻. The looser of the two follows from dv: its own equation divides by a force
        that vanishes."""
        plus = self.forth + self.right * (dg - dtop)
        minus = self.back - self.left * (dg + dtop)
        loose = self.right > self.left
        dplus = torch.where(loose, dv + minus, plus)
        dminus = torch.where(loose, minus, plus - dv)
        return dplus, dminus


@dataclass(frozen=True)
class L2Ball(BallIterate):
    """The ball of radius ρ of ℓ2 or ℓp, p ≤ 2: v follows the gradient of the smoothed dual norm,
    without forces.

    Like `LpBall` it stays on the sphere, so that it fails where the best v is inside, as g vanishes
    there."""

    norm: Norm
    radius: float

    def newton(self, g: Row, targets: Products) -> BallNewton:
        curve = _rounded(self.norm, g)
        along = curve.along
        diagonal = self.radius * curve.diagonal
        twist = self.radius * curve.twist
        missing = self.radius * curve.slope - self.v
        # the inverse of diag(diagonal) + twist·along alongᵀ
        lean = along / diagonal
        growth = 1 + twist * (along @ lean)
        weight = -twist / growth.clamp_min(1e-14)
        return _inverted(diagonal, lean, weight, missing, _of_point)


@dataclass(frozen=True)
class LpBall(BallIterate):
    """The ball of radius ρ of ℓp, p > 2, where v is not a smooth function of g but g is one of v:
    g = τ∇‖v‖ with τ = ‖g‖_*. The change of ‖v‖ is held by a stiff spring.

    Where a number of v vanishes so does the stiffness; there that of the v which goes with g takes
    its place."""

    p: float
    radius: float

    def newton(self, g: Row, targets: Products) -> BallNewton:
        p = self.p
        q = p / (p - 1)
        length = torch.linalg.vector_norm(self.v, p)
        force = torch.linalg.vector_norm(g, q)
        unit = self.v / length
        size = unit.abs()
        normal = torch.sign(unit) * size ** (p - 1)
        of_g = (g.abs() / force) ** (q - 1)
        size = size.maximum(of_g).clamp_min(1e-6)
        stiff = (p - 1) * force / length * size ** (p - 2)
        spring = 1e6 * force / self.radius
        short = self.radius - length
        pull = g - force * normal + spring * short * normal
        return BallNewton(stiff, pull, normal[None], spring[None], _of_point)


@dataclass(frozen=True)
class ProductBall(BallIterate):
    """The ball of a maximum over blocks, one after the other in the weights."""

    balls: tuple[BallIterate, ...]

    @staticmethod
    def of(balls: tuple[BallIterate, ...]) -> "ProductBall":
        v = torch.cat([ball.v for ball in balls])
        pairs = _joined([ball.pairs for ball in balls])
        return ProductBall(v, pairs, balls)

    def newton(self, g: Row, targets: Products) -> BallNewton:
        products = self._by_ball(targets)
        blocks = zip(self.balls, self._split(g), products, strict=True)
        parts = [ball.newton(x, aims) for ball, x, aims in blocks]

        def direction(dv: Tensor, dg: Tensor) -> BallDirection:
            steps = zip(parts, self._split(dv), self._split(dg), strict=True)
            pairs = [part.direction(x, y).pairs for part, x, y in steps]
            return BallDirection(dv, _joined(pairs))

        stiff = torch.cat([part.stiff for part in parts])
        pull = torch.cat([part.pull for part in parts])
        low = torch.block_diag(*[part.low for part in parts])
        weight = torch.cat([part.weight for part in parts])
        return BallNewton(stiff, pull, low.view(-1, len(g)), weight, direction)

    def after(self, d: BallDirection, primal: float, dual: float) -> "ProductBall":
        slacks = self._by_ball(d.pairs.slacks)
        forces = self._by_ball(d.pairs.forces)
        pairs = map(Pairs, slacks, forces)
        parts = map(BallDirection, self._split(d.v), pairs)
        moves = zip(self.balls, parts, strict=True)
        balls = [ball.after(part, primal, dual) for ball, part in moves]
        return ProductBall.of(tuple(balls))

    def _split(self, v: Row) -> Products:
        return v.split([len(ball.v) for ball in self.balls])

    def _by_ball(self, kinds: Products) -> list[Products]:
        """One tensor of every inequality as those of each ball."""
        rest = iter(kinds)
        counts = [len(ball.pairs.slacks) for ball in self.balls]
        return [tuple(islice(rest, count)) for count in counts]


def supports_ball(norm: Norm) -> bool:
    """Whether `ball_of` makes one for the norm: ℓ1, ℓ2, ℓ∞, ℓp, and their maximum over blocks."""
    if isinstance(norm, Max):
        return all(supports_ball(part) for part in norm.norms)
    return isinstance(norm, L1 | L2 | Linf | Lp)


def ball_of(norm: Norm, g: Row, mu: float, radius: float = 1.0) -> BallIterate:
    """A point well inside the ball of a (bound) norm, for gradients like g and products near μ."""
    if isinstance(norm, Max):
        parts = norm.blocks_of(g)
        balls = [ball_of(part.norm, part.of(g), mu, part.scale) for part in parts]
        return ProductBall.of(tuple(balls))
    if isinstance(norm, Linf):
        return LinfBall.begin(g, mu, radius)
    if isinstance(norm, L1):
        return L1Ball.begin(g, mu, radius)
    v = radius * _rounded(norm, g).slope
    if isinstance(norm, Lp) and norm.p > 2:
        return LpBall(v, Pairs(), norm.p, radius)
    return L2Ball(v, Pairs(), norm, radius)


def _inverted(
    diagonal: Row, lean: Row, weight: Tensor, missing: Row, direction: Direction
) -> BallNewton:
    """The equations of dv = M⁻¹ dg + missing with M = diag(1/diagonal) + weight·lean leanᵀ."""
    pull = missing / diagonal + weight * lean * (lean @ missing)
    return BallNewton(1 / diagonal, pull, lean[None], weight[None], direction)


def _of_point(dv: Tensor, dg: Tensor) -> BallDirection:
    """The direction of a ball that holds nothing but its point."""
    return BallDirection(dv, Pairs())


def _joined(pairs: list[Pairs]) -> Pairs:
    slacks = [s for held in pairs for s in held.slacks]
    forces = [f for held in pairs for f in held.forces]
    return Pairs(tuple(slacks), tuple(forces))


def _rounded(norm: Norm, g: Row) -> SecondOrder:
    """The dual norm at g, smooth also where numbers of g vanish."""
    least = 1e-7 * float(norm.dual(g)) + 1e-12
    return curved(norm, g, least)

"""Minimising movements where the loss is convex: of linear models and quadratics."""

import math
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from flowsim.convex.in_ball import Minimum, minimise_in_ball
from flowsim.convex.outer import HalfSquare, Outer, SoftMaximum
from flowsim.flow.movements.movement import Guess, Movement, exact, linear_reading, touching
from flowsim.norms.norm import Norm
from flowsim.numerics.shapes import Row
from flowsim.problems.objective import Objective
from flowsim.problems.problem import Problem
from flowsim.problems.quadratics import Quadratic
from flowsim.problems.readings import Residual
from flowsim.problems.tails import HALF_SQUARE

_Vector = Row  # in the place of the weights

SHORTEST = 1e-3  # the least part of a sweep that is taken


@dataclass(frozen=True)
class _Surrogate:
    """A convex function of Δ that agrees with the loss at w + Δ, to second order at Δ = 0:
    f(b + AΔ) with f = ½‖·‖², or log Σ exp(−(b + AΔ)). ``exact`` where it is the loss, up to a
    monotone map."""

    rows: Float[Tensor, "n P"]
    offset: Float[Tensor, " n"]
    soft: bool
    exact: bool = True

    def minimum(
        self, norm: Norm, eps: float, gain: float, start: Tensor | None, tol: float
    ) -> Minimum:
        """Over Δ = εv in the ball, in units of the ``gain`` that is expected."""
        outer: Outer = HalfSquare()
        scale = math.sqrt(gain)
        offset = self.offset
        if self.soft:
            outer = SoftMaximum(1 / gain)
            scale = gain
            offset = offset - offset.amin()
        a = self.rows * (eps / scale)
        b = offset / scale
        return minimise_in_ball(norm, outer, a, b, start=start, tol=tol)


class ConvexMover:
    """Movements where the loss is convex: of a `Linear` model, or a `Quadratic`. On a curved ball v
    is good to about the root of the gap."""

    trusted: ClassVar[float] = 1e-6

    def __init__(self, norm: Norm, objective: Objective, w: Float[Tensor, "1 P"]) -> None:
        if not (isinstance(objective, Problem | Quadratic) and objective.convex):
            raise ValueError(
                "MinimisingMovement needs a convex loss (a Linear model, or a Quadratic), or a "
                "two-layer net with kinks"
            )
        self.norm = norm
        self.objective: Problem | Quadratic = objective
        self._rows = _rows(objective, w)

    @property
    def unknowns(self) -> int:
        return len(self._rows)

    def aim(self, rtol: float, atol: float, w: _Vector, eps: float) -> float:
        """Directions to a hundredth of what a step may err; they are good to the root of the
        gap."""
        allowed = atol + rtol * float(torch.linalg.vector_norm(w))
        fraction = min(1.0, 0.01 * allowed / eps)
        return min(1e-9, max(1e-15, fraction**2))

    def move(self, w: _Vector, eps: float, guess: Guess | None, tol: float = 1e-15) -> Movement:
        level, h = self._ascent(w)
        gain = eps * float(self.norm.dual(h))
        still = torch.zeros_like(w)
        if not 0 < gain < math.inf:
            none = torch.zeros(self.unknowns).to(w)
            gap = 0.0 if gain == 0 else math.inf
            return Movement(still, none, w=w, gap=gap, lam=level, ascent=h)
        start = None if guess is None else guess.dual_variables
        surrogate = self._surrogate(w)
        if not surrogate.exact:
            return self._sweeps(w, level, eps, gain, start, tol)
        found = surrogate.minimum(self.norm, eps, gain, start, tol)
        end = w + eps * found.v
        level, h = self._ascent(end)
        return Movement(
            v=found.v,
            dual_variables=found.p,
            w=end,
            gap=found.gap,
            lam=level,
            ascent=h,
            newton=found.newton,
        )

    def _sweeps(
        self,
        w: _Vector,
        level: Float[Tensor, ""],
        eps: float,
        gain: float,
        start: Float[Tensor, " n"] | None,
        tol: float,
    ) -> Movement:
        """`move` where the surrogate only touches the loss: Newton's method, going back while the
        level falls."""
        v = torch.zeros_like(w)
        newton = 0
        for _ in range(40):
            # the ball is around w, the surrogate's zero at w + εv
            surrogate = self._surrogate(w + eps * v)
            offset = surrogate.offset + surrogate.rows @ (-eps * v)
            surrogate = replace(surrogate, offset=offset)
            found = surrogate.minimum(self.norm, eps, gain, start, 0.01 * tol)
            start = found.p
            newton = newton + found.newton
            step = found.v - v
            fraction = 1.0
            now, h = self._ascent(w + eps * found.v)
            while _falls(level, now) and fraction > SHORTEST:
                fraction /= 2
                between = v + fraction * step
                now, h = self._ascent(w + eps * between)
            v = v + fraction * step
            level = now
            # of a convex function, the linearisation at the end bounds what is left to gain
            left = self.norm.dual(h) - h @ v
            gap = float(left) * eps / gain
            if gap < tol or fraction <= SHORTEST or _still(step, v, math.sqrt(tol)):
                break
        return Movement(
            v=v,
            dual_variables=found.p,
            w=w + eps * v,
            gap=gap,
            lam=level,
            ascent=h,
            newton=newton,
        )

    def _ascent(self, w: _Vector) -> tuple[Float[Tensor, ""], _Vector]:
        level, h = self.objective.ascent(w[None])
        return level[0], h[0]

    def _surrogate(self, w: _Vector) -> _Surrogate:
        """A model of the loss around w; exponential losses are their own."""
        objective = self.objective
        rows = self._rows
        if isinstance(objective, Quadratic):
            offset = rows @ (w - objective.minimiser)
            return _Surrogate(rows, offset, soft=False)
        outputs = objective.outputs(w[None])
        loss = objective.loss
        y = objective.y
        if loss.tail is HALF_SQUARE:
            residuals = loss.reading.read(outputs, y)[0]
            return _Surrogate(rows, residuals[0], soft=False)
        scale, offset = touching(loss, outputs, y)
        rows = scale[:, None] * rows
        return _Surrogate(rows, offset, soft=True, exact=exact(loss))


def _falls(level: Tensor, now: Tensor) -> bool:
    """Whether the level falls by more than rounding."""
    before = float(level)
    return float(now) < before - 1e-13 * abs(before)


def _still(step: _Vector, v: _Vector, tol: float) -> bool:
    """Whether a step of v is small beside it."""
    longest = float(step.abs().amax())
    return longest < tol * float(v.abs().amax())


def _rows(objective: Problem | Quadratic, w: Float[Tensor, "1 P"]) -> Float[Tensor, "n P"]:
    """How the numbers that the loss sees move with the weights."""
    if isinstance(objective, Quadratic):
        return objective.curvature(w)[0]
    loss = objective.loss
    squares = isinstance(loss.reading, Residual) and loss.tail is HALF_SQUARE
    reading = None if squares else linear_reading(loss)
    jacobian = objective.net.jacobian(w, objective.x)[0]  # (N, C, P)
    if reading is None:
        return jacobian.flatten(0, 1)
    # linear in the outputs, so it reads their derivatives too
    columns = jacobian.movedim(-1, 0)
    return reading.read(columns, objective.y)[0].mT

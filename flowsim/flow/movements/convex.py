"""Minimising movements: the implicit step of steepest flow in any norm, for convex losses.

A movement of arclength ε from w is

    w + εv,   v ∈ argmin { 𝓛(w + εv) : ‖v‖ ≤ 1 },

so that v is a steepest direction *at the end*: it slides along ties (a gradient of deficient rank,
equal singular values, zero coordinates) and sits on a stiff softmax without being told (Ambrosio,
Gigli and Savaré 2005)."""

import math
from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from jaxtyping import Float
from torch import Tensor

from flowsim.convex.in_ball import Minimum, minimise_in_ball
from flowsim.convex.smoothed import HalfSquare, Outer, SoftMaximum
from flowsim.norms.norm import Norm
from flowsim.problems.losses import (
    EXPONENTIAL,
    HALF_SQUARE,
    Loss,
    Pairwise,
    Residual,
    Signed,
    SoftPairwise,
)
from flowsim.problems.objective import Objective
from flowsim.problems.problem import Problem
from flowsim.problems.quadratics import Quadratic


@dataclass(frozen=True)
class Guess:
    """What a movement may start from: the direction and the dual variables of one like it, and how
    many kinks have been released so far."""

    v: Float[Tensor, " P"]
    duals: Float[Tensor, " n"]
    releases: float = 0.0


@dataclass(frozen=True)
class Movement:
    """Where a movement ends, its direction ``v``, the dual variables that prove it to the relative
    ``gap`` (a share of ε‖h‖_*), Newton steps taken, and Λ and h = ∇Λ at the end.

    On kinks h is the element of Clarke's gradient for which v is steepest, with these
    ``multipliers``; ``releases`` counts the kinks that have slid and begun to repel."""

    w: Float[Tensor, " P"]
    v: Float[Tensor, " P"]
    duals: Float[Tensor, " n"]
    gap: float
    newton: float
    lam: Float[Tensor, ""]
    ascent: Float[Tensor, " P"]
    multipliers: Float[Tensor, " K"] | None = None
    releases: float = 0.0

    @property
    def guess(self) -> Guess:
        return Guess(self.v, self.duals, self.releases)


class Mover(Protocol):
    """Movements of one trajectory. One with a gap above ``trusted`` is none."""

    norm: Norm
    trusted: ClassVar[float]

    def aim(self, rtol: float, atol: float, w: Float[Tensor, " P"], eps: float) -> float:
        """The gap that a movement of a step with these tolerances needs."""

    @property
    def duals(self) -> int:
        """The number of dual variables."""

    def move(self, w: Float[Tensor, " P"], eps: float, guess: Guess | None, tol: float) -> Movement:
        """The movement of arclength ``eps`` from w, to a relative duality gap of ``tol``."""


@dataclass(frozen=True)
class _Surrogate:
    """A convex function of w + Δ that agrees with the loss to second order at one point: f(b + AΔ)
    with f = ½‖·‖², or log Σ exp(−(b + AΔ)). ``exact`` where it is the loss, up to a monotone
    map."""

    rows: Float[Tensor, "n P"]
    offset: Float[Tensor, " n"]
    soft: bool
    exact: bool = True


class ConvexMover:
    """Movements where the loss is convex: of a `Linear` model, or a `Quadratic`. On a curved ball v
    is good to about the root of the gap."""

    trusted: ClassVar[float] = 1e-6

    def __init__(self, norm: Norm, objective: Objective, w: Float[Tensor, "1 P"]) -> None:
        self.norm, self.objective = norm, objective
        self._rows = _rows(objective, w)

    @property
    def duals(self) -> int:
        return len(self._rows)

    def aim(self, rtol: float, atol: float, w: Float[Tensor, " P"], eps: float) -> float:
        """Directions to a hundredth of what a step may err; they are good to the root of the
        gap."""
        allowed = atol + rtol * float(torch.linalg.vector_norm(w))
        return min(1e-9, max(1e-15, min(1.0, 0.01 * allowed / eps) ** 2))

    def move(
        self, w: Float[Tensor, " P"], eps: float, guess: Guess | None, tol: float = 1e-15
    ) -> Movement:
        start = None if guess is None else guess.duals
        level, h = self._ascent(w)
        unit = eps * float(self.norm.dual(h))
        if not 0 < unit < math.inf:
            nothing = torch.zeros(self.duals).to(w)
            return Movement(
                w, torch.zeros_like(w), nothing, 0.0 if unit == 0 else math.inf, 0.0, level, h
            )
        surrogate = self._surrogate(w)
        if not surrogate.exact:
            return self._sweeps(w, float(level), eps, unit, start, tol)
        found = self._solve(surrogate, torch.zeros_like(w), eps, unit, start, tol)
        end = w + eps * found.v
        return Movement(end, found.v, found.p, found.gap, found.newton, *self._ascent(end))

    def _sweeps(
        self, w: Tensor, level: float, eps: float, unit: float, start: Tensor | None, tol: float
    ) -> Movement:
        """`move` where the surrogate only touches the loss: Newton's method, going back while the
        level falls."""
        v, newton, gap = torch.zeros_like(w), 0, math.inf
        for _ in range(40):
            found = self._solve(
                self._surrogate(w + eps * v), -eps * v, eps, unit, start, 0.01 * tol
            )
            start, newton, step, share = found.p, newton + found.newton, found.v - v, 1.0
            now, h = self._ascent(w + eps * found.v)
            while float(now) < level - 1e-13 * abs(level) and share > 1e-3:
                share /= 2
                now, h = self._ascent(w + eps * (v + share * step))
            v, level = v + share * step, float(now)
            # of a convex function, the linearisation at the end bounds what is left to gain
            gap = float(self.norm.dual(h) - h @ v) * eps / unit
            still = float(step.abs().amax()) < math.sqrt(tol) * float(v.abs().amax())
            if gap < tol or still or share <= 1e-3:
                break
        assert start is not None
        return Movement(w + eps * v, v, start, gap, newton, now, h)

    def _solve(
        self,
        s: _Surrogate,
        shift: Tensor,
        eps: float,
        unit: float,
        start: Tensor | None,
        tol: float,
    ) -> Minimum:
        """The surrogate's minimum over the ball around ``shift`` from its centre, in units of the
        expected gain."""
        offset = s.offset + s.rows @ shift
        outer: Outer = SoftMaximum(1 / unit) if s.soft else HalfSquare()
        scale = unit if s.soft else math.sqrt(unit)
        offset = offset - offset.amin() if s.soft else offset
        return minimise_in_ball(
            self.norm, outer, s.rows * (eps / scale), offset / scale, start=start, tol=tol
        )

    def _ascent(self, w: Tensor) -> tuple[Tensor, Tensor]:
        level, h = self.objective.ascent(w[None])
        return level[0], h[0]

    def _surrogate(self, w: Tensor) -> _Surrogate:
        """A model of the loss around w; exponential losses are their own."""
        objective = self.objective
        if isinstance(objective, Quadratic):
            return _Surrogate(self._rows, self._rows @ (w - objective.minimiser), soft=False)
        assert isinstance(objective, Problem)
        outputs = objective.outputs(w[None])
        if objective.loss.tail is HALF_SQUARE:
            return _Surrogate(
                self._rows, objective.loss.reading.read(outputs, objective.y)[0][0], soft=False
            )
        scale, offset = touching(objective.loss, outputs, objective.y)
        return _Surrogate(scale[:, None] * self._rows, offset, True, exact=exact(objective.loss))


def exact(loss: Loss) -> bool:
    """Whether `touching` gives the loss itself."""
    return loss.tail is EXPONENTIAL and not isinstance(loss.reading, SoftPairwise)


def linear_reading(loss: Loss) -> Signed | Pairwise:
    """The numbers of which `touching` is a sum of exponentials; they are linear in the outputs."""
    reading = Pairwise() if isinstance(loss.reading, SoftPairwise) else loss.reading
    if not (isinstance(reading, Signed | Pairwise) and loss.tail.decreasing):
        raise ValueError(
            f"MinimisingMovement does not know the loss {loss.name}; try flowsim.exponential"
        )
    return reading


def touching(loss: Loss, outputs: Float[Tensor, "1 N C"], y: Tensor) -> tuple[Tensor, Tensor]:
    """Scales c and offsets b ``(R,)`` for which Σ exp(−b − c(q' − q)) touches 𝓛 to second order at
    these outputs, or lies above it, with q from `linear_reading`."""
    q = loss.reading.read(outputs, y)[0]
    if isinstance(loss.reading, SoftPairwise):
        # log(1 + Σe^(−s)) lies below its tangent in Σe^(−s), which is a sum of exponentials with
        # its gradient
        gaps = Pairwise().read(outputs, y)[0][0]
        excess = loss.tail.log_slope(q) + q
        return torch.ones_like(gaps), gaps - excess[0].repeat_interleave(len(gaps) // q.shape[1])
    # a·e^(−c(q' − q)) has the slope and the curvature of the tail
    fall = loss.tail.fall or torch.func.grad(lambda q: -loss.tail.log_slope(q).sum())
    c = fall(q)[0].clamp_min(0.05)
    return c, torch.log(c) - loss.tail.log_slope(q)[0]


def _rows(objective: Objective, w: Float[Tensor, "1 P"]) -> Float[Tensor, "n P"]:
    """How the numbers that the loss sees move with the weights."""
    if isinstance(objective, Quadratic):
        return objective.curvature(w)[0]
    if not (isinstance(objective, Problem) and objective.convex):
        raise ValueError(
            "MinimisingMovement needs a convex loss (a Linear model, or a Quadratic), or a two-layer net with kinks"
        )
    loss = objective.loss
    squares = isinstance(loss.reading, Residual) and loss.tail is HALF_SQUARE
    reading = None if squares else linear_reading(loss)
    jacobian = objective.net.jacobian(w, objective.x)[0]
    if reading is None:
        return jacobian.flatten(0, 1)
    # linear in the outputs, so it reads their derivatives too
    return reading.read(jacobian.movedim(-1, 0), objective.y)[0].mT

r"""Convex functions of few linear forms, minimised over the unit ball of a norm: min f(b + Av).

Newton's method with a line search on the dual

    φ_μ(p) = ⟨p, b⟩ + f*(−p) + N_μ(Aᵀp),

with the smoothed dual norm N_μ of `smoothed`, whose μ falls along the central path; linear algebra
in the n sample variables. The v of an iteration is not ∇N_μ but what Newton's method makes of it,
∇N_μ + H dg, whose gap is far smaller."""

import math
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from flowsim.convex.outer import Outer
from flowsim.convex.smoothed import smoothed_dual
from flowsim.norms.norm import Norm
from flowsim.numerics.shapes import Row


@dataclass(frozen=True)
class Minimum:
    """The best point v of the ball, dual variables p that prove it to the duality ``gap``, Newton
    steps taken."""

    v: Row
    p: Float[Tensor, " n"]
    gap: float
    newton: int


def minimise_in_ball(
    norm: Norm,
    outer: Outer,
    a: Float[Tensor, "n P"],
    b: Float[Tensor, " n"],
    *,
    start: Float[Tensor, " n"] | None = None,
    tol: float = 1e-12,
    max_steps: int = 100,
) -> Minimum:
    """min f(b + Av) over ‖v‖ ≤ 1, to a duality gap of ``tol``, for data of order one.

    Stops early where the gap no longer falls, or where rounding makes Newton's equations
    singular."""
    search = _PathFollowing(norm, outer, a, b)
    # near the solution already, or from the centre of the ball
    if start is None:
        mu = 0.1
        p = outer.begin(b)
    else:
        mu = 1e-7
        p = outer.inside(start, mu)
    best = Minimum(torch.zeros_like(a[0]), p, torch.inf, 0)
    stale = 0
    hopeful = start is not None
    for count in range(1, max_steps + 1):
        try:
            step = search.step(p, mu)
        except ArithmeticError:
            break
        stale = 0 if step.best.gap < 0.9 * best.gap else stale + 1
        best = min(best, step.best, key=lambda found: found.gap)
        best = replace(best, newton=count)
        patience = 3 if best.gap < 1e-9 else 15
        if best.gap <= tol or stale > patience or mu < 1e-18:
            break
        p = step.p
        mu = step.mu
        far = step.length < 0.9 and best.gap > 100 * mu
        if hopeful and far:
            # not as close as it looked: back onto the central path further up
            mu = min(0.1, best.gap / 30)
            hopeful = False
            p = outer.inside(p, mu)
    return best


@dataclass(frozen=True)
class _Step:
    """A Newton step of this ``length``: the next p and μ, and the best pair on the way."""

    p: Float[Tensor, " n"]
    mu: float
    length: float
    best: Minimum


@dataclass(frozen=True)
class _PathFollowing:
    norm: Norm
    outer: Outer
    a: Float[Tensor, "n P"]
    b: Float[Tensor, " n"]

    def step(self, p: Tensor, mu: float) -> _Step:
        """A step of Newton's method from p at μ; ArithmeticError if it fails."""
        conjugate = self.outer.dual(p, mu)
        ball = smoothed_dual(self.norm, p @ self.a, mu)
        residual = self.b + conjugate.slope + self.a @ ball.gradient
        curved = ball.hessian(self.a)  # AH (n, P)
        stiff = curved @ self.a.mT
        d = self._newton(residual, conjugate.diagonal, stiff, 1 - p.sum())
        decrement = -float(residual @ d)
        merit = float(p @ self.b + conjugate.value + ball.value)
        q, length = self._line_search(p, d, mu, merit, decrement)
        best = self._better(ball.gradient + d @ curved, [p, q])
        near = decrement < mu * max(1.0, 0.05 * len(p))
        if near and length > 0.4:
            mu = 0.1 * mu
        return _Step(q, mu, length, best)

    def _newton(self, residual: Tensor, diagonal: Tensor, stiff: Tensor, missing: Tensor) -> Tensor:
        """d with (diag(diagonal) + AHAᵀ)d = −residual, on the simplex up to a multiplier of Σd =
        missing."""
        if self.outer.simplex:
            # a multiple of 11ᵀ only shifts the multiplier, and AHAᵀ may be blind to 1 and huge
            # elsewhere
            stiff = stiff + stiff.diagonal().amax()
        scale = diagonal.rsqrt()[:, None]
        eye = torch.eye(len(diagonal)).to(diagonal)
        root, info = torch.linalg.cholesky_ex(eye + scale * stiff * scale.mT)
        finite = bool(torch.isfinite(root).all())
        if int(info) or not finite:
            raise ArithmeticError("got a Hessian that is not positive definite")
        sides = torch.stack([residual, torch.ones_like(residual)], 1)
        solved = scale * torch.cholesky_solve(scale * sides, root)
        x, one = solved.unbind(1)
        if not self.outer.simplex:
            return -x
        level = (x.sum() + missing) / one.sum()
        return level * one - x

    def _line_search(
        self, p: Tensor, d: Tensor, mu: float, base: float, fall: float
    ) -> tuple[Tensor, float]:
        """The better of the paths, followed until the dual falls enough."""
        paths = self.outer.paths(p, d)
        merits = [self._merit(path(a), mu) for a, path in paths]
        now = min(merits)
        a, path = paths[merits.index(now)]
        noise = 1e-14 * abs(base)
        while a > 1e-8 and now > base - 1e-4 * a * fall + noise:
            a = a / 2
            now = self._merit(path(a), mu)
        return path(a), a

    def _merit(self, p: Tensor, mu: float) -> float:
        """φ_μ(p), infinite where it is not defined."""
        ball = smoothed_dual(self.norm, p @ self.a, mu)
        conjugate = self.outer.dual(p, mu)
        value = float(p @ self.b + conjugate.value + ball.value)
        return value if math.isfinite(value) else math.inf

    def _better(self, v: Tensor, ps: list[Tensor]) -> Minimum:
        """v inside the ball, with the p that proves more."""
        v = v / self.norm.value(v).clamp_min(1.0)
        proven = [self._proven(v, p) for p in ps]
        return min(proven, key=lambda found: found.gap)

    def _proven(self, v: Tensor, p: Tensor) -> Minimum:
        g = p @ self.a
        z = self.b + self.a @ v
        gap = self.outer.gap(p, z) + self.norm.dual(g) - g @ v
        return Minimum(v, p, float(gap), 0)

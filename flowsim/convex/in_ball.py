r"""Convex functions of few linear forms, minimised over the unit ball of a norm: min f(b + Av).

Newton's method with a line search on the dual

    φ_μ(p) = ⟨p, b⟩ + f*(−p) + N_μ(Aᵀp),

with the smoothed dual norm N_μ of `smoothed`, whose μ falls along the central path; linear algebra
in the n sample variables. The v of an iteration is not ∇N_μ but what Newton's method makes of it,
∇N_μ + H dg, whose gap is far smaller."""

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
    mu = 0.1 if start is None else 1e-7
    p = outer.begin(b) if start is None else outer.inside(start, mu)
    best = Minimum(torch.zeros_like(a[0]), p, torch.inf, 0)
    stale = 0
    hopeful = start is not None
    for count in range(1, max_steps + 1):
        try:
            step = search.step(p, mu)
        except ArithmeticError:
            break
        stale = stale + 1 if not step.best.gap < 0.9 * best.gap else 0
        best = replace(step.best if step.best.gap < best.gap else best, newton=count)
        if best.gap <= tol or stale > (3 if best.gap < 1e-9 else 15) or mu < 1e-18:
            break
        p = step.p
        mu = step.mu
        if hopeful and step.length < 0.9 and best.gap > 100 * mu:
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
        d = self._newton(residual, conjugate.diagonal, curved @ self.a.mT, 1 - p.sum())
        decrement = -float(residual @ d)
        merit = float(p @ self.b + conjugate.value + ball.value)
        q, length = self._line_search(p, d, mu, merit, decrement)
        v = ball.gradient + d @ curved
        v = v / self.norm.value(v).clamp_min(1.0)
        best = min((self._proven(v, x) for x in (p, q)), key=lambda pair: pair.gap)
        central = decrement < mu * max(1.0, 0.05 * len(p)) and length > 0.4
        return _Step(q, 0.1 * mu if central else mu, length, best)

    def _newton(self, residual: Tensor, diagonal: Tensor, stiff: Tensor, missing: Tensor) -> Tensor:
        """d with (diag(diagonal) + AHAᵀ)d = −residual, on the simplex up to a multiplier of Σd =
        missing."""
        if self.outer.simplex:
            # a multiple of 11ᵀ only shifts the multiplier, and AHAᵀ may be blind to 1 and huge
            # elsewhere
            stiff = stiff + stiff.diagonal().amax()
        scale = diagonal.rsqrt()[:, None]
        matrix = torch.eye(len(diagonal)).to(diagonal) + scale * stiff * scale.mT
        root, info = torch.linalg.cholesky_ex(matrix)
        if int(info) or not bool(torch.isfinite(root).all()):
            raise ArithmeticError("got a Hessian that is not positive definite")
        sides = torch.stack([residual, torch.ones_like(residual)], 1)
        x, one = (scale * torch.cholesky_solve(scale * sides, root)).unbind(1)
        return (x.sum() + missing) / one.sum() * one - x if self.outer.simplex else -x

    def _line_search(
        self, p: Tensor, d: Tensor, mu: float, base: float, fall: float
    ) -> tuple[Tensor, float]:
        """The better of the paths, followed until the dual falls enough."""
        tries = [(self._merit(path(a), mu), a, path) for a, path in self.outer.paths(p, d)]
        now, a, path = min(tries, key=lambda t: t[0])
        while now > base - 1e-4 * a * fall + 1e-14 * abs(base) and a > 1e-8:
            a = a / 2
            now = self._merit(path(a), mu)
        return path(a), a

    def _merit(self, p: Tensor, mu: float) -> float:
        """φ_μ(p), infinite where it is not defined."""
        norm = smoothed_dual(self.norm, p @ self.a, mu)
        value = p @ self.b + self.outer.dual(p, mu).value + norm.value
        return float(value) if bool(torch.isfinite(value)) else torch.inf

    def _proven(self, v: Tensor, p: Tensor) -> Minimum:
        g = p @ self.a
        gap = self.outer.gap(p, self.b + self.a @ v) + self.norm.dual(g) - g @ v
        return Minimum(v, p, float(gap), 0)

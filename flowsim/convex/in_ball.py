"""TODO."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from flowsim.convex.smoothed import Outer, smoothed_dual
from flowsim.norms.norm import Norm


@dataclass(frozen=True)
class Minimum:
    """The best point v of the ball, dual variables p that prove it to the duality ``gap``, Newton
    steps taken."""

    v: Float[Tensor, " P"]
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

    Newton's method with a line search on the dual φ_μ(p) = ⟨p, b⟩ + f*(−p) + N_μ(Aᵀp), whose
    barrier parameter μ falls along the central path; linear algebra in the n sample variables. The
    v of an iteration is not ∇N_μ but what Newton's method makes of it, ∇N_μ + H dg, whose gap is
    far smaller. Stops early where the gap no longer falls."""
    search = _PathFollowing(norm, outer, a, b)
    # near the solution already, or from the centre of the ball
    mu = 0.1 if start is None else 1e-7
    p = outer.begin(b) if start is None else outer.inside(start, mu)
    best, stale, hopeful = Minimum(torch.zeros_like(a[0]), p, torch.inf, 0), 0, start is not None
    for count in range(1, max_steps + 1):
        step = search.step(p, mu)
        if step is None:
            break
        stale = stale + 1 if not step.gap < 0.9 * best.gap else 0
        best = Minimum(
            *((step.v, step.p, step.gap) if step.gap < best.gap else (best.v, best.p, best.gap)),
            count,
        )
        if best.gap <= tol or stale > (3 if best.gap < 1e-9 else 15) or mu < 1e-18:
            break
        p, mu = step.q, step.mu
        if hopeful and step.length < 0.9 and best.gap > 100 * mu:
            # not as close as it looked: back onto the central path further up
            mu, hopeful = min(0.1, best.gap / 30), False
            p = outer.inside(p, mu)
    return best


@dataclass(frozen=True)
class _Step:
    v: Tensor
    p: Tensor
    gap: float
    q: Tensor
    mu: float
    length: float


@dataclass(frozen=True)
class _PathFollowing:
    norm: Norm
    outer: Outer
    a: Tensor
    b: Tensor

    def step(self, p: Tensor, mu: float) -> _Step | None:
        """A step of Newton's method from p at μ: the next p and μ, the best pair on the way; None
        if it fails."""
        value, slope, bend = self.outer.dual(p, mu)
        ball = smoothed_dual(self.norm, p @ self.a, mu)
        residual = self.b + slope + self.a @ ball.gradient
        curved = ball.hessian(self.a)
        d = self._newton(residual, bend, curved @ self.a.mT, 1 - p.sum())
        if d is None:
            return None
        decrement = float(-(residual @ d))
        q, length = self._line_search(p, d, mu, float(p @ self.b + value + ball.value), decrement)
        v = ball.gradient + d @ curved
        v = v / self.norm.value(v).clamp_min(1.0)
        gap, witness = min(((self._gap(x, v), x) for x in (p, q)), key=lambda t: t[0])
        central = decrement < mu * max(1.0, 0.05 * len(p)) and length > 0.4
        return _Step(v, witness, gap, q, 0.1 * mu if central else mu, length)

    def _newton(
        self, residual: Tensor, bend: Tensor, stiff: Tensor, missing: Tensor
    ) -> Tensor | None:
        """d with (diag(bend) + AHAᵀ)d = −residual, on the simplex up to a multiplier of Σd =
        missing."""
        if self.outer.simplex:
            # a multiple of 11ᵀ only shifts the multiplier, and AHAᵀ may be blind to 1 and huge
            # elsewhere
            stiff = stiff + stiff.diagonal().amax()
        scale = bend.rsqrt()[:, None]
        root, info = torch.linalg.cholesky_ex(
            torch.eye(len(bend)).to(bend) + scale * stiff * scale.mT
        )
        if int(info) or not bool(torch.isfinite(root).all()):
            return None
        sides = torch.stack([residual, torch.ones_like(residual)], 1)
        x, one = (scale * torch.cholesky_solve(scale * sides, root)).unbind(1)
        return (x.sum() + missing) / one.sum() * one - x if self.outer.simplex else -x

    def _line_search(
        self, p: Tensor, d: Tensor, mu: float, base: float, fall: float
    ) -> tuple[Tensor, float]:
        """The better of the paths, followed until the dual falls enough."""

        def merit(q: Tensor) -> float:
            value = (
                q @ self.b
                + self.outer.dual(q, mu)[0]
                + smoothed_dual(self.norm, q @ self.a, mu).value
            )
            return float(value) if bool(torch.isfinite(value)) else torch.inf

        tries = [(merit(path(a)), a, path) for a, path in self.outer.paths(p, d)]
        now, a, path = min(tries, key=lambda t: t[0])
        while now > base - 1e-4 * a * fall + 1e-14 * abs(base) and a > 1e-8:
            a = a / 2
            now = merit(path(a))
        return path(a), a

    def _gap(self, p: Tensor, v: Tensor) -> float:
        g = p @ self.a
        return float(self.outer.gap(p, self.b + self.a @ v) + self.norm.dual(g) - g @ v)

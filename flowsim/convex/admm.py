"""Small convex programmes by splitting: the alternating direction method of multipliers.

    minimise q(u) + r(nu)  over a convex set,      q(u) = ½‖Cu‖² + ½ ridge ‖u‖² − ⟨b, u⟩,

with the set known by its projection and r by its proximal map. Slow, but it asks for nothing else
and so serves every norm's faces."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True)
class Form:
    """q(u) = ½‖Cu‖² + ½ ridge ‖u‖² − ⟨b, u⟩."""

    C: Float[Tensor, "R P"]
    ridge: float
    b: Float[Tensor, " P"]

    def gradient(self, u: Tensor) -> Tensor:
        return (self.C @ u) @ self.C + self.ridge * u - self.b

    def solver(self, n: Tensor, rho: float) -> Callable[[Tensor], Tensor]:
        """r ↦ (∇²q + ρ(1 + nᵀn))⁻¹ r, by the smaller of both Gram matrices (Woodbury)."""
        A, shift = torch.cat([self.C, rho**0.5 * n]), self.ridge + rho
        small = len(A) < A.shape[1]
        gram = A @ A.mT if small else A.mT @ A
        root = torch.linalg.cholesky(
            gram + shift * torch.eye(len(gram), dtype=A.dtype, device=A.device)
        )
        if small:
            return lambda r: (r - A.mT @ torch.cholesky_solve((A @ r)[:, None], root)[:, 0]) / shift
        return lambda r: torch.cholesky_solve(r[:, None], root)[:, 0]


_REVISIONS = {100 * 2**k for k in range(20)}  # steps after which the penalty is revised


@dataclass(frozen=True)
class Split:
    """Where the splitting method ends: the point ``at (P,)`` and the multipliers ``force (K,)`` of
    the rows."""

    at: Float[Tensor, " P"]
    force: Float[Tensor, " K"]


def split(
    q: Form,
    project: Callable[[Tensor], Tensor],
    n: Float[Tensor, "K P"],
    prox: Callable[[Tensor, float], Tensor],
    *,
    start: Float[Tensor, " P"],
    tol: float = 1e-12,
    max_steps: int = 20000,
) -> Split:
    """Minimises q(u) + r(nu) over a convex set: the alternating direction method of multipliers.

    Over-relaxed, with a penalty ρ that balances both residuals (Boyd et al. 2011; Stellato et al.
    2020). ``project`` goes to the set and ``prox(v, ρ)`` minimises r(z) + ½ρ‖z − v‖²."""
    relax = 1.6
    rho = _largest(q.gradient(start)) / _largest(start) if bool(start.any()) else 1.0
    rho = rho if rho > 1e-100 else 1.0
    solve = q.solver(n, rho)
    x, z = start, n @ start
    y, f = torch.zeros_like(x), torch.zeros_like(z)
    for step in range(1, max_steps + 1):
        u = solve(q.b + rho * (x - y + (z - f) @ n))
        v = n @ u
        to_x, to_z = relax * u + (1 - relax) * x + y, relax * v + (1 - relax) * z + f
        last_x, last_z = x, z
        x, z = project(to_x), prox(to_z, rho)
        y, f = to_x - x, to_z - z
        if step % 25:
            continue
        primal = _largest(u - x, v - z) / _largest(u, v)
        dual = _largest(x - last_x + (z - last_z) @ n) / _largest(y, q.b / rho)
        if max(primal, dual) <= tol:
            break
        change = min(max(((primal + 1e-17) / (dual + 1e-17)) ** 0.5, 0.1), 10.0)
        if step in _REVISIONS and not 0.2 < change < 5:
            rho, y, f = rho * change, y / change, f / change
            solve = q.solver(n, rho)
    return Split(x, rho * f)


def _largest(*vectors: Tensor) -> float:
    return max((float(v.abs().amax()) for v in vectors if v.numel()), default=0.0) or 1e-300

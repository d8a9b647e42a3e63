"""Small convex programmes by splitting: the alternating direction method of multipliers.

    minimise q(u) + r(nu)  over a convex set,      q(u) = ½‖Cu‖² + ½ ridge ‖u‖² − ⟨b, u⟩,

with the set known by its projection and r by its proximal map. Slow, but it asks for nothing else
and so serves every norm's faces."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from flowsim.numerics.shapes import Row


@dataclass(frozen=True)
class Form:
    """q(u) = ½‖Cu‖² + ½ ridge ‖u‖² − ⟨b, u⟩."""

    C: Float[Tensor, "R P"]
    ridge: float
    b: Row

    def gradient(self, u: Tensor) -> Tensor:
        bent = (self.C @ u) @ self.C
        return bent + self.ridge * u - self.b

    def solver(self, n: Float[Tensor, "K P"], rho: float) -> Callable[[Tensor], Tensor]:
        """r ↦ (∇²q + ρ(1 + nᵀn))⁻¹ r, by the smaller of both Gram matrices (Woodbury)."""
        A = torch.cat([self.C, rho**0.5 * n])
        shift = self.ridge + rho
        wide = len(A) < A.shape[1]
        gram = A @ A.mT if wide else A.mT @ A
        eye = torch.eye(len(gram)).to(A)
        root = torch.linalg.cholesky(gram + shift * eye)

        def solve(r: Tensor) -> Tensor:
            return torch.cholesky_solve(r[:, None], root)[:, 0]

        def by_rows(r: Tensor) -> Tensor:
            along = A.mT @ solve(A @ r)
            return (r - along) / shift

        return by_rows if wide else solve


@dataclass(frozen=True)
class Split:
    """Where the splitting method ends: the point ``at (P,)`` and the multipliers ``force (K,)`` of
    the rows."""

    at: Row
    force: Float[Tensor, " K"]


@dataclass(frozen=True)
class _Iterate:
    """Copies of u in the set and of nu, ``x`` and ``z``, and their multipliers over ρ, ``y`` and
    ``f``."""

    x: Row
    z: Float[Tensor, " K"]
    y: Row
    f: Float[Tensor, " K"]

    @staticmethod
    def begin(x: Row, z: Float[Tensor, " K"]) -> "_Iterate":
        return _Iterate(x, z, torch.zeros_like(x), torch.zeros_like(z))

    def after(
        self,
        u: Tensor,
        v: Tensor,
        project: Callable[[Tensor], Tensor],
        prox: Callable[[Tensor, float], Tensor],
        rho: float,
    ) -> "_Iterate":
        """The copies brought near u and v, beyond which they go."""
        to_x = _RELAX * u + (1 - _RELAX) * self.x + self.y
        to_z = _RELAX * v + (1 - _RELAX) * self.z + self.f
        x = project(to_x)
        z = prox(to_z, rho)
        return _Iterate(x, z, to_x - x, to_z - z)


_RELAX = 1.6
_REVISIONS = {100 * 2**k for k in range(20)}  # steps after which the penalty is revised


def split(
    q: Form,
    project: Callable[[Tensor], Tensor],
    n: Float[Tensor, "K P"],
    prox: Callable[[Tensor, float], Tensor],
    *,
    start: Row,
    tol: float = 1e-12,
    max_steps: int = 20000,
) -> Split:
    """Minimises q(u) + r(nu) over a convex set: the alternating direction method of multipliers.

    Over-relaxed, with a penalty ρ that balances both residuals (Boyd et al. 2011; Stellato et al.
    2020). ``project`` goes to the set and ``prox(v, ρ)`` minimises r(z) + ½ρ‖z − v‖²."""
    rho = _first_penalty(q, start)
    solve = q.solver(n, rho)
    at = _Iterate.begin(start, n @ start)
    for step in range(1, max_steps + 1):
        pull = at.x - at.y + (at.z - at.f) @ n
        u = solve(q.b + rho * pull)
        v = n @ u
        last = at
        at = at.after(u, v, project, prox, rho)
        if step % 25:
            continue
        primal = _largest(u - at.x, v - at.z) / _largest(u, v)
        moved = at.x - last.x + (at.z - last.z) @ n
        dual = _largest(moved) / _largest(at.y, q.b / rho)
        if max(primal, dual) <= tol:
            break
        change = _imbalance(primal, dual)
        if step in _REVISIONS and not 0.2 < change < 5:
            rho = rho * change
            at = replace(at, y=at.y / change, f=at.f / change)
            solve = q.solver(n, rho)
    return Split(at.x, rho * at.f)


def _first_penalty(q: Form, start: Tensor) -> float:
    if not bool(start.any()):
        return 1.0
    rho = _largest(q.gradient(start)) / _largest(start)
    return rho if rho > 1e-100 else 1.0


def _imbalance(primal: float, dual: float) -> float:
    """What the penalty is to be multiplied by, in bounds."""
    ratio = (primal + 1e-17) / (dual + 1e-17)
    return min(max(ratio**0.5, 0.1), 10.0)


def _largest(*vectors: Tensor) -> float:
    """The largest size of any number, never 0."""
    sizes = [float(v.abs().amax()) for v in vectors if v.numel()]
    return max(sizes, default=0.0) or 1e-300

r"""Matrix games between a point of a norm's unit ball and weights of rows, with their certificates.

How far one gets inside the ball,

    τ* = max { τ : ‖w‖ ≤ 1,  Zw ≥ τ b  or  Zw = τ b } = min { ‖Zᵀp‖_* : ⟨p, b⟩ = 1,  p ≥ 0 for ≥ },

and for b = 1 that is max over w of min over p of pᵀZw, p on the simplex. By weak duality every
such p bounds what any w can reach. So a solver need not be believed: results hold its w and p,
scaled to be feasible, and what these two achieve.

    norm                                 programme                                solver
    ℓ1, ℓ∞                               linear                                   HiGHS, in SciPy
    quadratic: ℓ2, Mahalanobis, …        the point of a hull nearest to zero      nnls, in SciPy
    spectral, nuclear, ℓp, block norms   conic                                    Clarabel
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import torch
from jaxtyping import Float
from numpy import ndarray as Array
from numpy.typing import ArrayLike
from scipy.optimize import nnls

from flowsim.convex.cones import conic_optimum, inverse_metric
from flowsim.convex.linear import BallProgramme, is_linear, linear_optimum
from flowsim.norms.norm import Norm

Solver: TypeAlias = Callable[[Array, Array, Norm, bool], tuple[Array, Array]]
"""(rows Z, target b, norm, whether Zw = τb instead of Zw ≥ τb) -> a w and a p, of any scale."""


@dataclass(frozen=True)
class MaxMargin:
    """The largest margin of rows z_i over the unit ball of a norm, and the proof that there is none
    larger.

    ``w`` (P,) has ‖w‖ = 1 and reaches ``margin`` = min_i ⟨z_i, w⟩; ``p`` (M,), on the simplex,
    shows that nothing reaches more than ``bound`` = ‖Σ p_i z_i‖_*. Both are evaluated from w and p,
    whatever the solver claims. Where no direction separates the rows, w = 0 and the margin is 0,
    the best inside the ball."""

    margin: float
    w: Float[Array, " P"]
    p: Float[Array, " M"]
    bound: float

    @property
    def gap(self) -> float:
        """How much larger the largest margin could be than the one found; at least 0 up to
        rounding."""
        return self.bound - self.margin

    @property
    def separated(self) -> bool:
        """Whether w separates. If not, no direction does so by more than ``bound``."""
        return self.margin > 0

    def __str__(self) -> str:
        if self.separated:
            return f"margin {self.margin:.10g}, at most {self.gap:.1e} below the largest"
        return f"not separated: no direction has a margin above {self.bound:.1e}"


def game(rows: ArrayLike, norm: Norm, solve: Solver | None = None) -> MaxMargin:
    """The largest least margin of rows z_i ``(M, P)`` of any origin, in a norm that is bound to
    their layout.

    With the gradients ∇q_i of the least margins of a net as rows, ``bound`` is min_p ‖Σ p_i
    ∇q_i‖_*, which equals L·q_min/‖w‖ if w is a KKT point and is larger if it is not. Raises
    ValueError for rows that are no finite matrix, ArithmeticError where the solver fails."""
    Z = np.asarray(rows, dtype=float)
    if Z.ndim != 2 or Z.size == 0 or not np.isfinite(Z).all():
        raise ValueError(
            f"got rows of shape {Z.shape}, expected finite numbers (M, P), one row for each margin"
        )
    ones = np.ones(len(Z))
    w, p = farthest(Z, ones, norm, solve=solve)
    p = np.maximum(p, 0)
    p = p / p.sum()
    margin = float((Z @ w).min())
    longest = np.linalg.norm(Z, axis=1).max()
    eps = np.finfo(float).eps
    rounding = 4 * len(w) * eps * longest * np.linalg.norm(w)
    if margin <= rounding:
        margin = 0.0
        w = np.zeros_like(w)
    bound = dual_of(norm, p @ Z)
    return MaxMargin(margin, w, p, bound)


def farthest(
    rows: Float[Array, "M P"],
    target: Float[Array, " M"],
    norm: Norm,
    *,
    equal: bool = False,
    solve: Solver | None = None,
) -> tuple[Float[Array, " P"], Float[Array, " M"]]:
    """w on the unit sphere, or 0, and p with ⟨p, b⟩ = 1, by ``solve`` or the solver for this
    norm."""
    scale = np.abs(rows).max() or 1.0
    solve = solve or _solver(norm)
    w, p = solve(rows / scale, target, norm, equal)
    length = float(norm.value(torch.from_numpy(w)))
    if length > 0:
        w = w / length
    return w, p / (p @ target)


def dual_of(norm: Norm, g: Float[Array, " P"]) -> float:
    """‖g‖_* of an array."""
    return float(norm.dual(torch.from_numpy(g)))


# --------------------------------------------------------------------------------------------------
# Solvers
# --------------------------------------------------------------------------------------------------


def _solver(norm: Norm) -> Solver:
    if norm.quadratic:
        return nearest_point
    return linear_program if is_linear(norm) else cone_program


def linear_program(
    rows: Array, target: Array, norm: Norm, equal: bool = False
) -> tuple[Array, Array]:
    """ℓ1 and ℓ∞, by HiGHS. As "max τ over the unit ball" it is faster than as "min ‖w‖"."""
    programme = _largest_multiple(rows, target, equal)
    best = linear_optimum(programme, norm)
    return best.u, best.multipliers


def cone_program(
    rows: Array, target: Array, norm: Norm, equal: bool = False
) -> tuple[Array, Array]:
    """Any norm that `norm_expression` can write down, by Clarabel."""
    programme = _largest_multiple(rows, target, equal)
    best = conic_optimum(programme, norm)
    return best.u, best.multipliers


def _largest_multiple(rows: Array, target: Array, equal: bool) -> BallProgramme:
    """max τ with Zw ≥ τb."""
    goal = np.zeros(rows.shape[1] + 1)
    goal[-1] = 1
    free = np.array([-np.inf])
    return BallProgramme(goal, np.c_[-rows, target], free, equal)


def nearest_point(
    rows: Array, target: Array, norm: Norm, equal: bool = False
) -> tuple[Array, Array]:
    """Norms with ‖g‖_*² = gᵀBg: p minimises ‖Rᵀ Zᵀ p‖₂ with RRᵀ = B, and w = B Zᵀp.

    min ‖RᵀZᵀp‖² + (1 − ⟨p, b⟩)² over p ≥ 0 has the same minimiser up to its scale. Raises
    ValueError where the norm is not quadratic."""
    if not norm.quadratic:
        raise ValueError(f"got the norm {norm.name!r}, expected a quadratic one, try cone_program")
    B = inverse_metric(norm, rows.shape[1])
    columns = (rows @ np.linalg.cholesky(B)).T
    p = _least_weights(columns, target, equal)
    return B @ (p @ rows), p


def nearest_by_products(
    rows: Array, target: Array, norm: Norm, equal: bool = False
) -> tuple[Array, Array]:
    """`nearest_point` by inner products of rows instead of a P × P matrix: for many weights, to
    half of the digits."""
    lifted = norm.by_inverse_metric(torch.from_numpy(rows)).numpy()  # ZB
    values, basis = np.linalg.eigh(rows @ lifted.T)
    lengths = np.sqrt(np.maximum(values, 0))
    columns = lengths[:, None] * basis.T
    p = _least_weights(columns, target, equal)
    return p @ lifted, p


def _least_weights(columns: Float[Array, "k M"], target: Array, equal: bool) -> Float[Array, " M"]:
    """The p, ≥ 0 or free, of least ‖columns·p‖² + (1 − ⟨p, b⟩)²."""
    system = np.vstack([columns, target])
    one = np.zeros(len(system))
    one[-1] = 1
    solve = np.linalg.lstsq if equal else nnls
    return solve(system, one)[0]

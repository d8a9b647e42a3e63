r"""A linear function over the unit ball of a norm, under linear rows; the one linear programme of
the package.

    maximise ⟨goal, x⟩   over x = (u, y),   ‖u‖ ≤ 1,   y ≥ lowest,   rows·x ≤ 0 (or = 0).

The numbers y beside the point u hold what is concave and piecewise linear in it: y_k ≥ max(⟨n_k,
u⟩, 0) is a kink, and τ ≤ ⟨z_i, u⟩ for all i the least of several margins."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float
from numpy import ndarray as Array
from scipy.optimize import linprog

from flowsim.norms.norm import Norm
from flowsim.norms.vector import L1, Linf


@dataclass(frozen=True)
class BallProgramme:
    """The data: see the module. ``lowest`` holds −inf where a number of y is free; the rows are
    equations where ``equal``."""

    goal: Float[Array, " P+K"]
    rows: Float[Array, "R P+K"]
    lowest: Float[Array, " K"]
    equal: bool = False

    @property
    def size(self) -> int:
        """P, the length of u."""
        return len(self.goal) - len(self.lowest)


@dataclass(frozen=True)
class BallOptimum:
    """The best ``u`` and the ``multipliers`` of the rows, which are ≥ 0 but for equations.

    With λ the multipliers, goal − rowsᵀλ is ‖·‖_* = the optimum on u, and vanishes on free y."""

    u: Float[Array, " P"]
    multipliers: Float[Array, " R"]


def is_linear(norm: Norm) -> bool:
    """Whether `linear_optimum` takes the norm."""
    return isinstance(norm, L1 | Linf)


def linear_optimum(programme: BallProgramme, norm: Norm) -> BallOptimum:
    """The optimum in ℓ1 or ℓ∞, by HiGHS (in SciPy); ArithmeticError where it finds none."""
    P = programme.size
    what = f"{len(programme.rows)} rows of {P} numbers"
    if not isinstance(norm, L1):
        bounds = _bounds(programme, -1.0, 1.0)
        x, multipliers = _by_highs(programme, bounds, programme.rows[:0], what)
        return BallOptimum(x[:P], multipliers)
    goal = _in_parts(programme.goal, P)
    rows = _in_parts(programme.rows, P)
    parts = BallProgramme(goal, rows, programme.lowest, programme.equal)
    budget = np.zeros(len(goal))
    budget[: 2 * P] = 1
    bounds = _bounds(parts, 0.0, np.inf)
    x, multipliers = _by_highs(parts, bounds, budget[None], what)
    return BallOptimum(x[:P] - x[P : 2 * P], multipliers)


def _in_parts(a: Float[Array, "*R P+K"], size: int) -> Float[Array, "*R 2P+K"]:
    """Coefficients of (u, y) as those of (plus, minus, y), where u = plus − minus."""
    of_u = a[..., :size]
    of_y = a[..., size:]
    return np.concatenate([of_u, -of_u, of_y], -1)


def _bounds(programme: BallProgramme, low: float, high: float) -> Float[Array, "P+K 2"]:
    """Of x, with these for u."""
    bounds = np.full((len(programme.goal), 2), np.inf)
    bounds[: programme.size] = low, high
    bounds[programme.size :, 0] = programme.lowest
    return bounds


def _by_highs(
    programme: BallProgramme,
    bounds: Float[Array, "P+K 2"],
    budgets: Float[Array, "b P+K"],
    what: str,
) -> tuple[Float[Array, " P+K"], Float[Array, " R"]]:
    """The best x in its bounds with ``budgets``·x at most 1, and the multipliers of the rows."""
    rows = programme.rows
    count = len(rows)
    sides = np.zeros(count)
    equations: dict[str, Array] = {}
    if programme.equal:
        equations = {"A_eq": rows, "b_eq": sides}
        rows = rows[:0]
        sides = sides[:0]
    found = linprog(
        -programme.goal,
        A_ub=np.vstack([rows, budgets]),
        b_ub=np.append(sides, np.ones(len(budgets))),
        **equations,
        bounds=bounds,
        method="highs",
        options={"primal_feasibility_tolerance": 1e-10, "dual_feasibility_tolerance": 1e-10},
    )
    if found.x is None:
        raise ArithmeticError(f"HiGHS failed on {what}: {found.message}")
    of_rows = found.eqlin if programme.equal else found.ineqlin
    return found.x, -of_rows.marginals[:count]

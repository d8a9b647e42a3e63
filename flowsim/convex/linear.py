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
    lowest = programme.lowest
    goal = programme.goal
    rows = programme.rows
    equal = programme.equal
    if isinstance(norm, L1):  # u = plus − minus
        goal = _in_parts(goal, P)
        rows = _in_parts(rows, P)
        low = np.zeros(2 * P)
        high = np.full(2 * P, np.inf)
        ball = np.append(np.ones(2 * P), np.zeros(len(lowest)))[None]
    else:
        low = -np.ones(P)
        high = np.ones(P)
        ball = np.zeros((0, len(goal)))
    found = linprog(
        -goal,
        A_ub=ball if equal else np.vstack([rows, ball]),
        b_ub=np.append(np.zeros(0 if equal else len(rows)), np.ones(len(ball))),
        A_eq=rows if equal else None,
        b_eq=np.zeros(len(rows)) if equal else None,
        bounds=np.stack([np.append(low, lowest), np.append(high, np.full(len(lowest), np.inf))], 1),
        method="highs",
        options={"primal_feasibility_tolerance": 1e-10, "dual_feasibility_tolerance": 1e-10},
    )
    if found.x is None:
        raise ArithmeticError(f"HiGHS failed on {len(rows)} rows of {P} numbers: {found.message}")
    u = found.x[:P] - found.x[P : 2 * P] if isinstance(norm, L1) else found.x[:P]
    marginals = (found.eqlin if equal else found.ineqlin).marginals
    return BallOptimum(u, -marginals[: len(rows)])


def _in_parts(a: Float[Array, "*R P+K"], size: int) -> Float[Array, "*R 2P+K"]:
    """Coefficients of (u, y) as those of (plus, minus, y)."""
    return np.concatenate([a[..., :size], -a[..., :size], a[..., size:]], -1)

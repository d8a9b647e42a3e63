r"""Exact answers for linear models: largest margins and smallest interpolants in any norm, each
with its certificate.

Both ask how far one gets inside the unit ball,

    τ* = max { τ : ‖w‖ ≤ 1,  Zw ≥ τ b  or  Zw = τ b } = min { ‖Zᵀp‖_* : ⟨p, b⟩ = 1 },      p ≥ 0 for ≥

with b = 1 for margins, and for interpolants b = y and ‖w‖ = 1/τ*. By weak duality every such p
bounds what any w can reach. So a solver need not be believed: results hold its w and p, scaled to
be feasible, and what these two achieve.

    norm                                    program                                     solver
    ℓ1, ℓ∞                                  linear                                      HiGHS, in SciPy
    quadratic: ℓ2, Mahalanobis, …           the point of a hull nearest to the origin   nnls, in SciPy
    spectral, nuclear, ℓp, block norms      conic                                       Clarabel, extra ``convex``
"""

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from numpy import ndarray as Array
from scipy.optimize import linprog, nnls

from flowsim.norms.blocks import Euclidean, Max, Sum
from flowsim.norms.matrix import Nuclear, Spectral
from flowsim.norms.norm import Norm
from flowsim.norms.vector import L1, Linf, Lp
from flowsim.problems.losses import Pairwise
from flowsim.problems.problem import Problem

EPS = float(np.finfo(float).eps)


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


@dataclass(frozen=True)
class MinNorm:
    """The interpolant of least norm and the proof that there is none smaller.

    ``w`` (P,) has the norm ``size`` and misses the targets by at most ``residual``; no interpolant
    is smaller than ``bound`` = ⟨ν, y⟩ with the ``multipliers`` ν (M,), for which ‖Xᵀν‖_* = 1."""

    size: float
    w: Float[Array, " P"]
    multipliers: Float[Array, " M"]
    bound: float
    residual: float

    @property
    def gap(self) -> float:
        """How much smaller the least norm could be; at least 0 up to rounding and the residual."""
        return self.size - self.bound


def max_margin(problem: Problem, norm: Norm) -> MaxMargin:
    """max over ‖w‖ ≤ 1 of the least margin of a linear model, y_i f(x_i; w) or f_y − f_j over wrong
    classes j.

    The limit direction of steepest flow in this norm has this margin (Gunasekar et al. 2018).
    Raises ValueError for nets that are not linear in their weights, for regression, for several
    data sets at once and for Schatten norms other than spectral, Frobenius and nuclear; ImportError
    where cvxpy is needed and missing.

    >>> import flowsim as fs
    >>> problem = fs.Problem(fs.Linear(3), [[3, 1, 0], [1, -2, 2], [1, 2, 1]], [1, 1, 1], fs.exponential)
    >>> print(max_margin(problem, fs.Linf()).margin)
    2.5
    """
    return game(margin_rows(problem), norm.bind(problem.layout))


def game(rows: Float[Array, "M P"], norm: Norm, solve: "Solver | None" = None) -> MaxMargin:
    """`max_margin` for rows z_i of any origin, and a norm that is bound to their layout.

    max over w of min over p of pᵀZw, a matrix game. With the gradients ∇q_i of the least margins of
    a net as rows, ``bound`` is min_p ‖Σ p_i ∇q_i‖_*, which equals L·q_min/‖w‖ if w is a KKT point
    and is larger if it is not."""
    rows = _matrix(rows)
    w, p = _solution(rows, np.ones(len(rows)), norm, False, solve)
    p = np.maximum(p, 0)
    p = p / p.sum()
    margin = float((rows @ w).min())
    rounding = (
        4 * rows.shape[1] * EPS * float(np.linalg.norm(rows, axis=1).max() * np.linalg.norm(w))
    )
    if margin <= rounding:
        margin, w = 0.0, np.zeros_like(w)
    return MaxMargin(margin, w, p, _dual(norm, p @ rows))


def min_norm(problem: Problem, norm: Norm) -> MinNorm:
    """min ‖w‖ over the weights of a linear model that fit all targets of a regression exactly.

    Gradient flow from 0 ends there in ℓ2; steepest flow in other norms does not in general
    (Gunasekar et al. 2018). Raises as `max_margin` does, and ValueError where nothing interpolates
    or all targets are 0."""
    if problem.loss.reading.targets != "values":
        raise ValueError(
            f"min_norm: got the {problem.loss.name} loss, expected a regression, try loss=flowsim.squared"
        )
    rows, norm = _jacobian(problem).flatten(0, 1).numpy(), norm.bind(problem.layout)
    y = problem.y.reshape(-1).double().cpu().numpy()
    if not y.any():
        raise ValueError("min_norm: got targets that are all 0, which w = 0 fits, expected others")
    if np.abs(rows @ np.linalg.lstsq(rows, y)[0] - y).max() > 1e-9 * np.abs(y).max():
        raise ValueError(
            "min_norm: no weights fit these targets, try fewer examples or the flow's least squares"
        )
    w, multipliers = _solution(rows, y, norm, True, None)
    w = w * (y @ y) / (y @ (rows @ w))
    w = w + np.linalg.lstsq(rows, y - rows @ w)[0]
    multipliers = multipliers / _dual(norm, multipliers @ rows)
    residual = float(np.abs(rows @ w - y).max())
    return MinNorm(
        float(norm.value(torch.from_numpy(w))), w, multipliers, float(multipliers @ y), residual
    )


def margin_rows(problem: Problem) -> Float[Array, "M P"]:
    """Z with Zw = q: y_i x_i for one output, one row for each example and wrong class for
    several."""
    kind = problem.loss.reading.targets
    if kind == "values":
        raise ValueError(
            f"max_margin: got the {problem.loss.name} loss, which has no margins, try min_norm"
        )
    reading = Pairwise() if kind == "classes" else problem.loss.reading
    return reading.read(_jacobian(problem).movedim(-1, 0), problem.y)[0].mT.numpy()


def _jacobian(problem: Problem) -> Float[torch.Tensor, "N C P"]:
    if not problem.net.linear:
        raise ValueError(
            f"got {type(problem.net).__name__} of degree {problem.degree:g}, expected a net that is linear in its "
            "weights, try flowsim.Linear(d, outputs), or reference.game on gradients"
        )
    if problem.x.ndim == 3 and len(problem.x) > 1:
        raise ValueError(
            f"got {len(problem.x)} data sets, expected one, try problem.select(torch.tensor([b])) for each b"
        )
    zero = torch.zeros(1, problem.size, dtype=torch.float64)
    return problem.like(zero).net.jacobian(zero, problem.x.to(zero))[0]


def _matrix(rows: Any) -> Float[Array, "M P"]:
    rows = np.asarray(rows, dtype=float)
    if rows.ndim != 2 or rows.size == 0 or not np.isfinite(rows).all():
        raise ValueError(
            f"got rows of shape {rows.shape}, expected finite numbers (M, P), one row for each margin"
        )
    return rows


def _dual(norm: Norm, g: Float[Array, " P"]) -> float:
    return float(norm.dual(torch.from_numpy(g)))


# --------------------------------------------------------------------------------------------------
# Solvers: (rows Z, target b, norm, whether Zw = τb instead of Zw ≥ τb) -> a w and a p, of any scale
# --------------------------------------------------------------------------------------------------

Solver = Callable[[Array, Array, Norm, bool], tuple[Array, Array]]


def _solution(
    rows: Array, target: Array, norm: Norm, equal: bool, solve: Solver | None
) -> tuple[Array, Array]:
    """w on the unit sphere, or 0, and p with ⟨p, b⟩ = 1, by the solver for this norm."""
    scale = np.abs(rows).max() or 1.0
    w, p = (solve or _solver(norm))(rows / scale, target, norm, equal)
    size = float(norm.value(torch.from_numpy(w)))
    return w / size if size > 0 else w, p / (p @ target)


def _solver(norm: Norm) -> Solver:
    if norm.quadratic:
        return nearest_point
    return linear_program if isinstance(norm, L1 | Linf) else cone_program


def linear_program(rows: Array, target: Array, norm: Norm, equal: bool) -> tuple[Array, Array]:
    """ℓ1 and ℓ∞, by HiGHS. As "max τ over the unit ball" it is faster than as "min ‖w‖"."""
    d = rows.shape[1]
    bounds: list[tuple[float | None, float | None]]
    if isinstance(norm, Linf):
        sides, bounds = np.c_[-rows, target], [(-1.0, 1.0)] * d
        ball = np.zeros((0, d + 1))
    else:  # w = u − v with u, v ≥ 0
        sides, bounds = np.c_[-rows, rows, target], [(0.0, None)] * (2 * d)
        ball = np.append(np.ones(2 * d), 0.0)[None]
    goal = np.append(np.zeros(len(bounds)), -1.0)
    limits = {
        "A_eq": sides,
        "b_eq": np.zeros(len(rows)),
        "A_ub": ball,
        "b_ub": np.ones(len(ball)),
    }
    if not equal:
        limits = {
            "A_ub": np.vstack([sides, ball]),
            "b_ub": np.append(np.zeros(len(rows)), np.ones(len(ball))),
        }
    tight = {"primal_feasibility_tolerance": 1e-10, "dual_feasibility_tolerance": 1e-10}
    found = linprog(goal, **limits, bounds=[*bounds, (None, None)], method="highs", options=tight)
    if found.status != 0:
        raise RuntimeError(f"HiGHS failed on {len(rows)} rows of {d} numbers: {found.message}")
    w = found.x[:d] if isinstance(norm, Linf) else found.x[:d] - found.x[d : 2 * d]
    return w, -(found.eqlin if equal else found.ineqlin).marginals[: len(rows)]


def nearest_point(rows: Array, target: Array, norm: Norm, equal: bool) -> tuple[Array, Array]:
    """Norms with ‖g‖_*² = gᵀBg: p minimises ‖Rᵀ Zᵀ p‖₂ with RRᵀ = B, and w = B Zᵀp.

    min ‖RᵀZᵀp‖² + (1 − ⟨p, b⟩)² over p ≥ 0 has the same minimiser up to its scale. Raises
    ValueError where the norm is not quadratic."""
    if not norm.quadratic:
        raise ValueError(f"got the norm {norm.name!r}, expected a quadratic one, try cone_program")
    B = _inverse_metric(norm, rows.shape[1])
    system = np.vstack([(rows @ np.linalg.cholesky(B)).T, target])
    one = np.append(np.zeros(rows.shape[1]), 1.0)
    p = np.linalg.lstsq(system, one)[0] if equal else nnls(system, one)[0]
    return B @ (p @ rows), p


def cone_program(rows: Array, target: Array, norm: Norm, equal: bool) -> tuple[Array, Array]:
    """Any norm that `norm_expression` can write down, by Clarabel."""
    cp = _cvxpy()
    w, tau = cp.Variable(rows.shape[1]), cp.Variable()
    reached = rows @ w == tau * target if equal else rows @ w >= tau * target
    program = cp.Problem(cp.Maximize(tau), [reached, norm_expression(norm, w) <= 1])
    sharp = dict.fromkeys(("tol_gap_abs", "tol_gap_rel", "tol_feas"), 1e-12)
    with (
        warnings.catch_warnings()
    ):  # of inaccuracy: how accurate w and p are is evaluated from them
        warnings.simplefilter("ignore", UserWarning)
        try:
            program.solve(solver="CLARABEL", max_iter=200, **sharp)
        except cp.SolverError:
            program.solve(solver="CLARABEL")
    if w.value is None or reached.dual_value is None:
        raise RuntimeError(
            f"Clarabel failed on {len(rows)} rows of {rows.shape[1]} numbers: {program.status}"
        )
    p = np.asarray(reached.dual_value)
    return np.asarray(w.value), p if equal else np.maximum(p, 0)


def norm_expression(norm: Norm, w: Any) -> Any:
    """``‖w‖`` as an expression of cvxpy, from the definition of each norm; ValueError for norms
    that have none."""
    cp = _cvxpy()
    if isinstance(norm, Max | Sum | Euclidean):
        parts = cp.hstack(
            [norm_expression(part.norm, w[part.block.slice]) / part.scale for part in norm._bound]
        )
        return {Max: cp.max, Sum: cp.sum, Euclidean: cp.norm2}[type(norm)](parts)
    if isinstance(norm, Spectral | Nuclear):
        assert norm.shape is not None, "bound"
        matrix = cp.reshape(w, norm.shape, order="C")
        return cp.sigma_max(matrix) if isinstance(norm, Spectral) else cp.normNuc(matrix)
    if isinstance(norm, Lp):
        return cp.pnorm(w, norm.p)
    if isinstance(norm, L1 | Linf):
        return cp.norm1(w) if isinstance(norm, L1) else cp.norm_inf(w)
    if norm.quadratic:
        return cp.norm2(np.linalg.cholesky(np.linalg.inv(_inverse_metric(norm, w.shape[0]))).T @ w)
    raise ValueError(
        f"got the norm {norm.name!r}, expected one that a cone program can hold, try Spectral() or Lp(p)"
    )


def _inverse_metric(norm: Norm, size: int) -> Float[Array, "P P"]:
    """B with ‖g‖_*² = gᵀBg; dual(g)·steepest(g) = Bg."""
    unit = torch.eye(size, dtype=torch.float64)
    B = (norm.dual(unit)[:, None] * norm.steepest(unit)).numpy()
    return (B + B.T) / 2


def _cvxpy() -> Any:
    try:
        return import_module("cvxpy")
    except ImportError:
        raise ImportError(
            "this norm needs cvxpy and Clarabel, which are not installed, try: pip install flowsim[convex]"
        ) from None

r"""Cone programmes by Clarabel, through cvxpy (both in the extra ``convex``): all that says either.

For every norm that `norm_expression` can write down. Data come in and results go out as arrays;
what Clarabel has not solved is an ArithmeticError."""

import warnings
from importlib import import_module
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from numpy import ndarray as Array

from flowsim.convex.linear import BallOptimum, BallProgramme
from flowsim.norms.blocks import Euclidean, Max, Sum
from flowsim.norms.matrix import Nuclear, Spectral
from flowsim.norms.norm import Norm
from flowsim.norms.vector import L1, Linf, Lp


def conic_optimum(programme: BallProgramme, norm: Norm) -> BallOptimum:
    """`linear.linear_optimum` in any norm."""
    cp = _cvxpy()
    P = programme.size
    x = cp.Variable(len(programme.goal))
    reached = programme.rows @ x
    held = reached == 0 if programme.equal else reached <= 0
    length = norm_expression(norm, x[:P])
    limits = [held, length <= 1]
    floored = np.flatnonzero(np.isfinite(programme.lowest))
    if len(floored):
        lowest = programme.lowest[floored]
        limits.append(x[P + floored] >= lowest)
    problem = cp.Problem(cp.Maximize(programme.goal @ x), limits)
    _solve(problem, f"{len(programme.rows)} rows of {P} numbers")
    return BallOptimum(x.value[:P], held.dual_value)


def ekeland_point(
    norm: Norm, w: Float[Array, " P"], force: Float[Array, " P"], weight: float
) -> tuple[Float[Array, " P"], Float[Array, " P"]]:
    """The v of min ½‖v‖² − ⟨force, v⟩ + weight·‖v − w‖ and the k ∈ ∂½‖v‖² that proves it, of norms
    near w and ``force``."""
    cp = _cvxpy()
    x = cp.Variable(len(w))
    v = cp.Variable(len(w))
    same = x == v  # its multipliers are −k
    half_square = 0.5 * cp.square(norm_expression(norm, x))
    away = weight * norm_expression(norm, v - w)
    goal = cp.Minimize(half_square - force @ v + away)
    problem = cp.Problem(goal, [same])
    _solve(problem, f"a nearby KKT pair in the norm {norm.name!r}")
    return x.value, -same.dual_value


def norm_expression(norm: Norm, w: Any) -> Any:
    """``‖w‖`` as an expression of cvxpy, from the definition of each norm; ValueError for norms
    that have none."""
    cp = _cvxpy()
    if isinstance(norm, Max | Sum | Euclidean):
        combine = {Max: cp.max, Sum: cp.sum, Euclidean: cp.norm2}[type(norm)]
        parts = [norm_expression(part.norm, part.of(w)) / part.scale for part in norm.blocks]
        return combine(cp.hstack(parts))
    if isinstance(norm, Spectral | Nuclear):
        largest_or_sum = cp.sigma_max if isinstance(norm, Spectral) else cp.normNuc
        return largest_or_sum(cp.reshape(w, norm.shape, order="C"))
    if isinstance(norm, Lp):
        return cp.pnorm(w, norm.p)
    if isinstance(norm, L1):
        return cp.norm1(w)
    if isinstance(norm, Linf):
        return cp.norm_inf(w)
    if norm.quadratic:
        B = inverse_metric(norm, w.shape[0])
        root = np.linalg.cholesky(np.linalg.inv(B))
        return cp.norm2(root.T @ w)
    raise ValueError(
        f"got the norm {norm.name!r}, expected one that a cone program can hold, "
        "try Spectral() or Lp(p)"
    )


def inverse_metric(norm: Norm, size: int) -> Float[Array, "P P"]:
    """B with ‖g‖_*² = gᵀBg."""
    unit = torch.eye(size, dtype=torch.float64)
    B = norm.by_inverse_metric(unit).numpy()
    return (B + B.T) / 2


def _solve(problem: Any, what: str) -> None:
    """To twelve digits, or to the usual eight where that fails."""
    sharp = {"max_iter": 200, "tol_gap_abs": 1e-12, "tol_gap_rel": 1e-12, "tol_feas": 1e-12}
    with warnings.catch_warnings():
        # of inaccuracy: how good they are is evaluated from the points themselves
        warnings.simplefilter("ignore", UserWarning)
        for options in (sharp, {}):
            try:
                problem.solve(solver="CLARABEL", **options)
            except _cvxpy().SolverError:
                continue
            if problem.status in ("optimal", "optimal_inaccurate"):
                return
    raise ArithmeticError(f"Clarabel failed on {what}: {problem.status}")


def _cvxpy() -> Any:
    try:
        return import_module("cvxpy")
    except ImportError:
        raise ImportError(
            "this norm needs cvxpy and Clarabel, which are not installed, "
            "try: pip install flowsim[convex]"
        ) from None

r"""Exact answers for linear models: largest margins and smallest interpolants in any norm, each
with its certificate (see `convex.games`)."""

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from numpy import ndarray as Array

from flowsim.convex.cones import norm_expression
from flowsim.convex.games import (
    MaxMargin,
    cone_program,
    dual_of,
    farthest,
    game,
    linear_program,
    nearest_point,
)
from flowsim.norms.norm import Norm
from flowsim.problems.problem import Problem
from flowsim.problems.readings import Pairwise

__all__ = [
    "MaxMargin",
    "MinNorm",
    "cone_program",
    "game",
    "linear_program",
    "margin_rows",
    "max_margin",
    "min_norm",
    "nearest_point",
    "norm_expression",
]


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
    >>> x, y = [[3, 1, 0], [1, -2, 2], [1, 2, 1]], [1, 1, 1]
    >>> problem = fs.Problem(fs.Linear(3), x, y, fs.exponential)
    >>> print(max_margin(problem, fs.Linf()).margin)
    2.5
    """
    return game(margin_rows(problem), norm.bind(problem.layout))


def min_norm(problem: Problem, norm: Norm) -> MinNorm:
    """min ‖w‖ over the weights of a linear model that fit all targets of a regression exactly.

    Gradient flow from 0 ends there in ℓ2; steepest flow in other norms does not in general
    (Gunasekar et al. 2018). Raises as `max_margin` does, and ValueError where nothing interpolates
    or all targets are 0."""
    if problem.loss.reading.targets != "values":
        raise ValueError(
            f"min_norm: got the {problem.loss.name} loss, expected a regression, "
            "try loss=flowsim.squared"
        )
    rows = _jacobian(problem).flatten(0, 1).numpy()
    norm = norm.bind(problem.layout)
    y = problem.y.reshape(-1).double().cpu().numpy()
    if not y.any():
        raise ValueError("min_norm: got targets that are all 0, which w = 0 fits, expected others")
    residual = rows @ np.linalg.lstsq(rows, y)[0] - y
    if np.abs(residual).max() > 1e-9 * np.abs(y).max():
        raise ValueError(
            "min_norm: no weights fit these targets, try fewer examples or the flow's least squares"
        )
    w, multipliers = farthest(rows, y, norm, equal=True)
    w = w * (y @ y) / (y @ (rows @ w))
    w = w + np.linalg.lstsq(rows, y - rows @ w)[0]
    multipliers = multipliers / dual_of(norm, multipliers @ rows)
    return MinNorm(
        size=float(norm.value(torch.from_numpy(w))),
        w=w,
        multipliers=multipliers,
        bound=float(multipliers @ y),
        residual=float(np.abs(rows @ w - y).max()),
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
    columns = _jacobian(problem).movedim(-1, 0)
    q = reading.read(columns, problem.y)[0]
    return q.mT.numpy()


def _jacobian(problem: Problem) -> Float[torch.Tensor, "N C P"]:
    if not problem.net.linear:
        raise ValueError(
            f"got {type(problem.net).__name__} of degree {problem.degree:g}, expected a net that "
            "is linear in its weights, try flowsim.Linear(d, outputs), or reference.game on "
            "gradients"
        )
    if problem.x.ndim == 3 and len(problem.x) > 1:
        raise ValueError(
            f"got {len(problem.x)} data sets, expected one, "
            "try problem.select(torch.tensor([b])) for each b"
        )
    zero = torch.zeros(1, problem.size, dtype=torch.float64)
    return problem.like(zero).net.jacobian(zero, problem.x.to(zero))[0]

"""Least points of faces by a convex solver."""

import cvxpy as cp
import numpy as np
import torch
from torch import Tensor

from tests.oracles.norm_cases import dot, spd
from tests.oracles.projected_gradient import minimise


def curvature(size: int) -> Tensor:
    """A quadratic form of small condition number."""
    return spd(size) + torch.eye(size, dtype=torch.float64)


def quadratic(hessian: Tensor, v: cp.Expression) -> cp.Expression:
    factor = np.linalg.cholesky(hessian.numpy()).T
    return cp.sum_squares(factor @ v) / 2


def solved(v: cp.Expression, hessian: Tensor, constraints: list) -> Tensor:
    accuracy = {"tol_gap_abs": 1e-10, "tol_gap_rel": 1e-10, "tol_feas": 1e-10}
    cp.Problem(cp.Minimize(quadratic(hessian, v)), constraints).solve(
        solver=cp.CLARABEL, **accuracy
    )
    return torch.from_numpy(np.asarray(v.value, dtype=np.float64).ravel())


def assert_minimiser(norm, g: Tensor, v: cp.Expression, constraints: list) -> None:
    """As good as the solver's point, and the same point, as H is positive definite."""
    hessian = curvature(g.shape[-1])
    got = minimise(norm.face(g), lambda v: v @ hessian, g.shape[-1])
    expected = solved(v, hessian, constraints)
    assert dot(got @ hessian, got) <= dot(expected @ hessian, expected) * (1 + 1e-9)
    torch.testing.assert_close(got, expected, rtol=0, atol=2e-5)

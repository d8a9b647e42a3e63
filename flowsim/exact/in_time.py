r"""Steepest flows that are known at times t, in quadratic norms; and constants of motion."""

import numpy as np
from jaxtyping import Float
from numpy import ndarray as Array
from numpy.typing import ArrayLike
from scipy.integrate import solve_ivp
from scipy.linalg import expm
from scipy.optimize import minimize


def smooth_quadratic(
    matrix: ArrayLike,
    minimiser: ArrayLike,
    w0: ArrayLike,
    t: ArrayLike,
    metric: ArrayLike | None = None,
) -> Array:
    """½(w − w*)ᵀH(w − w*) in the norm √(vᵀAv): w = w* + e^{−A⁻¹Ht}(w0 − w*), with a last axis for
    the weights.

    A is the ``metric``, the identity (ℓ2) where not given. Linear regression has H = XᵀX.
    """
    rate = np.asarray(matrix, dtype=float)
    minimiser = np.asarray(minimiser, dtype=float)
    if metric is not None:
        A = np.asarray(metric, dtype=float)
        rate = np.linalg.solve(A, rate)
    away = np.asarray(w0, dtype=float) - minimiser
    path = []
    for time in np.ravel(t):
        decay = expm(-rate * time)
        path.append(minimiser + decay @ away)
    return np.reshape(path, (*np.shape(t), -1))


def difference_of_squares(
    x: Float[Array, "N d"], y: Float[Array, " N"], alpha: float, t: ArrayLike
) -> Float[Array, "*T 2d"]:
    """½‖X(u² − v²) − y‖₂² in ℓ2 from u = v = α (Woodworth et al. 2020): u = α e^{2Xᵀν}, v = α
    e^{−2Xᵀν}, ν' = y − Xβ.

    β = u² − v² = 2α² sinh(4Xᵀν). Of the N numbers ν an ordinary differential equation is left,
    solved here to 10⁻¹²."""
    x = np.asarray(x, dtype=float)
    y = np.asarray(y, dtype=float)
    times = np.ravel(t)
    order = np.argsort(times)
    span = (0.0, float(times.max()))

    def residual(_: float, nu: Array) -> Array:
        beta = 2 * alpha**2 * np.sinh(4 * x.T @ nu)
        return y - x @ beta

    zero = np.zeros(len(y))
    tight = {"rtol": 1e-12, "atol": 1e-14}
    solved = solve_ivp(residual, span, zero, "DOP853", times[order], **tight)
    growth = np.exp(2 * x.T @ solved.y).T
    growth = growth[np.argsort(order)]
    both = np.concatenate([growth, 1 / growth], -1)
    return alpha * both.reshape(*np.shape(t), -1)


def difference_of_squares_limit(
    x: Float[Array, "N d"], y: Float[Array, " N"], alpha: float
) -> Float[Array, " d"]:
    """β = u² − v² at t = ∞: the interpolator that minimises Σ q(β_i/α²), q(z) = 2 − √(4 + z²) +
    z·asinh(z/2).

    By its dual, max ⟨ν, y⟩ − Σ 2α² cosh(Xᵀν), with β = 2α² sinh(Xᵀν) (Woodworth et al. 2020,
    Theorem 1)."""
    x = np.asarray(x, dtype=float)
    y = np.asarray(y, dtype=float)
    size = 2 * alpha**2

    def dual(nu: Array) -> float:
        cosh = np.cosh(x.T @ nu)
        return size * cosh.sum() - nu @ y

    def slope(nu: Array) -> Array:
        sinh = np.sinh(x.T @ nu)
        return size * x @ sinh - y

    def curvature(nu: Array) -> Array:
        cosh = np.cosh(x.T @ nu)
        return size * (x * cosh) @ x.T

    best = minimize(
        dual,
        np.zeros(len(y)),
        jac=slope,
        hess=curvature,
        method="trust-exact",
        options={"gtol": 1e-12},
    )
    return size * np.sinh(x.T @ best.x)


def conserved(
    weights: Float[Array, "*batch P"], depth: int, q: float = 2
) -> Float[Array, "*batch depth-1 d"]:
    """|w_{l+1}|^q − |w_l|^q, entry by entry, constant along flows of `Diagonal` nets in ℓp with 1/p
    + 1/q = 1.

    ``q`` = 1 is ℓ∞. For q < 2 this holds as long as no gradient changes its sign.
    """
    batch = np.shape(weights)[:-1]
    factors = weights.reshape(*batch, depth, -1)
    powers = np.abs(factors) ** q
    return np.diff(powers, axis=-2)

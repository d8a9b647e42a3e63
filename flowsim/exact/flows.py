r"""Steepest flows that are known exactly, to hold integrated ones against.

Rays and polylines are whole trajectories: ``weights(s)`` at an arclength, ``log_time(s)`` when they
are there, and ``length(log_t)`` the inverse of that. Time is held as its natural logarithm, as
everywhere in flowsim.

    one_example              one example, linear model, any norm                      a ray
    radial                   any net, from a KKT direction in which all margins agree a ray
    round_quadratic          ½‖w − w*‖₂² in ℓ1, ℓ2, ℓ∞, spectral, Frobenius, nuclear  a polyline
    polyhedral_quadratic     ½(w − w*)ᵀH(w − w*) in ℓ1 and ℓ∞                         a polyline
    forward_stagewise        ½‖Xw − y‖₂² in ℓ1                                        a polyline
    smooth_quadratic         ½(w − w*)ᵀH(w − w*) in quadratic norms                   w at times t
    difference_of_squares    ½‖X(u² − v²) − y‖₂² in ℓ2                                u, v at times t
    conserved                diagonal nets in ℓp                                      constants of motion
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from numpy import ndarray as Array
from numpy.typing import ArrayLike
from scipy.integrate import quad, solve_ivp
from scipy.linalg import expm
from scipy.optimize import brentq, lsq_linear, minimize, nnls
from scipy.special import expi

from flowsim.norms.matrix import Nuclear, Schatten, Spectral
from flowsim.norms.norm import Norm
from flowsim.norms.vector import L1, L2, Linf

# --------------------------------------------------------------------------------------------------
# Rays, for the exponential loss
# --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Ray:
    """w(s) = w0 + s·u, along which all margins are q(s) = (q0^{1/L} + γ^{1/L} s)^L.

    With m ``examples`` of equal margin, ‖∇Λ‖_* = dq/ds and dt = e^q ds/(m dq/ds) give

        log t = log ∫ q^{2/L − 2} e^q dq − log(m L² γ^{2/L})   from q0 to q.
    """

    w0: Float[Array, " P"]
    direction: Float[Array, " P"]
    q0: float
    gamma: float
    degree: float = 1
    examples: int = 1

    def weights(self, s: ArrayLike) -> Array:
        """w at arclengths s, with a last axis for the weights."""
        return self.w0 + np.multiply.outer(np.asarray(s, dtype=float), self.direction)

    def margin(self, s: ArrayLike) -> Array:
        """q(s), the margin of every example; Λ = q − log m."""
        s = np.asarray(s, dtype=float)
        if self.degree == 1:
            return self.q0 + self.gamma * s
        return (self.q0 ** (1 / self.degree) + self.gamma ** (1 / self.degree) * s) ** self.degree

    def log_time(self, s: ArrayLike) -> Array:
        """log t at arclengths s."""
        return np.vectorize(self._log_time_of, otypes=[float])(self.margin(s))

    def length(self, log_t: ArrayLike) -> Array:
        """The arclength at log t."""
        if self.degree == 1:
            q = np.logaddexp(self.q0, np.asarray(log_t) + self._log_rate)
            return (q - self.q0) / self.gamma
        return np.vectorize(self._length_at, otypes=[float])(log_t)

    @property
    def _log_rate(self) -> float:
        return math.log(self.examples * self.degree**2) + 2 / self.degree * math.log(self.gamma)

    def _log_time_of(self, q: float) -> float:
        return log_growth(self.q0, q, self.degree) - self._log_rate

    def _length_at(self, log_t: float) -> float:
        low, high = self.q0, self.q0 + 1
        while self._log_time_of(high) < log_t:
            high = self.q0 + 2 * (high - self.q0)
        q = brentq(
            lambda q: self._log_time_of(q) - log_t, low + 1e-300, high, xtol=1e-14, rtol=1e-14
        )
        return float(
            (q ** (1 / self.degree) - self.q0 ** (1 / self.degree))
            / self.gamma ** (1 / self.degree)
        )


def log_growth(q0: float, q: float, degree: float) -> float:
    """log ∫ x^{2/L − 2} e^x dx from q0 to q: e^q − e^{q0} for L = 1, Ei(q) − Ei(q0) for L = 2, else
    by quadrature."""
    if q <= q0:
        return -math.inf
    if degree == 1:
        return q + math.log(-math.expm1(q0 - q))
    if degree == 2 and q < 700:
        return math.log(expi(q) - expi(q0))
    first = max(q0, q - 60)  # what lies below is e^{−60} of the whole
    return q + math.log(
        quad(lambda x: math.exp(x - q) * x ** (2 / degree - 2), first, q, epsabs=0, limit=200)[0]
    )


def one_example(z: ArrayLike, w0: ArrayLike, norm: Norm) -> Ray:
    """One example z = y·x and a linear model: q = log(e^{q0} + ‖z‖_*² t), straight along a steepest
    direction of z.

    Where z has several, this is one of them, and the margin is the same in all.
    """
    z, w0 = np.asarray(z, dtype=float), np.asarray(w0, dtype=float)
    direction = norm.steepest(torch.from_numpy(z)).numpy()
    return Ray(w0, direction, float(z @ w0), float(norm.dual(torch.from_numpy(z))))


def radial(w0: ArrayLike, norm: Norm, q0: float, degree: float, examples: int = 1) -> Ray:
    """A net of degree L from a KKT direction w0 where all margins are q0 > 0: w keeps its
    direction.

    For f = uv and u = v, Ei(q) = Ei(q0) + ct with c = 2 in ℓ2, 4 in ℓ∞ and 1 in ℓ1. That w0 is such
    a direction is the caller's word: w0/‖w0‖ has to be steepest for a mean of the gradients of its
    margins."""
    w0 = np.asarray(w0, dtype=float)
    size = float(norm.value(torch.from_numpy(w0)))
    return Ray(w0, w0 / size, q0, q0 / size**degree, degree, examples)


# --------------------------------------------------------------------------------------------------
# Polylines: quadratics F, whose level is −F
# --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Polyline:
    """A path of straight pieces, on which ‖∇F‖_* falls linearly in arclength and exponentially in
    time.

    The path turns at ``corners`` (K, P), at the arclengths ``lengths`` (K,), where ‖∇F‖_* is
    ``duals`` (K,). The last corner is the minimiser, reached after a finite length and an infinite
    time."""

    corners: Float[Array, "K P"]
    lengths: Float[Array, " K"]
    duals: Float[Array, " K"]

    def weights(self, s: ArrayLike) -> Array:
        """w at arclengths s, with a last axis for the weights; the end beyond it."""
        s = np.clip(s, 0, self.lengths[-1])
        k = self._piece(s)
        part = (s - self.lengths[k]) / np.diff(self.lengths)[k]
        return self.corners[k] + part[..., None] * np.diff(self.corners, axis=0)[k]

    def dual(self, s: ArrayLike) -> Array:
        """‖∇F‖_* at arclengths s."""
        return np.interp(np.asarray(s, dtype=float), self.lengths, self.duals)

    def log_time(self, s: ArrayLike) -> Array:
        """log t at arclengths s; infinite at the end."""
        s = np.clip(s, 0, self.lengths[-1])
        k = self._piece(s)
        with np.errstate(divide="ignore"):
            return np.log(self._times[k] + np.log(self.duals[k] / self.dual(s)) / self._rates[k])

    def length(self, log_t: ArrayLike) -> Array:
        """The arclength at log t."""
        t = np.exp(log_t)
        k = np.searchsorted(self._times, t, side="right") - 1
        return self.lengths[k] - self.duals[k] / self._rates[k] * np.expm1(
            -self._rates[k] * (t - self._times[k])
        )

    def _piece(self, s: Array) -> Array:
        return np.clip(np.searchsorted(self.lengths, s, side="right") - 1, 0, len(self.lengths) - 2)

    @property
    def _rates(self) -> Float[Array, " K"]:
        """κ = −d‖∇F‖_*/ds = uᵀHu on each piece."""
        return -np.diff(self.duals) / np.diff(self.lengths)

    @property
    def _times(self) -> Float[Array, " K"]:
        """t at the beginning of each piece."""
        return np.append(
            0.0, np.cumsum(np.log(self.duals[:-2] / self.duals[1:-1]) / self._rates[:-1])
        )


def round_quadratic(minimiser: ArrayLike, w0: ArrayLike, norm: Norm) -> Polyline:
    """½‖w − w*‖₂²: w(s) is the point nearest to w* in the ball of radius s around w0.

    Its residual w* − w(s) is the proximal map of s‖·‖_* at w* − w0: soft thresholding in ℓ∞,
    clipping in ℓ1, and the same of the singular values in spectral and nuclear norms. Raises
    ValueError for other norms."""
    minimiser = np.asarray(minimiser, dtype=float)
    r = minimiser - np.asarray(w0, dtype=float)
    if isinstance(norm, Spectral | Nuclear | Schatten):
        assert norm.shape is not None, "bound"
        left, values, right = np.linalg.svd(r.reshape(norm.shape), full_matrices=False)
        lengths, kept, duals = _shrinking(values, norm.inner)
        residuals = np.stack([((left * row) @ right).ravel() for row in kept])
    else:
        lengths, kept, duals = _shrinking(np.abs(r), norm)
        residuals = np.sign(r) * kept
    return Polyline(minimiser - residuals, lengths, duals)


def _shrinking(sizes: Float[Array, " n"], norm: Norm) -> tuple[Array, Array, Array]:
    """Arclengths, residuals and their dual norms at the corners of the proximal path from ``sizes``
    ≥ 0 to 0."""
    if isinstance(norm, L2):
        whole = np.linalg.norm(sizes)
        return np.array([0.0, whole]), np.stack([sizes, 0 * sizes]), np.array([whole, 0.0])
    levels = np.unique(np.append(sizes, 0.0))
    if isinstance(norm, Linf):
        residuals = np.maximum(sizes - levels[:, None], 0)
        return levels, residuals, residuals.sum(1)
    if isinstance(norm, L1):
        tops = levels[::-1, None]
        return np.maximum(sizes - tops, 0).sum(1), np.minimum(sizes, tops), levels[::-1]
    raise ValueError(
        f"got the norm {norm.name!r}, expected ℓ1, ℓ2, ℓ∞, spectral, nuclear or Frobenius"
    )


def polyhedral_quadratic(
    matrix: ArrayLike, minimiser: ArrayLike, w0: ArrayLike, norm: Norm
) -> Polyline:
    """½(w − w*)ᵀH(w − w*) in ℓ1 and ℓ∞, for small positive definite H.

    On each piece the direction solves the face QP min ½uᵀHu, and so is constant until a coordinate
    of the gradient joins the tie: one that reaches the largest in ℓ1, one that reaches zero in ℓ∞.
    """
    values, basis = np.linalg.eigh(np.asarray(matrix, dtype=float))
    root = np.sqrt(np.maximum(values, 0))[:, None] * basis.T
    return _pieces(root, np.asarray(minimiser, dtype=float), np.asarray(w0, dtype=float), norm)


def forward_stagewise(x: Float[Array, "N d"], y: Float[Array, " N"]) -> Polyline:
    """½‖Xw − y‖₂² in ℓ1 from 0: infinitesimal forward stagewise regression (Efron et al. 2004;
    Hastie et al. 2007).

    The direction is a convex combination of the signed columns of largest correlation, the one
    whose fit is nearest to the origin. Equals the lasso's path while that is monotone."""
    x, y = np.asarray(x, dtype=float), np.asarray(y, dtype=float)
    return _pieces(x, np.linalg.lstsq(x, y)[0], np.zeros(x.shape[1]), L1())


def _pieces(root: Float[Array, "R P"], minimiser: Array, w: Array, norm: Norm) -> Polyline:
    """The path of ½‖C(w − w*)‖₂² from w, corner by corner."""
    if not isinstance(norm, L1 | Linf):
        raise ValueError(f"got the norm {norm.name!r}, expected ℓ1 or ℓ∞, try smooth_quadratic")
    direction = _l1_direction if isinstance(norm, L1) else _linf_direction
    g = root.T @ (root @ (minimiser - w))
    first = dual = float(norm.dual(torch.from_numpy(g)))
    path, tie = [(w, 0.0, first)], 1e-10 * first
    while dual > tie:
        u = direction(root, g, tie)
        slope = root.T @ (root @ u)
        kappa = float(u @ slope)
        whole = dual / kappa
        step = min(whole, _first_to_join(g, slope, dual, kappa, norm, tie))
        w, g, dual = w + step * u, g - step * slope, max(dual - kappa * step, 0.0)
        path.append((w, path[-1][1] + step, dual))
    corners, lengths, duals = zip(*path, strict=True)
    return Polyline(np.stack(corners), np.array(lengths), np.array([*duals[:-1], 0.0]))


def _first_to_join(
    g: Array, slope: Array, dual: float, kappa: float, norm: Norm, tie: float
) -> float:
    """The arclength until another coordinate of g − s·slope ties."""
    if isinstance(norm, L1):  # dual − κs = ±(g − s·slope)
        ahead, faster = dual - np.r_[g, -g], kappa - np.r_[slope, -slope]
    else:  # g = s·slope
        ahead, faster = np.abs(g), np.sign(g) * slope
    joins = (ahead > tie) & (faster > 1e-12 * np.abs(slope).max())
    return float((ahead[joins] / faster[joins]).min(initial=math.inf))


def _l1_direction(root: Array, g: Array, tie: float) -> Array:
    """min ‖Cu‖ over convex combinations of the signed coordinates of largest gradient."""
    tied = np.flatnonzero(np.abs(g) >= np.abs(g).max() - tie)
    columns = root[:, tied] * np.sign(g[tied])
    scale = np.abs(columns).max()
    share = nnls(
        np.vstack([columns / scale, np.ones(len(tied))]), np.append(np.zeros(len(root)), 1.0)
    )[0]
    u = np.zeros_like(g)
    u[tied] = np.sign(g[tied]) * share / share.sum()
    return u


def _linf_direction(root: Array, g: Array, tie: float) -> Array:
    """min ‖Cu‖ over sign(g), with −1 ≤ u ≤ 1 where g is zero."""
    free = np.abs(g) <= tie
    u = np.where(free, 0.0, np.sign(g))
    if free.any():
        u[free] = lsq_linear(root[:, free], -root @ u, (-1, 1), method="bvls", tol=1e-15).x
    return u


# --------------------------------------------------------------------------------------------------
# In time
# --------------------------------------------------------------------------------------------------


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
    H, minimiser = np.asarray(matrix, dtype=float), np.asarray(minimiser, dtype=float)
    rate = H if metric is None else np.linalg.solve(np.asarray(metric, dtype=float), H)
    away = np.asarray(w0, dtype=float) - minimiser
    return np.stack([minimiser + expm(-rate * time) @ away for time in np.ravel(t)]).reshape(
        *np.shape(t), -1
    )


def difference_of_squares(
    x: Float[Array, "N d"], y: Float[Array, " N"], alpha: float, t: ArrayLike
) -> Float[Array, "*T 2d"]:
    """½‖X(u² − v²) − y‖₂² in ℓ2 from u = v = α (Woodworth et al. 2020): u = α e^{2Xᵀν}, v = α
    e^{−2Xᵀν}, ν' = y − Xβ.

    β = u² − v² = 2α² sinh(4Xᵀν). Of the N numbers ν an ordinary differential equation is left,
    solved here to 10⁻¹²."""
    x, y, times = np.asarray(x, dtype=float), np.asarray(y, dtype=float), np.ravel(t)
    order, span = np.argsort(times), (0.0, float(times.max()))

    def residual(_: float, nu: Array) -> Array:
        return y - x @ (2 * alpha**2 * np.sinh(4 * x.T @ nu))

    nu = solve_ivp(
        residual, span, np.zeros(len(y)), "DOP853", times[order], rtol=1e-12, atol=1e-14
    ).y
    growth = np.exp(2 * x.T @ nu).T[np.argsort(order)]
    return alpha * np.concatenate([growth, 1 / growth], -1).reshape(*np.shape(t), -1)


def difference_of_squares_limit(
    x: Float[Array, "N d"], y: Float[Array, " N"], alpha: float
) -> Float[Array, " d"]:
    """β = u² − v² at t = ∞: the interpolator that minimises Σ q(β_i/α²), q(z) = 2 − √(4 + z²) +
    z·asinh(z/2).

    By its dual, max ⟨ν, y⟩ − Σ 2α² cosh(Xᵀν), with β = 2α² sinh(Xᵀν) (Woodworth et al. 2020,
    Theorem 1)."""
    x, y = np.asarray(x, dtype=float), np.asarray(y, dtype=float)
    dual = minimize(
        lambda nu: 2 * alpha**2 * np.cosh(x.T @ nu).sum() - nu @ y,
        np.zeros(len(y)),
        jac=lambda nu: 2 * alpha**2 * x @ np.sinh(x.T @ nu) - y,
        hess=lambda nu: 2 * alpha**2 * (x * np.cosh(x.T @ nu)) @ x.T,
        method="trust-exact",
        options={"gtol": 1e-12},
    )
    return 2 * alpha**2 * np.sinh(x.T @ dual.x)


def conserved(
    weights: Float[Array, "*batch P"], depth: int, q: float = 2
) -> Float[Array, "*batch depth-1 d"]:
    """|w_{l+1}|^q − |w_l|^q, entry by entry, constant along flows of `Diagonal` nets in ℓp with 1/p
    + 1/q = 1.

    ``q`` = 1 is ℓ∞. For q < 2 this holds as long as no gradient changes its sign.
    """
    powers = np.abs(weights.reshape(*np.shape(weights)[:-1], depth, -1)) ** q
    return np.diff(powers, axis=-2)

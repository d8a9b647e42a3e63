r"""Steepest flows along polylines: quadratics F, whose level is −F, in norms with ties."""

import math
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from numpy import ndarray as Array
from numpy.typing import ArrayLike
from scipy.optimize import lsq_linear, nnls

from flowsim.convex.games import dual_of
from flowsim.norms.matrix import Nuclear, Schatten, Spectral
from flowsim.norms.norm import Norm
from flowsim.norms.vector import L1, L2, Linf


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
        length = np.diff(self.lengths)[k]
        part = (s - self.lengths[k]) / length
        way = np.diff(self.corners, axis=0)[k]
        return self.corners[k] + part[..., None] * way

    def dual(self, s: ArrayLike) -> Array:
        """‖∇F‖_* at arclengths s."""
        s = np.asarray(s, dtype=float)
        return np.interp(s, self.lengths, self.duals)

    def log_time(self, s: ArrayLike) -> Array:
        """log t at arclengths s; infinite at the end."""
        s = np.clip(s, 0, self.lengths[-1])
        k = self._piece(s)
        with np.errstate(divide="ignore"):
            fall = np.log(self.duals[k] / self.dual(s))
            t = self._times[k] + fall / self._rates[k]
            return np.log(t)

    def length(self, log_t: ArrayLike) -> Array:
        """The arclength at log t."""
        t = np.exp(log_t)
        k = np.searchsorted(self._times, t, side="right") - 1
        rate = self._rates[k]
        since = t - self._times[k]
        fallen = -np.expm1(-rate * since)
        return self.lengths[k] + self.duals[k] / rate * fallen

    def _piece(self, s: Array) -> Array:
        last = len(self.lengths) - 2
        k = np.searchsorted(self.lengths, s, side="right") - 1
        return np.clip(k, 0, last)

    @property
    def _rates(self) -> Float[Array, " K"]:
        """κ = −d‖∇F‖_*/ds = uᵀHu on each piece."""
        falls = -np.diff(self.duals)
        return falls / np.diff(self.lengths)

    @property
    def _times(self) -> Float[Array, " K"]:
        """t at the beginning of each piece."""
        falls = np.log(self.duals[:-2] / self.duals[1:-1])
        spent = falls / self._rates[:-1]
        return np.append(0.0, np.cumsum(spent))


def round_quadratic(minimiser: ArrayLike, w0: ArrayLike, norm: Norm) -> Polyline:
    """½‖w − w*‖₂²: w(s) is the point nearest to w* in the ball of radius s around w0.

    Its residual w* − w(s) is the proximal map of s‖·‖_* at w* − w0: soft thresholding in ℓ∞,
    clipping in ℓ1, and the same of the singular values in spectral and nuclear norms. Raises
    ValueError for other norms."""
    minimiser = np.asarray(minimiser, dtype=float)
    r = minimiser - np.asarray(w0, dtype=float)
    if isinstance(norm, Spectral | Nuclear | Schatten):
        matrix = norm.as_matrix(torch.from_numpy(r)).numpy()
        left, values, right = np.linalg.svd(matrix, full_matrices=False)
        lengths, kept, duals = _shrinking(values, norm.inner)
        matrices = [(left * row) @ right for row in kept]
        residuals = np.stack(matrices).reshape(len(kept), -1)
    else:
        lengths, kept, duals = _shrinking(np.abs(r), norm)
        residuals = np.sign(r) * kept
    return Polyline(minimiser - residuals, lengths, duals)


def _shrinking(sizes: Float[Array, " n"], norm: Norm) -> tuple[Array, Array, Array]:
    """Arclengths, residuals and their dual norms at the corners of the proximal path from ``sizes``
    ≥ 0 to 0."""
    if isinstance(norm, L2):
        lengths = np.array([0.0, np.linalg.norm(sizes)])
        residuals = np.stack([sizes, 0 * sizes])
        return lengths, residuals, lengths[::-1]
    levels = np.unique(np.append(sizes, 0.0))
    if isinstance(norm, Linf):
        residuals = np.maximum(sizes - levels[:, None], 0)
        return levels, residuals, residuals.sum(1)
    if isinstance(norm, L1):
        duals = levels[::-1]
        residuals = np.minimum(sizes, duals[:, None])
        moved = np.maximum(sizes - duals[:, None], 0)
        return moved.sum(1), residuals, duals
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
    H = np.asarray(matrix, dtype=float)
    values, basis = np.linalg.eigh(H)
    roots = np.sqrt(np.maximum(values, 0))
    C = roots[:, None] * basis.T
    minimiser = np.asarray(minimiser, dtype=float)
    w0 = np.asarray(w0, dtype=float)
    return _pieces(C, minimiser, w0, norm)


def forward_stagewise(x: Float[Array, "N d"], y: Float[Array, " N"]) -> Polyline:
    """½‖Xw − y‖₂² in ℓ1 from 0: infinitesimal forward stagewise regression (Efron et al. 2004;
    Hastie et al. 2007).

    The direction is a convex combination of the signed columns of largest correlation, the one
    whose fit is nearest to the origin. Equals the lasso's path while that is monotone."""
    x = np.asarray(x, dtype=float)
    y = np.asarray(y, dtype=float)
    minimiser = np.linalg.lstsq(x, y)[0]
    zero = np.zeros(len(minimiser))
    return _pieces(x, minimiser, zero, L1())


def _pieces(C: Float[Array, "R P"], minimiser: Array, w: Array, norm: Norm) -> Polyline:
    """The path of ½‖C(w − w*)‖₂² from w, corner by corner."""
    if not isinstance(norm, L1 | Linf):
        raise ValueError(f"got the norm {norm.name!r}, expected ℓ1 or ℓ∞, try smooth_quadratic")
    direction = _l1_direction if isinstance(norm, L1) else _linf_direction
    g = C.T @ (C @ (minimiser - w))
    dual = dual_of(norm, g)
    tie = 1e-10 * dual
    corners = [w]
    lengths = [0.0]
    duals = [dual]
    while dual > tie:
        u = direction(C, g, tie)
        slope = C.T @ (C @ u)
        kappa = float(u @ slope)
        joins = _first_to_join(g, slope, dual, kappa, norm, tie)
        step = min(dual / kappa, joins)
        w = w + step * u
        g = g - step * slope
        dual = max(dual - kappa * step, 0.0)
        corners.append(w)
        lengths.append(lengths[-1] + step)
        duals.append(dual)
    duals[-1] = 0.0
    return Polyline(np.stack(corners), np.array(lengths), np.array(duals))


def _first_to_join(
    g: Array,
    slope: Array,
    dual: float,
    kappa: float,
    norm: Norm,
    tie: float,
) -> float:
    """The arclength until another coordinate of g − s·slope ties."""
    if isinstance(norm, L1):  # dual − κs = ±(g − s·slope)
        ahead = dual - np.r_[g, -g]
        faster = kappa - np.r_[slope, -slope]
    else:  # g = s·slope
        ahead = np.abs(g)
        faster = np.sign(g) * slope
    rounding = 1e-12 * np.abs(slope).max()
    joins = (ahead > tie) & (faster > rounding)
    lengths = ahead[joins] / faster[joins]
    return float(lengths.min(initial=math.inf))


def _l1_direction(C: Array, g: Array, tie: float) -> Array:
    """min ‖Cu‖ over convex combinations of the signed coordinates of largest gradient."""
    size = np.abs(g)
    tied = np.flatnonzero(size >= size.max() - tie)
    sign = np.sign(g[tied])
    columns = C[:, tied] * sign
    scale = np.abs(columns).max()
    system = np.vstack([columns / scale, np.ones(len(tied))])
    goal = np.append(np.zeros(len(C)), 1.0)
    fraction, _ = nnls(system, goal)
    u = np.zeros_like(g)
    u[tied] = sign * fraction / fraction.sum()
    return u


def _linf_direction(C: Array, g: Array, tie: float) -> Array:
    """min ‖Cu‖ over sign(g), with −1 ≤ u ≤ 1 where g is zero."""
    free = np.abs(g) <= tie
    u = np.where(free, 0.0, np.sign(g))
    if free.any():
        goal = -C @ u
        solved = lsq_linear(C[:, free], goal, (-1, 1), method="bvls", tol=1e-15)
        u[free] = solved.x
    return u

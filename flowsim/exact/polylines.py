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
        fallen = -np.expm1(-self._rates[k] * (t - self._times[k]))
        return self.lengths[k] + self.duals[k] / self._rates[k] * fallen

    def _piece(self, s: Array) -> Array:
        return np.clip(np.searchsorted(self.lengths, s, side="right") - 1, 0, len(self.lengths) - 2)

    @property
    def _rates(self) -> Float[Array, " K"]:
        """κ = −d‖∇F‖_*/ds = uᵀHu on each piece."""
        return -np.diff(self.duals) / np.diff(self.lengths)

    @property
    def _times(self) -> Float[Array, " K"]:
        """t at the beginning of each piece."""
        spent = np.log(self.duals[:-2] / self.duals[1:-1]) / self._rates[:-1]
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
    x = np.asarray(x, dtype=float)
    y = np.asarray(y, dtype=float)
    return _pieces(x, np.linalg.lstsq(x, y)[0], np.zeros(x.shape[1]), L1())


def _pieces(root: Float[Array, "R P"], minimiser: Array, w: Array, norm: Norm) -> Polyline:
    """The path of ½‖C(w − w*)‖₂² from w, corner by corner."""
    if not isinstance(norm, L1 | Linf):
        raise ValueError(f"got the norm {norm.name!r}, expected ℓ1 or ℓ∞, try smooth_quadratic")
    direction = _l1_direction if isinstance(norm, L1) else _linf_direction
    g = root.T @ (root @ (minimiser - w))
    dual = dual_of(norm, g)
    path = [(w, 0.0, dual)]
    tie = 1e-10 * dual
    while dual > tie:
        u = direction(root, g, tie)
        slope = root.T @ (root @ u)
        kappa = float(u @ slope)
        step = min(dual / kappa, _first_to_join(g, slope, dual, kappa, norm, tie))
        w = w + step * u
        g = g - step * slope
        dual = max(dual - kappa * step, 0.0)
        path.append((w, path[-1][1] + step, dual))
    corners, lengths, duals = zip(*path, strict=True)
    return Polyline(np.stack(corners), np.array(lengths), np.array([*duals[:-1], 0.0]))


def _first_to_join(
    g: Array, slope: Array, dual: float, kappa: float, norm: Norm, tie: float
) -> float:
    """The arclength until another coordinate of g − s·slope ties."""
    if isinstance(norm, L1):  # dual − κs = ±(g − s·slope)
        ahead = dual - np.r_[g, -g]
        faster = kappa - np.r_[slope, -slope]
    else:  # g = s·slope
        ahead = np.abs(g)
        faster = np.sign(g) * slope
    joins = (ahead > tie) & (faster > 1e-12 * np.abs(slope).max())
    return float((ahead[joins] / faster[joins]).min(initial=math.inf))


def _l1_direction(root: Array, g: Array, tie: float) -> Array:
    """min ‖Cu‖ over convex combinations of the signed coordinates of largest gradient."""
    tied = np.flatnonzero(np.abs(g) >= np.abs(g).max() - tie)
    columns = root[:, tied] * np.sign(g[tied])
    scale = np.abs(columns).max()
    system = np.vstack([columns / scale, np.ones(len(tied))])
    fraction = nnls(system, np.append(np.zeros(len(root)), 1.0))[0]
    u = np.zeros_like(g)
    u[tied] = np.sign(g[tied]) * fraction / fraction.sum()
    return u


def _linf_direction(root: Array, g: Array, tie: float) -> Array:
    """min ‖Cu‖ over sign(g), with −1 ≤ u ≤ 1 where g is zero."""
    free = np.abs(g) <= tie
    u = np.where(free, 0.0, np.sign(g))
    if free.any():
        u[free] = lsq_linear(root[:, free], -root @ u, (-1, 1), method="bvls", tol=1e-15).x
    return u

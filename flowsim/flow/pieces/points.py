"""Where a flow of exact pieces is: the objective at a place, the face it moves in, and the face
that follows."""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from numpy import ndarray as Array
from scipy.linalg import cho_factor, cho_solve, svd
from torch import Tensor

from flowsim.convex.simplices import positive_at_minimum
from flowsim.flow.field import Field, Sample
from flowsim.flow.pieces.polytope import Corners, PerCorner, PerWeight, Polyhedral
from flowsim.problems.objective import Objective

EPS = float(np.finfo(np.float64).eps)
TINY = 1e-300  # in the place of a dual norm that has vanished

_Along = Float[Array, " k"]  # coordinates y along a face


# --------------------------------------------------------------------------------------------------
# The objective
# --------------------------------------------------------------------------------------------------


class View:
    """The objective of one trajectory in NumPy, and its ball, with gradient evaluations counted."""

    def __init__(self, field: Field, objective: Objective, device: torch.device) -> None:
        self.field, self.objective, self.device = field, objective, device
        self.ball = Polyhedral.of(field.norm, objective.size)
        self.gradients = 0

    def tensor(self, a: Array | float) -> Tensor:
        """A row of one trajectory."""
        dtype = None if isinstance(a, Array) else torch.float64
        return torch.as_tensor(a, dtype=dtype).to(self.device)[None]


class Evaluation:
    """The objective at w: the level and its gradient h, and the curvature when asked for."""

    def __init__(self, view: View, w: PerWeight) -> None:
        view.gradients += 1
        level, h = view.objective.ascent(view.tensor(w))
        self.view, self.w = view, w
        self.lam, self.h = float(level), as_numpy(h[0])
        self.dual_norm, self.length = view.ball.dual(self.h), view.ball.value(w)
        # rounding error of slopes, in units of ‖h‖_*
        self.noise = EPS * (64 + self.dual_norm * self.length)

    @cached_property
    def C(self) -> Float[Array, "R P"]:
        """CᵀC = −∇²level up to a multiple of hhᵀ, which changes nothing on a face."""
        return as_numpy(self.view.objective.curvature(self.view.tensor(self.w))[0])

    @property
    def unit(self) -> PerWeight:
        """h/‖h‖_*."""
        return self.h / max(self.dual_norm, TINY)


# --------------------------------------------------------------------------------------------------
# Points on a piece
# --------------------------------------------------------------------------------------------------


class Pseudoinverse:
    """(AᵀA)⁺ and A⁺ of a matrix A (R, k), whose columns are differences of numbers of the size
    ``scale (k,)``.

    By Cholesky where A is well conditioned. Else by singular values; what it cannot tell from
    rounding counts as singular, and there solutions have least length."""

    def __init__(self, A: Float[Array, "R k"], scale: _Along) -> None:
        self.dead = scale == 0  # what nothing feels stays at zero
        self.scale = np.where(self.dead, 1.0, scale)
        self.A = A / self.scale
        self.factor = _well_conditioned(self.A.T @ self.A + np.diag(self.dead))
        if self.factor is None:
            U, s, Vt = svd(self.A, full_matrices=False, lapack_driver="gesvd")
            kept = s > 1e-8
            self.U, self.s, self.Vt = U[:, kept], s[kept], Vt[kept]
            # unknowns from their well-determined combinations: the shortest that have these
            self.shortest = np.linalg.pinv(self.Vt * self.scale)

    def of_normal(self, r: _Along) -> _Along:
        """(AᵀA)⁺ r."""
        r = np.where(self.dead, 0.0, r / self.scale)
        if self.factor is None:
            return self.shortest @ ((self.Vt @ r) / self.s**2)
        return self._solve(r) / self.scale

    def times(self, b: Float[Array, " R"]) -> _Along:
        """A⁺ b."""
        if self.factor is None:
            return self.shortest @ ((self.U.T @ b) / self.s)
        y = self._solve(self.A.T @ b)
        # normal equations square the condition: refine
        y = y + self._solve(self.A.T @ (b - self.A @ y))
        return y / self.scale

    def _solve(self, r: _Along) -> _Along:
        return cho_solve(self.factor, r, check_finite=False)


def _well_conditioned(gram: Float[Array, "k k"]) -> tuple[Array, bool] | None:
    """The Cholesky factor of a matrix that has a good one."""
    try:
        factor = cho_factor(gram, lower=True, check_finite=False)
    except np.linalg.LinAlgError:
        return None
    return factor if (np.diag(factor[0]) > 1e-5).all() else None


@dataclass(frozen=True)
class OnPiece:
    """A place on a piece."""

    at: Evaluation
    face: Corners

    @cached_property
    def inverse(self) -> Pseudoinverse:
        """Of C E."""
        columns = self.at.C[:, self.face.free]
        size = np.sqrt((columns**2).sum(0))
        return Pseudoinverse(columns @ self.face.basis, self.face.sizes(size))

    @cached_property
    def u(self) -> PerWeight:
        """The velocity dw/ds: the minimiser of ‖C u‖ on the face's affine hull, the shortest of
        them."""
        y = self.inverse.times(self.at.C @ self.face.centre)
        return self.face.centre - self.face.expand(y)

    @cached_property
    def sample(self) -> Sample:
        """The field here."""
        view = self.at.view
        at = self.at
        w, h, u = (view.tensor(a) for a in (at.w, at.h, self.u))
        return view.field.sample(view.objective, w, view.tensor(at.lam), h, u)

    @cached_property
    def dh(self) -> PerWeight:
        """−CᵀC u, which is dh/ds up to a multiple of h."""
        return -self.at.C.T @ (self.at.C @ self.u)

    @cached_property
    def curvature(self) -> float:
        """‖C u‖²."""
        return max(-float(self.dh @ self.u), float(np.finfo(np.float64).tiny))

    @cached_property
    def slope(self) -> _Along:
        """Eᵀh, which is zero on the piece."""
        return self.face.restrict(self.at.h)

    @property
    def error(self) -> float:
        """What Newton's method has left of the slopes, in units of ‖h‖_*."""
        return float(np.abs(self.slope).max(initial=0.0)) / max(self.at.dual_norm, TINY)

    @cached_property
    def noise(self) -> float:
        """A bound on the error of slopes, in units of ‖h‖_*."""
        return 64 * max(self.at.noise, self.error)

    @cached_property
    def clearance(self) -> Float[Array, "3 P"]:
        """How far this is from the end of the piece, negative beyond it: `Corners.missing` and
        `Corners.shares`."""
        return np.vstack([self.face.missing(self.at.unit), self.face.shares(self.u)])

    @cached_property
    def closing(self) -> PerCorner:
        """How fast the corners' part of `clearance` falls."""
        turn = self.dh + self.curvature / self.at.dual_norm * self.at.h
        rate = self.face.missing(turn / self.at.dual_norm)
        return np.where(np.isfinite(rate), -rate, 0.0)


def newton(start: OnPiece, w: PerWeight) -> OnPiece | None:
    """The point of the piece of ``start`` in w + span E, where Eᵀh = 0; None where Newton's method
    fails.

    It begins with the inverse from there, and takes a new one where errors fall by less than a
    fifth."""
    inverse = start.inverse
    error = np.inf
    fresh = False
    near = False
    for _ in range(16):
        point = OnPiece(Evaluation(start.at.view, w), start.face)
        last = error
        error = point.error
        slow = error > 0.2 * last
        if error <= max(point.at.noise / 8, 64 * EPS):
            return point
        if near and slow and (fresh or error < 1e-12):
            return point
        if not np.isfinite(error + point.at.lam) or (fresh and error > last):
            return None
        if slow:
            inverse = point.inverse
            fresh = True
        move = start.face.expand(inverse.of_normal(point.slope))
        # about as near as rounding allows
        near = error < 1e-7 or np.abs(move).max() <= 64 * EPS * np.abs(w).max()
        w = w + move
    return None


# --------------------------------------------------------------------------------------------------
# The piece that follows
# --------------------------------------------------------------------------------------------------


def following(point: OnPiece, level: Float[Array, "3 P"] | float) -> OnPiece:
    """The same place on the piece that begins there, where clearances over their ``level`` are
    zero.

    The face is that of the face QP, min ‖C v‖² over the mixtures of all corners that tie: those
    that do so just now are tried first, with those that keep a share."""
    face = point.face
    noise = point.noise / 32
    share = face.mixture(point.u)
    new = (point.clearance - level)[:2] <= noise
    tied = new | (point.clearance[:2] <= 32 * noise) | face.used
    tried = new | (share > 4 * noise)
    used = _face_of_least_curvature(point, share.ravel(), tied.ravel(), tried.ravel())
    chosen = OnPiece(point.at, Corners.of(face.ball, used.reshape(2, -1)))
    while (chosen.clearance[2] < -noise).any():  # what the QP's smaller precision has left
        chosen = OnPiece(point.at, chosen.face.trimmed(chosen.u, noise))
    return chosen


def _face_of_least_curvature(
    point: OnPiece, share: Float[Array, " 2P"], tied: Array, tried: Array
) -> Bool[Array, " 2P"]:
    """The corners, of those that tie, with a share in the mixture of least ‖C v‖."""
    ball = point.face.ball
    group = np.tile(ball.group, 2)
    several = (np.bincount(group[tied], minlength=len(ball.starts)) > 1)[group]
    used = tried & ~several
    shared = np.flatnonzero(tied & several)
    H, c = _quadratic(point.at.C, np.concatenate([ball.scale, -ball.scale]), used, shared)
    numbered = np.unique(group[shared], return_inverse=True)[1]
    used[shared] = positive_at_minimum(H, c, numbered, share[shared], tried[shared])
    return used


def _quadratic(
    C: Float[Array, "R P"], corner: Float[Array, " 2P"], fixed: Array, index: Int[Array, " m"]
) -> tuple[Float[Array, "m m"], Float[Array, " m"]]:
    """½‖C v‖² in the shares of the corners ``index``, beside ``fixed`` ones with a share of 1: its
    Hessian, and its slope where all shares are zero."""
    P = len(corner) // 2
    weight, place = np.unique(index % P, return_inverse=True)
    columns = C[:, weight]
    sign = corner[index]
    gram = columns.T @ columns
    # of equal minimisers the shortest
    gram += 1e-12 * max(gram.max(initial=0.0), TINY) * np.eye(len(weight))
    H = gram[np.ix_(place, place)] * sign[:, None] * sign
    v = np.where(fixed, corner, 0).reshape(2, P).sum(0)
    return H, (columns.T @ C @ v)[place] * sign


def as_numpy(tensor: Tensor) -> Array:
    return tensor.detach().cpu().numpy()

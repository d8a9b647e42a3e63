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
        self.field = field
        self.objective = objective
        self.device = device
        self.ball = Polyhedral.of(field.norm, objective.size)
        self.gradients = 0

    def tensor(self, a: Array | float) -> Tensor:
        """A row of one trajectory."""
        dtype = None if isinstance(a, Array) else torch.float64
        row = torch.as_tensor(a, dtype=dtype)[None]
        return row.to(self.device)


class Evaluation:
    """The objective at w: the level and its gradient h, and the curvature when asked for."""

    def __init__(self, view: View, w: PerWeight) -> None:
        view.gradients += 1
        level, h = view.objective.ascent(view.tensor(w))
        self.view = view
        self.w = w
        self.lam = float(level)
        self.h = as_numpy(h[0])
        self.dual_norm = view.ball.dual(self.h)
        self.length = view.ball.value(w)
        # rounding error of slopes, in units of ‖h‖_*
        self.noise = EPS * (64 + self.dual_norm * self.length)

    @cached_property
    def C(self) -> Float[Array, "R P"]:
        """CᵀC = −∇²level up to a multiple of hhᵀ, which changes nothing on a face."""
        view = self.view
        C = view.objective.curvature(view.tensor(self.w))
        return as_numpy(C[0])

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
        gram = self.A.T @ self.A
        self.factor = _well_conditioned(gram + np.diag(self.dead))
        if self.factor is None:
            U, s, Vt = svd(self.A, full_matrices=False, lapack_driver="gesvd")
            kept = s > 1e-8
            self.U = U[:, kept]
            self.s = s[kept]
            self.Vt = Vt[kept]
            # unknowns from their well-determined combinations: the shortest that have these
            self.shortest = np.linalg.pinv(self.Vt * self.scale)

    def of_normal(self, r: _Along) -> _Along:
        """(AᵀA)⁺ r."""
        r = np.where(self.dead, 0.0, r / self.scale)
        if self.factor is None:
            combinations = self.Vt @ r / self.s**2
            return self.shortest @ combinations
        return self._solve(r) / self.scale

    def times(self, b: Float[Array, " R"]) -> _Along:
        """A⁺ b."""
        if self.factor is None:
            combinations = self.U.T @ b / self.s
            return self.shortest @ combinations
        y = self._solve(self.A.T @ b)
        # normal equations square the condition: refine
        residual = b - self.A @ y
        y = y + self._solve(self.A.T @ residual)
        return y / self.scale

    def _solve(self, r: _Along) -> _Along:
        return cho_solve(self.factor, r, check_finite=False)


def _well_conditioned(gram: Float[Array, "k k"]) -> tuple[Array, bool] | None:
    """The Cholesky factor of a matrix that has a good one."""
    try:
        factor = cho_factor(gram, lower=True, check_finite=False)
    except np.linalg.LinAlgError:
        return None
    pivots = np.diag(factor[0])
    good = (pivots > 1e-5).all()
    return factor if good else None


@dataclass(frozen=True)
class OnPiece:
    """A place on a piece."""

    at: Evaluation
    face: Corners

    @cached_property
    def inverse(self) -> Pseudoinverse:
        """Of C E."""
        face = self.face
        columns = self.at.C[:, face.free]
        size = np.sqrt((columns**2).sum(0))
        A = columns @ face.basis
        return Pseudoinverse(A, face.sizes(size))

    @cached_property
    def u(self) -> PerWeight:
        """The velocity dw/ds: the minimiser of ‖C u‖ on the face's affine hull, the shortest of
        them."""
        face = self.face
        y = self.inverse.times(self.at.C @ face.centre)
        return face.centre - face.expand(y)

    @cached_property
    def sample(self) -> Sample:
        """The field here."""
        at = self.at
        view = at.view
        w = view.tensor(at.w)
        lam = view.tensor(at.lam)
        h = view.tensor(at.h)
        u = view.tensor(self.u)
        return view.field.sample(view.objective, w, lam, h, u)

    @cached_property
    def dh(self) -> PerWeight:
        """−CᵀC u, which is dh/ds up to a multiple of h."""
        C = self.at.C
        return -C.T @ (C @ self.u)

    @cached_property
    def curvature(self) -> float:
        """‖C u‖²."""
        least = float(np.finfo(np.float64).tiny)
        return max(-float(self.dh @ self.u), least)

    @property
    def left(self) -> float:
        """About how much further on a flow ends that does end."""
        return self.at.dual_norm / self.curvature

    @cached_property
    def slope(self) -> _Along:
        """Eᵀh, which is zero on the piece."""
        return self.face.restrict(self.at.h)

    @property
    def error(self) -> float:
        """What Newton's method has left of the slopes, in units of ‖h‖_*."""
        largest = np.abs(self.slope).max(initial=0.0)
        return float(largest) / max(self.at.dual_norm, TINY)

    @cached_property
    def noise(self) -> float:
        """A bound on the error of slopes, in units of ‖h‖_*."""
        return 64 * max(self.at.noise, self.error)

    @cached_property
    def clearance(self) -> Float[Array, "3 P"]:
        """How far this is from the end of the piece, negative beyond it: `Corners.missing` and
        `Corners.shares`."""
        missing = self.face.missing(self.at.unit)
        shares = self.face.shares(self.u)
        return np.vstack([missing, shares])

    @cached_property
    def closing(self) -> PerCorner:
        """How fast the corners' part of `clearance` falls."""
        at = self.at
        turn = self.dh + self.curvature / at.dual_norm * at.h
        rate = self.face.missing(turn / at.dual_norm)
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
        at = Evaluation(start.at.view, w)
        point = OnPiece(at, start.face)
        last = error
        error = point.error
        slow = error > 0.2 * last
        if error <= max(point.at.noise / 8, 64 * EPS):
            return point
        if near and slow and (fresh or error < 1e-12):
            return point
        grows = fresh and error > last
        if grows or not np.isfinite(error + point.at.lam):
            return None
        if slow:
            inverse = point.inverse
            fresh = True
        move = start.face.expand(inverse.of_normal(point.slope))
        longest = np.abs(move).max()
        rounding = 64 * EPS * np.abs(w).max()
        near = error < 1e-7 or longest <= rounding
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
    over = point.clearance - level
    new = over[:2] <= noise
    near = point.clearance[:2] <= 32 * noise
    tied = new | near | face.used
    tried = new | (share > 4 * noise)
    used = _face_of_least_curvature(
        point,
        share=share.ravel(),
        tied=tied.ravel(),
        tried=tried.ravel(),
    )
    corners = Corners.of(face.ball, used.reshape(2, -1))
    chosen = OnPiece(point.at, corners)
    while (chosen.clearance[2] < -noise).any():  # what the QP's smaller precision has left
        corners = corners.trimmed(chosen.u, noise)
        chosen = OnPiece(point.at, corners)
    return chosen


def _face_of_least_curvature(
    point: OnPiece,
    share: Float[Array, " 2P"],
    tied: Bool[Array, " 2P"],
    tried: Bool[Array, " 2P"],
) -> Bool[Array, " 2P"]:
    """The corners, of those that tie, with a share in the mixture of least ‖C v‖."""
    ball = point.face.ball
    group = np.tile(ball.group, 2)
    number = np.bincount(group[tied], minlength=len(ball.starts))
    several = number[group] > 1
    used = tried & ~several
    shared = np.flatnonzero(tied & several)
    corner = np.concatenate([ball.scale, -ball.scale])
    H, c = _quadratic(point.at.C, corner, used, shared)
    _, numbered = np.unique(group[shared], return_inverse=True)
    first = share[shared]
    used[shared] = positive_at_minimum(H, c, numbered, first, tried[shared])
    return used


def _quadratic(
    C: Float[Array, "R P"],
    corner: Float[Array, " 2P"],
    fixed: Bool[Array, " 2P"],
    index: Int[Array, " m"],
) -> tuple[Float[Array, "m m"], Float[Array, " m"]]:
    """½‖C v‖² in the shares of the corners ``index``, beside ``fixed`` ones with a share of 1: its
    Hessian, and its slope where all shares are zero."""
    P = len(corner) // 2
    weight, place = np.unique(index % P, return_inverse=True)
    columns = C[:, weight]
    sign = corner[index]
    gram = columns.T @ columns
    largest = max(gram.max(initial=0.0), TINY)
    # of equal minimisers the shortest
    gram += 1e-12 * largest * np.eye(len(weight))
    H = gram[np.ix_(place, place)]
    H = H * sign[:, None] * sign
    held = np.where(fixed, corner, 0)
    v = held.reshape(2, P).sum(0)
    slope = columns.T @ C @ v
    return H, slope[place] * sign


def as_numpy(tensor: Tensor) -> Array:
    return tensor.detach().cpu().numpy()

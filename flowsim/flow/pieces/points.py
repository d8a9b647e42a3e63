"""Where a flow of exact pieces is: the objective at a place, the face it moves in, and the face
that follows."""

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from numpy import ndarray as Array
from scipy.linalg import cho_factor, cho_solve, svd
from torch import Tensor

from flowsim.flow.field import Field
from flowsim.flow.pieces.polytope import EPS, REST, Corners, Polyhedral
from flowsim.motion.state import State
from flowsim.problems.objective import Objective
from flowsim.problems.problem import Problem


class _Root(NamedTuple):
    """C = FᵀJ (F may be left out) with CᵀC = −∇²level up to a multiple of hhᵀ, which changes
    nothing on a face."""

    F: Float[Array, "M R"] | None
    J: Float[Array, "M P"]

    def columns(self, index: Int[Array, " m"]) -> Float[Array, "R m"]:
        return self.J[:, index] if self.F is None else self.F.T @ self.J[:, index]

    def times(self, v: Float[Array, " P"]) -> Float[Array, " R"]:
        return self.J @ v if self.F is None else self.F.T @ (self.J @ v)

    def pull(self, c: Float[Array, " R"]) -> Float[Array, " P"]:
        return self.J.T @ (c if self.F is None else self.F @ c)


class _Inverse:
    """(AᵀA)⁺ and A⁺ of a matrix A (R, k), whose columns are differences of numbers of the size
    ``scale (k,)``.

    By Cholesky where A is well conditioned. Else by singular values; what it cannot tell from
    rounding counts as singular, and there solutions have least length."""

    def __init__(self, A: Float[Array, "R k"], scale: Float[Array, " k"]) -> None:
        self.size, self.live = len(scale), np.flatnonzero(scale > 0)
        self.scale = scale[self.live]
        self.A = A[:, self.live] / self.scale
        self.factor = None
        try:
            factor = cho_factor(self.A.T @ self.A, lower=True, check_finite=False)
            if (np.diag(factor[0]) > 1e-5).all():
                self.factor = factor
                return
        except np.linalg.LinAlgError:
            pass
        u, s, vt = svd(self.A, full_matrices=False, lapack_driver="gesvd")
        kept = s > 1e-8
        self.parts = u[:, kept], s[kept], vt[kept]
        # unknowns from their well-determined combinations: the shortest that have these
        self.shortest = np.linalg.pinv(vt[kept] * self.scale)

    def newton(self, r: Float[Array, " k"]) -> Float[Array, " k"]:
        """(AᵀA)⁺ r."""
        r = r[self.live] / self.scale
        if self.factor is not None:
            return self._full(cho_solve(self.factor, r, check_finite=False) / self.scale)
        _, s, vt = self.parts
        return self._full(self.shortest @ ((vt @ r) / s**2))

    def least(self, b: Float[Array, " R"]) -> Float[Array, " k"]:
        """A⁺ b."""
        if self.factor is None:
            u, s, _ = self.parts
            return self._full(self.shortest @ ((u.T @ b) / s))
        y = cho_solve(self.factor, self.A.T @ b, check_finite=False)
        # normal equations square the condition: refine
        y = y + cho_solve(self.factor, self.A.T @ (b - self.A @ y), check_finite=False)
        return self._full(y / self.scale)

    def _full(self, y: Array) -> Float[Array, " k"]:
        full = np.zeros(self.size)
        full[self.live] = y
        return full


class View:
    """The objective of one trajectory in NumPy, its gradient evaluations counted."""

    def __init__(self, field: Field, objective: Objective, w: Tensor) -> None:
        self.objective, self.like, self.ball = (
            objective,
            w,
            Polyhedral.of(field.norm, objective.size),
        )
        self.gradients = 0
        self.last: OnPiece | None = None
        # a linear model's Jacobian is the same everywhere
        self.problem = objective if isinstance(objective, Problem) else None
        if self.problem is not None:
            self.J = as_numpy(self.problem.net.jacobian(w, self.problem.x)[0].flatten(0, 1))

    def tensor(self, a: Array | float) -> Tensor:
        """A row of one trajectory."""
        return torch.as_tensor(a, dtype=None if isinstance(a, Array) else torch.float64).to(
            self.like.device
        )[None]

    def outputs(self, w: Float[Array, " P"]) -> Float[Tensor, "1 N C"]:
        assert self.problem is not None
        return self.tensor(self.J @ w).view(1, self.problem.examples, -1)

    def ascent(self, w: Float[Array, " P"]) -> tuple[float, Float[Array, " P"]]:
        """The objective's own, for linear models in one pass over the data less."""
        self.gradients += 1
        if self.problem is None:
            lam, h = self.objective.ascent(self.tensor(w))
            return float(lam), as_numpy(h[0])
        lam, pull = self.problem.loss.ascent(self.outputs(w), self.problem.y)
        return float(lam), self.J.T @ as_numpy(pull.flatten())

    def root(self, w: Float[Array, " P"]) -> _Root:
        if self.problem is None:
            return _Root(None, as_numpy(self.objective.curvature(self.tensor(w))[0]))
        return _Root(
            as_numpy(self.problem.loss.curvature(self.outputs(w), self.problem.y)[0]), self.J
        )

    def recall(self, state: State) -> "OnPiece":
        """Where a state is: the point that it was made of, or the same made anew."""
        w, code = as_numpy(state.w[0]), as_numpy(state.memory["face"][0])
        last = self.last
        if (
            last is not None
            and np.array_equal(last.spot.w, w)
            and np.array_equal(last.face.code, code)
        ):
            return last
        return OnPiece(Evaluation(self, w), Corners(self.ball, code))

    def settle(self, face: Corners, w: Float[Array, " P"], inverse: _Inverse) -> "OnPiece | None":
        """The point of the piece in w + span E, where Eᵀh = 0, by Newton's method; None where that
        fails.

        It starts with the inverse from a point near by, and takes a new one where errors fall by
        less than a fifth."""
        off, fresh, near = np.inf, False, False
        for _ in range(16):
            point = OnPiece(Evaluation(self, w), face)
            slope = face.restrict(point.spot.h[face.free])
            last, off = off, np.abs(slope).max(initial=0.0) / max(point.spot.dual, 1e-300)
            if (
                off <= point.spot.noise / 8
                or off <= 64 * EPS
                or (near and off > 0.2 * last and (fresh or off < 1e-12))
            ):
                return point
            if not np.isfinite(off + point.spot.lam) or (fresh and off > last):
                return None
            if off > 0.2 * last:
                inverse, fresh = point.inverse, True
            move = face.expand(inverse.newton(slope))
            near = (
                off < 1e-7 or np.abs(move).max() <= 64 * EPS * np.abs(w).max()
            )  # about as near as rounding allows
            w = w + move
        return None


class Evaluation:
    """The objective at w: the level and its gradient h, and the root of its curvature when asked
    for."""

    def __init__(self, view: View, w: Float[Array, " P"]) -> None:
        self.view, self.w = view, w
        self.lam, self.h = view.ascent(w)
        self.dual, self.size = view.ball.dual(self.h), view.ball.value(w)
        self.noise = EPS * (
            64 + self.dual * self.size
        )  # rounding error of slopes, in units of ‖h‖_*

    @cached_property
    def root(self) -> _Root:
        return self.view.root(self.w)


@dataclass(frozen=True)
class OnPiece:
    """A spot on a piece."""

    spot: Evaluation
    face: Corners

    @cached_property
    def inverse(self) -> _Inverse:
        columns = self.spot.root.columns(self.face.free)
        return _Inverse(self.face.restrict(columns), self.face.sizes(np.sqrt((columns**2).sum(0))))

    @cached_property
    def u(self) -> Float[Array, " P"]:
        """The velocity dw/ds: the minimiser of ‖C u‖ on the face's affine hull, the shortest of
        them."""
        y = self.inverse.least(self.spot.root.times(self.face.centre))
        return self.face.centre - self.face.expand(y)

    @cached_property
    def turn(self) -> Float[Array, " P"]:
        """−CᵀC u, which is dh/ds up to a multiple of h."""
        return -self.spot.root.pull(self.spot.root.times(self.u))

    @cached_property
    def bend(self) -> float:
        """‖C u‖²."""
        return max(-float(self.turn @ self.u), float(np.finfo(np.float64).tiny))

    @cached_property
    def noise(self) -> float:
        """A bound on the rounding error of slopes, in units of ‖h‖_*, from what Newton's method has
        left of them."""
        left = np.abs(self.face.restrict(self.spot.h[self.face.free])).max(initial=0.0) / max(
            self.spot.dual, 1e-300
        )
        return 64 * max(self.spot.noise, left)

    @cached_property
    def clearance(self) -> Float[Array, "3 P"]:
        """How far this is from the end of the piece, negative beyond it: `Face.missing` and
        `Face.shares`."""
        corners = self.face.missing(self.spot.h / max(self.spot.dual, 1e-300))
        return np.concatenate([corners, self.face.shares(self.u)[None]])

    @cached_property
    def closing(self) -> Float[Array, "2 P"]:
        """How fast the corners' part of `clearance` falls."""
        rate = self.face.missing(
            (self.turn + self.bend / self.spot.dual * self.spot.h) / self.spot.dual
        )
        return np.where(np.isfinite(rate), -rate, 0.0)


def following(point: OnPiece, level: Float[Array, "3 P"] | float) -> OnPiece:
    """The same spot on the piece that begins there, where clearances over their ``level`` are zero.

    The face is that of the face QP, min ‖C v‖² over the mixtures of all corners that tie: those
    that do so just now are tried first, with those that keep a share."""
    face, spot, P = point.face, point.spot, len(point.face.code)
    ball, noise = face.ball, point.noise / 32
    new = ((point.clearance - level)[:2] <= noise).ravel()
    tied = new | (point.clearance[:2] <= 32 * noise).ravel() | face.in_use.ravel()
    share = face.mixture(point.u).ravel()
    tried = (share > 4 * noise) | new
    group, corner = np.tile(ball.group, 2), np.concatenate([ball.scale, -ball.scale])
    several = (np.bincount(group[tied | tried], minlength=len(ball.starts)) > 1)[group]
    alone = tried & ~several
    index = np.flatnonzero(several & (tied | tried))
    weight, place = np.unique(index % P, return_inverse=True)
    columns = spot.root.columns(weight)
    gram = columns.T @ columns
    gram += (
        1e-12 * max(gram.max(initial=0.0), 1e-300) * np.eye(len(weight))
    )  # of equal minimisers the shortest
    H = gram[np.ix_(place, place)] * corner[index, None] * corner[index]
    c = (columns.T @ spot.root.times(np.where(alone, corner, 0).reshape(2, P).sum(0)))[
        place
    ] * corner[index]
    alone[index] = _mixture(
        H, c, np.unique(group[index], return_inverse=True)[1], share[index], tried[index]
    )
    plus, minus = alone.reshape(2, P).astype(np.int64)
    rest = (ball.sums(plus * minus) > 0)[ball.group]
    chosen = OnPiece(spot, Corners(ball, np.where(rest, REST, plus - minus)))
    while (chosen.clearance[2] < -noise).any():  # what the QP's smaller precision has left
        chosen = OnPiece(spot, chosen.face.trimmed(chosen.u, noise))
    return chosen


def _mixture(H: Array, c: Array, group: Array, x: Array, used: Array) -> Bool[Array, " m"]:
    """Which x are positive at the minimum of ½xᵀHx + cᵀx, x ≥ 0, Σ x = 1 in each group: an
    active-set method.

    It starts from a mixture x and adds, among those not ``used``, the one that improves most.
    """
    used = used.copy()
    for _ in range(20 + 10 * len(x)):
        order = np.lexsort((-x, ~used, group))
        base = order[np.flatnonzero(np.diff(group[order], prepend=-1))][
            group
        ]  # each group's largest
        others = np.flatnonzero(used & (base != np.arange(len(x))))
        vertex = np.zeros(len(x))
        vertex[base] = 1
        b = base[others]
        slope = H @ vertex + c
        K = (
            H[np.ix_(others, others)]
            - H[np.ix_(others, b)]
            - H[np.ix_(b, others)]
            + H[np.ix_(b, b)]
        )
        y = _solve(K, slope[b] - slope[others])
        goal = vertex.copy()
        goal[others] = y
        np.subtract.at(goal, b, y)
        if (goal[used] >= 0).all():
            x = goal
            slope = H @ x + c
            excess = np.where(used, 0.0, slope - slope[base])
            worst = int(excess.argmin()) if len(x) else 0
            if not len(x) or excess[worst] >= -1e-11 * np.abs(H).max():
                break
            used[worst] = True
        else:
            falling = np.flatnonzero(used & (goal < 0))
            reach = x[falling] / (x[falling] - goal[falling])
            x = np.maximum(x + reach.min() * (goal - x), 0)
            used[falling[reach.argmin()]] = False
            x[~used] = 0
    return used


def _solve(K: Array, b: Array) -> Array:
    try:
        return cho_solve(cho_factor(K, check_finite=False), b, check_finite=False)
    except np.linalg.LinAlgError:
        return np.linalg.lstsq(K, b, rcond=None)[0]


def as_numpy(tensor: Tensor) -> Array:
    return tensor.detach().cpu().numpy()

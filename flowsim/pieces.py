"""Steepest flows of convex objectives in polyhedral norms, piece by piece and without an integration error.

The unit ball is taken as ‖v‖ = max over groups g of Σ_{k∈g} |v_k|/c_k: ℓ∞ has a group for each weight, ℓ1 a single
group, and a maximum over blocks of both the groups of its blocks. A steepest direction of h = ∇(level) puts, in each
group, a mixture on the corners ±c_k e_k where c_k|h_k| is largest. While the corners in use stay the same the weights
move in an affine space, with arclength s as one coordinate, and the level is stationary along all the others:

    w(s) ∈ w(0) + s·(centre of the face) + E y,    Eᵀ h(w(s)) = 0.

So Newton's method finds the end of a step of any length to rounding. A piece ends where a share falls to zero or
another corner ties; then the face QP, min vᵀ(−∇²level)v over all the tied corners, selects the corners of the next.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import ClassVar, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from numpy import ndarray as Array
from scipy.linalg import cho_factor, cho_solve, svd
from torch import Tensor

from flowsim.block_norms import Max, Sum
from flowsim.clocks import Target, hermite, log_elapsed, log_mean_exp
from flowsim.integrate import Field
from flowsim.norms import L1, Linf, Norm
from flowsim.problem import Objective, Problem
from flowsim.state import Segment, State, Status, march, tree_map

_EPS = float(np.finfo(np.float64).eps)
_REST = 2  # the code of a weight in a group whose gradient is zero; 0 is idle, ±1 moves in its corner's direction


@dataclass(frozen=True)
class ExactPieces:
    """The method for convex objectives (linear models with any loss, quadratics) in ℓ1, ℓ∞ and their maxima over
    blocks: every step ends on the flow to rounding, whatever ``rtol``, which bounds only what is read inside steps.

    Where the loss does not determine the flow, as along duplicated features, the shortest velocity in ℓ2 is taken.
    """

    ties: ClassVar[bool] = True
    """It follows ties."""

    def solver(self, rtol: float, atol: float) -> "Pieces":
        return Pieces(rtol, atol)


# ---------------------------------------------------------------------------------------------------------------
# The ball and its faces
# ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Ball:
    """‖v‖ = max_g Σ_{k∈g} |v_k|/c_k: the group of each weight, in increasing order, and its scale c."""

    group: Int[Array, " P"]
    scale: Float[Array, " P"]

    @staticmethod
    def of(norm: Norm, size: int) -> "_Ball":
        """The ball of a norm on ``size`` weights."""
        if isinstance(norm, Linf):
            return _Ball(np.arange(size), np.ones(size))
        if isinstance(norm, L1):
            return _Ball(np.zeros(size, dtype=np.int64), np.ones(size))
        parts = norm._bound if isinstance(norm, Max | Sum) else ()
        if not parts or not all(isinstance(p.norm, L1 | Linf if isinstance(norm, Max) else L1) for p in parts):
            raise ValueError(
                f"ExactPieces: got the norm {norm.name}, expected ℓ1, ℓ∞, a Max over blocks of both or a Sum over "
                "blocks of ℓ1, try SmallStep for the small-step path"
            )
        balls = [_Ball.of(part.norm, part.block.size) for part in parts]
        apart = np.cumsum([0, *(b.group[-1] + 1 for b in balls)]) * isinstance(norm, Max)
        group = np.concatenate([b.group + first for b, first in zip(balls, apart, strict=False)])
        return _Ball(group, np.concatenate([b.scale * p.scale for b, p in zip(balls, parts, strict=True)]))

    @cached_property
    def starts(self) -> Int[Array, " G"]:
        return np.flatnonzero(np.diff(self.group, prepend=-1))

    def sums(self, a: Float[Array, " P"]) -> Float[Array, " G"]:
        return np.add.reduceat(a, self.starts)

    def dual(self, h: Float[Array, " P"]) -> float:
        return float(np.maximum.reduceat(self.scale * np.abs(h), self.starts).sum())

    def value(self, v: Float[Array, " P"]) -> float:
        return float(self.sums(np.abs(v) / self.scale).max())


@dataclass(frozen=True)
class _Face:
    """The corners in use, by a code for each weight: sign of its corner, 0 idle, or `_REST`.

    Coordinates y along the face: each weight at rest, and for a group that shares its motion among m > 1 corners
    m − 1 orthonormal combinations of the shares whose sum is zero.
    """

    ball: _Ball
    code: Int[Array, " P"]

    @cached_property
    def moving(self) -> Bool[Array, " P"]:
        return np.abs(self.code) == 1

    @cached_property
    def corners(self) -> Int[Array, " P"]:
        """How many corners share the motion of each weight's group; 0 at rest."""
        return self.ball.sums(self.moving.astype(np.int64))[self.ball.group]

    @cached_property
    def centre(self) -> Float[Array, " P"]:
        return np.where(self.moving, self.code * self.ball.scale / np.maximum(self.corners, 1), 0.0)

    @cached_property
    def _parts(self) -> list[Int[Array, " m"]]:
        """The weights at rest, then those of each group with several corners."""
        shared = np.flatnonzero(self.moving & (self.corners > 1))
        ends = np.flatnonzero(np.diff(self.ball.group[shared])) + 1
        return [np.flatnonzero(self.code == _REST), *(np.split(shared, ends) if len(shared) else [])]

    @cached_property
    def free(self) -> Int[Array, " m"]:
        """All weights whose velocity the face leaves open, in the order of `restrict`."""
        return np.concatenate(self._parts)

    @cached_property
    def _weight(self) -> Float[Array, " m"]:
        return np.where(self.moving, self.code, 1)[self.free] * self.ball.scale[self.free]

    def restrict(self, a: Float[Array, "*rows m"]) -> Float[Array, "*rows k"]:
        """Eᵀ, on the free entries: derivatives along the weights become derivatives along y."""
        ends = np.cumsum([len(part) for part in self._parts])[:-1]
        rest, *shared = np.split(a * self._weight, ends, axis=-1)
        return np.concatenate([rest, *(_reflect(part)[..., 1:] for part in shared)], axis=-1)

    def sizes(self, size: Float[Array, " m"]) -> Float[Array, " k"]:
        """Of derivatives along y, from those of derivatives along the weights."""
        ends = np.cumsum([len(part) for part in self._parts])[:-1]
        rest, *shared = np.split(size * self.ball.scale[self.free], ends)
        return np.concatenate([rest, *(np.full(len(part) - 1, part.max()) for part in shared)])

    def expand(self, y: Float[Array, " k"]) -> Float[Array, " P"]:
        """E y."""
        ends = np.cumsum([len(self._parts[0]), *(len(part) - 1 for part in self._parts[1:])])[:-1]
        rest, *shared = np.split(y, ends)
        v = np.zeros(len(self.code))
        v[self.free] = self._weight * np.concatenate([rest, *(_reflect(np.append(0.0, part)) for part in shared)])
        return v

    def missing(self, slope: Float[Array, " P"]) -> Float[Array, "2 P"]:
        """By how much each corner +c_k e_k, and −c_k e_k, misses the slope of those in use; infinite for these."""
        slope = self.ball.scale * slope
        top = self.ball.sums(np.where(self.moving, self.code * slope, 0.0))[self.ball.group]
        top = top / np.maximum(self.corners, 1)
        plus, minus = self.in_use
        return np.stack([np.where(plus, np.inf, top - slope), np.where(minus, np.inf, top + slope)])

    def shares(self, u: Float[Array, " P"]) -> Float[Array, " P"]:
        """The share of each corner that is one of several, or at rest how far the group is inside its ball."""
        room = (1 - self.ball.sums(np.abs(u) / self.ball.scale))[self.ball.group]
        share = np.where(self.moving & (self.corners > 1), self.code * u / self.ball.scale, np.inf)
        return np.where(self.code == _REST, room, share)

    def mixture(self, u: Float[Array, " P"]) -> Float[Array, "2 P"]:
        """Shares of the corners +c_k e_k and −c_k e_k that make u; a group inside its ball has two opposite ones."""
        share = u / self.ball.scale
        spare = np.zeros(len(u))
        spare[self.ball.starts] = np.maximum(1 - self.ball.sums(np.abs(share)), 0) / 2
        spare[self.code != _REST] = 0
        return np.where(self.in_use, np.maximum(np.stack([share, -share]), 0) + spare, 0.0)

    def trimmed(self, u: Float[Array, " P"], noise: float) -> "_Face":
        """The face without corners whose shares in u are negative, and with groups that u takes out of their ball
        in motion."""
        beyond = self.shares(u) < -noise
        sign = np.sign(u).astype(np.int64)
        return _Face(self.ball, np.where(beyond, np.where(self.code == _REST, sign, 0), self.code))

    @cached_property
    def in_use(self) -> Bool[Array, "2 P"]:
        """The corners +c_k e_k and −c_k e_k whose slopes are equal; at rest all of the group's."""
        return np.stack([(self.code == _REST) | (self.code == sign) for sign in (1, -1)])


def _reflect(a: Float[Array, "*rows m"]) -> Float[Array, "*rows m"]:
    """The Householder reflection that exchanges (1, …, 1)/√m and the first unit vector."""
    v = np.full(a.shape[-1], a.shape[-1] ** -0.5)
    v[0] -= 1
    return a - (a @ v)[..., None] * (2 / (v @ v) * v)


# ---------------------------------------------------------------------------------------------------------------
# One trajectory's objective, and points of its flow
# ---------------------------------------------------------------------------------------------------------------


class _Root(NamedTuple):
    """C = FᵀJ (F may be left out) with CᵀC = −∇²level up to a multiple of hhᵀ, which changes nothing on a face."""

    F: Float[Array, "M R"] | None
    J: Float[Array, "M P"]

    def columns(self, index: Int[Array, " m"]) -> Float[Array, "R m"]:
        return self.J[:, index] if self.F is None else self.F.T @ self.J[:, index]

    def times(self, v: Float[Array, " P"]) -> Float[Array, " R"]:
        return self.J @ v if self.F is None else self.F.T @ (self.J @ v)

    def pull(self, c: Float[Array, " R"]) -> Float[Array, " P"]:
        return self.J.T @ (c if self.F is None else self.F @ c)


class _Inverse:
    """(AᵀA)⁺ and A⁺ of a matrix A (R, k), whose columns are differences of numbers of the size ``scale (k,)``.

    By Cholesky where A is well conditioned. Else by singular values; what it cannot tell from rounding counts as
    singular, and there solutions have least length.
    """

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


class _View:
    """The objective of one trajectory in NumPy, its gradient evaluations counted."""

    def __init__(self, field: Field, objective: Objective, w: Tensor) -> None:
        self.objective, self.like, self.ball = objective, w, _Ball.of(field.norm, objective.size)
        self.gradients = 0
        self.last: _Point | None = None
        # a linear model's Jacobian is the same everywhere
        self.problem = objective if isinstance(objective, Problem) else None
        if self.problem is not None:
            self.J = _numpy(self.problem.net.jacobian(w, self.problem.x)[0].flatten(0, 1))

    def tensor(self, a: Array | float) -> Tensor:
        """A row of one trajectory."""
        return torch.as_tensor(a, dtype=None if isinstance(a, Array) else torch.float64).to(self.like.device)[None]

    def outputs(self, w: Float[Array, " P"]) -> Float[Tensor, "1 N C"]:
        assert self.problem is not None
        return self.tensor(self.J @ w).view(1, self.problem.examples, -1)

    def ascent(self, w: Float[Array, " P"]) -> tuple[float, Float[Array, " P"]]:
        """The objective's own, for linear models in one pass over the data less."""
        self.gradients += 1
        if self.problem is None:
            lam, h = self.objective.ascent(self.tensor(w))
            return float(lam), _numpy(h[0])
        lam, pull = self.problem.loss.ascent(self.outputs(w), self.problem.y)
        return float(lam), self.J.T @ _numpy(pull.flatten())

    def root(self, w: Float[Array, " P"]) -> _Root:
        if self.problem is None:
            return _Root(None, _numpy(self.objective.curvature(self.tensor(w))[0]))
        return _Root(_numpy(self.problem.loss.curvature(self.outputs(w), self.problem.y)[0]), self.J)

    def recall(self, state: State) -> "_Point":
        """Where a state is: the point that it was made of, or the same made anew."""
        w, code = _numpy(state.w[0]), _numpy(state.memory["face"][0])
        last = self.last
        if last is not None and np.array_equal(last.spot.w, w) and np.array_equal(last.face.code, code):
            return last
        return _Point(_Spot(self, w), _Face(self.ball, code))

    def settle(self, face: _Face, w: Float[Array, " P"], inverse: _Inverse) -> "_Point | None":
        """The point of the piece in w + span E, where Eᵀh = 0, by Newton's method; None where that fails.

        It starts with the inverse from a point near by, and takes a new one where errors fall by less than a fifth.
        """
        off, fresh, near = np.inf, False, False
        for _ in range(16):
            point = _Point(_Spot(self, w), face)
            slope = face.restrict(point.spot.h[face.free])
            last, off = off, np.abs(slope).max(initial=0.0) / max(point.spot.dual, 1e-300)
            if (
                off <= point.spot.noise / 8
                or off <= 64 * _EPS
                or (near and off > 0.2 * last and (fresh or off < 1e-12))
            ):
                return point
            if not np.isfinite(off + point.spot.lam) or (fresh and off > last):
                return None
            if off > 0.2 * last:
                inverse, fresh = point.inverse, True
            move = face.expand(inverse.newton(slope))
            near = off < 1e-7 or np.abs(move).max() <= 64 * _EPS * np.abs(w).max()  # about as near as rounding allows
            w = w + move
        return None


class _Spot:
    """The objective at w: the level and its gradient h, and the root of its curvature when asked for."""

    def __init__(self, view: _View, w: Float[Array, " P"]) -> None:
        self.view, self.w = view, w
        self.lam, self.h = view.ascent(w)
        self.dual, self.size = view.ball.dual(self.h), view.ball.value(w)
        self.noise = _EPS * (64 + self.dual * self.size)  # rounding error of slopes, in units of ‖h‖_*

    @cached_property
    def root(self) -> _Root:
        return self.view.root(self.w)


@dataclass(frozen=True)
class _Point:
    """A spot on a piece."""

    spot: _Spot
    face: _Face

    @cached_property
    def inverse(self) -> _Inverse:
        columns = self.spot.root.columns(self.face.free)
        return _Inverse(self.face.restrict(columns), self.face.sizes(np.sqrt((columns**2).sum(0))))

    @cached_property
    def u(self) -> Float[Array, " P"]:
        """The velocity dw/ds: the minimiser of ‖C u‖ on the face's affine hull, the shortest of them."""
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
        """A bound on the rounding error of slopes, in units of ‖h‖_*, from what Newton's method has left of them."""
        left = np.abs(self.face.restrict(self.spot.h[self.face.free])).max(initial=0.0) / max(self.spot.dual, 1e-300)
        return 64 * max(self.spot.noise, left)

    @cached_property
    def clearance(self) -> Float[Array, "3 P"]:
        """How far this is from the end of the piece, negative beyond it: `_Face.missing` and `_Face.shares`."""
        corners = self.face.missing(self.spot.h / max(self.spot.dual, 1e-300))
        return np.concatenate([corners, self.face.shares(self.u)[None]])

    @cached_property
    def closing(self) -> Float[Array, "2 P"]:
        """How fast the corners' part of `clearance` falls."""
        rate = self.face.missing((self.turn + self.bend / self.spot.dual * self.spot.h) / self.spot.dual)
        return np.where(np.isfinite(rate), -rate, 0.0)


# ---------------------------------------------------------------------------------------------------------------
# Which face: the face QP
# ---------------------------------------------------------------------------------------------------------------


def _next(point: _Point, level: Float[Array, "3 P"] | float) -> _Point:
    """The same spot on the piece that begins there, where clearances over their ``level`` are zero.

    The face is that of the face QP, min ‖C v‖² over the mixtures of all corners that tie: those that do so just now
    are tried first, with those that keep a share.
    """
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
    gram += 1e-12 * max(gram.max(initial=0.0), 1e-300) * np.eye(len(weight))  # of equal minimisers the shortest
    H = gram[np.ix_(place, place)] * corner[index, None] * corner[index]
    c = (columns.T @ spot.root.times(np.where(alone, corner, 0).reshape(2, P).sum(0)))[place] * corner[index]
    alone[index] = _mixture(H, c, np.unique(group[index], return_inverse=True)[1], share[index], tried[index])
    plus, minus = alone.reshape(2, P).astype(np.int64)
    rest = (ball.sums(plus * minus) > 0)[ball.group]
    chosen = _Point(spot, _Face(ball, np.where(rest, _REST, plus - minus)))
    while (chosen.clearance[2] < -noise).any():  # what the QP's smaller precision has left
        chosen = _Point(spot, chosen.face.trimmed(chosen.u, noise))
    return chosen


def _mixture(H: Array, c: Array, group: Array, x: Array, used: Array) -> Bool[Array, " m"]:
    """Which x are positive at the minimum of ½xᵀHx + cᵀx, x ≥ 0, Σ x = 1 in each group: an active-set method.

    It starts from a mixture x and adds, among those not ``used``, the one that improves most.
    """
    used = used.copy()
    for _ in range(20 + 10 * len(x)):
        order = np.lexsort((-x, ~used, group))
        base = order[np.flatnonzero(np.diff(group[order], prepend=-1))][group]  # each group's largest
        others = np.flatnonzero(used & (base != np.arange(len(x))))
        vertex = np.zeros(len(x))
        vertex[base] = 1
        b = base[others]
        slope = H @ vertex + c
        K = H[np.ix_(others, others)] - H[np.ix_(others, b)] - H[np.ix_(b, others)] + H[np.ix_(b, b)]
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


# ---------------------------------------------------------------------------------------------------------------
# Steps
# ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Pieces:
    """One step is the rest of a piece, or as much of it as can be read off the step to the tolerance: weights to
    ``atol + rtol·max|w|``, the level to ``rtol`` and log t to the larger of ``rtol`` and 10⁻³."""

    rtol: float
    atol: float

    def start(self, field: Field, objective: Objective, state: State) -> State:
        if state.w.dtype != torch.float64:
            raise ValueError(f"ExactPieces: got weights of {state.w.dtype}, expected float64, try w0.double()")
        if not objective.convex:
            raise ValueError(
                "ExactPieces: got an objective that is not convex, expected a linear model or a Quadratic, "
                "try SmallStep for the small-step path"
            )
        return _rows(lambda part, row, b: self._begin(_View(field, part, row.w), row), objective, state)

    def advance(self, field: Field, objective: Objective, state: State, until: Target, budget: int) -> State:
        def run(part: Objective, row: State, b: int) -> State:
            view = _View(field, part, row.w)
            goal = until.select(torch.tensor([b], device=row.w.device))
            return march(lambda _, local: self._step(view, local), part, row, goal, budget)

        return _rows(run, objective, state)

    def _begin(self, view: _View, state: State) -> State:
        """On with the face that the state remembers, or with the one that the face QP selects."""
        spot, ball = _Spot(view, _numpy(state.w[0])), view.ball
        if _continues(state, spot):
            here = _Point(spot, _Face(ball, _numpy(state.memory["face"][0])))
        else:
            first = np.zeros(len(spot.w), dtype=np.int64)  # from the steepest corner of each group
            leaders = np.lexsort((-ball.scale * np.abs(spot.h), ball.group))[ball.starts]
            first[leaders] = np.where(spot.h[leaders] < 0, -1, 1)
            here = _next(_Point(spot, _Face(ball, first)), 62 * spot.noise)  # all that are equal to rounding
            state = replace(state, step_size=view.tensor(self._guess(here)))
        still = _Time((-np.inf, -np.inf), (0.0, 0.0), 0.0, -np.inf)
        readings = state.readings | {"lam": view.tensor(spot.lam)}
        tallies = {"events": torch.zeros_like(state.step_size)} | state.tallies
        state = _counted(view, replace(state, readings=readings, tallies=tallies, memory=_memory(here, 0)))
        state = replace(state, segment=_segment(state, state, here, here, 0.0, still, np.zeros_like(spot.h)))
        return state.stopped(state.memory["dual"] == 0, Status.STATIONARY)

    def _guess(self, here: _Point) -> float:
        """A length for the first step of a piece: along it the loss weighs the examples in much the same way."""
        if not here.spot.view.objective.logarithmic:
            return here.spot.dual / here.bend
        return min(self.rtol**0.25 / here.bend**0.5, 10 * max(1.0, abs(here.spot.lam)) / max(here.spot.dual, 1e-300))

    def _step(self, view: _View, state: State) -> State:
        """One attempt."""
        here = view.recall(state)
        slack = 2 * here.noise  # what is zero to rounding now may stay so
        level = np.where(here.clearance > slack, 0.0, np.minimum(here.clearance, 0.0) - slack)
        end, ds, over = _end(view, here, level, self._reach(here, level, float(state.step_size)))
        if end is None:
            return _refused(view, state, ds / 4, here)
        middle = _Middle.of(here, end, ds)
        excess = middle.excess(end, self.rtol, self.atol)
        if (middle.clearance < level - 1e-6).any():
            return _refused(view, state, ds / 2, here)
        if not excess <= 1:
            return _refused(view, state, ds * max(0.1, 0.8 * excess**-0.25), here)
        moved = _moved(state, here, middle, end, ds)
        if over:
            stalled = int(state.memory["stalled"]) + 1 if ds <= 1e-13 * end.spot.size else 0
            end = _next(end, level)
            size, tallies = self._guess(end), _plus(moved.tallies, events=1)
            moved = replace(moved, memory=_memory(end, stalled), tallies=tallies)
            # more pieces of no length than there are corners: the choice goes round in rounding errors
            moved = moved.stopped(moved.memory["stalled"] > 20 + 2 * len(here.spot.w), Status.STEP_TOO_SMALL)
        else:
            size = ds * min(8.0, 0.9 * max(excess, 1e-8) ** -0.25)
            moved = replace(moved, memory=_memory(end, 0))
        view.last = end
        return _judged(_counted(view, replace(moved, step_size=view.tensor(size))), end)

    def _reach(self, here: _Point, level: Array, size: float) -> float:
        """How far to try: not past the end of the whole flow, where the gradient vanishes, and not much past the
        first corner that will tie if all goes on as now."""
        over = (here.clearance - level)[:2]
        falling = here.closing > 0
        ties = (over[falling] / here.closing[falling]).min(initial=np.inf)
        return float(min(size, 0.38 * here.spot.dual / here.bend, 1.1 * ties))


def _end(view: _View, here: _Point, level: Array, ds: float) -> tuple[_Point | None, float, bool]:
    """Where a step ends, after what length, and whether the piece ends there: at the first zero of the clearance
    over its level, by inverse interpolation through the points that have been visited. No point where Newton's
    method fails."""
    end = view.settle(here.face, here.spot.w + ds * here.u, here.inverse)
    if end is None or (end.clearance >= level).all():
        return end, ds, False
    (low, a), (high, b) = (0.0, here), (ds, end)
    visited = [(low, a.clearance - level), (high, b.clearance - level)]
    for turn in range(60):
        s = _first_zero(visited, low, high) if turn % 4 < 3 else 0.5 * (low + high)
        if not low < s < high:
            break
        point = view.settle(here.face, _between(a, b, high - low, (s - low) / (high - low)), b.inverse)
        if point is None:
            return None, s, False
        over = point.clearance - level
        visited.append((s, over))
        if abs(over.min()) <= point.noise / 64:
            return point, s, True
        if over.min() < 0:
            high, b = s, point
        else:
            low, a = s, point
    return b, high, True


def _first_zero(visited: list[tuple[float, Array]], low: float, high: float) -> float:
    """The first zero between two arclengths of quantities that are known at visited ones, positive at the first."""
    ends = {s: f for s, f in visited if s in (low, high)}
    near = [*ends.items(), *(p for p in visited[-4:] if p[0] not in ends)][:4]
    falling = ends[high] < 0
    s, f = np.array([p[0] for p in near])[:, None], np.stack([p[1][falling] for p in near])
    secant = low + (high - low) * ends[low][falling] / (ends[low][falling] - ends[high][falling])
    inverse = np.zeros(f.shape[1])
    with np.errstate(divide="ignore", invalid="ignore"):
        for i in range(len(near)):
            inverse += s[i] * np.prod([f[j] / (f[j] - f[i]) for j in range(len(near)) if j != i], axis=0)
    return float(np.where((inverse > low) & (inverse < high), inverse, secant).min())


class _Middle(NamedTuple):
    """Half way along a step: ‖h‖_* there, what the cubic through both ends lacks, and how far each reading is off."""

    dual: float
    bend: Float[Array, " P"]
    defect: float
    clearance: Float[Array, "3 P"]
    time: "_Time"

    @staticmethod
    def of(here: _Point, end: _Point, ds: float) -> "_Middle":
        a, b, face = here.spot, end.spot, here.face
        spot = _Spot(a.view, _between(here, end, ds, 0.5))
        slope = face.restrict(spot.h[face.free])
        lack = end.inverse.newton(slope)
        u = 1.5 * (b.w - a.w) / ds - 0.25 * (here.u + end.u)
        clearance = np.concatenate([face.missing(spot.h / max(spot.dual, 1e-300)), face.shares(u)[None]])
        cubic = 0.5 * (a.lam + b.lam) + 0.125 * ds * (a.dual - b.dual) - spot.lam
        simpson = ds * (a.dual + 4 * spot.dual + b.dual) / 6 - (b.lam - a.lam)
        defects = abs(float(slope @ lack)), max(abs(cubic), abs(simpson)) / (1 + abs(b.lam - a.lam))
        time = _Time.of(ds, a, spot, b)
        return _Middle(spot.dual, face.expand(lack), max(defects), clearance, time)

    def excess(self, end: _Point, rtol: float, atol: float) -> float:
        """The errors of what is read inside the step, over their tolerances."""
        weights = np.abs(self.bend).max() / (atol + rtol * np.abs(end.spot.w).max())
        noise = end.noise  # of ‖h‖_*, whose integrals cannot tell more
        return float(max(weights, self.defect / (rtol + noise), abs(self.time.defect) / (max(rtol, 1e-3) + noise)))


class _Time(NamedTuple):
    """log dt/dv and its derivative at both ends of a step, v = 0 and 1; the cubic's error at v = ½; log of the time
    that the step takes."""

    rates: tuple[float, float]
    slopes: tuple[float, float]
    defect: float
    log_elapsed: float

    @staticmethod
    def of(ds: float, *spots: _Spot) -> "_Time":
        """From start, middle and end. log dt/ds = Λ − log ‖h‖_*, without Λ where the level is no logarithm."""
        view = spots[0].view
        lams, duals = np.array([p.lam for p in spots]), np.array([p.dual for p in spots])
        a, m, b = np.log(np.maximum(duals, 1e-300))
        if view.objective.logarithmic:
            rates = lams - [a, m, b] + np.log(ds)
            slopes = ds * duals - [4 * m - 3 * a - b, b - a, a - 4 * m + 3 * b]
            halves = [
                log_elapsed(*(view.tensor(x) for x in (*rates[i : i + 2], *slopes[i : i + 2] / 2))) for i in (0, 1)
            ]
            elapsed = float(torch.logaddexp(*halves)) - np.log(2)
        else:  # ‖h‖_* is linear in s
            rates, slopes = np.log(ds) - np.array([a, m, b]), (duals[0] - duals[2]) / duals
            elapsed = np.log(ds) - float(log_mean_exp(view.tensor(a), view.tensor(b)))
        defect = 0.5 * (rates[0] + rates[2]) + 0.125 * (slopes[0] - slopes[2]) - rates[1]
        return _Time((rates[0], rates[2]), (slopes[0], slopes[2]), defect, elapsed)


def _between(a: _Point, b: _Point, ds: float, v: float) -> Float[Array, " P"]:
    """Weights on the cubic through two points of a piece."""
    return hermite(v, a.spot.w, b.spot.w, ds * a.u, ds * b.u)  # type: ignore[arg-type, return-value]


# ---------------------------------------------------------------------------------------------------------------
# States
# ---------------------------------------------------------------------------------------------------------------


def _rows(step: Callable[[Objective, State, int], State], objective: Objective, state: State) -> State:
    """Each trajectory on its own, since their pieces end at different places."""
    done = []
    for b in range(len(state.status)):
        rows = torch.tensor([b], device=state.w.device)
        done.append(step(objective.select(rows), state.select(rows), b))
    return tree_map(lambda *parts: torch.cat(parts), *done)


def _continues(state: State, spot: _Spot) -> bool:
    """Whether a flow of this objective in this norm has left the state, so that its face goes on."""
    if "face" not in state.memory or not np.array_equal(_numpy(state.memory["ascent"][0]), spot.h):
        return False
    u = _numpy(state.memory["velocity"][0])
    return abs(float(spot.h @ u) / max(spot.dual, 1e-300) - 1) < 1e-6 and abs(spot.view.ball.value(u) - 1) < 1e-6


def _memory(at: _Point, stalled: int) -> dict[str, Tensor]:
    rows = {"face": at.face.code, "velocity": at.u, "ascent": at.spot.h}
    numbers = {"dual": at.spot.dual, "stalled": float(stalled)}
    tensor = at.spot.view.tensor
    return {name: tensor(row) for name, row in rows.items()} | {name: tensor(x) for name, x in numbers.items()}


def _moved(state: State, here: _Point, middle: _Middle, end: _Point, ds: float) -> State:
    """The state at the end of a step, its memory still to be written."""
    a, b, tensor = here.spot, end.spot, here.spot.view.tensor
    relative = 0.0  # at w = 0 it is infinite, and counts from the first point that is not
    if min(a.size, b.size) > 0:
        relative = ds / float(torch.exp(log_mean_exp(tensor(np.log(a.size)), tensor(np.log(b.size)))))
    gains = {
        "steps": 1.0,
        "arclength": ds,
        "relative": relative,
        "dissipated": ds * (a.dual + 4 * middle.dual + b.dual) / 6,
    }
    readings = {name: state.readings[name] + gain for name, gain in gains.items()}
    readings["lam"] = tensor(b.lam)
    readings["log_time"] = torch.logaddexp(state.readings["log_time"], tensor(middle.time.log_elapsed))
    moved = replace(state, w=tensor(b.w), readings=readings, tallies=_plus(state.tallies, accepted=1))
    return replace(moved, segment=_segment(state, moved, here, end, ds, middle.time, middle.bend))


def _refused(view: _View, state: State, size: float, here: _Point) -> State:
    view.last = here
    state = replace(state, step_size=view.tensor(size), tallies=_plus(state.tallies, rejected=1))
    return _judged(_counted(view, state), here)


def _judged(state: State, at: _Point) -> State:
    """The state, stopped where it cannot go on. A flow that ends does so about ‖h‖_*/‖Cu‖² further on."""
    left, size = at.spot.dual / at.bend, float(np.abs(at.spot.w).max())
    stuck, blind = not float(state.step_size) > 4 * _EPS * size, at.noise > 1e-2
    if at.spot.dual < 1e-290 or left <= 256 * _EPS * size or ((blind or stuck) and left <= 1e-6 * size):
        status = Status.STATIONARY
    elif blind:
        status = Status.PRECISION_FLOOR
    else:
        status = Status.STEP_TOO_SMALL if stuck else Status.RUNNING
    return state.stopped(state.running, status)


def _counted(view: _View, state: State) -> State:
    count, view.gradients = view.gradients, 0
    return replace(state, tallies=_plus(state.tallies, gradients=count))


def _plus(tallies: dict[str, Tensor], **counts: float) -> dict[str, Tensor]:
    return tallies | {name: tallies[name] + count for name, count in counts.items()}


def _segment(state: State, moved: State, here: _Point, end: _Point, ds: float, time: _Time, bend: Array) -> Segment:
    """The step from ``state`` to ``moved``."""
    tensor = here.spot.view.tensor
    return Segment(
        w0=state.w,
        w1=moved.w,
        slope0=tensor(ds * here.u),
        slope1=tensor(ds * end.u),
        readings0=state.readings,
        readings1=moved.readings,
        lam_slope0=tensor(ds * here.spot.dual),
        lam_slope1=tensor(ds * end.spot.dual),
        time_rate0=tensor(time.rates[0]),
        time_rate1=tensor(time.rates[1]),
        time_slope0=tensor(time.slopes[0]),
        time_slope1=tensor(time.slopes[1]),
        bend=tensor(bend),
    )


def _numpy(tensor: Tensor) -> Array:
    return tensor.detach().cpu().numpy()

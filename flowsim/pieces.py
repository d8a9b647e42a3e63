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

    def expand(self, y: Float[Array, " k"]) -> Float[Array, " P"]:
        """E y."""
        ends = np.cumsum([len(self._parts[0]), *(len(part) - 1 for part in self._parts[1:])])[:-1]
        rest, *shared = np.split(y, ends)
        v = np.zeros(len(self.code))
        v[self.free] = self._weight * np.concatenate([rest, *(_reflect(np.append(0.0, part)) for part in shared)])
        return v

    def velocity(self, root: "_Root", inverse: "_Inverse") -> Float[Array, " P"]:
        """The minimiser of ‖C u‖ on the face's affine hull, the shortest of them."""
        return self.centre - self.expand(inverse.least(root.times(self.centre)))

    def clearance(self, h: Float[Array, " P"], u: Float[Array, " P"]) -> Float[Array, "3 P"]:
        """How far the piece is from its end, negative beyond: by how much each corner +c_k e_k and −c_k e_k that is
        not in use misses the largest slope, in units of ‖h‖_*, and the share of each corner in use or, at rest, how
        far the group's velocity is inside the ball."""
        ball, slope = self.ball, self.ball.scale * h / max(self.ball.dual(h), 1e-300)
        top = ball.sums(np.where(self.moving, self.code * slope, 0.0))[ball.group] / np.maximum(self.corners, 1)
        rest = self.code == _REST
        share = self.code * u / ball.scale
        room = (1 - ball.sums(np.abs(u) / ball.scale))[ball.group]
        return np.stack(
            [
                np.where(rest | (self.code == 1), np.inf, top - slope),
                np.where(rest | (self.code == -1), np.inf, top + slope),
                np.where(rest, room, np.where(self.moving & (self.corners > 1), share, np.inf)),
            ]
        )


def _reflect(a: Float[Array, "*rows m"]) -> Float[Array, "*rows m"]:
    """The Householder reflection that exchanges (1, …, 1)/√m and the first unit vector."""
    v = np.full(a.shape[-1], a.shape[-1] ** -0.5)
    v[0] -= 1
    return a - (a @ v)[..., None] * (2 / (v @ v) * v)


# ---------------------------------------------------------------------------------------------------------------
# One trajectory's objective, and points of its flow
# ---------------------------------------------------------------------------------------------------------------


class _Root(NamedTuple):
    """C = FᵀJ with CᵀC = −∇²level up to a multiple of hhᵀ, which changes nothing on a face."""

    F: Float[Array, "M R"] | None
    J: Float[Array, "M P"]

    def columns(self, index: Int[Array, " m"]) -> Float[Array, "R m"]:
        return self.J[:, index] if self.F is None else self.F.T @ self.J[:, index]

    def times(self, v: Float[Array, " P"]) -> Float[Array, " R"]:
        return self.J @ v if self.F is None else self.F.T @ (self.J @ v)

    def pull(self, c: Float[Array, " R"]) -> Float[Array, " P"]:
        return self.J.T @ (c if self.F is None else self.F @ c)


class _Inverse:
    """(AᵀA)⁺ and A⁺ of a matrix A (R, k): by Cholesky where A is well conditioned, else by singular values."""

    def __init__(self, A: Float[Array, "R k"]) -> None:
        self.A = A
        self.factor = None
        gram = A.T @ A
        try:
            factor = cho_factor(gram, lower=True, check_finite=False)
            pivots = np.diag(factor[0])
            if not len(pivots) or pivots.min() > 1e-5 * pivots.max():
                self.factor = factor
                return
        except np.linalg.LinAlgError:
            pass
        u, s, vt = svd(A, full_matrices=False, lapack_driver="gesvd")
        kept = s > 1e-12 * s.max(initial=0.0)
        self.parts = u[:, kept], s[kept], vt[kept]

    def newton(self, r: Float[Array, " k"]) -> Float[Array, " k"]:
        """(AᵀA)⁺ r."""
        if self.factor is not None:
            return cho_solve(self.factor, r, check_finite=False)
        _, s, vt = self.parts
        return vt.T @ ((vt @ r) / s**2)

    def least(self, b: Float[Array, " R"]) -> Float[Array, " k"]:
        """A⁺ b."""
        if self.factor is None:
            u, s, vt = self.parts
            return vt.T @ ((u.T @ b) / s)
        y = self.newton(self.A.T @ b)
        return y + self.newton(self.A.T @ (b - self.A @ y))  # normal equations square the condition: refine


@dataclass(frozen=True)
class _Point:
    """A point of a piece at arclength ``s`` after its start: level and gradient, the velocity u and h' = −CᵀC u."""

    s: float
    w: Float[Array, " P"]
    lam: float
    h: Float[Array, " P"]
    dual: float
    size: float
    u: Float[Array, " P"]
    turn: Float[Array, " P"]

    @property
    def bend(self) -> float:
        """‖C u‖²."""
        return max(-float(self.turn @ self.u), 0.0)

    @property
    def noise(self) -> float:
        """Rounding error of slopes, in units of ‖h‖_*."""
        return _EPS * (64 + self.dual * self.size)


class _View:
    """The objective of one trajectory in NumPy, its gradient evaluations counted."""

    def __init__(self, objective: Objective, ball: _Ball, w: Tensor) -> None:
        self.objective, self.ball, self.like = objective, ball, w
        self.gradients = 0
        self.jacobian = None
        if isinstance(objective, Problem):  # a linear model's is the same everywhere
            self.jacobian = _numpy(objective.net.jacobian(w, objective.x)[0].flatten(0, 1))

    @staticmethod
    def of(field: Field, objective: Objective, state: State) -> "_View":
        return _View(objective, _Ball.of(field.norm, objective.size), state.w)

    def ascent(self, w: Float[Array, " P"]) -> tuple[float, Float[Array, " P"]]:
        self.gradients += 1
        lam, h = self.objective.ascent(self._tensor(w))
        return float(lam), _numpy(h[0])

    def root(self, w: Float[Array, " P"]) -> _Root:
        if isinstance(self.objective, Problem) and self.jacobian is not None:
            outputs = self.objective.outputs(self._tensor(w))
            return _Root(_numpy(self.objective.loss.curvature(outputs, self.objective.y)[0]), self.jacobian)
        return _Root(None, _numpy(self.objective.curvature(self._tensor(w))[0]))

    def _tensor(self, w: Float[Array, " P"]) -> Tensor:
        return torch.as_tensor(w).to(self.like)[None]

    def point(self, face: _Face, s: float, w: Array, lam: float, h: Array) -> _Point:
        """The point with the face's velocity."""
        root = self.root(w)
        u = face.velocity(root, _Inverse(face.restrict(root.columns(face.free))))
        return self.moving(s, w, lam, h, root, u)

    def moving(self, s: float, w: Array, lam: float, h: Array, root: _Root, u: Array) -> _Point:
        turn = -root.pull(root.times(u))
        return _Point(s, w, lam, h, self.ball.dual(h), self.ball.value(w), u, turn)

    def settle(self, face: _Face, s: float, w: Float[Array, " P"]) -> _Point | None:
        """The point of the piece in w + span E, where Eᵀh = 0, by Newton's method; None where that fails."""
        lam, h = self.ascent(w)
        off = np.inf
        for _ in range(12):
            slope = face.restrict(h[face.free])
            dual = self.ball.dual(h)
            last, off = off, np.abs(slope).max(initial=0.0) / max(dual, 1e-300)
            if not np.isfinite(lam) or not np.isfinite(off) or (off > last and off > 1e-6):
                return None
            if off <= _EPS * (4 + dual * self.ball.value(w)) or (off > 0.25 * last and off < 1e-7):
                return self.point(face, s, w, lam, h)
            inverse = _Inverse(face.restrict(self.root(w).columns(face.free)))
            w = w + face.expand(inverse.newton(slope))
            lam, h = self.ascent(w)
        return None


# ---------------------------------------------------------------------------------------------------------------
# Which face: the face QP
# ---------------------------------------------------------------------------------------------------------------


def _select(
    face: _Face, root: _Root, u: Float[Array, " P"], forced: Bool[Array, " 2P"], tied: Bool[Array, " 2P"], dust: float
) -> _Face:
    """The face of the QP min ‖C v‖² over the mixtures of the ``tied`` corners, +c_k e_k and then −c_k e_k, from the
    mixture u of ``face``; of several minimisers that of least length. Corners that are ``forced`` are tried first,
    those with shares up to ``dust`` last."""
    ball, P = face.ball, len(u)
    share = np.concatenate([np.maximum(u, 0), np.maximum(-u, 0)]) / np.tile(ball.scale, 2)
    spare = np.zeros(P)  # a group at rest, inside its ball, has some of two opposite corners
    spare[ball.starts] = np.where(face.code[ball.starts] == _REST, 1 - ball.sums(np.abs(u) / ball.scale), 0) / 2
    share = np.maximum(share + np.tile(spare, 2), 0)
    used = share > dust
    group = np.tile(ball.group, 2)
    open_ = (np.bincount(group[tied | used | forced], minlength=len(ball.starts)) > 1)[group]
    fixed = used & ~open_
    corner = np.tile(ball.scale, 2) * np.repeat([1.0, -1.0], P)
    still = np.where(fixed, corner, 0).reshape(2, P).sum(0)
    index = np.flatnonzero(open_ & (tied | used | forced))
    weight, sign = np.unique(index % P, return_inverse=True)[0], corner[index]
    place = np.searchsorted(weight, index % P)
    columns = root.columns(weight)
    gram = columns.T @ columns
    gram += 1e-14 * max(gram.max(initial=0.0), 1e-300) * np.eye(len(weight))  # of equals the shortest
    H = gram[np.ix_(place, place)] * sign[:, None] * sign
    c = (columns.T @ root.times(still))[place] * sign
    groups = np.unique(group[index], return_inverse=True)[1]
    chosen = np.zeros(2 * P, dtype=bool)
    chosen[index] = _mixture(H, c, groups, share[index], (used | forced)[index])
    plus, minus = (chosen | fixed).reshape(2, P)
    rest = (ball.sums((plus & minus).astype(np.int64)) > 0)[ball.group]
    return _Face(ball, np.where(rest, _REST, plus.astype(np.int64) - minus))


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
        return _rows(lambda part, row, b: self._begin(_View.of(field, part, row), row), objective, state)

    def advance(self, field: Field, objective: Objective, state: State, until: Target, budget: int) -> State:
        def run(part: Objective, row: State, b: int) -> State:
            view = _View.of(field, part, row)
            goal = until.select(torch.tensor([b], device=row.w.device))
            return march(lambda _, local: self._step(view, local), part, row, goal, budget)

        return _rows(run, objective, state)

    def _begin(self, view: _View, state: State) -> State:
        lam, h = view.ascent(_numpy(state.w[0]))
        state = replace(
            state,
            readings=state.readings | {"lam": _tensor(view, lam)},
            tallies={"events": torch.zeros_like(state.step_size)} | state.tallies,
        )
        if not _continues(state.memory, view.ball, h):
            face, here = self._first(view, _numpy(state.w[0]), lam, h)
            memory = _memory(view, face, here, 0)
            state = replace(state, memory=memory, step_size=_tensor(view, self._guess(view, here)))
        _, here = _read(view, state)
        still = _Time((-np.inf, -np.inf), (0.0, 0.0), 0.0, -np.inf)
        state = replace(state, segment=_segment(state, state, here, here, still, np.zeros_like(h)))
        return _tallied(view, state).stopped(state.memory["dual"] == 0, Status.STATIONARY)

    def _first(self, view: _View, w: Array, lam: float, h: Array) -> tuple[_Face, _Point]:
        """The face to start on: from one corner of each group to the face QP over all that tie."""
        ball = view.ball
        leaders = np.lexsort((-ball.scale * np.abs(h), ball.group))[ball.starts]
        code = np.zeros(len(w), dtype=np.int64)
        code[leaders] = np.where(h[leaders] < 0, -1, 1)
        face = _Face(ball, code)
        here = view.moving(0.0, w, lam, h, view.root(w), face.centre)
        return _turned(view, face, here, face.clearance(h, here.u), 62 * here.noise)

    def _guess(self, view: _View, here: _Point) -> float:
        """A length for the first step of a piece."""
        bend = max(here.bend, 1e-300)
        if not view.objective.logarithmic:
            return here.dual / bend
        return min(self.rtol**0.25 / bend**0.5, 10 * max(1.0, abs(here.lam)) / max(here.dual, 1e-300))

    def _step(self, view: _View, state: State) -> State:
        """One attempt."""
        face, here = _read(view, state)
        # not past the end of the whole flow, where the gradient vanishes
        ds = min(float(state.step_size), 0.38 * here.dual / max(here.bend, 1e-300))
        start = face.clearance(here.h, here.u)
        slack = 128 * here.noise  # what is zero to rounding now may stay so
        level = np.where(start > slack, 0.0, np.minimum(start, 0.0) - slack)
        end, over = _end(view, face, here, start, level, ds)
        if end is None:
            return self._refused(view, state, ds / 4, here)
        middle = _Middle.of(view, face, here, end)
        excess = middle.excess(end, self.rtol, self.atol)
        if (middle.clearance < level - 1e-9).any():
            return self._refused(view, state, end.s / 2, here)
        if not excess <= 1:
            return self._refused(view, state, end.s * max(0.1, 0.8 * excess**-0.25), here)
        moved = _tallied(view, _moved(view, state, here, middle, end))
        if not over:
            size = end.s * min(8.0, 0.9 * max(excess, 1e-8) ** -0.25)
            moved = replace(moved, memory=_memory(view, face, end, 0), step_size=_tensor(view, size))
            return _judged(moved, end)
        face, after = _turned(view, face, end, face.clearance(end.h, end.u), level)
        stalled = int(state.memory["stalled"]) + 1 if end.s <= 1e-13 * end.size else 0
        moved = replace(
            moved,
            memory=_memory(view, face, after, stalled),
            step_size=_tensor(view, self._guess(view, after)),
            tallies=_plus(moved.tallies, events=1),
        )
        # more pieces of no length than there are corners: the choice between them goes round in rounding errors
        return _judged(moved.stopped(moved.memory["stalled"] > 20 + 2 * len(end.w), Status.STEP_TOO_SMALL), after)

    def _refused(self, view: _View, state: State, size: float, here: _Point) -> State:
        state = replace(state, step_size=_tensor(view, size), tallies=_plus(state.tallies, rejected=1))
        return _judged(_tallied(view, state), here)


def _end(view: _View, face: _Face, here: _Point, start: Array, level: Array, ds: float) -> tuple[_Point | None, bool]:
    """Where a step ends, and whether the piece ends there: at the first zero of the clearance over its level, by
    inverse interpolation through the points that have been visited. None where Newton's method fails."""
    end = view.settle(face, ds, here.w + ds * here.u)
    if end is None:
        return None, False
    low, high = here, end
    visited = [(0.0, start - level), (ds, face.clearance(end.h, end.u) - level)]
    if visited[1][1].min() >= 0:
        return end, False
    for turn in range(60):
        s = _first_zero(visited, low.s, high.s) if turn % 4 < 3 else 0.5 * (low.s + high.s)
        if not low.s < s < high.s:
            break
        point = view.settle(face, s, _between(low, high, (s - low.s) / (high.s - low.s)))
        if point is None:
            return None, False
        over = face.clearance(point.h, point.u) - level
        visited.append((s, over))
        if abs(over.min()) <= point.noise:
            return point, True
        low, high = (low, point) if over.min() < 0 else (point, high)
    return high, True


def _moved(view: _View, state: State, here: _Point, middle: "_Middle", end: _Point) -> State:
    """The state at the end of a step, its memory still to be written."""
    relative = 0.0
    if min(here.size, end.size) > 0:
        relative = end.s / float(torch.exp(log_mean_exp(*(torch.log(_tensor(view, p.size)) for p in (here, end)))))
    gains = {
        "steps": 1.0,
        "arclength": end.s,
        "relative": relative,
        "dissipated": end.s * (here.dual + 4 * middle.dual + end.dual) / 6,
    }
    readings = {name: state.readings[name] + gain for name, gain in gains.items()}
    readings["lam"] = _tensor(view, end.lam)
    readings["log_time"] = torch.logaddexp(state.readings["log_time"], _tensor(view, middle.time.log_elapsed))
    w = torch.as_tensor(end.w).to(state.w)[None]
    moved = replace(state, w=w, readings=readings, tallies=_plus(state.tallies, accepted=1))
    return replace(moved, segment=_segment(state, moved, here, end, middle.time, middle.bend))


def _tallied(view: _View, state: State) -> State:
    count, view.gradients = view.gradients, 0
    return replace(state, tallies=_plus(state.tallies, gradients=count))


def _judged(state: State, at: _Point) -> State:
    """The state, stopped where it cannot go on: what is left of a flow that ends is 0.5·‖h‖_*/‖Cu‖² at least."""
    floor = 4 * _EPS * float(np.abs(at.w).max())
    left = torch.full_like(state.step_size, 0.25 * at.dual / max(at.bend, 1e-300))
    state = state.stopped(left <= floor, Status.STATIONARY)
    return state.stopped(~(state.step_size > floor), Status.STEP_TOO_SMALL)


@dataclass(frozen=True)
class _Middle:
    """Half way along a step: ‖h‖_* there, what the cubic through both ends lacks, and how far each reading is off."""

    dual: float
    bend: Float[Array, " P"]
    defects: tuple[float, float, float]
    rise: float
    clearance: Float[Array, "3 P"]
    time: "_Time"

    @staticmethod
    def of(view: _View, face: _Face, here: _Point, end: _Point) -> "_Middle":
        w = _between(here, end, 0.5)
        lam, h = view.ascent(w)
        root = view.root(w)
        inverse = _Inverse(face.restrict(root.columns(face.free)))
        bend = face.expand(inverse.newton(face.restrict(h[face.free])))
        off = root.times(bend)
        dual = view.ball.dual(h)
        clearance = face.clearance(h - root.pull(off), face.velocity(root, inverse))
        ds = end.s - here.s
        cubic = 0.5 * (here.lam + end.lam) + 0.125 * ds * (here.dual - end.dual)
        simpson = ds * (here.dual + 4 * dual + end.dual) / 6
        defects = float(off @ off), cubic - lam, end.lam - here.lam - simpson
        return _Middle(dual, bend, defects, end.lam - here.lam, clearance, _Time.of(view, here, end, lam, dual))

    def excess(self, end: _Point, rtol: float, atol: float) -> float:
        """The errors of what is read inside the step, over their tolerances."""
        known = rtol + 64 * end.noise * (1 + self.rise)  # rounding of ‖h‖_* limits what its integral can tell
        level = max(abs(defect) for defect in self.defects) / known
        weights = np.abs(self.bend).max() / (atol + rtol * np.abs(end.w).max())
        return float(max(weights, level, abs(self.time.defect) / max(rtol, 1e-3)))


class _Time(NamedTuple):
    """log dt/dv and its derivative at both ends of a step, v = 0 and 1; the cubic's error at v = ½; log of the time
    that the step takes."""

    rates: tuple[float, float]
    slopes: tuple[float, float]
    defect: float
    log_elapsed: float

    @staticmethod
    def of(view: _View, here: _Point, end: _Point, lam: float, dual: float) -> "_Time":
        """From the level and ‖h‖_* in the middle; log dt/ds = Λ − log ‖h‖_*, without Λ where that is no logarithm."""
        ds = end.s - here.s
        duals = np.array([here.dual, dual, end.dual])
        a, m, b = np.log(duals)
        if view.objective.logarithmic:
            rates = np.array([here.lam, lam, end.lam]) - [a, m, b] + np.log(ds)
            slopes = ds * duals - [4 * m - 3 * a - b, b - a, a - 4 * m + 3 * b]
            halves = [
                log_elapsed(*(_tensor(view, x) for x in (*rates[i : i + 2], *(slopes[i : i + 2] / 2))))
                for i in (0, 1)
            ]
            elapsed = float(torch.logaddexp(*halves)) - np.log(2)
        else:  # ‖h‖_* is linear in s
            rates, slopes = np.log(ds) - np.array([a, m, b]), (here.dual - end.dual) / duals
            elapsed = np.log(ds) - float(log_mean_exp(_tensor(view, a), _tensor(view, b)))
        defect = 0.5 * (rates[0] + rates[2]) + 0.125 * (slopes[0] - slopes[2]) - rates[1]
        return _Time((rates[0], rates[2]), (slopes[0], slopes[2]), defect, elapsed)


def _between(a: _Point, b: _Point, v: float) -> Float[Array, " P"]:
    """Weights on the cubic through two points of a piece."""
    ds = b.s - a.s
    return hermite(v, a.w, b.w, ds * a.u, ds * b.u)  # type: ignore[arg-type, return-value]


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


def _turned(view: _View, face: _Face, at: _Point, start: Array, level: Array | float) -> tuple[_Face, _Point]:
    """The face of the next piece, and the point with the velocity along it."""
    tied = (start[:2] <= 64 * at.noise).ravel() | _in_use(face)
    forced = ((start - level)[:2] <= 2 * at.noise).ravel()
    root = view.root(at.w)
    face = _select(face, root, at.u, forced, tied, 8 * at.noise)
    return face, view.point(face, 0.0, at.w, at.lam, at.h)


def _in_use(face: _Face) -> Bool[Array, " 2P"]:
    rest = face.code == _REST
    return np.concatenate([rest | (face.code == 1), rest | (face.code == -1)])


def _continues(memory: dict[str, Tensor], ball: _Ball, h: Float[Array, " P"]) -> bool:
    """Whether a state was left by this method in this norm, so that going on takes up its face."""
    if "face" not in memory or not np.array_equal(_numpy(memory["ascent"][0]), h):
        return False
    u, dual = _numpy(memory["velocity"][0]), ball.dual(h)
    return abs(float(h @ u) - dual) <= 1e-9 * dual and abs(ball.value(u) - 1) <= 1e-9


def _memory(view: _View, face: _Face, at: _Point, stalled: int) -> dict[str, Tensor]:
    rows = {"face": face.code, "velocity": at.u, "ascent": at.h, "turn": at.turn}
    numbers = {"dual": at.dual, "stalled": float(stalled)}
    tensors = {name: torch.as_tensor(row).to(view.like.device)[None] for name, row in rows.items()}
    return tensors | {name: _tensor(view, number) for name, number in numbers.items()}


def _read(view: _View, state: State) -> tuple[_Face, _Point]:
    m, w = state.memory, _numpy(state.w[0])
    h, u, turn = (_numpy(m[name][0]) for name in ("ascent", "velocity", "turn"))
    here = _Point(0.0, w, float(state.readings["lam"]), h, float(m["dual"]), view.ball.value(w), u, turn)
    return _Face(view.ball, _numpy(m["face"][0])), here


def _segment(state: State, moved: State, here: _Point, end: _Point, time: _Time, bend: Array) -> Segment:
    """The step from ``state`` to ``moved``."""
    like, ds = state.w, end.s - here.s

    def row(a: Array) -> Tensor:
        return torch.as_tensor(a).to(like)[None]

    def one(a: float) -> Tensor:
        return torch.full_like(state.step_size, a)

    return Segment(
        w0=state.w,
        w1=moved.w,
        slope0=row(ds * here.u),
        slope1=row(ds * end.u),
        readings0=state.readings,
        readings1=moved.readings,
        lam_slope0=one(ds * here.dual),
        lam_slope1=one(ds * end.dual),
        time_rate0=one(time.rates[0]),
        time_rate1=one(time.rates[1]),
        time_slope0=one(time.slopes[0]),
        time_slope1=one(time.slopes[1]),
        bend=row(bend),
    )


def _rows(step: Callable[[Objective, State, int], State], objective: Objective, state: State) -> State:
    """Each trajectory on its own, since their pieces end at different places."""
    done = []
    for b in range(len(state.status)):
        rows = torch.tensor([b], device=state.w.device)
        done.append(step(objective.select(rows), state.select(rows), b))
    return tree_map(lambda *parts: torch.cat(parts), *done)


def _plus(tallies: dict[str, Tensor], **counts: float) -> dict[str, Tensor]:
    return tallies | {name: tallies[name] + count for name, count in counts.items()}


def _tensor(view: _View, number: float) -> Tensor:
    return torch.full((1,), float(number), dtype=torch.float64, device=view.like.device)


def _numpy(tensor: Tensor) -> Array:
    return tensor.detach().cpu().numpy()

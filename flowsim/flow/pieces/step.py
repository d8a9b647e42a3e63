"""Steepest flows of convex objectives in polyhedral norms, piece by piece and without an
integration error.

The unit ball is taken as ‖v‖ = max over groups g of Σ_{k∈g} |v_k|/c_k: ℓ∞ has a group for each
weight, ℓ1 a single group, and a maximum over blocks of both the groups of its blocks. A steepest
direction of h = ∇(level) puts, in each group, a mixture on the corners ±c_k e_k where c_k|h_k| is
largest. While the corners in use stay the same the weights move in an affine space, with arclength
s as one coordinate, and the level is stationary along all the others:

    w(s) ∈ w(0) + s·(centre of the face) + E y,    Eᵀ h(w(s)) = 0.

So Newton's method finds the end of a step of any length to rounding. A piece ends where a share
falls to zero or another corner ties; then the face QP, min vᵀ(−∇²level)v over all the tied corners,
selects the corners of the next."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import ClassVar, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from numpy import ndarray as Array
from torch import Tensor

from flowsim.flow.field import Field
from flowsim.flow.pieces.points import Evaluation, OnPiece, View, as_numpy, following
from flowsim.flow.pieces.polytope import EPS, Corners
from flowsim.flow.steps import Controller, Method, added
from flowsim.motion.clocks import ARCLENGTH, Clock, Target
from flowsim.motion.rule import advance_by_steps
from flowsim.motion.segment import Segment
from flowsim.motion.state import State, Status, tree_map
from flowsim.numerics.quadrature import hermite, log_elapsed, log_mean_exp
from flowsim.problems.objective import Objective

_CONTROL = Controller(order=4, safety=0.9, least=0.1, most=8.0)
_AFTER_A_REFUSAL = Controller(order=4, safety=0.8, least=0.1, broken=0.1)


@dataclass(frozen=True)
class ExactPieces(Method):
    """The method for convex objectives (linear models with any loss, quadratics) in ℓ1, ℓ∞ and
    their maxima over blocks: every step ends on the flow to rounding, whatever ``rtol``, which
    bounds only what is read inside steps.

    Where the loss does not determine the flow, as along duplicated features, the shortest velocity
    in ℓ2 is taken. One step is the rest of a piece, or as much of it as can be read off the step to
    the tolerance: weights to ``atol + rtol·max|w|``, the level to ``rtol`` and log t to the larger
    of ``rtol`` and 10⁻³."""

    own_clock: ClassVar[Clock | None] = ARCLENGTH

    def start(self, field: Field, objective: Objective, state: State) -> State:
        if state.w.dtype != torch.float64:
            raise ValueError(
                f"ExactPieces: got weights of {state.w.dtype}, expected float64, try w0.double()"
            )
        if not objective.convex:
            raise ValueError(
                "ExactPieces: got an objective that is not convex, expected a linear model or a Quadratic, "
                "try SmallStep for the small-step path"
            )
        return _rows(
            lambda part, row, b: self._begin(field, View(field, part, row.w), row), objective, state
        )

    def advance(
        self, field: Field, objective: Objective, state: State, until: Target, budget: int
    ) -> State:
        def run(part: Objective, row: State, b: int) -> State:
            view = View(field, part, row.w)
            goal = until.select(torch.tensor([b], device=row.w.device))
            return advance_by_steps(
                lambda _, local: self._step(field, view, local), part, row, goal, budget
            )

        return _rows(run, objective, state)

    def _begin(self, field: Field, view: View, state: State) -> State:
        """On with the face that the state remembers, or with the one that the face QP selects."""
        spot, ball = Evaluation(view, as_numpy(state.w[0])), view.ball
        if _continues(state, spot):
            here = OnPiece(spot, Corners(ball, as_numpy(state.memory["face"][0])))
        else:
            first = np.zeros(len(spot.w), dtype=np.int64)  # from the steepest corner of each group
            leaders = np.lexsort((-ball.scale * np.abs(spot.h), ball.group))[ball.starts]
            first[leaders] = np.where(spot.h[leaders] < 0, -1, 1)
            here = following(
                OnPiece(spot, Corners(ball, first)), 62 * spot.noise
            )  # all that are equal to rounding
            state = replace(state, step_size=view.tensor(self._guess(field, here)))
        still = _Time((-np.inf, -np.inf), (0.0, 0.0), 0.0, -np.inf)
        readings = state.readings | {"lam": view.tensor(spot.lam)}
        tallies = {"events": torch.zeros_like(state.step_size)} | state.tallies
        state = _counted(
            view, replace(state, readings=readings, tallies=tallies, memory=_memory(here, 0))
        )
        state = replace(
            state, segment=_segment(state, state, here, here, 0.0, still, np.zeros_like(spot.h))
        )
        return state.stopped(state.memory["dual_norm"] == 0, Status.STATIONARY)

    def _guess(self, field: Field, here: OnPiece) -> float:
        """A length for the first step of a piece: along it the loss weighs the examples in much the
        same way."""
        if not here.spot.view.objective.logarithmic:
            return here.spot.dual / here.bend
        return min(
            field.rtol**0.25 / here.bend**0.5,
            10 * max(1.0, abs(here.spot.lam)) / max(here.spot.dual, 1e-300),
        )

    def _step(self, field: Field, view: View, state: State) -> State:
        """One attempt."""
        here = view.recall(state)
        slack = 2 * here.noise  # what is zero to rounding now may stay so
        level = np.where(here.clearance > slack, 0.0, np.minimum(here.clearance, 0.0) - slack)
        end, ds, over = _end(view, here, level, self._reach(here, level, float(state.step_size)))
        if end is None:
            return _refused(view, state, ds / 4, here)
        middle = _Middle.of(here, end, ds)
        excess = middle.excess(end, field.rtol, field.atol)
        if (middle.clearance < level - 1e-6).any():
            return _refused(view, state, ds / 2, here)
        if not excess <= 1:
            factor = _AFTER_A_REFUSAL.factor(torch.tensor(excess, dtype=torch.float64))
            return _refused(view, state, ds * float(factor), here)
        moved = _moved(state, here, middle, end, ds)
        if over:
            stalled = int(state.memory["stalled"]) + 1 if ds <= 1e-13 * end.spot.size else 0
            end = following(end, level)
            size, tallies = self._guess(field, end), added(moved, events=1)
            moved = replace(moved, memory=_memory(end, stalled), tallies=tallies)
            # more pieces of no length than there are corners: the choice goes round in rounding
            # errors
            moved = moved.stopped(
                moved.memory["stalled"] > 20 + 2 * len(here.spot.w), Status.STEP_TOO_SMALL
            )
        else:
            size = ds * float(_CONTROL.factor(torch.tensor(excess, dtype=torch.float64)))
            moved = replace(moved, memory=_memory(end, 0))
        view.last = end
        return _judged(_counted(view, replace(moved, step_size=view.tensor(size))), end)

    def _reach(self, here: OnPiece, level: Array, size: float) -> float:
        """How far to try: not past the end of the whole flow, where the gradient vanishes, and not
        much past the first corner that will tie if all goes on as now."""
        over = (here.clearance - level)[:2]
        falling = here.closing > 0
        ties = (over[falling] / here.closing[falling]).min(initial=np.inf)
        return float(min(size, 0.38 * here.spot.dual / here.bend, 1.1 * ties))


def _end(view: View, here: OnPiece, level: Array, ds: float) -> tuple[OnPiece | None, float, bool]:
    """Where a step ends, after what length, and whether the piece ends there: at the first zero of
    the clearance over its level, by inverse interpolation through the points that have been
    visited. No point where Newton's method fails."""
    end = view.settle(here.face, here.spot.w + ds * here.u, here.inverse)
    if end is None or (end.clearance >= level).all():
        return end, ds, False
    (low, a), (high, b) = (0.0, here), (ds, end)
    visited = [(low, a.clearance - level), (high, b.clearance - level)]
    for turn in range(60):
        s = _first_zero(visited, low, high) if turn % 4 < 3 else 0.5 * (low + high)
        if not low < s < high:
            break
        point = view.settle(
            here.face, _between(a, b, high - low, (s - low) / (high - low)), b.inverse
        )
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
    """The first zero between two arclengths of quantities that are known at visited ones, positive
    at the first."""
    ends = {s: f for s, f in visited if s in (low, high)}
    near = [*ends.items(), *(p for p in visited[-4:] if p[0] not in ends)][:4]
    falling = ends[high] < 0
    s, f = np.array([p[0] for p in near])[:, None], np.stack([p[1][falling] for p in near])
    secant = low + (high - low) * ends[low][falling] / (ends[low][falling] - ends[high][falling])
    inverse = np.zeros(f.shape[1])
    with np.errstate(divide="ignore", invalid="ignore"):
        for i in range(len(near)):
            inverse += s[i] * np.prod(
                [f[j] / (f[j] - f[i]) for j in range(len(near)) if j != i], axis=0
            )
    return float(np.where((inverse > low) & (inverse < high), inverse, secant).min())


class _Middle(NamedTuple):
    """Half way along a step: ‖h‖_* there, what the cubic through both ends lacks, and how far each
    reading is off."""

    dual: float
    bend: Float[Array, " P"]
    defect: float
    clearance: Float[Array, "3 P"]
    time: "_Time"

    @staticmethod
    def of(here: OnPiece, end: OnPiece, ds: float) -> "_Middle":
        a, b, face = here.spot, end.spot, here.face
        spot = Evaluation(a.view, _between(here, end, ds, 0.5))
        slope = face.restrict(spot.h[face.free])
        lack = end.inverse.newton(slope)
        u = 1.5 * (b.w - a.w) / ds - 0.25 * (here.u + end.u)
        clearance = np.concatenate(
            [face.missing(spot.h / max(spot.dual, 1e-300)), face.shares(u)[None]]
        )
        cubic = 0.5 * (a.lam + b.lam) + 0.125 * ds * (a.dual - b.dual) - spot.lam
        simpson = ds * (a.dual + 4 * spot.dual + b.dual) / 6 - (b.lam - a.lam)
        defects = abs(float(slope @ lack)), max(abs(cubic), abs(simpson)) / (1 + abs(b.lam - a.lam))
        time = _Time.of(ds, a, spot, b)
        return _Middle(spot.dual, face.expand(lack), max(defects), clearance, time)

    def excess(self, end: OnPiece, rtol: float, atol: float) -> float:
        """The errors of what is read inside the step, over their tolerances."""
        weights = np.abs(self.bend).max() / (atol + rtol * np.abs(end.spot.w).max())
        noise = end.noise  # of ‖h‖_*, whose integrals cannot tell more
        return float(
            max(
                weights,
                self.defect / (rtol + noise),
                abs(self.time.defect) / (max(rtol, 1e-3) + noise),
            )
        )


class _Time(NamedTuple):
    """log dt/dv and its derivative at both ends of a step, v = 0 and 1; the cubic's error at v = ½;
    log of the time that the step takes."""

    rates: tuple[float, float]
    slopes: tuple[float, float]
    defect: float
    log_elapsed: float

    @staticmethod
    def of(ds: float, *spots: Evaluation) -> "_Time":
        """From start, middle and end. log dt/ds = Λ − log ‖h‖_*, without Λ where the level is no
        logarithm."""
        view = spots[0].view
        lams, duals = np.array([p.lam for p in spots]), np.array([p.dual for p in spots])
        a, m, b = np.log(np.maximum(duals, 1e-300))
        if view.objective.logarithmic:
            rates = lams - [a, m, b] + np.log(ds)
            slopes = ds * duals - [4 * m - 3 * a - b, b - a, a - 4 * m + 3 * b]
            halves = [
                log_elapsed(*(view.tensor(x) for x in (*rates[i : i + 2], *slopes[i : i + 2] / 2)))
                for i in (0, 1)
            ]
            elapsed = float(torch.logaddexp(*halves)) - np.log(2)
        else:  # ‖h‖_* is linear in s
            rates, slopes = np.log(ds) - np.array([a, m, b]), (duals[0] - duals[2]) / duals
            elapsed = np.log(ds) - float(log_mean_exp(view.tensor(a), view.tensor(b)))
        defect = 0.5 * (rates[0] + rates[2]) + 0.125 * (slopes[0] - slopes[2]) - rates[1]
        return _Time((rates[0], rates[2]), (slopes[0], slopes[2]), defect, elapsed)


def _between(a: OnPiece, b: OnPiece, ds: float, v: float) -> Float[Array, " P"]:
    """Weights on the cubic through two points of a piece."""
    return hermite(v, a.spot.w, b.spot.w, ds * a.u, ds * b.u)  # type: ignore[arg-type, return-value]


# --------------------------------------------------------------------------------------------------
# States
# --------------------------------------------------------------------------------------------------


def _rows(
    step: Callable[[Objective, State, int], State], objective: Objective, state: State
) -> State:
    """Each trajectory on its own, since their pieces end at different places."""
    done = []
    for b in range(len(state.status)):
        rows = torch.tensor([b], device=state.w.device)
        done.append(step(objective.select(rows), state.select(rows), b))
    return tree_map(lambda *parts: torch.cat(parts), *done)


def _continues(state: State, spot: Evaluation) -> bool:
    """Whether a flow of this objective in this norm has left the state, so that its face goes
    on."""
    if "face" not in state.memory or not np.array_equal(
        as_numpy(state.memory["ascent"][0]), spot.h
    ):
        return False
    u = as_numpy(state.memory["velocity"][0])
    return (
        abs(float(spot.h @ u) / max(spot.dual, 1e-300) - 1) < 1e-6
        and abs(spot.view.ball.value(u) - 1) < 1e-6
    )


def _memory(at: OnPiece, stalled: int) -> dict[str, Tensor]:
    rows = {"face": at.face.code, "velocity": at.u, "ascent": at.spot.h}
    numbers = {"dual_norm": at.spot.dual, "stalled": float(stalled)}
    tensor = at.spot.view.tensor
    return {name: tensor(row) for name, row in rows.items()} | {
        name: tensor(x) for name, x in numbers.items()
    }


def _moved(state: State, here: OnPiece, middle: _Middle, end: OnPiece, ds: float) -> State:
    """The state at the end of a step, its memory still to be written."""
    a, b, tensor = here.spot, end.spot, here.spot.view.tensor
    relative = 0.0  # at w = 0 it is infinite, and counts from the first point that is not
    if min(a.size, b.size) > 0:
        relative = ds / float(
            torch.exp(log_mean_exp(tensor(np.log(a.size)), tensor(np.log(b.size))))
        )
    gains = {
        "steps": 1.0,
        "arclength": ds,
        "relative": relative,
        "dissipated": ds * (a.dual + 4 * middle.dual + b.dual) / 6,
    }
    readings = {name: state.readings[name] + gain for name, gain in gains.items()}
    readings["lam"] = tensor(b.lam)
    readings["log_time"] = torch.logaddexp(
        state.readings["log_time"], tensor(middle.time.log_elapsed)
    )
    moved = replace(state, w=tensor(b.w), readings=readings, tallies=added(state, accepted=1))
    return replace(moved, segment=_segment(state, moved, here, end, ds, middle.time, middle.bend))


def _refused(view: View, state: State, size: float, here: OnPiece) -> State:
    view.last = here
    state = replace(state, step_size=view.tensor(size), tallies=added(state, rejected=1))
    return _judged(_counted(view, state), here)


def _judged(state: State, at: OnPiece) -> State:
    """The state, stopped where it cannot go on. A flow that ends does so about ‖h‖_*/‖Cu‖² further
    on."""
    left, size = at.spot.dual / at.bend, float(np.abs(at.spot.w).max())
    stuck, blind = not float(state.step_size) > 4 * EPS * size, at.noise > 1e-2
    if (
        at.spot.dual < 1e-290
        or left <= 256 * EPS * size
        or ((blind or stuck) and left <= 1e-6 * size)
    ):
        status = Status.STATIONARY
    elif blind:
        status = Status.PRECISION_FLOOR
    else:
        status = Status.STEP_TOO_SMALL if stuck else Status.RUNNING
    return state.stopped(state.running, status)


def _counted(view: View, state: State) -> State:
    count, view.gradients = view.gradients, 0
    return replace(state, tallies=added(state, gradients=count))


def _segment(
    state: State, moved: State, here: OnPiece, end: OnPiece, ds: float, time: _Time, bend: Array
) -> Segment:
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

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

from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
import torch
from jaxtyping import Float
from numpy import ndarray as Array
from torch import Tensor

from flowsim.flow.field import Field, memory_of
from flowsim.flow.pieces.dense_output import PieceStep
from flowsim.flow.pieces.points import (
    EPS,
    TINY,
    Evaluation,
    OnPiece,
    View,
    as_numpy,
    following,
    newton,
)
from flowsim.flow.pieces.polytope import Corners
from flowsim.flow.steps import Controller, Method, added, begun, without_size
from flowsim.motion.clocks import ARCLENGTH, Clock, Target
from flowsim.motion.rule import one_by_one, pending
from flowsim.motion.state import State, Status
from flowsim.problems.objective import Objective

_CONTROL = Controller(order=4, safety=0.9, least=0.1, most=8.0)
_AFTER_A_REFUSAL = Controller(order=4, safety=0.8, least=0.1, broken=0.1)

_Level = Float[Array, "3 P"]


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
                "ExactPieces: got an objective that is not convex, expected a linear model or a "
                "Quadratic, try SmallStep for the small-step path"
            )

        def run(part: Objective, local: State) -> State:
            return _begun(View(field, part, local.w.device), local)

        return one_by_one(run, objective, state)

    def advance(
        self, field: Field, objective: Objective, state: State, until: Target, budget: int
    ) -> State:
        def run(part: Objective, local: State, goal: Target) -> State:
            view = View(field, part, local.w.device)
            at = Evaluation(view, as_numpy(local.w[0]))
            here = _remembered(at, local)
            for _ in range(budget):
                here, local = _attempted(here, local)
                if not bool(pending(local, goal)):
                    break
            return replace(local, tallies=added(local, gradients=view.gradients))

        return one_by_one(run, objective, state, until)


# --------------------------------------------------------------------------------------------------
# Starts
# --------------------------------------------------------------------------------------------------


def _begun(view: View, state: State) -> State:
    """On with the face that the state remembers, or with the one that the face QP selects."""
    at = Evaluation(view, as_numpy(state.w[0]))
    if _continues(state, at):
        here = _remembered(at, state)
    else:
        steepest = OnPiece(at, Corners.steepest(view.ball, at.h))
        here = following(steepest, 62 * at.noise)  # all that are equal to rounding
        state = without_size(state)
    none = {"events": torch.zeros_like(state.step_size)}
    state = replace(state, tallies=none | state.tallies)
    size = view.tensor(_guess(here))
    memory = _face_memory(here, 0)
    return begun(view.objective, state, here.sample, size, memory)


def _continues(state: State, at: Evaluation) -> bool:
    """Whether a flow of this objective in this norm has left the state, so that its face goes
    on."""
    memory = state.memory
    if "face" not in memory:
        return False
    h = as_numpy(memory["ascent"][0])
    if not np.array_equal(h, at.h):
        return False
    u = as_numpy(memory["velocity"][0])
    slope = float(at.unit @ u)
    length = at.view.ball.value(u)
    return abs(slope - 1) < 1e-6 and abs(length - 1) < 1e-6


def _remembered(at: Evaluation, state: State) -> OnPiece:
    """On the face of a state."""
    code = as_numpy(state.memory["face"][0])
    face = Corners(at.view.ball, code)
    return OnPiece(at, face)


def _face_memory(here: OnPiece, stalled: int) -> dict[str, Tensor]:
    tensor = here.at.view.tensor
    code = tensor(here.face.code)
    return {"face": code, "stalled": tensor(stalled)}


# --------------------------------------------------------------------------------------------------
# Steps
# --------------------------------------------------------------------------------------------------


def _attempted(here: OnPiece, state: State) -> tuple[OnPiece, State]:
    """After one attempt."""
    level = _least_clearance(here)
    reach = _reach(here, level, float(state.step_size))
    end, ds, over = _end(here, level, reach)
    if end is None:
        return _refused(here, state, ds / 4)
    step = PieceStep(here, end, ds)
    field = here.at.view.field
    if (step.clearance < level - 1e-6).any():
        return _refused(here, state, ds / 2)
    error = step.excess(field.rtol, field.atol)
    excess = torch.tensor(error, dtype=torch.float64)
    if not excess <= 1:
        factor = _AFTER_A_REFUSAL.factor(excess)
        return _refused(here, state, ds * float(factor))
    moved = _moved(step, state)
    if over:
        return _next_piece(step, moved, level)
    factor = _CONTROL.factor(excess)
    moved = _with_memory(moved, end, ds * float(factor), 0)
    return end, _stop_if_stuck(end, moved)


def _least_clearance(here: OnPiece) -> _Level:
    """Below which the piece ends: what is zero to rounding now may stay so."""
    slack = 2 * here.noise
    lowered = np.minimum(here.clearance, 0.0) - slack
    return np.where(here.clearance > slack, 0.0, lowered)


def _with_memory(state: State, here: OnPiece, size: float, stalled: int) -> State:
    """The state with what the next step needs to know."""
    memory = memory_of(here.sample) | _face_memory(here, stalled)
    step_size = here.at.view.tensor(size)
    return replace(state, step_size=step_size, memory=memory)


def _guess(here: OnPiece) -> float:
    """A length for the first step of a piece: along it the loss weighs the examples in much the
    same way."""
    at = here.at
    if not at.view.objective.logarithmic:
        return here.left
    rise = max(1.0, abs(at.lam))
    tenfold = 10 * rise / max(at.dual_norm, TINY)
    rtol = at.view.field.rtol
    straight = rtol**0.25 / here.curvature**0.5
    return min(straight, tenfold)


def _reach(here: OnPiece, level: _Level, size: float) -> float:
    """How far to try: not past the end of the whole flow, where the gradient vanishes, and not much
    past the first corner that will tie if all goes on as now."""
    over = here.clearance - level
    falling = here.closing > 0
    ties = over[:2][falling] / here.closing[falling]
    tie = ties.min(initial=np.inf)
    vanishing = 0.38 * here.at.dual_norm / here.curvature
    return float(min(size, vanishing, 1.1 * tie))


def _end(here: OnPiece, level: _Level, ds: float) -> tuple[OnPiece | None, float, bool]:
    """Where a step ends, after what length, and whether the piece ends there: at the first zero of
    the clearance over its level, by inverse interpolation through the points that have been
    visited. No point where Newton's method fails."""
    end = newton(here, here.at.w + ds * here.u)
    if end is None or (end.clearance >= level).all():
        return end, ds, False
    low = 0.0
    high = ds
    a = here
    b = end
    visited = {
        low: a.clearance - level,
        high: b.clearance - level,
    }
    for turn in range(60):
        s = 0.5 * (low + high)
        if turn % 4 < 3:
            s = _first_zero(visited, low, high)
        if not low < s < high:
            break
        between = PieceStep(a, b, high - low)
        v = (s - low) / (high - low)
        point = newton(b, between.at(v))
        if point is None:
            return None, s, False
        over = point.clearance - level
        visited[s] = over
        if abs(over.min()) <= point.noise / 64:
            return point, s, True
        if over.min() < 0:
            high = s
            b = point
        else:
            low = s
            a = point
    return b, high, True


def _first_zero(visited: dict[float, _Level], low: float, high: float) -> float:
    """The first zero between two arclengths of quantities that are known at visited ones, positive
    at the first."""
    ends = [s for s in visited if s in (low, high)]
    latest = list(visited)[-4:]
    others = [s for s in latest if s not in ends]
    near = [*ends, *others][:4]
    falling = visited[high] < 0
    f = {s: visited[s][falling] for s in near}
    fall = f[low] - f[high]
    secant = low + (high - low) * f[low] / fall
    inverse = np.zeros_like(secant)
    with np.errstate(divide="ignore", invalid="ignore"):
        for s in near:
            inverse += s * _weight_at_zero(f, s)
    inside = (inverse > low) & (inverse < high)
    zeros = np.where(inside, inverse, secant)
    return float(zeros.min())


def _weight_at_zero(f: dict[float, Array], s: float) -> Array | float:
    """Of s, in the polynomial that takes the values of f to their arclengths."""
    weight = 1.0
    for r in f:
        if r != s:
            weight = weight * (f[r] / (f[r] - f[s]))
    return weight


def _moved(step: PieceStep, state: State) -> State:
    """The state at the end of a step, its memory still to be written."""
    end = step.end.at
    tensor = end.view.tensor
    before = state.readings
    elapsed = tensor(step.time.log_elapsed)
    readings = {
        "steps": before["steps"] + 1,
        "arclength": before["arclength"] + step.ds,
        "relative": before["relative"] + step.relative,
        "dissipated": before["dissipated"] + step.dissipated,
        "lam": tensor(end.lam),
        "log_time": torch.logaddexp(before["log_time"], elapsed),
    }
    w = tensor(end.w)
    return replace(
        state,
        w=w,
        readings=readings,
        tallies=added(state, accepted=1),
        segment=step.segment(state, w, readings),
    )


def _next_piece(step: PieceStep, state: State, level: _Level) -> tuple[OnPiece, State]:
    """On the piece that begins where a step has ended."""
    end = following(step.end, level)
    still = step.ds <= 1e-13 * step.end.at.length
    stalled = int(state.memory["stalled"]) + 1 if still else 0
    state = replace(state, tallies=added(state, events=1))
    state = _with_memory(state, end, _guess(end), stalled)
    # more pieces of no length than there are corners: the choice goes round in rounding errors
    corners = 2 * len(end.at.w)
    round_and_round = state.memory["stalled"] > 20 + corners
    state = state.stopped(round_and_round, Status.STEP_TOO_SMALL)
    return end, _stop_if_stuck(end, state)


def _refused(here: OnPiece, state: State, size: float) -> tuple[OnPiece, State]:
    state = replace(
        state,
        step_size=here.at.view.tensor(size),
        tallies=added(state, rejected=1),
    )
    return here, _stop_if_stuck(here, state)


def _stop_if_stuck(here: OnPiece, state: State) -> State:
    """The state, stopped where it cannot go on."""
    largest = float(np.abs(here.at.w).max())
    stuck = not float(state.step_size) > 4 * EPS * largest
    blind = here.noise > 1e-2
    near = 1e-6 if blind or stuck else 256 * EPS
    if here.at.dual_norm < 1e-290 or here.left <= near * largest:
        status = Status.STATIONARY
    elif blind:
        status = Status.PRECISION_FLOOR
    elif stuck:
        status = Status.STEP_TOO_SMALL
    else:
        status = Status.RUNNING
    return state.stopped(state.running, status)

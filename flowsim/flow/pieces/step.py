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
            here = _remembered(view, local)
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
        here = OnPiece(at, Corners(view.ball, as_numpy(state.memory["face"][0])))
    else:
        steepest = OnPiece(at, Corners.steepest(view.ball, at.h))
        here = following(steepest, 62 * at.noise)  # all that are equal to rounding
        state = without_size(state)
    state = replace(state, tallies={"events": torch.zeros_like(state.step_size)} | state.tallies)
    return begun(
        view.objective, state, here.sample, view.tensor(_guess(here)), _face_memory(here, 0)
    )


def _continues(state: State, at: Evaluation) -> bool:
    """Whether a flow of this objective in this norm has left the state, so that its face goes
    on."""
    memory = state.memory
    if "face" not in memory or not np.array_equal(as_numpy(memory["ascent"][0]), at.h):
        return False
    u = as_numpy(memory["velocity"][0])
    steepest = abs(float(at.unit @ u) - 1) < 1e-6
    return steepest and abs(at.view.ball.value(u) - 1) < 1e-6


def _remembered(view: View, state: State) -> OnPiece:
    """Where a state is."""
    face = Corners(view.ball, as_numpy(state.memory["face"][0]))
    return OnPiece(Evaluation(view, as_numpy(state.w[0])), face)


def _face_memory(here: OnPiece, stalled: int) -> dict[str, Tensor]:
    tensor = here.at.view.tensor
    return {"face": tensor(here.face.code), "stalled": tensor(stalled)}


# --------------------------------------------------------------------------------------------------
# Steps
# --------------------------------------------------------------------------------------------------


def _attempted(here: OnPiece, state: State) -> tuple[OnPiece, State]:
    """After one attempt."""
    slack = 2 * here.noise  # what is zero to rounding now may stay so
    level = np.where(here.clearance > slack, 0.0, np.minimum(here.clearance, 0.0) - slack)
    end, ds, over = _end(here, level, _reach(here, level, float(state.step_size)))
    if end is None:
        return _refused(here, state, ds / 4)
    step = PieceStep(here, end, ds)
    field = here.at.view.field
    if (step.clearance < level - 1e-6).any():
        return _refused(here, state, ds / 2)
    excess = torch.tensor(step.excess(field.rtol, field.atol), dtype=torch.float64)
    if not excess <= 1:
        return _refused(here, state, ds * float(_AFTER_A_REFUSAL.factor(excess)))
    moved = _moved(step, state)
    if over:
        return _next_piece(step, moved, level)
    size = end.at.view.tensor(ds * float(_CONTROL.factor(excess)))
    moved = replace(moved, step_size=size, memory=memory_of(end.sample) | _face_memory(end, 0))
    return end, _stop_if_stuck(end, moved)


def _guess(here: OnPiece) -> float:
    """A length for the first step of a piece: along it the loss weighs the examples in much the
    same way."""
    at = here.at
    if not at.view.objective.logarithmic:
        return at.dual_norm / here.curvature
    tenfold = 10 * max(1.0, abs(at.lam)) / max(at.dual_norm, TINY)
    return min(at.view.field.rtol**0.25 / here.curvature**0.5, tenfold)


def _reach(here: OnPiece, level: _Level, size: float) -> float:
    """How far to try: not past the end of the whole flow, where the gradient vanishes, and not much
    past the first corner that will tie if all goes on as now."""
    over = (here.clearance - level)[:2]
    falling = here.closing > 0
    tie = (over[falling] / here.closing[falling]).min(initial=np.inf)
    return float(min(size, 0.38 * here.at.dual_norm / here.curvature, 1.1 * tie))


def _end(here: OnPiece, level: _Level, ds: float) -> tuple[OnPiece | None, float, bool]:
    """Where a step ends, after what length, and whether the piece ends there: at the first zero of
    the clearance over its level, by inverse interpolation through the points that have been
    visited. No point where Newton's method fails."""
    end = newton(here, here.at.w + ds * here.u)
    if end is None or (end.clearance >= level).all():
        return end, ds, False
    (low, a), (high, b) = (0.0, here), (ds, end)
    visited = [(low, a.clearance - level), (high, b.clearance - level)]
    for turn in range(60):
        s = _first_zero(visited, low, high) if turn % 4 < 3 else 0.5 * (low + high)
        if not low < s < high:
            break
        w = PieceStep(a, b, high - low).at((s - low) / (high - low))
        point = newton(b, w)
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


def _first_zero(visited: list[tuple[float, _Level]], low: float, high: float) -> float:
    """The first zero between two arclengths of quantities that are known at visited ones, positive
    at the first."""
    ends = {s: f for s, f in visited if s in (low, high)}
    near = [*ends.items(), *(p for p in visited[-4:] if p[0] not in ends)][:4]
    falling = ends[high] < 0
    s = [p[0] for p in near]
    f = np.stack([p[1][falling] for p in near])
    first = ends[low][falling]
    last = ends[high][falling]
    secant = low + (high - low) * first / (first - last)
    inverse = np.zeros(f.shape[1])
    with np.errstate(divide="ignore", invalid="ignore"):
        for i in range(len(near)):
            others = [f[j] / (f[j] - f[i]) for j in range(len(near)) if j != i]
            inverse += s[i] * np.prod(others, axis=0)
    return float(np.where((inverse > low) & (inverse < high), inverse, secant).min())


def _moved(step: PieceStep, state: State) -> State:
    """The state at the end of a step, its memory still to be written."""
    end = step.end.at
    tensor = step.end.at.view.tensor
    gains = {
        "steps": 1.0,
        "arclength": step.ds,
        "relative": step.relative,
        "dissipated": step.dissipated,
    }
    readings = {name: state.readings[name] + gain for name, gain in gains.items()}
    elapsed = tensor(step.time.log_elapsed)
    readings["lam"] = tensor(end.lam)
    readings["log_time"] = torch.logaddexp(state.readings["log_time"], elapsed)
    w = tensor(end.w)
    segment = step.segment(state, w, readings)
    tallies = added(state, accepted=1)
    return replace(state, w=w, readings=readings, tallies=tallies, segment=segment)


def _next_piece(step: PieceStep, state: State, level: _Level) -> tuple[OnPiece, State]:
    """On the piece that begins where a step has ended."""
    end = following(step.end, level)
    still = step.ds <= 1e-13 * step.end.at.length
    stalled = int(state.memory["stalled"]) + 1 if still else 0
    state = replace(
        state,
        step_size=end.at.view.tensor(_guess(end)),
        memory=memory_of(end.sample) | _face_memory(end, stalled),
        tallies=added(state, events=1),
    )
    # more pieces of no length than there are corners: the choice goes round in rounding errors
    round_and_round = state.memory["stalled"] > 20 + 2 * len(end.at.w)
    return end, _stop_if_stuck(end, state.stopped(round_and_round, Status.STEP_TOO_SMALL))


def _refused(here: OnPiece, state: State, size: float) -> tuple[OnPiece, State]:
    tallies = added(state, rejected=1)
    state = replace(state, step_size=here.at.view.tensor(size), tallies=tallies)
    return here, _stop_if_stuck(here, state)


def _stop_if_stuck(here: OnPiece, state: State) -> State:
    """The state, stopped where it cannot go on. A flow that ends does so about ‖h‖_*/‖Cu‖² further
    on."""
    left = here.at.dual_norm / here.curvature
    largest = float(np.abs(here.at.w).max())
    stuck = not float(state.step_size) > 4 * EPS * largest
    blind = here.noise > 1e-2
    near_its_end = left <= (1e-6 if blind or stuck else 256 * EPS) * largest
    if here.at.dual_norm < 1e-290 or near_its_end:
        status = Status.STATIONARY
    elif blind:
        status = Status.PRECISION_FLOOR
    else:
        status = Status.STEP_TOO_SMALL if stuck else Status.RUNNING
    return state.stopped(state.running, status)

"""Steepest flow in any norm by implicit steps of second order: `MinimisingMovement`.

A step of arclength ε is two minimising movements (`movement`), the stages of a stiffly accurate
Runge–Kutta method (Alexander 1977),

    w₁ = w + γε v₁,   w₂ = w + (1 − γ)ε v₁ + γε v₂,   γ = 1 − 1/√2,

each with the direction that is steepest at its own end.
"""

import math
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from flowsim.convex.balls import supports_ball
from flowsim.convex.smoothed import supports_smoothing
from flowsim.flow.field import Field, Sample, memory_of, sample_of
from flowsim.flow.movements.convex import ConvexMover
from flowsim.flow.movements.movement import Guess, Movement, Mover
from flowsim.flow.movements.net import NetMover
from flowsim.flow.movements.trial import STAGE, MovementTrial
from flowsim.flow.steps import (
    Controller,
    Method,
    added,
    begun,
    count_attempt,
    error_of_weights,
    log_elapsed_in,
    segment_between,
    stop_if_stuck,
)
from flowsim.motion.clocks import ARCLENGTH, Clock, Target
from flowsim.motion.rule import advance_by_steps, one_by_one
from flowsim.motion.state import State, Status
from flowsim.norms.norm import Norm
from flowsim.numerics.shapes import Row
from flowsim.problems.kinks import require_sides
from flowsim.problems.objective import Objective
from flowsim.problems.problem import Problem

_CONTROL = Controller(order=3, broken=0.4)

_Vector = Row
_Number = Float[Tensor, " 1"]


@dataclass(frozen=True)
class MinimisingMovement(Method):
    """Implicit steps of second order in every norm, ties and all: for convex losses (`Linear`
    models, `Quadratic`), and for two-layer nets with kinks.

    A kink that slides and begins to repel is *released*; both sides are solutions. ``sides``
    chooses for the first of them, as in `KinkImplicit`.

    The error e of a step is what its quadrature lacks to third order, with the directions at its
    start, stage and end. A step is accepted where ‖e‖₂ ≤ atol + rtol·‖w‖₂ and, for a loss, |⟨∇Λ,
    e⟩| ≤ rtol·max(1, ΔΛ), and where neither the level nor the soft margin falls. Trajectories are
    taken one by one. A finite minimiser is reached in finite arclength, and the trajectory stops
    there as STATIONARY."""

    own_clock: ClassVar[Clock | None] = ARCLENGTH

    sides: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        require_sides("MinimisingMovement", self.sides)

    def start(self, field: Field, objective: Objective, state: State) -> State:
        if state.w.dtype != torch.float64:
            raise ValueError(
                f"MinimisingMovement needs weights in float64, got {state.w.dtype}; try w.double()"
            )

        def run(part: Objective, local: State) -> State:
            return self._steps(field, part, local).begun(local)

        return one_by_one(run, objective, state)

    def advance(
        self, field: Field, objective: Objective, state: State, until: Target, budget: int
    ) -> State:
        def run(part: Objective, local: State, goal: Target) -> State:
            steps = self._steps(field, part, local)

            def step(_: Objective, at: State) -> State:
                return steps.attempted(at)

            return advance_by_steps(step, part, local, goal, budget)

        return one_by_one(run, objective, state, until)

    def refined(
        self, field: Field, objective: Objective, state: State, u: Tensor, point: State
    ) -> State:
        """``point``, read off the last step of ``state`` at u, at the end of a step of its own from
        the same start.

        Softmax weights see margins, which grow like Λ, to O(1): late in training those of an
        interpolated place are the weights of another one. Only nets with kinks need it."""
        if objective.kinks:
            inside = (u > 0) & (u < 1)
            for row in inside.nonzero():
                last = state.select(row)
                local = point.select(row)
                steps = self._steps(field, objective.select(row), last)
                local = steps.refined(last, u[row], local)
                point = point.scatter(row, local)
        return point

    def _steps(self, field: Field, objective: Objective, state: State) -> "ImplicitSteps":
        mover = mover_of(field.norm, objective, state.w, self.sides)
        return ImplicitSteps(field, objective, mover)


def mover_of(
    norm: Norm,
    objective: Objective,
    w: Float[Tensor, "1 P"],
    sides: tuple[int, ...] = (),
) -> Mover:
    """Movements of this objective in a bound norm; raises ValueError where there are none."""
    if objective.kinks and isinstance(objective, Problem):
        if not supports_ball(norm):
            raise ValueError(
                f"got the norm {norm.name!r}, expected L1, L2, Linf, Lp, their Max over layers "
                "or a quadratic norm for a net with kinks; try flowsim.SmallStep for small steps"
            )
        return NetMover(norm, objective, w, sides)
    if not supports_smoothing(norm):
        raise ValueError(
            f"MinimisingMovement does not know the norm {norm.name!r}; try a norm of flowsim, or "
            "flowsim.SmallStep for small steps"
        )
    return ConvexMover(norm, objective, w)


# --------------------------------------------------------------------------------------------------
# A step
# --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ImplicitSteps:
    """The steps of one trajectory."""

    field: Field
    objective: Objective
    mover: Mover

    def begun(self, state: State) -> State:
        """The state with the direction of a short movement, unless it comes from such steps."""
        objective = self.objective
        names = ["newton", "gap"]
        if objective.kinks:
            names += ["sliding", "releases"]
        none = dict.fromkeys(names, torch.zeros_like(state.step_size))
        state = replace(state, tallies=none | state.tallies)
        lam, h = objective.ascent(state.w)
        if self._resumes(state, float(lam)):
            return state
        eps = self._short(lam, h)
        guess = self._sliding_already(state)
        moved = self.mover.move(state.w[0], eps, guess, 1e-9)
        if objective.kinks:
            h = moved.ascent[None]
        sample = self.field.sample(objective, state.w, lam, h, moved.v[None])
        tallies = added(state, newton=moved.newton)
        state = replace(state, tallies=tallies)
        size = torch.full_like(state.step_size, eps)
        state = begun(objective, state, sample, size, _variables(moved))
        return self._with_kinks(state, moved)

    def _short(self, lam: _Number, h: Float[Tensor, "1 P"]) -> float:
        """The arclength in which the level rises by about a thousandth."""
        dual_norm = float(self.field.norm.dual(h)[0])
        rise = 1.0 if self.objective.logarithmic else abs(float(lam))
        return 1e-3 * rise / dual_norm if dual_norm > 0 else 1.0

    def _resumes(self, state: State, lam: float) -> bool:
        """Whether the state comes from such steps, of the same problem in the same norm."""
        memory = state.memory
        known = memory.get("dual_variables")
        if known is None or known.shape[1] != self.mover.unknowns:
            return False
        before = float(state.readings["lam"])
        same = math.isclose(before, lam, rel_tol=1e-9, abs_tol=1e-12)
        dual_norm = float(memory["dual_norm"])
        in_this_norm = float(self.mover.norm.dual(memory["ascent"][0]))
        return same and math.isclose(dual_norm, in_this_norm, rel_tol=1e-6)

    def _sliding_already(self, state: State) -> Guess | None:
        """What a state knows of kinks that slide."""
        known = state.multipliers
        if known is None or known.shape[1] != self.mover.unknowns:
            return None
        still = torch.zeros_like(state.w[0])
        return Guess(still, known[0], _releases(state))

    def refined(self, state: State, u: _Number, point: State) -> State:
        """See `MinimisingMovement.refined`."""
        step = state.segment
        if step is None or step.multipliers0 is None:
            return point
        before = step.readings0["arclength"]
        after = step.readings1["arclength"]
        eps = float(u * (after - before))
        slope = step.slope0[0]
        v = slope / self.mover.norm.value(slope)
        guess = Guess(v, step.multipliers0[0], _releases(state))
        stage, end = self._movements(step.w0[0], eps, guess)
        if not max(stage.gap, end.gap) < self.mover.trusted:
            return point
        lam = end.lam[None].double()
        readings = point.readings | {"lam": lam}
        point = replace(point, w=end.w[None], readings=readings)
        return self._with_kinks(point, end)

    def attempted(self, state: State) -> State:
        """The state after one attempt."""
        w = state.w[0]
        eps = float(state.step_size)
        first = sample_of(state)
        variables = state.memory["dual_variables"][0]
        guess = Guess(first.velocity[0], variables, _releases(state))
        trial = self.trial(w, first, eps, guess)
        excess = self._excess(state, trial)
        size = state.step_size * _CONTROL.factor(excess)
        accepted = excess <= 1
        moved = state
        if bool(accepted):
            moved = self._moved(state, trial)
            if self.objective.degree > 1:
                length = self.field.norm.value(moved.w)
                size = size.minimum(0.2 * length.double())
        moved = replace(moved, step_size=size)
        moved = count_attempt(moved, accepted, gradients=2, newton=trial.newton)
        return self._stop_if_stuck(moved, trial)

    def _movements(self, w: _Vector, eps: float, guess: Guess | None) -> tuple[Movement, Movement]:
        """The stage and the end of a step of arclength ``eps`` from w."""
        part = STAGE * eps
        field = self.field
        tol = self.mover.aim(field.rtol, field.atol, w, eps)
        stage = self.mover.move(w, part, guess, tol)
        ahead = w + (1 - STAGE) * eps * stage.v
        end = self.mover.move(ahead, part, stage, tol)
        return stage, end

    def trial(self, w: _Vector, first: Sample, eps: float, guess: Guess | None) -> MovementTrial:
        """One step of arclength ``eps`` from w, where the field is ``first``."""
        stage, end = self._movements(w, eps, guess)
        norm = self.mover.norm
        # inside the ball there is no steepest direction: the end is a minimiser
        interior = float(norm.value(end.v)) < 0.999
        return MovementTrial(
            eps,
            first,
            stage,
            end,
            middle=self._sample(stage),
            last=self._sample(end),
            length=float(norm.value(end.w - w)) if interior else eps,
            interior=interior,
        )

    def _sample(self, at: Movement) -> Sample:
        w = at.w[None]
        lam = at.lam[None]
        h = at.ascent[None]
        v = at.v[None]
        return self.field.sample(self.objective, w, lam, h, v)

    def _excess(self, state: State, trial: MovementTrial) -> _Number:
        """The error over its tolerance; infinite where the step is no good."""
        first = trial.first
        last = trial.last
        error = trial.error
        excess = error_of_weights(self.field, state.w, trial.w, error)
        rise = last.lam - first.lam
        if self.objective.logarithmic:
            off = torch.linalg.vecdot(last.ascent, error).abs()
            allowed = self.field.rtol * rise.clamp_min(1.0)
            excess = excess.maximum(off / allowed)
        before = self._soft_margin(first.lam, state.w)
        after = self._soft_margin(last.lam, trial.w)
        size = first.lam.abs().clamp_min(1.0)
        falls = rise < -1e-13 * size
        falls |= (before > 0) & (after < before * (1 - 1e-12))
        good = torch.isfinite(excess) & ~falls
        good &= trial.gap < self.mover.trusted
        return torch.where(good, excess, torch.inf)

    def _soft_margin(self, lam: _Number, w: Float[Tensor, "1 P"]) -> _Number:
        """What the flow raises once it is positive (Tsilivis et al. 2026, Thm. 1 and 22); −1 where
        there is none."""
        none = -torch.ones_like(lam)
        objective = self.objective
        if not isinstance(objective, Problem):
            return none
        loss = objective.loss
        if loss.tail.inverse is None:
            return none
        length = self.field.norm.value(w)
        margin = loss.soft_minimum(lam) / length**objective.degree
        return torch.where(length > 0, margin, none)

    def _moved(self, state: State, trial: MovementTrial) -> State:
        """The state at the end of a step."""
        first = trial.first
        last = trial.last
        ds = torch.full_like(state.step_size, trial.length)
        elapsed = log_elapsed_in(self.objective, first, last, ds)
        before = state.readings
        readings = {
            "steps": before["steps"] + 1,
            "lam": last.lam,
            "log_time": torch.logaddexp(before["log_time"], elapsed),
            "arclength": before["arclength"] + ds,
            "relative": before["relative"] + ds * trial.mean("relative"),
            "dissipated": before["dissipated"] + ds * trial.mean("dissipated"),
        }
        gap = state.tallies["gap"].clamp_min(trial.gap)
        moved = replace(
            state,
            w=trial.w,
            readings=readings,
            tallies=state.tallies | {"gap": gap},
            memory=memory_of(last) | _variables(trial.end),
            segment=segment_between(self.objective, state, trial.w, first, last, ds, readings),
        )
        return self._with_kinks(moved, trial.end, state.multipliers)

    def _with_kinks(self, state: State, at: Movement, before: Tensor | None = None) -> State:
        """The state with the kinks of a movement, which began with those of ``before``."""
        if not self.objective.kinks:
            return state
        multipliers = at.dual_variables[None]
        slides = (multipliers > 0) & (multipliers < 1)
        sliding = slides.sum(-1).double()
        tallies = {
            "sliding": sliding,
            "releases": torch.full_like(sliding, at.releases),
        }
        state = replace(state, multipliers=multipliers, tallies=state.tallies | tallies)
        if state.segment is None:
            return state
        first = multipliers if before is None else before
        step = replace(state.segment, multipliers0=first, multipliers1=multipliers)
        return replace(state, segment=step)

    def _stop_if_stuck(self, state: State, trial: MovementTrial) -> State:
        """The state, stopped if the trajectory cannot go on."""
        still = (trial.w == state.w).all(-1)
        state = state.stopped(still & trial.interior, Status.STATIONARY)
        finite = torch.isfinite(trial.w).all(-1)
        finite &= torch.isfinite(trial.last.lam)
        least = 1e-3 * self.field.atol
        return stop_if_stuck(state, state.step_size, finite, least=least)


def _variables(at: Movement) -> dict[str, Tensor]:
    return {"dual_variables": at.dual_variables[None]}


def _releases(state: State) -> float:
    return float(state.tallies.get("releases", 0.0))

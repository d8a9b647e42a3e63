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

_GAMMA = 1 - 1 / math.sqrt(2)

# the quadrature of third order at 0, γ and 1
_MIDDLE = 1 / (6 * _GAMMA * (1 - _GAMMA))
_LAST = (2 - 3 * _GAMMA) / (6 * (1 - _GAMMA))
_FIRST = 1 - _MIDDLE - _LAST

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
            return advance_by_steps(lambda _, at: steps.attempted(at), part, local, goal, budget)

        return one_by_one(run, objective, state, until)

    def refined(
        self, field: Field, objective: Objective, state: State, u: Tensor, point: State
    ) -> State:
        """``point``, read off the last step of ``state`` at u, at the end of a step of its own from
        the same start.

        Softmax weights see margins, which grow like Λ, to O(1): late in training those of an
        interpolated place are the weights of another one. Only nets with kinks need it."""
        if objective.kinks:
            for row in ((u > 0) & (u < 1)).nonzero():
                last = state.select(row)
                local = point.select(row)
                steps = self._steps(field, objective.select(row), last)
                point = point.scatter(row, steps.refined(last, u[row], local))
        return point

    def _steps(self, field: Field, objective: Objective, state: State) -> "ImplicitSteps":
        return ImplicitSteps(field, objective, mover_of(field.norm, objective, state.w, self.sides))


def mover_of(
    norm: Norm, objective: Objective, w: Float[Tensor, "1 P"], sides: tuple[int, ...] = ()
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
            f"MinimisingMovement does not know the norm {norm.name!r}; try a norm of flowsim"
        )
    return ConvexMover(norm, objective, w)


# --------------------------------------------------------------------------------------------------
# A step
# --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class MovementTrial:
    """A step of arclength ``eps`` from where the field is ``first``: the movements of its stage and
    of its end, with the field there."""

    eps: float
    first: Sample
    stage: Movement
    end: Movement
    middle: Sample
    last: Sample
    length: float
    interior: bool

    @property
    def w(self) -> Float[Tensor, "1 P"]:
        return self.end.w[None]

    @property
    def gap(self) -> float:
        return max(self.stage.gap, self.end.gap)

    @property
    def newton(self) -> float:
        return self.stage.newton + self.end.newton

    @property
    def error(self) -> Float[Tensor, "1 P"]:
        """What the step lacks to third order."""
        u = self.first.velocity
        v = self.stage.v
        z = self.end.v
        middle = 1 - _GAMMA - _MIDDLE
        last = _GAMMA - _LAST
        return self.eps * (-_FIRST * u + middle * v + last * z)

    def mean(self, name: str) -> _Number:
        """The mean of a rate over the step."""
        a, m, b = (at.rates[name] for at in (self.first, self.middle, self.last))
        return _FIRST * a + _MIDDLE * m + _LAST * b


@dataclass(frozen=True)
class ImplicitSteps:
    """The steps of one trajectory."""

    field: Field
    objective: Objective
    mover: Mover

    def begun(self, state: State) -> State:
        """The state with the direction of a short movement, unless it comes from such steps."""
        names = ("newton", "gap", *(("sliding", "releases") if self.objective.kinks else ()))
        none = {name: torch.zeros_like(state.step_size) for name in names}
        state = replace(state, tallies=none | state.tallies)
        lam, h = self.objective.ascent(state.w)
        if self._resumes(state, float(lam)):
            return state
        dual_norm = float(self.field.norm.dual(h)[0])
        rise = 1.0 if self.objective.logarithmic else abs(float(lam))
        eps = 1e-3 * rise / dual_norm if dual_norm > 0 else 1.0
        moved = self.mover.move(state.w[0], eps, self._sliding_already(state), 1e-9)
        h = moved.ascent[None] if self.objective.kinks else h
        sample = self.field.sample(self.objective, state.w, lam, h, moved.v[None])
        state = replace(state, tallies=added(state, newton=moved.newton))
        size = torch.full_like(state.step_size, eps)
        state = begun(self.objective, state, sample, size, _variables(moved))
        return self._with_kinks(state, moved)

    def _resumes(self, state: State, lam: float) -> bool:
        """Whether the state comes from such steps, of the same problem in the same norm."""
        memory = state.memory
        if "dual_variables" not in memory:
            return False
        if memory["dual_variables"].shape[1] != self.mover.unknowns:
            return False
        dual_norm = float(self.mover.norm.dual(memory["ascent"][0]))
        same = math.isclose(float(state.readings["lam"]), lam, rel_tol=1e-9, abs_tol=1e-12)
        return same and math.isclose(float(memory["dual_norm"]), dual_norm, rel_tol=1e-6)

    def _sliding_already(self, state: State) -> Guess | None:
        """What a state knows of kinks that slide."""
        known = state.multipliers
        if known is None or known.shape[1] != self.mover.unknowns:
            return None
        return Guess(torch.zeros_like(state.w[0]), known[0], _releases(state))

    def refined(self, state: State, u: _Number, point: State) -> State:
        """See `MinimisingMovement.refined`."""
        step = state.segment
        if step is None or step.multipliers0 is None:
            return point
        eps = float(u * (step.readings1["arclength"] - step.readings0["arclength"]))
        w = step.w0[0]
        v = step.slope0[0]
        guess = Guess(v / self.mover.norm.value(v), step.multipliers0[0], _releases(state))
        stage, end = self._movements(w, eps, guess)
        if not max(stage.gap, end.gap) < self.mover.trusted:
            return point
        readings = point.readings | {"lam": end.lam[None].double()}
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
                size = size.minimum(0.2 * self.field.norm.value(moved.w).double())
        moved = replace(moved, step_size=size)
        moved = count_attempt(moved, accepted, gradients=2, newton=trial.newton)
        return self._stop_if_stuck(moved, trial)

    def _movements(self, w: _Vector, eps: float, guess: Guess | None) -> tuple[Movement, Movement]:
        """The stage and the end of a step of arclength ``eps`` from w."""
        part = _GAMMA * eps
        tol = self.mover.aim(self.field.rtol, self.field.atol, w, eps)
        stage = self.mover.move(w, part, guess, tol)
        return stage, self.mover.move(w + (1 - _GAMMA) * eps * stage.v, part, stage, tol)

    def trial(self, w: _Vector, first: Sample, eps: float, guess: Guess | None) -> MovementTrial:
        """One step of arclength ``eps`` from w, where the field is ``first``."""
        stage, end = self._movements(w, eps, guess)
        # inside the ball there is no steepest direction: the end is a minimiser
        interior = float(self.mover.norm.value(end.v)) < 0.999
        length = float(self.mover.norm.value(end.w - w)) if interior else eps
        middle = self._sample(stage)
        last = self._sample(end)
        return MovementTrial(eps, first, stage, end, middle, last, length, interior)

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
            excess = excess.maximum(off / (self.field.rtol * rise.clamp_min(1.0)))
        before = self._soft_margin(first.lam, state.w)
        after = self._soft_margin(last.lam, trial.w)
        falls = rise < -1e-13 * first.lam.abs().clamp_min(1.0)
        falls |= (before > 0) & (after < before * (1 - 1e-12))
        good = torch.isfinite(excess) & ~falls & (trial.gap < self.mover.trusted)
        return torch.where(good, excess, torch.inf)

    def _soft_margin(self, lam: _Number, w: Float[Tensor, "1 P"]) -> _Number:
        """What the flow raises once it is positive (Tsilivis et al. 2026, Thm. 1 and 22); −1 where
        there is none."""
        length = self.field.norm.value(w)
        objective = self.objective
        if not isinstance(objective, Problem) or objective.loss.tail.inverse is None:
            return -torch.ones_like(lam)
        margin = objective.loss.soft_minimum(lam) / length**objective.degree
        return torch.where(length > 0, margin, -1.0)

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
        moved = replace(
            state,
            w=trial.w,
            readings=readings,
            tallies=state.tallies | {"gap": state.tallies["gap"].clamp_min(trial.gap)},
            memory=memory_of(last) | _variables(trial.end),
            segment=segment_between(self.objective, state, trial.w, first, last, ds, readings),
        )
        return self._with_kinks(moved, trial.end, state.multipliers)

    def _with_kinks(self, state: State, at: Movement, before: Tensor | None = None) -> State:
        """The state with the kinks of a movement, which began with those of ``before``."""
        if not self.objective.kinks:
            return state
        multipliers = at.dual_variables[None]
        sliding = ((multipliers > 0) & (multipliers < 1)).sum(-1).double()
        tallies = {"sliding": sliding, "releases": torch.full_like(sliding, at.releases)}
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
        finite = torch.isfinite(trial.w).all(-1) & torch.isfinite(trial.last.lam)
        return stop_if_stuck(state, state.step_size, finite, least=1e-3 * self.field.atol)


def _variables(at: Movement) -> dict[str, Tensor]:
    return {"dual_variables": at.dual_variables[None]}


def _releases(state: State) -> float:
    return float(state.tallies.get("releases", 0.0))

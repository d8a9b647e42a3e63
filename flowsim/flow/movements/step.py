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
from flowsim.flow.movements.convex import ConvexMover, Guess, Movement, Mover
from flowsim.flow.movements.net import NetMover
from flowsim.flow.steps import (
    Controller,
    Method,
    added,
    begun,
    log_elapsed_in,
    segment_between,
    stop_if_stuck,
)
from flowsim.motion.clocks import ARCLENGTH, Clock, Target
from flowsim.motion.rule import advance_by_steps
from flowsim.motion.state import State, Status, tree_map
from flowsim.norms.norm import Norm
from flowsim.problems.kinks import require_sides
from flowsim.problems.objective import Objective
from flowsim.problems.problem import Problem

_GAMMA = 1 - 1 / math.sqrt(2)


# the quadrature of third order at 0, γ and 1
_MIDDLE = 1 / (6 * _GAMMA * (1 - _GAMMA))


_LAST = (2 - 3 * _GAMMA) / (6 * (1 - _GAMMA))


_NODES = (1 - _MIDDLE - _LAST, _MIDDLE, _LAST)


_CONTROL = Controller(order=3, broken=0.4)


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
        rows = [torch.tensor([b], device=state.w.device) for b in range(len(state.w))]
        if state.w.dtype != torch.float64:
            raise ValueError(
                f"MinimisingMovement needs weights in float64, got {state.w.dtype}; try w.double()"
            )
        begun = [self._begin(field, objective.select(row), state.select(row)) for row in rows]
        return tree_map(lambda *parts: torch.cat(parts), *begun)

    def advance(
        self, field: Field, objective: Objective, state: State, until: Target, budget: int
    ) -> State:
        for b in state.running.nonzero().flatten():
            row = b[None]
            part, local = objective.select(row), state.select(row)
            mover = mover_of(field.norm, part, local.w, self.sides)

            def step(part: Objective, local: State, mover: Mover = mover) -> State:
                return self._step(field, mover, part, local)

            state = state.scatter(
                row, advance_by_steps(step, part, local, until.select(row), budget)
            )
        return state

    def refined(
        self, field: Field, objective: Objective, state: State, u: Tensor, point: State
    ) -> State:
        """``point``, read off the last step of ``state`` at u, at the end of a step of its own from
        the same start.

        Softmax weights see margins, which grow like Λ, to O(1): late in training those of an
        interpolated place are the weights of another one. Only nets with kinks need it."""
        step = state.segment
        if not objective.kinks or step is None or step.multipliers0 is None:
            return point
        for b in ((u > 0) & (u < 1)).nonzero().flatten():
            mover = mover_of(field.norm, objective.select(b[None]), point.w[b][None], self.sides)
            eps = float(u[b] * (step.readings1["arclength"][b] - step.readings0["arclength"][b]))
            way, releases = step.slope0[b], float(state.tallies["releases"][b])
            guess = Guess(way / mover.norm.value(way), step.multipliers0[b], releases)
            one, two = _stages(
                mover, step.w0[b], eps, guess, mover.aim(field.rtol, field.atol, step.w0[b], eps)
            )
            if max(one.gap, two.gap) < mover.trusted:
                local = point.select(b[None])
                readings = local.readings | {"lam": two.lam[None].double()}
                local = replace(local, w=two.w[None], readings=readings)
                point = point.scatter(b[None], _sliding(local, two))
        return point

    def _begin(self, field: Field, objective: Objective, state: State) -> State:
        """The state with the direction of a short movement, unless it comes from such steps."""
        names = ("newton", "gap", *(("sliding", "releases") if objective.kinks else ()))
        state = replace(
            state,
            tallies={name: torch.zeros_like(state.step_size) for name in names} | state.tallies,
        )
        mover = mover_of(field.norm, objective, state.w, self.sides)
        lam, h = objective.ascent(state.w)
        if _resumes(state, mover, float(lam)):
            return state
        dual = float(field.norm.dual(h)[0])
        rise = 1.0 if objective.logarithmic else abs(float(lam))
        size = 1e-3 * rise / dual if dual > 0 else 1.0
        moved = mover.move(state.w[0], size, _guess(state, mover), 1e-9)
        h = h if moved.multipliers is None else moved.ascent[None]
        sample = field.sample(objective, state.w, lam, h, moved.v[None])
        state = replace(state, tallies=added(state, newton=moved.newton))
        first = torch.full_like(state.step_size, size)
        state = begun(objective, state, sample, first, {"duals": moved.duals[None]})
        return _sliding(state, moved).stopped(sample.dual_norm == 0, Status.STATIONARY)

    def _step(self, field: Field, mover: Mover, objective: Objective, state: State) -> State:
        """One attempt of one trajectory."""
        first, eps = sample_of(state), float(state.step_size)
        guess = Guess(
            first.velocity[0], state.memory["duals"][0], float(state.tallies.get("releases", 0.0))
        )
        tol = mover.aim(field.rtol, field.atol, state.w[0], eps)
        trial = implicit_step(field, mover, objective, state.w[0], first, eps, guess, tol)
        excess = self._excess(field, mover, objective, state, first, trial)
        counts = {"gradients": 2.0, "newton": trial.newton}
        factor = float(_CONTROL.factor(torch.tensor(excess, dtype=torch.float64)))
        if excess > 1:
            tallies = added(state, rejected=1.0, **counts)
            return self._judged(
                field, replace(state, tallies=tallies, step_size=state.step_size * factor), trial
            )
        tallies = added(state, accepted=1.0, **counts)
        tallies["gap"] = tallies["gap"].clamp_min(trial.gap)
        moved = self._moved(objective, replace(state, tallies=tallies), first, trial)
        size = state.step_size * factor
        if objective.degree > 1:
            size = size.minimum(0.2 * field.norm.value(moved.w).double())
        return self._judged(field, replace(moved, step_size=size), trial)

    def _moved(
        self, objective: Objective, state: State, first: Sample, trial: "MovementTrial"
    ) -> State:
        """The state after an accepted step."""
        dt = torch.full_like(state.step_size, trial.length)
        elapsed = log_elapsed_in(objective, first, trial.last, dt)
        readings = {
            "steps": state.readings["steps"] + 1,
            "lam": trial.last.lam,
            "log_time": torch.logaddexp(state.readings["log_time"], elapsed),
            "arclength": state.readings["arclength"] + dt,
            **{
                name: state.readings[name] + dt * trial.mean(name, first)
                for name in ("relative", "dissipated")
            },
        }
        moved = replace(
            state,
            w=trial.w[None],
            readings=readings,
            memory=memory_of(trial.last) | {"duals": trial.end.duals[None]},
            segment=segment_between(
                objective, state, trial.w[None], first, trial.last, dt, readings
            ),
        )
        return _sliding(moved, trial.end, state.multipliers)

    def _excess(
        self,
        field: Field,
        mover: Mover,
        objective: Objective,
        state: State,
        first: Sample,
        trial: "MovementTrial",
    ) -> float:
        """The error over its tolerance; infinite where the step is no good."""
        w, e = state.w[0], trial.error
        size = max(float(torch.linalg.vector_norm(w)), float(torch.linalg.vector_norm(trial.w)))
        excess = float(torch.linalg.vector_norm(e)) / (field.atol + field.rtol * size)
        rise = float(trial.last.lam - first.lam)
        if objective.logarithmic:
            excess = max(
                excess, abs(float(trial.last.ascent[0] @ e)) / (field.rtol * max(1.0, rise))
            )
        before = _soft_margin(field.norm, objective, first.lam, state.w)
        after = _soft_margin(field.norm, objective, trial.last.lam, trial.w[None])
        falls = rise < -1e-13 * max(1.0, abs(float(first.lam))) or (
            before > 0 and after < before * (1 - 1e-12)
        )
        return (
            excess
            if math.isfinite(excess) and trial.gap < mover.trusted and not falls
            else math.inf
        )

    def _judged(self, field: Field, state: State, trial: "MovementTrial") -> State:
        """The state, stopped if the trajectory cannot go on."""
        moved = trial.w[None] == state.w
        state = state.stopped(moved.all(-1) & trial.interior, Status.STATIONARY)
        finite = torch.isfinite(trial.w).all() & torch.isfinite(trial.last.lam)
        return stop_if_stuck(state, state.step_size, finite, least=1e-3 * field.atol)


@dataclass(frozen=True)
class MovementTrial:
    """A step: the movement that ends it, its error vector, the field at the stage and at the
    end."""

    end: Movement
    error: Float[Tensor, " P"]
    middle: Sample
    last: Sample
    length: float
    interior: bool
    gap: float
    newton: float

    @property
    def w(self) -> Float[Tensor, " P"]:
        return self.end.w

    def mean(self, name: str, first: Sample) -> Float[Tensor, " 1"]:
        """The mean of a rate over the step."""
        values = (first.rates[name], self.middle.rates[name], self.last.rates[name])
        return sum(
            (c * v for c, v in zip(_NODES, values, strict=True)), start=torch.zeros_like(values[0])
        )


def implicit_step(
    field: Field,
    mover: Mover,
    objective: Objective,
    w: Float[Tensor, " P"],
    first: Sample,
    eps: float,
    guess: Guess | None,
    tol: float = 1e-15,
) -> MovementTrial:
    """One step of arclength ``eps`` from w, where the direction is that of ``first``."""
    one, two = _stages(mover, w, eps, guess, tol)

    def sample(at: Movement) -> Sample:
        return field.sample(objective, at.w[None], at.lam[None], at.ascent[None], at.v[None])

    u = first.velocity[0]
    lacking = (-_NODES[0], 1 - _GAMMA - _NODES[1], _GAMMA - _NODES[2])
    error = eps * (lacking[0] * u + lacking[1] * one.v + lacking[2] * two.v)
    # inside the ball there is no steepest direction: the end is a minimiser
    interior = float(mover.norm.value(two.v)) < 0.999
    length = float(mover.norm.value(two.w - w)) if interior else eps
    gap, newton = max(one.gap, two.gap), one.newton + two.newton
    return MovementTrial(two, error, sample(one), sample(two), length, interior, gap, newton)


def _stages(
    mover: Mover, w: Tensor, eps: float, guess: Guess | None, tol: float
) -> tuple[Movement, Movement]:
    one = mover.move(w, _GAMMA * eps, guess, tol)
    return one, mover.move(w + (1 - _GAMMA) * eps * one.v, _GAMMA * eps, one.guess, tol)


def mover_of(
    norm: Norm, objective: Objective, w: Float[Tensor, "1 P"], sides: tuple[int, ...] = ()
) -> Mover:
    """Movements of this objective in a bound norm; raises ValueError where there are none."""
    if objective.kinks and isinstance(objective, Problem):
        if not supports_ball(norm):
            raise ValueError(
                f"got the norm {norm.name!r}, expected L1, L2, Linf, Lp, their Max over layers or a quadratic norm "
                "for a net with kinks; try flowsim.SmallStep for the small-step path"
            )
        return NetMover(norm, objective, w, sides)
    if not supports_smoothing(norm):
        raise ValueError(
            f"MinimisingMovement does not know the norm {norm.name!r}; try a norm of flowsim"
        )
    return ConvexMover(norm, objective, w)


def _guess(state: State, mover: Mover) -> Guess | None:
    """What a state knows of kinks that slide."""
    if state.multipliers is None or state.multipliers.shape[1] != mover.duals:
        return None
    return Guess(
        torch.zeros_like(state.w[0]),
        state.multipliers[0],
        float(state.tallies.get("releases", 0.0)),
    )


def _sliding(state: State, at: Movement, before: Tensor | None = None) -> State:
    """The state with the kinks of a movement, which began with those of ``before``."""
    if at.multipliers is None:
        return state
    multipliers = at.multipliers[None]
    sliding = ((multipliers > 0) & (multipliers < 1)).sum(-1).double()
    step = state.segment
    if step is not None:
        step = replace(
            step, multipliers0=multipliers if before is None else before, multipliers1=multipliers
        )
    tallies = {"sliding": sliding, "releases": torch.full_like(sliding, at.releases)}
    return replace(state, multipliers=multipliers, segment=step, tallies=state.tallies | tallies)


def _soft_margin(norm: Norm, objective: Objective, lam: Tensor, w: Float[Tensor, "1 P"]) -> float:
    """What the flow raises once it is positive (Tsilivis et al. 2026, Thm. 1 and 22); −1 where
    there is none."""
    if not isinstance(objective, Problem) or objective.loss.tail.inverse is None:
        return -1.0
    size = float(norm.value(w)[0])
    return float(objective.loss.soft_minimum(lam)[0]) / size**objective.degree if size > 0 else -1.0


def _resumes(state: State, mover: Mover, lam: float) -> bool:
    """Whether the state comes from such steps, of the same problem in the same norm."""
    memory = state.memory
    if "duals" not in memory or memory["duals"].shape[1] != mover.duals:
        return False
    dual = float(mover.norm.dual(memory["ascent"][0]))
    same = math.isclose(float(state.readings["lam"]), lam, rel_tol=1e-9, abs_tol=1e-12)
    return same and math.isclose(float(memory["dual_norm"]), dual, rel_tol=1e-6)

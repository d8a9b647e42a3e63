"""The steepest flow of two-layer ReLU nets in quadratic norms, through its kinks.

Even gradient flow of a small ReLU net spends most of its time *on* kinks, where no ODE solver can
follow. A step here treats two things implicitly. The forces of attracting kinks are unknowns of the
step, determined by where it ends: a pair (neuron, example) ends on one side with that side's force,
or on the kink with a force in between (`convex.box`). And the softmax weights, which stiffen like
Λ, are damped by the Gauss–Newton matrix JᵀSJ. With M = (A + γτJᵀSJ)⁻¹, A the norm's matrix and γ =
1 − 1/√2,

    k₁ = M(h(w) − Nᵀλ₁),                          w₁ = w + τk₁
    k₂ = M(h(w₁) − Nᵀλ₂ − 2Ak₁),                  w₊ = w + τ(3k₁ + k₂)/2

is the two-stage Rosenbrock W-method of Verwer et al. (1999): second order for any matrix in the
place of JᵀSJ, and damping for this one. h is ∇Λ without the forces λ of the kinks at hand, N holds
their normals; λ₁ makes w₁ and λ₂ makes w₊ consistent with the kinks, so that a sliding pair has z =
0 to rounding, without drift and without a band. A force has bounds that remember what it was before
the events of the step (`stages.Impulses`), without which a pair that only passes its kink would be
held there.

All linear algebra is in sample space and per neuron: nothing P × P is formed.
"""

from dataclasses import dataclass, replace
from functools import partial
from typing import ClassVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from flowsim.flow.field import Field, Sample, sample_of
from flowsim.flow.rosenbrock import smoothed
from flowsim.flow.sliding.forces import ActivePairs, GaussNewton, KinkCoupling, Metric
from flowsim.flow.sliding.selection import between, count, least_gradient, on_kink, sides_at
from flowsim.flow.sliding.stages import (
    GAMMA,
    SlidingTrial,
    StepStart,
    both_stages,
    sides_of_releases,
)
from flowsim.flow.steps import (
    Controller,
    Method,
    begun,
    count_attempt,
    length,
    log_elapsed_in,
    moved_along,
    segment_between,
    stop_if_stuck,
    without_size,
)
from flowsim.motion.clocks import GRADIENT, Clock, Target
from flowsim.motion.rule import advance_by_steps, one_by_one
from flowsim.motion.state import State, Status
from flowsim.norms.norm import Norm
from flowsim.numerics.shapes import PerPair, PerTrajectory, Rows
from flowsim.problems.kinks import NetAt, require_sides
from flowsim.problems.objective import Objective
from flowsim.problems.problem import Problem

_CONTROL = Controller(order=2, safety=0.8, most=3.0, retry=0.7)


@dataclass(frozen=True)
class KinkImplicit(Method):
    """The method for two-layer nets with kinks in a quadratic norm; see the module.

    The step size kept in a state is relative arclength. A step is accepted where the results of
    first and second order differ by at most ``atol + rtol·‖w‖``, their margins by at most 100·rtol
    in standard deviation under the softmax weights, ∫‖h‖_*² dτ and the rise of Λ by at most
    ``rtol·(½ + rise/10)``, and where neither Λ nor the soft margin falls. The error of the result,
    which is the one of second order, is smaller.

    Where the outer weights of a neuron change sign, its sliding pairs become repelling and are
    *released*; both sides are solutions. The n-th release takes the side ``sides[n]``, 0 for z < 0
    and 1 for z > 0; those for which nothing is asked take the side whose multiplier is nearer
    (`kinks.release_sides`)."""

    own_clock: ClassVar[Clock | None] = GRADIENT

    sides: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        require_sides("KinkImplicit", self.sides)

    def start(self, field: Field, objective: Objective, state: State) -> State:
        problem = _supported(objective, field)
        before = state
        point = problem.two_layer(len(state.w)).at(state.w)
        given = sides_at(point, state.multipliers)
        stuck = on_kink(point) | between(given)
        stuck = stuck & point.net.distinct
        sample, multipliers = _sampled(field, problem, state.w, point, given, stuck)
        zero = torch.zeros_like(state.step_size)
        kinks = multipliers.flatten(1)
        counts = {"releases": zero} | state.tallies
        counts["sliding"] = count(between(kinks))
        if "tau" not in state.memory:
            state = without_size(state)
        state = replace(state, tallies=counts, multipliers=kinks)
        size = torch.full_like(zero, 1e-3)
        anew = begun(problem, state, sample, size, {"tau": zero})
        return _going_on(field.norm, point, before, anew)

    def advance(
        self, field: Field, objective: Objective, state: State, until: Target, budget: int
    ) -> State:
        step = partial(self._step, field)

        def run(part: Problem, begin: State, goal: Target) -> State:
            end = advance_by_steps(step, part, begin, goal, budget)
            moved = end.readings["steps"] > begin.readings["steps"]
            if not bool(moved.all()):
                return end
            return _readable(field, part, end)

        # one trajectory at a time: sets of kinks differ in size
        return one_by_one(run, _supported(objective, field), state, until)

    def _step(self, field: Field, problem: Problem, state: State) -> State:
        """One attempt of every trajectory."""
        first = sample_of(state)
        size = field.norm.value(state.w).double()
        tau = state.step_size * size / first.dual_norm
        net = problem.two_layer(len(state.w))
        metric = Metric.of(field.norm)
        start = StepStart.of(metric, net, state, first, tau)
        trial = both_stages(start, self.sides, state.tallies["releases"])
        end = self._end(field, problem, state, trial, net.at(trial.w))
        moved = _moved(field.norm, problem, state, trial.w, end, tau)
        excess = self._excess(field, problem, state, trial, end.point, moved)
        state = count_attempt(state, excess <= 1, gradients=2)
        moved = replace(moved, tallies=state.tallies | end.counts)
        chosen = moved.where(excess <= 1, state)
        unseen = _unseen(state, first, tau) & torch.isfinite(end.last.lam)
        chosen = chosen.stopped(unseen & ~(excess <= 1), Status.PRECISION_FLOOR)
        return self._resized(chosen, excess)

    def _end(
        self,
        field: Field,
        problem: Problem,
        state: State,
        trial: SlidingTrial,
        point: NetAt,
    ) -> "_End":
        """What is at the end of a trial: kinks that repel there let their pairs go."""
        repels = point.jump >= 0
        released = trial.stuck & repels & ~trial.released
        before = state.tallies["releases"] + count(trial.released)
        side = sides_of_releases(trial.multipliers, released, before, self.sides)
        given = torch.where(released, side, trial.multipliers)
        last, multipliers = _sampled(field, problem, trial.w, point, given, trial.stuck)
        releases = before + count(released)
        return _End(point, last, multipliers.flatten(1), releases)

    def _excess(
        self,
        field: Field,
        problem: Problem,
        state: State,
        trial: SlidingTrial,
        point: NetAt,
        moved: State,
    ) -> PerTrajectory:
        """The error over its tolerance; infinite where the step cannot be right."""
        size = field.norm.value(trial.w).double()
        apart = field.norm.value(trial.w - trial.w1).double()
        gap = (point.outputs - trial.outputs1).flatten(1)
        root = problem.loss.curvature(point.outputs, point.net.y)
        logits = root.mT @ gap[..., None]
        rise = moved.readings["lam"] - state.readings["lam"]
        spent = moved.readings["dissipated"] - state.readings["dissipated"]
        allowed = field.rtol * (0.5 + 0.1 * rise.abs())
        errors = (
            apart / (field.atol + field.rtol * size),
            length(logits.flatten(1)) / (100 * field.rtol),
            (spent - rise).abs() / allowed,
        )
        excess = torch.stack(errors).amax(0)
        falls = _margin_falls(field.norm, problem, state, moved)
        good = torch.isfinite(excess) & (rise > 0)
        good = good & trial.solved & ~falls
        return torch.where(good, excess, torch.inf)

    def _resized(self, state: State, excess: PerTrajectory) -> State:
        """The next step size, and trajectories stopped that cannot go on."""
        step_size = state.step_size * _CONTROL.factor(excess)
        state = replace(state, step_size=step_size.clamp_max(0.5))
        move = state.step_size * length(state.w)
        return stop_if_stuck(state, move, torch.isfinite(excess))


@dataclass(frozen=True)
class _End:
    """The net, the field, the multipliers and the count of releases at the end of a step."""

    point: NetAt
    last: Sample
    multipliers: Float[Tensor, "B Nm"]
    releases: PerTrajectory

    @property
    def counts(self) -> dict[str, PerTrajectory]:
        """The tallies of kinks."""
        sliding = count(between(self.multipliers))
        return {"sliding": sliding, "releases": self.releases}


def _supported(objective: Objective, field: Field) -> Problem:
    if not isinstance(objective, Problem):
        raise ValueError(
            f"got a {type(objective).__name__} with kinks, expected a Problem with a two-layer "
            "net; try flowsim.select for the velocity at one place, or flowsim.SmallStep for the "
            "small-step path"
        )
    if not field.norm.quadratic:
        raise ValueError(
            f"got the norm {field.norm.name!r}, expected a quadratic one (L2, Mahalanobis, "
            "Euclidean of these) for a net with kinks; try flowsim.SmallStep for the small-step "
            "path"
        )
    return objective


def _going_on(norm: Norm, point: NetAt, before: State, anew: State) -> State:
    """``anew``, but ``before`` itself for trajectories that come from this flow of this problem.

    A selection at the same place may round otherwise, and where a pair has just been released it
    may take the other side."""
    kept = before.memory
    other = before.segment is None or kept.keys() != anew.memory.keys()
    if other or before.multipliers is None:
        return anew
    multipliers = before.multipliers.view_as(point.z)
    h = point.gradient(point.slopes(multipliers))
    digits = torch.finfo(h.dtype).eps ** 0.5

    def same(a: Tensor, b: Tensor) -> Bool[Tensor, " B"]:
        size = a.abs() + b.abs()
        return (a - b).abs() <= digits * size

    dual_norm = kept["dual_norm"]
    apart = norm.dual(kept["ascent"] - h).double()
    lam = point.lam.double()
    goes_on = same(before.readings["lam"], lam)
    goes_on &= same(dual_norm, norm.dual(h).double())
    goes_on &= same(apart + dual_norm, dual_norm)
    tallies = anew.tallies | before.tallies
    tallies["gradients"] = anew.tallies["gradients"]
    before = replace(before, tallies=tallies)
    return before.where(goes_on, anew)


def _sampled(
    field: Field, problem: Problem, w: Tensor, point: NetAt, given: Tensor, stuck: Tensor
) -> tuple[Sample, PerPair]:
    """The field at w, and the multipliers that are selected there."""
    metric = Metric.of(field.norm)
    multipliers, h = least_gradient(metric, point, given, stuck)
    u = field.norm.steepest(h)
    sample = field.sample(problem, w, point.lam, h, u)
    return sample, multipliers


def _moved(norm: Norm, problem: Problem, state: State, w: Rows, end: _End, tau: Tensor) -> State:
    """The state after an accepted step to w."""
    first = sample_of(state)
    last = end.last
    step = segment_between(problem, state, w, first, last, tau)
    step = replace(step, multipliers0=state.multipliers, multipliers1=end.multipliers)
    gains = _gains(norm, state, w, (first, last), tau)
    elapsed = log_elapsed_in(problem, first, last, tau)
    moved = moved_along(state, step, last, gains, elapsed)
    memory = moved.memory | {"tau": tau}
    return replace(moved, multipliers=end.multipliers, memory=memory)


def _gains(
    norm: Norm, state: State, w: Rows, ends: tuple[Sample, Sample], tau: Tensor
) -> dict[str, PerTrajectory]:
    """What the readings gain in a step to w, by Simpson's rule with the mean velocity for the
    middle one: it is free of the fast motion of the softmax weights that the ends still show."""
    first, last = ends
    way = norm.value(w - state.w).double()
    speeds = torch.stack([first.dual_norm, way / tau, last.dual_norm])
    middle = 0.5 * (state.w + w)
    places = (state.w, middle, w)
    lengths = torch.stack([norm.value(at) for at in places])
    return {
        "arclength": _simpson(tau, speeds),
        "relative": _simpson(tau, speeds / lengths.double()),
        "dissipated": _simpson(tau, speeds**2),
    }


def _unseen(state: State, first: Sample, tau: Tensor) -> Bool[Tensor, " B"]:
    """Whether the rise of the level in a step is within its rounding."""
    eps = torch.finfo(state.w.dtype).eps
    rise = tau * first.dual_norm**2
    rounding = 16 * eps * (1 + first.lam.abs())
    return rise <= rounding


def _simpson(tau: PerTrajectory, values: Float[Tensor, "3 B"]) -> PerTrajectory:
    start, middle, end = values
    return tau * (start + 4 * middle + end) / 6


def _margin_falls(norm: Norm, problem: Problem, state: State, moved: State) -> Bool[Tensor, " B"]:
    """Whether the step lowers the soft margin, which the flow never does once it is positive."""
    if problem.loss.tail.inverse is None:
        return torch.zeros_like(state.status, dtype=torch.bool)
    before = problem.loss.soft_minimum(state.readings["lam"])
    after = problem.loss.soft_minimum(moved.readings["lam"])
    ratio = norm.value(moved.w) / norm.value(state.w)
    growth = ratio.double() ** problem.degree
    least = before * growth * (1 - 1e-14)
    return (before > 0) & (after < least)


def _readable(field: Field, problem: Problem, state: State) -> State:
    """The state with slopes of its last step that a cubic over a long step can follow.

    Off the slow manifold the velocity points back to it, and the cubic would leave it. So the
    slopes lose their stiff part (1 − M)³v, with M the damping among velocities that stay on the
    kinks of both ends; what remains of the rest is exact to third order in the step. Only steps
    that are read need it."""
    step = state.segment
    if step is None or step.multipliers0 is None or step.multipliers1 is None:
        return state
    metric = Metric.of(field.norm)
    net = problem.two_layer(len(step.w0))
    point = net.at(step.w0)
    given = sides_at(point, step.multipliers0)
    gain = GAMMA * state.memory["tau"]
    damping = GaussNewton.at(metric, point, given, gain)
    sliding = between(step.multipliers0) & between(step.multipliers1)
    pairs = ActivePairs.of(point, sliding.view_as(point.z), metric)
    system = KinkCoupling.of(pairs, damping).system
    solve = system.factored(pairs.valid)

    def staying(v: Tensor) -> Tensor:
        """Mv."""
        damped = damping(v)
        force = solve(pairs.along(damped))
        held = metric.inverse(pairs.combine(force))
        return damped - damping(held)

    return replace(state, segment=smoothed(staying, step))

"""Explicit Runge–Kutta pairs for smooth steepest flows: DOPRI5 and BOSH3.

At ties and kinks their error estimates collapse, so they refuse norms and nets that have any."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor

from flowsim.flow.field import Field, Sample, require_smooth, sample_of
from flowsim.flow.steps import (
    Controller,
    Method,
    begun,
    count_attempt,
    excess_of,
    first_size,
    length,
    moved_along,
    segment_between,
    stop_if_stuck,
)
from flowsim.motion.clocks import Target
from flowsim.motion.rule import advance_by_steps
from flowsim.motion.state import State
from flowsim.numerics.batched import dot
from flowsim.numerics.quadrature import log_mean_exp
from flowsim.numerics.shapes import PerTrajectory
from flowsim.problems.objective import Objective


@dataclass(frozen=True)
class RungeKutta(Method):
    """An explicit pair whose last stage is the first of the next step (FSAL), with its own step
    size for each trajectory.

    Row i of ``stages`` gives stage i + 2 from the stages before it; its last row is the solution of
    order ``order``. ``error`` weighs all stages into the difference e to the embedded solution of
    order ``order − 1``; ``middle`` into the solution at half the step, to fourth order.

    A step is accepted where ‖e‖₂ ≤ atol + rtol·‖w‖₂ and, for a loss, it moves Λ by
    ``|⟨∇Λ, e⟩| ≤ rtol``: softmax weights need margins to an absolute accuracy, however large the
    weights are. log t is held to ``rtol`` as well: along a straight path nothing else would bound
    the step."""

    name: str
    order: int
    stages: tuple[tuple[float, ...], ...]
    error: tuple[float, ...]
    middle: tuple[float, ...] | None = None

    @property
    def nodes(self) -> tuple[float, ...]:
        """Where in the step each stage is, from 0 to 1."""
        later = (sum(row) for row in self.stages)
        return (0.0, *later)

    @property
    def evaluations(self) -> int:
        """New field evaluations a step."""
        return len(self.stages)

    def start(self, field: Field, objective: Objective, state: State) -> State:
        require_smooth(field, objective)
        sample = field(objective, state.w)
        size = first_size(state.w, sample)
        return begun(objective, state, sample, size)

    def advance(
        self, field: Field, objective: Objective, state: State, until: Target, budget: int
    ) -> State:
        step = partial(self._step, field)
        return advance_by_steps(step, objective, state, until, budget)

    def _step(self, field: Field, objective: Objective, state: State) -> State:
        """One attempt of every trajectory."""
        first = sample_of(state)
        dt = state.step_size
        w, error, samples = runge_kutta(self, partial(field, objective), state.w, first, dt)
        elapsed, doubt = self._elapsed(samples, dt)
        others = [_lateness(state, elapsed, doubt)]
        if objective.logarithmic:
            rise = dot(samples[-1].ascent, error)
            others.append(rise.abs().double())
        excess = excess_of(field, state.w, w, error, samples[-1], *others)
        state = count_attempt(state, excess <= 1, gradients=self.evaluations)
        moved = self._moved(objective, state, w, samples, elapsed)
        state = moved.where(excess <= 1, state)
        state = replace(state, step_size=dt * Controller(self.order).factor(excess))
        move = state.step_size * length(first.velocity)
        return stop_if_stuck(state, move, torch.isfinite(excess))

    def _moved(
        self, objective: Objective, state: State, w: Tensor, samples: list[Sample], elapsed: Tensor
    ) -> State:
        """The state after an accepted step; readings by the quadrature of the pair."""
        *inner, last = samples
        dt = state.step_size
        gains = {}
        for name in last.rates:
            rates = [s.rates[name] for s in inner]
            gains[name] = dt * combine(self.stages[-1], rates)
        step = segment_between(objective, state, w, samples[0], last, dt)
        bend = self._bend(state, w, samples)
        step = replace(step, bend=bend)
        return moved_along(state, step, last, gains, elapsed)

    def _bend(self, state: State, w: Tensor, samples: list[Sample]) -> Tensor:
        """The pair's solution at half the step, less the cubic's there."""
        if self.middle is None:
            return torch.zeros_like(w)
        tau = state.step_size.to(w)[:, None]
        velocities = [s.velocity for s in samples]
        mean = combine(self.middle, velocities)
        middle = state.w + tau * mean
        slopes = velocities[0] - velocities[-1]
        return middle - 0.5 * (state.w + w) - 0.125 * tau * slopes

    def _elapsed(self, samples: list[Sample], dt: Tensor) -> tuple[PerTrajectory, PerTrajectory]:
        """log of the flow time that the step takes, and log of its error.

        Λ can move by many units in a step, and log dt/dτ with it. A log rate that is linear is
        integrated exactly; the pair's quadrature sees only the difference."""
        rates = torch.stack([s.log_time_rate for s in samples])
        peak = rates.amax(0)
        linear = log_mean_exp(rates[0], rates[-1])
        rest = self._beyond_linear(rates, peak)
        beyond = combine(self.stages[-1], rest[:-1])
        mean = torch.exp(linear - peak) + beyond
        log_mean = peak + torch.log(mean.clamp_min(1e-300))
        log_mean = torch.where(mean > 0, log_mean, linear)
        doubt = combine(self.error, rest).abs()
        log_doubt = peak + torch.log(doubt)
        log_dt = torch.log(dt)
        return log_dt + log_mean, log_dt + log_doubt

    def _beyond_linear(self, rates: Float[Tensor, "stages B"], peak: PerTrajectory) -> list[Tensor]:
        """e^(r − peak) less that of a linear r with the same ends, for the log rate r of every
        stage."""
        first = rates[0]
        last = rates[-1]
        rest = []
        for c, rate in zip(self.nodes, rates, strict=True):
            linear = first + c * (last - first)
            beyond = torch.exp(rate - peak) - torch.exp(linear - peak)
            rest.append(beyond)
        return rest


def _lateness(state: State, elapsed: PerTrajectory, doubt: PerTrajectory) -> PerTrajectory:
    """The error of log t after a step that takes a time of this logarithm and log error."""
    log_time = torch.logaddexp(state.readings["log_time"], elapsed)
    late = torch.exp(doubt - log_time)
    return torch.where(torch.isfinite(late), late, 0.0)


BOSH3 = RungeKutta(
    "bosh3",
    3,
    ((1 / 2,), (0, 3 / 4), (2 / 9, 1 / 3, 4 / 9)),
    (2 / 9 - 7 / 24, 1 / 3 - 1 / 4, 4 / 9 - 1 / 3, -1 / 8),
)
"""Bogacki & Shampine 1989, order 3(2)."""


DOPRI5 = RungeKutta(
    "dopri5",
    5,
    (
        (1 / 5,),
        (3 / 40, 9 / 40),
        (44 / 45, -56 / 15, 32 / 9),
        (19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729),
        (9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656),
        (35 / 384, 0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84),
    ),
    (71 / 57600, 0, -71 / 16695, 71 / 1920, -17253 / 339200, 22 / 525, -1 / 40),
    (
        6025192743 / 60171106304,
        0,
        51252292925 / 130801643196,
        -2691868925 / 90256659456,
        187940372067 / 3189068634112,
        -1776094331 / 39487288512,
        11237099 / 470086768,
    ),
)
"""Dormand & Prince 1980, order 5(4); the middle is Shampine 1986."""


def runge_kutta(
    pair: RungeKutta,
    field: Callable[[Tensor], Sample],
    w: Tensor,
    first: Sample,
    dt: PerTrajectory,
) -> tuple[Tensor, Tensor, list[Sample]]:
    """One step of size dt from w, where the field is ``first``: the new point, its error vector,
    all samples."""
    tau = dt.to(w)[:, None]
    samples = [first]
    velocities = [first.velocity]
    point = w
    for row in pair.stages:
        point = w + tau * combine(row, velocities)
        samples.append(field(point))
        velocities.append(samples[-1].velocity)
    return point, tau * combine(pair.error, velocities), samples


def combine(weights: tuple[float, ...], values: list[Tensor]) -> Tensor:
    """Σ c·v, added in order."""
    pairs = zip(weights, values, strict=True)
    first, *others = (c * v for c, v in pairs if c != 0)
    for term in others:
        first = first + term
    return first

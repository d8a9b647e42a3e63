"""TODO."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from flowsim.flow.field import Field, Sample, memory_of, require_smooth, sample_of
from flowsim.flow.steps import count_attempt, first_size, length, segment_between, stop_if_stuck
from flowsim.motion.clocks import Target
from flowsim.motion.rule import advance_by_steps
from flowsim.motion.state import State, Status
from flowsim.numerics.quadrature import log_mean_exp
from flowsim.problems.objective import Objective


@dataclass(frozen=True)
class Tableau:
    """An explicit Runge–Kutta pair whose last stage is the first of the next step (FSAL).

    Row i of ``stages`` gives stage i + 2 from the stages before it; its last row is the solution of
    order ``order``. ``error`` weighs all stages into the difference to the embedded solution of
    order ``order − 1``."""

    name: str
    order: int
    stages: tuple[tuple[float, ...], ...]
    error: tuple[float, ...]
    middle: tuple[float, ...] | None = (
        None  # of all stages: the solution at half the step, to fourth order
    )

    @property
    def nodes(self) -> tuple[float, ...]:
        """Where in the step each stage is, from 0 to 1."""
        return (0.0, *(sum(row) for row in self.stages))

    @property
    def evaluations(self) -> int:
        """New field evaluations a step."""
        return len(self.stages)

    def solver(self, rtol: float, atol: float) -> "RungeKutta":
        """This pair with its own step size for each trajectory."""
        return RungeKutta(self, rtol, atol)


BOSH3 = Tableau(
    "bosh3",
    3,
    ((1 / 2,), (0, 3 / 4), (2 / 9, 1 / 3, 4 / 9)),
    (2 / 9 - 7 / 24, 1 / 3 - 1 / 4, 4 / 9 - 1 / 3, -1 / 8),
)


"""Bogacki & Shampine 1989, order 3(2)."""


DOPRI5 = Tableau(
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
    tableau: Tableau,
    field: Callable[[Tensor], Sample],
    w: Tensor,
    first: Sample,
    dt: Float[Tensor, " B"],
) -> tuple[Tensor, Tensor, list[Sample]]:
    """One step of size dt from w, where the field is ``first``: the new point, its error vector,
    all samples."""
    h = dt.to(w)[:, None]
    samples = [first]
    point = w
    for row in tableau.stages:
        point = w + h * combine(row, [s.velocity for s in samples])
        samples.append(field(point))
    return point, h * combine(tableau.error, [s.velocity for s in samples]), samples


def combine(weights: tuple[float, ...], values: list[Tensor]) -> Tensor:
    """Σ c·v, added in order: a reduction of stacked terms would round by a trajectory's place in
    the batch."""
    first, *others = (c * v for c, v in zip(weights, values, strict=True) if c != 0)
    for term in others:
        first = first + term
    return first


@dataclass(frozen=True)
class RungeKutta:
    """An embedded pair with its own step size for each trajectory.

    A step is accepted where the error vector e satisfies ‖e‖₂ ≤ atol + rtol·‖w‖₂ and, for a loss,
    moves Λ by ``|⟨∇Λ, e⟩| ≤ rtol``: softmax weights need margins to an absolute accuracy, however
    large the weights are. log t is held to ``rtol`` as well: along a straight path nothing else
    would bound the step."""

    tableau: Tableau
    rtol: float
    atol: float

    def start(self, field: Field, objective: Objective, state: State) -> State:
        require_smooth(field, objective)
        sample = field(objective, state.w)
        size = torch.where(
            torch.isfinite(state.step_size), state.step_size, first_size(state.w, sample)
        )
        count = torch.ones_like(size)
        state = replace(
            state,
            step_size=size,
            readings=state.readings | {"lam": sample.lam},
            tallies=state.tallies | {"gradients": state.tallies["gradients"] + count},
            memory=memory_of(sample),
            segment=segment_between(
                objective, state, state.w, sample, sample, torch.zeros_like(size)
            ),
        )
        return state.stopped(sample.dual == 0, Status.STATIONARY)

    def advance(
        self, field: Field, objective: Objective, state: State, until: Target, budget: int
    ) -> State:
        return advance_by_steps(
            lambda part, local: self._step(field, part, local), objective, state, until, budget
        )

    def _step(self, field: Field, objective: Objective, state: State) -> State:
        """One attempt of every trajectory."""
        first, dt = sample_of(state), state.step_size
        w, error, samples = runge_kutta(
            self.tableau, lambda w: field(objective, w), state.w, first, dt
        )
        elapsed, doubt = self._elapsed(samples, dt)
        log_time = torch.logaddexp(state.readings["log_time"], elapsed)
        late = torch.exp(doubt - log_time) / self.rtol
        excess = self._excess(objective, state.w, w, error, samples[-1])
        excess = torch.maximum(excess, torch.where(torch.isfinite(late), late, 0.0))
        accepted = excess <= 1
        state = count_attempt(state, accepted, self.tableau.evaluations)
        moved = self._moved(objective, state, w, samples, dt, log_time)
        chosen = moved.where(accepted, state)
        factor = (0.9 * excess.clamp_min(1e-10) ** (-1 / self.tableau.order)).clamp(0.2, 5.0)
        chosen = replace(
            chosen, step_size=dt * torch.where(accepted, factor, factor.clamp_max(0.9))
        )
        return stop_if_stuck(chosen, first, finite=torch.isfinite(excess))

    def _excess(
        self, objective: Objective, w0: Tensor, w1: Tensor, error: Tensor, last: Sample
    ) -> Tensor:
        """The error over its tolerance; infinite where the trial is not finite."""
        size = torch.maximum(length(w0), length(w1))
        excess = length(error) / (self.atol + self.rtol * size)
        if objective.logarithmic:
            excess = torch.maximum(excess, (last.ascent * error).sum(-1).abs().double() / self.rtol)
        finite = (
            torch.isfinite(excess)
            & torch.isfinite(last.lam)
            & torch.isfinite(length(last.velocity))
        )
        return torch.where(finite, excess, torch.inf)

    def _moved(
        self,
        objective: Objective,
        state: State,
        w: Tensor,
        samples: list[Sample],
        dt: Tensor,
        log_time: Tensor,
    ) -> State:
        """The state after an accepted step; readings by the quadrature of the tableau."""
        weights = self.tableau.stages[-1]
        inner = samples[: len(weights)]
        gained = {
            name: dt * combine(weights, [s.rates[name] for s in inner]) for name in samples[0].rates
        }
        readings = {
            "steps": state.readings["steps"] + 1,
            "lam": samples[-1].lam,
            "log_time": log_time,
            **{name: state.readings[name] + gain for name, gain in gained.items()},
        }
        moved = replace(
            state,
            w=w,
            readings=readings,
            memory=memory_of(samples[-1]),
        )
        step = segment_between(objective, state, w, samples[0], samples[-1], dt, moved.readings)
        return replace(moved, segment=replace(step, bend=self._bend(state, w, samples, dt)))

    def _bend(self, state: State, w: Tensor, samples: list[Sample], dt: Tensor) -> Tensor:
        """The tableau's solution at half the step, less the cubic's there."""
        if self.tableau.middle is None:
            return torch.zeros_like(w)
        h = dt.to(w)[:, None]
        middle = state.w + h * combine(self.tableau.middle, [s.velocity for s in samples])
        return (
            middle - 0.5 * (state.w + w) - 0.125 * h * (samples[0].velocity - samples[-1].velocity)
        )

    def _elapsed(
        self, samples: list[Sample], dt: Tensor
    ) -> tuple[Float[Tensor, " B"], Float[Tensor, " B"]]:
        """log of the flow time that the step takes, and log of its error.

        Λ can move by many units in a step, and log dt/dτ with it. A log rate that is linear is
        integrated exactly; the tableau's quadrature sees only the difference."""
        rates = torch.stack([s.log_time_rate for s in samples])
        first, last, peak = rates[0], rates[-1], rates.amax(0)
        linear = log_mean_exp(first, last)
        rest = [
            torch.exp(rate - peak) - torch.exp(first + c * (last - first) - peak)
            for c, rate in zip(self.tableau.nodes, rates, strict=True)
        ]
        mean = torch.exp(linear - peak) + combine(self.tableau.stages[-1], rest[:-1])
        log_mean = torch.where(mean > 0, peak + torch.log(mean.clamp_min(1e-300)), linear)
        doubt = peak + torch.log(combine(self.tableau.error, rest).abs())
        return torch.log(dt) + log_mean, torch.log(dt) + doubt

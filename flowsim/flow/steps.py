"""What all methods of a flow share: their seam, one control of step sizes, and the bookkeeping of a
step.

Every trajectory has its own step size, error estimate, acceptance and status."""

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from flowsim.flow.field import Field, Sample, memory_of
from flowsim.motion.clocks import Clock, Target
from flowsim.motion.segment import Segment
from flowsim.motion.state import State, Status
from flowsim.numerics.quadrature import log_elapsed
from flowsim.numerics.shapes import PerTrajectory
from flowsim.problems.objective import Objective


class Method(ABC):
    """How a field is followed, to its tolerance: what users pass to a flow."""

    own_clock: ClassVar[Clock | None] = None
    """The clock that it integrates by; None where any will do."""

    @abstractmethod
    def start(self, field: Field, objective: Objective, state: State) -> State:
        """The state with the field at its place; raises ValueError where it cannot be followed."""

    @abstractmethod
    def advance(
        self, field: Field, objective: Objective, state: State, until: Target, budget: int
    ) -> State:
        """`Rule.advance`; ``budget`` counts the attempted steps of each trajectory."""

    def refined(
        self, field: Field, objective: Objective, state: State, u: Tensor, point: State
    ) -> State:
        """``point``, read off the last step of ``state`` at u, as near to the flow as can be."""
        return point


@dataclass(frozen=True)
class Controller:
    """The next step size, from the excess e of an attempt (its error over its tolerance, ∝ size to
    the power ``order``): f = safety·e^(−1/order) times the last.

    After an accepted attempt f is at most ``most``; after a rejected one it is between ``least``
    and ``retry``, and ``broken`` where e is no number. With ``damping`` δ > 0 the last accepted e₀
    takes part as well, f·(e₀²/e)^(δ/order) (Gustafsson 1991): proportional and integral control,
    whose proportional part is weak, since along a step size that grows for ever a strong one holds
    the error far below the tolerance."""

    order: int
    safety: float = 0.9
    least: float = 0.2
    most: float = 5.0
    retry: float = 0.9
    broken: float = 0.2
    damping: float = 0.0

    def factor(
        self,
        excess: Float[Tensor, "..."],
        before: Tensor | None = None,
        refused: Tensor | None = None,
    ) -> Float[Tensor, "..."]:
        """f for every e = ``excess``, with e₀ = ``before``; no growth where the last attempt was
        ``refused``, since a larger step would be as well."""
        power = 1 / self.order
        plain = self.safety * excess**-power
        grown = plain
        if before is not None:
            damped = excess ** (-(1 + self.damping) * power)
            grown = self.safety * damped * before ** (2 * self.damping * power)
        grown = grown.clamp(self.least, self.most)
        if refused is not None:
            most = torch.where(refused > 0, 1.0, self.most)
            grown = grown.clamp_max(most)
        shrunk = plain.clamp(self.least, self.retry)
        shrunk = torch.where(torch.isfinite(excess), shrunk, self.broken)
        return torch.where(excess <= 1, grown, shrunk)


def length(v: Tensor) -> PerTrajectory:
    """‖v‖₂ in double precision."""
    return torch.linalg.vector_norm(v, dim=-1).double()


def first_size(w: Tensor, sample: Sample) -> PerTrajectory:
    """A step that moves by a thousandth of the weights' size, or of a unit; rejection corrects
    it."""
    size = length(w)
    unit = torch.where(size > 0, size, 1.0)
    return 1e-3 * unit / length(sample.velocity)


def error_of_weights(field: Field, w0: Tensor, w1: Tensor, error: Tensor) -> PerTrajectory:
    """‖e‖₂/(atol + rtol·‖w‖₂) for the error vector e of a step from w0 to w1."""
    largest = torch.maximum(length(w0), length(w1))
    return length(error) / (field.atol + field.rtol * largest)


def excess_of(
    field: Field, w0: Tensor, w1: Tensor, error: Tensor, last: Sample, *others: Tensor
) -> PerTrajectory:
    """The largest of `error_of_weights` and ``others`` over rtol; infinite where one of these, or
    the field ``last`` at w1, is no number."""
    excess = error_of_weights(field, w0, w1, error)
    for other in others:
        excess = torch.maximum(excess, other / field.rtol)
    total = excess + last.lam + length(last.velocity)
    return torch.where(torch.isfinite(total), excess, torch.inf)


def begun(
    objective: Objective,
    state: State,
    sample: Sample,
    size: Tensor,
    memory: dict[str, Any] | None = None,
) -> State:
    """The state at the start of a flow where the field is ``sample``, with a first step size (kept
    where the state has one), what else the method remembers, and a step of no length behind it."""
    kept = torch.isfinite(state.step_size)
    nothing = torch.zeros_like(size)
    still = segment_between(objective, state, state.w, sample, sample, nothing)
    kinks = state.multipliers
    still = replace(still, multipliers0=kinks, multipliers1=kinks)
    state = replace(
        state,
        step_size=torch.where(kept, state.step_size, size),
        readings=state.readings | {"lam": sample.lam},
        tallies=added(state, gradients=1),
        memory=memory_of(sample) | (memory or {}),
        segment=still,
    )
    return state.stopped(sample.dual_norm == 0, Status.STATIONARY)


def without_size(state: State) -> State:
    """The state without a step size that is on the clock of another method."""
    return replace(state, step_size=torch.full_like(state.step_size, torch.nan))


def added(state: State, **counts: float | Tensor) -> dict[str, Tensor]:
    """The tallies of a state with these counts added."""
    tallies = dict(state.tallies)
    for name, count in counts.items():
        tallies[name] = tallies[name] + count
    return tallies


def count_attempt(state: State, accepted: Tensor, **counts: float | Tensor) -> State:
    """The state with an attempt counted, and what it took, such as ``gradients``."""
    yes = accepted.double()
    tallies = added(state, accepted=yes, rejected=1 - yes, **counts)
    return replace(state, tallies=tallies)


def stop_if_stuck(
    state: State, move: PerTrajectory, finite: Bool[Tensor, " B"], least: float = 0.0
) -> State:
    """The state, stopped where it cannot go on: where the length ``move`` of the next attempt is
    within rounding of the weights, because the last one was not ``finite`` or was no good."""
    state = state.stopped(state.memory["dual_norm"] == 0, Status.STATIONARY)
    eps = torch.finfo(state.w.dtype).eps
    rounding = 4 * eps * length(state.w)
    # not "≤", which lets steps pass that are no number
    stuck = ~(move > rounding + least)
    state = state.stopped(stuck & ~finite, Status.NONFINITE)
    return state.stopped(stuck, Status.STEP_TOO_SMALL)


def moved_along(
    state: State, step: Segment, last: Sample, gains: dict[str, Tensor], elapsed: Tensor
) -> State:
    """The state after an accepted ``step``, where the field is ``last``, with the ``gains`` of its
    readings and the logarithm of the time that it took."""
    before = state.readings
    log_time = torch.logaddexp(before["log_time"], elapsed)
    readings = {"steps": before["steps"] + 1, "lam": last.lam, "log_time": log_time}
    for name, gain in gains.items():
        readings[name] = before[name] + gain
    step = replace(step, readings1=readings)
    memory = state.memory | memory_of(last)
    return replace(state, w=step.w1, readings=readings, memory=memory, segment=step)


def segment_between(
    objective: Objective,
    state: State,
    w: Tensor,
    a: Sample,
    b: Sample,
    dt: PerTrajectory,
    readings: dict[str, Tensor] | None = None,
) -> Segment:
    """The step of ``dt`` units of the clock from ``state`` to ``w``, with the field at both ends
    and the readings at the end (by default a step of no length)."""
    tau = dt.to(w)[:, None]
    log_dt = torch.log(dt)
    here = state.readings | {"lam": a.lam}
    time_slope0, time_slope1 = _log_rate_slopes(objective, a, b, dt)
    return Segment(
        w0=state.w,
        w1=w,
        slope0=tau * a.velocity,
        slope1=tau * b.velocity,
        readings0=here,
        readings1=readings or here,
        lam_slope0=dt * a.rates["dissipated"],
        lam_slope1=dt * b.rates["dissipated"],
        time_rate0=a.log_time_rate + log_dt,
        time_rate1=b.log_time_rate + log_dt,
        time_slope0=time_slope0,
        time_slope1=time_slope1,
        bend=torch.zeros_like(w),
    )


def log_elapsed_in(objective: Objective, a: Sample, b: Sample, dt: PerTrajectory) -> PerTrajectory:
    """log of the flow time that a step of ``dt`` units of the clock takes, from the field at both
    ends."""
    slopes = _log_rate_slopes(objective, a, b, dt)
    log_mean = log_elapsed(a.log_time_rate, b.log_time_rate, *slopes)
    return torch.log(dt) + log_mean


def _log_rate_slopes(
    objective: Objective, a: Sample, b: Sample, dt: Tensor
) -> tuple[Tensor, Tensor]:
    """Derivatives of log dt/dτ over the step, at both ends.

    It holds the level, whose derivative is known, and otherwise is taken as linear. On a clock of
    time it is constant."""
    turn = b.log_time_rate - a.log_time_rate
    if not objective.logarithmic:
        return turn, turn
    rest = turn - (b.lam - a.lam)
    start = dt * a.rates["dissipated"] + rest
    end = dt * b.rates["dissipated"] + rest
    tiny = 1e-12 * (1 + a.lam.abs())
    constant = turn.abs() <= tiny
    return torch.where(constant, 0.0, start), torch.where(constant, 0.0, end)

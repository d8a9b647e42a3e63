"""Adaptive integration of smooth steepest flows: the field, the verbs of a method, and embedded
Runge–Kutta pairs.

Every trajectory has its own step size, error estimate, acceptance and status. These methods are for
fields that are smooth; at ties and kinks their error estimates collapse, so `flow.SteepestFlow`
does not let them near any."""

from dataclasses import replace
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from flowsim.flow.field import Field, Sample
from flowsim.motion.clocks import Target
from flowsim.motion.segment import Segment
from flowsim.motion.state import State, Status
from flowsim.numerics.quadrature import log_elapsed
from flowsim.problems.objective import Objective


class Integrator(Protocol):
    """How a field is integrated, to a tolerance. ``budget`` counts attempted steps of each
    trajectory."""

    def start(self, field: Field, objective: Objective, state: State) -> State: ...

    def advance(
        self, field: Field, objective: Objective, state: State, until: Target, budget: int
    ) -> State: ...


@runtime_checkable
class Settling(Protocol):
    """A solver that can improve what is read off its steps; see `state.Settling`."""

    def refined(
        self, field: Field, objective: Objective, state: State, u: Tensor, point: State
    ) -> State: ...


@runtime_checkable
class Method(Protocol):
    """What users pass to a flow: a method that makes a solver once the tolerance is known."""

    def solver(self, rtol: float, atol: float) -> Integrator: ...


def first_size(w: Tensor, sample: Sample) -> Float[Tensor, " B"]:
    """A step that moves by a thousandth of the weights' size, or of a unit; rejection corrects
    it."""
    return 1e-3 * torch.where(length(w) > 0, length(w), 1.0) / length(sample.velocity)


def count_attempt(state: State, accepted: Tensor, gradients: int) -> State:
    """The state with an attempt counted, and the gradient evaluations that it took."""
    yes = accepted.double()
    tallies = state.tallies | {
        "gradients": state.tallies["gradients"] + gradients,
        "accepted": state.tallies["accepted"] + yes,
        "rejected": state.tallies["rejected"] + 1 - yes,
    }
    return replace(state, tallies=tallies)


def stop_if_stuck(state: State, first: Sample, finite: Tensor) -> State:
    """The state with trajectories stopped that cannot go on."""
    state = state.stopped(state.memory["dual"] == 0, Status.STATIONARY)
    eps = torch.finfo(state.w.dtype).eps
    # not "≤", which lets steps pass that are no number
    stuck = ~(state.step_size * length(first.velocity) > 4 * eps * length(state.w))
    return state.stopped(stuck & ~finite, Status.NONFINITE).stopped(stuck, Status.STEP_TOO_SMALL)


def length(v: Tensor) -> Float[Tensor, " B"]:
    """‖v‖₂ in double precision."""
    return torch.linalg.vector_norm(v, dim=-1).double()


def segment_between(
    objective: Objective,
    state: State,
    w: Tensor,
    a: Sample,
    b: Sample,
    dt: Tensor,
    readings: dict[str, Tensor] | None = None,
) -> Segment:
    """The step of ``dt`` units of the clock from ``state`` to ``w``, with the field at both ends
    and the readings at the end (by default a step of no length)."""
    h = dt.to(w)[:, None]
    log_dt = torch.log(dt)
    here = state.readings | {"lam": a.lam}
    end = readings or here
    lam_slopes = [dt * a.rates["dissipated"], dt * b.rates["dissipated"]]
    rates = [a.log_time_rate + log_dt, b.log_time_rate + log_dt]
    time_slopes = _log_rate_slopes(objective, a, b, dt)
    return Segment(
        w0=state.w,
        w1=w,
        slope0=h * a.velocity,
        slope1=h * b.velocity,
        readings0=here,
        readings1=end,
        lam_slope0=lam_slopes[0],
        lam_slope1=lam_slopes[1],
        time_rate0=rates[0],
        time_rate1=rates[1],
        time_slope0=time_slopes[0],
        time_slope1=time_slopes[1],
        bend=torch.zeros_like(w),
    )


def log_elapsed_in(objective: Objective, a: Sample, b: Sample, dt: Tensor) -> Float[Tensor, " B"]:
    """log of the flow time that a step of ``dt`` units of the clock takes, from the field at both
    ends."""
    slopes = _log_rate_slopes(objective, a, b, dt)
    return torch.log(dt) + log_elapsed(a.log_time_rate, b.log_time_rate, *slopes)


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
    constant = turn.abs() <= 1e-12 * (1 + a.lam.abs())
    start, end = (torch.where(constant, 0.0, dt * s.rates["dissipated"] + rest) for s in (a, b))
    return start, end

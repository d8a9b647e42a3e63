"""What a method integrates: the velocity of a steepest flow on a clock, with the rates of its
readings."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from flowsim.motion.clocks import Clock, Speed, log_time_rate
from flowsim.motion.state import State
from flowsim.norms.norm import Norm
from flowsim.numerics.shapes import PerTrajectory, Rows
from flowsim.problems.objective import Objective


@dataclass(frozen=True)
class Sample:
    """The field at one point: velocity dw/dτ ``(B, P)``, the level Λ, its gradient h and ‖h‖_*.

    ``rates`` holds dx/dτ of arclength, relative arclength and dissipated level, per unit of the
    clock τ; ``log_time_rate`` is log dt/dτ."""

    velocity: Rows
    lam: PerTrajectory
    ascent: Rows
    dual_norm: PerTrajectory
    rates: dict[str, PerTrajectory]
    log_time_rate: PerTrajectory


@dataclass(frozen=True)
class Field:
    """dw/dτ = (ds/dτ)·u(w), with u the unit steepest direction of h = ∇Λ in the (bound) ``norm``
    and ds/dτ from ``clock``, to be followed to ``atol + rtol·size``."""

    norm: Norm
    clock: Clock
    rtol: float = 1e-4
    atol: float = 1e-12

    def __call__(self, objective: Objective, w: Rows) -> Sample:
        """The field where ∇Λ is one vector and the norm has one steepest direction."""
        lam, h = objective.ascent(w)
        u = self.norm.steepest(h)
        return self.sample(objective, w, lam, h, u)

    def sample(self, objective: Objective, w: Tensor, lam: Tensor, h: Tensor, u: Tensor) -> Sample:
        """The field with the element h of ∇Λ and the unit steepest direction u that have been
        selected."""
        lam = lam.double()
        dual_norm = self.norm.dual(h).double()
        length = self.norm.value(w).double()
        time_rate = log_time_rate(objective, lam, dual_norm)
        speed = speed_of(self.clock)(time_rate, dual_norm, length)
        rates = {
            "arclength": speed,
            "relative": per_length(speed, length),
            "dissipated": speed * dual_norm,
        }
        velocity = speed.to(w)[:, None] * u
        clock_rate = time_rate + torch.log(speed)
        return Sample(velocity, lam, h, dual_norm, rates, clock_rate)


def speed_of(clock: Clock) -> Speed:
    """ds/dτ of a clock; raises ValueError where it has none."""
    if not isinstance(clock, Clock) or clock.speed is None:
        raise ValueError(
            f"SteepestFlow: got clock {clock!r}, expected one that can be integrated against, "
            "try flowsim.clocks.ARCLENGTH"
        )
    return clock.speed


def per_length(speed: PerTrajectory, length: PerTrajectory) -> PerTrajectory:
    """speed/‖w‖; 0 at w = 0, where relative arclength is infinite: it counts from the first point
    that is not."""
    tiny = torch.finfo(length.dtype).tiny
    return torch.where(length > 0, speed / length.clamp_min(tiny), 0.0)


def require_smooth(field: Field, objective: Objective) -> None:
    """Refuse a field that jumps: there a one-step error estimate says nothing about the true
    solution."""
    jumps = "the net has kinks (ReLU)" if objective.kinks else None
    if field.norm.ties and not jumps:
        jumps = f"the {field.norm.name} norm has ties"
    if jumps:
        raise ValueError(
            f"this method is for smooth fields, but {jumps}, where an explicit ODE solver stalls "
            "or follows another path; try method=None, or flowsim.SmallStep for small steps"
        )


def memory_of(sample: Sample) -> dict[str, Any]:
    """A sample as the memory of a state whose level it shares."""
    memory = dict(vars(sample))
    memory.pop("lam")
    return memory


def sample_of(state: State) -> Sample:
    """The inverse of `memory_of`."""
    names = ("velocity", "ascent", "dual_norm", "rates", "log_time_rate")
    parts = {name: state.memory[name] for name in names}
    return Sample(lam=state.readings["lam"], **parts)

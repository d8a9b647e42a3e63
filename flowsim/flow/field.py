"""TODO."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from flowsim.motion.clocks import Clock, log_time_rate
from flowsim.motion.state import State
from flowsim.norms.norm import Norm
from flowsim.problems.objective import Objective


@dataclass(frozen=True)
class Sample:
    """The field at one point: velocity dw/dτ ``(B, P)``, level and its gradient, and rates per unit
    of the clock τ.

    ``rates`` holds dx/dτ of arclength, relative arclength and dissipated level; ``log_time_rate``
    is log dt/dτ."""

    velocity: Float[Tensor, "B P"]
    lam: Float[Tensor, " B"]
    ascent: Float[Tensor, "B P"]
    dual: Float[Tensor, " B"]
    rates: dict[str, Float[Tensor, " B"]]
    log_time_rate: Float[Tensor, " B"]


@dataclass(frozen=True)
class Field:
    """dw/dτ = (ds/dτ)·u(w), with u the unit steepest direction of ∇Λ in ``norm`` and ds/dτ from
    ``clock``."""

    norm: Norm
    clock: Clock

    def __call__(self, objective: Objective, w: Float[Tensor, "B P"]) -> Sample:
        """The field where ∇Λ is one vector and the norm has one steepest direction."""
        lam, h = objective.ascent(w)
        return self.sample(objective, w, lam, h, self.norm.steepest(h))

    def sample(self, objective: Objective, w: Tensor, lam: Tensor, h: Tensor, u: Tensor) -> Sample:
        """The field with the element h of ∇Λ and the unit steepest direction u that have been
        selected."""
        dual, size = self.norm.dual(h).double(), self.norm.value(w).double()
        lam = lam.double()
        assert self.clock.speed is not None
        time_rate = log_time_rate(objective, lam, dual)
        speed = self.clock.speed(time_rate, dual, size)
        rates = {
            "arclength": speed,
            # at w = 0 relative arclength is infinite; it counts from the first point that is not
            "relative": torch.where(
                size > 0, speed / size.clamp_min(torch.finfo(size.dtype).tiny), 0.0
            ),
            "dissipated": speed * dual,
        }
        velocity = speed.to(w)[:, None] * u
        return Sample(velocity, lam, h, dual, rates, time_rate + torch.log(speed))


def require_smooth(field: Field, objective: Objective) -> None:
    """Refuse a field that jumps: there a one-step error estimate says nothing about the true
    solution."""
    why = "where an explicit ODE solver stalls or follows another path"
    if objective.kinks:
        raise ValueError(
            f"this method is for smooth fields, but the net has kinks (ReLU), {why}; try method=None"
        )
    if field.norm.ties:
        raise ValueError(
            f"this method is for smooth fields, but the {field.norm.name} norm has ties, {why}; try method=None"
        )


def memory_of(sample: Sample) -> dict[str, Tensor]:
    """A sample as the memory of a state whose level it shares."""
    rates = {f"rate_{name}": rate for name, rate in sample.rates.items()}
    return {
        "velocity": sample.velocity,
        "ascent": sample.ascent,
        "dual": sample.dual,
        "log_time_rate": sample.log_time_rate,
        **rates,
    }


def sample_of(state: State) -> Sample:
    """The inverse of `memory_of`."""
    m = state.memory
    rates = {
        name.removeprefix("rate_"): value for name, value in m.items() if name.startswith("rate_")
    }
    return Sample(
        m["velocity"], state.readings["lam"], m["ascent"], m["dual"], rates, m["log_time_rate"]
    )

"""Solvers of torchdiffeq behind the same verbs as flowsim's own."""

from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from flowsim.flow.field import Field, memory_of, require_smooth
from flowsim.flow.steps import Method, added, begun, first_size
from flowsim.motion.clocks import Target
from flowsim.motion.rule import one_by_one
from flowsim.motion.state import State, Status
from flowsim.problems.objective import Objective

_ADAPTIVE = ("dopri5", "dopri8", "bosh3", "fehlberg2", "adaptive_heun")
_EXTRAS = ("arclength", "relative", "dissipated", "time")


@dataclass(frozen=True)
class TorchDiffEq(Method):
    """An adaptive solver of torchdiffeq (Chen 2018) by its name there: an independent check of a
    flow.

    Save points must be on the clock that the flow integrates, and each is the end of a call of the
    solver, one call for each trajectory. Where torchdiffeq gives up (its ``underflow in dt``
    assertion), the trajectory stops at its last accepted step with a status."""

    name: str = "dopri5"

    def __post_init__(self) -> None:
        if self.name not in _ADAPTIVE:
            raise ValueError(
                f"TorchDiffEq: got {self.name!r}, expected one of {', '.join(_ADAPTIVE)}"
            )

    def start(self, field: Field, objective: Objective, state: State) -> State:
        require_smooth(field, objective)
        sample = field(objective, state.w)
        state = begun(objective, state, sample, first_size(state.w, sample))
        return replace(state, segment=None)

    def advance(
        self, field: Field, objective: Objective, state: State, until: Target, budget: int
    ) -> State:
        if until.clock != field.clock:
            raise ValueError(
                f"torchdiffeq integrates on the {field.clock.name} clock, but save points are on "
                f"{until.clock.name}; try clock=flowsim.clocks.{until.clock.name.upper()}"
            )
        run = partial(self._solve, field, budget)
        return one_by_one(run, objective, state, until)

    def _solve(
        self, field: Field, budget: int, objective: Objective, state: State, until: Target
    ) -> State:
        """One call of torchdiffeq from the state's clock to the target's."""
        from torchdiffeq import odeint

        P = state.w.shape[1]
        path = _Recorded(field, objective, state.memory["log_time_rate"], size=P, budget=budget)
        y0 = torch.cat([state.w[0], state.w.new_zeros(len(_EXTRAS))])
        span = torch.cat([state.readings[field.clock.reading], until.value])
        if field.clock.reading == "log_time":
            span = torch.exp(span)
        options = {"norm": lambda y: y[:P].square().mean().sqrt()}
        status = Status.RUNNING
        try:
            tolerance = {"rtol": field.rtol, "atol": field.atol}
            y = odeint(path, y0, span, method=self.name, options=options, **tolerance)[-1]
            tau = span[1]
        except _BudgetSpent:
            tau, y = path.last or (span[0], y0)
        except AssertionError as error:
            status = Status.NONFINITE if "non-finite" in str(error) else Status.STEP_TOO_SMALL
            tau, y = path.last or (span[0], y0)
        return self._arrived(field, objective, state, path, tau, y).stopped(state.running, status)

    def _arrived(
        self,
        field: Field,
        objective: Objective,
        state: State,
        path: "_Recorded",
        tau: Tensor,
        y: Tensor,
    ) -> State:
        w = y[None, : -len(_EXTRAS)]
        extras = dict(zip(_EXTRAS, y[-len(_EXTRAS) :, None].double(), strict=True))
        sample = field(objective, w)
        log_time = path.log_time_unit + torch.log(extras["time"].clamp_min(0))
        gained = {name: state.readings[name] + extras[name] for name in _EXTRAS[:-1]}
        shown = torch.log(tau) if field.clock.reading == "log_time" else tau
        readings = {
            "steps": state.readings["steps"] + path.accepted,
            "lam": sample.lam,
            "log_time": torch.logaddexp(state.readings["log_time"], log_time),
            **gained,
            # the clock's own, so that it reaches its target
            field.clock.reading: shown[None].double(),
        }
        rejected = path.attempted - path.accepted
        tallies = added(state, gradients=path.calls + 1, accepted=path.accepted, rejected=rejected)
        return replace(state, w=w, readings=readings, tallies=tallies, memory=memory_of(sample))


class _BudgetSpent(Exception):
    pass


class _Recorded:
    """The field as torchdiffeq wants it, with readings as extra components; remembers the last
    accepted point."""

    def __init__(
        self, field: Field, objective: Objective, log_time_unit: Tensor, *, size: int, budget: int
    ) -> None:
        self.field, self.objective, self.size, self.budget = field, objective, size, budget
        self.log_time_unit = log_time_unit
        self.calls = self.attempted = self.accepted = 0
        self.last: tuple[Tensor, Tensor] | None = None

    def __call__(self, tau: Tensor, y: Tensor) -> Tensor:
        self.calls += 1
        sample = self.field(self.objective, y[None, : self.size])
        time = torch.exp(sample.log_time_rate - self.log_time_unit)
        extras = [*(sample.rates[name] for name in _EXTRAS[:-1]), time]
        return torch.cat([sample.velocity[0], torch.cat(extras).to(y)])

    def callback_step(self, t0: Tensor, y0: Tensor, dt: Tensor) -> None:
        """Before each attempt, from the point that was last accepted."""
        if bool(torch.isfinite(y0).all()):
            self.last = (t0, y0)
        if self.attempted == self.budget:
            raise _BudgetSpent
        self.attempted += 1

    def callback_accept_step(self, t0: Tensor, y0: Tensor, dt: Tensor) -> None:
        self.accepted += 1

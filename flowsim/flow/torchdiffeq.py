"""Solvers of torchdiffeq behind the same verbs as flowsim's own."""

from dataclasses import dataclass, replace
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor

from flowsim.flow.field import Field, memory_of, require_smooth
from flowsim.flow.steps import Method, added, begun, first_size
from flowsim.motion.clocks import Target
from flowsim.motion.rule import one_by_one
from flowsim.motion.state import State, Status
from flowsim.numerics.shapes import PerTrajectory
from flowsim.problems.objective import Objective

_ADAPTIVE = ("dopri5", "dopri8", "bosh3", "fehlberg2", "adaptive_heun")
_LENGTHS = ("arclength", "relative", "dissipated")
_EXTRAS = (*_LENGTHS, "time")


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
        extras = state.w.new_zeros(len(_EXTRAS))
        y0 = torch.cat([state.w[0], extras])
        span = torch.cat([state.readings[field.clock.reading], until.value])
        if field.clock.reading == "log_time":
            span = torch.exp(span)
        unit = state.memory["log_time_rate"]
        path = _Recorded(field, objective, unit, budget, last=(span[0], y0))
        status = Status.RUNNING
        try:
            path.last = (span[1], self._odeint(path, y0, span))
        except _BudgetSpent:
            pass
        except AssertionError as error:
            broken = "non-finite" in str(error)
            status = Status.NONFINITE if broken else Status.STEP_TOO_SMALL
        return path.arrived(state).stopped(state.running, status)

    def _odeint(self, path: "_Recorded", y0: Tensor, span: Tensor) -> Tensor:
        """The solution at the end of ``span``; weights alone take part in the error."""
        from torchdiffeq import odeint

        field = path.field

        def norm(y: Tensor) -> Tensor:
            w, _ = _parts(y)
            return w.square().mean().sqrt()

        solution = odeint(
            path,
            y0,
            span,
            rtol=field.rtol,
            atol=field.atol,
            method=self.name,
            options={"norm": norm},
        )
        return solution[-1]


class _BudgetSpent(Exception):
    pass


def _parts(y: Tensor) -> tuple[Tensor, Tensor]:
    """Weights and readings in a state of torchdiffeq."""
    return y[: -len(_EXTRAS)], y[-len(_EXTRAS) :]


@dataclass(eq=False)
class _Recorded:
    """The field as torchdiffeq wants it, with readings as extra components: time in units of
    e^``unit``. Counts what is asked of it, and remembers the ``last`` accepted point."""

    field: Field
    objective: Objective
    unit: PerTrajectory
    budget: int
    last: tuple[Tensor, Tensor]
    calls: int = 0
    attempted: int = 0
    accepted: int = 0

    def arrived(self, state: State) -> State:
        """``state`` moved to the last accepted point."""
        tau, y = self.last
        w, extras = _parts(y)
        sample = self.field(self.objective, w[None])
        readings = self._gained(state.readings, extras) | {"lam": sample.lam}
        # the clock's own, so that it reaches its target
        clock = self.field.clock.reading
        shown = torch.log(tau) if clock == "log_time" else tau
        readings[clock] = shown[None].double()
        tallies = added(
            state,
            gradients=self.calls + 1,
            accepted=self.accepted,
            rejected=self.attempted - self.accepted,
        )
        memory = memory_of(sample)
        return replace(state, w=w[None], readings=readings, tallies=tallies, memory=memory)

    def _gained(
        self, before: dict[str, PerTrajectory], extras: Float[Tensor, " extras"]
    ) -> dict[str, PerTrajectory]:
        """The readings with what the solver has added to them."""
        *lengths, time = extras[:, None].double()
        log_time = self.unit + torch.log(time.clamp_min(0))
        readings = {
            "steps": before["steps"] + self.accepted,
            "log_time": torch.logaddexp(before["log_time"], log_time),
        }
        for name, length in zip(_LENGTHS, lengths, strict=True):
            readings[name] = before[name] + length
        return readings

    def __call__(self, tau: Tensor, y: Tensor) -> Tensor:
        self.calls += 1
        w, _ = _parts(y)
        sample = self.field(self.objective, w[None])
        lengths = [sample.rates[name] for name in _LENGTHS]
        time = torch.exp(sample.log_time_rate - self.unit)
        extras = torch.cat([*lengths, time])
        return torch.cat([sample.velocity[0], extras.to(y)])

    def callback_step(self, t0: Tensor, y0: Tensor, dt: Tensor) -> None:
        """Before each attempt, from the point that was last accepted."""
        if bool(torch.isfinite(y0).all()):
            self.last = (t0, y0)
        if self.attempted == self.budget:
            raise _BudgetSpent
        self.attempted += 1

    def callback_accept_step(self, t0: Tensor, y0: Tensor, dt: Tensor) -> None:
        self.accepted += 1

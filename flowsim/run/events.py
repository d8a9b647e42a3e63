"""Events: where along its way a trajectory first reaches a level of some measurement, and states
inside a step."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from flowsim.checks import require_callable, require_finite, require_flag
from flowsim.motion.clocks import Clock
from flowsim.motion.state import READINGS, State
from flowsim.problems.objective import Objective

Measure = Callable[[Any, State], Tensor]
Mask = Bool[Tensor, " B"]

_HALVINGS = 40  # of a step, which leaves 1e-12 of it


@dataclass(frozen=True)
class Event:
    """The first point at which ``measure(problem, state)``, a ``(B,)``, is ≥ ``level``, or ≤ with
    ``falling``.

    The measure is any diagnostic, or a function of a state's weights and readings. It is looked at
    at the start, where it may be true already, and at the end of each natural step. The point
    inside the step is found by bisection on the step's dense output, to 1e-12 of the step; for
    rules whose steps are indivisible it is the first iterate. What is reached and left again within
    one step is not seen. Steps are never shortened.

    With ``stop`` a trajectory stops there: it has no saves after the event, and its final state,
    from which it can go on, is the end of the natural step that holds the event. ``name`` says what
    is measured, for the record of a run; by default the function, or the one that has made it.

    >>> import flowsim as fs
    >>> Event(fs.diagnostics.accuracy, 1.0).sentence
    'accuracy ≥ 1'
    """

    measure: Measure
    level: float
    name: str = field(default="", kw_only=True)
    falling: bool = field(default=False, kw_only=True)
    stop: bool = field(default=False, kw_only=True)

    def __post_init__(self) -> None:
        expected = "a function of (problem, state), try flowsim.diagnostics.accuracy"
        require_callable("Event", expected, measure=self.measure)
        require_finite("Event", level=self.level)
        require_flag("Event", falling=self.falling, stop=self.stop)

    @property
    def sentence(self) -> str:
        """The event in words."""
        made = getattr(self.measure, "__qualname__", "measure")
        maker = made.partition(".<locals>")[0]
        sign = "≤" if self.falling else "≥"
        end = ", then stop" if self.stop else ""
        return f"{self.name or maker} {sign} {self.level:g}{end}"

    def reached(self, problem: Objective, state: State, who: str) -> Mask:
        """Where the measure has reached the level; ``who`` asks, for errors."""
        value = self.value(problem, state, who)
        if self.falling:
            return value <= self.level
        return value >= self.level

    def value(self, problem: Objective, state: State, who: str) -> Float[Tensor, " B"]:
        """What is measured."""
        with torch.no_grad():
            value = self.measure(problem, state)
        fits = isinstance(value, Tensor) and value.shape == state.status.shape
        if not fits:
            raise ValueError(
                f"{who}: its measure returned {shape_of(value)}, expected a tensor of shape "
                f"({len(state.w)},), one number for each trajectory; try a reduction such as "
                ".amin(-1)"
            )
        return value.detach().double()


def shape_of(value: Any) -> str:
    """What an observer has returned, in words."""
    if isinstance(value, Tensor):
        return f"shape {tuple(value.shape)}"
    return type(value).__name__


def inside(problem: Objective, state: State, u: Float[Tensor, " B"]) -> State:
    """The state at u of its last step; itself where steps are indivisible. Λ is that of the
    weights, not of the interpolant, so that all that is read there fits together."""
    if state.segment is None:
        return state
    w, readings = state.segment.at(u)
    lam = problem.lam(w).double()
    readings["lam"] = torch.where(u < 1, lam, readings["lam"])
    return replace(
        state,
        w=w,
        readings=readings,
        memory={},
        multipliers=state.segment.multipliers(u),
        segment=None,
    )


class Watch:
    """Finds the events of a run, step by step.

    ``found`` holds the readings and the measure's value at each event, NaN where it has not
    happened, and ``limit`` what ``clock`` shows where each trajectory stops at an event, infinity
    where it does not."""

    def __init__(
        self, problem: Objective, events: Mapping[str, Event], state: State, clock: Clock
    ) -> None:
        self.problem = problem
        self.events = events
        self.clock = clock
        self.before = state
        nowhere = torch.full_like(state.readings["lam"], torch.nan)
        nothing = dict.fromkeys((*READINGS, "value"), nowhere)
        self.found = dict.fromkeys(events, nothing)
        self.limit = torch.full_like(nowhere, torch.inf)
        self.look(replace(state, segment=None))  # at the start itself: no step has led there

    def look(self, state: State) -> None:
        """Record the events of the natural step that has led to ``state``."""
        for name, event in self.events.items():
            waited = torch.isnan(self.found[name]["value"])
            new = waited & self._reached(name, state)
            if not bool(new.any()):
                continue
            u = self._located(name, state, new)
            self._record(name, state, u, new)
            if event.stop:
                shown = _shown(state, self.clock, u)
                limit = torch.minimum(self.limit, shown)
                self.limit = torch.where(new, limit, self.limit)
        self.before = state

    def _located(self, name: str, state: State, new: Mask) -> Float[Tensor, " B"]:
        """Where in the last step the event happens; 1 for the trajectories without it."""
        high = torch.ones_like(self.limit)
        low = torch.where(new, 0.0, high)
        halvings = 0 if state.segment is None else _HALVINGS
        for _ in range(halvings):
            middle = 0.5 * (low + high)
            point = self._inside(state, middle)
            reached = self._reached(name, point)
            low = torch.where(reached, low, middle)
            high = torch.where(reached, middle, high)
        return high

    def _inside(self, state: State, u: Float[Tensor, " B"]) -> State:
        """The state at u, where tallies and the step size are those before the step until it has
        ended."""
        point = inside(self.problem, state, u)
        before = self.before
        early = replace(point, tallies=before.tallies, step_size=before.step_size)
        return early.where(u < 1, point)

    def _record(self, name: str, state: State, u: Float[Tensor, " B"], new: Mask) -> None:
        point = self._inside(state, u)
        event = self.events[name]
        value = event.value(self.problem, point, f"event {name!r}")
        here = point.readings | {"value": value}
        found = {}
        for key, before in self.found[name].items():
            found[key] = torch.where(new, here[key], before)
        self.found[name] = found

    def _reached(self, name: str, state: State) -> Mask:
        event = self.events[name]
        return event.reached(self.problem, state, f"event {name!r}")


def _shown(state: State, clock: Clock, u: Float[Tensor, " B"]) -> Float[Tensor, " B"]:
    """What the clock shows at u, as saves are located: on the interpolant."""
    end = state.readings[clock.reading]
    if state.segment is None:
        return end
    inner = state.segment.reading(clock.reading, u)
    return torch.where(u < 1, inner, end)

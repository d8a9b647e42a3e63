"""Clocks: what a trajectory is measured against, how fast each one runs, and when to save.

A steepest flow is autonomous: another clock walks the same orbit at another speed. With h = ∇Λ,
arclength s in the flow's own norm, and −∇𝓛 = e^{−Λ}h,

    dw/ds = u (a unit steepest direction),   dΛ/ds = ‖h‖_*,   dt/ds = e^{Λ}/‖h‖_*,   dσ/ds = 1/‖w‖.

Time is only ever held as log t: at Λ = 10⁶ it is e^{10⁶}.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from numbers import Integral
from typing import Any

import torch
from torch import Tensor

from flowsim.checks import is_finite, is_positive, require_whole
from flowsim.numerics.shapes import PerTrajectory
from flowsim.problems.objective import Objective

# --------------------------------------------------------------------------------------------------
# How fast clocks run
# --------------------------------------------------------------------------------------------------

Speed = Callable[[Tensor, Tensor, Tensor], Tensor]
"""ds/dτ, arclength per unit of the clock τ, from log dt/ds, the dual norm of the gradient and the
norm of the weights, each ``(B,)``."""


@dataclass(frozen=True)
class Clock:
    """``name`` as users say it; ``reading`` names the entry of ``State.readings`` that shows this
    clock; a clock without ``speed`` cannot be integrated against."""

    name: str
    reading: str
    speed: Speed | None


def log_time_rate(
    objective: Objective, lam: PerTrajectory, dual_norm: PerTrajectory
) -> PerTrajectory:
    """log dt/ds, flow time per unit of arclength: Λ − log ‖∇Λ‖_*, or −log ‖∇F‖_* where the level is
    −F."""
    level = lam if objective.logarithmic else torch.zeros_like(lam)
    return level - torch.log(dual_norm)


def _speed_of_level(log_time_rate: Tensor, dual_norm: Tensor, norm: Tensor) -> Tensor:
    return 1 / dual_norm


def _speed_of_time(log_time_rate: Tensor, dual_norm: Tensor, norm: Tensor) -> Tensor:
    return torch.exp(-log_time_rate)


def _speed_of_arclength(log_time_rate: Tensor, dual_norm: Tensor, norm: Tensor) -> Tensor:
    return torch.ones_like(dual_norm)


def _speed_of_relative(log_time_rate: Tensor, dual_norm: Tensor, norm: Tensor) -> Tensor:
    return norm


def _speed_of_gradient(log_time_rate: Tensor, dual_norm: Tensor, norm: Tensor) -> Tensor:
    return dual_norm


STEPS = Clock("steps", "steps", None)
LAM = Clock("lam", "lam", _speed_of_level)
TIME = Clock("time", "log_time", _speed_of_time)
ARCLENGTH = Clock("arclength", "arclength", _speed_of_arclength)
RELATIVE = Clock("relative", "relative", _speed_of_relative)
GRADIENT = Clock("gradient", "gradient", _speed_of_gradient)
"""ds/dτ = ‖h‖_*, inside implicit methods: a flow in a quadratic norm is w' = A⁻¹h, and log dt/dτ
the level."""


@dataclass(frozen=True)
class Target:
    """Advance until the reading of ``clock`` has reached ``value (B,)``."""

    clock: Clock
    value: PerTrajectory

    def select(self, rows: Tensor) -> "Target":
        """The target of these trajectories."""
        return Target(self.clock, self.value[rows])


# --------------------------------------------------------------------------------------------------
# When to save
# --------------------------------------------------------------------------------------------------

Spread = Callable[[float, float], list[float]]
"""Readings to save at from a start to a stop, with both."""


@dataclass(frozen=True)
class SavePlan:
    """Save at the readings that ``spread`` lays out from the start to ``stop``, and stop there."""

    clock: Clock
    stop: float
    spread: Spread

    def targets(self, start: PerTrajectory) -> list[float]:
        """Readings to save at, after the start itself. All trajectories share them, so that bands
        over seeds make sense; they begin after the reading of the trajectory that is furthest."""
        first = float(start.max())
        if not first < self.stop:
            return [self.stop]
        _, *between, _ = self.spread(first, self.stop)
        return [*between, self.stop]


def lam(value: float | Iterable[float], saves: int = 100) -> SavePlan:
    """Run until Λ reaches ``value``; save at ``saves`` points whose rise over the start is even in
    asinh(rise/0.01), so that they are dense at first and then logarithmic, or at exactly the values
    of a list."""
    resolution = 0.01  # a small initialisation escapes while Λ hardly moves

    def spread(start: float, stop: float) -> list[float]:
        last = (stop - start) / resolution
        rises = _dense_at_first(last, saves)
        return [start + resolution * rise for rise in rises]

    return _plan(LAM, value, saves, spread)


def arclength(value: float | Iterable[float], saves: int = 100) -> SavePlan:
    """Run until the path in weight space, measured in the rule's own norm, has this length; saves
    evenly spaced."""

    def spread(start: float, stop: float) -> list[float]:
        return _even(start, stop, saves)

    return _plan(ARCLENGTH, value, saves, spread)


def steps(value: int | Iterable[int], saves: int = 100) -> SavePlan:
    """Run for this many steps; saves even in asinh of the step, so that the first ones are each
    saved."""

    def spread(start: float, stop: float) -> list[float]:
        taken = _dense_at_first(stop - start, saves)
        return sorted({start + round(count) for count in taken})

    return _plan(STEPS, value, saves, spread, _is_count, "a non-negative integer")


def time(
    value: float | Iterable[float], saves: int = 100, *, first: float | None = None
) -> SavePlan:
    """Run until flow time t = ``value``; saves even in log t from ``first`` (default:
    value/1000)."""

    def spread(start: float, stop: float) -> list[float]:
        earliest = stop - math.log(1000) if first is None else math.log(first)
        if start >= earliest:
            return _even(start, stop, saves)
        if saves == 2:
            return [start, stop]
        return [start, *_even(earliest, stop, saves - 1)]

    plan = _plan(TIME, value, saves, spread, is_positive, "a positive number", math.log)
    if first is None:
        return plan
    if not is_positive(first) or not math.log(first) < plan.stop:
        expected = f"a number between 0 and {math.exp(plan.stop):g}"
        raise ValueError(f"time: got first={first!r}, expected {expected}")
    return plan


def at_points(clock: Clock, points: Sequence[float]) -> SavePlan:
    """Save at exactly these readings, which increase."""

    def spread(start: float, stop: float) -> list[float]:
        later = [point for point in points if point > start]
        return [start, *later]

    *_, last = points
    return SavePlan(clock, last, spread)


def _plan(
    clock: Clock,
    value: Any,
    saves: int,
    spread: Spread,
    holds: Callable[[Any], bool] = is_finite,
    kind: str = "a finite number",
    read: Callable[[float], float] = float,
) -> SavePlan:
    """To the readings that a user asks for: exactly those of a list, else on the way to the one."""
    several = isinstance(value, Iterable) and not isinstance(value, str)
    given = list(value) if several else [value]
    fine = all(holds(point) for point in given)
    if not given or not fine:
        expected = f"{kind} or a non-empty list of them"
        raise ValueError(f"{clock.name}: got {value!r}, expected {expected}")
    if any(b <= a for a, b in pairwise(given)):
        expected = "them in increasing order"
        raise ValueError(f"{clock.name}: got save points {given}, expected {expected}")
    points = [read(point) for point in given]
    if several:
        return at_points(clock, points)
    require_whole(clock.name, 2, saves=saves)
    return SavePlan(clock, points[0], spread)


def _is_count(value: Any) -> bool:
    whole = isinstance(value, Integral) and is_finite(value)
    return whole and int(value) >= 0


def _even(start: float, stop: float, saves: int) -> list[float]:
    last = saves - 1
    return [start + (stop - start) * k / last for k in range(saves)]


def _dense_at_first(stop: float, saves: int) -> list[float]:
    """From 0 to ``stop``, even in asinh: evenly spaced below 1, logarithmically far above."""
    warped = _even(0.0, math.asinh(stop), saves)
    return [math.sinh(point) for point in warped]

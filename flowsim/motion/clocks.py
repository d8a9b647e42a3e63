"""Clocks: what a trajectory is measured against, how fast each one runs, and when to save.

A steepest flow is autonomous: another clock walks the same orbit at another speed. With h = ∇Λ,
arclength s in the flow's own norm, and −∇𝓛 = e^{−Λ}h,

    dw/ds = u (a unit steepest direction),   dΛ/ds = ‖h‖_*,   dt/ds = e^{Λ}/‖h‖_*,   dσ/ds = 1/‖w‖.

Time is only ever held as log t: at Λ = 10⁶ it is e^{10⁶}.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import pairwise
from numbers import Integral, Real
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from flowsim.problems.objective import Objective

Speed = Callable[[Objective, Tensor, Tensor, Tensor], Tensor]


Spread = Callable[[float, float, int], list[float]]


@dataclass(frozen=True)
class Clock:
    """``name`` as users say it; ``reading`` names the entry of ``State.readings`` that shows this
    clock.

    ``speed(objective, lam, dual, size)`` is ds/dτ, arclength per unit of the clock τ, from the
    level, the dual norm of its gradient and the norm of the weights, each ``(B,)``. None: the clock
    cannot be integrated against."""

    name: str
    reading: str
    speed: Speed | None


def log_time_rate(
    objective: Objective, lam: Float[Tensor, " B"], dual: Float[Tensor, " B"]
) -> Float[Tensor, " B"]:
    """log dt/ds, flow time per unit of arclength: Λ − log ‖∇Λ‖_*, or −log ‖∇F‖_* where the level is
    −F."""
    return (lam if objective.logarithmic else torch.zeros_like(lam)) - torch.log(dual)


STEPS = Clock("steps", "steps", None)


LAM = Clock("lam", "lam", lambda objective, lam, dual, size: 1 / dual)


TIME = Clock(
    "time",
    "log_time",
    lambda objective, lam, dual, size: torch.exp(-log_time_rate(objective, lam, dual)),
)


ARCLENGTH = Clock(
    "arclength", "arclength", lambda objective, lam, dual, size: torch.ones_like(dual)
)


RELATIVE = Clock("relative", "relative", lambda objective, lam, dual, size: size)


GRADIENT = Clock("gradient", "gradient", lambda objective, lam, dual, size: dual)


"""ds/dτ = ‖h‖_*, inside implicit methods: a flow in a quadratic norm is w' = A⁻¹h, and log dt/dτ
the level."""


@dataclass(frozen=True)
class Target:
    """Advance until the reading of ``clock`` has reached ``value (B,)``."""

    clock: Clock
    value: Float[Tensor, " B"]

    def select(self, rows: Tensor) -> "Target":
        return Target(self.clock, self.value[rows])


@dataclass(frozen=True)
class SavePlan:
    """When to save and when to stop. ``points``, where given, are the save points; else ``saves``
    of them are laid out from the start to ``stop`` by ``spread``."""

    clock: Clock
    stop: float
    saves: int
    spread: Spread
    points: tuple[float, ...] = ()

    def targets(self, start: Float[Tensor, " B"]) -> list[float]:
        """Readings to save at, after the start itself. All trajectories share them, so that bands
        over seeds make sense; they begin after the reading of the trajectory that is furthest."""
        first = float(start.max())
        if self.points:
            return [p for p in self.points if p > first] or [self.points[-1]]
        if not first < self.stop:
            return [self.stop]
        return [*self.spread(first, self.stop, self.saves)[1:-1], self.stop]


def _schedule(
    clock: Clock,
    value: float | list[float],
    saves: int,
    spread: Spread,
    read: Callable[[float], float] = float,
) -> SavePlan:
    what = clock.name
    given = value if isinstance(value, list) else [value]
    if not given or not all(_number(v) and math.isfinite(v) for v in given):
        raise ValueError(
            f"{what}: got {value!r}, expected a finite number or a non-empty list of them"
        )
    points = tuple(read(v) for v in given)
    if any(b <= a for a, b in pairwise(points)):
        raise ValueError(f"{what}: got save points {given}, expected them in increasing order")
    if not isinstance(value, list):
        if not (isinstance(saves, Integral) and saves >= 2):
            raise ValueError(
                f"{what}: got saves={saves!r}, expected an integer ≥ 2: the start and the end"
            )
        return SavePlan(clock, points[-1], saves, spread)
    return SavePlan(clock, points[-1], len(points) + 1, spread, points)


def _number(value: Any, kind: type = Real) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool)


def _listed(value: Any) -> Any:
    """A number as it is, any other iterable as a list, anything else refused by the caller."""
    return list(value) if isinstance(value, Iterable) and not isinstance(value, str) else value


def _spaced(warp: Callable[[float], float], back: Callable[[float], float]) -> Spread:
    """Points that are evenly spaced after ``warp``."""

    def spread(start: float, stop: float, saves: int) -> list[float]:
        a, b = warp(start), warp(stop)
        return [back(a + (b - a) * k / (saves - 1)) for k in range(saves)]

    return spread


def _whole_steps(start: float, stop: float, saves: int) -> list[float]:
    raw = _spaced(math.asinh, math.sinh)(0.0, stop - start, saves)
    return sorted({start + round(r) for r in raw})


_RESOLUTION = (
    0.01  # of Λ at the start of a run: a small initialisation escapes while Λ hardly moves
)


def _from_start(start: float, stop: float, saves: int) -> list[float]:
    rise = _spaced(lambda r: math.asinh(r / _RESOLUTION), lambda r: _RESOLUTION * math.sinh(r))
    return [start + r for r in rise(0.0, stop - start, saves)]


def lam(value: float | Iterable[float], saves: int = 100) -> SavePlan:
    """Run until Λ reaches ``value``; save at ``saves`` points whose rise over the start is even in
    asinh(rise/0.01), so that they are dense at first and then logarithmic, or at exactly the values
    of a list."""
    return _schedule(LAM, _listed(value), saves, _from_start)


def arclength(value: float | Iterable[float], saves: int = 100) -> SavePlan:
    """Run until the path in weight space, measured in the rule's own norm, has this length; saves
    evenly spaced."""
    return _schedule(ARCLENGTH, _listed(value), saves, _spaced(float, float))


def steps(value: int | Iterable[int], saves: int = 100) -> SavePlan:
    """Run for this many steps; saves even in asinh of the step, so that the first ones are each
    saved."""
    given = _listed(value)
    for n in given if isinstance(given, list) else [given]:
        if not _number(n, Integral) or n < 0:
            raise ValueError(f"steps: got {n!r}, expected a non-negative integer")
    return _schedule(STEPS, given, saves, _whole_steps)


def time(
    value: float | Iterable[float], saves: int = 100, *, first: float | None = None
) -> SavePlan:
    """Run until flow time t = ``value``; saves even in log t from ``first`` (default:
    value/1000)."""
    given = _listed(value)
    values = given if isinstance(given, list) else [given]
    if not values or not all(_number(v) and v > 0 for v in values):
        raise ValueError(
            f"time: got {given!r}, expected a positive number or a non-empty list of them"
        )
    if first is not None and not (_number(first) and 0 < first < values[-1]):
        raise ValueError(
            f"time: got first={first!r}, expected a number between 0 and {values[-1]:g}"
        )
    earliest = math.log(first if first is not None else values[-1] / 1000)
    even = _spaced(float, float)

    def spread(start: float, stop: float, saves: int) -> list[float]:
        if start >= earliest:
            return even(start, stop, saves)
        return [start, *even(earliest, stop, saves - 1)] if saves > 2 else [start, stop]

    return _schedule(TIME, given, saves, spread, read=math.log)

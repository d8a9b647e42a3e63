"""The last step of a trajectory, and what is read inside it."""

from dataclasses import dataclass

import torch
from torch import Tensor

from flowsim.motion.clocks import Target
from flowsim.numerics.quadrature import hermite, log_elapsed
from flowsim.numerics.shapes import PerKink, PerTrajectory, Rows


@dataclass(frozen=True)
class Segment:
    """The last natural step, from u = 0 to u = 1: both ends, and derivatives in u. Its dense output
    is `at`."""

    w0: Rows
    w1: Rows
    slope0: Rows
    slope1: Rows
    readings0: dict[str, PerTrajectory]
    readings1: dict[str, PerTrajectory]
    lam_slope0: PerTrajectory
    lam_slope1: PerTrajectory
    time_rate0: PerTrajectory  # log dt/du
    time_rate1: PerTrajectory
    time_slope0: PerTrajectory | None = None  # its derivative in u; None: linear
    time_slope1: PerTrajectory | None = None
    bend: Rows | None = None  # what the cubic through both ends lacks at u = 1/2
    # of kinks, None for rules that do not select them
    multipliers0: PerKink | None = None
    multipliers1: PerKink | None = None

    @staticmethod
    def straight(
        w: tuple[Rows, Rows],
        move: Rows,
        readings: tuple[dict[str, PerTrajectory], dict[str, PerTrajectory]],
        lam_slopes: tuple[PerTrajectory, PerTrajectory],
        time_rates: tuple[PerTrajectory, PerTrajectory],
    ) -> "Segment":
        """A step along ``move``; each of the others at its start and at its end."""
        return Segment(*w, move, move, *readings, *lam_slopes, *time_rates)

    def at(self, u: PerTrajectory) -> tuple[Rows, dict[str, PerTrajectory]]:
        """Weights and readings inside the step; exact at both ends.

        Weights and Λ by cubic Hermite interpolation, whose error is of fourth order in the step (of
        fifth for weights with a ``bend``); time with log dt/du the cubic of its ends; the other
        readings linear."""
        column = u.to(self.w0)[:, None]
        w = hermite(column, self.w0, self.w1, self.slope0, self.slope1)
        if self.bend is not None:
            bump = 16 * (column * (1 - column)) ** 2
            w = w + bump * self.bend
        w = _with_ends(column, self.w0, w, self.w1)
        readings = {name: self.reading(name, u) for name in self.readings0}
        return w, readings

    def multipliers(self, u: PerTrajectory) -> PerKink | None:
        """Multipliers of kinks inside the step; exact at both ends.

        Linear in u, also for a pair that begins or ceases to slide in the step: when is not known.
        NaN for one that crosses, for which the sign of z decides."""
        a = self.multipliers0
        b = self.multipliers1
        if a is None or b is None:
            return None
        column = u.to(a)[:, None]
        crosses = (a - b).abs() == 1
        inner = a + column * (b - a)
        inner = torch.where(crosses, torch.nan, inner)
        return _with_ends(column, a, inner, b)

    def reading(self, name: str, u: PerTrajectory) -> PerTrajectory:
        """A reading inside the step; exact at both ends."""
        a = self.readings0[name]
        b = self.readings1[name]
        if name == "lam":
            inner = hermite(u, a, b, self.lam_slope0, self.lam_slope1)
        elif name == "dissipated":
            # it rises with Λ, and the energy defect, their difference, evenly over the step
            start = self.readings0["lam"]
            rise = self.reading("lam", u) - start
            whole_rise = self.readings1["lam"] - start
            defect = (b - a) - whole_rise
            inner = a + u * defect + rise
        elif name == "log_time":
            inner = self._log_time(u)
        else:
            inner = a + u * (b - a)
        return _with_ends(u, a, inner, b)

    def _log_time(self, u: PerTrajectory) -> PerTrajectory:
        """log t, with the time spent in the step scaled to end at the recorded reading."""
        a = self.readings0["log_time"]
        b = self.readings1["log_time"]
        rate0 = self.time_rate0
        rate1 = self.time_rate1
        linear = rate1 - rate0
        slope0 = linear if self.time_slope0 is None else self.time_slope0
        slope1 = linear if self.time_slope1 is None else self.time_slope1
        whole = log_elapsed(rate0, rate1, slope0, slope1)
        so_far = log_elapsed(rate0, rate1, slope0, slope1, u)
        ratio = (a - b).clamp_max(0)  # log t0/t1
        recorded = b + torch.log(-torch.expm1(ratio))  # log(t1 − t0)
        return torch.logaddexp(a, so_far - whole + recorded)

    def locate(self, target: Target) -> PerTrajectory:
        """The first u, to rounding, at which the clock shows the target's value; 1 where the end is
        the first."""
        name = target.clock.reading
        value = target.value
        low = torch.zeros_like(value)
        high = torch.ones_like(value)
        for _ in range(52):
            middle = 0.5 * (low + high)
            reached = self.reading(name, middle) >= value
            low = torch.where(reached, low, middle)
            high = torch.where(reached, middle, high)
        reached = self.readings0[name] >= value
        return torch.where(reached, 0.0, high)


def _with_ends(u: Tensor, start: Tensor, inner: Tensor, end: Tensor) -> Tensor:
    """What is interpolated inside a step, with the ends themselves at u = 0 and 1."""
    inner = torch.where(u >= 1, end, inner)
    return torch.where(u <= 0, start, inner)

"""TODO."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from flowsim.motion.clocks import Target
from flowsim.numerics.quadrature import hermite, log_elapsed


@dataclass(frozen=True)
class Segment:
    """The last natural step, from u = 0 to u = 1: both ends, and derivatives in u. Its dense output
    is `at`."""

    w0: Float[Tensor, "B P"]
    w1: Float[Tensor, "B P"]
    slope0: Float[Tensor, "B P"]
    slope1: Float[Tensor, "B P"]
    readings0: dict[str, Float[Tensor, " B"]]
    readings1: dict[str, Float[Tensor, " B"]]
    lam_slope0: Float[Tensor, " B"]
    lam_slope1: Float[Tensor, " B"]
    time_rate0: Float[Tensor, " B"]  # log dt/du
    time_rate1: Float[Tensor, " B"]
    time_slope0: Float[Tensor, " B"] | None = None  # its derivative in u; None: linear
    time_slope1: Float[Tensor, " B"] | None = None
    bend: Float[Tensor, "B P"] | None = None  # what the cubic through both ends lacks at u = 1/2
    multipliers0: Float[Tensor, "B K"] | None = (
        None  # of kinks, None for rules that do not select them
    )
    multipliers1: Float[Tensor, "B K"] | None = None

    def at(
        self, u: Float[Tensor, " B"]
    ) -> tuple[Float[Tensor, "B P"], dict[str, Float[Tensor, " B"]]]:
        """Weights and readings inside the step; exact at both ends.

        Weights and Λ by cubic Hermite interpolation, whose error is of fourth order in the step (of
        fifth for weights with a ``bend``); time with log dt/du the cubic of its ends; the other
        readings linear."""
        part = u.to(self.w0)[:, None]
        inner = hermite(part, self.w0, self.w1, self.slope0, self.slope1)
        if self.bend is not None:
            inner = inner + 16 * (part * (1 - part)) ** 2 * self.bend
        w = torch.where(part <= 0, self.w0, torch.where(part >= 1, self.w1, inner))
        return w, {name: self.reading(name, u) for name in self.readings0}

    def multipliers(self, u: Float[Tensor, " B"]) -> Float[Tensor, "B K"] | None:
        """Multipliers of kinks inside the step; exact at both ends.

        Linear in u, also for a pair that begins or ceases to slide in the step: when is not known.
        NaN for one that crosses, for which the sign of z decides."""
        a, b = self.multipliers0, self.multipliers1
        if a is None or b is None:
            return None
        part = u.to(a)[:, None]
        inner = torch.where((a - b).abs() == 1, torch.nan, a + part * (b - a))
        return torch.where(part <= 0, a, torch.where(part >= 1, b, inner))

    def reading(self, name: str, u: Float[Tensor, " B"]) -> Float[Tensor, " B"]:
        a, b = self.readings0[name], self.readings1[name]
        if name == "lam":
            inner = hermite(u, a, b, self.lam_slope0, self.lam_slope1)
        elif name == "dissipated":
            # it rises with Λ, and the energy defect, their difference, evenly over the step
            defect = (b - a) - (self.readings1["lam"] - self.readings0["lam"])
            inner = a + u * defect + (self.reading("lam", u) - self.readings0["lam"])
        elif name == "log_time":
            inner = self._log_time(u)
        else:
            inner = a + u * (b - a)
        return torch.where(u <= 0, a, torch.where(u >= 1, b, inner))

    def _log_time(self, u: Tensor) -> Tensor:
        """log t, with the time spent in the step scaled to end at the recorded reading."""
        a, b = self.readings0["log_time"], self.readings1["log_time"]
        gap = self.time_rate1 - self.time_rate0
        slope0 = gap if self.time_slope0 is None else self.time_slope0
        slope1 = gap if self.time_slope1 is None else self.time_slope1
        part = log_elapsed(self.time_rate0, self.time_rate1, slope0, slope1, u)
        whole = log_elapsed(self.time_rate0, self.time_rate1, slope0, slope1)
        step = b + torch.log(
            -torch.expm1(torch.minimum(a - b, torch.zeros_like(a)))
        )  # log(t1 − t0)
        return torch.logaddexp(a, part - whole + step)

    def locate(self, target: Target) -> Float[Tensor, " B"]:
        """The first u, to rounding, at which the clock shows the target's value; 1 where the end is
        the first."""
        low, high = torch.zeros_like(target.value), torch.ones_like(target.value)
        name = target.clock.reading
        for _ in range(52):
            middle = 0.5 * (low + high)
            reached = self.reading(name, middle) >= target.value
            low, high = torch.where(reached, low, middle), torch.where(reached, middle, high)
        return torch.where(self.readings0[name] >= target.value, torch.zeros_like(high), high)

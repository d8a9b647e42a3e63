"""What is read inside a step of exact pieces, and how far it may be off."""

from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from numpy import ndarray as Array
from torch import Tensor

from flowsim.flow.pieces.points import TINY, Evaluation, OnPiece, View
from flowsim.flow.pieces.polytope import PerWeight
from flowsim.flow.steps import segment_between
from flowsim.motion.segment import Segment
from flowsim.motion.state import State
from flowsim.numerics.quadrature import hermite, log_elapsed, log_mean_exp

_AtThree = Float[Array, " 3"]  # at the start, the middle and the end of a step


@dataclass(frozen=True)
class PieceStep:
    """A step of arclength ``ds`` along a piece. Inside it weights are read off the cubic through
    both ends, and what that lacks half way."""

    start: OnPiece
    end: OnPiece
    ds: float

    def at(self, v: float) -> PerWeight:
        """Weights on the cubic, v from 0 to 1."""
        a = self.start.at.w
        b = self.end.at.w
        da = self.ds * self.start.u
        db = self.ds * self.end.u
        return hermite(v, a, b, da, db)  # type: ignore

    @cached_property
    def middle(self) -> Evaluation:
        return Evaluation(self.start.at.view, self.at(0.5))

    @cached_property
    def _slope(self) -> Float[Array, " k"]:
        return self.start.face.restrict(self.middle.h)

    @cached_property
    def _lack(self) -> Float[Array, " k"]:
        return self.end.inverse.of_normal(self._slope)

    @property
    def bend(self) -> PerWeight:
        """What the cubic lacks half way."""
        return self.start.face.expand(self._lack)

    @property
    def clearance(self) -> Float[Array, "3 P"]:
        """`OnPiece.clearance` half way along the cubic."""
        a = self.start
        b = self.end
        face = self.start.face
        mean = (b.at.w - a.at.w) / self.ds
        u = 1.5 * mean - 0.25 * (a.u + b.u)
        missing = face.missing(self.middle.unit)
        return np.vstack([missing, face.shares(u)])

    @property
    def dissipated(self) -> float:
        """∫‖h‖_* ds, by Simpson's rule."""
        a = self.start.at.dual_norm
        m = self.middle.dual_norm
        b = self.end.at.dual_norm
        return self.ds * (a + 4 * m + b) / 6

    @property
    def relative(self) -> float:
        """Relative arclength; at w = 0 it is infinite, and counts from the first point that is
        not."""
        a = self.start.at.length
        b = self.end.at.length
        if min(a, b) == 0:
            return 0.0
        tensor = self.start.at.view.tensor
        log_a = tensor(np.log(a))
        log_b = tensor(np.log(b))
        mean = torch.exp(log_mean_exp(log_a, log_b))
        return self.ds / float(mean)

    @cached_property
    def time(self) -> "TimeInStep":
        return TimeInStep.of(self.ds, self.start.at, self.middle, self.end.at)

    def excess(self, rtol: float, atol: float) -> float:
        """The errors of what is read inside the step, over their tolerances: weights, level and
        time."""
        largest = np.abs(self.end.at.w).max()
        noise = self.end.noise  # of ‖h‖_*, whose integrals cannot tell more
        weights = float(np.abs(self.bend).max() / (atol + rtol * largest))
        level = self.error_of_level / (rtol + noise)
        time = abs(self.time.defect) / (max(rtol, 1e-3) + noise)
        return max(weights, level, time)

    @property
    def error_of_level(self) -> float:
        """Half way, and in its rise, which is ∫‖h‖_* ds; relative where it rises by more than 1."""
        a = self.start.at
        b = self.end.at
        rise = b.lam - a.lam
        bent = 0.125 * self.ds * (a.dual_norm - b.dual_norm)
        cubic = 0.5 * (a.lam + b.lam) + bent
        at_middle = abs(cubic - self.middle.lam)
        at_end = abs(self.dissipated - rise)
        off = max(at_middle, at_end) / (1 + abs(rise))
        lack = float(self._slope @ self._lack)
        return max(abs(lack), off)

    def segment(
        self, state: State, w: Float[Tensor, "1 P"], readings: dict[str, Tensor]
    ) -> Segment:
        """The step from ``state`` to these weights and readings."""
        view = self.start.at.view
        a = self.start.sample
        b = self.end.sample
        tensor = view.tensor
        ds = tensor(self.ds)
        plain = segment_between(view.objective, state, w, a, b, ds, readings)
        first, last = self.time.slopes
        return replace(
            plain,
            time_slope0=tensor(first),
            time_slope1=tensor(last),
            bend=tensor(self.bend),
        )


class TimeInStep(NamedTuple):
    """Of log dt/dv in a step, v from 0 to 1: the derivative at both ends, and the error at v = ½ of
    the cubic that these make; log of the time that the step takes."""

    slopes: tuple[float, float]
    defect: float
    log_elapsed: float

    @staticmethod
    def of(ds: float, *points: Evaluation) -> "TimeInStep":
        """From start, middle and end. log dt/ds = Λ − log ‖h‖_*, without Λ where the level is no
        logarithm."""
        view = points[0].view
        lams = np.array([p.lam for p in points])
        duals = np.array([p.dual_norm for p in points])
        logs = np.log(np.maximum(duals, TINY))
        if view.objective.logarithmic:
            rates = lams - logs + np.log(ds)
            slopes = ds * duals - _derivatives(logs)
            elapsed = _log_elapsed_by_halves(view, rates, slopes)
        else:  # ‖h‖_* is linear in s
            rates = np.log(ds) - logs
            slopes = (duals[0] - duals[2]) / duals
            mean = log_mean_exp(view.tensor(logs[0]), view.tensor(logs[2]))
            elapsed = np.log(ds) - float(mean)
        first, _, last = slopes
        cubic = 0.5 * (rates[0] + rates[2]) + 0.125 * (first - last)
        return TimeInStep((first, last), cubic - rates[1], elapsed)


def _derivatives(values: _AtThree) -> _AtThree:
    """Of the parabola through these values."""
    a, m, b = values
    first = 4 * m - 3 * a - b
    last = a - 4 * m + 3 * b
    return np.array([first, b - a, last])


def _log_elapsed_by_halves(view: View, rates: _AtThree, slopes: _AtThree) -> float:
    """log of the time that a step takes, with a cubic for each half of it."""
    halves = []
    for i in (0, 1):
        half = slice(i, i + 2)
        ends = (*rates[half], *slopes[half] / 2)
        halves.append(log_elapsed(*map(view.tensor, ends)))
    both = torch.logaddexp(*halves)
    return float(both) - np.log(2)

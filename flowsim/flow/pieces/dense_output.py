"""What is read inside a step of exact pieces, and how far it may be off."""

from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from numpy import ndarray as Array
from torch import Tensor

from flowsim.flow.pieces.points import TINY, Evaluation, OnPiece
from flowsim.flow.pieces.polytope import PerWeight
from flowsim.flow.steps import segment_between
from flowsim.motion.segment import Segment
from flowsim.motion.state import State
from flowsim.numerics.quadrature import hermite, log_elapsed, log_mean_exp


@dataclass(frozen=True)
class PieceStep:
    """A step of arclength ``ds`` along a piece. Inside it weights are read off the cubic through
    both ends, and what that lacks half way."""

    start: OnPiece
    end: OnPiece
    ds: float

    def at(self, v: float) -> PerWeight:
        """Weights on the cubic, v from 0 to 1."""
        a = self.start
        b = self.end
        return hermite(v, a.at.w, b.at.w, self.ds * a.u, self.ds * b.u)  # type: ignore

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
        u = 1.5 * (b.at.w - a.at.w) / self.ds - 0.25 * (a.u + b.u)
        return np.vstack([face.missing(self.middle.unit), face.shares(u)])

    @property
    def dissipated(self) -> float:
        """∫‖h‖_* ds, by Simpson's rule."""
        a, m, b = (at.dual_norm for at in (self.start.at, self.middle, self.end.at))
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
        return self.ds / float(torch.exp(log_mean_exp(tensor(np.log(a)), tensor(np.log(b)))))

    @cached_property
    def time(self) -> "TimeInStep":
        return TimeInStep.of(self.ds, self.start.at, self.middle, self.end.at)

    def excess(self, rtol: float, atol: float) -> float:
        """The errors of what is read inside the step, over their tolerances: weights, level and
        time."""
        a = self.start.at
        b = self.end.at
        rise = b.lam - a.lam
        cubic = 0.5 * (a.lam + b.lam) + 0.125 * self.ds * (a.dual_norm - b.dual_norm)
        off = max(abs(cubic - self.middle.lam), abs(self.dissipated - rise)) / (1 + abs(rise))
        level = max(abs(float(self._slope @ self._lack)), off)
        noise = self.end.noise  # of ‖h‖_*, whose integrals cannot tell more
        return max(
            float(np.abs(self.bend).max() / (atol + rtol * np.abs(b.w).max())),
            level / (rtol + noise),
            abs(self.time.defect) / (max(rtol, 1e-3) + noise),
        )

    def segment(
        self, state: State, w: Float[Tensor, "1 P"], readings: dict[str, Tensor]
    ) -> Segment:
        """The step from ``state`` to these weights and readings."""
        view = self.start.at.view
        a = self.start.sample
        b = self.end.sample
        tensor = view.tensor
        slopes = self.time.slopes
        plain = segment_between(view.objective, state, w, a, b, tensor(self.ds), readings)
        return replace(
            plain,
            time_slope0=tensor(slopes[0]),
            time_slope1=tensor(slopes[1]),
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
        a, m, b = logs = np.log(np.maximum(duals, TINY))
        if view.objective.logarithmic:
            rates = lams - logs + np.log(ds)
            slopes = ds * duals - [4 * m - 3 * a - b, b - a, a - 4 * m + 3 * b]
            halves = [
                log_elapsed(*map(view.tensor, (*rates[i : i + 2], *slopes[i : i + 2] / 2)))
                for i in (0, 1)
            ]
            elapsed = float(torch.logaddexp(*halves)) - np.log(2)
        else:  # ‖h‖_* is linear in s
            rates = np.log(ds) - logs
            slopes = (duals[0] - duals[2]) / duals
            elapsed = np.log(ds) - float(log_mean_exp(view.tensor(a), view.tensor(b)))
        defect = 0.5 * (rates[0] + rates[2]) + 0.125 * (slopes[0] - slopes[2]) - rates[1]
        return TimeInStep((slopes[0], slopes[2]), defect, elapsed)

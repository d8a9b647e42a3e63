"""Small explicit steps along the steepest direction."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from flowsim.checks import require_positive
from flowsim.descent.rule import Step, begin, stop_if_still, take
from flowsim.motion.clocks import Target, log_time_rate
from flowsim.motion.rule import Labelled, advance_by_steps
from flowsim.motion.segment import Segment
from flowsim.motion.state import State
from flowsim.norms.norm import Norm, require_norm
from flowsim.numerics.shapes import PerTrajectory
from flowsim.problems.objective import Objective


@dataclass(frozen=True, repr=False)
class SmallStep(Labelled):
    """Small explicit steps along the steepest direction, each of predicted gain ``dlam`` in Λ.

        w ← w + (ΔΛ/‖∇Λ‖_*)·u,   u the unit steepest direction of ∇Λ.

    For a net of degree L > 1 a step moves no weight by more than ``relative``·max|w|/(L − 1),
    because the gradient is a function of degree L − 1. On smooth fields, and in ℓ2, the path tends
    to the steepest flow as ``dlam`` → 0; on nets with kinks in ℓ1, ℓ∞ or spectral norms it tends to
    another path, because it averages directions across a kink where the flow takes the direction of
    the averaged gradient. Coarse steps in ℓ1 and ℓ∞ may settle at a wrong margin for good, also on
    linear models: halve ``dlam`` to see whether it moves."""

    norm: Norm
    dlam: float = 0.05
    relative: float = 0.05

    def __post_init__(self) -> None:
        require_norm("SmallStep", self.norm)
        require_positive("SmallStep", dlam=self.dlam, relative=self.relative)

    @property
    def label(self) -> str:
        return f"{self.norm.title} small steps, ΔΛ = {self.dlam:g}"

    def start(self, problem: Objective, w_or_state: Tensor | State) -> State:
        norm = self.norm.bind(problem.layout)
        state = begin(problem, norm, w_or_state)
        move = torch.zeros_like(state.w)
        length = torch.zeros_like(state.readings["lam"])
        segment = _segment(problem, state, state, move, length)
        return replace(state, segment=segment)

    def advance(self, problem: Objective, state: State, until: Target, budget: int) -> State:
        norm = self.norm.bind(problem.layout)

        def step(part: Objective, local: State) -> State:
            return self._step(part, norm, local)

        return advance_by_steps(step, problem, state, until, budget)

    def _step(self, problem: Objective, norm: Norm, state: State) -> State:
        u = norm.steepest(state.memory["ascent"])
        length = self.dlam / state.memory["dual_norm"]
        if problem.degree > 1:
            share = self.relative / (problem.degree - 1)
            largest = state.w.abs().amax(-1)
            fastest = u.abs().amax(-1)
            reach = share * largest / fastest
            length = torch.minimum(length, reach.double())
        move = length.to(u)[:, None] * u
        step = Step(move, length)
        moved = take(problem, norm, state, step)
        moved = stop_if_still(moved, state)
        segment = _segment(problem, state, moved, move, length)
        return replace(moved, segment=segment)


def _segment(objective: Objective, a: State, b: State, move: Tensor, length: Tensor) -> Segment:
    """The straight step of this length from a to b."""
    starting = _rates(objective, a, move, length)
    ending = _rates(objective, b, move, length)
    lam_slopes, time_rates = zip(starting, ending, strict=True)
    readings = (a.readings, b.readings)
    return Segment.straight((a.w, b.w), move, readings, lam_slopes, time_rates)


def _rates(
    objective: Objective, at: State, move: Tensor, length: Tensor
) -> tuple[PerTrajectory, PerTrajectory]:
    """dΛ/du and log dt/du at an end of the step."""
    h = at.memory["ascent"]
    lam_slope = (h * move).sum(-1)
    lam = at.readings["lam"]
    dual_norm = at.memory["dual_norm"]
    rate = log_time_rate(objective, lam, dual_norm)
    return lam_slope.double(), torch.log(length) + rate

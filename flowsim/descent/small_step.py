"""TODO."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from flowsim.checks import require_positive
from flowsim.descent.rule import Step, begin, stop_if_still, take
from flowsim.motion.clocks import Target, log_time_rate
from flowsim.motion.rule import advance_by_steps
from flowsim.motion.segment import Segment
from flowsim.motion.state import State
from flowsim.norms.norm import Norm, require_norm
from flowsim.problems.objective import Objective


@dataclass(frozen=True)
class SmallStep:
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
        state = begin(problem, self.norm.bind(problem.layout), w_or_state)
        still = Step(torch.zeros_like(state.w), torch.zeros_like(state.readings["lam"]))
        return replace(state, segment=_segment(problem, state, state, still))

    def advance(self, problem: Objective, state: State, until: Target, budget: int) -> State:
        norm = self.norm.bind(problem.layout)
        return advance_by_steps(
            lambda part, local: self._step(part, norm, local), problem, state, until, budget
        )

    def _step(self, problem: Objective, norm: Norm, state: State) -> State:
        u = norm.steepest(state.memory["ascent"])
        length = self.dlam / state.memory["dual"]
        if problem.degree > 1:
            reach = self.relative / (problem.degree - 1) * state.w.abs().amax(-1) / u.abs().amax(-1)
            length = torch.minimum(length, reach.double())
        step = Step(length.to(u)[:, None] * u, length)
        moved = stop_if_still(take(problem, norm, state, step), state)
        return replace(moved, segment=_segment(problem, state, moved, step))


def _segment(objective: Objective, a: State, b: State, step: Step) -> Segment:
    """The straight step from a to b."""

    def time_rate(s: State) -> Tensor:
        return log_time_rate(objective, s.readings["lam"], s.memory["dual"]) + torch.log(
            step.length
        )

    return Segment(
        w0=a.w,
        w1=b.w,
        slope0=step.move,
        slope1=step.move,
        readings0=a.readings,
        readings1=b.readings,
        lam_slope0=(a.memory["ascent"] * step.move).sum(-1).double(),
        lam_slope1=(b.memory["ascent"] * step.move).sum(-1).double(),
        time_rate0=time_rate(a),
        time_rate1=time_rate(b),
    )

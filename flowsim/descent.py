"""Discrete training, as Rules: steepest descent with a learning rate, and small steps of the steepest flow."""

import math
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from flowsim.clocks import Target, log_mean_exp, log_time_rate
from flowsim.norms import L1, L2, Linf, Norm
from flowsim.problem import Objective
from flowsim.state import Segment, State, Status, fresh, march


@dataclass(frozen=True)
class Step:
    """A straight step: ``move (B, P)`` of length ``length (B,)`` in the rule's norm.

    ``log_time`` is the logarithm of the flow time that it takes, None where it follows from the path.
    """

    move: Float[Tensor, "B P"]
    length: Float[Tensor, " B"]
    log_time: Float[Tensor, " B"] | None = None


def begin(objective: Objective, norm: Norm, w_or_state: Tensor | State) -> State:
    """A state with the gradient at hand, as `take` wants it. One gradient evaluation."""
    state = fresh(objective, w_or_state)
    lam, h = objective.ascent(state.w)
    state = replace(
        state,
        readings=state.readings | {"lam": lam.double()},
        tallies=state.tallies | {"gradients": state.tallies["gradients"] + 1},
        memory=_memory(norm, state.w, h),
        segment=None,
    )
    return state.stopped(state.memory["dual"] == 0, Status.STATIONARY)


def take(objective: Objective, norm: Norm, state: State, step: Step) -> State:
    """The state after a straight step of every trajectory. One gradient evaluation.

    A trajectory that the step would take to numbers that are not finite, or would not move at all, stays and stops.
    """
    w = state.w + step.move
    lam, h = objective.ascent(w)
    lam = lam.double()
    memory = _memory(norm, w, h)
    size = 0.5 * (state.memory["size"] + memory["size"])
    tallies = state.tallies | {
        "gradients": state.tallies["gradients"] + 1,
        "accepted": state.tallies["accepted"] + 1,
    }
    if step.log_time is None:
        here = log_time_rate(objective, state.readings["lam"], state.memory["dual"])
        there = log_time_rate(objective, lam, memory["dual"])
        log_time = torch.log(step.length) + log_mean_exp(here, there)
    else:
        log_time = step.log_time
    readings = {
        "steps": state.readings["steps"] + 1,
        "lam": lam,
        "log_time": torch.logaddexp(state.readings["log_time"], log_time),
        "arclength": state.readings["arclength"] + step.length,
        "relative": state.readings["relative"] + torch.where(size > 0, step.length / size, 0.0),
        "dissipated": state.readings["dissipated"] + step.length * 0.5 * (state.memory["dual"] + memory["dual"]),
    }
    moved = replace(state, w=w, readings=readings, tallies=tallies, memory=memory)
    finite = torch.isfinite(lam) & torch.isfinite(memory["dual"]) & torch.isfinite(memory["size"])
    still = (w == state.w).all(-1)
    if bool((~finite | still).any()):
        moved = moved.where(finite & ~still, state)
        moved = moved.stopped(~finite, Status.NONFINITE).stopped(still, Status.PRECISION_FLOOR)
    return moved.stopped(moved.memory["dual"] == 0, Status.STATIONARY)


def _memory(norm: Norm, w: Tensor, h: Tensor) -> dict[str, Tensor]:
    return {"ascent": h, "dual": norm.dual(h).double(), "size": norm.value(w).double()}


@dataclass(frozen=True)
class SmallStep:
    """Small explicit steps along the steepest direction, each of predicted gain ``dlam`` in Λ.

        w ← w + (ΔΛ/‖∇Λ‖_*)·u,   u the unit steepest direction of ∇Λ.

    For a net of degree L > 1 a step moves no weight by more than ``relative``·max|w|/(L − 1), because the gradient
    is a function of degree L − 1. On smooth fields, and in ℓ2, the path tends to the steepest flow as ``dlam`` → 0;
    on nets with kinks in ℓ1, ℓ∞ or spectral norms it tends to another path, because it averages directions across
    a kink where the flow takes the direction of the averaged gradient. Coarse steps in ℓ1
    and ℓ∞ may settle at a wrong margin for good, also on linear models: halve ``dlam`` to see whether it moves.
    """

    norm: Norm
    dlam: float = 0.05
    relative: float = 0.05

    def __post_init__(self) -> None:
        _require_norm("SmallStep", self.norm)
        _require_positive("SmallStep", dlam=self.dlam, relative=self.relative)

    @property
    def label(self) -> str:
        return f"{self.norm.title} small steps, ΔΛ = {self.dlam:g}"

    def start(self, problem: Objective, w_or_state: Tensor | State) -> State:
        state = begin(problem, self.norm.bind(problem.layout), w_or_state)
        still = Step(torch.zeros_like(state.w), torch.zeros_like(state.readings["lam"]))
        return replace(state, segment=_segment(problem, state, state, still))

    def advance(self, problem: Objective, state: State, until: Target, budget: int) -> State:
        norm = self.norm.bind(problem.layout)
        return march(lambda part, local: self._step(part, norm, local), problem, state, until, budget)

    def _step(self, problem: Objective, norm: Norm, state: State) -> State:
        u = norm.steepest(state.memory["ascent"])
        length = self.dlam / state.memory["dual"]
        if problem.degree > 1:
            reach = self.relative / (problem.degree - 1) * state.w.abs().amax(-1) / u.abs().amax(-1)
            length = torch.minimum(length, reach.double())
        step = Step(length.to(u)[:, None] * u, length)
        moved = take(problem, norm, state, step)
        return replace(moved, segment=_segment(problem, state, moved, step))


def _segment(objective: Objective, a: State, b: State, step: Step) -> Segment:
    """The straight step from a to b."""

    def time_rate(s: State) -> Tensor:
        return log_time_rate(objective, s.readings["lam"], s.memory["dual"]) + torch.log(step.length)

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


@dataclass(frozen=True)
class SteepestDescent:
    """Steepest descent in any norm with a constant learning rate, g = ∇𝓛(w):

        w ← w − lr·‖g‖_*·u   or, ``normalized``,   w ← w − lr·u,   ⟨u, g⟩ = ‖g‖_*, ‖u‖ = 1.

    Steps are computed from ∇Λ and Λ, so that they are exact where g underflows. Flow time is Σ lr for the first
    form; for the second, whose arclength is Σ lr, it is the time that the flow takes for the same lengths.
    """

    norm: Norm
    lr: float
    normalized: bool = False
    name: str = ""

    def __post_init__(self) -> None:
        _require_norm("SteepestDescent", self.norm)
        _require_positive("SteepestDescent", lr=self.lr)
        if not isinstance(self.normalized, bool):
            raise TypeError(f"SteepestDescent: got normalized={self.normalized!r}, expected True or False")

    @property
    def label(self) -> str:
        name = self.name or f"{self.norm.title} descent"
        return f"{'normalised ' if self.normalized else ''}{name}, lr = {self.lr:g}"

    def start(self, problem: Objective, w_or_state: Tensor | State) -> State:
        return begin(problem, self.norm.bind(problem.layout), w_or_state)

    def advance(self, problem: Objective, state: State, until: Target, budget: int) -> State:
        norm = self.norm.bind(problem.layout)
        return march(lambda part, local: self._step(part, norm, local), problem, state, until, budget)

    def _step(self, problem: Objective, norm: Norm, state: State) -> State:
        u = norm.steepest(state.memory["ascent"])
        # log ‖g‖_*: one over the rate dt/ds
        log_force = -log_time_rate(problem, state.readings["lam"], state.memory["dual"])
        log_lr = torch.full_like(log_force, math.log(self.lr))
        length = torch.exp(log_lr if self.normalized else log_lr + log_force)
        step = Step(length.to(u)[:, None] * u, length, log_lr - log_force if self.normalized else log_lr)
        return take(problem, norm, state, step)


def GradientDescent(lr: float, *, normalized: bool = False) -> SteepestDescent:
    """w ← w − lr·∇𝓛, or with the step's ℓ2 length equal to lr."""
    return SteepestDescent(L2(), lr, normalized, "gradient descent")


def SignDescent(lr: float, *, normalized: bool = False) -> SteepestDescent:
    """w ← w − lr·‖∇𝓛‖₁ sign ∇𝓛, or ``normalized`` w ← w − lr·sign ∇𝓛, what the literature calls signSGD."""
    return SteepestDescent(Linf(), lr, normalized, "sign descent")


def CoordinateDescent(lr: float, *, normalized: bool = False) -> SteepestDescent:
    """Greedy coordinate descent: only the largest entry of ∇𝓛 moves, by lr·|∂𝓛|, or ``normalized`` by lr.

    Ties go to the first of the largest entries.
    """
    return SteepestDescent(L1(), lr, normalized, "coordinate descent")


def _require_norm(rule: str, norm: Norm) -> None:
    if not isinstance(norm, Norm):
        raise TypeError(f"{rule}: got norm {norm!r}, expected a flowsim norm, try flowsim.Linf()")


def _require_positive(rule: str, **options: float) -> None:
    for name, value in options.items():
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
            raise ValueError(f"{rule}: got {name}={value!r}, expected a finite number > 0")

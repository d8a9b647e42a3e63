"""Steepest descent with a learning rate, and small steps of the steepest flow, as rules."""

import math
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from flowsim.clocks import Target, log_time_rate
from flowsim.discrete import Discrete, Step, begin, settle, take
from flowsim.frames import Frame, no_frame
from flowsim.momentum import Average, Momentum, require_momentum
from flowsim.norms import L1, L2, Linf, Norm
from flowsim.problem import Objective
from flowsim.schedules import LearningRate, Schedule, as_schedule, require_not_negative, require_positive
from flowsim.state import Segment, State, march


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
        return march(lambda part, local: self._step(part, norm, local), problem, state, until, budget)

    def _step(self, problem: Objective, norm: Norm, state: State) -> State:
        u = norm.steepest(state.memory["ascent"])
        length = self.dlam / state.memory["dual"]
        if problem.degree > 1:
            reach = self.relative / (problem.degree - 1) * state.w.abs().amax(-1) / u.abs().amax(-1)
            length = torch.minimum(length, reach.double())
        step = Step(length.to(u)[:, None] * u, length)
        moved = settle(take(problem, norm, state, step), state)
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
class SteepestDescent(Discrete):
    """Steepest descent in any norm with a learning rate η_k, g = ∇𝓛(w):

        w ← w − η·‖g‖_*·u   or, ``normalized``,   w ← w − η·u,   ⟨u, g⟩ = ‖g‖_*, ‖u‖ = 1.

    ``lr`` is a number or a schedule: `Decay`, `LossBased`, `PerStep`. With a ``momentum``, `HeavyBall`, `Nesterov`
    or `Average`, what that follows is in the place of g. With a ``decay`` λ weights shrink by 1 − ηλ in each step.

    Steps are computed from ∇Λ and Λ, so that they are exact where g underflows. Flow time is Σ η for the first form,
    times 1/(1 − β) with momentum that is no average; for the second, whose arclength is Σ η, it is the time that the
    flow takes for the same lengths.
    """

    norm: Norm
    lr: LearningRate
    normalized: bool = False
    name: str = ""
    momentum: Momentum | None = None
    decay: float = 0.0

    def __post_init__(self) -> None:
        require_norm("SteepestDescent", self.norm)
        as_schedule("SteepestDescent", self.lr)
        require_momentum("SteepestDescent", self.momentum)
        require_not_negative("SteepestDescent", decay=self.decay)
        if not isinstance(self.normalized, bool):
            raise TypeError(f"SteepestDescent: got normalized={self.normalized!r}, expected True or False")

    @cached_property
    def schedule(self) -> Schedule:
        return as_schedule("SteepestDescent", self.lr)

    @property
    def label(self) -> str:
        name = self.name or f"{self.norm.title} descent"
        momentum = f", β = {self.momentum.beta:g}" if self.momentum is not None else ""
        decay = f", λ = {self.decay:g}" if self.decay else ""
        return f"{'normalised ' if self.normalized else ''}{name}, {self.schedule.label}{momentum}{decay}"

    @property
    def kind(self) -> str:
        return f"SteepestDescent {self.norm.name} {type(self.momentum).__name__}"

    @property
    def memoryless(self) -> bool:  # type: ignore[override]
        return self.momentum is None

    def bound(self, problem: Objective) -> Norm:
        self.schedule.check("SteepestDescent", problem)
        return self.norm.bind(problem.layout)

    def blank(self, problem: Objective, state: State) -> dict[str, Tensor]:
        return blank_momentum(self.momentum, state)

    def step(self, problem: Objective, norm: Norm, state: State) -> State:
        lam = state.readings["lam"]
        log_lr = self.schedule.log(state.memory["age"], lam)
        log_force = -log_time_rate(problem, lam, state.memory["dual"])  # log ‖g‖_*: one over the rate dt/ds
        m: dict[str, Tensor] = {}
        if self.momentum is None:
            followed = state.memory["ascent"]
            log_strength = log_force
        else:
            frame = Frame.follow(problem, state, self.momentum.beta)
            m, followed = remembered(self.momentum, state, frame)
            log_strength = frame.log_unit + torch.log(norm.dual(followed).double())
        length = torch.exp(log_lr if self.normalized else log_lr + log_strength)
        move = length.to(followed)[:, None] * norm.steepest(followed)
        if self.decay:
            move = move - (self.decay * torch.exp(log_lr)).to(move)[:, None] * state.w
            length = norm.value(move).double()
        return take(problem, norm, state, Step(move, length, self._log_time(log_lr, log_force)), m)

    def _log_time(self, log_lr: Tensor, log_force: Tensor) -> Tensor | None:
        if not self.normalized:
            return log_lr + math.log(self.momentum.gain if self.momentum is not None else 1.0)
        return log_lr - log_force if self.momentum is None else None


def blank_momentum(momentum: Momentum | None, state: State) -> dict[str, Tensor]:
    """What a rule with this momentum remembers before its first step."""
    return {} if momentum is None else {"momentum": torch.zeros_like(state.w), "frame": no_frame(state)}


def remembered(momentum: Momentum, state: State, frame: Frame) -> tuple[dict[str, Tensor], Tensor]:
    """What a rule with this momentum remembers after the gradient at ``state``, and what it follows."""
    m, followed = momentum.update(state, frame)
    return {"momentum": m, "frame": frame.log_unit}, followed


def GradientDescent(
    lr: LearningRate, *, normalized: bool = False, momentum: Momentum | None = None
) -> SteepestDescent:
    """w ← w − lr·∇𝓛, or with the step's ℓ2 length equal to lr."""
    return SteepestDescent(L2(), lr, normalized, "gradient descent", momentum)


def SignDescent(lr: LearningRate, *, normalized: bool = False) -> SteepestDescent:
    """w ← w − lr·‖∇𝓛‖₁ sign ∇𝓛, or ``normalized`` w ← w − lr·sign ∇𝓛, what the literature calls signSGD."""
    return SteepestDescent(Linf(), lr, normalized, "sign descent")


def Signum(lr: LearningRate, beta: float = 0.9, *, decay: float = 0.0) -> SteepestDescent:
    """w ← (1 − lr·λ)w − lr·sign m with m the average of gradients (Bernstein et al. 2018), λ = ``decay``."""
    return SteepestDescent(Linf(), lr, True, "sign descent", Average(beta), decay)


def CoordinateDescent(lr: LearningRate, *, normalized: bool = False) -> SteepestDescent:
    """Greedy coordinate descent: only the largest entry of ∇𝓛 moves, by lr·|∂𝓛|, or ``normalized`` by lr.

    Ties go to the first of the largest entries.
    """
    return SteepestDescent(L1(), lr, normalized, "coordinate descent")


def require_norm(rule: str, norm: Norm) -> None:
    """Raise where ``norm`` is not an instance of one."""
    if not isinstance(norm, Norm):
        raise TypeError(f"{rule}: got norm {norm!r}, expected a flowsim norm, try flowsim.Linf()")

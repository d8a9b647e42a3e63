"""Steepest descent with a learning rate, and small steps of the steepest flow, as rules."""

import math
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from flowsim.checks import require_not_negative
from flowsim.descent.learning_rates import LearningRate, LearningRateLike, as_learning_rate
from flowsim.descent.momentum import (
    Average,
    Frame,
    Momentum,
    blank_momentum,
    remembered,
    require_momentum,
)
from flowsim.descent.rule import Discrete, Step, take
from flowsim.motion.clocks import log_time_rate
from flowsim.motion.state import State
from flowsim.norms.norm import Norm, require_norm
from flowsim.norms.vector import L1, L2, Linf
from flowsim.problems.objective import Objective


@dataclass(frozen=True)
class SteepestDescent(Discrete):
    """Steepest descent in any norm with a learning rate η_k, g = ∇𝓛(w):

        w ← w − η·‖g‖_*·u   or, ``normalized``,   w ← w − η·u,   ⟨u, g⟩ = ‖g‖_*, ‖u‖ = 1.

    ``lr`` is a number or a schedule: `Decay`, `LossBased`, `PerStep`. With a ``momentum``,
    `HeavyBall`, `Nesterov` or `Average`, what that follows is in the place of g. With a ``decay`` λ
    weights shrink by 1 − ηλ in each step.

    Steps are computed from ∇Λ and Λ, so that they are exact where g underflows. Flow time is Σ η
    for the first form, times 1/(1 − β) with momentum that is no average; for the second, whose
    arclength is Σ η, it is the time that the flow takes for the same lengths."""

    norm: Norm
    lr: LearningRateLike
    normalized: bool = False
    name: str = ""
    momentum: Momentum | None = None
    decay: float = 0.0

    def __post_init__(self) -> None:
        require_norm("SteepestDescent", self.norm)
        as_learning_rate("SteepestDescent", self.lr)
        require_momentum("SteepestDescent", self.momentum)
        require_not_negative("SteepestDescent", decay=self.decay)
        if not isinstance(self.normalized, bool):
            raise TypeError(
                f"SteepestDescent: got normalized={self.normalized!r}, expected True or False"
            )

    @cached_property
    def schedule(self) -> LearningRate:
        return as_learning_rate("SteepestDescent", self.lr)

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
        log_force = -log_time_rate(
            problem, lam, state.memory["dual"]
        )  # log ‖g‖_*: one over the rate dt/ds
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


def GradientDescent(
    lr: LearningRateLike, *, normalized: bool = False, momentum: Momentum | None = None
) -> SteepestDescent:
    """w ← w − lr·∇𝓛, or with the step's ℓ2 length equal to lr."""
    return SteepestDescent(L2(), lr, normalized, "gradient descent", momentum)


def SignDescent(lr: LearningRateLike, *, normalized: bool = False) -> SteepestDescent:
    """w ← w − lr·‖∇𝓛‖₁ sign ∇𝓛, or ``normalized`` w ← w − lr·sign ∇𝓛, what the literature calls
    signSGD."""
    return SteepestDescent(Linf(), lr, normalized, "sign descent")


def Signum(lr: LearningRateLike, beta: float = 0.9, *, decay: float = 0.0) -> SteepestDescent:
    """w ← (1 − lr·λ)w − lr·sign m with m the average of gradients (Bernstein et al. 2018), λ =
    ``decay``."""
    return SteepestDescent(Linf(), lr, True, "sign descent", Average(beta), decay)


def CoordinateDescent(lr: LearningRateLike, *, normalized: bool = False) -> SteepestDescent:
    """Greedy coordinate descent: only the largest entry of ∇𝓛 moves, by lr·|∂𝓛|, or ``normalized``
    by lr.

    Ties go to the first of the largest entries.
    """
    return SteepestDescent(L1(), lr, normalized, "coordinate descent")

"""Steepest descent with a learning rate."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from flowsim.checks import require_flag, require_instance
from flowsim.descent.learning_rates import LearningRateLike
from flowsim.descent.momentum import Average, Momentum
from flowsim.descent.rule import Memory, Step, WithLearningRate
from flowsim.motion.clocks import log_time_rate
from flowsim.motion.state import State
from flowsim.norms.norm import Norm, require_norm
from flowsim.norms.vector import L1, L2, Linf
from flowsim.numerics.shapes import PerTrajectory
from flowsim.problems.objective import Objective


@dataclass(frozen=True, repr=False)
class SteepestDescent(WithLearningRate):
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
        super().__post_init__()
        require_norm("SteepestDescent", self.norm)
        expected = "None or one of its kinds, try flowsim.HeavyBall(0.9)"
        require_instance("SteepestDescent", Momentum | None, expected, momentum=self.momentum)
        require_flag("SteepestDescent", normalized=self.normalized)

    @property
    def label(self) -> str:
        name = self.name or f"{self.norm.title} descent"
        if self.normalized:
            name = f"normalised {name}"
        return name + super().label.removeprefix(self.title)

    @property
    def details(self) -> list[str]:
        return [] if self.momentum is None else [f"β = {self.momentum.beta:g}"]

    @property
    def kind(self) -> str:
        return f"SteepestDescent {self.norm.name} {type(self.momentum).__name__}"

    @property
    def memoryless(self) -> bool:  # type: ignore[override]
        return self.momentum is None

    def blank(self, problem: Objective, state: State) -> Memory:
        return {} if self.momentum is None else self.momentum.blank(state)

    def plan(
        self, problem: Objective, norm: Norm, state: State, log_lr: PerTrajectory
    ) -> tuple[Step, Memory]:
        # log ‖g‖_*: one over the rate dt/ds
        lam = state.readings["lam"]
        log_force = -log_time_rate(problem, lam, state.memory["dual_norm"])
        own: Memory = {}
        followed = state.memory["ascent"]
        log_strength = log_force
        if self.momentum is not None:
            followed, own = self.momentum.followed(problem, state)
            strength = norm.dual(followed).double()
            log_strength = own["frame"] + torch.log(strength)
        log_length = log_lr if self.normalized else log_lr + log_strength
        length = torch.exp(log_length)
        move = length.to(followed)[:, None] * norm.steepest(followed)
        return Step(move, length, self._log_time(log_lr, log_force)), own

    def _log_time(self, log_lr: Tensor, log_force: Tensor) -> Tensor | None:
        if self.momentum is None:
            return log_lr - log_force if self.normalized else log_lr
        if self.normalized:
            return None
        return log_lr + math.log(self.momentum.gain)


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
    by lr. Ties go to the first of the largest entries."""
    return SteepestDescent(L1(), lr, normalized, "coordinate descent")

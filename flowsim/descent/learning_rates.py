"""Learning rates: how far a discrete rule goes in its k-th step.

A learning rate is handled by its logarithm, because one that follows the loss, η/𝓛, is e^{5000}
where 𝓛 is e^{−5000}."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol, TypeAlias, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from flowsim.checks import is_positive, require_positive
from flowsim.numerics.shapes import PerTrajectory
from flowsim.problems.objective import Objective


@runtime_checkable
class LearningRate(Protocol):
    """A learning rate for every step."""

    @property
    def label(self) -> str:
        """What plots and tables call it."""

    def check(self, rule: str, objective: Objective) -> None:
        """Raise where the schedule has no meaning for this objective."""
        return

    def log(self, age: PerTrajectory, lam: PerTrajectory) -> PerTrajectory:
        """log η_k after ``age`` = k = 0, 1, … steps of the rule, at the level Λ."""


LearningRateLike: TypeAlias = float | LearningRate


@dataclass(frozen=True)
class Constant(LearningRate):
    """η_k = lr; what a plain number stands for."""

    lr: float

    def __post_init__(self) -> None:
        require_positive("Constant", lr=self.lr)

    @property
    def label(self) -> str:
        return f"lr = {self.lr:g}"

    def log(self, age: Tensor, lam: Tensor) -> Tensor:
        return torch.full_like(lam, math.log(self.lr))


@dataclass(frozen=True)
class Decay(LearningRate):
    """η_k = lr·(k + delay)^(−power), k = 0, 1, …

    Margin theorems for sign descent and Adam want η_k → 0 and Ση_k = ∞: 0 < power ≤ 1, with delay =
    2 in Zhang, Zou & Cao 2024."""

    lr: float
    power: float = 0.5
    delay: float = 1.0

    def __post_init__(self) -> None:
        require_positive("Decay", lr=self.lr, power=self.power, delay=self.delay)

    @property
    def label(self) -> str:
        return f"lr = {self.lr:g}·(k + {self.delay:g})^(−{self.power:g})"

    def log(self, age: Tensor, lam: Tensor) -> Tensor:
        return math.log(self.lr) - self.power * torch.log(age + self.delay)


@dataclass(frozen=True)
class LossBased(LearningRate):
    """η_k = lr/𝓛(w_k), with ``lr`` a number or another schedule: without normalisation a step is
    lr·‖∇Λ‖_* long.

    Gradient descent in this way raises the margin at the rate of normalised descent (Nacson et al.
    2019). Raises ValueError for objectives that are not a positive loss."""

    lr: LearningRateLike

    def __post_init__(self) -> None:
        as_learning_rate("LossBased", self.lr)

    @cached_property
    def _inner(self) -> LearningRate:
        return as_learning_rate("LossBased", self.lr)

    @property
    def label(self) -> str:
        return f"{self._inner.label}/loss"

    def check(self, rule: str, objective: Objective) -> None:
        if not objective.logarithmic:
            raise ValueError(
                f"{rule}: got a learning rate that divides by the loss and an objective that may "
                f"be negative, expected a positive loss, try lr={self.lr!r}"
            )

    def log(self, age: Tensor, lam: Tensor) -> Tensor:
        return self._inner.log(age, lam) + lam


@dataclass(frozen=True)
class PerStep(LearningRate):
    """η_k = lr[k], k = 0, 1, …; after the end of the sequence its last value."""

    lr: Iterable[float]

    def __post_init__(self) -> None:
        listed = isinstance(self.lr, Iterable) and not isinstance(self.lr, str)
        values = tuple(self.lr) if listed else ()
        if not values:
            raise ValueError(
                f"PerStep: got lr={self.lr!r}, expected a non-empty sequence of numbers, "
                "try [0.1, 0.01]"
            )
        require_positive("PerStep", **{f"lr[{k}]": value for k, value in enumerate(values)})
        object.__setattr__(self, "lr", tuple(float(v) for v in values))

    @cached_property
    def _logs(self) -> Float[Tensor, " K"]:
        return torch.tensor(self.lr, dtype=torch.float64).log()

    @property
    def label(self) -> str:
        return f"lr of each step ({len(self._logs)})"

    def log(self, age: Tensor, lam: Tensor) -> Tensor:
        return self._logs.to(lam.device)[age.long().clamp_max(len(self._logs) - 1)]


def as_learning_rate(rule: str, lr: Any) -> LearningRate:
    """A number as a constant, a schedule as it is; anything else is refused in the name of
    ``rule``."""
    if isinstance(lr, LearningRate) and not isinstance(lr, type):
        return lr
    if not is_positive(lr):
        raise ValueError(
            f"{rule}: got lr={lr!r}, expected a finite number > 0 or a schedule, "
            "try flowsim.Decay(0.1, power=0.5)"
        )
    return Constant(lr)

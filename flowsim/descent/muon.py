"""Muon: spectral descent along an average of gradients, with the exact polar factor or
Newton–Schulz iterations."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float
from torch import Tensor

from flowsim.checks import require_flag, require_instance, require_share, require_whole
from flowsim.descent.learning_rates import LearningRateLike
from flowsim.descent.momentum import Average, Momentum, Nesterov
from flowsim.descent.rule import Memory, Step, WithLearningRate
from flowsim.layout import Layout
from flowsim.motion.state import State
from flowsim.norms.blocks import modular
from flowsim.norms.norm import Norm
from flowsim.norms.vector import L2
from flowsim.numerics.shapes import PerTrajectory
from flowsim.problems.objective import Objective


@dataclass(frozen=True)
class NewtonSchulz:
    """The approximate polar factor of practice: from X = G/‖G‖_F, ``steps`` times

        X ← aX + b(XXᵀ)X + c(XXᵀ)²X,   (a, b, c) = ``coefficients``.

    The default coefficients (Jordan et al. 2024) do not converge: five steps take a singular value
    σ of 6e-3·‖G‖_F or more to between 0.682 and 1.134, one from 2e-3 on to at most 1.202, and
    smaller ones to less, near 0 to 485 σ/‖G‖_F. So the limit of descent along it is not that of the
    exact factor."""

    steps: int = 5
    coefficients: tuple[float, float, float] = (3.4445, -4.7750, 2.0315)

    def __post_init__(self) -> None:
        require_whole("NewtonSchulz", steps=self.steps)
        if len(self.coefficients) != 3:
            raise ValueError(
                f"NewtonSchulz: got coefficients={self.coefficients!r}, expected three numbers"
            )

    def __call__(self, matrix: Float[Tensor, "*batch m n"]) -> Float[Tensor, "*batch m n"]:
        """The factor; zero for a matrix that is zero."""
        a, b, c = self.coefficients
        wide = matrix.shape[-2] <= matrix.shape[-1]
        x = matrix if wide else matrix.mT
        x = x / torch.linalg.matrix_norm(x, keepdim=True).clamp_min(torch.finfo(x.dtype).tiny)
        for _ in range(self.steps):
            gram = x @ x.mT
            x = a * x + (b * gram + c * (gram @ gram)) @ x
        return x if wide else x.mT


@dataclass(frozen=True, repr=False)
class Muon(WithLearningRate):
    """W_l ← (1 − ηλ)W_l − η·c_l·O_l, with O_l the polar factor UVᵀ of the block's average of
    gradients, for a vector the unit vector along it (Jordan et al. 2024): normalised steepest
    descent in the `modular` norm.

    The average is `Nesterov`'s, or with ``nesterov=False`` a plain one. ``polar`` = None takes the
    exact factor, whose singular values are 1, or 0 for those within rounding of zero;
    `NewtonSchulz()` the one of practice. c_l are the ``scales`` by the blocks' names, 1 where not
    given, and λ is ``decay``. Lengths are in the modular norm: with the exact factor and without
    decay the arclength is Σ η. t is the time that the flow in this norm takes for the path."""

    lr: LearningRateLike
    beta: float = 0.95
    nesterov: bool = True
    polar: NewtonSchulz | None = None
    scales: Mapping[str, float] | None = None
    decay: float = 0.0

    memoryless = False

    def __post_init__(self) -> None:
        super().__post_init__()
        require_share("Muon", beta=self.beta)
        require_flag("Muon", nesterov=self.nesterov)
        expected = "None or an instance, try flowsim.NewtonSchulz()"
        require_instance("Muon", NewtonSchulz | None, expected, polar=self.polar)

    @cached_property
    def momentum(self) -> Momentum:
        return Nesterov(self.beta) if self.nesterov else Average(self.beta)

    @property
    def label(self) -> str:
        if self.polar is None:
            return super().label
        factor = f"Muon with {self.polar.steps} Newton–Schulz steps"
        return factor + super().label.removeprefix("Muon")

    @property
    def details(self) -> list[str]:
        return [f"β = {self.beta:g}"]

    @property
    def kind(self) -> str:
        return f"Muon {type(self.momentum).__name__}"

    def bound(self, problem: Objective) -> Norm:
        return modular(problem.layout, self.scales)

    def blank(self, problem: Objective, state: State) -> Memory:
        return self.momentum.blank(state)

    def plan(
        self, problem: Objective, norm: Norm, state: State, log_lr: PerTrajectory
    ) -> tuple[Step, Memory]:
        followed, own = self.momentum.followed(problem, state)
        if self.polar is None:
            direction = norm.steepest(followed)
        else:
            direction = self._approximate(self.polar, problem.layout, followed)
        return Step(torch.exp(log_lr).to(direction)[:, None] * direction), own

    def _approximate(self, polar: NewtonSchulz, layout: Layout, followed: Tensor) -> Tensor:
        """The direction with the matrices' factors from ``polar``."""
        parts = []
        scales = self.scales or {}
        for block in layout:
            part = block.of(followed)
            matrix = len(block.shape) > 1
            unit = polar(part.flatten(2)).flatten(1) if matrix else L2().steepest(part)
            parts.append(scales.get(block.name, 1.0) * unit)
        return torch.cat(parts, 1)

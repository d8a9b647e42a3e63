"""Muon: spectral descent along an average of gradients, with the exact polar factor or
Newton–Schulz iterations."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float
from torch import Tensor

from flowsim.checks import require_not_negative, require_share
from flowsim.descent.learning_rates import LearningRate, LearningRateLike, as_learning_rate
from flowsim.descent.momentum import Average, Frame, Momentum, Nesterov, blank_momentum, remembered
from flowsim.descent.rule import Discrete, Step, take
from flowsim.layout import Layout
from flowsim.motion.state import State
from flowsim.norms.blocks import modular
from flowsim.norms.norm import Norm
from flowsim.norms.vector import L2
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
        if isinstance(self.steps, bool) or not isinstance(self.steps, int) or self.steps < 1:
            raise ValueError(
                f"NewtonSchulz: got steps={self.steps!r}, expected an integer ≥ 1, try 5"
            )
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


@dataclass(frozen=True)
class Muon(Discrete):
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
        as_learning_rate("Muon", self.lr)
        require_share("Muon", beta=self.beta)
        require_not_negative("Muon", decay=self.decay)
        if not isinstance(self.nesterov, bool):
            raise TypeError(f"Muon: got nesterov={self.nesterov!r}, expected True or False")
        if self.polar is not None and not isinstance(self.polar, NewtonSchulz):
            raise TypeError(
                f"Muon: got polar={self.polar!r}, expected None or an instance, try flowsim.NewtonSchulz()"
            )

    @cached_property
    def schedule(self) -> LearningRate:
        return as_learning_rate("Muon", self.lr)

    @cached_property
    def momentum(self) -> Momentum:
        return Nesterov(self.beta) if self.nesterov else Average(self.beta)

    @property
    def label(self) -> str:
        factor = "" if self.polar is None else f" with {self.polar.steps} Newton–Schulz steps"
        decay = f", λ = {self.decay:g}" if self.decay else ""
        return f"Muon{factor}, {self.schedule.label}, β = {self.beta:g}{decay}"

    @property
    def kind(self) -> str:
        return f"Muon {type(self.momentum).__name__}"

    def bound(self, problem: Objective) -> Norm:
        self.schedule.check("Muon", problem)
        return modular(problem.layout, self.scales)

    def blank(self, problem: Objective, state: State) -> dict[str, Tensor]:
        return blank_momentum(self.momentum, state)

    def step(self, problem: Objective, norm: Norm, state: State) -> State:
        frame = Frame.follow(problem, state, self.beta)
        own, followed = remembered(self.momentum, state, frame)
        log_lr = self.schedule.log(state.memory["age"], state.readings["lam"])
        lr = torch.exp(log_lr)
        direction = (
            norm.steepest(followed)
            if self.polar is None
            else self._approximate(problem.layout, followed)
        )
        move = lr.to(direction)[:, None] * (direction - self.decay * state.w)
        return take(problem, norm, state, Step(move, norm.value(move).double()), own)

    def _approximate(self, layout: Layout, followed: Tensor) -> Tensor:
        """The direction with the matrices' factors from ``polar``."""
        assert self.polar is not None
        parts = []
        for block in layout:
            part = block.of(followed)
            unit = (
                self.polar(part.flatten(2)).flatten(1)
                if len(block.shape) > 1
                else L2().steepest(part)
            )
            parts.append((self.scales or {}).get(block.name, 1.0) * unit)
        return torch.cat(parts, 1)

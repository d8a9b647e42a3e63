"""Shampoo: each matrix is preconditioned from both sides by roots of its gradients' second
moments."""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from flowsim.checks import is_finite, require_not_negative, require_share
from flowsim.descent.learning_rates import LearningRateLike
from flowsim.descent.momentum import Frame, no_frame
from flowsim.descent.rule import Memory, Step, WithLearningRate
from flowsim.layout import Block, Layout
from flowsim.motion.state import State
from flowsim.norms.blocks import modular
from flowsim.norms.norm import Norm
from flowsim.numerics.batched import svd
from flowsim.numerics.shapes import PerTrajectory, Rows
from flowsim.problems.objective import Objective


@dataclass(frozen=True, repr=False)
class Shampoo(WithLearningRate):
    """For each matrix W with gradient G (Gupta, Koren & Singer 2018):

        L ← L + GGᵀ,   R ← R + GᵀG,   W ← (1 − ηλ)W − η·(L + ε)^{−p} G (R + ε)^{−p},

    for a vector g with L ← L + ggᵀ and (L + ε)^{−2p} g. ``exponent`` is p, 0 < p < ½. ``beta`` =
    None sums as above; a number β forgets, L ← βL + (1 − β)GGᵀ, and β = 0 accumulates nothing: then
    p = ¼ and ε = 0 give UVᵀ, which is normalised `Spectral` descent of each block.

    ε is in units of g², also where g underflows. With ε = 0 nothing moves along eigenvectors of L
    and R whose eigenvalues are within rounding of 0, that is, singular values below 1e-8 of the
    largest; without accumulation only those within rounding. Lengths are in the `modular` norm. t
    is Σ η, the time of the limit η → 0 for fixed β; for sums it is Σ η^{1/(1 − 2p)}, so Σ η² for p
    = ¼."""

    lr: LearningRateLike
    beta: float | None = None
    exponent: float = 0.25
    eps: float = 0.0
    decay: float = 0.0

    memoryless = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.beta is not None:
            require_share("Shampoo", beta=self.beta)
        require_not_negative("Shampoo", eps=self.eps)
        inside = is_finite(self.exponent) and 0 < self.exponent < 0.5
        if not inside:
            raise ValueError(
                f"Shampoo: got exponent={self.exponent!r}, expected a number between 0 and ½, "
                "try 0.25"
            )

    @property
    def details(self) -> list[str]:
        kept = "sums" if self.beta is None else f"β = {self.beta:g}"
        return [kept, f"p = {self.exponent:g}", f"ε = {self.eps:g}"]

    @property
    def kind(self) -> str:
        return "Shampoo sum" if self.beta is None else "Shampoo"

    def bound(self, problem: Objective) -> Norm:
        return modular(problem.layout)

    def blank(self, problem: Objective, state: State) -> Memory:
        own = {"frame": no_frame(state)}
        if self.beta == 0:
            return own
        for i, block in enumerate(problem.layout):
            B, m, n = _matrix(block, state.w).shape
            own[f"left{i}"] = state.w.new_zeros(B, m, m)
            if len(block.shape) > 1:
                own[f"right{i}"] = state.w.new_zeros(B, n, n)
        return own

    def plan(
        self, problem: Objective, norm: Norm, state: State, log_lr: PerTrajectory
    ) -> tuple[Step, Memory]:
        kept = 1.0 if self.beta is None else self.beta
        forget = math.sqrt(kept)
        frame = Frame.follow(problem, state, forget)
        direction, moments = self._preconditioned(problem.layout, state, frame)
        # of each side e^{−2pS}, and e^{S} of the gradient
        power = 1 - 4 * self.exponent
        log_scale = log_lr + power * frame.log_unit
        scale = torch.exp(log_scale).to(state.w)
        log_time = log_lr
        if self.beta is None:
            log_time = log_lr / (1 - 2 * self.exponent)
        move = scale[:, None] * direction
        own = {"frame": frame.log_unit, **moments}
        return Step(move, log_time=log_time), own

    def _preconditioned(self, layout: Layout, state: State, frame: Frame) -> tuple[Rows, Memory]:
        """The gradient between its two powers, and the moments of all blocks; in the frame's
        units."""
        ascent = frame.gradient(state)
        eps = frame.inside(self.eps, 2)
        eps = eps.to(state.w)
        parts = []
        remembered: Memory = {}
        for i, block in enumerate(layout):
            G = _matrix(block, ascent)
            moments = self._moments(i, G, state, frame)
            direction = self._direction(G, list(moments.values()), eps)
            parts.append(direction.flatten(1))
            remembered |= moments
        return torch.cat(parts, 1), remembered

    def _moments(self, i: int, G: Tensor, state: State, frame: Frame) -> Memory:
        """What is remembered of block i, in the frame's units; nothing without accumulation."""
        kept = 1.0 if self.beta is None else self.beta
        added = 1.0 if self.beta is None else 1 - self.beta
        factor = kept * (frame.keep**2)[..., None]
        squares = {f"left{i}": G @ G.mT, f"right{i}": G.mT @ G}
        moments = {}
        for side, square in squares.items():
            if side in state.memory:
                moment = factor * state.memory[side]
                moments[side] = moment + added * square
        return moments

    def _direction(self, G: Tensor, moments: list[Tensor], eps: PerTrajectory) -> Tensor:
        """(L + ε)^{−p} G (R + ε)^{−p}; with one moment (L + ε)^{−2p} G; with none those of G
        alone."""
        p = self.exponent
        if len(moments) == 2:
            left = _power(moments[0], eps, -p)
            right = _power(moments[1], eps, -p)
            return left @ G @ right
        if len(moments) == 1:
            return _power(moments[0], eps, -2 * p) @ G
        u, s, v = svd(G)
        unit = max(G.shape[1:]) * torch.finfo(s.dtype).eps
        largest = s.amax(-1, keepdim=True)
        s = torch.where(s <= unit * largest, 0.0, s)
        squares = s**2 + eps[:, None]
        scaled = s * _power_or_zero(squares, -2 * p)
        return (u * scaled[:, None, :]) @ v.mT


def _matrix(block: Block, w: Tensor) -> Float[Tensor, "B m n"]:
    """The block as a matrix (out, rest), a vector as a column."""
    part = block.of(w)
    if len(block.shape) == 1:
        return part[..., None]
    return part.flatten(2)


def _power(
    moment: Float[Tensor, "B m m"], eps: PerTrajectory, power: float
) -> Float[Tensor, "B m m"]:
    """(M + ε)^power, zero on eigenvectors where M + ε is zero."""
    values, basis = torch.linalg.eigh(moment)
    unit = moment.shape[-1] * torch.finfo(moment.dtype).eps
    largest = values[..., -1:]
    values = torch.where(values <= unit * largest, 0.0, values)
    powers = _power_or_zero(values + eps[:, None], power)
    return (basis * powers[:, None, :]) @ basis.mT


def _power_or_zero(values: Tensor, power: float) -> Tensor:
    positive = values > 0
    inner = torch.where(positive, values, 1.0)
    return torch.where(positive, inner**power, 0.0)

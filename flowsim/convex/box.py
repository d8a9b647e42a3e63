"""Complementarity of many kinks at once: a box-constrained quadratic programme with block
structure.

    minimise ½ λᵀQλ − ⟨z, λ⟩   over 0 ≤ λ ≤ upper,        Q = blockdiag(K) − E V Eᵀ,

with one block K for each group of unknowns and a correction of low rank. At the solution the
residual s = z − Qλ is negative only where λ = 0, positive only where λ = upper, and zero where λ is
free: λ is a force that holds each kink's coordinate at zero, as far as its strength reaches."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import torch
from jaxtyping import Bool, Float
from torch import Tensor

PerUnknown: TypeAlias = Float[Tensor, "B G c"]
Marks: TypeAlias = Bool[Tensor, "B G c"]
Blocks: TypeAlias = Float[Tensor, "B G c c"]


@dataclass(frozen=True)
class LowRank:
    """The correction E V Eᵀ: ``factor (B, G, c, R)`` is E; ``core (B, R, R)`` is V and ``inverse``
    V⁻¹."""

    factor: Float[Tensor, "B G c R"]
    core: Float[Tensor, "B R R"]
    inverse: Float[Tensor, "B R R"]


@dataclass(frozen=True)
class Solution:
    """``force (B, G, c)``; ``free`` where it is strictly inside its bounds; ``solved (B,)``."""

    force: PerUnknown
    free: Marks
    solved: Bool[Tensor, " B"]


def solve_box(
    blocks: Blocks,
    z: PerUnknown,
    upper: PerUnknown,
    low_rank: LowRank | None = None,
    start: PerUnknown | None = None,
    *,
    max_sweeps: int = 40,
) -> Solution:
    """Primal–dual active sets (Hintermüller, Ito and Kunisch 2002); unknowns with ``upper`` = 0
    take no part.

    Each sweep guesses from λ + s/diag(Q) which unknowns are free and solves for those. Where sets
    repeat instead of settling, only one wrong unknown is moved at a time (Murty 1974), which ends
    after finitely many sweeps. Linear dependence inside a block is removed by a ridge of 10⁻¹² of
    its diagonal."""
    system, diagonal = ridged(blocks, low_rank)
    force = torch.zeros_like(z) if start is None else _inside(start, upper)
    residual = z - system.times(force)
    nothing = torch.zeros_like(upper, dtype=torch.bool)
    sets = _Sets(nothing, nothing)
    solved = nothing.flatten(1).any(-1)
    for sweep in range(max_sweeps):
        guess = _Sets.of(force + residual / diagonal, upper)
        changed = guess.differs_from(sets)
        if sweep > 0:
            solved = ~changed.flatten(1).any(-1)
            if bool(solved.all()):
                break
        if sweep > max_sweeps // 2:
            guess = sets.where(_first(changed), guess)
        sets = guess
        fixed = torch.where(sets.high, upper, 0.0)
        pull = z - system.times(fixed)
        force = system.solve(sets.free, pull)
        force = torch.where(sets.free, force, fixed)
        residual = z - system.times(force)
        residual = torch.where(sets.free, 0.0, residual)
    return Solution(_inside(force, upper), sets.free, solved)


def _inside(force: PerUnknown, upper: PerUnknown) -> PerUnknown:
    return force.clamp_min(0).minimum(upper)


def _first(marked: Marks) -> Marks:
    """The first that is marked in each trajectory."""
    count = marked.flatten(1).cumsum(-1)
    return marked & (count == 1).view_as(marked)


@dataclass(frozen=True)
class _Sets:
    """Which unknowns are ``free`` and which are at their upper bound."""

    free: Marks
    high: Marks

    @staticmethod
    def of(trial: PerUnknown, upper: PerUnknown) -> "_Sets":
        high = (trial >= upper) & (upper > 0)
        free = (trial > 0) & (trial < upper)
        return _Sets(free, high)

    def differs_from(self, others: "_Sets") -> Marks:
        free = self.free != others.free
        high = self.high != others.high
        return free | high

    def where(self, moved: Marks, others: "_Sets") -> "_Sets":
        free = torch.where(moved, others.free, self.free)
        high = torch.where(moved, others.high, self.high)
        return _Sets(free, high)


def ridged(blocks: Blocks, low_rank: LowRank | None) -> tuple["System", PerUnknown]:
    """The system with dependent unknowns made independent, and the diagonal of its blocks, 1 where
    that is zero."""
    diagonal = torch.diagonal(blocks, dim1=-2, dim2=-1)
    diagonal = torch.where(diagonal > 0, diagonal, 1.0)
    ridge = torch.diag_embed(1e-12 * diagonal)
    return System(blocks + ridge, low_rank), diagonal


@dataclass(frozen=True)
class System:
    """Products and solves with Q."""

    blocks: Blocks
    low_rank: LowRank | None

    def times(self, force: PerUnknown) -> PerUnknown:
        """Qλ."""
        out = (self.blocks @ force[..., None])[..., 0]
        if self.low_rank is None:
            return out
        E = self.low_rank.factor.flatten(1, 2)  # (B, Gc, R)
        along = E.mT @ force.flatten(1)[..., None]
        seen = self.low_rank.core @ along
        return out - (E @ seen).view_as(out)

    def solve(self, free: Marks, rhs: PerUnknown) -> PerUnknown:
        """The λ that is zero off ``free`` and has Qλ = rhs on it."""
        return self.factored(free)(rhs)

    def factored(self, free: Marks) -> Callable[[PerUnknown], PerUnknown]:
        """`solve` for several right-hand sides."""
        both_free = free[..., :, None] & free[..., None, :]
        blocks = torch.where(both_free, self.blocks, 0.0)
        ones = torch.diag_embed((~free).to(blocks))
        root, _ = torch.linalg.cholesky_ex(blocks + ones)

        def plain(rhs: Tensor) -> Tensor:
            rhs = torch.where(free, rhs, 0.0)[..., None]
            return torch.cholesky_solve(rhs, root)[..., 0]

        if self.low_rank is None:
            return plain
        E = torch.where(free[..., None], self.low_rank.factor, 0.0)
        KE = torch.cholesky_solve(E, root).flatten(1, 2)
        E = E.flatten(1, 2)
        inner = self.low_rank.inverse - E.mT @ KE  # Woodbury

        def corrected(rhs: Tensor) -> Tensor:
            first = plain(rhs)
            along = E.mT @ first.flatten(1)[..., None]
            seen = torch.linalg.solve(inner, along)
            return first + (KE @ seen).view_as(first)

        return corrected

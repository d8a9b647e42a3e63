r"""How far a point is from the KKT conditions of its max-margin problem, by the gradient that the
flow has selected.

The problem is min ½‖w‖² such that q_i(w) ≥ 1 for all i. Scaled until the least margin is one, w̃ =
w/q_min^{1/L}, the loss's own gradient h = ∇Λ = Σ μ_i ∇q_i offers multipliers and with them a
*force*

    λ_i = (‖w‖/‖h‖_*) q_min^{1 − 2/L} μ_i,      Γ = Σ λ_i ∇q_i(w̃) = ‖w̃‖ h/‖h‖_*

(Tsilivis et al. 2026, Lemma 13 and Def. 26). At a KKT point Γ ∈ ∂½‖w̃‖² and λ_i(q_i(w̃) − 1) = 0.
What is missing is the Fenchel–Young gap of Γ and w̃,

    D = ½‖w̃‖² + ½‖Γ‖_*² − ⟨w̃, Γ⟩ = ‖w̃‖²(1 − α),       α = ⟨w, h⟩/(‖w‖‖h‖_*),

which is the generalised Bregman divergence of Def. 26, for every subgradient in it.
`frank_wolfe_gap` is the same for the constrained problem that weight decay solves."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor

from flowsim.diagnostics.margins import Observer
from flowsim.diagnostics.near_kkt import Nearby, nearby_pair
from flowsim.diagnostics.selected import ascent, loss_multipliers
from flowsim.motion.state import State
from flowsim.norms.norm import Norm
from flowsim.norms.polars import polar
from flowsim.numerics.batched import dot
from flowsim.numerics.shapes import PerTrajectory, Rows
from flowsim.problems.objective import Objective
from flowsim.problems.problem import Problem

ByTolerance: TypeAlias = Float[Tensor, "T B"]
"""A number of each trajectory at each tolerance."""


def frank_wolfe_gap(norm: Norm, radius: float) -> Observer:
    """A measurement: max ⟨g, w − v⟩ over ‖v‖ ≤ radius, g = ∇𝓛, which is ⟨g, w⟩ + radius·‖g‖_*
    (Jaggi 2013).

    Inside the ball it is ≥ 0, zero at the KKT points of min 𝓛(w) over ‖w‖ ≤ radius, and where 𝓛 is
    convex it bounds 𝓛(w) − min 𝓛. Normalised steepest descent with decoupled weight decay λ, and
    AdamW in ℓ∞, are Frank–Wolfe steps of that problem for radius 1/λ."""

    def measure(problem: Objective, state: State) -> PerTrajectory:
        lam, h = problem.ascent(state.w)
        slope = norm.bind(problem.layout).dual(h)
        gap = radius * slope - dot(h, state.w)
        if problem.logarithmic:
            return torch.exp(-lam) * gap
        return gap

    return measure


# --------------------------------------------------------------------------------------------------
# Measurements, for ``simulate(…, observe=…)``
# --------------------------------------------------------------------------------------------------


def dual(norm: Norm, *, ascent: Observer = ascent) -> Observer:
    """‖h‖_*, the slope of Λ in arclength."""

    def measure(problem: Problem, state: State) -> Tensor:
        h = ascent(problem, state)
        return norm.bind(problem.layout).dual(h)

    return measure


def alignment(norm: Norm, *, ascent: Observer = ascent) -> Observer:
    """α = ⟨w, h⟩/(‖w‖‖h‖_*) ≤ 1, with the element h of ∇Λ that `ascent` gives; 1 at a KKT point."""

    def measure(problem: Problem, state: State) -> Tensor:
        h = ascent(problem, state)
        bound = norm.bind(problem.layout)
        size = bound.value(state.w)
        slope = bound.dual(h)
        return dot(state.w, h) / (size * slope)

    return measure


def multipliers(norm: Norm) -> Observer:
    """λ_i ``(B, M)``; NaN while an example is misclassified."""
    return _stationary(norm, lambda at: at.multipliers)


def divergence(norm: Norm) -> Observer:
    """D = ‖w̃‖²(1 − α); NaN while an example is misclassified."""
    return _stationary(norm, lambda at: at.divergence)


def slackness(norm: Norm) -> Observer:
    """Σ λ_i (q_i(w̃) − 1) ≥ 0, the δ of an (ε, δ)-KKT point; NaN while an example is
    misclassified."""
    return _stationary(norm, lambda at: at.slack)


def residual(norm: Norm, tol: float = 0.0) -> Observer:
    """The ε of an (ε, δ)-KKT point in the dual norm, over ‖w̃‖ (see `Stationarity.residual`)."""
    return _stationary(norm, lambda at: at.residual(tol)[1])


def _stationary(norm: Norm, read: Callable[["Stationarity"], Tensor]) -> Observer:
    """What is read of the KKT conditions at a state."""

    def measure(problem: Problem, state: State) -> Tensor:
        at = Stationarity.of(problem, state, norm)
        return read(at)

    return measure


# --------------------------------------------------------------------------------------------------
# All of it at one state
# --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Stationarity:
    """The KKT conditions of max-margin at a state: w̃, λ and Γ, and what they miss. All but α are
    NaN where q_min ≤ 0.

    ``w (B, P)`` is w̃, ``force (B, P)`` is Γ, ``multipliers (B, M)`` are the λ, and ``q (B, M)``
    the margins at w̃, the least of which is one. ``alignment`` is α and ``size`` is ‖w̃‖ =
    γ^{−1/L}, each ``(B,)``."""

    norm: Norm
    w: Rows
    force: Rows
    multipliers: Float[Tensor, "B M"]
    q: Float[Tensor, "B M"]
    alignment: PerTrajectory
    size: PerTrajectory

    @staticmethod
    def of(problem: Problem, state: State, norm: Norm) -> "Stationarity":
        """Raises ValueError for a regression."""
        norm = norm.bind(problem.layout)
        h = ascent(problem, state)
        q, mu = loss_multipliers(problem, state)
        worst = q.amin(-1)
        least = torch.where(worst > 0, worst, torch.nan)
        scale = least ** (-1 / problem.degree)
        size = norm.value(state.w)
        slope = norm.dual(h)
        exponent = 1 - 2 / problem.degree
        factor = size / slope * least**exponent
        pull = scale * size / slope
        along = dot(state.w, h)
        return Stationarity(
            norm=norm,
            w=scale[:, None] * state.w,
            force=pull[:, None] * h,
            multipliers=factor[:, None] * mu,
            q=q / least[:, None],
            alignment=along / (size * slope),
            size=scale * size,
        )

    @property
    def divergence(self) -> PerTrajectory:
        """D, by the alignment."""
        return self.size**2 * (1 - self.alignment)

    @property
    def bregman(self) -> PerTrajectory:
        """D by its definition, ½‖Γ‖_*² − ½‖k‖_*² − ⟨w̃, Γ − k⟩ with a k ∈ ∂½‖w̃‖² (Tsilivis et al.
        2026, Def. 26)."""
        k = self.subgradient()
        missed = self.force - k
        pull = self.norm.dual(self.force)
        size = self.norm.dual(k)
        halves = 0.5 * pull**2 - 0.5 * size**2
        return halves - dot(self.w, missed)

    @property
    def slack(self) -> PerTrajectory:
        """Σ λ_i (q_i(w̃) − 1) ≥ 0: δ."""
        return dot(self.multipliers, self.q - 1)

    def subgradient(self) -> Rows:
        """One k ∈ ∂½‖w̃‖²."""
        direction = polar(self.norm).steepest(self.w)
        return self.size[:, None] * direction

    def residual(self, tol: float = 0.0) -> tuple[PerTrajectory, PerTrajectory]:
        """The distance of Γ from ∂½‖w̃‖² in ‖·‖₂ and in ‖·‖_*, over ‖w̃‖₂ and ‖w̃‖: the ε of Def.
        16, free of scale.

        Where ‖·‖ has corners the distance stays of order one while α → 1, because few coordinates
        attain the maximum exactly. With ``tol`` everything that attains it up to this share of ‖w̃‖
        counts; `residuals` is the curve. The second distance is that of the Euclidean nearest k:
        the least in vector norms, a bound in matrix norms."""
        dual = polar(self.norm)
        subgradients = dual.face(self.w, tol)
        unit = self.force / self.size[:, None]
        missed = unit - subgradients.project(unit)
        length = torch.linalg.vector_norm(self.w, dim=-1)
        ratio = self.size / length
        euclidean = torch.linalg.vector_norm(missed, dim=-1)
        return euclidean * ratio, self.norm.dual(missed)

    def residuals(self, tols: list[float]) -> tuple[ByTolerance, ByTolerance]:
        """`residual` over tolerances: both curves ε(η)."""
        euclidean, dual = zip(*map(self.residual, tols), strict=True)
        return torch.stack(euclidean), torch.stack(dual)

    def nearby(self) -> Nearby:
        """A point that is exactly stationary, within √D of w̃, for a force within √D of Γ."""
        unknown = torch.isnan(self.size)
        if bool(unknown.any()):
            raise ValueError(
                "nearby: got an example that is misclassified, expected none; try a later state"
            )
        radius = self.divergence.clamp_min(0).sqrt()
        w, force = nearby_pair(self.norm, self.w, self.force, radius)
        moved = self.norm.value(w - self.w)
        missed = self.norm.dual(force - self.force)
        return Nearby(
            w=w,
            force=force,
            moved=moved / self.size,
            missed=missed / self.size,
        )

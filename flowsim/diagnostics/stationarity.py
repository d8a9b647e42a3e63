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

The constrained problem that weight decay solves.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from flowsim.convex.cones import ekeland_point
from flowsim.diagnostics.margins import Observer
from flowsim.diagnostics.selected import ascent, loss_multipliers
from flowsim.motion.state import State
from flowsim.norms.norm import Norm
from flowsim.norms.polars import polar
from flowsim.norms.vector import L1, Linf
from flowsim.problems.objective import Objective
from flowsim.problems.problem import Problem


def frank_wolfe_gap(norm: Norm, radius: float) -> Callable[[Objective, State], Float[Tensor, " B"]]:
    """A measurement: max ⟨g, w − v⟩ over ‖v‖ ≤ radius, g = ∇𝓛, which is ⟨g, w⟩ + radius·‖g‖_*
    (Jaggi 2013).

    Inside the ball it is ≥ 0, zero at the KKT points of min 𝓛(w) over ‖w‖ ≤ radius, and where 𝓛 is
    convex it bounds 𝓛(w) − min 𝓛. Normalised steepest descent with decoupled weight decay λ, and
    AdamW in ℓ∞, are Frank–Wolfe steps of that problem for radius 1/λ."""

    def measure(problem: Objective, state: State) -> Tensor:
        lam, h = problem.ascent(state.w)
        gap = radius * norm.bind(problem.layout).dual(h) - (h * state.w).sum(-1)
        return torch.exp(-lam) * gap if problem.logarithmic else gap

    return measure


# --------------------------------------------------------------------------------------------------
# Measurements, for ``simulate(…, observe=…)``
# --------------------------------------------------------------------------------------------------


def dual(norm: Norm, *, ascent: Observer = ascent) -> Observer:
    """‖h‖_*, the slope of Λ in arclength."""
    return lambda problem, state: norm.bind(problem.layout).dual(ascent(problem, state))


def alignment(norm: Norm, *, ascent: Observer = ascent) -> Observer:
    """α = ⟨w, h⟩/(‖w‖‖h‖_*) ≤ 1, with the element h of ∇Λ that `ascent` gives; 1 at a KKT point."""

    def measure(problem: Problem, state: State) -> Tensor:
        bound, h = norm.bind(problem.layout), ascent(problem, state)
        return (state.w * h).sum(-1) / (bound.value(state.w) * bound.dual(h))

    return measure


def multipliers(norm: Norm) -> Observer:
    """λ_i ``(B, M)``; NaN while an example is misclassified."""
    return lambda problem, state: Stationarity.of(problem, state, norm).multipliers


def divergence(norm: Norm) -> Observer:
    """D = ‖w̃‖²(1 − α); NaN while an example is misclassified."""
    return lambda problem, state: Stationarity.of(problem, state, norm).divergence


def slackness(norm: Norm) -> Observer:
    """Σ λ_i (q_i(w̃) − 1) ≥ 0, the δ of an (ε, δ)-KKT point; NaN while an example is
    misclassified."""
    return lambda problem, state: Stationarity.of(problem, state, norm).slack


def residual(norm: Norm, tol: float = 0.0) -> Observer:
    """The ε of an (ε, δ)-KKT point in the dual norm, over ‖w̃‖ (see `Stationarity.residual`)."""
    return lambda problem, state: Stationarity.of(problem, state, norm).residual(tol)[1]


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
    w: Float[Tensor, "B P"]
    force: Float[Tensor, "B P"]
    multipliers: Float[Tensor, "B M"]
    q: Float[Tensor, "B M"]
    alignment: Float[Tensor, " B"]
    size: Float[Tensor, " B"]

    @staticmethod
    def of(problem: Problem, state: State, norm: Norm) -> "Stationarity":
        """Raises ValueError for a regression."""
        norm = norm.bind(problem.layout)
        q, mu = loss_multipliers(problem, state)
        least = q.amin(-1)
        least = torch.where(least > 0, least, torch.nan)
        scale = least ** (-1 / problem.degree)
        h = ascent(problem, state)
        size, slope = norm.value(state.w), norm.dual(h)
        factor = size / slope * least ** (1 - 2 / problem.degree)
        return Stationarity(
            norm=norm,
            w=scale[:, None] * state.w,
            force=(scale * size / slope)[:, None] * h,
            multipliers=factor[:, None] * mu,
            q=q / least[:, None],
            alignment=(state.w * h).sum(-1) / (size * slope),
            size=scale * size,
        )

    @property
    def divergence(self) -> Float[Tensor, " B"]:
        """D, by the alignment."""
        return self.size**2 * (1 - self.alignment)

    @property
    def bregman(self) -> Float[Tensor, " B"]:
        """D by its definition, ½‖Γ‖_*² − ½‖k‖_*² − ⟨w̃, Γ − k⟩ with a k ∈ ∂½‖w̃‖² (Tsilivis et al.
        2026, Def. 26)."""
        k = self.subgradient()
        halves = 0.5 * self.norm.dual(self.force) ** 2 - 0.5 * self.norm.dual(k) ** 2
        return halves - (self.w * (self.force - k)).sum(-1)

    @property
    def slack(self) -> Float[Tensor, " B"]:
        """Σ λ_i (q_i(w̃) − 1) ≥ 0: δ."""
        return (self.multipliers * (self.q - 1)).sum(-1)

    def subgradient(self) -> Float[Tensor, "B P"]:
        """One k ∈ ∂½‖w̃‖²."""
        return self.size[:, None] * polar(self.norm).steepest(self.w)

    def residual(self, tol: float = 0.0) -> tuple[Float[Tensor, " B"], Float[Tensor, " B"]]:
        """The distance of Γ from ∂½‖w̃‖² in ‖·‖₂ and in ‖·‖_*, over ‖w̃‖₂ and ‖w̃‖: the ε of Def.
        16, free of scale.

        Where ‖·‖ has corners the distance stays of order one while α → 1, because few coordinates
        attain the maximum exactly. With ``tol`` everything that attains it up to this share of ‖w̃‖
        counts; `residuals` is the curve. The second distance is that of the Euclidean nearest k:
        the least in vector norms, a bound in matrix norms."""
        unit = self.force / self.size[:, None]
        missed = unit - polar(self.norm).face(self.w, tol).project(unit)
        ratio = self.size / torch.linalg.vector_norm(self.w, dim=-1)
        return torch.linalg.vector_norm(missed, dim=-1) * ratio, self.norm.dual(missed)

    def residuals(self, tols: list[float]) -> tuple[Float[Tensor, "T B"], Float[Tensor, "T B"]]:
        """`residual` over tolerances: both curves ε(η)."""
        pairs = [self.residual(tol) for tol in tols]
        return torch.stack([a for a, _ in pairs]), torch.stack([b for _, b in pairs])

    def nearby(self) -> "Nearby":
        """A point that is exactly stationary, within √D of w̃, for a force within √D of Γ."""
        if bool(torch.isnan(self.size).any()):
            raise ValueError(
                "nearby: got an example that is misclassified, expected none; try a later state"
            )
        at = _nearby(self.norm, self.w, self.force, self.divergence.clamp_min(0).sqrt())
        moved = self.norm.value(at[0] - self.w) / self.size
        return Nearby(*at, moved=moved, missed=self.norm.dual(at[1] - self.force) / self.size)


@dataclass(frozen=True)
class Nearby:
    """A pair ``force`` k' ∈ ∂½‖w'‖² near (Γ, w̃), the certificate of Brøndsted and Rockafellar
    (1965).

    ``moved`` = ‖w' − w̃‖/‖w̃‖ and ``missed`` = ‖k' − Γ‖_*/‖w̃‖ are at most √(1 − α), however many
    corners the norm has."""

    w: Float[Tensor, "B P"]
    force: Float[Tensor, "B P"]
    moved: Float[Tensor, " B"]
    missed: Float[Tensor, " B"]


def _nearby(norm: Norm, w: Tensor, force: Tensor, radius: Tensor) -> tuple[Tensor, Tensor]:
    if norm.quadratic:  # half way between both
        middle = 0.5 * (w + norm.dual(force)[:, None] * norm.steepest(force))
        return middle, norm.value(middle)[:, None] * polar(norm).steepest(middle)
    if isinstance(norm, Linf):
        return _saturated(w, force, radius)
    if isinstance(norm, L1):  # the same with the roles of w and force exchanged
        force, w = _saturated(force, w, radius)
        return w, force
    pairs = [_cone_nearby(norm, *row) for row in zip(w, force, radius, strict=True)]
    return torch.stack([w for w, _ in pairs]), torch.stack([k for _, k in pairs])


def _saturated(w: Tensor, force: Tensor, radius: Tensor) -> tuple[Tensor, Tensor]:
    """In ℓ∞: keep the force where w is within √D of its maximum, with the right sign. What is
    dropped has a mass m of at most √D, as D = Σ |Γ_i|(‖w‖ − |w_i|). Then lower the maximum to ‖w‖ −
    m, which fits the remaining force."""
    size = w.abs().amax(-1, keepdim=True)
    kept = (size - force.sign() * w <= radius[:, None]) & (force != 0)
    level = torch.where(kept, force.abs(), 0.0).sum(-1, keepdim=True)
    return torch.where(kept, force.sign() * level, w.clamp(-level, level)), torch.where(
        kept, force, 0.0
    )


def _cone_nearby(norm: Norm, w: Tensor, force: Tensor, radius: Tensor) -> tuple[Tensor, Tensor]:
    """Ekeland's point, min ½‖v‖² − ⟨Γ, v⟩ + √D‖v − w‖, by a cone programme; k' are the multipliers
    of x = v."""
    size = float(norm.value(w))
    at, pull = ((a / size).double().cpu().numpy() for a in (w, force))
    near = ekeland_point(norm, at, pull, float(radius) / size)
    x, k = (size * torch.from_numpy(a).to(w) for a in near)
    return x, k

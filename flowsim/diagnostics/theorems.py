r"""Theorems as numbers: what steepest flow of a homogeneous net must satisfy, with a residual and
its bound.

Functions of (problem, state, norm) hold at one point, with the gradient and the velocity that the
flow has selected; functions of (run, norm) hold along a trajectory that has been observed by
``diagnostics.standard``. ``norm`` is the one that the flow descends in. "TGKV" is Tsilivis et al.
2026. With h = ∇Λ, u the unit velocity, p the softmax weights, H their entropy, γ̃ the soft and γ
the hard margin, and s, σ, t the clocks:

    at a point                                                          along a run
    `chain_rule`    dΛ/ds = ‖h‖_*                                       `energy`         𝓛 falls by ∫‖g‖_*² dt
    `least_dual`    ‖h‖_* is least over the kinks                       `monotone`       γ̃ never falls
    `growth`        d log γ̃/dσ = L[(1 + H/Λ)/α − ν]                     `growth_in_time` Λ grows as fast as log t
    `soft_hard`     γ − log M/‖w‖^L ≤ γ̃ ≤ γ                             `aligning`       ∫(1/α − 1)dσ ≤ log(γ̃/γ̃₀)/L
    `euler`         ⟨w, h⟩ = L(Λ + H)                                   `sharp_time`     t𝓛Λ^{2−2/L}L²γ^{2/L} → 1
    `level_rate`    dΛ/dt = L²γ̃^{2/L}α^{−2}(Λ + H)²Λ^{−2/L}e^{−Λ}       `linear_margin`  γ* − log M/s ≤ γ ≤ γ*
    `force`         ‖Γ‖_* = ‖w̃‖, D = ‖w̃‖²(1 − α)                        `contraction`    ‖r − r'‖₂ never grows
    `slack`         Σ λ(q/q_min − 1) ≤ M/(eγ̃^{2/L}LΛ)
    `weight`        Σ λq/q_min = ‖w̃‖²α/L
    `turning`       ‖d(w/‖w‖)/dσ‖ ≤ 2
    `smooth_force`  ‖Γ − ∇½‖w̃‖²‖_* ≤ √(2cD)
    `nearby`        a KKT pair within √D
"""

import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from numpy import ndarray as Array
from torch import Tensor

from flowsim.diagnostics.certificate import falls
from flowsim.diagnostics.margins import entropy, soft_margin
from flowsim.diagnostics.selected import ascent, gaps, selected_pullback, selected_sides
from flowsim.diagnostics.stationarity import Stationarity
from flowsim.motion.state import State
from flowsim.norms.norm import Norm
from flowsim.norms.polars import polar, smoothness
from flowsim.numerics.quadrature import log_elapsed, log_mean_exp
from flowsim.problems.problem import Problem
from flowsim.velocity.selection import select

EXACT = 1e-8  # bound on identities that hold up to rounding


SHARP = 1e-10  # the same where nothing is differentiated


@dataclass(frozen=True)
class Check:
    """A residual and what it may be at most; NaN where the theory says nothing, as before the data
    are separated."""

    residual: Any
    bound: Any

    @property
    def holds(self) -> bool:
        """Whether no residual exceeds its bound; those that are NaN do not count."""
        return not bool((self.residual > self.bound).any())


# --------------------------------------------------------------------------------------------------
# At a point
# --------------------------------------------------------------------------------------------------


def velocity(problem: Problem, state: State, norm: Norm) -> Float[Tensor, "B P"]:
    """The unit velocity dw/ds of the flow: at ties what its method has followed, where the state
    remembers it, else what `select` gives."""
    norm, h = norm.bind(problem.layout), ascent(problem, state)
    if not norm.ties:
        return norm.steepest(h)
    if "velocity" in state.memory:
        u = state.memory["velocity"] / norm.value(state.memory["velocity"])[:, None]
        if bool(
            ((u * h).sum(-1) >= (1 - EXACT) * norm.dual(h)).all()
        ):  # it was another norm's otherwise
            return u
    return select(problem, norm, state.w, selected_sides(problem, state)).direction


def rise(problem: Problem, state: State, u: Float[Tensor, "B P"]) -> Float[Tensor, " B"]:
    """The derivative of Λ along u from the right, example by example: no gradient in the weights
    enters."""
    sides = selected_sides(problem, state)
    if sides is None:
        moves = problem.net.pushforward(state.w, problem.x, u)
        return (
            (problem.loss.ascent(problem.outputs(state.w), problem.y)[1] * moves).flatten(1).sum(-1)
        )
    hinges = problem.hinges(state.w)
    along, on = hinges.along(u), (sides > 0) & (sides < 1)
    return (hinges.base * u).sum(-1) + (
        hinges.jump * torch.where(on, along.clamp_min(0), sides * along)
    ).sum(-1)


def radial(
    problem: Problem, state: State, norm: Norm, u: Float[Tensor, "B P"]
) -> Float[Tensor, " B"]:
    """ν, the derivative of ‖w‖ along u from the right: max ⟨n, u⟩ over n ∈ ∂‖w‖."""
    return polar(norm.bind(problem.layout)).face(state.w).support(u)


def chain_rule(problem: Problem, state: State, norm: Norm) -> Check:
    """dΛ/ds = ‖h‖_* (TGKV, Prop. 7)."""
    slope = norm.bind(problem.layout).dual(ascent(problem, state))
    return Check((rise(problem, state, velocity(problem, state, norm)) / slope - 1).abs(), EXACT)


def least_dual(problem: Problem, state: State, norm: Norm) -> Check:
    """‖h‖_* is the least of Clarke's set (TGKV, Prop. 7)."""
    least = select(problem, norm, state.w, selected_sides(problem, state)).dual
    return Check((norm.bind(problem.layout).dual(ascent(problem, state)) / least - 1).abs(), EXACT)


def growth(problem: Problem, state: State, norm: Norm) -> Check:
    """d log γ̃/dσ = L[(1 + H(p)/Λ)/α − ν], where Λ > 0; exponential loss."""
    lam, H = _level(problem, state)
    L, u, size = (
        problem.degree,
        velocity(problem, state, norm),
        norm.bind(problem.layout).value(state.w),
    )
    nu = radial(problem, state, norm, u)
    grows = size * rise(problem, state, u) / lam - L * nu
    said = L * ((1 + H / lam) / _alpha(problem, state, norm) - nu)
    return Check((grows - said).abs() / (1 + said.abs()), EXACT)


def soft_hard(problem: Problem, state: State, norm: Norm) -> Check:
    """γ − log M/‖w‖^L ≤ γ̃ ≤ γ (TGKV, Lemma 11); exponential loss. In units of 1/‖w‖^L."""
    lam, q = problem.lam(state.w), _gaps(problem, state)
    least = q.amin(-1)
    return Check(
        torch.maximum(lam - least, least - math.log(q.shape[1]) - lam), SHARP * (1 + lam.abs())
    )


def euler(problem: Problem, state: State, norm: Norm) -> Check:
    """⟨w, h⟩ = L(Λ + H(p)); exponential loss."""
    lam, H = _level(problem, state, separated=False)
    product = (state.w * ascent(problem, state)).sum(-1)
    return Check(
        (product - problem.degree * (lam + H)).abs() / (problem.degree * (lam.abs() + H)), EXACT
    )


def level_rate(problem: Problem, state: State, norm: Norm) -> Check:
    """dΛ/dt = L²γ̃^{2/L}α^{−2}(Λ + H)²Λ^{−2/L}e^{−Λ}, by logarithms, where Λ > 0; exponential
    loss."""
    lam, H = _level(problem, state)
    L, h = problem.degree, ascent(problem, state)
    slope = norm.bind(problem.layout).dual(h)
    runs = torch.log(slope) + torch.log(rise(problem, state, velocity(problem, state, norm))) - lam
    soft, alpha = soft_margin(norm)(problem, state), _alpha(problem, state, norm)
    said = 2 * torch.log(L * (lam + H) / alpha) + (2 / L) * torch.log(soft / lam) - lam
    return Check((runs - said).abs(), EXACT)


def force(problem: Problem, state: State, norm: Norm) -> Check:
    """Σ λ_i ∇q_i(w̃), summed over examples at w̃ itself, has the dual norm ‖w̃‖, and the divergence
    is ‖w̃‖²(1 − α) (TGKV, Prop. 28 with equality)."""
    at = Stationarity.of(problem, state, norm)
    back = gaps(problem).read(problem.outputs(at.w), problem.y)[1]
    gamma = selected_pullback(problem, replace(state, w=at.w))(back(at.multipliers))
    off = (at.norm.dual(gamma) / at.size - 1).abs()
    return Check(torch.maximum(off, (at.divergence - at.bregman).abs() / at.size**2), SHARP)


def slack(problem: Problem, state: State, norm: Norm) -> Check:
    """Σ λ_i(q_i/q_min − 1) ≤ M/(e γ̃^{2/L} L Λ), where Λ > 0 (TGKV, Prop. 28); exponential loss."""
    at, (lam, _) = Stationarity.of(problem, state, norm), _level(problem, state)
    soft = soft_margin(norm)(problem, state)
    return Check(
        at.slack, at.q.shape[1] / (math.e * soft ** (2 / problem.degree) * problem.degree * lam)
    )


def weight(problem: Problem, state: State, norm: Norm) -> Check:
    """Σ λ_i q_i/q_min = ‖w̃‖²α/L."""
    at = Stationarity.of(problem, state, norm)
    said = at.size**2 * at.alignment / problem.degree
    return Check(((at.multipliers * at.q).sum(-1) / said - 1).abs(), EXACT)


def turning(problem: Problem, state: State, norm: Norm) -> Check:
    """‖d(w/‖w‖)/dσ‖ ≤ 2 (TGKV, Lemma 18)."""
    norm, u = norm.bind(problem.layout), velocity(problem, state, norm)
    inward = radial(problem, state, norm, u) / norm.value(state.w)
    return Check(norm.value(u - inward[:, None] * state.w), 2 * (1 + SHARP))


def smooth_force(problem: Problem, state: State, norm: Norm) -> Check:
    """‖Γ − ∇½‖w̃‖²‖_* ≤ √(2cD) where ½‖·‖² is c-smooth (TGKV, Prop. 29), over ‖w̃‖; no bound in
    other norms. An equality in quadratic norms."""
    at = Stationarity.of(problem, state, norm)
    c = smoothness(at.norm)
    gap = (1 - at.alignment).clamp_min(0)
    return Check(
        at.residual()[1],
        (2 * c * gap).sqrt() + SHARP if math.isfinite(c) else torch.full_like(gap, math.inf),
    )


def nearby(problem: Problem, state: State, norm: Norm) -> Check:
    """A KKT pair within √D of (Γ, w̃), over ‖w̃‖ (Brøndsted and Rockafellar 1965), found by
    `Stationarity.nearby`."""
    at = Stationarity.of(problem, state, norm)
    found = at.nearby()
    return Check(
        torch.maximum(found.moved, found.missed), (1 - at.alignment).clamp_min(0).sqrt() + EXACT
    )


def _gaps(problem: Problem, state: State) -> Float[Tensor, "B M"]:
    return gaps(problem).read(problem.outputs(state.w), problem.y)[0]


def _alpha(problem: Problem, state: State, norm: Norm) -> Float[Tensor, " B"]:
    norm, h = norm.bind(problem.layout), ascent(problem, state)
    return (state.w * h).sum(-1) / (norm.value(state.w) * norm.dual(h))


def _level(problem: Problem, state: State, *, separated: bool = True) -> tuple[Tensor, Tensor]:
    """Λ and H(p) of an exponential loss; Λ is NaN where it is not positive."""
    if problem.loss.tail.name != "exponential":
        raise ValueError(
            f"got the {problem.loss.name} loss, expected an exponential tail, for which this identity holds; try "
            "loss=flowsim.exponential or flowsim.pairwise_exponential"
        )
    lam = problem.lam(state.w)
    return torch.where(lam > 0, lam, torch.nan) if separated else lam, entropy(problem, state)


# --------------------------------------------------------------------------------------------------
# Balances of neurons and layers
# --------------------------------------------------------------------------------------------------


def neuron_balance(
    problem: Problem, state: State, norm: Norm
) -> tuple[Float[Tensor, "B m"], Float[Tensor, "B m"]]:
    """‖w_j‖ and ‖a_j‖ of each hidden neuron of a two-layer net, in a norm of vectors: incoming and
    outgoing weights.

    At a KKT point in ℓp, p < ∞, they are equal for every neuron; in ℓ2 ‖w_j‖² − ‖a_j‖² is constant
    along the flow, sliding or not. Raises ValueError for nets that do not have two layers."""
    if len(problem.layout) != 2 or any(len(block.shape) != 2 for block in problem.layout):
        raise ValueError(
            f"neuron_balance: got {len(problem.layout)} blocks, expected the two layers of MLP([d, m, c])"
        )
    first, last = (block.of(state.w) for block in problem.layout)
    return norm.value(first), norm.value(last.mT)


# --------------------------------------------------------------------------------------------------
# Along a run: arrays (K − 1, B), from one save point to the next, or (K, B)
# --------------------------------------------------------------------------------------------------


def energy(run: Any, norm: Norm, tol: float = 1e-3) -> Check:
    """𝓛 falls by ∫‖g‖_*² dt (TGKV, Prop. 7), from the first save to each later one, as a share of
    the fall.

    The integral is taken over the saves, as if ‖g‖_* were a power of t between them, so that it
    knows nothing of how the run was integrated; saves have to be dense. All by logarithms.
    ``dual_…`` of the norm must have been observed."""
    log_t, lam = run["log_time"], run["lam"]
    rate = 2 * (np.log(run[f"dual_{norm.name}"]) - lam) + log_t  # of ‖g‖²dt in log t
    with np.errstate(invalid="ignore"):
        part = _log_mean(rate[:-1], rate[1:]) + np.log(np.diff(log_t, axis=0))
    begun = np.isfinite(log_t[:-1])  # a run starts at t = 0, which has no logarithm
    first = np.take_along_axis(lam, begun.argmax(0)[None], 0)
    fall = np.expm1(first - lam[1:])
    spent = np.logaddexp.accumulate(np.where(begun, part, -np.inf), 0) + first
    return Check(np.abs(np.exp(spent) / np.where(begun & (fall < 0), -fall, np.nan) - 1), tol)


def _log_mean(a: Array, b: Array) -> Array:
    return log_mean_exp(torch.from_numpy(a), torch.from_numpy(b)).numpy()


def dissipation(run: Any, tol: float = 1e-3) -> Check:
    """Λ rises by ∫‖h‖_* ds, as the method has summed it step by step, from the first save to each
    later one."""
    risen, spent = (run[name][1:] - run[name][:1] for name in ("lam", "dissipated"))
    return Check(np.abs(spent / np.where(risen > 0, risen, np.nan) - 1), tol)


def monotone(run: Any, norm: Norm, tol: float = 1e-12) -> Check:
    """γ̃ never falls once it is positive (TGKV, Thm 1 and 22): relative falls from save to save."""
    soft = run[f"soft_margin_{norm.name}"]
    return Check(falls(np.where(soft > 0, soft, np.nan)), tol)


def growth_in_time(run: Any, norm: Norm) -> Check:
    """∫ x^{2/L−2} e^x dx over the Λ of each interval ≥ L²γ̃^{2/L}·(its time) (TGKV, Eq. 34), where
    Λ > 0; exponential loss. Both sides by logarithms: the residual is log(right/left)."""
    L, lam = _degree(run), np.where(run["lam"] > 0, run["lam"], np.nan)
    step, power = np.diff(lam, axis=0), 2 / L - 2
    ends = [lam[:-1] + power * np.log(lam[:-1]), lam[1:] + power * np.log(lam[1:])]
    slopes = [step * (1 + power / lam[:-1]), step * (1 + power / lam[1:])]
    args = [torch.from_numpy(a).flatten() for a in (*ends, *slopes)]
    left = log_elapsed(*args).view(step.shape).numpy() + np.log(step)
    soft, log_t = run[f"soft_margin_{norm.name}"][:-1], run["log_time"]
    elapsed = log_t[1:] + np.log(-np.expm1(log_t[:-1] - log_t[1:]))
    right = 2 * math.log(L) + (2 / L) * np.log(np.where(soft > 0, soft, np.nan)) + elapsed
    return Check(right - left, 1e-6)


def aligning(run: Any, norm: Norm) -> Check:
    """∫(1/α − 1)dσ ≤ log(γ̃₂/γ̃₁)/L over every interval, where Λ > 0 (TGKV, Eq. 46): the residual
    is left minus right.

    The integral is a trapezoidal sum over saves; the bound is its error, estimated from twice the
    spacing."""
    soft = run[f"soft_margin_{norm.name}"]
    right = np.diff(np.log(np.where(soft > 0, soft, np.nan)), axis=0) / _degree(run)
    alpha = run[f"alignment_{norm.name}"]
    excess = 1 / np.where(alpha > 0, alpha, np.nan) - 1
    width = np.diff(run["relative"], axis=0)
    left = width * (excess[1:] + excess[:-1]) / 2
    return Check(left - right, np.abs(np.diff(excess, axis=0)) * width / 2)


def sharp_time(run: Any, norm: Norm) -> Check:
    """t𝓛Λ^{2−2/L}L²γ^{2/L} → 1 as α → 1: the constant of 𝓛 ~ 1/(L²γ^{2/L} t (log t)^{2−2/L}).
    Exponential loss.

    The residual is its distance from 1. The bound 1 − α² + 2H/Λ + 2(2 − 2/L)/Λ + (γ/γ̃)^{2/L} − 1
    adds up what each step of the asymptotics drops; it presumes that these have changed little
    while t doubled."""
    L, lam = _degree(run), np.where(run["lam"] > 0, run["lam"], np.nan)
    hard, soft = (run[f"{kind}_{norm.name}"] for kind in ("margin", "soft_margin"))
    with np.errstate(invalid="ignore"):
        log = (
            run["log_time"]
            - lam
            + (2 - 2 / L) * np.log(lam)
            + 2 * math.log(L)
            + (2 / L) * np.log(hard)
        )
        apart = (hard / soft) ** (2 / L) - 1
    bound = 1 - run[f"alignment_{norm.name}"] ** 2 + 2 * (run["entropy"] + 2 - 2 / L) / lam + apart
    return Check(np.abs(np.expm1(log)), bound)


def linear_margin(run: Any, norm: Norm, best: float) -> Check:
    """(Λ₀ + γ*s)/(‖w₀‖ + s) ≤ γ̃ and γ ≤ γ* ≤ ‖h‖_* on a linear model with an exponential loss,
    whose largest margin γ* is ``best``, in arclength s from the first save. The residual is the
    largest violation, over γ*."""
    hard, dual = (run[f"{kind}_{norm.name}"] for kind in ("margin", "dual"))
    s = run["arclength"] - run["arclength"][:1]
    path = run[f"norm_{norm.name}"][:1] + s  # ‖w‖ is at most this
    behind = (run["lam"][:1] + best * s - run["lam"]) / np.where(path > 0, path, np.nan)
    return Check(np.fmax(np.fmax(hard - best, best - dual), behind) / best, EXACT)


def contraction(problem: Problem, one: Any, other: Any) -> Check:
    """‖r − r'‖₂ never grows between two flows of one linear regression, saved at the same times;
    any norm. The residual is its growth from save to save, over its first value."""
    if not (problem.net.linear and problem.loss.reading.targets == "values"):
        raise ValueError(
            "contraction: got another problem, expected a linear model with loss=flowsim.squared"
        )
    if one.weights is None or other.weights is None:
        raise ValueError("contraction: got a run without weights, expected one that has kept them")
    apart = [
        problem.outputs(torch.from_numpy(a - b)).flatten(1).norm(dim=-1).numpy()
        for a, b in zip(one.weights, other.weights, strict=True)
    ]
    distance = np.stack(apart)
    return Check(np.diff(distance, axis=0) / distance[:1], EXACT)


def _degree(run: Any) -> float:
    return run.provenance["objective"]["degree"]

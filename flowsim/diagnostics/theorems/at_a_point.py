"""Theorems that hold at one point of a flow: functions of (problem, state, norm), written in the
letters of `FlowAt`."""

import math
from collections.abc import Callable
from dataclasses import replace
from functools import wraps

import torch

from flowsim.diagnostics.selected import (
    loss_multipliers,
    margin_reading,
    selected_pullback,
    selected_sides,
)
from flowsim.diagnostics.theorems.check import EXACT, SHARP, Check
from flowsim.diagnostics.theorems.flow_at import FlowAt
from flowsim.motion.state import State
from flowsim.norms.norm import Norm
from flowsim.norms.polars import smoothness
from flowsim.problems.problem import Problem
from flowsim.velocity.selection import select


def pointwise(theorem: Callable[[FlowAt], Check]) -> Callable[[Problem, State, Norm], Check]:
    """The theorem as a function of (problem, state, norm)."""

    @wraps(theorem)
    def check(problem: Problem, state: State, norm: Norm) -> Check:
        return theorem(FlowAt(problem, state, norm.bind(problem.layout)))

    del check.__wrapped__  # whose signature would stand for this one
    return check


@pointwise
def chain_rule(at: FlowAt) -> Check:
    """dΛ/ds = ‖h‖_* (TGKV, Prop. 7)."""
    return Check((at.rise / at.slope - 1).abs(), EXACT)


@pointwise
def least_dual(at: FlowAt) -> Check:
    """‖h‖_* is the least of Clarke's set (TGKV, Prop. 7)."""
    sides = selected_sides(at.problem, at.state)
    least = select(at.problem, at.norm, at.state.w, sides)
    return Check((at.slope / least.dual - 1).abs(), EXACT)


@pointwise
def growth(at: FlowAt) -> Check:
    """d log γ̃/dσ = L[(1 + H(p)/Λ)/α − ν], where Λ > 0; exponential loss."""
    grows = at.size * at.rise / at.lam - at.L * at.nu
    said = at.L * ((1 + at.H / at.lam) / at.alpha - at.nu)
    return Check((grows - said).abs() / (1 + said.abs()), EXACT)


@pointwise
def soft_hard(at: FlowAt) -> Check:
    """γ − log M/‖w‖^L ≤ γ̃ ≤ γ (TGKV, Lemma 11); exponential loss. In units of 1/‖w‖^L."""
    q, soft = loss_multipliers(at.problem, at.state)[0], at.level
    hard = q.amin(-1)
    above = soft - hard
    below = hard - math.log(q.shape[1]) - soft
    return Check(torch.maximum(above, below), SHARP * (1 + soft.abs()))


@pointwise
def euler(at: FlowAt) -> Check:
    """⟨w, h⟩ = L(Λ + H(p)); exponential loss."""
    off = at.radial_rise - at.L * (at.level + at.H)
    return Check(off.abs() / (at.L * (at.level.abs() + at.H)), EXACT)


@pointwise
def level_rate(at: FlowAt) -> Check:
    """dΛ/dt = L²γ̃^{2/L}α^{−2}(Λ + H)²Λ^{−2/L}e^{−Λ}, by logarithms, where Λ > 0; exponential
    loss."""
    runs = torch.log(at.slope) + torch.log(at.rise) - at.lam
    said = 2 * torch.log(at.L * (at.lam + at.H) / at.alpha)
    said = said + (2 / at.L) * torch.log(at.soft / at.lam) - at.lam
    return Check((runs - said).abs(), EXACT)


@pointwise
def force(at: FlowAt) -> Check:
    """Σ λ_i ∇q_i(w̃), summed over examples at w̃ itself, has the dual norm ‖w̃‖, and the divergence
    is ‖w̃‖²(1 − α) (TGKV, Prop. 28 with equality)."""
    kkt, problem = at.kkt, at.problem
    back = margin_reading(problem).read(problem.outputs(kkt.w), problem.y)[1]
    pullback = selected_pullback(problem, replace(at.state, w=kkt.w))
    gamma = pullback(back(kkt.multipliers))
    length = kkt.norm.dual(gamma) / kkt.size - 1
    apart = (kkt.divergence - kkt.bregman) / kkt.size**2
    return Check(torch.maximum(length.abs(), apart.abs()), SHARP)


@pointwise
def slack(at: FlowAt) -> Check:
    """Σ λ_i(q_i/q_min − 1) ≤ M/(e γ̃^{2/L} L Λ), where Λ > 0 (TGKV, Prop. 28); exponential loss."""
    M = at.kkt.q.shape[1]
    bound = M / (math.e * at.soft ** (2 / at.L) * at.L * at.lam)
    return Check(at.kkt.slack, bound)


@pointwise
def weight(at: FlowAt) -> Check:
    """Σ λ_i q_i/q_min = ‖w̃‖²α/L."""
    kkt = at.kkt
    found = (kkt.multipliers * kkt.q).sum(-1)
    said = kkt.size**2 * kkt.alignment / at.L
    return Check((found / said - 1).abs(), EXACT)


@pointwise
def turning(at: FlowAt) -> Check:
    """‖d(w/‖w‖)/dσ‖ ≤ 2 (TGKV, Lemma 18)."""
    inward = (at.nu / at.size)[:, None] * at.state.w
    return Check(at.norm.value(at.u - inward), 2 * (1 + SHARP))


@pointwise
def smooth_force(at: FlowAt) -> Check:
    """‖Γ − ∇½‖w̃‖²‖_* ≤ √(2cD) where ½‖·‖² is c-smooth (TGKV, Prop. 29), over ‖w̃‖; no bound in
    other norms. An equality in quadratic norms."""
    kkt = at.kkt
    c = smoothness(kkt.norm)
    missing = (1 - kkt.alignment).clamp_min(0)
    bound = (2 * c * missing).sqrt() + SHARP
    return Check(kkt.residual()[1], bound if math.isfinite(c) else missing + math.inf)


@pointwise
def nearby(at: FlowAt) -> Check:
    """A KKT pair within √D of (Γ, w̃), over ‖w̃‖ (Brøndsted and Rockafellar 1965), found by
    `Stationarity.nearby`."""
    kkt = at.kkt
    pair = kkt.nearby()
    bound = (1 - kkt.alignment).clamp_min(0).sqrt()
    return Check(torch.maximum(pair.moved, pair.missed), bound + EXACT)

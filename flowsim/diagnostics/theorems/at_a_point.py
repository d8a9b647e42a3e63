"""Theorems that hold at one point of a flow: functions of (problem, state, norm), written in the
letters of `FlowAt`."""

import math
from collections.abc import Callable
from dataclasses import replace
from functools import wraps
from typing import TypeAlias

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
from flowsim.numerics.batched import dot
from flowsim.problems.problem import Problem
from flowsim.velocity.selection import select

Pointwise: TypeAlias = Callable[[Problem, State, Norm], Check]
"""A theorem as the user calls it."""


def pointwise(theorem: Callable[[FlowAt], Check]) -> Pointwise:
    """The theorem as a function of (problem, state, norm)."""

    @wraps(theorem)
    def check(problem: Problem, state: State, norm: Norm) -> Check:
        bound = norm.bind(problem.layout)
        return theorem(FlowAt(problem, state, bound))

    del check.__wrapped__  # whose signature would stand for this one
    return check


@pointwise
def chain_rule(at: FlowAt) -> Check:
    """dΛ/ds = ‖h‖_* (TGKV, Prop. 7)."""
    return Check.of_ratio(at.rise, at.slope, EXACT)


@pointwise
def least_dual(at: FlowAt) -> Check:
    """‖h‖_* is the least of Clarke's set (TGKV, Prop. 7)."""
    sides = selected_sides(at.problem, at.state)
    least = select(at.problem, at.norm, at.state.w, sides)
    return Check.of_ratio(at.slope, least.dual, EXACT)


@pointwise
def growth(at: FlowAt) -> Check:
    """d log γ̃/dσ = L[(1 + H(p)/Λ)/α − ν], where Λ > 0; exponential loss."""
    L = at.L
    lam = at.lam
    grows = at.size * at.rise / lam - L * at.nu
    rise = (1 + at.H / lam) / at.alpha
    said = L * (rise - at.nu)
    apart = (grows - said).abs()
    return Check(apart / (1 + said.abs()), EXACT)


@pointwise
def soft_hard(at: FlowAt) -> Check:
    """γ − log M/‖w‖^L ≤ γ̃ ≤ γ (TGKV, Lemma 11); exponential loss. In units of 1/‖w‖^L."""
    q, _ = loss_multipliers(at.problem, at.state)
    M = q.shape[1]
    soft = at.level
    hard = q.amin(-1)
    above = soft - hard
    below = hard - math.log(M) - soft
    violation = torch.maximum(above, below)
    return Check(violation, SHARP * (1 + soft.abs()))


@pointwise
def euler(at: FlowAt) -> Check:
    """⟨w, h⟩ = L(Λ + H(p)); exponential loss."""
    L = at.L
    lam = at.level
    apart = at.radial_rise - L * (lam + at.H)
    scale = L * (lam.abs() + at.H)
    return Check(apart.abs() / scale, EXACT)


@pointwise
def level_rate(at: FlowAt) -> Check:
    """dΛ/dt = L²γ̃^{2/L}α^{−2}(Λ + H)²Λ^{−2/L}e^{−Λ}, by logarithms, where Λ > 0; exponential
    loss."""
    L = at.L
    lam = at.lam
    runs = torch.log(at.slope) + torch.log(at.rise) - lam
    growth = torch.log(L * (lam + at.H) / at.alpha)
    shrink = torch.log(at.soft / lam)
    said = 2 * growth + (2 / L) * shrink - lam
    return Check((runs - said).abs(), EXACT)


@pointwise
def force(at: FlowAt) -> Check:
    """Σ λ_i ∇q_i(w̃), summed over examples at w̃ itself, has the dual norm ‖w̃‖, and the divergence
    is ‖w̃‖²(1 − α) (TGKV, Prop. 28 with equality)."""
    kkt = at.kkt
    problem = at.problem
    f = problem.outputs(kkt.w)
    _, back = margin_reading(problem).read(f, problem.y)
    scaled = replace(at.state, w=kkt.w)
    pullback = selected_pullback(problem, scaled)
    gamma = pullback(back(kkt.multipliers))
    dual = kkt.norm.dual(gamma)
    length = dual / kkt.size - 1
    apart = (kkt.divergence - kkt.bregman) / kkt.size**2
    error = torch.maximum(length.abs(), apart.abs())
    return Check(error, SHARP)


@pointwise
def slack(at: FlowAt) -> Check:
    """Σ λ_i(q_i/q_min − 1) ≤ M/(e γ̃^{2/L} L Λ), where Λ > 0 (TGKV, Prop. 28); exponential loss."""
    L = at.L
    M = at.kkt.q.shape[1]
    power = at.soft ** (2 / L)
    bound = M / (math.e * power * L * at.lam)
    return Check(at.kkt.slack, bound)


@pointwise
def weight(at: FlowAt) -> Check:
    """Σ λ_i q_i/q_min = ‖w̃‖²α/L."""
    kkt = at.kkt
    found = dot(kkt.multipliers, kkt.q)
    said = kkt.size**2 * kkt.alignment / at.L
    return Check.of_ratio(found, said, EXACT)


@pointwise
def turning(at: FlowAt) -> Check:
    """‖d(w/‖w‖)/dσ‖ ≤ 2 (TGKV, Lemma 18)."""
    growth = at.nu / at.size
    outward = growth[:, None] * at.state.w
    speed = at.norm.value(at.u - outward)
    return Check(speed, 2 * (1 + SHARP))


@pointwise
def smooth_force(at: FlowAt) -> Check:
    """‖Γ − ∇½‖w̃‖²‖_* ≤ √(2cD) where ½‖·‖² is c-smooth (TGKV, Prop. 29), over ‖w̃‖; no bound in
    other norms. An equality in quadratic norms."""
    kkt = at.kkt
    c = smoothness(kkt.norm)
    missing = (1 - kkt.alignment).clamp_min(0)
    bound = (2 * c * missing).sqrt() + SHARP
    if not math.isfinite(c):
        bound = missing + math.inf
    _, residual = kkt.residual()
    return Check(residual, bound)


@pointwise
def nearby(at: FlowAt) -> Check:
    """A KKT pair within √D of (Γ, w̃), over ‖w̃‖ (Brøndsted and Rockafellar 1965), found by
    `Stationarity.nearby`."""
    kkt = at.kkt
    pair = kkt.nearby()
    missing = (1 - kkt.alignment).clamp_min(0)
    distance = torch.maximum(pair.moved, pair.missed)
    return Check(distance, missing.sqrt() + EXACT)

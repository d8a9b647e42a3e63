"""Theorems that hold at one point of a flow: functions of (problem, state, norm)."""

import math
from dataclasses import replace

import torch

from flowsim.diagnostics.selected import margin_reading, selected_pullback, selected_sides
from flowsim.diagnostics.theorems.check import EXACT, SHARP, Check
from flowsim.diagnostics.theorems.flow_at import FlowAt
from flowsim.motion.state import State
from flowsim.norms.norm import Norm
from flowsim.norms.polars import smoothness
from flowsim.problems.problem import Problem
from flowsim.velocity.selection import select


def chain_rule(problem: Problem, state: State, norm: Norm) -> Check:
    """dΛ/ds = ‖h‖_* (TGKV, Prop. 7)."""
    at = FlowAt(problem, state, norm)
    return Check((at.rise / at.slope - 1).abs(), EXACT)


def least_dual(problem: Problem, state: State, norm: Norm) -> Check:
    """‖h‖_* is the least of Clarke's set (TGKV, Prop. 7)."""
    least = select(problem, norm, state.w, selected_sides(problem, state)).dual
    return Check((FlowAt(problem, state, norm).slope / least - 1).abs(), EXACT)


def growth(problem: Problem, state: State, norm: Norm) -> Check:
    """d log γ̃/dσ = L[(1 + H(p)/Λ)/α − ν], where Λ > 0; exponential loss."""
    at = FlowAt(problem, state, norm)
    grows = at.size * at.rise / at.lam - at.L * at.nu
    said = at.L * ((1 + at.H / at.lam) / at.alpha - at.nu)
    return Check((grows - said).abs() / (1 + said.abs()), EXACT)


def soft_hard(problem: Problem, state: State, norm: Norm) -> Check:
    """γ − log M/‖w‖^L ≤ γ̃ ≤ γ (TGKV, Lemma 11); exponential loss. In units of 1/‖w‖^L."""
    soft = FlowAt(problem, state, norm).level
    q = margin_reading(problem).read(problem.outputs(state.w), problem.y)[0]  # (B, M)
    hard = q.amin(-1)
    above, below = soft - hard, hard - math.log(q.shape[1]) - soft
    return Check(torch.maximum(above, below), SHARP * (1 + soft.abs()))


def euler(problem: Problem, state: State, norm: Norm) -> Check:
    """⟨w, h⟩ = L(Λ + H(p)); exponential loss."""
    at = FlowAt(problem, state, norm)
    off = at.radial_rise - at.L * (at.level + at.H)
    return Check(off.abs() / (at.L * (at.level.abs() + at.H)), EXACT)


def level_rate(problem: Problem, state: State, norm: Norm) -> Check:
    """dΛ/dt = L²γ̃^{2/L}α^{−2}(Λ + H)²Λ^{−2/L}e^{−Λ}, by logarithms, where Λ > 0; exponential
    loss."""
    at = FlowAt(problem, state, norm)
    runs = torch.log(at.slope) + torch.log(at.rise) - at.lam
    said = 2 * torch.log(at.L * (at.lam + at.H) / at.alpha)
    said = said + (2 / at.L) * torch.log(at.soft / at.lam) - at.lam
    return Check((runs - said).abs(), EXACT)


def force(problem: Problem, state: State, norm: Norm) -> Check:
    """Σ λ_i ∇q_i(w̃), summed over examples at w̃ itself, has the dual norm ‖w̃‖, and the divergence
    is ‖w̃‖²(1 − α) (TGKV, Prop. 28 with equality)."""
    kkt = FlowAt(problem, state, norm).kkt
    back = margin_reading(problem).read(problem.outputs(kkt.w), problem.y)[1]
    gamma = selected_pullback(problem, replace(state, w=kkt.w))(back(kkt.multipliers))
    length = (kkt.norm.dual(gamma) / kkt.size - 1).abs()
    return Check(torch.maximum(length, (kkt.divergence - kkt.bregman).abs() / kkt.size**2), SHARP)


def slack(problem: Problem, state: State, norm: Norm) -> Check:
    """Σ λ_i(q_i/q_min − 1) ≤ M/(e γ̃^{2/L} L Λ), where Λ > 0 (TGKV, Prop. 28); exponential loss."""
    at = FlowAt(problem, state, norm)
    M = at.kkt.q.shape[1]
    return Check(at.kkt.slack, M / (math.e * at.soft ** (2 / at.L) * at.L * at.lam))


def weight(problem: Problem, state: State, norm: Norm) -> Check:
    """Σ λ_i q_i/q_min = ‖w̃‖²α/L."""
    kkt = FlowAt(problem, state, norm).kkt
    said = kkt.size**2 * kkt.alignment / problem.degree
    return Check(((kkt.multipliers * kkt.q).sum(-1) / said - 1).abs(), EXACT)


def turning(problem: Problem, state: State, norm: Norm) -> Check:
    """‖d(w/‖w‖)/dσ‖ ≤ 2 (TGKV, Lemma 18)."""
    at = FlowAt(problem, state, norm)
    sideways = at.u - (at.nu / at.size)[:, None] * state.w
    return Check(norm.bind(problem.layout).value(sideways), 2 * (1 + SHARP))


def smooth_force(problem: Problem, state: State, norm: Norm) -> Check:
    """‖Γ − ∇½‖w̃‖²‖_* ≤ √(2cD) where ½‖·‖² is c-smooth (TGKV, Prop. 29), over ‖w̃‖; no bound in
    other norms. An equality in quadratic norms."""
    kkt = FlowAt(problem, state, norm).kkt
    c, missing = smoothness(kkt.norm), (1 - kkt.alignment).clamp_min(0)
    smooth = math.isfinite(c)
    bound = (2 * c * missing).sqrt() + SHARP if smooth else torch.full_like(missing, math.inf)
    return Check(kkt.residual()[1], bound)


def nearby(problem: Problem, state: State, norm: Norm) -> Check:
    """A KKT pair within √D of (Γ, w̃), over ‖w̃‖ (Brøndsted and Rockafellar 1965), found by
    `Stationarity.nearby`."""
    kkt = FlowAt(problem, state, norm).kkt
    pair = kkt.nearby()
    bound = (1 - kkt.alignment).clamp_min(0).sqrt()
    return Check(torch.maximum(pair.moved, pair.missed), bound + EXACT)

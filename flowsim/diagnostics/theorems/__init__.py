r"""Theorems as numbers: what steepest flow of a homogeneous net must satisfy, with a residual and
its bound.

Functions of (problem, state, norm) hold at one point, with the gradient and the velocity that the
flow has selected; functions of (run, norm) hold along a trajectory that has been observed by
``diagnostics.standard``. ``norm`` is the one that the flow descends in. "TGKV" is Tsilivis et al.
2026. With h = ∇Λ, u the unit velocity, p the softmax weights, H their entropy, γ̃ the soft and γ
the hard margin, and s, σ, t the clocks:

    at a point
    `chain_rule`      dΛ/ds = ‖h‖_*
    `least_dual`      ‖h‖_* is least over the kinks
    `growth`          d log γ̃/dσ = L[(1 + H/Λ)/α − ν]
    `soft_hard`       γ − log M/‖w‖^L ≤ γ̃ ≤ γ
    `euler`           ⟨w, h⟩ = L(Λ + H)
    `level_rate`      dΛ/dt = L²γ̃^{2/L}α^{−2}(Λ + H)²Λ^{−2/L}e^{−Λ}
    `force`           ‖Γ‖_* = ‖w̃‖, D = ‖w̃‖²(1 − α)
    `slack`           Σ λ(q/q_min − 1) ≤ M/(eγ̃^{2/L}LΛ)
    `weight`          Σ λq/q_min = ‖w̃‖²α/L
    `turning`         ‖d(w/‖w‖)/dσ‖ ≤ 2
    `smooth_force`    ‖Γ − ∇½‖w̃‖²‖_* ≤ √(2cD)
    `nearby`          a KKT pair within √D

    along a run
    `energy`          𝓛 falls by ∫‖g‖_*² dt
    `monotone`        γ̃ never falls
    `growth_in_time`  Λ grows as fast as log t
    `aligning`        ∫(1/α − 1)dσ ≤ log(γ̃/γ̃₀)/L
    `sharp_time`      t𝓛Λ^{2−2/L}L²γ^{2/L} → 1
    `linear_margin`   γ* − log M/s ≤ γ ≤ γ*
    `contraction`     ‖r − r'‖₂ never grows
"""

from flowsim.lazy import attach

__getattr__, __dir__, __all__ = attach(__name__)

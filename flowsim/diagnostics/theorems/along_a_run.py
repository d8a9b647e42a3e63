"""Theorems that hold along a run: arrays ``(K, B)``, or from one save to the next."""

import math
from typing import Any, Protocol

import numpy as np
import torch
from jaxtyping import Float
from numpy import ndarray as Array

from flowsim.diagnostics.margins import classifies
from flowsim.diagnostics.series import Series, changes, falls, positive
from flowsim.diagnostics.theorems.check import EXACT, Check
from flowsim.norms.norm import Norm
from flowsim.numerics.quadrature import log_elapsed, log_mean_exp
from flowsim.problems.problem import Problem


class Run(Protocol):
    """What is read of a run: its values ``(K, B)`` by name, its weights ``(K, B, P)`` or None, and
    the degree of its objective."""

    def __getitem__(self, name: str) -> Array: ...

    @property
    def weights(self) -> Array | None: ...

    @property
    def provenance(self) -> dict[str, Any]: ...


def energy(run: Run, norm: Norm, tol: float = 1e-3) -> Check:
    """𝓛 falls by ∫‖g‖_*² dt (TGKV, Prop. 7), from the first save to each later one, as a fraction
    of the fall.

    The integral is taken over the saves, as if ‖g‖_* were a power of t between them, so that it
    knows nothing of how the run was integrated; saves have to be dense. All by logarithms.
    ``dual_…`` of the norm must have been observed."""
    log_t = run["log_time"]
    lam = run["lam"]
    begun = np.isfinite(log_t[:-1])  # a run starts at t = 0, which has no logarithm
    at_first = begun.argmax(0)[None]
    first = np.take_along_axis(lam, at_first, 0)
    parts = np.where(begun, _log_spent(run, norm), -np.inf)
    spent = np.logaddexp.accumulate(parts, 0) + first
    fallen = -np.expm1(first - lam[1:])
    fall = np.where(begun, fallen, np.nan)
    return Check.of_ratio(np.exp(spent), positive(fall), tol)


def _log_spent(run: Run, norm: Norm) -> Float[Array, "K-1 B"]:
    """log ∫‖g‖_*² dt from save to save."""
    log_t = run["log_time"]
    dual = run[f"dual_{norm.name}"]
    log_g = np.log(dual) - run["lam"]
    rate = torch.from_numpy(2 * log_g + log_t)  # of ‖g‖²dt in log t
    with np.errstate(invalid="ignore"):
        mean = log_mean_exp(rate[:-1], rate[1:])
        width = changes(log_t)
        return mean.numpy() + np.log(width)


def dissipation(run: Run, tol: float = 1e-3) -> Check:
    """Λ rises by ∫‖h‖_* ds, as the method has summed it step by step, from the first save to each
    later one."""
    lam = run["lam"]
    dissipated = run["dissipated"]
    gained = lam[1:] - lam[:1]
    spent = dissipated[1:] - dissipated[:1]
    return Check.of_ratio(spent, positive(gained), tol)


def monotone(run: Run, norm: Norm, tol: float = 1e-12) -> Check:
    """γ̃ never falls once it is positive (TGKV, Thm 1 and 22): relative falls from save to save."""
    soft = _soft(run, norm)
    return Check(falls(soft), tol)


def growth_in_time(run: Run, norm: Norm) -> Check:
    """∫ x^{2/L−2} e^x dx over the Λ of each interval ≥ L²γ̃^{2/L}·(its time) (TGKV, Eq. 34), where
    Λ > 0; exponential loss. Both sides by logarithms: the residual is log(right/left)."""
    L = _degree(run)
    log_t = run["log_time"]
    lam = positive(run["lam"])
    left = _log_integral(lam, 2 / L - 2)
    fraction = -np.expm1(-changes(log_t))  # of the time since the start
    elapsed = log_t[1:] + np.log(fraction)
    soft = _soft(run, norm)[:-1]
    growth = (2 / L) * np.log(soft)
    right = 2 * math.log(L) + growth + elapsed
    return Check(right - left, 1e-6)


def _log_integral(lam: Series, power: float) -> Float[Array, "K-1 B"]:
    """log ∫ x^power e^x dx over the Λ of each interval."""
    width = changes(lam)
    integrand = lam + power * np.log(lam)  # its logarithm
    slope = 1 + power / lam
    before = width * slope[:-1]
    after = width * slope[1:]
    ends = (integrand[:-1], integrand[1:], before, after)
    flat = [torch.from_numpy(end).flatten() for end in ends]
    unit = log_elapsed(*flat).view(width.shape)
    return unit.numpy() + np.log(width)


def aligning(run: Run, norm: Norm) -> Check:
    """∫(1/α − 1)dσ ≤ log(γ̃₂/γ̃₁)/L over every interval, where Λ > 0 (TGKV, Eq. 46): the residual
    is left minus right.

    The integral is a trapezoidal sum over saves; the bound is its error, estimated from twice the
    spacing."""
    alpha = positive(run[f"alignment_{norm.name}"])
    excess = 1 / alpha - 1
    width = changes(run["relative"])
    ends = excess[1:] + excess[:-1]
    left = width * ends / 2
    log_soft = np.log(_soft(run, norm))
    right = changes(log_soft) / _degree(run)
    change = np.abs(changes(excess))
    return Check(left - right, change * width / 2)


def sharp_time(run: Run, norm: Norm) -> Check:
    """t𝓛Λ^{2−2/L}L²γ^{2/L} → 1 as α → 1: the constant of 𝓛 ~ 1/(L²γ^{2/L} t (log t)^{2−2/L}).
    Exponential loss.

    The residual is its distance from 1. The bound 1 − α² + 2H/Λ + 2(2 − 2/L)/Λ + (γ/γ̃)^{2/L} − 1
    adds up what each step of the asymptotics drops; it presumes that these have changed little
    while t doubled."""
    L = _degree(run)
    lam = positive(run["lam"])
    hard = run[f"margin_{norm.name}"]
    soft = run[f"soft_margin_{norm.name}"]
    with np.errstate(invalid="ignore"):
        of_lam = (2 - 2 / L) * np.log(lam)
        of_margin = (2 / L) * np.log(hard)
        apart = (hard / soft) ** (2 / L) - 1
    powers = of_lam + 2 * math.log(L) + of_margin
    product = np.expm1(run["log_time"] - lam + powers)
    alpha = run[f"alignment_{norm.name}"]
    missing = 1 - alpha**2
    dropped = 2 * (run["entropy"] + 2 - 2 / L) / lam
    return Check(np.abs(product), missing + dropped + apart)


def linear_margin(run: Run, norm: Norm, best: float) -> Check:
    """(Λ₀ + γ*s)/(‖w₀‖ + s) ≤ γ̃ and γ ≤ γ* ≤ ‖h‖_* on a linear model with an exponential loss,
    whose largest margin γ* is ``best``, in arclength s from the first save. The residual is the
    largest violation, over γ*."""
    lam = run["lam"]
    hard = run[f"margin_{norm.name}"]
    slope = run[f"dual_{norm.name}"]
    length = run[f"norm_{norm.name}"]
    s = run["arclength"]
    s = s - s[:1]
    path = length[:1] + s  # ‖w‖ is at most this
    late = lam[:1] + best * s - lam
    behind = late / positive(path)
    beyond = np.fmax(hard - best, best - slope)
    violation = np.fmax(beyond, behind)
    return Check(violation / best, EXACT)


def contraction(problem: Problem, one: Run, other: Run) -> Check:
    """‖r − r'‖₂ never grows between two flows of one linear regression, saved at the same times;
    any norm. The residual is its growth from save to save, over its first value."""
    regression = not classifies(problem)
    if not (regression and problem.net.linear):
        raise ValueError(
            "contraction: got another problem, expected a linear model with loss=flowsim.squared"
        )
    if one.weights is None or other.weights is None:
        raise ValueError("contraction: got a run without weights, expected one that has kept them")
    apart = torch.from_numpy(one.weights - other.weights)
    residuals = [problem.outputs(w).flatten(1) for w in apart]
    norms = torch.stack(residuals).norm(dim=-1)
    distance = norms.numpy()
    growth = changes(distance)
    return Check(growth / distance[:1], EXACT)


def _degree(run: Run) -> float:
    objective = run.provenance["objective"]
    return objective["degree"]


def _soft(run: Run, norm: Norm) -> Series:
    """γ̃ where it is positive."""
    soft = run[f"soft_margin_{norm.name}"]
    return positive(soft)

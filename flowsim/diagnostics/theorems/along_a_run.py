"""Theorems that hold along a run: arrays ``(K, B)``, or from one save to the next."""

import math
from typing import Any, Protocol

import numpy as np
import torch
from numpy import ndarray as Array

from flowsim.diagnostics.margins import classifies
from flowsim.diagnostics.series import Series, falls, positive
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
    dual = run[f"dual_{norm.name}"]
    log_g = np.log(dual) - lam
    rate = torch.from_numpy(2 * log_g + log_t)  # of ‖g‖²dt in log t
    with np.errstate(invalid="ignore"):
        mean = log_mean_exp(rate[:-1], rate[1:])
        width = np.diff(log_t, axis=0)
        part = mean.numpy() + np.log(width)
    begun = np.isfinite(log_t[:-1])  # a run starts at t = 0, which has no logarithm
    at_first = begun.argmax(0)[None]
    first = np.take_along_axis(lam, at_first, 0)
    parts = np.where(begun, part, -np.inf)
    spent = np.logaddexp.accumulate(parts, 0) + first
    fallen = -np.expm1(first - lam[1:])
    fall = np.where(begun, fallen, np.nan)
    ratio = np.exp(spent) / positive(fall)
    return Check(np.abs(ratio - 1), tol)


def dissipation(run: Run, tol: float = 1e-3) -> Check:
    """Λ rises by ∫‖h‖_* ds, as the method has summed it step by step, from the first save to each
    later one."""
    gained = run["lam"][1:] - run["lam"][:1]
    spent = run["dissipated"][1:] - run["dissipated"][:1]
    ratio = spent / positive(gained)
    return Check(np.abs(ratio - 1), tol)


def monotone(run: Run, norm: Norm, tol: float = 1e-12) -> Check:
    """γ̃ never falls once it is positive (TGKV, Thm 1 and 22): relative falls from save to save."""
    soft = _soft(run, norm)
    return Check(falls(soft), tol)


def growth_in_time(run: Run, norm: Norm) -> Check:
    """∫ x^{2/L−2} e^x dx over the Λ of each interval ≥ L²γ̃^{2/L}·(its time) (TGKV, Eq. 34), where
    Λ > 0; exponential loss. Both sides by logarithms: the residual is log(right/left)."""
    L = _degree(run)
    lam = positive(run["lam"])
    log_t = run["log_time"]
    power = 2 / L - 2
    width = np.diff(lam, axis=0)
    integrand = lam + power * np.log(lam)  # its logarithm
    slope = 1 + power / lam
    values = (integrand[:-1], integrand[1:])
    slopes = (width * slope[:-1], width * slope[1:])
    ends = [torch.from_numpy(a).flatten() for a in (*values, *slopes)]
    unit = log_elapsed(*ends).view(width.shape)
    left = unit.numpy() + np.log(width)
    fraction = -np.expm1(-np.diff(log_t, axis=0))  # of the time since the start
    elapsed = log_t[1:] + np.log(fraction)
    soft = _soft(run, norm)[:-1]
    right = 2 * math.log(L) + (2 / L) * np.log(soft) + elapsed
    return Check(right - left, 1e-6)


def aligning(run: Run, norm: Norm) -> Check:
    """∫(1/α − 1)dσ ≤ log(γ̃₂/γ̃₁)/L over every interval, where Λ > 0 (TGKV, Eq. 46): the residual
    is left minus right.

    The integral is a trapezoidal sum over saves; the bound is its error, estimated from twice the
    spacing."""
    alpha = positive(run[f"alignment_{norm.name}"])
    excess = 1 / alpha - 1
    width = np.diff(run["relative"], axis=0)
    left = width * (excess[1:] + excess[:-1]) / 2
    soft = _soft(run, norm)
    grown = np.diff(np.log(soft), axis=0)
    right = grown / _degree(run)
    change = np.diff(excess, axis=0)
    error = np.abs(change) * width / 2
    return Check(left - right, error)


def sharp_time(run: Run, norm: Norm) -> Check:
    """t𝓛Λ^{2−2/L}L²γ^{2/L} → 1 as α → 1: the constant of 𝓛 ~ 1/(L²γ^{2/L} t (log t)^{2−2/L}).
    Exponential loss.

    The residual is its distance from 1. The bound 1 − α² + 2H/Λ + 2(2 − 2/L)/Λ + (γ/γ̃)^{2/L} − 1
    adds up what each step of the asymptotics drops; it presumes that these have changed little
    while t doubled."""
    L = _degree(run)
    lam = positive(run["lam"])
    log_t = run["log_time"]
    hard = run[f"margin_{norm.name}"]
    soft = run[f"soft_margin_{norm.name}"]
    with np.errstate(invalid="ignore"):
        of_lam = (2 - 2 / L) * np.log(lam)
        of_margin = (2 / L) * np.log(hard)
        apart = (hard / soft) ** (2 / L) - 1
    powers = of_lam + 2 * math.log(L) + of_margin
    product = np.expm1(log_t - lam + powers)
    alpha = run[f"alignment_{norm.name}"]
    missing = 1 - alpha**2
    dropped = 2 * (run["entropy"] + 2 - 2 / L) / lam
    bound = missing + dropped + apart
    return Check(np.abs(product), bound)


def linear_margin(run: Run, norm: Norm, best: float) -> Check:
    """(Λ₀ + γ*s)/(‖w₀‖ + s) ≤ γ̃ and γ ≤ γ* ≤ ‖h‖_* on a linear model with an exponential loss,
    whose largest margin γ* is ``best``, in arclength s from the first save. The residual is the
    largest violation, over γ*."""
    lam = run["lam"]
    hard = run[f"margin_{norm.name}"]
    slope = run[f"dual_{norm.name}"]
    length = run[f"norm_{norm.name}"]
    s = run["arclength"] - run["arclength"][:1]
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
    residuals = torch.stack([problem.outputs(w).flatten(1) for w in apart])
    distance = residuals.norm(dim=-1).numpy()
    growth = np.diff(distance, axis=0)
    return Check(growth / distance[:1], EXACT)


def _degree(run: Run) -> float:
    objective = run.provenance["objective"]
    return objective["degree"]


def _soft(run: Run, norm: Norm) -> Series:
    """γ̃ where it is positive."""
    soft = run[f"soft_margin_{norm.name}"]
    return positive(soft)

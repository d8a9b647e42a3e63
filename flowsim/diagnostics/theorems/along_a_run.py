"""Theorems that hold along a run: arrays ``(K, B)``, or from one save to the next."""

import math
from typing import Any, Protocol

import numpy as np
import torch
from jaxtyping import Float
from numpy import ndarray as Array

from flowsim.diagnostics.margins import classifies
from flowsim.diagnostics.series import falls, positive
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
    log_t, lam = run["log_time"], run["lam"]
    log_g = np.log(run[f"dual_{norm.name}"]) - lam
    rate = torch.from_numpy(2 * log_g + log_t)  # of ‖g‖²dt in log t
    with np.errstate(invalid="ignore"):
        mean = log_mean_exp(rate[:-1], rate[1:])
        part = mean.numpy() + np.log(np.diff(log_t, axis=0))
    begun = np.isfinite(log_t[:-1])  # a run starts at t = 0, which has no logarithm
    first = np.take_along_axis(lam, begun.argmax(0)[None], 0)
    parts = np.where(begun, part, -np.inf)
    spent = np.logaddexp.accumulate(parts, 0) + first
    fall = np.where(begun, -np.expm1(first - lam[1:]), np.nan)
    return Check(np.abs(np.exp(spent) / positive(fall) - 1), tol)


def dissipation(run: Run, tol: float = 1e-3) -> Check:
    """Λ rises by ∫‖h‖_* ds, as the method has summed it step by step, from the first save to each
    later one."""
    gained, spent = (run[name][1:] - run[name][:1] for name in ("lam", "dissipated"))
    return Check(np.abs(spent / positive(gained) - 1), tol)


def monotone(run: Run, norm: Norm, tol: float = 1e-12) -> Check:
    """γ̃ never falls once it is positive (TGKV, Thm 1 and 22): relative falls from save to save."""
    return Check(falls(_soft(run, norm)), tol)


def growth_in_time(run: Run, norm: Norm) -> Check:
    """∫ x^{2/L−2} e^x dx over the Λ of each interval ≥ L²γ̃^{2/L}·(its time) (TGKV, Eq. 34), where
    Λ > 0; exponential loss. Both sides by logarithms: the residual is log(right/left)."""
    L, lam, log_t = _degree(run), positive(run["lam"]), run["log_time"]
    power, width = 2 / L - 2, np.diff(lam, axis=0)
    integrand = lam + power * np.log(lam)  # its logarithm
    slope = 1 + power / lam
    ends = (integrand[:-1], integrand[1:], width * slope[:-1], width * slope[1:])
    unit = log_elapsed(*(torch.from_numpy(a).flatten() for a in ends))
    left = unit.view(width.shape).numpy() + np.log(width)
    elapsed = log_t[1:] + np.log(-np.expm1(log_t[:-1] - log_t[1:]))
    right = 2 * math.log(L) + (2 / L) * np.log(_soft(run, norm)[:-1]) + elapsed
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
    right = np.diff(np.log(_soft(run, norm)), axis=0) / _degree(run)
    error = np.abs(np.diff(excess, axis=0)) * width / 2
    return Check(left - right, error)


def sharp_time(run: Run, norm: Norm) -> Check:
    """t𝓛Λ^{2−2/L}L²γ^{2/L} → 1 as α → 1: the constant of 𝓛 ~ 1/(L²γ^{2/L} t (log t)^{2−2/L}).
    Exponential loss.

    The residual is its distance from 1. The bound 1 − α² + 2H/Λ + 2(2 − 2/L)/Λ + (γ/γ̃)^{2/L} − 1
    adds up what each step of the asymptotics drops; it presumes that these have changed little
    while t doubled."""
    L, lam, log_t = _degree(run), positive(run["lam"]), run["log_time"]
    hard = run[f"margin_{norm.name}"]
    soft = run[f"soft_margin_{norm.name}"]
    with np.errstate(invalid="ignore"):
        powers = (2 - 2 / L) * np.log(lam) + 2 * math.log(L) + (2 / L) * np.log(hard)
        apart = (hard / soft) ** (2 / L) - 1
    missing = 1 - run[f"alignment_{norm.name}"] ** 2
    dropped = 2 * (run["entropy"] + 2 - 2 / L) / lam
    return Check(np.abs(np.expm1(log_t - lam + powers)), missing + dropped + apart)


def linear_margin(run: Run, norm: Norm, best: float) -> Check:
    """(Λ₀ + γ*s)/(‖w₀‖ + s) ≤ γ̃ and γ ≤ γ* ≤ ‖h‖_* on a linear model with an exponential loss,
    whose largest margin γ* is ``best``, in arclength s from the first save. The residual is the
    largest violation, over γ*."""
    hard, slope = (run[f"{kind}_{norm.name}"] for kind in ("margin", "dual"))
    s = run["arclength"] - run["arclength"][:1]
    path = run[f"norm_{norm.name}"][:1] + s  # ‖w‖ is at most this
    behind = (run["lam"][:1] + best * s - run["lam"]) / positive(path)
    beyond = np.fmax(hard - best, best - slope)
    return Check(np.fmax(beyond, behind) / best, EXACT)


def contraction(problem: Problem, one: Run, other: Run) -> Check:
    """‖r − r'‖₂ never grows between two flows of one linear regression, saved at the same times;
    any norm. The residual is its growth from save to save, over its first value."""
    if classifies(problem) or not problem.net.linear:
        raise ValueError(
            "contraction: got another problem, expected a linear model with loss=flowsim.squared"
        )
    if one.weights is None or other.weights is None:
        raise ValueError("contraction: got a run without weights, expected one that has kept them")
    apart = torch.from_numpy(one.weights - other.weights)
    distance = np.stack([problem.outputs(w).flatten(1).norm(dim=-1).numpy() for w in apart])
    return Check(np.diff(distance, axis=0) / distance[:1], EXACT)


def _degree(run: Run) -> float:
    return run.provenance["objective"]["degree"]


def _soft(run: Run, norm: Norm) -> Float[Array, "K B"]:
    """γ̃ where it is positive."""
    return positive(run[f"soft_margin_{norm.name}"])

r"""Steepest flows along rays, for the exponential loss: one example, and KKT directions of nets."""

import math
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from numpy import ndarray as Array
from numpy.typing import ArrayLike
from scipy.integrate import quad
from scipy.optimize import brentq
from scipy.special import expi

from flowsim.norms.norm import Norm


@dataclass(frozen=True)
class Ray:
    """w(s) = w0 + s·u, along which all margins are q(s) = (q0^{1/L} + γ^{1/L} s)^L.

    With m ``examples`` of equal margin, ‖∇Λ‖_* = dq/ds and dt = e^q ds/(m dq/ds) give

        log t = log ∫ q^{2/L − 2} e^q dq − log(m L² γ^{2/L})   from q0 to q.
    """

    w0: Float[Array, " P"]
    direction: Float[Array, " P"]
    q0: float
    gamma: float
    degree: float = 1
    examples: int = 1

    def weights(self, s: ArrayLike) -> Array:
        """w at arclengths s, with a last axis for the weights."""
        s = np.asarray(s, dtype=float)
        return self.w0 + np.multiply.outer(s, self.direction)

    def margin(self, s: ArrayLike) -> Array:
        """q(s), the margin of every example; Λ = q − log m."""
        s = np.asarray(s, dtype=float)
        if self.degree == 1:
            return self.q0 + self.gamma * s
        power = 1 / self.degree
        root = self.q0**power + self.gamma**power * s
        return root**self.degree

    def log_time(self, s: ArrayLike) -> Array:
        """log t at arclengths s."""
        log_time = np.vectorize(self._log_time_of, otypes=[float])
        return log_time(self.margin(s))

    def length(self, log_t: ArrayLike) -> Array:
        """The arclength at log t."""
        if self.degree == 1:
            log_grown = np.asarray(log_t) + self._log_rate
            q = np.logaddexp(self.q0, log_grown)
            return (q - self.q0) / self.gamma
        length = np.vectorize(self._length_at, otypes=[float])
        return length(log_t)

    @property
    def _log_rate(self) -> float:
        L = self.degree
        return math.log(self.examples * L**2) + 2 / L * math.log(self.gamma)

    def _log_time_of(self, q: float) -> float:
        return log_growth(self.q0, q, self.degree) - self._log_rate

    def _length_at(self, log_t: float) -> float:
        def late(q: float) -> float:
            return self._log_time_of(q) - log_t

        q0 = self.q0
        high = q0 + 1
        while late(high) < 0:
            high = q0 + 2 * (high - q0)
        q = brentq(late, q0 + 1e-300, high, xtol=1e-14, rtol=1e-14)
        power = 1 / self.degree
        grown = q**power - q0**power
        return float(grown / self.gamma**power)


def log_growth(q0: float, q: float, degree: float) -> float:
    """log ∫ x^{2/L − 2} e^x dx from q0 to q: e^q − e^{q0} for L = 1, Ei(q) − Ei(q0) for L = 2, else
    by quadrature."""
    if q <= q0:
        return -math.inf
    if degree == 1:
        return q + math.log(-math.expm1(q0 - q))
    if degree == 2 and q < 700:
        return math.log(expi(q) - expi(q0))
    first = max(q0, q - 60)  # what lies below is e^{−60} of the whole

    power = 2 / degree - 2

    def density(x: float) -> float:
        return math.exp(x - q) * x**power

    integral, _ = quad(density, first, q, epsabs=0, limit=200)
    return q + math.log(integral)


def one_example(z: ArrayLike, w0: ArrayLike, norm: Norm) -> Ray:
    """One example z = y·x and a linear model: q = log(e^{q0} + ‖z‖_*² t), straight along a steepest
    direction of z.

    Where z has several, this is one of them, and the margin is the same in all.
    """
    z = np.asarray(z, dtype=float)
    w0 = np.asarray(w0, dtype=float)
    h = torch.from_numpy(z)
    return Ray(
        w0,
        direction=norm.steepest(h).numpy(),
        q0=float(z @ w0),
        gamma=float(norm.dual(h)),
    )


def radial_ray(w0: ArrayLike, norm: Norm, q0: float, degree: float, examples: int = 1) -> Ray:
    """A net of degree L from a KKT direction w0 where all margins are q0 > 0: w keeps its
    direction.

    For f = uv and u = v, Ei(q) = Ei(q0) + ct with c = 2 in ℓ2, 4 in ℓ∞ and 1 in ℓ1. That w0 is such
    a direction is the caller's word: w0/‖w0‖ has to be steepest for a mean of the gradients of its
    margins."""
    w0 = np.asarray(w0, dtype=float)
    size = float(norm.value(torch.from_numpy(w0)))
    gamma = q0 / size**degree
    return Ray(w0, w0 / size, q0, gamma, degree, examples)

"""Integrals of e^r where r may be huge, of which only logarithms are formed, and the cubic through
both ends of a step."""

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor


def log_mean_exp(a: Tensor, b: Tensor) -> Tensor:
    """log ∫₀¹ e^{a + (b − a)u} du: the mean of a function whose logarithm is linear between its
    ends."""
    gap = (a - b).abs()
    small = gap < 1e-6
    safe = torch.where(small, torch.ones_like(gap), gap)
    ratio = torch.where(small, -gap / 2, torch.log(-torch.expm1(-safe) / safe))
    return torch.maximum(a, b) + ratio


def hermite(u: Tensor, a: Tensor, b: Tensor, da: Tensor, db: Tensor) -> Tensor:
    """The cubic with values a, b and derivatives da, db at u = 0 and 1."""
    gap = b - a
    return a + u * (da + u * ((3 * gap - 2 * da - db) + u * (da + db - 2 * gap)))


# panels that shrink towards both ends, where a large exponent has its mass, with five
# Gauss-Legendre nodes in each
_LEFT = torch.tensor([0.0, *(0.5**k for k in range(24, 0, -1))], dtype=torch.float64)
_EDGES = torch.cat([_LEFT, 1 - _LEFT.flip(0)[1:]])
_WIDTHS = _EDGES.diff()[:, None]
_GAUSS, _GAUSS_WEIGHTS = map(torch.from_numpy, np.polynomial.legendre.leggauss(5))
_NODES = (_EDGES[:-1, None] + _WIDTHS * (1 + _GAUSS) / 2).flatten()
_LOG_WEIGHTS = torch.log(_WIDTHS * _GAUSS_WEIGHTS / 2).flatten()


def log_elapsed(
    rate0: Float[Tensor, " B"],
    rate1: Float[Tensor, " B"],
    slope0: Float[Tensor, " B"],
    slope1: Float[Tensor, " B"],
    u: Float[Tensor, " B"] | None = None,
) -> Float[Tensor, " B"]:
    """log ∫₀ᵘ e^{r(v)} dv, u = 1 by default: the logarithm of the time spent in a step up to u.

    r, the log of a rate, is the cubic with values ``rate`` and derivatives ``slope`` at 0 and 1.
    Good to 1e-6 where r rises by up to 10⁶ within the step."""
    u = torch.ones_like(rate0) if u is None else u
    v = u[:, None] * _NODES.to(u)
    ends = (end[:, None] for end in (rate0, rate1, slope0, slope1))
    rates = hermite(v, *ends)  # (B, nodes)
    return torch.log(u) + torch.logsumexp(rates + _LOG_WEIGHTS.to(u), -1)
